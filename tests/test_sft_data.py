"""Imitation sessions in a file: the rows that training makes itself, whoever plays them, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from agile.batching import Row
from agile.build import Setup
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.sft_data import DATA, build_sft_data, read_rows, render_summary
from agile.stages.sft import _rows
from tests.hotpot import row, write
from tests.machine import lives
from tests.stub_endpoint import Reply, StubEndpoint, said, stub_endpoint

WORDS = (
    *("task.num_train_worlds=2", "task.num_test_worlds=1", "task.num_questions=20", "memory.encoder=hashing"),
    *("sft.sessions_per_item=2", "model.tokenizer=word"),
)
QUIET = Console(quiet=True)


def config(*words: str) -> RunConfig:
    return load_config(None, [*WORDS, *words])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    build_sft_data(config(), out, QUIET, workers=1)
    return out


def same(a: list[Row], b: list[Row]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.token_ids, y.token_ids)
        and np.array_equal(x.action_mask, y.action_mask)
        and np.array_equal(x.logprobs, y.logprobs)
        and x.end == y.end
        for x, y in zip(a, b, strict=True)
    )


def test_training_learns_the_same_from_the_file_as_from_playing_itself(built: Path) -> None:
    setup = Setup(config(), built)
    executor = setup.executor(setup.tokenizer())
    own = setup.imitation_rows(executor)
    assert len(own) >= 80
    for source in (built, built / DATA):
        assert same(_rows(config(f"sft.data={source}"), setup, executor), own)


def test_the_summary_counts_every_session(built: Path) -> None:
    summary = json.loads((built / "sft-data.json").read_text())
    assert summary["sessions"] == 80 and not summary["left_out"]
    assert sum(n for kind in summary["kept"].values() for n in kind.values()) == 80
    assert set(summary["kept"]["search"]) == {"searches, answers"}
    assert 0 < summary["learned_tokens"] < summary["tokens"]
    console = Console(record=True, width=100)
    render_summary({**summary, "left_out": {"fact": {"wrong": 3}}}, console)
    text = console.export_text()
    assert "left out" in text and "80 of 80 sessions kept" in text


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_killed_and_started_again_it_gives_the_same_file(built: Path, tmp_path: Path, kept: int) -> None:
    whole = (built / DATA).read_bytes()
    lines = whole.splitlines(keepends=True)
    out = tmp_path / "data"
    build_sft_data(config(), out, QUIET, workers=1)
    (out / DATA).write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
    build_sft_data(config(), out, QUIET, workers=1)
    assert (out / DATA).read_bytes() == whole
    build_sft_data(config(), out, QUIET, workers=1)
    assert (out / DATA).read_bytes() == whole, "a finished one is left as it is"


# `agile`, which stops for good once it has written a chunk of sessions
ONE_CHUNK = """
import time
from agile import cli, sft_data

class Log(sft_data.JsonLines):
    def append(self, records):
        super().append(records)
        if "questions" not in records[0]:  # it is not the header
            time.sleep(1000)

