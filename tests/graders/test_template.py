"""Templates: what they take from item and sample, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from agile.tasks.graders.grading import make_sample
from agile.tasks.graders.template import MissingVariable, TemplateError, UnreadableSample, parse, render, value

ITEM: dict[str, Any] = {"answer": "blue", "n": 3, "tags": ["a", {"b": "c"}], "odd key": "x", "none": None, "é": "ü"}
SAMPLE = make_sample('{"total": {"eur": 1.5}, "answer": "{{ item.answer }}"}', tools=[{"function": {"name": "f"}}])


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("no variable", "no variable"),
        ("", ""),
        ("{{ item.answer }}", "blue"),
        ("{{item.answer}}{{item.n}}", "blue3"),
        ("it is {{ item.tags[0] }} and {{ item.tags[1].b }}", "it is a and c"),
        ("{{ item.tags.1.b }}", "c"),
        ("{{ item['odd key'] }}", "x"),
        ("{{ item.none }}", "null"),
        ("{{ item.é }}", "ü"),
        ("{{ item.tags }}", '["a", {"b": "c"}]'),
        ("{{ sample.output_json.total.eur }}", "1.5"),
        ("{{ sample.choices[0].finish_reason }}", "stop"),
        ("{{ sample.output_tools[0].function.name }}", "f"),
        ("{ {{ item.n }} }", "{ 3 }"),
        ("{{ item.answer", "{{ item.answer"),
        # what a model wrote is not read as a template
        ("{{ sample.output_json.answer }}", "{{ item.answer }}"),
        ("{{ sample.output_text }}", SAMPLE["output_text"]),
    ],
)
def test_templates_are_filled(text: str, rendered: str) -> None:
    assert render(text, ITEM, SAMPLE) == rendered


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ samples.output_text }}", "namespace 'samples'"),
        ("{{ answer }}", "namespace 'answer'"),
        ("{{ }}", "namespace ''"),
        ("{{ item }}", "names no variable"),
        ("{{ sample.text }}", "output_text, output_json, output_tools, choices, not 'text'"),
        ("{{ item.a | upper }}", "cannot be read at ' | upper'"),
        ("{{ item.a + 1 }}", "cannot be read"),
        ("{{ item.__class__() }}", "cannot be read"),
        ("{{ item[a] }}", "cannot be read"),
    ],
)
def test_what_nothing_can_fill_is_refused(text: str, said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ item.anser }}", "item has answer, n"),
        ("{{ item.tags[2] }}", "item.tags is a list of 2, not '2'"),
        ("{{ item.n.x }}", "item.n is 3"),
        ("{{ item.answer[0] }}", 'item.answer is "blue"'),
        ("{{ sample.output_json.sum }}", "has total, answer"),
        ("{{ item.__class__ }}", "not '__class__'"),
    ],
)
def test_a_missing_variable_says_what_there_is(text: str, said: str) -> None:
    with pytest.raises(MissingVariable) as caught:
        render(text, ITEM, SAMPLE)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["plain", "{'a': 1}", "NaN", '{"a": NaN}', "", "[" * 100_000])
def test_a_sample_that_is_no_json_has_no_output_json(text: str) -> None:
    with pytest.raises(UnreadableSample):
        render("{{ sample.output_json.a }}", {}, make_sample(text))


def test_a_single_variable_is_the_value_itself() -> None:
    assert value(" {{ sample.output_json.total }} ", ITEM, SAMPLE) == {"eur": 1.5}
    assert value("{{ item.n }}{{ item.n }}", ITEM, SAMPLE) == "33"
