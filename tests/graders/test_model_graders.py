"""Graders that ask a model: what is sent to an endpoint, and how each kind of answer is read."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning.alpha import GraderRunResponse

from agile.errors import AgileError
from agile.policies.endpoint import Endpoint
from agile.tasks.graders import Grade, Grading, parse_grader
from agile.tasks.graders.model_graders import read_label, read_number
from tests.stub_endpoint import Reply, StubEndpoint, refused, said, stub_endpoint

ITEM = {"answer": "blue"}
ASK = [{"role": "developer", "content": "Be fair."}, {"role": "user", "content": "Rate {{ sample.output_text }}."}]
SCORE: dict[str, Any] = {"type": "score_model", "name": "judge", "model": "big", "input": ASK, "range": [0, 10]}
LABEL = {
    "type": "label_model",
    "name": "kind",
    "model": "small",
    "input": ASK,
    "labels": ["very good", "bad", "Ugly"],
    "passing_labels": ["very good", "Ugly"],
}


@pytest.fixture
def stub() -> Iterator[StubEndpoint]:
    with stub_endpoint() as stub:
        yield stub


def inside(label: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "multi", "name": "m", "graders": {"label": label}, "calculate_output": "label"}


def grades(
    stub: StubEndpoint, grader: Mapping[str, Any], *samples: str, cache: Path | None = None, timeout_s: float = 20.0
) -> list[Grade]:
    parsed = parse_grader(dict(grader))

    async def run() -> list[Grade]:
        endpoint = Endpoint(stub.url, "", api_key_env=None, backoff_s=0.001, cache=cache, timeout_s=timeout_s)
        async with Grading(endpoint) as grading:
            return list(await asyncio.gather(*(grading.grade(parsed, s, ITEM) for s in samples)))

    return asyncio.run(run())


PARSE, SERVER, REFUSAL = "model_grader_parse_error", "model_grader_server_error", "model_grader_refusal_error"
SCORES = [
    (said("7"), 7.0, []),
    (said(" 7.5\n"), 7.5, []),
    (said("-3"), 0.0, []),  # held within the range
    (said("99"), 10.0, []),
    (said("Score: 4"), 4.0, []),
    (said("1e1"), 10.0, []),
    (said('{"result": 3}'), 3.0, []),
    (said('{"steps": [{"a": 1}], "result": "2.5"}'), 2.5, []),
    (said('```json\n{"score": 6}\n```'), 6.0, []),
    (said("7/10"), 0.0, [PARSE]),
    (said("good"), 0.0, [PARSE]),
    (said("nan"), 0.0, [PARSE]),
    (said("1e999"), 0.0, [PARSE]),
    (said('{"result": true}'), 0.0, [PARSE]),
    (said('{"grade": 3}'), 0.0, [PARSE]),
    (said(None, refusal="I will not."), 0.0, [REFUSAL]),
    (said(None, "length"), 0.0, [PARSE]),
    (refused(400, "context length exceeded"), 0.0, [SERVER]),
    (refused(500, "down"), 0.0, [SERVER]),
    (Reply(body="<html>"), 0.0, [SERVER]),
]
LABELS = [
    (said("very good"), 1.0, []),
    (said("bad"), 0.0, []),
    (said("Ugly"), 1.0, []),
    (said("ugly"), 1.0, []),
    (said(' "Very Good". '), 1.0, []),
    (said("**bad**"), 0.0, []),
    (said('{"label": "Ugly"}'), 1.0, []),
    (said('{"result": "bad"}'), 0.0, []),
    (said('"very good"'), 1.0, []),
    (said("good"), 0.0, [PARSE]),
    (said("It is bad"), 0.0, [PARSE]),
    (said("bad, Ugly"), 0.0, [PARSE]),
    (said('{"label": 3}'), 0.0, [PARSE]),
    (said(None, refusal="no"), 0.0, [REFUSAL]),
    (refused(422, "no such format"), 0.0, [SERVER]),
    (refused(503, "busy"), 0.0, [SERVER]),
]


@pytest.fixture(scope="module")
def answered() -> dict[str, list[Grade]]:
    """Every reply of both tables, each to a sample of its own: a client takes long to start."""
    tables = {"score": (SCORE, SCORES), "label": (inside(LABEL), LABELS)}
    found = {}
    for name, (grader, table) in tables.items():
        with stub_endpoint() as stub:

            def reply(body: dict[str, Any], table: Any = table) -> Reply:
                number = re.search("Rate ([0-9]+)", str(body["messages"]))
                assert number is not None
                answer: Reply = table[int(number[1])][0]
                return answer

            stub.reply = reply
            found[name] = grades(stub, grader, *map(str, range(len(table))))
    return found


@pytest.mark.parametrize(("number", "reward", "kinds"), [(i, *row[1:]) for i, row in enumerate(SCORES)])
def test_scores(answered: dict[str, list[Grade]], number: int, reward: float, kinds: list[str]) -> None:
    grade = answered["score"][number]
    assert (grade.reward, grade.errors.kinds) == (reward, kinds)
    assert [d.startswith("judge: ") for d in grade.errors.details] == [True] * len(kinds)


@pytest.mark.parametrize(("number", "reward", "kinds"), [(i, *row[1:]) for i, row in enumerate(LABELS)])
def test_labels(answered: dict[str, list[Grade]], number: int, reward: float, kinds: list[str]) -> None:
    grade = answered["label"][number]
    assert (grade.reward, grade.errors.kinds) == (reward, kinds)


def test_the_request_holds_messages_form_and_parameters(stub: StubEndpoint) -> None:
    stub.script(said("5"))
    params = {"temperature": 0.5, "top_p": 1, "seed": 3, "max_completions_tokens": 50, "reasoning_effort": "low"}
    grades(stub, SCORE | {"sampling_params": params}, "a {{ item.answer }}")
    assert stub.requests == [
        {
            "model": "big",
            "messages": [
                {"role": "system", "content": "Be fair."},
                {
                    "role": "user",
                    "content": "Rate a {{ item.answer }}.\n\nReply with a single number from 0 to 10 and nothing else.",
                },
            ],
            "temperature": 0.5,
            "top_p": 1.0,
            "seed": 3,
            "max_completion_tokens": 50,
            "reasoning_effort": "low",
        }
    ]


def test_images_and_sound_are_passed_on(stub: StubEndpoint) -> None:
    stub.script(said("5"))
    parts = [
        "Rate",
        {"type": "input_image", "image_url": "data:{{ item.answer }}", "detail": "low"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ]
    grades(stub, SCORE | {"input": [{"role": "assistant", "content": "x"}, {"role": "user", "content": parts}]}, "x")
    assert stub.requests[0]["messages"][1]["content"] == [
        {"type": "text", "text": "Rate"},
        {"type": "image_url", "image_url": {"url": "data:blue", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "text", "text": "Reply with a single number from 0 to 10 and nothing else."},
    ]


def test_an_endpoint_that_knows_only_max_tokens(stub: StubEndpoint) -> None:
    stub.reply = lambda body: refused(400, "max_completion_tokens unknown") if "max_tokens" not in body else said("2")
    (grade,) = grades(stub, SCORE | {"sampling_params": {"max_completions_tokens": 9}}, "x")
    assert grade.reward == 2.0
    assert stub.requests[1]["max_tokens"] == 9


def test_equal_requests_are_sent_once_and_kept(stub: StubEndpoint, tmp_path: Path) -> None:
    stub.script(said("5"))
    both = {"type": "multi", "name": "m", "graders": {"a": SCORE, "b": SCORE}, "calculate_output": "a + b"}
    first = grades(stub, both, "x", "x", "y", cache=tmp_path / "answers.sqlite")
    assert [g.reward for g in first] == [10.0] * 3
    assert len(stub.requests) == 2
    grades(stub, both, "x", "y", cache=tmp_path / "answers.sqlite")
    assert len(stub.requests) == 2


def test_samples_are_graded_at_once(stub: StubEndpoint) -> None:
    stub.reply = lambda body: Reply(body=said("5").body, delay_s=0.1)
    assert len(grades(stub, SCORE, *map(str, range(9)))) == 9
    assert stub.most_busy > 3


def test_a_failed_request_is_sent_again(stub: StubEndpoint) -> None:
    stub.script(refused(500, "down"), Reply(body="?"), said("4"))
    assert grades(stub, SCORE, "x")[0].reward == 4.0


def test_a_model_that_does_not_answer_is_unresponsive(stub: StubEndpoint) -> None:
    stub.reply = lambda body: Reply(delay_s=30)
    (grade,) = grades(stub, SCORE, "x", timeout_s=0.05)
    assert grade.errors.kinds == [SERVER, "unresponsive_reward_error"]


def test_what_no_other_sample_would_mend_is_raised(stub: StubEndpoint) -> None:
    stub.script(refused(401, "no key"))
    with pytest.raises(AgileError, match="401"):
        grades(stub, SCORE, "x")

    async def without_endpoint() -> None:
        async with Grading() as grading:
            await grading.grade(parse_grader(SCORE), "x", {})

    with pytest.raises(AgileError, match="asks the model 'big', but no endpoint"):
        asyncio.run(without_endpoint())


def test_the_result_is_that_of_the_hosted_service(stub: StubEndpoint) -> None:
    stub.script(said("5"))
    grader = {"type": "multi", "name": "m", "graders": {"a": SCORE, "b": LABEL}, "calculate_output": "a + b"}
    (grade,) = grades(stub, grader, "x")
    result = json.loads(json.dumps(grade.to_json()))
    read = GraderRunResponse.model_validate(result)
    assert read.reward == 5.0
    assert read.metadata.token_usage == 220  # two models, 100 read and 10 written each
    assert read.metadata.sampled_model_name == "big, small"
    assert read.metadata.errors.api_model_grader_parse_error is True  # 5 is no label
    assert result["model_grader_token_usage_per_model"]["big"] == {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "cached_tokens": 40,
        "total_tokens": 110,
    }
    assert result["metadata"]["errors"]["details"] == ["kind: expected one of the labels, found '5'"]


def test_missing_variables_cost_no_request(stub: StubEndpoint) -> None:
    grader = SCORE | {"input": [{"role": "user", "content": "{{ item.missing }}"}]}
    assert grades(stub, grader, "x")[0].errors.kinds == ["invalid_variable_error"]
    assert stub.requests == []


def test_pass_threshold_is_told() -> None:
    with stub_endpoint() as stub:
        stub.script(said("5"))
        assert grades(stub, SCORE | {"pass_threshold": 5}, "x")[0].scores == {"score": 5.0, "passed": True}


def test_readers_take_any_text() -> None:
    for text in ("", "[" * 100_000, "{}", "null", "[1]", "\x00", "```\n1\n```"):
        assert read_label(text, ["a"]) is None
        read_number(text)
