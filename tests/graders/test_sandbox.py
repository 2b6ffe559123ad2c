"""Python graders: what they return, how they fail, and what they may not do."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from agile.tasks.graders import confined
from agile.tasks.graders.sandbox import Limits, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the confinement is Linux's")
SAMPLE, ITEM = {"output_text": "blue", "choices": []}, {"answer": "blue", "n": 2, "é": ["ü"]}
RUNTIME, TIME = ["python_grader_runtime_error"], ["python_grader_runtime_error", "unresponsive_reward_error"]


def graded(body: str, limits: Limits | None = None, head: str = "") -> tuple[float, list[str], str]:
    source = f"{head}\ndef grade(sample, item):\n " + body.replace("\n", "\n ")
    reward, errors = run_python(source, SAMPLE, ITEM, limits or Limits(time_s=20))
    return reward, errors.kinds, errors.python_grader_runtime_error_details or ""


@pytest.mark.parametrize(
    ("body", "reward"),
    [
        ("return 0.5", 0.5),
        ("return 1", 1.0),
        ("return True", 1.0),
        ("return -3.5", -3.5),
        ("return float(sample['output_text'] == item['answer'])", 1.0),
        ("return item['n'] / 4", 0.5),
        ("return item['é'] == ['ü']", 1.0),
        ("from fractions import Fraction\nreturn Fraction(1, 4)", 0.25),
        ("import re, json, datetime, statistics, decimal, difflib\nreturn 1", 1.0),
        ("print('x' * 100_000)\nreturn 1", 1.0),
        ("import sys\nsys.stderr.write('x')\nreturn 1", 1.0),
        ("import os\nreturn len(set(os.environ) - {'LC_ALL', 'PYTHONHASHSEED'} - "
         "{k for k in os.environ if k.endswith('_NUM_THREADS')})", 0.0),
        ("import asyncio\nasync def f(): return 0.75\nreturn asyncio.run(f())", 0.75),
        ("from concurrent.futures import ThreadPoolExecutor\nreturn sum(ThreadPoolExecutor(4).map(abs, [1, -1]))", 2.0),
        ("class X:\n def __float__(self): return 0.5\nreturn X()", 0.5),
        ("import zoneinfo\nreturn zoneinfo.ZoneInfo('Europe/Berlin') is not None", 1.0),
    ],
)  # fmt: skip
def test_a_grader_gives_a_number(body: str, reward: float) -> None:
    assert graded(body) == (reward, [], "")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return None", "grade returned None, expected a finite number"),
        ("return '0.5'", "returned '0.5'"),
        ("return [1]", "returned [1]"),
        ("return float('nan')", "returned nan"),
        ("return 1e308 * 10", "returned inf"),
        ("return 10 ** 400", "OverflowError"),
        ("return item['missing']", "line 3: KeyError: 'missing'"),
        ("x = 1\nreturn x / 0", "line 4: ZeroDivisionError"),
        ("def f(): return f()\nreturn f()", "RecursionError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("import agile", "No module named 'agile'"),
        ("import os\nos._exit(0)", "ended itself with code 0"),
        ("import os\nos.abort()", "was ended by"),
        ("class X(Exception):\n def __str__(self): raise ValueError\nraise X", "X"),
        ("return bytearray(3 << 30)", "MemoryError"),
    ],
)
def test_a_grader_that_fails_says_where_and_how(body: str, said: str) -> None:
    reward, kinds, details = graded(body)
    assert (reward, kinds) == (0.0, RUNTIME)
    assert said in details


@pytest.mark.parametrize(
    "body",
    [
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import socket\nsocket.socket()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')",
        "import os\nos.kill(os.getppid(), 9)",
        "open('/etc/passwd')",
        "open('FILE')",
        "open('FILE', 'w')",
        "open('FILE.new', 'w')",
        "import os\nos.remove('FILE')",
        "import os\nos.chmod('FILE', 0)",
        "import os\nos.listdir('FOLDER')",
        "import os\nos.mkdir('FOLDER/new')",
        "import os\nos.truncate('FILE', 0)",
        "import os\nos.rename('FILE', 'FILE.new')",
        "open('/proc/self/environ')",
        "import tempfile\ntempfile.mkstemp()",
    ],
)
def test_nothing_outside_is_within_reach(body: str, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text("secret")
    mode = file.stat().st_mode
    reward, kinds, details = graded(body.replace("FILE", str(file)).replace("FOLDER", str(tmp_path)) + "\nreturn 1")
    assert (reward, kinds) == (0.0, RUNTIME)
    assert "Error" in details
    assert file.read_text() == "secret"
    assert file.stat().st_mode == mode
    assert list(tmp_path.iterdir()) == [file]


def test_time_is_limited() -> None:
    assert graded("while True: pass", Limits(time_s=0.4)) == (0.0, TIME, "no answer within 0.4 s; it was ended")


def test_threads_are_limited() -> None:
    body = "import threading, time\nfor i in range(9): threading.Thread(target=time.sleep, args=(9,)).start()\n"
    reward, kinds, details = graded(body + "time.sleep(9)", Limits(time_s=20, num_threads=4))
    assert (reward, kinds) == (0.0, RUNTIME)
    assert re.fullmatch("it had [0-9]+ threads, at most 4 are allowed", details)


@pytest.mark.parametrize(
    "written",
    [
        '{"reward": NaN}\\n',
        '{"server_error": "x"}\\n',
        '"ready"\\n{"reward": 1}\\n',
        "\\xff\\n",
        "[" * 60_000,
        "x" * 99_999,
    ],
    ids=["nan", "server error", "ready again", "no text", "deep", "long"],
)
def test_what_is_written_to_the_pipe_is_not_believed(written: str) -> None:
    body = f"import os\nfor fd in range(64):\n try: os.write(fd, b'{written}')\n except OSError: pass\nos._exit(0)"
    assert graded(body)[:2] == (0.0, RUNTIME)


def test_a_source_that_is_no_python_is_an_error_of_the_grader() -> None:
    reward, errors = run_python("def grade(sample, item:", SAMPLE, ITEM)
    assert (reward, errors.kinds) == (0.0, RUNTIME)
    assert "SyntaxError" in errors.details[0]


def test_where_nothing_confines_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "uname", lambda: type("U", (), {"machine": "riscv64"}))
    reward, errors = run_python("def grade(sample, item): return 1", SAMPLE, ITEM)
    assert (reward, errors.kinds) == (0.0, ["python_grader_server_error"])
    assert "Linux x86-64" in (errors.python_grader_server_error_type or "")
    monkeypatch.undo()
    # a kernel without Landlock, as the process inside would see it
    broken = tmp_path / "confined.py"
    broken.write_text(Path(confined.__file__).read_text().replace('"landlock_create_ruleset", 444', '"landlock", 999'))
    monkeypatch.setattr(confined, "__file__", str(broken))
    reward, errors = run_python("def grade(sample, item): return 1", SAMPLE, ITEM)
    assert (reward, errors.kinds) == (0.0, ["python_grader_server_error"])
    assert "landlock" in errors.details[0]
    assert "`function` grader" in errors.details[0]


def test_sets_have_one_order_in_every_run() -> None:
    body = "return float(''.join(sorted({'a', 'b', 'c'}, key=hash)) == ''.join({'a', 'b', 'c'})) + hash('x') % 1000"
    assert len({graded(body)[0] for _ in range(3)}) == 1


def test_a_large_sample_arrives() -> None:
    text = "x" * 3_000_000
    reward, errors = run_python("def grade(s, i): return len(s['t'])", json.loads(json.dumps({"t": text})), {})
    assert (reward, errors.kinds) == (3_000_000.0, [])