sft_data.JsonLines = Log
cli.main()
"""


@pytest.mark.slow
def test_several_processes_that_are_killed_write_the_same_file(tmp_path: Path) -> None:
    many = config("sft.sessions_per_item=8")
    build_sft_data(many, tmp_path / "one", QUIET, workers=1)
    written = tmp_path / "killed" / DATA
    command = [sys.executable, "-c", ONE_CHUNK, "sft-data", str(tmp_path / "config.yaml"), "--workers", "2"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(many.model_dump(mode="json")))
    workers: list[str] = []
    for number, code, end in ((signal.SIGINT, 130, os.killpg), (signal.SIGKILL, -signal.SIGKILL, os.kill)):
        kept = written.read_bytes().count(b"\n") if written.exists() else 1
        with (tmp_path / "printed").open("wb") as printed:
            process = subprocess.Popen(
                [*command, f"out={written.parent}"],
                cwd=Path(__file__).parents[1],
                stderr=printed,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
            )
        while process.poll() is None and not (written.exists() and written.read_bytes().count(b"\n") > kept):
            time.sleep(0.02)
        workers += Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        end(process.pid, number)  # Ctrl-C is for all that the terminal runs
        assert process.wait() == code, "it was over before"
        text = (tmp_path / "printed").read_text()
        assert "Traceback" not in text and (code < 0 or "the same command goes on from there" in text), text
    build_sft_data(many, written.parent, QUIET, workers=1)
    assert written.read_bytes() == (tmp_path / "one" / DATA).read_bytes()
    deadline = time.monotonic() + 60
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 4 and not any(map(lives, workers))


def test_a_file_of_something_else_is_refused(built: Path, tmp_path: Path) -> None:
    setup = Setup(config(), built)
    streams, tokenizer = setup.train_streams, setup.tokenizer()
    with pytest.raises(AgileError, match=r"sft\.judge_yes was 0\.4, is 0\.1"):
        read_rows(built, config("sft.judge_yes=0.1"), streams, tokenizer)
    with pytest.raises(AgileError, match="other questions"):
        read_rows(built, config(), streams[:1], tokenizer)
    tokenizer.add_tokens(["[Odd]"])
    with pytest.raises(AgileError, match="another tokenizer"):
        read_rows(built, config(), streams, tokenizer)
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b"".join((built / DATA).read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(AgileError, match="79 of 80 sessions; start agile sft-data again"):
        read_rows(torn, config(), streams, setup.tokenizer())
    torn.write_text('{"prompt": "x"}\n')
    with pytest.raises(AgileError, match="the first line is not that of `agile sft-data`"):
        read_rows(torn, config(), streams, setup.tokenizer())


# --------------------------------------------------------------------------------------------------------------------
# A model as the teacher


def hotpot(folder: Path, stub: StubEndpoint) -> RunConfig:
    rows = [row(i, question=f"Which river is it, question {i} ?") for i in range(5)]
    path = write(folder / "f.json", rows)
    teacher = f"sft.teacher={{base_url: '{stub.url}', model: strong, api_key_env: null, tools: text}}"
    words = ("task.name=hotpotqa", f"task.data={path}", f"task.test_data={path}", "task.search=bm25")
    limits = ("rollout.max_context_tokens=4000", "rollout.max_session_tokens=4000", "rollout.max_turns=20")
    plain = ("memory.encoder=hashing", "model.tokenizer=bpe", "sft.sessions_per_item=1")
    return load_config(None, [*words, *plain, *limits, teacher])


def strong(body: dict[str, Any]) -> Reply:
    """Searches once and answers; question 1 wrong, question 2 after 5 searches, question 3 after nonsense."""
    said_before = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
    text = "\n".join(m["content"] for m in body["messages"][1:])
    last = body["messages"][-1]["content"]
    if "Next: [Reflection]" in last:
        return said("[Reflection] I go on.")
    if "question 3 ?" in text and "nonsense" not in "".join(said_before):
        return said("nonsense")
    searches = sum("[Search]" in m for m in said_before)
    if searches < (5 if "question 2 ?" in text else 1):
        return said("[Search] Paris")
    return said("[PredictAnswer] the Loire" if "question 1 ?" in text else "[PredictAnswer] Seine")


def test_of_a_model_what_is_right_and_found_something_is_kept_in_the_agents_tokens(tmp_path: Path) -> None:
    with stub_endpoint() as stub:
        stub.reply = strong
        made = hotpot(tmp_path, stub)
        summary = build_sft_data(made, tmp_path / "out", QUIET)
        assert summary["kept"] == {"bridge": {"searches, answers": 3}}
        assert summary["left_out"] == {"bridge": {"wrong": 1, "5 calls of Search": 1}}
        asked = len(stub.requests)
        (tmp_path / "out" / DATA).unlink()
        build_sft_data(made, tmp_path / "out", QUIET)
        assert len(stub.requests) == asked, "nothing is paid for twice"
    setup = Setup(made, tmp_path / "out")
    codec = setup.executor(setup.tokenizer()).codec
    rows = read_rows(tmp_path / "out", made, setup.train_streams, codec.tokenizer)
    assert len(rows) >= 3
    texts = [codec.decode(r.token_ids.tolist()) for r in rows if r.num_actions]
    assert all("[Reflection]I go on.<end>[Search]Paris<end>Paris : Paris is a city." in text for text in texts)
    assert not any("nonsense" in text for text in texts)
    with pytest.raises(AgileError, match="agile sft-data CONFIG out=DIR"):
        setup.imitation_rows(setup.executor(codec.tokenizer))


def test_a_judge_of_answerability_says_what_needs_no_expert(tmp_path: Path) -> None:
    """Of own questions it knows the first alone, and what it says of the third is neither yes nor no. About a search
    it is not asked."""
    questions, table = tmp_path / "own.jsonl", tmp_path / "table.csv"
    table.write_text("name\nred\n")
    rows: list[dict[str, Any]] = [
        {"question": f"Is {k} good?", "answer": "yes", "context": f"number {k}"} for k in range(3)
    ]
    rows.append({"question": "Which is red?", "answer": ["red"], "sql": "SELECT name FROM products"})
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reply(body: dict[str, Any]) -> Reply:
        content = body["messages"][0]["content"]
        assert "context: number" in content
        return said("Yes." if "Is 0" in content else "no" if "Is 1" in content else "who knows")

    words = ["task.name=jsonl", f"task.data={questions}", f"task.test_data={questions}", "memory.encoder=hashing"]
    words += ["sft.sessions_per_item=1", "model.tokenizer=word", "sft.judge_yes=1", f"task.database={table}"]
    with stub_endpoint() as stub:
        stub.reply = reply
        judge = f"sft.judge={{base_url: '{stub.url}', model: wise, api_key_env: null}}"
        made = load_config(None, [*words, judge])
        summary = build_sft_data(made, tmp_path / "out", QUIET)
        build_sft_data(made, tmp_path / "out", QUIET)
        assert len(stub.requests) == 3, "nothing is paid for twice"
    assert summary["kept"] == {"search": {"searches, answers": 1}, "text": {"answers": 1, "asks": 2}}
    said_of_it = {"judge": "wise", "questions": 3, "answerable": 1, "verdicts that could not be read": 1}
    assert said_of_it.items() <= summary["judge"].items() and summary["judge"]["said instead"] == "who knows"
    console = Console(record=True, width=200)
    render_summary(summary, console)
    assert "said instead: who knows" in console.export_text()
    setup = Setup(made, tmp_path / "out")
    with pytest.raises(AgileError, match=r"built beforehand: agile sft-data CONFIG"):
        setup.imitation_rows(setup.executor(setup.tokenizer()))
    with pytest.raises(AgileError, match="judge and teacher both say what needs no expert"):
        load_config(None, ["sft.judge.model=a", "sft.teacher.model=b"])


def test_a_stronger_model_is_asked_once_and_taught_where_it_is_right(tmp_path: Path) -> None:
    """Of three questions it answers the first right and the second wrong; of the third it knows nothing."""
    data = tmp_path / "medmcqa"
    data.mkdir()
    options = {"opa": "iron", "opb": "zinc", "opc": "lead", "opd": "tin"}
    rows = [
        {"id": str(k), "question": f"Metal {k}?", "cop": 1, "exp": "", "subject_name": "s", **options} for k in range(3)
    ]
    for name in ("train.json", "dev.json"):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reply(body: dict[str, Any]) -> Reply:
        asked = body["messages"][-1]["content"]
        return said(
            "It rusts.\nAnswer: A" if "Metal 0" in asked else "Answer: B" if "Metal 1" in asked else "who knows"
        )

    words = ["task.name=medmcqa", f"task.data={data}", "memory.encoder=hashing", "model.tokenizer=word"]
    words += ["sft.sessions_per_item=1", "sft.stronger_model=big"]
    with stub_endpoint() as stub:
        stub.reply = reply
        endpoint = f"endpoint: {{base_url: '{stub.url}', model: big, api_key_env: null}}"
        made = load_config(None, [*words, f"experts.big={{kind: model, {endpoint}}}"])
        summary = build_sft_data(made, tmp_path / "out", QUIET)
        build_sft_data(made, tmp_path / "out", QUIET)
        assert len(stub.requests) == 3, "nothing is paid for twice"
    assert summary["kept"] == {"s": {"answers": 1, "asks": 2}}
    counts = {"stronger model": "big", "questions": 3, "answered right": 1, "not answered": 0}
    assert counts.items() <= summary["stronger model"].items()
    setup = Setup(made, tmp_path / "out")
    with pytest.raises(AgileError, match=r"built beforehand: agile sft-data CONFIG"):
        setup.imitation_rows(setup.executor(setup.tokenizer()))


def test_configs_name_their_models() -> None:
    for key in ("sft.teacher", "sft.judge", "task.judge"):
        with pytest.raises(AgileError, match=rf"{key}\.model=NAME"):
            load_config(None, [f"{key}={{base_url: 'http://x/v1'}}"])


def test_a_judge_of_answers_is_refused_where_nothing_asks_it() -> None:
    with pytest.raises(AgileError, match=r"judge is for hotpotqa, .* not for jsonl; remove it"):
        load_config(None, ["task.name=jsonl", "task.data=x.jsonl", "task.judge.model=m"])
    assert load_config(None, ["task.name=hotpotqa", "task.data=x.json", "task.judge.model=m"]).task.judge is not None
