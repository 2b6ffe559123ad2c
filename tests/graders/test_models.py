"""Grader files: what is taken, and what is refused with the path, the value, what was expected and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import graders as hosted
from pydantic import BaseModel

from agile.errors import AgileError
from agile.tasks.graders import load_grader, parse_grader
from agile.tasks.graders.models import TYPES, notes

CHECK = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}
LIKE = {
    "type": "text_similarity",
    "name": "alike",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "evaluation_metric": "rouge_l",
}
ASK = [{"role": "user", "content": "Rate {{ sample.output_text }}"}]
SCORE = {"type": "score_model", "name": "judge", "model": "m", "input": ASK}
LABEL = {"type": "label_model", "name": "l", "model": "m", "input": ASK, "labels": ["a", "b"], "passing_labels": ["a"]}
PYTHON = {"type": "python", "name": "py", "source": "def grade(sample, item):\n    return 1.0\n"}
STRUCTURED = {"type": "structured", "name": "s", "reference": "{{ item.answer }}"}
FUNCTION = {"type": "function", "name": "f", "function": "json.loads"}
MULTI = {
    "type": "multi",
    "name": "m",
    "graders": {"a": CHECK, "b": LIKE, "c": LABEL, "d": PYTHON, "e": SCORE},
    "calculate_output": "a + b + c + d + e",
}
ALL = [CHECK, LIKE, SCORE, PYTHON, STRUCTURED, FUNCTION, MULTI]
PARTS = [
    {"type": "input_text", "text": "{{ item.q }}"},
    {"type": "output_text", "text": "x"},
    {"type": "input_image", "image_url": "{{ item.image }}", "detail": "low"},
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
]


@pytest.mark.parametrize(
    "grader",
    [
        *ALL,
        LIKE | {"pass_threshold": 0.5},
        SCORE | {"range": [-1, 5], "sampling_params": {"temperature": 1, "top_p": 1, "seed": 42}},
        SCORE | {"range": None, "sampling_params": None},
        SCORE | {"sampling_params": {"max_completions_tokens": 9, "reasoning_effort": "low"}},
        SCORE | {"input": [{"role": "developer", "content": PARTS, "type": "message"}]},
        SCORE | {"input": [{"role": "user", "content": PARTS[0]}]},
        PYTHON | {"image_tag": "2025-05-08"},
        PYTHON | {"source": "import m\ndef grade(sample, item, *, strict=True): return 1"},
        PYTHON | {"source": "grade = lambda sample, item: 1"},
        PYTHON | {"source": "from m import score as grade"},
        PYTHON | {"source": "def grade(*args): return 1"},
    ],
)
def test_usable_graders(grader: dict[str, Any]) -> None:
    assert parse_grader(grader).type == grader["type"]


@pytest.mark.parametrize("grader", [CHECK, LIKE, SCORE, PYTHON, LABEL])
def test_what_the_hosted_service_takes_has_the_same_fields(grader: dict[str, Any]) -> None:
    kinds: dict[str, type[BaseModel]] = {
        "string_check": hosted.StringCheckGrader,
        "text_similarity": hosted.TextSimilarityGrader,
        "score_model": hosted.ScoreModelGrader,
        "python": hosted.PythonGrader,
        "label_model": hosted.LabelModelGrader,
    }
    kind = kinds[grader["type"]]
    kind.model_validate(grader)
    assert kind.model_fields.keys() <= TYPES[grader["type"]].model_fields.keys()


def without(grader: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in grader.items() if k != key}


def multi(**graders: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "m", "graders": graders, "calculate_output": " + ".join(graders)}


BAD = [
    ([], "is []: expected an object"),
    ({}, "type is missing: expected one of string_check"),
    ({"type": "string_chek"}, "type is \"string_chek\": expected one of string_check, text_similarity, score_model"),
    ({"type": ["python"]}, 'type is ["python"]'),
    (without(CHECK, "reference"), "reference is missing: add it, the text it is compared with"),
    (CHECK | {"operation": "contains"}, "operation is \"contains\": expected 'eq', 'ne', 'like' or 'ilike'"),
    (CHECK | {"operation": "ilik"}, "did you mean 'ilike'"),
    (CHECK | {"input": 3}, "input is 3: expected a valid string"),
    (CHECK | {"name": ""}, 'name is "": expected at least 1 character'),
    (CHECK | {"refrence": "x"}, "refrence is unknown: did you mean reference?"),
    (CHECK | {"zzz": 1}, "zzz is unknown: expected type, name, input, reference, operation"),
    (CHECK | {"input": "{{ sampel.output_text }}"}, "input is \"{{ sampel.output_text }}\": {{ sampel."),
    (CHECK | {"reference": "{{ sample.text }}"}, "a sample has output_text, output_json, output_tools, choices"),
    (LIKE | {"evaluation_metric": "rouge"}, "did you mean 'rouge_"),
    (LIKE | {"pass_threshold": float("nan")}, "pass_threshold is NaN: expected a finite number"),
    (SCORE | {"range": [1, 0]}, "range is [1, 0]: expected the lower end first, as [0, 1]"),
    (SCORE | {"range": [0.5, 0.5]}, "range is [0.5, 0.5]"),
    (SCORE | {"range": [0]}, "range[1] is missing"),
    (SCORE | {"range": [0, 1, 2]}, "range is [0, 1, 2]: expected at most 2 items"),
    (SCORE | {"range": "0-1"}, 'range is "0-1": expected a valid tuple'),
    (SCORE | {"input": []}, "input is []: expected at least 1 item"),
    (SCORE | {"input": "Rate it"}, 'input is "Rate it": expected a valid tuple'),
    (SCORE | {"input": [{"role": "usr", "content": "x"}]}, "input[0].role is \"usr\""),
    (SCORE | {"input": [{"role": "user"}]}, "input[0].content is missing: add it, text, or a list of parts"),
    (SCORE | {"input": [*ASK, {"role": "user", "content": "{{ foo.x }}"}]}, 'input[1].content is "{{ foo.x }}"'),
    (SCORE | {"input": [{"role": "user", "content": [{"type": "input_text", "text": "{{ x }}"}]}]},
     'input[0].content[0].text is "{{ x }}"'),
    (SCORE | {"input": [{"role": "user", "content": [{"type": "txt"}]}]}, 'input[0].content[0].type is "txt"'),
    (SCORE | {"sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens is unknown: did you mean max_comple"),
    (SCORE | {"sampling_params": {"top_p": 2}}, "sampling_params.top_p is 2: expected less than or equal to 1"),
    (LABEL, "is a label_model, which stands inside a multi only"),
    (multi(a=LABEL | {"passing_labels": ["c"]}), "graders.a.passing_labels holds 'c': expected some of labels, a, b"),
    (multi(a=LABEL | {"labels": ["x", "X "], "passing_labels": ["x"]}), "graders.a.labels is ['x', 'X ']"),
    (multi(a=LABEL | {"passing_labels": []}), "graders.a.passing_labels is []: expected at least 1 item"),
    (PYTHON | {"source": "x = 1"}, "it does not define grade; add `def grade(sample, item) -> float:`"),
    (PYTHON | {"source": "class A:\n def grade(self, x): pass"}, "it does not define grade"),
    (PYTHON | {"source": "def grade(sample, item:"}, "it is no Python (line 1: '(' was never closed)"),
    (PYTHON | {"source": "def grade(sample): pass"}, "line 1: grade takes (sample); expected `def grade(sam"),
    (PYTHON | {"source": "def grade(s, i, more): pass"}, "grade takes (s, i, more)"),
    (PYTHON | {"source": "async def grade(s, i): pass"}, "grade is async"),
    (PYTHON | {"source": "a\0b"}, "it is no Python"),
    (PYTHON | {"source": "(" * 9000 + ")" * 9000}, "it is no Python"),
    (PYTHON | {"source": "#" * 256_000}, "it has 256,000 bytes; expected less than 256,000"),
    (MULTI | {"calculate_output": "a + z"}, "calculate_output 'a + z' uses 'z'; the graders are a, b, c, d, e"),
    (MULTI | {"calculate_output": "a +"}, "calculate_output 'a +' is no formula"),
    (MULTI | {"calculate_output": "__import__('os')"}, "calculate_output"),
    (MULTI | {"graders": {}}, "graders is {}: expected at least 1 item"),
    (multi(a=multi(b=CHECK)), "graders.a is a multi inside a multi"),
    (multi(a={"type": "string"}), "graders.a.type is \"string\": expected one of"),
    (multi(a=CHECK | {"operation": "is"}), "graders.a.operation is \"is\""),
    (multi(a=without(CHECK, "input")), "graders.a.input is missing: add it, the text that is checked"),
    (multi(**{"not a name": CHECK}), "graders holds 'not a name'"),
    (multi(min=CHECK), "graders holds 'min': the name of a function"),
    (STRUCTURED | {"fields": {"a": {"weigth": 1}}}, "fields.a.weigth is unknown: did you mean weight?"),
    (STRUCTURED | {"fields": {"a": {"weight": -1}}}, "fields.a.weight is -1: expected greater than or equal to 0"),
    (STRUCTURED | {"fields": {"a": {"weight": 0}}}, "expected one with a weight above 0"),
    (FUNCTION | {"function": "grade"}, "function is 'grade': expected MODULE.FUNCTION"),
    (FUNCTION | {"function": "no_such_module.grade"}, "there is no module no_such_module"),
]  # fmt: skip


@pytest.mark.parametrize(("grader", "said"), BAD)
def test_unusable_graders_are_refused(grader: Any, said: str) -> None:
    with pytest.raises(AgileError) as caught:
        parse_grader(grader)
    assert said in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(AgileError) as caught:
        parse_grader(multi(a=CHECK | {"operation": "is", "input": "{{ x.y }}"}, b={"type": "x"}))
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON (line 1, column 1"),
        ('{"type": "python",\n}', "is no JSON (line 2, column 1"),
        ('{"type": "python", "type": "multi"}', "the key 'type' stands twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "grader.json"
    path.write_text(text)
    with pytest.raises(AgileError) as caught:
        load_grader(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match="No such file"):
        load_grader(tmp_path / "missing.json")
    (tmp_path / "latin.json").write_bytes(b'{"type": "\xfc"}')
    with pytest.raises(AgileError, match="not UTF-8"):
        load_grader(tmp_path / "latin.json")
    (tmp_path / "bom.json").write_text("\ufeff" + json.dumps(CHECK))
    assert load_grader(tmp_path / "bom.json").name == "same"


def test_what_may_not_be_meant_is_noted() -> None:
    grader = multi(a=CHECK | {"input": "{{ item.x"}, b=PYTHON | {"image_tag": "x"}, c=FUNCTION)
    assert list(notes(parse_grader(grader | {"calculate_output": "a + c"}))) == [
        'graders.a."{{ item.x" holds {{ without }}: it stays as it is.',
        "graders.b.image_tag is not used: the Python of this environment runs the grader.",
        "graders.c.function is imported and run in this process, unconfined, when a sample is graded.",
        "graders.b is run, but calculate_output does not use it.",
    ]
    assert list(notes(parse_grader(MULTI))) == []
