"""200 hostile python graders: each ends within its limit with the right error, and nothing of it is left."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from agile.tasks.graders.sandbox import Limits, run_python
from tests.machine import lives

TIME_S = 1.0  # of those that go on until it is over
LONG_S = 20.0  # of those that are stopped before, on a busy machine too
MEMORY = 512 << 20
AT_ONCE = 4
SLACK_S = 30.0  # a busy machine starts Python late, and ends it late

# What each does, with eight variants; {0} and {1} are words of the variant, FOLDER the run's folder, PORT one that is
# listened to, PARENT the process that grades. `time`: it goes on until its time is over; `error`: it is stopped at what
# it tries; `any`: either, by how far it comes.
WORDS = {
    "busy loop": ("time", "x = {0}\nwhile True: x = x * 3 % 1000003", range(8)),
    "sleep": ("time", "import time\ntime.sleep({0})", [90, 95, 99, 999, 100, 105, 110, 130]),
    "regex": ("time", "import re\nre.match('(a+)+$', 'a' * {0} + 'b')", range(40, 48)),
    "big number": ("time", "x = 7 ** (10 ** {0})", [8, 8, 9, 9, 8, 9, 8, 9]),
    "swallow all": ("time", "while True:\n try:\n  while True: x = {0}\n except BaseException: pass", range(8)),
    "own alarm": ("time", "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                  "signal.signal(signal.SIGALRM, lambda *a: None)\nsignal.setitimer(0, .01, .0{0})\nwhile True: pass",
                  range(1, 9)),
    "deadlock": ("time", "import threading\nk = [threading.Lock() for _ in range({0})]\nk[0].acquire()\nk[0].acquire()",
                 range(1, 9)),
    "threads that spin": ("time", "import threading\ndef f():\n while True: pass\n"
                          "for i in range({0}): threading.Thread(target=f, daemon=True).start()\nf()", range(1, 9)),
    "fork": ("error", "import os\nfor i in range({0}):\n os.fork()\nreturn 1", range(1, 9)),
    "fork bomb": ("any", "import os\nwhile True:\n try: os.{0}()\n except OSError as e: last = e; break\nraise last",
                  ["fork", "forkpty", "fork", "forkpty", "fork", "forkpty", "fork", "forkpty"]),
    "programs": ("error", "import subprocess\nsubprocess.{0}(['/bin/sh', '-c', 'sleep 99'])\nreturn 1",
                 ["run", "Popen", "call", "check_call", "check_output", "run", "Popen", "call"]),
    "exec": ("error", "import os\nos.{0}('/bin/sleep', ['sleep', '99'])", ["execv", "execvp"] * 4),
    "multiprocessing": ("error", "import multiprocessing as m\nm.set_start_method('{0}')\n"
                        "p = m.Process(target=print)\np.start()\nreturn 1", ["fork", "spawn"] * 4),
    "threads without end": ("any", "import threading, time\nthreading.stack_size({0}0 * 4096)\n"
                            "while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
                            range(1, 9)),
    "memory": ("error", "x = bytearray({0} << 30)\nreturn 1", range(1, 9)),
    "memory by and by": ("any", "x = []\nwhile True: x.append(bytearray({0} << 20))", [1, 2, 4, 8, 16, 32, 64, 128]),
    "memory that is mapped": ("error", "import mmap\nx = [mmap.mmap(-1, {0} << 20) for _ in range(9999)]\nreturn 1",
                              [16, 32, 64, 128, 256, 300, 400, 500]),
    "read files": ("error", "x = open('{0}').read()\nreturn 1",
                   ["/etc/passwd", "/etc/shadow", "FOLDER/run.jsonl", "/proc/1/environ", "/proc/self/mem",
                    "/proc/PARENT/environ", "/proc/PARENT/mem", "/dev/zero"]),
    "write files": ("error", "open('{0}', '{1}').write('x' * 10 ** 9)\nreturn 1",
                    ["FOLDER/run.jsonl w", "FOLDER/run.jsonl a", "FOLDER/new w", "/tmp/agile-hostile w",
                     "/dev/shm/agile-hostile w", "/var/tmp/agile-hostile x", "/proc/self/oom_score_adj w",
                     "FOLDER/run.jsonl r+"]),
    "change files": ("error", "import os, shutil\n{0}\nreturn 1",
                     ["os.remove('FOLDER/run.jsonl')", "shutil.rmtree('FOLDER')", "os.chmod('FOLDER', 0)",
                      "os.chown('FOLDER', 1, 1)", "os.utime('FOLDER/run.jsonl', (1, 1))",
                      "os.rename('FOLDER/run.jsonl', 'FOLDER/x')", "os.symlink('/', 'FOLDER/x')",
                      "os.truncate('FOLDER/run.jsonl', 0)"]),
    "signals": ("error", "import os, signal\nos.{0}\nreturn 1",
                ["kill(PARENT, 9)", "kill(-1, 9)", "kill(os.getppid(), 15)", "killpg(os.getpgid(PARENT), 9)",
                 "kill(PARENT, signal.SIGSTOP)", "killpg(0, 9)", "kill(0, 9)", "kill(1, 9)"]),
    "sockets": ("error", "import socket\n{0}\nreturn 1",
                ["socket.create_connection(('127.0.0.1', PORT))", "socket.socket(socket.AF_UNIX)",
                 "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "socket.socket(socket.AF_INET6)",
                 "socket.create_server(('', 0))", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
                 "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendto(b'x', '/tmp/x')",
                 "a, b = socket.socketpair(); a.connect('\\0x')"]),
    "system calls": ("error", "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
                     "assert c.syscall({0}) >= 0, ctypes.get_errno()\nreturn 1",
                     ["101, 16, PARENT, 0, 0", "310, PARENT, 0, 0, 0, 0, 0", "425, 8, 0", "434, PARENT, 0",
                      "272, 0x10000000", "302, PARENT, 7, 0, 0", "319, b'x', 0", "435, 0, 0"]),
    "die": ("error", "import ctypes, os, signal, faulthandler\n{0}",
            ["ctypes.string_at(1)", "os.abort()", "os._exit(0)", "os._exit(77)", "signal.raise_signal(9)",
             "raise SystemExit(0)", "raise KeyboardInterrupt", "(lambda f: f(f))(lambda f: f(f))"]),
    "forge the reward": ("error", "import os\nfor fd in range(64):\n try: os.write(fd, {0})\n except OSError: pass\n"
                         "os._exit(0)",
                         ["b'x' * 10 ** 7", "b'{{\"reward\": 1e999}}\\n'", "b'{{\"reward\": true}}\\n'",
                          "b'{{\"reward\": \"1\"}}\\n'", "b'[1]\\n'", "b'\\xff'", "b'{{\"server_error\": \"x\"}}\\n'",
                          "b'{{\"reward\": 1, \"error\": \"x\"}}\\n{{\"reward\": 1}}\\n'"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that must not be reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run's folder, that must stay as it is."""
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"secret")
    before = (tmp_path.stat().st_mode, file.stat().st_mode, file.stat().st_mtime_ns, file.stat().st_uid)
    yield tmp_path
    assert list(tmp_path.iterdir()) == [file]
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(b"secret").digest()
    assert before == (tmp_path.stat().st_mode, file.stat().st_mode, file.stat().st_mtime_ns, file.stat().st_uid)


