"""Files of reinforcement fine-tuning: what is read, each check with its line, and what an answer is worth."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agile.errors import AgileError
from agile.tasks.rft import RftTask
from agile.types import Session, SessionStatus
from tests.stub_endpoint import refused, stub_endpoint

CHECK = {"type": "string_check", "name": "same", "input": "{{ sample.output_text }}",
         "reference": "{{ item.answer }}", "operation": "eq"}  # fmt: skip
FIELDS = {"type": "structured", "name": "fields", "reference": "{{ item.answer }}"}
SCHEMA = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
SESSION = Session("t/0", "t", 0, "1", "train", 0, (), (), (), (), None, None, SessionStatus.COMPLETED)


def row(text: str, **item: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **item}


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


def make(tmp_path: Path, grader: Any = CHECK, answer: Any = "4", **options: Any) -> RftTask:
    """A task of one train row, one validation row, and a grader."""
    train = write(tmp_path / "t.jsonl", row("2 + 2", answer=answer))
    validation = write(tmp_path / "v.jsonl", row("1 + 3", answer=answer))
    path = Path(grader) if isinstance(grader, str) else write(tmp_path / "g.json", grader)
    return RftTask(train, validation, path, **options)


def scored(task: RftTask, answer: str | None) -> Mapping[str, float]:
    item = task.streams("train")[0].items[0]
    return asyncio.run(task.score(item, replace(SESSION, answer=answer))).components


def problems(task: RftTask) -> str:
    with pytest.raises(AgileError) as caught:
        task.streams("train")
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Reading


def test_rows_are_streams_of_one_item(tmp_path: Path) -> None:
    imitation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    task = make(tmp_path, imitation_data=write(tmp_path / "i.jsonl", "", imitation))
    (stream,) = task.streams("train")
    assert (stream.id, stream.items[0].context["item"]) == ("train/1", {"answer": "4"})
    assert task.streams("test") == task.streams("validation")
    (shown,) = task.streams("imitation")[0].items
    assert (shown.id, shown.answer, shown.context["messages"]) == ("2", "b", [{"role": "user", "content": "a"}])


def test_parts_of_text_are_one_text(tmp_path: Path) -> None:
    task = make(tmp_path)
    parts = [{"type": "input_text", "text": "2 "}, {"type": "text", "text": "+ 2"}]
    write(tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": parts}], "answer": "4"})
    assert task.streams("train")[0].items[0].question == "2 + 2"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ('{"messages": [], "messages": []}', "line 2: the key 'messages' stands twice"),
        ('{"a": NaN}', "line 2: NaN is no JSON"),
        ("[]", "line 2: expected an object with messages, found []"),
        ("{}", "line 2: messages: expected a list of messages, found none. Add them."),
        ({"messages": "hi"}, 'line 2: messages: expected a list of messages, found "hi"'),
        ({"messages": []}, "line 2: messages: expected a list of messages, found []"),
        ({"messages": ["hi"]}, 'line 2, message 1: expected an object with role and content, found "hi"'),
        ({"messages": [{"role": "user"}]}, "line 2, message 1: expected an object with role and content"),
        ({"messages": [{"role": "bot", "content": "x"}]}, 'line 2, message 1: role is "bot", expected one of system'),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2, message 1: content is 3, expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "line 2, message 1: content is [",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "line 2, message 1: 'tool_calls' is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "line 2: the last message is the assistant's, expected the user's; the model is to answer it: take the",
        ),
        (row("2 + 3"), "line 2: {{ item.answer }}: item has nothing, not 'answer', which the grader reads. Add it"),
        (row("2 + 3", answers="5"), "item has answers, not 'answer'"),
        (row(" 1 +  3", answer="4"), "v.jsonl, line 1: its messages stand in"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: Any, said: str) -> None:
    task = make(tmp_path)
    write(tmp_path / "t.jsonl", row("2 + 2", answer="4"), line)
    text = problems(task)
    assert said in text
    assert text.startswith("The files cannot be used, 1 problem:\n")


def test_all_problems_of_all_files_come_in_one_go(tmp_path: Path) -> None:
    task = make(
        tmp_path,
        {**CHECK, "operation": "is"},
        imitation_data=write(tmp_path / "i.jsonl", row("a")),
        response_format=write(tmp_path / "f.json", {"type": "json_schema"}),
    )
    write(tmp_path / "t.jsonl", "{", row("x"), "[]")
    write(tmp_path / "v.jsonl")
    text = problems(task)
    assert text.startswith("The files cannot be used, 6 problems:\n")
    for said in (
        'operation is "is"',
        "f.json: expected",
        "t.jsonl, line 1 is no JSON",
        "t.jsonl, line 3: expected an object",
        "v.jsonl is empty",
        "i.jsonl, line 1: the last message is the user's, expected the assistant's; it is what is imitated",
    ):
        assert said in text, said


def test_many_problems_are_counted_and_some_shown(tmp_path: Path) -> None:
    task = make(tmp_path)
    write(tmp_path / "t.jsonl", *["[]"] * 100)
    assert "100 problems" in problems(task)
    assert problems(task).endswith("... and 60 more")


def test_missing_files_are_problems_too(tmp_path: Path) -> None:
    task = make(tmp_path)
    (tmp_path / "t.jsonl").unlink()
    (tmp_path / "v.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    assert "t.jsonl: no such file" in problems(task)
    assert "v.jsonl, line 1: is not UTF-8. Save the file as UTF-8." in problems(task)


def test_a_schema_that_is_none_is_named(tmp_path: Path) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "int"}}}
    task = make(tmp_path, response_format=write(tmp_path / "f.json", format_))
    assert "json_schema.schema is no JSON schema: type: 'int' is not valid" in problems(task)


# --------------------------------------------------------------------------------------------------------------------
# What an answer is worth


def test_an_answer_is_worth_its_grade(tmp_path: Path) -> None:
    task = make(tmp_path)
    assert scored(task, "4") == {"grade": 1.0}
    assert scored(task, "5") == {"grade": 0.0}
    assert scored(task, None) == {"grade": 0.0}


def test_a_grader_s_error_is_counted_and_worth_what_the_grade_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = make(tmp_path, FIELDS, {"total": 4, "days": 9})
    assert scored(task, '{"total": 4}') == {"grade": 0.5}
    for answer in ("four", "nine"):
        assert scored(task, answer) == {"grade": 0.0, "sample_parse_error": 0.0}
    assert caplog.text.count("sample_parse_error: fields: ") == 1


def test_what_does_not_fit_the_response_format_is_not_graded(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    task = make(tmp_path, FIELDS, {"total": 4}, response_format=path)
    assert scored(task, '{"total": 4}') == {"grade": 1.0}
    for answer in ('{"total": "4"}', "{}", "4", "four"):
        assert scored(task, answer) == {"grade": 0.0, "response_format_error": 0.0}


@pytest.mark.parametrize("returned", ["math.nan", "None", "'0.5'", "1 / 0"])
def test_no_number_is_worth_nothing_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str) -> None:
    name = f"rewards_of_rft_{abs(hash(returned))}"
    (tmp_path / f"{name}.py").write_text(f"import math\ndef grade(sample, item): return {returned}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = scored(make(tmp_path, f"{name}.grade"), "4")
    assert found == {"grade": 0.0, "other_error": 0.0}
    assert math.isfinite(sum(found.values()))


def test_a_function_that_hangs_is_left_behind(tmp_path: Path) -> None:
    task = make(tmp_path, time_s=0.2)

    async def grade(sample: object, item: object) -> float:
        await asyncio.sleep(60)
        return 1.0

    def blocks(sample: object, item: object) -> float:
        time.sleep(60)  # in a thread that nobody waits for
        return 1.0

    for function in (grade, blocks):
        task.grader = function
        with pytest.raises(TimeoutError):
            scored(task, "4")


def test_an_endpoint_that_fails_is_nobody_s_zero(tmp_path: Path) -> None:
    from agile.policies.endpoint import Endpoint

    judge = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "Rate."}]}
    task = make(tmp_path, judge)
    with stub_endpoint() as stub:
        stub.script(refused(404, "no such model"))
        task.ask(lambda: Endpoint(stub.url, "", api_key_env=None, backoff_s=0.0))
        with pytest.raises(RuntimeError, match="j: "):
            scored(task, "4")
