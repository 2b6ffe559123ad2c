"""One session, played so that it can go on after a restart: every collaborator gives what the journal holds first."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.orm import Session as Transaction

from agile.advice import AdviceDesk
from agile.executor import Executor
from agile.protocols import Policy, Tool
from agile.seeding import derive_seed
from agile.serve import requests
from agile.serve.database import Database, DatabaseAway
from agile.serve.memory import DeskMemory
from agile.serve.questions import Journal
from agile.types import (
    Action,
    Advice,
    AdviceRequest,
    AdviceStatus,
    Completion,
    Fn,
    Item,
    MemoryItem,
    MemoryKind,
    Observation,
    Retrieved,
    Scope,
    Session,
    ToolResult,
    Usage,
)
from agile.watchdog import StageTimeout, within

logger = logging.getLogger(__name__)
T = TypeVar("T")
STREAM = "served"
PROBE_S = 30.0  # how long the agent may take to say what it would have answered


async def play(
    executor: Executor,
    policy: Policy,
    memory: DeskMemory,
    database: Database,
    item: Item,
    number: int,
    seed: int,
    *,
    fresh: bool = False,
    price: float | None = None,
    advise: Callable[[AdviceRequest, Mapping[str, Any]], Awaitable[Advice]],
    on_asking: Callable[[], None],
) -> Session:
    """Play question `number`, from where its journal ends.

    Args:
        executor: Its agent, codec, tools, limits, price and score are used.
        fresh: Whether it was never played before.
        price: Of advice; None for the executor's.
        advise: Asks the expert, who is also shown what was retrieved and what the agent would answer.
        on_asking: Called when an expert is about to be asked, before anybody can see the question.

    Raises:
        AgileError: The journal is another agent's, or what only a user can mend happened.
    """
    journal = Journal(database, number, fresh=fresh)
    sampled = _Policy(policy, journal)
    remembered = _Memory(memory, journal)

    async def ask(request: AdviceRequest) -> Advice:
        found = journal.given("advice")
        if found is not None:
            return Advice(**{**found, "status": AdviceStatus(found["status"])})
        own = await own_answer(executor, policy, sampled.prompt, seed)
        shown = [(e.item.text, round(e.similarity, 2)) for e in remembered.shown]
        await patiently(lambda: journal.save(waiting=True))
        on_asking()
        detail = {"retrieved": shown, "own_answer": own}
        advice = await patiently(lambda: advise(request, detail))
        journal.add("advice", advice)
        return advice

    player = Executor(
        executor.agent,
        executor.codec,
        {name: _Tool(tool, journal) for name, tool in executor.tools.items()},
        AdviceDesk(_Advisor(ask), executor.desk.price),
        executor.score,
        executor.limits,
    )
    session = await player.run(
        sampled, item, remembered, stream_id=STREAM, index=number, progress=0.0, seed=seed, price=price
    )
    if session.failed and session.advised and not session.written:  # what an expert said is not lost with it
        remembered.write(executor.agent.remember(item, session.id, session.advice, ""))
    return session


async def patiently(do: Callable[[], Awaitable[T]]) -> T:
    """Do something with the database, again and again while it is away."""
    delay_s = 0.5
    while True:
        try:
            return await do()
        except DatabaseAway as error:
            logger.warning("%s", error)
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, 15.0)


async def own_answer(executor: Executor, policy: Policy, prompt: Sequence[int], seed: int) -> dict[str, Any] | None:
    """What the agent would answer if it had to, and how probable it finds it; None if it says nothing."""
    codec, limits = executor.codec, executor.limits
    if not prompt or codec.awaited(prompt) is not None:
        return None
    prompt = (*prompt, *codec.turns.end_thinking, *codec.name_ids(Fn.PREDICT_ANSWER))
    room = min(limits.max_action_tokens, limits.max_context_tokens - len(prompt))
    if room < 1:
        return None
    stop = codec.stop_ids((), Fn.PREDICT_ANSWER)
    try:
        said = await within(
            "policy",
            PROBE_S,
            policy.complete(prompt, max_tokens=room, stop=stop, seed=derive_seed(seed, "own answer")),
        )
    except (Exception, StageTimeout) as error:  # only the desk would have been told
        logger.warning("the agent did not say what it would answer: %s", error)
        return None
    action = codec.parse(said.token_ids, (), Fn.PREDICT_ANSWER)
    if not isinstance(action, Action) or not action.argument.strip():
        return None
    probability = math.exp(sum(said.logprobs))
    return {"text": action.argument, "probability": probability if math.isfinite(probability) else None}


@dataclass(frozen=True, slots=True)
class _Advisor:
    ask: Callable[[AdviceRequest], Awaitable[Advice]]

    async def advise(self, request: AdviceRequest) -> Advice:
        return await self.ask(request)


@dataclass(slots=True)
class _Policy:
    """Attributes:
    prompt: What it was last asked to continue.
    """

    policy: Policy
    journal: Journal
    prompt: tuple[int, ...] = ()

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        self.prompt = tuple(prompt_ids)
        if (found := self.journal.given("completion")) is not None:
            ids, logprobs = tuple(found["token_ids"]), tuple(found["logprobs"])
            return Completion(ids, logprobs, found["finish_reason"], found["policy_version"], Usage(**found["usage"]))
        completion = await self.policy.complete(prompt_ids, max_tokens=max_tokens, stop=stop, seed=seed)
        self.journal.add("completion", completion)
        return completion


@dataclass(slots=True)
class _Memory:
    memory: DeskMemory
    journal: Journal
    shown: list[Retrieved] = field(default_factory=list)

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        if (found := self.journal.given("write")) is not None:
            return [int(i) for i in found]

        def keep(session: Transaction) -> list[int]:
            mended = items and requests.is_mended(session, items[0].session_id)
            return [] if mended else self.memory.write_new(items, session)

        ids: list[int] = self.journal.save_with("write", keep)  # an entry without its journal would be written again
        return ids

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        found = self.journal.given("retrieved")
        if found is None:
            entries = self.memory.retrieve(query, k, scope)
            self.journal.add("retrieved", entries)
        else:
            entries = [Retrieved(_memory_item(e["item"]), e["similarity"]) for e in found]
        self.shown += entries
        return entries

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        found = self.journal.given("count")
        if found is None:
            found = self.memory.count_similar(query, threshold, scope)
            self.journal.add("count", found)
        return int(found)

    def __len__(self) -> int:
        found = self.journal.given("length")
        if found is None:
            found = len(self.memory)
            self.journal.add("length", found)
        return int(found)


def _memory_item(data: Mapping[str, Any]) -> MemoryItem:
    return MemoryItem(**{**data, "kind": MemoryKind(data["kind"])})


@dataclass(slots=True)
class _Tool:
    tool: Tool
    journal: Journal

    @property
    def name(self) -> str:
        return self.tool.name

    @property
    def description(self) -> str:
        return self.tool.description

    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        if (found := self.journal.given("result")) is not None:
            return ToolResult(**found)
        try:
            result = await self.tool(argument, item, earlier)
        except Exception as error:  # in the words of the executor
            result = ToolResult(f"error : {type(error).__name__}: {error}", ok=False)
        self.journal.add("result", result)
        await patiently(self.journal.save)
        return result
