"""Graders on samples: string checks, functions, `multi`, and what goes wrong with one sample alone."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning.alpha import GraderRunResponse

from agile.errors import AgileError
from agile.tasks.graders import Grade, Grading, Limits, make_sample, parse_grader
from agile.tasks.graders.grading import complete_sample

ITEM: dict[str, Any] = {"answer": "Blue", "n": 1.5, "list": ["a"], "empty": "", "strasse": "STRASSE"}


def grade(grader: Any, sample: Any = "Blue", item: Mapping[str, Any] = ITEM) -> Grade:
    async def run() -> Grade:
        async with Grading(limits=Limits(time_s=20)) as grading:
            return await grading.grade(parse_grader(grader) if isinstance(grader, dict) else grader, sample, item)

    return asyncio.run(run())


def check(operation: str, reference: str, text: str = "{{ sample.output_text }}") -> dict[str, Any]:
    return {"type": "string_check", "name": "c", "input": text, "reference": reference, "operation": operation}


@pytest.mark.parametrize(
    ("operation", "sample", "reference", "reward"),
    [
        ("eq", "Blue", "{{ item.answer }}", 1),
        ("eq", "blue", "{{ item.answer }}", 0),
        ("eq", "Blue ", "{{ item.answer }}", 0),
        ("eq", "", "{{ item.empty }}", 1),
        ("eq", "1.5", "{{ item.n }}", 1),
        ("eq", '["a"]', "{{ item.list }}", 1),
        ("ne", "blue", "{{ item.answer }}", 1),
        ("ne", "Blue", "{{ item.answer }}", 0),
        ("like", "It is Blue.", "{{ item.answer }}", 1),
        ("like", "It is blue.", "{{ item.answer }}", 0),
        ("like", "Blu", "{{ item.answer }}", 0),
        ("like", "anything", "{{ item.empty }}", 1),
        ("ilike", "it is bLUE.", "{{ item.answer }}", 1),
        ("ilike", "green", "{{ item.answer }}", 0),
        ("ilike", "straße", "{{ item.strasse }}", 1),
        ("eq", "{{ item.answer }}", "{{ item.answer }}", 0),
    ],
)
def test_string_checks(operation: str, sample: str, reference: str, reward: float) -> None:
    result = grade(check(operation, reference), sample)
    assert (result.reward, result.errors.kinds) == (reward, [])


@pytest.mark.parametrize(
    ("text", "sample", "kind"),
    [
        ("{{ item.anser }}", "x", "invalid_variable_error"),
        ("{{ item.list[3] }}", "x", "invalid_variable_error"),
        ("{{ sample.output_json.a }}", "x", "sample_parse_error"),
        ("{{ sample.output_json.a }}", '{"b": 1}', "invalid_variable_error"),
        ("{{ sample.output_tools[0] }}", "x", "invalid_variable_error"),
    ],
)
def test_variables_that_are_not_there(text: str, sample: str, kind: str) -> None:
    result = grade(check("eq", "x", text), sample)
    assert (result.reward, result.errors.kinds) == (0.0, [kind])


def test_a_sample_that_was_cut_off_is_graded_and_marked() -> None:
    result = grade(check("eq", "x"), make_sample("x", finish_reason="length"))
    assert (result.reward, result.errors.kinds) == (1.0, ["truncated_observation_error"])


A, B = check("eq", "{{ item.answer }}"), check("ilike", "blue")
PY = {"type": "python", "name": "p", "source": "def grade(sample, item): return item['n'] / 3"}
BAD = check("eq", "{{ item.missing }}")
FAILS = {"type": "python", "name": "p", "source": "def grade(sample, item): raise ValueError('no')"}


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "m", "graders": graders, "calculate_output": formula}


@pytest.mark.parametrize(
    ("grader", "sample", "reward", "kinds"),
    [
        (multi("a", a=A), "Blue", 1.0, []),
        (multi("a + b", a=A, b=B), "Blue", 2.0, []),
        (multi("a + b", a=A, b=B), "blue", 1.0, []),
        (multi("0.25 * a + 0.75 * b", a=A, b=B), "blue", 0.75, []),
        (multi("a * b", a=A, b=B), "blue", 0.0, []),
        (multi("max(a, b) - min(a, b)", a=A, b=B), "blue", 1.0, []),
        (multi("(a + b) ^ 2", a=A, b=B), "Blue", 4.0, []),
        (multi("p", p=PY), "x", 0.5, []),
        (multi("floor(p + a)", p=PY, a=A), "Blue", 1.0, []),
        (multi("-a", a=A), "Blue", -1.0, []),
        (multi("1", a=A), "x", 1.0, []),
        (multi("a + bad", a=A, bad=BAD), "Blue", 1.0, ["invalid_variable_error"]),
        (multi("a + p", a=A, p=FAILS), "Blue", 1.0, ["python_grader_runtime_error"]),
        (multi("bad + p", bad=BAD, p=FAILS), "x", 0.0, ["invalid_variable_error", "python_grader_runtime_error"]),
        (multi("1 / a", a=A), "x", 0.0, ["formula_parse_error"]),
        (multi("log(a)", a=A), "x", 0.0, ["formula_parse_error"]),
        (multi("exp(a * 1000)", a=A), "Blue", 0.0, ["formula_parse_error"]),
    ],
)
def test_multi(grader: dict[str, Any], sample: str, reward: float, kinds: list[str]) -> None:
    result = grade(grader, sample)
    assert result.reward == pytest.approx(reward)
    assert result.errors.kinds == kinds
    assert result.sub_rewards.keys() == grader["graders"].keys()
    read = GraderRunResponse.model_validate(result.to_json())
    assert read.reward == pytest.approx(reward)
    assert read.metadata.type == "multi"


def test_errors_of_a_multi_name_the_grader() -> None:
    result = grade(multi("1 / a", a=FAILS | {"name": "inner"}), "x").to_json()["metadata"]["errors"]
    assert result["details"] == ["inner: line 1: ValueError: no", "m: 1 / a cannot be computed (float division by zero) with {'a': 0.0}"]  # fmt: skip  # noqa: E501
    assert result["python_grader_runtime_error_details"] == "line 1: ValueError: no"


async def slowly(sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
    await asyncio.sleep(0)
    return len(sample["output_text"]) / 10


def raises(sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("function", "reward"),
    [
        (lambda sample, item: 0.5, 0.5),
        (lambda sample, item: sample["output_text"] == item["answer"], 1.0),
        (lambda sample, item: item["n"], 1.5),
        (lambda sample, item: -1, -1.0),
        (lambda sample, item: len(sample["choices"]), 1.0),
        (lambda sample, item: "output_json" in sample, 0.0),
        (slowly, 0.4),
        (lambda sample, item: math.nan, None),
        (lambda sample, item: math.inf, None),
        (lambda sample, item: None, None),
        (lambda sample, item: "0.5", None),
        (lambda sample, item: [0.5], None),
        (lambda sample: 1.0, None),
        (raises, None),
        (lambda sample, item: 1 / 0, None),
    ],
)
def test_functions_are_graders(function: Callable[..., Any], reward: float | None) -> None:
    result = grade(function)
    assert (result.reward, result.errors.kinds) == ((reward, []) if reward is not None else (0.0, ["other_error"]))


def test_functions_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_of_a_test.py").write_text("def grade(sample, item): return item['n'] * 2\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = {"type": "function", "name": "f", "function": "my_rewards_of_a_test.grade"}
    assert "my_rewards_of_a_test" not in sys.modules
    parse_grader(path)
    assert "my_rewards_of_a_test" not in sys.modules  # reading a file runs nothing of it
    assert grade(path).reward == 3.0
    assert grade(multi("f / 2", f=path)).reward == 1.5
    for wrong in ("my_rewards_of_a_test.missing", "my_rewards_of_a_test.x"):
        with pytest.raises(AgileError, match="my_rewards_of_a_test"):
            grade(path | {"function": wrong})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("x", "x"),
        ({"output_text": "x"}, "x"),
        ({"output_text": "x", "output_tools": None, "choices": []}, "x"),
        ({"choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]}, "x"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{"function": {"name": "f"}}]}}]}, ""),
    ],
)
def test_samples_are_completed(given: Any, text: str) -> None:
    sample = complete_sample(given)
    assert sample["output_text"] == text
    assert grade(check("eq", text), given).reward == 1.0


@pytest.mark.parametrize("given", [3, None, {}, {"text": "x"}, {"output_text": "x", "extra": 1}, {"choices": [1]}])
def test_what_is_no_sample_is_refused(given: Any) -> None:
    with pytest.raises(AgileError, match="A sample"):
        grade(check("eq", "x"), given)


@pytest.mark.parametrize(
    ("metric", "sample", "threshold", "scores"),
    [("fuzzy_match", "Blue", 0.8, {"passed": True}), ("bleu", "red", 0.8, {"passed": False}), ("bleu", "x", None, {})],
)
def test_similarity_tells_whether_it_passed(
    metric: str, sample: str, threshold: float | None, scores: dict[str, bool]
) -> None:
    grader = {"type": "text_similarity", "name": "t", "input": "{{ sample.output_text }}",
              "reference": "{{ item.answer }}", "evaluation_metric": metric, "pass_threshold": threshold}  # fmt: skip
    result = grade(grader, sample)
    assert result.scores == scores
    assert result.reward == (1.0 if sample == "Blue" else 0.0)
