"""Limits on how long a collaborator may take, whether it waits, blocks or ignores its cancellation."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import types
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class StageTimeout(Exception):
    """A stage of a session (`policy`, `tool`, `advisor`, `memory`) was not done after its time."""

    def __init__(self, stage: str, limit_s: float):
        super().__init__(f"{stage}: not done after {limit_s:g} s")
        self.stage = stage


async def within(stage: str, limit_s: float | None, call: Coroutine[Any, Any, T]) -> T:
    """Await a call for at most `limit_s` seconds (None: for as long as it takes).

    Raises:
        StageTimeout: It was not done. It is cancelled and left behind, unlike with `asyncio.wait_for`, which waits for
            a call that ignores its cancellation.
    """
    if limit_s is None:
        return await call
    task = asyncio.ensure_future(_stepwise(stage, limit_s, call))
    try:
        await asyncio.wait({task}, timeout=limit_s)
    finally:
        task.cancel()
    if not task.done():
        raise StageTimeout(stage, limit_s)
    return task.result()


@contextmanager
def interrupted(stage: str, limit_s: float | None) -> Iterator[None]:
    """End a call that blocks the event loop after `limit_s` seconds, by a signal: nothing in the loop could.

    Signals reach the main thread alone; elsewhere there is no limit. A timer that was set before goes on.

    Raises:
        StageTimeout: The call was not done.
    """
    if limit_s is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise StageTimeout(stage, limit_s)

    handler = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left and max(1e-3, left - (time.monotonic() - started)))
        signal.signal(signal.SIGALRM, handler)


async def _stepwise(stage: str, limit_s: float, call: Coroutine[Any, Any, T]) -> T:
    result: T = await _steps(stage, limit_s, call)
    return result


@types.coroutine
def _steps(stage: str, limit_s: float, call: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Run a coroutine, each step from one suspension to the next within the limit."""
    step, value = call.send, None
    while True:
        try:
            with interrupted(stage, limit_s):
                future = step(value)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            step, value = call.send, (yield future)
        except BaseException as error:  # a cancellation among them
            step, value = call.throw, error
