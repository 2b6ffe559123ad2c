"""Experts of a config, and the scripted agents that show what each is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from agile.advice import NOTHING_READABLE, DatasetAdvisor, NoisyAdvisor, RecordedAdvisor, wrong_answer
from agile.config import ExpertConfig
from agile.errors import AgileError
from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Advisor
from agile.tasks.answers import read_answers
from agile.tokens import ActionCodec
from agile.types import Action, Advice, AdviceRequest, Fn, Item


def make_advisor(
    expert: ExpertConfig,
    *,
    recorded: Callable[[ExpertConfig], Mapping[str, str | None]],
    seed: int,
    question: Callable[[Item], str],
    folder: Path,
    fallback: Advisor | None = None,
) -> Advisor:
    """The advisor that a config describes.

    Args:
        recorded: Reads the answers of a recorded expert, see `recorded_answers`.
        seed: Draws which answers of a noisy expert are wrong.
        question: What a model is asked.
        folder: Where the answers of a model are kept, unless the config says it.
        fallback: Who is asked where a desk has no answer.

    Raises:
        AgileError: A file of recorded answers is malformed, or the key of an endpoint is missing.
    """
    match expert.kind:
        case "gold":
            return DatasetAdvisor(name="gold")
        case "noisy":
            return NoisyAdvisor(DatasetAdvisor(name="noisy"), expert.error_rate, wrong_answer, seed)
        case "recorded":
            return RecordedAdvisor(recorded(expert), expert.model or "recorded")
        case "model":
            from agile.advice.model import ModelAdvisor  # the client takes a second to import
            from agile.prompted import open_endpoint

            assert expert.endpoint is not None  # the config checks it
            options = expert.endpoint
            return ModelAdvisor(
                open_endpoint(options, folder, "experts.*.endpoint"),
                question,
                temperature=options.temperature,
                max_tokens=options.max_tokens,
            )
        case "desk":
            from agile.extras import needs

            with needs("serve"):
                from agile.serve.advisor import DeskAdvisor
                from agile.serve.database import Database

            assert expert.database is not None  # the config checks it
            database = Database(expert.database)
            return DeskAdvisor(
                database,
                expert.scope,
                timeout_s=expert.timeout_s,
                fallback=fallback,
                hours=expert.hours,
                agree=expert.agree,
            )
    assert_never(expert.kind)


def recorded_answers(
    expert: ExpertConfig,
    data: Path | None,
    skipped: list[str] | None = None,
    questions: Mapping[str, Item] | None = None,
) -> dict[str, str | None]:
    """The answers of a recorded expert; its file is looked for in the folder of the task's data too.

    Args:
        data: Folder of the task's files.
        skipped, questions: See `agile.tasks.answers.read_answers`.

    Raises:
        AgileError: There is no such file, or it is malformed.
    """
    path = expert.answers
    if path is None:
        raise AgileError(f"An expert of kind {expert.kind} has no recorded answers; set answers to their file.")
    if not path.exists() and data is not None and data.is_dir():
        path = data / path
    return read_answers(path, expert.model, skipped, questions)


@dataclass(slots=True)
class Timed:
    """Another expert, and how long it takes.

    Attributes:
        num_asked: Requests that came to an end.
        seconds: Of all of them.
    """

    advisor: Advisor
    num_asked: int = 0
    seconds: float = 0.0

    async def advise(self, request: AdviceRequest) -> Advice:
        began = time.monotonic()
        try:
            return await self.advisor.advise(request)
        finally:
            self.num_asked += 1
            self.seconds += time.monotonic() - began

    async def close(self) -> None:
        """Of an expert that is a model: wait for answers that are under way."""
        if close := getattr(self.advisor, "close", None):
            await close()


def who_never_asks(codec: ActionCodec, answers: Mapping[str, str | None], item: Item) -> ScriptedPolicy:
    """The policy for one question of an agent that gives recorded answers."""
    answer = answers.get(item.id) or NOTHING_READABLE
    return ScriptedPolicy(codec, lambda context: Action(Fn.PREDICT_ANSWER, answer))


def who_always_asks(codec: ActionCodec, item: Item) -> ScriptedPolicy:
    """The policy for one question of an agent that asks about everything, repeats the answer and remembers it."""

    def decide(context: str) -> Action:
        if context.rstrip().endswith(f"[{Fn.REFLECTION}]"):
            return Action(Fn.REFLECTION, "none")
        _, asked, reply = context.rpartition(f"[{Fn.SEEK_ADVICE}]")
        if not asked:
            return Action(Fn.SEEK_ADVICE)
        _, told, answer = reply.partition("answer: ")
        return Action(Fn.PREDICT_ANSWER, answer.partition("\n")[0].strip() if told else NOTHING_READABLE)

    return ScriptedPolicy(codec, decide)
