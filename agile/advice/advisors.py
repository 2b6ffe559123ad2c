"""Experts made of a function, of a data set's gold answers, of recorded ones, and of another expert who errs."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agile import threads
from agile.errors import AgileError
from agile.protocols import Advisor
from agile.types import Advice, AdviceRequest, AdviceStatus, Item

Reply = str | Advice | None


@dataclass(frozen=True, slots=True)
class CallbackAdvisor:
    """An expert who is any Python function of the request: sync or async, returning the answer, an `Advice`, or None.

    None and blank text mean that the expert does not know. A sync function runs in a thread of its own, so it may
    block, and several requests may call it at once.

    >>> advisor = CallbackAdvisor(lambda request: "yes" if "oven" in request.item.question else None)
    >>> request = AdviceRequest("s/0", Item("q0", "is it oven safe?", None, "fact"), "", price=0.3)
    >>> asyncio.run(advisor.advise(request)).answer
    'yes'
    """

    function: Callable[[AdviceRequest], Reply | Awaitable[Reply]]
    name: str = "callback"

    async def advise(self, request: AdviceRequest) -> Advice:
        """Raises whatever the function raises, and TypeError for a reply of another type."""
        if inspect.iscoroutinefunction(self.function):
            reply: Any = await self.function(request)
        else:
            reply = await asyncio.wrap_future(threads.start(lambda: self.function(request)))
            if inspect.isawaitable(reply):
                reply = await reply
        if isinstance(reply, Advice):
            return reply
        if reply is None or (isinstance(reply, str) and not reply.strip()):
            return Advice("", expert=self.name, status=AdviceStatus.REFUSED)
        if not isinstance(reply, str):
            raise TypeError(
                f"advisor {self.name!r} returned {type(reply).__name__}; expected str, Advice, or None for not knowing."
            )
        return Advice(reply.strip(), expert=self.name, price=request.price)


def gold_answer(item: Item) -> str:
    """The item's answer as text: of a list of products (ProductQA's search questions) the first `asin`, or `none`."""
    answer = item.answer
    if isinstance(answer, list | tuple):
        answer = answer[0] if answer else "none"
        answer = answer["asin"] if isinstance(answer, dict) else answer
    return str(answer)


def gold_explanation(item: Item) -> str:
    """The item's long answer, or nothing."""
    return str(item.context.get("long_answer", ""))


@dataclass(frozen=True, slots=True)
class DatasetAdvisor:
    """An expert who knows the gold answers; `answer` and `explain` say how an item holds them."""

    answer: Callable[[Item], str] = gold_answer
    explain: Callable[[Item], str] = gold_explanation
    name: str = "dataset"

    async def advise(self, request: AdviceRequest) -> Advice:
        """Raises whatever `answer` and `explain` raise."""
        item = request.item
        return Advice(self.answer(item), self.explain(item), expert=self.name, price=request.price)


NOTHING_READABLE = "no answer that could be read"


@dataclass(frozen=True, slots=True)
class RecordedAdvisor:
    """An expert whose answers were recorded, by question id.

    Answers of None are ones that nobody could read: they are given, and paid for, as an answer that says nothing. A
    question without a record is one that the expert does not know.
    """

    answers: Mapping[str, str | None]
    name: str = "recorded"

    async def advise(self, request: AdviceRequest) -> Advice:
        if request.item.id not in self.answers:
            return Advice("", expert=self.name, status=AdviceStatus.REFUSED)
        return Advice(self.answers[request.item.id] or NOTHING_READABLE, expert=self.name, price=request.price)


def wrong_answer(request: AdviceRequest) -> str:
    """An answer that is wrong: another option where there are some, the other of yes and no, else `unknown`."""
    item = request.item
    options = item.context.get("options", {})
    others = [letter for letter, words in options.items() if item.answer not in (letter, words)]
    if others:
        return str(others[zlib.crc32(f"{request.session_id} {item.id}".encode()) % len(others)])
    return {"yes": "no", "no": "yes"}.get(str(item.answer).strip().lower(), "unknown")


@dataclass(frozen=True, slots=True)
class NoisyAdvisor:
    """Another expert, whose answers are replaced by wrong ones with probability `error_rate`.

    Which ones depends on the seed, the session and the item alone, so neither the order nor the number of calls
    matters. A wrong answer comes without an explanation, for the true one would give it away.

    Raises:
        AgileError: `error_rate` is not in [0, 1].
    """

    advisor: Advisor
    error_rate: float
    wrong: Callable[[AdviceRequest], str]
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate <= 1:
            raise AgileError(f"NoisyAdvisor: error_rate={self.error_rate}, expected a probability in [0, 1].")

    async def advise(self, request: AdviceRequest) -> Advice:
        """Raises whatever the other expert and `wrong` raise."""
        advice = await self.advisor.advise(request)
        if not advice.answered or self._uniform(request) >= self.error_rate:
            return advice
        return replace(advice, answer=self.wrong(request), explanation="")

    def _uniform(self, request: AdviceRequest) -> float:
        """A number in [0, 1), the same in every process."""
        key = repr((self.seed, request.session_id, request.item.id)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "big") / 2**48
