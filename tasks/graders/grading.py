"""From a grader, a sample and an item to a grade. What goes wrong with one sample is an error in its grade."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from agile import threads
from agile.errors import AgileError
from agile.tasks.graders import model_graders, structured
from agile.tasks.graders.formula import FormulaError, evaluate, parse_formula
from agile.tasks.graders.models import (
    FieldRule,
    FunctionGrader,
    Grader,
    LabelModel,
    Multi,
    PythonGrader,
    ScoreModel,
    Single,
    StringCheck,
    Structured,
    TextSimilarity,
)
from agile.tasks.graders.result import Grade, GraderErrors, error, failed
from agile.tasks.graders.sandbox import Limits, run_python
from agile.tasks.graders.similarity import similarity
from agile.tasks.graders.template import MissingVariable, TemplateError, UnreadableSample, render, value

if TYPE_CHECKING:
    from agile.policies.endpoint import Endpoint

Function = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]  # sync or async, (sample, item) -> float
_SAMPLE_KEYS = ("output_text", "output_json", "output_tools", "choices")


def make_sample(text: str, *, tools: list[Any] | None = None, finish_reason: str = "stop") -> dict[str, Any]:
    """What graders see of a model's output: `output_text`, `output_tools`, `choices`, and `output_json` if it is JSON.

    >>> sorted(make_sample('{"a": 1}'))
    ['choices', 'output_json', 'output_text', 'output_tools']
    """
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tools:
        message["tool_calls"] = tools
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    sample = {"output_text": text, "output_tools": tools or [], "choices": [choice]}
    try:
        return sample | {"output_json": json.loads(text, parse_constant=_no_constant)}
    except (ValueError, RecursionError):
        return sample


def complete_sample(given: Any) -> dict[str, Any]:
    """A sample of its text alone, or of an object with `output_text` or `choices` and what else it has.

    Raises:
        AgileError: It is neither.
    """
    if isinstance(given, str):
        return make_sample(given)
    if not isinstance(given, Mapping) or not ({"output_text", "choices"} & given.keys()):
        raise AgileError(
            f"A sample is {json.dumps(given)[:100]}: expected the text that the model wrote, or an object with "
            f"output_text (and {', '.join(_SAMPLE_KEYS[1:])} where there are such)."
        )
    if strange := [key for key in given if key not in _SAMPLE_KEYS]:
        raise AgileError(f"A sample holds {strange[0]!r}; expected {', '.join(_SAMPLE_KEYS)}.")
    text, tools, finish_reason = given.get("output_text"), given.get("output_tools"), "stop"
    try:
        choice = given["choices"][0] if given.get("choices") else {}
        message = choice.get("message") or {}
        text = message.get("content") if text is None else text
        tools = message.get("tool_calls") if tools is None else tools
        finish_reason = str(choice.get("finish_reason") or "stop")
    except (LookupError, TypeError, AttributeError):
        raise AgileError(
            f"A sample's choices are {json.dumps(given['choices'])[:100]}: expected those of a chat completion."
        ) from None
    return make_sample(str(text or ""), tools=tools, finish_reason=finish_reason) | dict(given)


class Grading:
    """What graders run with.

    Args:
        endpoint: Where the models are that grade, under the names that graders give; None if no grader asks one.
        limits: Of python graders.
        num_processes: Most python graders at once; one for each processor by default.
    """

    def __init__(
        self, endpoint: Endpoint | None = None, limits: Limits | None = None, num_processes: int | None = None
    ):
        self.endpoint = endpoint
        self.limits = limits or Limits()
        self._processes = ThreadPoolExecutor(num_processes or os.cpu_count(), "python-grader")
        self._lock = threading.Lock()
        # the libraries of metrics need not stand several threads either
        self._one = ThreadPoolExecutor(1, "grader")

    async def __aenter__(self) -> Grading:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._processes.shutdown(wait=False, cancel_futures=True)
        self._one.shutdown(wait=False, cancel_futures=True)
        if self.endpoint is not None:
            await self.endpoint.close()

    async def grade(self, grader: Grader | Function, sample: str | Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        """The grade of a sample; any function `grade(sample, item)`, sync or async, is a grader too.

        Raises:
            AgileError: What no other sample would mend: a library or function is missing, there is no endpoint, it
                does not accept the key, `sample` is no sample.
        """
        started = time.monotonic()
        full = complete_sample(sample)
        if isinstance(grader, Multi):
            result = await self._multi(grader, full, item)
        elif callable(grader):
            result = await self._function(getattr(grader, "__name__", "function"), grader, full, item)
        else:
            result = await self._single(grader, full, item)
        if any(choice.get("finish_reason") == "length" for choice in full["choices"] if isinstance(choice, Mapping)):
            result = replace(result, errors=GraderErrors(truncated_observation_error=True) | result.errors)
        return replace(result, execution_time_s=time.monotonic() - started)

    async def _multi(self, grader: Multi, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        grades = await asyncio.gather(*(self._single(part, sample, item) for part in grader.graders.values()))
        parts = dict(zip(grader.graders, grades, strict=True))
        rewards = {name: part.reward for name, part in parts.items()}
        errors, reward = GraderErrors(), 0.0
        for part in grades:
            errors |= part.errors
        try:
            reward = evaluate(parse_formula(grader.calculate_output, list(parts)), rewards)
        except FormulaError as problem:
            errors |= error("formula_parse_error", f"{grader.name}: {grader.calculate_output} {problem}")
        usage: dict[str, dict[str, int]] = {}
        for model, spent in (pair for part in grades for pair in part.token_usage.items()):
            usage[model] = {key: count + usage.get(model, {}).get(key, 0) for key, count in spent.items()}
        scores = {name: dict(part.scores) for name, part in parts.items() if part.scores}
        return Grade(reward, grader.name, grader.type, errors, rewards, scores, token_usage=usage)

    async def _single(self, grader: Single, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        try:
            return await self._run(grader, sample, item)
        except MissingVariable as problem:
            errors = error("invalid_variable_error", str(problem))
        except UnreadableSample as problem:
            errors = error("sample_parse_error", str(problem))
        except TemplateError as problem:
            errors = error("invalid_variable_error", str(problem))
        return failed(grader.name, grader.type, errors)

    async def _run(self, grader: Single, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        loop = asyncio.get_running_loop()
        match grader:
            case StringCheck():
                return _string_check(grader, sample, item)
            case TextSimilarity(evaluation_metric=metric):
                text, reference = render(grader.input, item, sample), render(grader.reference, item, sample)
                reward = await loop.run_in_executor(self._one, similarity, metric, text, reference)
                passed = {} if grader.pass_threshold is None else {"passed": reward >= grader.pass_threshold}
                return Grade(reward, grader.name, grader.type, scores=passed)
            case ScoreModel() | LabelModel():
                if self.endpoint is None:
                    raise AgileError(
                        f"The grader {grader.name!r} asks the model {grader.model!r}, but no endpoint is given; name "
                        "one (agile grade run --base-url URL)."
                    )
                return await model_graders.ask(grader, self.endpoint, item, sample)
            case PythonGrader(source=source):
                reward, errors = await loop.run_in_executor(
                    self._processes, run_python, source, sample, item, self.limits
                )
                return (
                    failed(grader.name, grader.type, errors)
                    if errors.kinds
                    else Grade(reward, grader.name, grader.type)
                )
            case Structured():
                return grade_structured(grader, sample, item)
            case FunctionGrader():
                return await self._function(grader.name, import_function(grader.function), sample, item)

    def _alone(self, function: Function, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        """One at a time: functions of users need not stand several threads."""
        with self._lock:
            return function(sample, item)

    async def _function(
        self, name: str, function: Function, sample: Mapping[str, Any], item: Mapping[str, Any]
    ) -> Grade:
        try:
            if inspect.iscoroutinefunction(function):
                given = await function(sample, item)
            else:
                # a thread that nobody waits for: a function that never returns must not hold up the end
                given = await asyncio.wrap_future(threads.start(partial(self._alone, function, sample, item)))
            reward = float(given)
            if isinstance(given, str) or not math.isfinite(reward):
                raise ValueError(f"it returned {given!r}, expected a finite number")
        except Exception as problem:
            return failed(name, "function", error("other_error", f"{type(problem).__name__}: {problem}"))
        return Grade(reward, name, "function")


def import_function(path: str) -> Function:
    """The function of a dotted path.

    Raises:
        AgileError: It cannot be imported, or is no function.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as problem:
        raise AgileError(
            f"The function {path!r} cannot be imported ({problem}); expected MODULE.FUNCTION, of an installed "
            "module, or of one in this folder with PYTHONPATH=. before the command."
        ) from None
    if not callable(found):
        raise AgileError(f"{path} is {type(found).__name__}, expected a function (sample, item) -> float.")
    checked: Function = found
    return checked


