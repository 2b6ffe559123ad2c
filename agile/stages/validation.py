"""How good the policy is in streams that it does not learn from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle

from agile import ranks
from agile.build import Setup
from agile.evaluate import outcomes, rates
from agile.executor import Executor
from agile.lag import Collector
from agile.protocols import TrainablePolicy
from agile.rollout import collect, lengths, warn_of_failures
from agile.seeding import derive_seed
from agile.types import Trajectory


@contextmanager
def greedy(policy: TrainablePolicy) -> Iterator[None]:
    """Within it the policy takes the most probable token."""
    temperature, policy.temperature = policy.temperature, 0.0
    try:
        yield
    finally:
        policy.temperature = temperature


def is_validated(every: int, iteration: int, num_iterations: int) -> bool:
    """Whether validation follows an iteration (from 1): every so many, and the last."""
    return every > 0 and (iteration % every == 0 or iteration == num_iterations)


def validate(
    setup: Setup, executor: Executor, policy: TrainablePolicy, collector: Collector, iteration: int
) -> dict[str, float]:
    """Play the validation streams greedily with the weights after this iteration; the same streams alike each time.

    Where training draws prices, the streams take them in turn.
    """
    rollout, task = setup.config.rollout, setup.config.task
    prices = cycle(task.training_prices or (task.advice_price,))
    streams = [replace(stream, price=price) for stream, price in zip(setup.validation_streams, prices, strict=False)]

    async def play() -> list[Trajectory]:
        with greedy(policy):
            return await collect(
                executor,
                policy,
                [streams[i] for i in ranks.own_share(lengths(streams))],
                setup.memory,
                seed=derive_seed(setup.config.seed, "validation"),
                max_failed=rollout.max_failed,
                max_concurrent=rollout.concurrency,
            )

    played = ranks.gather_shares(collector.play_now(play, iteration), lengths(streams))
    warn_of_failures(f"Validation after iteration {iteration}", played)
    found = rates(outcomes(played), [s.price for t in played for s in t.sessions])
    return {f"validation/{name}": float(found[name]) for name in ("score", "accuracy", "advice_rate")}
