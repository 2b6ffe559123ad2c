"""`collect`: plays streams concurrently, the sessions of each in order, and logs every session as it ends."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from agile import threads
from agile.errors import AgileError
from agile.executor import Executor
from agile.protocols import Memory, Policy
from agile.seeding import derive_seed
from agile.types import BLAMELESS, Item, Session, SessionStatus, Stream, Trajectory

logger = logging.getLogger(__name__)

T = TypeVar("T")
MemoryFor = Callable[[Stream], Memory]
PolicyFor = Callable[[Item, Memory], Policy]


async def collect(
    executor: Executor,
    policy: Policy,
    streams: Sequence[Stream],
    memory_for: MemoryFor,
    *,
    seed: int,
    policy_for: PolicyFor | None = None,
    on_session: Callable[[Session], None] | None = None,
    max_failed: float = 0.5,
    max_concurrent: int | None = None,
) -> list[Trajectory]:
    """Play every stream once and return the trajectories in the order of `streams`.

    A session's seed derives from `seed`, its stream and its place there: results do not depend on who runs beside it.

    Args:
        memory_for: Gives each stream its memory.
        policy_for: Gives each session a policy of its own in place of `policy` (a teacher that knows the answer).
        on_session: Called with each session when it ends.
        max_failed: Share of failed sessions above which the run stops (looked at after at least 20 sessions).
        max_concurrent: Streams under way at a time, the others wait without a memory; None for all at once.

    Raises:
        AgileError: More than `max_failed` of the sessions failed; the message holds the counts and the last error.
    """
    counts: Counter[SessionStatus] = Counter()
    error = ""
    room = asyncio.Semaphore(max_concurrent or max(1, len(streams)))

    async def play(stream: Stream) -> Trajectory:
        nonlocal error
        async with room:
            memory, sessions = memory_for(stream), []
            for index, item in enumerate(stream.items):
                session = await executor.run(
                    policy if policy_for is None else policy_for(item, memory),
                    item,
                    memory,
                    stream_id=stream.id,
                    index=index,
                    progress=stream.progress(index),
                    seed=derive_seed(seed, stream.id, index),
                    price=stream.price,
                )
                sessions.append(session)
                if on_session is not None:
                    on_session(session)
                counts[session.status] += 1
                if session.failed:
                    error = f"{session.id}, {session.status}: {session.error}"
                finished = counts.total()
                failed = finished - counts[SessionStatus.COMPLETED]
                if finished >= 20 and failed > max_failed * finished:
                    raise AgileError(
                        f"{failed} of {finished} sessions failed, more than the allowed share of {max_failed} "
                        f"({', '.join(f'{n} {status}' for status, n in counts.most_common())}). The last one: {error}"
                    )
        return Trajectory(stream.id, tuple(sessions))

    tasks = [asyncio.ensure_future(play(s)) for s in streams]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def lengths(streams: Iterable[Stream]) -> list[int]:
    """How many items each stream has."""
    return [len(stream.items) for stream in streams]


class _DaemonThreads(ThreadPoolExecutor):
    """Threads of `asyncio.to_thread` that nobody waits for: a tool that never returns must not hold up the end."""

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return threads.start(partial(function, *args, **kwargs))


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, except that it leaves threads behind which have not ended."""

    async def run() -> T:
        asyncio.get_running_loop().set_default_executor(_DaemonThreads())
        return await main

    return asyncio.run(run())


def status_counts(trajectories: Iterable[Trajectory]) -> dict[str, int]:
    """How many sessions ended with each status that occurred; `completed` always."""
    counts = Counter(session.status for t in trajectories for session in t.sessions)
    return {status.value: counts[status] for status in SessionStatus if counts[status] or status == "completed"}


def warn_of_failures(where: str, trajectories: Iterable[Trajectory]) -> None:
    """Log how many sessions ended by no doing of the policy, if any, and the error that most of them have."""
    sessions = [s for t in trajectories for s in t.sessions]
    if errors := Counter(f"{s.status}, {s.error}" for s in sessions if s.status in BLAMELESS):
        ((error, count),) = errors.most_common(1)
        logger.warning(
            "%s: %d of %d sessions failed, not by the policy's doing; %d of them: %s",
            where,
            errors.total(),
            len(sessions),
            count,
            error,
        )
