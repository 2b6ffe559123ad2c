"""Graders that ask a model behind an OpenAI-compatible endpoint: what it is sent, and how its answer is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agile.tasks.graders.models import ImageContent, LabelModel, Message, ScoreModel, TextContent
from agile.tasks.graders.result import Grade, GraderErrors, error, failed
from agile.tasks.graders.template import render

if TYPE_CHECKING:  # the client takes a second to import, and most graders need none
    from agile.policies.endpoint import Answer, Endpoint

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


async def ask(
    grader: ScoreModel | LabelModel, endpoint: Endpoint, item: Mapping[str, Any], sample: Mapping[str, Any]
) -> Grade:
    """The grade that a model gives; equal requests are sent once, failed ones again (`Endpoint`).

    Raises:
        AgileError: No request would fare better: key, address, quota or disk.
        TemplateError, MissingVariable, UnreadableSample: See `agile.tasks.graders.template.render`.
    """
    from agile.policies.endpoint import Rejected

    body = request_body(grader, item, sample)
    try:
        try:
            answer = await _send(endpoint, body)
        except Rejected as rejected:
            if "max_completion_tokens" not in body or "max_completion_tokens" not in rejected.text:
                raise
            body["max_tokens"] = body.pop("max_completion_tokens")  # its older name
            answer = await _send(endpoint, body)
    except TimeoutError as problem:
        errors = error("model_grader_server_error", str(problem))
        return failed(grader.name, grader.type, GraderErrors(unresponsive_reward_error=True) | errors)
    except (Rejected, RuntimeError) as problem:
        cut_off = "used up its tokens" in str(problem)
        kind = "model_grader_parse_error" if cut_off else "model_grader_server_error"
        return failed(grader.name, grader.type, error(kind, str(problem)))
    usage = answer.usage
    spent = {
        grader.model: {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
    }
    reward, scores, errors = _judge(grader, answer.message)
    if errors.kinds:
        errors = failed(grader.name, grader.type, errors).errors
    return Grade(reward, grader.name, grader.type, errors, scores=scores, token_usage=spent)


async def _send(endpoint: Endpoint, body: Mapping[str, Any]) -> Answer:
    async with endpoint.first_alone():
        return await endpoint.ask(body)


def request_body(grader: ScoreModel | LabelModel, item: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    """The request: the grader's messages, then what form the answer must have, for endpoints that enforce none."""
    if isinstance(grader, ScoreModel):
        low, high = grader.range
        form = f"Reply with a single number from {low:g} to {high:g} and nothing else."
    else:
        form = f"Reply with exactly one of these labels and nothing else: {', '.join(grader.labels)}."
    messages = [_message(m, item, sample) for m in grader.input]
    body: dict[str, Any] = {"model": grader.model, "messages": [*messages, {"role": "user", "content": form}]}
    if messages[-1]["role"] == "user":  # some chat templates refuse two turns of one role
        last = messages[-1]["content"]
        joined = f"{last}\n\n{form}" if isinstance(last, str) else [*last, {"type": "text", "text": form}]
        body["messages"] = [*messages[:-1], {"role": "user", "content": joined}]
    given = {} if grader.sampling_params is None else grader.sampling_params.model_dump(exclude_none=True)
    if (limit := given.pop("max_completions_tokens", None)) is not None:
        given["max_completion_tokens"] = limit
    return body | given


def _message(message: Message, item: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role  # which only OpenAI's own endpoint knows
    parts: list[dict[str, Any]] = []
    for content in message.content:
        if isinstance(content, TextContent):
            parts.append({"type": "text", "text": render(content.text, item, sample)})
        elif isinstance(content, ImageContent):
            detail = {} if content.detail is None else {"detail": content.detail}
            url = render(content.image_url, item, sample)
            parts.append({"type": "image_url", "image_url": {"url": url, **detail}})
        else:
            parts.append({"type": "input_audio", "input_audio": dict(content.input_audio)})
    if all(part["type"] == "text" for part in parts):  # which every endpoint takes as one text
        return {"role": role, "content": "\n".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


def _judge(grader: ScoreModel | LabelModel, message: Mapping[str, Any]) -> tuple[float, dict[str, Any], GraderErrors]:
    """Reward, scores and errors of an answer."""
    if message.get("refusal"):
        return 0.0, {}, error("model_grader_refusal_error", str(message["refusal"]))
    said = str(message.get("content") or "")
    if isinstance(grader, LabelModel):
        label = read_label(said, grader.labels)
        if label is None:
            return 0.0, {}, error("model_grader_parse_error", f"expected one of the labels, found {said[:200]!r}")
        return float(label in grader.passing_labels), {"label": label}, GraderErrors()
    score = read_number(said)
    if score is None:
        return 0.0, {}, error("model_grader_parse_error", f"expected one number, found {said[:200]!r}")
    reward = min(max(score, grader.range[0]), grader.range[1])
    passed = {} if grader.pass_threshold is None else {"passed": reward >= grader.pass_threshold}
    return reward, {"score": score, **passed}, GraderErrors()


def read_number(said: str) -> float | None:
    """The number in an answer: alone, as `result` or `score` of a JSON object, or the only number in the text.

    >>> read_number("0.8"), read_number('{"steps": [1], "result": "0.5"}'), read_number("Score: 3"), read_number("3/5")
    (0.8, 0.5, 3.0, None)
    """
    value = _json(said)
    if isinstance(value, dict):
        value = next((value[key] for key in ("result", "score") if key in value), None)
        return _number(value)
    found = _NUMBER.findall(said)
    return _number(found[0]) if len(found) == 1 else None


def read_label(said: str, labels: Sequence[str]) -> str | None:
    """The label that an answer is, whatever its case, quotes and full stop; or `result` or `label` of a JSON object."""
    value = _json(said)
    if isinstance(value, dict):
        value = next((value[key] for key in ("result", "label") if key in value), None)
    text = value if isinstance(value, str) else said
    known = {_bare(label): label for label in labels}
    return known.get(_bare(text))


def _bare(text: str) -> str:
    return text.strip(" \t\r\n\"'`*.").lower()


def _json(said: str) -> Any:
    """The JSON value that an answer is, in a code fence or not; None if it is none."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", said, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else said)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
