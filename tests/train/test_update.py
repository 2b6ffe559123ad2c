"""What an update learns from: scores of before it, the engine's logprobs; and the rules of the warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agile.batching import make_batch
from agile.engine import Engine
from agile.losses import PPOCoefficients, entropy, ppo_loss, token_logprobs
from agile.model import ActorCritic
from agile.train.ppo import Discounts, advantages, lay_out, score_rows, train_ppo, update
from agile.types import Trajectory
from tests.doors import Gradients, actor_critic, largest_difference, llama, rollouts, totals, weights
from tests.train.test_ppo import readers


class Moved(Gradients):
    """Every step moves all weights a little, whatever the gradients are."""

    def step(self) -> float:
        norm = super().step()
        move(self.plain)
        return norm


def move(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_later_epochs_learn_from_what_was_scored_before_the_first() -> None:
    """Of a rollout engine whose numerics differ: here it sampled at another temperature."""
    bounded = PPOCoefficients(kl_coef=0.0, entropy_coef=0.01, value_clip=0.05, max_importance_weight=1.2)
    trajectories = rollouts(llama(), temperature=0.7)
    engine = Moved(actor_critic())
    update(
        engine,
        None,
        trajectories,
        totals(trajectories),
        discounts=Discounts(),
        coefficients=bounded,
        batch_size=1000,
        micro_batch_tokens=80,
        num_epochs=2,
        temperature=1.0,
        rng=np.random.default_rng(0),
    )

    model = actor_critic()
    rows, plan = lay_out(trajectories, totals(trajectories))
    scored = score_rows(Gradients(model), None, rows, micro_batch_tokens=80)
    row_advantages, row_returns, _ = advantages(plan, rows, scored, Discounts())
    move(model)
    data = make_batch(rows, engine.device)
    logits, values, _ = model(data)

    def flat(arrays: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays))

    old, old_values = flat([s.logprobs for s in scored]), flat([s.values for s in scored])
    rollout = flat([r.logprobs for r in rows])
    loss, metrics = ppo_loss(
        logprobs=token_logprobs(logits, data.action_ids),
        old_logprobs=old,
        rollout_logprobs=rollout,
        ref_logprobs=None,
        values=values,
        old_values=old_values,
        advantages=flat(row_advantages),
        returns=flat(row_returns),
        entropy=entropy(logits),
        action_mask=torch.ones(len(values), dtype=torch.bool),
        num_tokens=len(values),
        coefficients=bounded,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert metrics["clip_fraction"] > 0 and (values - old_values).abs().max() > 0.05
    assert (old - rollout).exp().min() < 0.9 and (old - rollout).exp().max() > 1.2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(engine.steps[1][name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_warm_up_has_its_own_epochs_and_neither_lineage_nor_a_bound_on_values() -> None:
    def learned(value_clip: float) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
        model: ActorCritic = actor_critic()
        figures: list[dict[str, float]] = []
        snapshots: list[dict[str, Tensor]] = []

        def after(number: int, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> None:
            figures.append(metrics)
            snapshots.append(weights(model))

        train_ppo(
            Engine(model, lr=1e-7, groups=model.parameter_groups(1e-3)),
            None,
            collect=lambda iteration: [readers()],
            rewards=lambda trajectories, rng: [[5.0, 6.0, 6.0, 5.5]],  # far above: values rise all the time
            on_iteration=after,
            first_iteration=0,
            num_iterations=2,
            value_warmup_epochs=3,
            discounts=Discounts(lineage=0.9),
            coefficients=PPOCoefficients(kl_coef=0.0, value_clip=value_clip),
            batch_size=64,
            micro_batch_tokens=80,
            num_epochs=2,
            temperature=1.0,
            seed=0,
        )
        return figures, snapshots

    figures, (warm, end) = learned(math.inf)
    assert [f["epochs"] for f in figures] == [3, 2] and ["lineage" in f for f in figures] == [False, True]
    _, (bounded_warm, bounded_end) = learned(1e-4)
    assert largest_difference(warm, bounded_warm) == 0
    assert largest_difference(end, bounded_end) > 1e-4
