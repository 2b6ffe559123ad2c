"""Collecting ahead of training, so that neither waits for the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from agile.protocols import TrainablePolicy
from agile.rollout import run_loop
from agile.types import Trajectory

Played = Awaitable[Sequence[Trajectory]]
Play = Callable[[int], Played]
Weights = Iterable[tuple[str, Any]]


class Collector:
    """Gives the trajectories of one iteration after the other, played up to `lag` iterations before they are needed.

    Those of iteration `i` are played with the weights of `max(0, i - lag)` updates: exactly those, whoever is faster,
    so that a run is the same run whatever the machine does. A lag of 0 plays when asked, in the thread that asks.

    Args:
        policy: What plays; it gets new weights before each iteration.
        play: Plays an iteration.
        weights: The trainer's weights now.
        copied: What is kept of a weight until its iteration is played; the trainer changes the original meanwhile.
        num_iterations: How many there are.
        lag: Updates that the policy may be behind.
        played: Iterations that were played before, by a run that is resumed.
    """

    def __init__(
        self,
        policy: TrainablePolicy,
        play: Play,
        weights: Callable[[], Weights],
        *,
        copied: Callable[[Any], Any],
        num_iterations: int,
        lag: int,
        played: Mapping[int, Sequence[Trajectory]] | None = None,
    ):
        self.policy = policy
        self.play = play
        self.weights = weights
        self.copied = copied
        self.num_iterations = num_iterations
        self.lag = lag
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="collector")
        self._ahead: dict[int, Future[Sequence[Trajectory]]] = {}
        self._playing_now: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._closed = False
        for iteration, trajectories in (played or {}).items():
            self._ahead[iteration] = Future()
            self._ahead[iteration].set_result(trajectories)

    def collect(self, iteration: int) -> Sequence[Trajectory]:
        """The trajectories of an iteration; iterations are asked for in order, after as many updates.

        Raises:
            AgileError: Whatever playing it raised.
        """
        if self.lag == 0:
            return self._play(self.weights(), iteration, partial(self.play, iteration))
        wanted = range(iteration, min(iteration + self.lag + 1, self.num_iterations))
        missing = [i for i in wanted if i not in self._ahead]
        if missing:
            weights = self._copies()
            for i in missing:
                self._ahead[i] = self._threads.submit(self._play, weights, iteration, partial(self.play, i))
        return self._ahead.pop(iteration).result()

    def play_now(self, play: Callable[[], Played], version: int) -> Sequence[Trajectory]:
        """Play something with the weights of this moment, after whatever is being collected ahead."""
        if self.lag == 0:
            return self._play(self.weights(), version, play)
        return self._threads.submit(self._play, self._copies(), version, play).result()

    def _copies(self) -> Weights:
        return [(name, self.copied(weight)) for name, weight in self.weights()]

    def _play(self, weights: Weights, version: int, play: Callable[[], Played]) -> Sequence[Trajectory]:
        self.policy.update_weights(weights, version)
        return run_loop(self._playing(play))

    async def _playing(self, play: Callable[[], Played]) -> Sequence[Trajectory]:
        task = asyncio.current_task()
        assert task is not None
        self._playing_now = asyncio.get_running_loop(), task
        try:
            if self._closed:
                raise asyncio.CancelledError
            return await play()
        finally:
            self._playing_now = None

    def ahead(self) -> dict[int, Sequence[Trajectory]]:
        """Wait for the iterations under way, and return them: part of a checkpoint, for their weights are gone."""
        return {iteration: future.result() for iteration, future in self._ahead.items()}

    def close(self) -> None:
        """Stop what is being played, and forget what is not played yet."""
        self._closed = True
        if self._playing_now is not None:
            loop, task = self._playing_now
            with suppress(RuntimeError):  # it ended just now
                loop.call_soon_threadsafe(task.cancel)
        self._threads.shutdown(cancel_futures=True)


def staleness(trajectories: Iterable[Trajectory], version: int) -> float:
    """Mean number of updates by which the policy that sampled a token was behind `version`."""
    spans = [
        (version - span.policy_version, len(span.token_ids))
        for trajectory in trajectories
        for session in trajectory.sessions
        for segment in session.segments
        for span in segment.spans
        if span.policy_version is not None
    ]
    total = sum(n for _, n in spans)
    return sum(behind * n for behind, n in spans) / total if total else 0.0
