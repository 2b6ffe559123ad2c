"""Processes that start at once: each is a copy of one that has imported everything. Several meet as a launcher's do."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from types import TracebackType
from typing import Any, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

FORKS = multiprocessing.get_context("forkserver")
LIMIT_S = 600.0


def _run(environment: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    function(*args)


class Processes:
    """`num` processes of one run, each of which calls `function(*args)`; they end with the block."""

    def __init__(self, function: Callable[..., None], *args: Any, num: int = 1):
        FORKS.set_forkserver_preload(["agile.training", "deepspeed", "tests.runs", "tests.train_doors"])
        # theirs is that of a launcher: no port can be taken between being found and being used
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if num > 1 else None
        self.all: list[ForkServerProcess] = []
        for rank in range(num):
            environment = {}
            if self.store is not None:
                environment = {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)},
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                }
            self.all.append(FORKS.Process(target=_run, args=(environment, function, args)))
            self.all[-1].start()

    @property
    def running(self) -> bool:
        """Whether none has ended."""
        return all(process.is_alive() for process in self.all)

    def wait(self, limit_s: float = LIMIT_S) -> bool:
        """Wait until one has failed or all have ended; returns whether they have, rather than the time."""
        until = time.monotonic() + limit_s
        while any(process.exitcode is None for process in self.all) and not any(p.exitcode for p in self.all):
            if time.monotonic() > until:
                return False
            multiprocessing.connection.wait(
                [p.sentinel for p in self.all if p.exitcode is None], max(0.0, until - time.monotonic())
            )
        return True

    def finish(self) -> None:
        """Wait until all have done what they should."""
        assert self.wait(), f"not done after {LIMIT_S} s"
        assert [process.exitcode for process in self.all] == [0] * len(self.all)

    def kill(self) -> None:
        """All at once: they are stopped first, so that none sees another go."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in self.all:
                if process.pid is not None and process.exitcode is None:
                    with suppress(ProcessLookupError):  # it ended just now
                        os.kill(process.pid, number)
        for process in self.all:
            process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
