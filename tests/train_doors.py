"""PPO in the world of two doors, in as many processes as there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agile import ranks
from agile.engine import Engine
from agile.lag import Collector
from agile.losses import PPOCoefficients
from agile.model import ActorCritic
from agile.policies import HFPolicy
from agile.reference import Reference
from agile.rollout import collect, lengths
from agile.train.ppo import Discounts, train_ppo
from agile.types import Trajectory
from tests.doors import actor_critic, llama, make_executor, streams, totals
from tests.worlds import ListMemory

NUM_ITERATIONS = 5  # the first trains the critic alone


class Noting(Engine):
    """An engine that keeps the gradient norm of each step, and counts those that moved the policy."""

    norms: list[float]
    num_policy_steps = 0

    def step(self) -> float:
        self.num_policy_steps += any(p.grad is not None for p in self.module.lm.parameters())
        self.norms.append(super().step())
        return self.norms[-1]


def train_doors(out: Path, zero_stage: int) -> None:
    """Write what was sampled, earned, measured and learned to the file `out`."""
    ranks.join()
    model = actor_critic()
    groups = model.parameter_groups(3e-3)
    engine = Noting(model, lr=1e-3, groups=groups, weight_decay=0.1, zero_stage=zero_stage)
    engine.norms = []
    played, executor, policy = streams(7, 4), make_executor(), HFPolicy(llama())
    sampled: list[Any] = []
    figures: list[dict[str, float]] = []

    async def play(iteration: int) -> list[Trajectory]:
        own = [played[i] for i in ranks.own_share(lengths(played))]
        return await collect(executor, policy, own, lambda stream: ListMemory(), seed=iteration, max_failed=1.0)

    collector = Collector(policy, play, engine.weights, copied=torch.clone, num_iterations=NUM_ITERATIONS, lag=0)

    def collected(iteration: int) -> Sequence[Trajectory]:
        trajectories = ranks.gather_shares(collector.collect(iteration), lengths(played))
        tokens = [segment.token_ids for t in trajectories for s in t.sessions for segment in s.segments]
        sampled.append((tokens, totals(trajectories)))
        return trajectories

    train_ppo(
        engine,
        Reference(ActorCritic(llama(1))),
        collect=collected,
        rewards=lambda trajectories, rng: totals(trajectories),
        on_iteration=lambda iteration, trajectories, metrics: figures.append(metrics),
        first_iteration=0,
        num_iterations=NUM_ITERATIONS,
        value_warmup_epochs=1,
        discounts=Discounts(gamma_session=0.5, lam_session=0.5),
        coefficients=PPOCoefficients(kl_coef=0.1, entropy_coef=0.01),
        batch_size=12,
        micro_batch_tokens=80,
        num_epochs=2,
        temperature=1.0,
        seed=0,
    )
    learned = {
        prefix + name: weight.detach().clone()
        for prefix in ("lm.", "value_head.")
        for name, weight in engine.weights(prefix)
    }
    if ranks.is_main():
        found = {"sampled": sampled, "figures": figures, "norms": engine.norms, "weights": learned}
        torch.save({**found, "num_policy_steps": engine.num_policy_steps}, out)
