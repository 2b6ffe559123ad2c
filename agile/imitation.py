"""Imitation sessions: the executor itself plays a scripted teacher, so their format can never drift from rollouts'."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from rich.progress import track

from agile import ranks
from agile.executor import Executor
from agile.protocols import Memory, Policy
from agile.seeding import derive_seed
from agile.types import Item, MemoryItem, Session, Stream

Teach = Callable[[Item, Memory, float, np.random.Generator], Policy]
InitialMemory = Callable[[Item, Sequence[Item], np.random.Generator], list[MemoryItem]]


def imitation_sessions(
    executor: Executor,
    streams: Sequence[Stream],
    *,
    teach: Teach,
    initial_memory: InitialMemory,
    new_memory: Callable[[], Memory],
    sessions_per_item: int,
    prices: Sequence[float],
    seed: int,
) -> list[Session]:
    """Sessions of a teacher about every question, each with an initial memory of its own.

    Args:
        teach: Gives the teacher's policy for one session at a price of advice.
        initial_memory: What it may have learned before from the stream's other questions.
        sessions_per_item: How often each question is played.
        prices: Of advice; each session draws one.

    Returns:
        Completed sessions only.
    """

    async def play() -> list[Session]:
        sessions = []
        for stream in track(streams, description="imitation", transient=True, disable=not ranks.is_main()):
            for index, item in enumerate(stream.items):
                for repeat in range(sessions_per_item):
                    session_seed = derive_seed(seed, stream.id, index, repeat)
                    rng = np.random.default_rng(session_seed)
                    price = prices[derive_seed(session_seed, "price") % len(prices)]
                    memory = new_memory()
                    memory.write(initial_memory(item, stream.items, rng))
                    sessions.append(
                        await executor.run(
                            teach(item, memory, price, rng),
                            item,
                            memory,
                            stream_id=f"{stream.id}#{repeat}",
                            index=index,
                            progress=index / len(stream.items),
                            seed=session_seed,
                            price=price,
                        )
                    )
        return sessions

    return [s for s in asyncio.run(play()) if not s.failed]
