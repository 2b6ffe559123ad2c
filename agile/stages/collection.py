"""What PPO plays: the streams of an iteration at their prices, this process's share of them, and the sessions' log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from agile import ranks
from agile.build import Setup
from agile.copies import copies
from agile.errors import AgileError
from agile.executor import Executor
from agile.lag import Collector, Weights
from agile.prices import priced
from agile.protocols import TrainablePolicy
from agile.rollout import collect, lengths
from agile.run_folder import RunFolder
from agile.seeding import derive_seed
from agile.types import Session, Stream, Trajectory


def chosen_streams(setup: Setup, iteration: int) -> list[Stream]:
    """The streams of an iteration, of all processes; they derive from the run's seed and its number, from 0."""
    config, streams = setup.config, setup.train_streams
    ppo, task = config.ppo, config.task
    rng = np.random.default_rng(derive_seed(config.seed, "streams", iteration))
    count = min(ppo.streams_per_iteration, len(streams))
    chosen = [streams[i] for i in sorted(rng.choice(len(streams), count, replace=False))]
    compared = ppo.estimator == "group"  # rollouts of a stream with each other: at one price
    at_prices = priced(
        chosen if compared else copies(chosen, ppo.rollouts_per_stream),
        task.advice_price,
        first_price=task.first_price,
        drawn_from=task.training_prices,
        progress=iteration / max(1, ppo.num_iterations - 1),
        rng=rng,
    )
    return copies(at_prices, ppo.rollouts_per_stream) if compared else at_prices


class Collection:
    """Gives the trajectories of one iteration after the other, of all processes, and logs the sessions of this one.

    Args:
        weights: The trainer's now, for the policy.
        resumed: Whether the run goes on from a checkpoint of PPO, which holds what was collected ahead.
    """

    def __init__(
        self,
        run: RunFolder,
        setup: Setup,
        executor: Executor,
        policy: TrainablePolicy,
        weights: Callable[[], Weights],
        *,
        resumed: bool,
    ):
        self._run, self._setup = run, setup
        self._executor, self._policy = executor, policy
        self._ended: list[Session] = []
        self.collector = Collector(
            policy,
            self._play,
            weights,
            copied=_copied,
            num_iterations=setup.config.ppo.num_iterations,
            lag=setup.config.rollout.lag,
            played=run.ahead() if resumed else {},
        )

    def collect(self, iteration: int) -> Sequence[Trajectory]:
        """The trajectories of an iteration, from 0.

        Raises:
            AgileError: Too many sessions failed; those that ended are logged.
        """
        log = partial(self._run.log_sessions, stage="ppo", step=iteration + 1)
        self._ended.clear()
        try:
            own = self.collector.collect(iteration)
        except AgileError:
            log(self._ended)
            raise
        log([s for t in own for s in t.sessions])
        return ranks.gather_shares(own, lengths(chosen_streams(self._setup, iteration)))

    async def _play(self, iteration: int) -> list[Trajectory]:
        config, streams = self._setup.config, chosen_streams(self._setup, iteration)
        return await collect(
            self._executor,
            self._policy,
            [streams[i] for i in ranks.own_share(lengths(streams))],
            self._setup.memory,
            seed=derive_seed(config.seed, "ppo", iteration),
            max_failed=config.rollout.max_failed,
            max_concurrent=config.rollout.concurrency,
            on_session=self._ended.append,
        )

    def close(self) -> None:
        self.collector.close()


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().cpu().clone()