def grade_structured(grader: Structured, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
    """The weighted mean of the fields' F1; precision, recall and F1 of each in `scores`."""
    found, expected = (value(text, item, sample) for text in (grader.input, grader.reference))
    expected, found = _object(expected), _object(found)
    if expected is None:
        problem = f"reference {grader.reference} is no JSON object"
        return failed(grader.name, grader.type, error("invalid_variable_error", problem))
    if found is None:
        return failed(grader.name, grader.type, error("sample_parse_error", f"input {grader.input} is no JSON object"))
    paths = dict.fromkeys([*structured.field_paths(expected), *structured.field_paths(found)])
    rules = grader.fields if grader.fields is not None else dict.fromkeys(paths, FieldRule())
    scores = {
        path: structured.compare(structured.look_up(found, path), structured.look_up(expected, path), rule.tolerance)
        for path, rule in rules.items()
    }
    total = sum(rule.weight for rule in rules.values())
    reward = sum(rules[path].weight * score.f1 for path, score in scores.items()) / total if total else 1.0
    return Grade(
        reward, grader.name, grader.type, sub_rewards={path: score.f1 for path, score in scores.items()}, scores=scores
    )


def _string_check(grader: StringCheck, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
    text, reference = render(grader.input, item, sample), render(grader.reference, item, sample)
    match grader.operation:
        case "eq":
            holds = text == reference
        case "ne":
            holds = text != reference
        case "like":
            holds = reference in text
        case "ilike":
            holds = reference.casefold() in text.casefold()
    return Grade(float(holds), grader.name, grader.type)


def _object(given: Any) -> dict[str, Any] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
    return given if isinstance(given, dict) else None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
