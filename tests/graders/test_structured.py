"""`structured`: fields of JSON objects by precision, recall, F1."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agile.tasks.graders import Grade, Grading, parse_grader
from agile.tasks.graders.structured import compare, field_paths, look_up


@pytest.mark.parametrize(
    ("found", "expected", "tolerance", "precision", "recall", "f1"),
    [
        ("x", "x", 0, 1, 1, 1),
        ("x", "X", 0, 0, 0, 0),
        (1, 1.0, 0, 1, 1, 1),
        (1, True, 0, 0, 0, 0),
        (1, "1", 0, 0, 0, 0),
        (None, "x", 0, 0, 0, 0),
        ("x", None, 0, 0, 0, 0),
        (None, None, 0, 1, 1, 1),
        ([], None, 0, 1, 1, 1),
        (10.4, 10, 0.5, 1, 1, 1),
        (10.6, 10, 0.5, 0, 0, 0),
        (["a", "b"], ["b", "a"], 0, 1, 1, 1),
        (["a", "a", "b"], ["a", "b"], 0, 1, 1, 1),
        (["a", "c"], ["a", "b", "d"], 0, 1 / 2, 1 / 3, 2 / 5),
        (["a"], "a", 0, 1, 1, 1),
        # each number stands for one other: 1.0 goes with 0.9, and 1.1 finds nothing else
        ([1.0, 1.1], [0.9, 3.0], 0.2, 1 / 2, 1 / 2, 1 / 2),
        ([1.0, 1.4], [1.2, 1.6], 0.25, 1, 1, 1),
        ([{"a": 1.05, "b": "x"}], [{"b": "x", "a": 1}], 0.1, 1, 1, 1),
        ([{"a": 1.05}, True], [{"a": 1}, True, {"a": 9}], 0.1, 1, 2 / 3, 4 / 5),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, 0, 1 / 2, 1 / 2, 1 / 2),
        ({"a": 1, "b": None}, {"a": 1.01}, 0.1, 1, 1, 1),
        ([[1, 2]], [[2, 1]], 0, 0, 0, 0),
    ],
)
def test_fields_agree(found: Any, expected: Any, tolerance: float, precision: float, recall: float, f1: float) -> None:
    score = compare(found, expected, tolerance)
    assert (score.precision, score.recall, score.f1) == pytest.approx((precision, recall, f1))


def test_paths_reach_nested_fields_and_keys_with_dots() -> None:
    document = {"a": {"b": 1, "c.d": {"e": 2}}, "f.g": 3, "h": {}, "a.b": 4}
    assert field_paths(document) == ["a.b", "a.c.d.e", "f.g", "h", "a.b"]
    assert [look_up(document, p) for p in ("a.c.d.e", "f.g", "h", "x", "f", "a.x")] == [2, 3, {}, None, None, None]


def grade(sample: str, item: dict[str, Any], **fields: Any) -> Grade:
    grader = parse_grader({"type": "structured", "name": "s", "reference": "{{ item.answer }}", **fields})

    async def run() -> Grade:
        async with Grading() as grading:
            return await grading.grade(grader, sample, item)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("sample", "answer", "fields", "reward"),
    [
        ('{"a": 1, "b": "x"}', {"a": 1, "b": "x"}, None, 1.0),
        ('{"a": 1, "b": "y"}', {"a": 1, "b": "x"}, None, 0.5),
        ('{"a": 1, "more": 1}', {"a": 1}, None, 0.5),
        ('{"a": 1, "more": 1}', {"a": 1}, {"a": {}}, 1.0),
        ('{"a": 1, "b": "y"}', {"a": 1, "b": "x"}, {"a": {"weight": 3}, "b": {}}, 0.75),
        ('{"a": 1.004}', {"a": 1}, {"a": {"tolerance": 0.01}}, 1.0),
        ('{"a": {"b": 1}}', {"a": {"b": 1, "c": 2}}, None, 0.5),
        ('{"a": 5}', {"a": {"b": 1}}, None, 0.0),
        ('{"tags": ["x", "y"]}', {"tags": ["y", "z"]}, {"tags": {}}, 0.5),
        ("{}", {}, None, 1.0),
        ('{"a": 1}', '{"a": 1}', None, 1.0),
        ('{"a": 1}', {"a": 1}, {"a": {"weight": 1}, "b": {"weight": 0}}, 1.0),
    ],
)
def test_the_total_is_the_weighted_mean(sample: str, answer: Any, fields: Any, reward: float) -> None:
    result = grade(sample, {"answer": answer}, **({} if fields is None else {"fields": fields}))
    assert result.reward == pytest.approx(reward)
    assert result.errors.kinds == []


@pytest.mark.parametrize(
    ("sample", "item", "kind"),
    [
        ("no json", {"answer": {}}, "sample_parse_error"),
        ("[1]", {"answer": {}}, "sample_parse_error"),
        ('{"a": 1}', {"answer": "no json"}, "invalid_variable_error"),
        ('{"a": 1}', {"answer": [1]}, "invalid_variable_error"),
        ('{"a": 1}', {}, "invalid_variable_error"),
    ],
)
def test_what_is_no_object_is_an_error(sample: str, item: dict[str, Any], kind: str) -> None:
    result = grade(sample, item)
    assert (result.reward, result.errors.kinds) == (0.0, [kind])


def test_scores_name_precision_recall_and_f1_of_each_field() -> None:
    result = grade('{"a": ["x"], "b": 1}', {"answer": {"a": ["x", "y"], "b": 1}}).to_json()
    assert result["metadata"]["scores"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert result["sub_rewards"] == {"a": pytest.approx(2 / 3), "b": 1.0}