def test_there_are_200() -> None:
    assert sum(len(variants) for _, _, variants in WORDS.values()) == 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the confinement is Linux's")
@pytest.mark.parametrize("name", WORDS)
def test_hostile(name: str, folder: Path, port: int) -> None:
    """All variants of one kind, several at once, as graders run."""
    kind, body, variants = WORDS[name]
    runtime, late = ["python_grader_runtime_error"], ["python_grader_runtime_error", "unresponsive_reward_error"]
    expected = {"time": [late], "error": [runtime], "any": [runtime, late]}[kind]
    limits = Limits(time_s=TIME_S if kind == "time" else LONG_S, memory_bytes=MEMORY)
    before = threads_and_children()

    def run(variant: int | str) -> None:
        source = source_of(body, variant, {"FOLDER": folder, "PORT": port, "PARENT": os.getpid()})
        started = time.monotonic()
        reward, errors = run_python(source, {"output_text": "x"}, {}, limits)
        assert time.monotonic() - started < limits.time_s + SLACK_S, source
        assert reward == 0.0, source
        assert errors.kinds in expected, (source, errors.details)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, variants))
    left = threads_and_children()
    assert left[0] <= before[0] and left[1] <= before[1], "what others left may have ended meanwhile"
    assert leftovers(folder) == []


def source_of(body: str, variant: int | str, words: dict[str, object]) -> str:
    """The grader of a variant."""
    given = str(variant).split(" ") if "{1}" in body else [str(variant)]
    body = body.format(*given) if "{0}" in body else body
    body = body.replace("{{", "{").replace("}}", "}")
    for word, value in words.items():
        body = body.replace(word, str(value))
    source = "def grade(sample, item):\n " + body.replace("\n", "\n ")
    compile(source, "hostile", "exec")
    return source


def threads_and_children() -> tuple[int, set[str]]:
    """Of this process."""
    children = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            children |= {*path.read_text().split()}
    return threading.active_count(), children


def leftovers(folder: Path) -> list[str]:
    """Processes that run the confined script for this test's process, and files in folders that all may write."""
    found = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    mine = [
        line for line in found.splitlines() if "graders/confined.py" in line and line.split()[0] == str(os.getpid())
    ]
    return mine + [str(p) for p in map(Path, ("/tmp/agile-hostile", "/dev/shm/agile-hostile")) if p.exists()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the confinement is Linux's")
def test_a_grader_dies_with_the_process_that_grades(tmp_path: Path) -> None:
    script = (
        "from agile.tasks.graders.sandbox import run_python\n"
        "run_python('import time\\ndef grade(s, i): time.sleep(60)', {}, {})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    path = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not (children := path.read_text().split()):
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)  # at whatever the grader is by then, before it has asked to die too
    parent.wait()
    deadline = time.monotonic() + 40  # by itself it would end after 60
    while any(map(lives, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, children))
