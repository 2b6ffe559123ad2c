"""Blocking functions, off the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start(function: Callable[[], T]) -> Future[T]:
    """Run `function` in a thread of its own; the future holds what it returns or raises.

    A daemon thread, not an executor's: the process must be able to end while a function waits for a person or a server
    that left.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on a caller that gives up cannot cancel what still runs

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            # asyncio can carry no StopIteration, and an exit of this thread is not one of the program.
            carried = isinstance(error, Exception) and not isinstance(error, StopIteration)
            future.set_exception(error if carried else RuntimeError(repr(error)))

    threading.Thread(target=run, daemon=True, name="agile").start()
    return future
