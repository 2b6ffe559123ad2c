"""Imitation sessions: the executor itself plays a teacher, so their format can never drift from rollouts'."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from agile.executor import Executor
from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Memory, Policy
from agile.rollout import warn_of_failures
from agile.seeding import derive_seed
from agile.types import Action, AgentSpec, Fn, Item, MemoryItem, Session, Source, Stream, Trajectory

Teach = Callable[[Item, Memory, float, np.random.Generator], Policy]
InitialMemory = Callable[[Item, Sequence[Item], np.random.Generator], list[MemoryItem]]


@dataclass(frozen=True, slots=True)
class Job:
    """One imitation session that is to be played: which question, and which of its repetitions."""

    stream: Stream
    index: int
    repeat: int


def jobs(streams: Iterable[Stream], sessions_per_item: int) -> Iterator[Job]:
    """What is to be played, in order: each question so often, with a memory of its own each time."""
    for stream in streams:
        for index in range(len(stream.items)):
            for repeat in range(sessions_per_item):
                yield Job(stream, index, repeat)


@dataclass(frozen=True, slots=True)
class Imitation:
    """How imitation sessions are made.

    Attributes:
        executor: Writes the sessions.
        teach: Gives the teacher's policy for one session at a price of advice.
        initial_memory: What it may have learned before from the stream's other questions.
        prices: Of advice; each session draws one.
        model: A stronger model as the teacher in place of `teach`, with an executor of its own, for its tokens are not
            the agent's: what it did, if it is worth imitating, is written again by `executor`.
        close: Ends what the model holds open.
        max_calls: Calls of an action from which a session is left out: it found nothing and went on.
    """

    executor: Executor
    teach: Teach
    initial_memory: InitialMemory
    new_memory: Callable[[Stream], Memory]
    prices: Sequence[float]
    seed: int
    model: tuple[Executor, Policy] | None = None
    close: Callable[[], Awaitable[None]] | None = None
    max_calls: Mapping[str, int] = field(default_factory=dict)

    async def play(self, job: Job) -> Session:
        """The session of a job; the same whenever and wherever it is played."""
        item = job.stream.items[job.index]
        seed = derive_seed(self.seed, job.stream.id, job.index, job.repeat)
        rng = np.random.default_rng(seed)
        price = self.prices[derive_seed(seed, "price") % len(self.prices)]
        remembered = self.initial_memory(item, job.stream.items, rng)

        async def run(executor: Executor, policy: Policy, memory: Memory) -> Session:
            return await executor.run(
                policy,
                item,
                memory,
                stream_id=f"{job.stream.id}#{job.repeat}",
                index=job.index,
                progress=job.stream.progress(job.index),
                seed=seed,
                price=price,
            )

        def memory() -> Memory:
            new = self.new_memory(job.stream)
            new.write(remembered)
            return new

        own = memory()
        if self.model is None:
            return await run(self.executor, self.teach(item, own, price, rng), own)
        shown = await run(*self.model, memory())
        if self.why_left_out(shown):
            return shown
        rest = iter(decisions(shown, self.executor.agent.spec))
        return await run(self.executor, ScriptedPolicy(self.executor.codec, lambda context: next(rest)), own)

    def why_left_out(self, session: Session) -> str:
        """Why a session is no example to follow: it broke off, is wrong, or found nothing; empty if it is one."""
        if session.failed:
            return str(session.status)
        if session.correct is False:
            return "wrong"
        for name, most in self.max_calls.items():
            if sum(step.action.name == name for step in session.steps) >= most:
                return f"{most} calls of {name}"
        return ""

    async def sessions(self, all_jobs: Iterable[Job], on_session: Callable[[], None] = lambda: None) -> list[Session]:
        """The sessions of these jobs that are worth imitating, in order; failures are warned of."""
        played = []
        for job in all_jobs:
            played.append(await self.play(job))
            on_session()
        warn_of_failures("Imitation", [Trajectory("teacher", tuple(played))])
        return [session for session in played if not self.why_left_out(session)]


def decisions(session: Session, spec: AgentSpec) -> list[Action]:
    """What the policy chose in a session, in order, without what the executor wrote or refused."""
    chosen: list[Action] = []
    legal: tuple[str, ...] = (spec.first.name,)
    advised = False
    for step in session.steps:
        if not any(action.name == step.action.name for action in spec.actions) or step.action.name not in legal:
            continue
        if not step.ok and step.source is Source.EXECUTOR:  # an argument that could not be read
            continue
        if len(legal) > 1 or spec[step.action.name].takes_argument:
            chosen.append(step.action)
        advised = advised or step.action.name == Fn.SEEK_ADVICE
        legal = spec.legal_after(step.action.name, advised=advised)
    return chosen
