"""Limits on how long a collaborator may take, whether it waits, blocks or ignores its cancellation."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import types
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


class StageTimeout(BaseException):
    """A stage of a session (`policy`, `tool`, `advisor`, `memory`) was not done after its time.

    No `Exception`: it is raised inside a call that blocks, whose own handlers of errors would take it for one.
    """

    def __init__(self, stage: str, limit_s: float):
        super().__init__(f"{stage}: not done after {limit_s:g} s")
        self.stage = stage


class _Busy:
    """Seconds that guarded calls kept the event loop from everybody else."""

    total_s = 0.0


async def within(stage: str, limit_s: float | None, call: Coroutine[Any, Any, T]) -> T:
    """Await a call for at most `limit_s` seconds (None: for as long as it takes).

    Time in which other guarded calls block the loop does not count: who waits is not to blame for it.

    Raises:
        StageTimeout: It was not done. It is cancelled and left behind, unlike with `asyncio.wait_for`, which waits for
            a call that ignores its cancellation.
        RuntimeError: It cancelled itself.
    """
    if limit_s is None:
        return await call
    left_behind = asyncio.Event()
    task = asyncio.ensure_future(_stepwise(stage, limit_s, call, left_behind))
    task.add_done_callback(lambda task: _bury(task, stage, limit_s, call))
    try:
        left = limit_s
        while left > 0 and not task.done():
            busy = _Busy.total_s
            await asyncio.wait({task}, timeout=left)
            left = _Busy.total_s - busy
    finally:
        left_behind.set()
        task.cancel()
    if not task.done():
        raise StageTimeout(stage, limit_s)
    if task.cancelled():
        raise RuntimeError(f"the {stage} was cancelled")
    return task.result()


@contextmanager
def interrupted(stage: str, limit_s: float | None) -> Iterator[None]:
    """End a call that blocks the event loop after `limit_s` seconds, by a signal: nothing in the loop could.

    Signals reach the main thread alone, and there Python code alone, not a library in the middle of a computation;
    elsewhere there is no limit. A timer that was set before goes on.

    Raises:
        StageTimeout: The call was not done.
    """
    if limit_s is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def interrupt(number: int, frame: object) -> None:
        if armed:
            raise StageTimeout(stage, limit_s)

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    outer_s, interval_s = signal.setitimer(signal.ITIMER_REAL, limit_s, limit_s)  # again, for a call that caught it
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        elapsed = time.monotonic() - started
        _Busy.total_s += elapsed
        if outer_s:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, outer_s - elapsed), interval_s)


async def _stepwise(stage: str, limit_s: float, call: Coroutine[Any, Any, T], left_behind: asyncio.Event) -> T:
    result: T = await _steps(stage, limit_s, call, left_behind)
    return result


@types.coroutine
def _steps(
    stage: str, limit_s: float, call: Coroutine[Any, Any, T], left_behind: asyncio.Event
) -> Generator[Any, Any, T]:
    """Run a coroutine, each step from one suspension to the next within the limit.

    Once it is left behind, the second cancellation ends it whatever it does: the loop, when it closes, would wait for
    it for ever. Before, cancellations are its own business: libraries cancel their own tasks to end their scopes.
    """
    step, value = call.send, None
    cancelled = False
    while True:
        try:
            with interrupted(stage, limit_s):
                future = step(value)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            step, value = call.send, (yield future)
        except BaseException as error:
            if cancelled and isinstance(error, asyncio.CancelledError):
                raise
            cancelled = isinstance(error, asyncio.CancelledError) and left_behind.is_set()
            step, value = call.throw, error


def _bury(task: asyncio.Task[T], stage: str, limit_s: float, call: Coroutine[Any, Any, T]) -> None:
    """Nobody may be left to hear of a call's error, or to close one that never started or would not end."""
    if not task.cancelled():
        task.exception()
        return
    with suppress(Exception, StageTimeout), interrupted(stage, limit_s):
        call.close()
