"""Collection ahead of training: which weights play which iteration, and what is done when the run ends early."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from typing import Any

import pytest

from agile.errors import AgileError
from agile.lag import Collector, staleness
from agile.types import Completion, Segment, SegmentEnd, Source, Span, Trajectory
from tests.doors import session


class Engine:
    """A policy that holds one weight, and notes what it was given."""

    temperature = 1.0
    forbidden: Collection[int] = ()

    def __init__(self) -> None:
        self.weight, self.version = [-1.0], -1

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        ((_, self.weight),) = weights
        self.version = version

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        raise NotImplementedError

    def close(self) -> None: ...


def trajectory(iteration: int) -> Trajectory:
    return Trajectory(str(iteration), ())


def run(lag: int, num_iterations: int, *, first: int = 0, slow_play: bool = False) -> list[tuple[int, int, float]]:
    """Train for some iterations; returns (iteration, version, weight) as each was played."""
    engine, trainer, played = Engine(), [0.0], []

    async def play(iteration: int) -> list[Trajectory]:
        await asyncio.sleep(0.002 * slow_play)
        played.append((iteration, engine.version, engine.weight[0]))
        return [trajectory(iteration)]

    done = {i: [trajectory(i)] for i in range(first, min(first + lag, num_iterations))} if first else {}
    collector = Collector(
        engine, play, lambda: [("w", trainer)], copied=list, num_iterations=num_iterations, lag=lag, played=done
    )
    with closing(collector):
        trainer[0] = float(first)
        for iteration in range(first, num_iterations):
            assert collector.collect(iteration) == [trajectory(iteration)]
            time.sleep(0.002 * (not slow_play))
            trainer[0] += 1  # in place, as an optimizer does
    return played


@pytest.mark.parametrize("slow_play", [False, True])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_an_iteration_is_played_with_the_weights_of_lag_updates_before(lag: int, slow_play: bool) -> None:
    """Whoever is faster; and the weights are those of then although the trainer changes them in place."""
    expected = [(i, max(0, i - lag), float(max(0, i - lag))) for i in range(7)]
    assert run(lag, 7, slow_play=slow_play) == expected


def test_a_resumed_run_plays_what_was_not_played() -> None:
    assert run(2, 8, first=3) == [(i, i - 2, float(i - 2)) for i in range(5, 8)]
    assert run(2, 4, first=3) == []


def test_playing_goes_on_while_the_trainer_learns() -> None:
    began = threading.Event()

    async def play(iteration: int) -> list[Trajectory]:
        if iteration == 1:
            began.set()
        return [trajectory(iteration)]

    collector = Collector(Engine(), play, lambda: [("w", [0.0])], copied=list, num_iterations=9, lag=1)
    with closing(collector):
        collector.collect(0)
        assert began.wait(60), "the next iteration is not played before it is asked for"
        assert collector.ahead() == {1: [trajectory(1)]}


@pytest.mark.parametrize("lag", [0, 1])
def test_something_else_is_played_with_the_weights_of_this_moment(lag: int) -> None:
    engine, trainer = Engine(), [0.0]
    seen = []

    async def play(iteration: int) -> list[Trajectory]:
        seen.append((iteration, engine.weight[0]))
        return [trajectory(iteration)]

    collector = Collector(engine, play, lambda: [("w", trainer)], copied=list, num_iterations=9, lag=lag)
    with closing(collector):
        collector.collect(0)
        trainer[0] = 7.0
        assert collector.play_now(lambda: play(100), 1) == [trajectory(100)]
        collector.collect(1)
    assert (100, 7.0) in seen and (1, 0.0 if lag else 7.0) in seen


def test_an_error_of_the_policy_reaches_the_trainer_and_the_rest_is_not_played() -> None:
    played = []

    async def play(iteration: int) -> list[Trajectory]:
        played.append(iteration)
        raise AgileError("the server is gone")

    collector = Collector(Engine(), play, lambda: [("w", [0.0])], copied=list, num_iterations=9, lag=1)
    with pytest.raises(AgileError, match="the server is gone"), closing(collector):
        collector.collect(0)
    assert set(played) <= {0, 1}


def test_closing_stops_what_is_being_played() -> None:
    """Ctrl-C does not wait for a round that nobody will learn from."""
    began, stopped = threading.Event(), threading.Event()

    async def play(iteration: int) -> list[Trajectory]:
        if iteration == 1:
            began.set()
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()
        return [trajectory(iteration)]

    collector = Collector(Engine(), play, lambda: [("w", [0.0])], copied=list, num_iterations=9, lag=1)
    collector.collect(0)
    assert began.wait(60)
    started = time.monotonic()
    collector.close()
    assert stopped.is_set() and time.monotonic() - started < 30


def test_staleness_is_the_mean_over_sampled_tokens() -> None:
    spans = (Span(Source.TASK, (1, 2)), Span(Source.LLM, (3,), (0.0,), 4), Span(Source.LLM, (3, 4, 5), (0.0,) * 3, 2))
    played = session(Segment(spans, SegmentEnd.TERMINATED))
    assert staleness([Trajectory("s", (played,))], 4) == pytest.approx((1 * 0 + 3 * 2) / 4)
    assert staleness([], 4) == 0
