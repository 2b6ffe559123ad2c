"""What an update learns from: scores of before it, the engine's logprobs; and the rules of the warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import agile.train.ppo
from agile.batching import make_batch
from agile.credit import Estimator
from agile.engine import Engine
from agile.losses import PPOCoefficients, entropy, ppo_loss, token_logprobs
from agile.model import ActorCritic
from agile.train.kl import KLControl
from agile.train.ppo import (
    Discounts,
    Scored,
    advantages,
    lay_out,
    lineage_terms,
    mismatch,
    score_rows,
    train_ppo,
    update,
)
from agile.types import BLAMELESS, SessionStatus, Trajectory
from tests.doors import Gradients, actor_critic, largest_difference, llama, random_rows, rollouts, totals, weights
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
    trajectories = rollouts(llama(), temperature=0.6)
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
        temperature=0.9,
        rng=np.random.default_rng(0),
    )

    model = actor_critic()
    rows, plan = lay_out(trajectories, totals(trajectories))
    scored = score_rows(Gradients(model), None, rows, micro_batch_tokens=80, temperature=0.9)
    row_advantages, row_returns, _ = advantages(plan, rows, scored, Discounts())
    move(model)
    data = make_batch(rows, engine.device)
    logits, values, _ = model(data)

    def flat(arrays: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays))

    old, old_values = flat([s.logprobs for s in scored]), flat([s.values for s in scored])
    rollout = flat([r.logprobs for r in rows])
    loss, metrics = ppo_loss(
        logprobs=token_logprobs(logits, data.action_ids, 0.9),
        old_logprobs=old,
        rollout_logprobs=rollout,
        ref_logprobs=None,
        values=values,
        old_values=old_values,
        advantages=flat(row_advantages),
        returns=flat(row_returns),
        entropy=entropy(logits, 0.9),
        action_mask=torch.ones(len(values), dtype=torch.bool),
        num_tokens=len(values),
        coefficients=bounded,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert metrics["clip_fraction"] > 0 and (values - old_values).abs().max() > 0.05
    assert (old - rollout).exp().min() < 0.9 and (old - rollout).exp().max() > 1.2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(engine.steps[1][name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_where_nothing_is_masked_a_failed_reader_counts_too() -> None:
    rewards = [[0.0, 1.0, 1.0, 0.5]]
    figures = update(
        Gradients(actor_critic()),
        None,
        [readers()],
        rewards,
        discounts=Discounts(lineage=0.9),
        coefficients=PPOCoefficients(kl_coef=0.0),
        batch_size=8,
        micro_batch_tokens=80,
        num_epochs=1,
        temperature=1.0,
        rng=np.random.default_rng(0),
        masked=(),
    )
    terms = {
        masked: lineage_terms(
            Gradients(actor_critic()), [readers()], rewards, discount=0.9, micro_batch_tokens=80, masked=masked
        )
        for masked in ((), BLAMELESS)
    }
    assert figures["num_rows"] == 4 and figures["lineage"] == pytest.approx(np.abs(terms[()]).mean())
    assert abs(terms[()][0][0] - terms[BLAMELESS][0][0]) > 0.01


def test_mismatch_by_hand() -> None:
    """The trainer finds four tokens 5 % less, 20 % more, as and half as probable as the engine did."""
    rows = random_rows(2, seed=1)
    rows = [replace(row, logprobs=np.full(n, -1, np.float32)) for row, n in zip(rows, (3, 1), strict=True)]
    ratios = [[0.95, 1.2, 1.0], [0.5]]
    none = np.zeros(0, np.float32)
    scored = [Scored(np.log(r, dtype=np.float32) - 1, none, none, 0.0) for r in ratios]
    found = mismatch(rows, scored)
    assert found["rollout_ratio"] == pytest.approx(3.65 / 4)
    assert found["rollout_outside"] == 0.5 and found["rollout_difference"] == pytest.approx(math.log(2))


def test_an_iteration_is_told_what_training_was(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "discounts": Discounts(0.9, 0.8, 0.7, 0.6, 0.5),
        "batch_size": 7,
        "micro_batch_tokens": 333,
        "share_prefixes": True,
        "num_epochs": 3,
        "temperature": 0.9,
        "estimator": Estimator.REINFORCE,
        "max_epoch_kl": 0.09,
        "masked": (SessionStatus.TRUNCATED,),
    }
    told: list[dict[str, Any]] = []
    order: list[list[int]] = []

    def one(*_: Any, check: Any, rng: np.random.Generator, **arguments: Any) -> dict[str, float]:
        check({"rollout_ratio": 1.0})
        order.append(rng.permutation(20).tolist())
        told.append(arguments)
        return {"epochs": 1.0, "kl": 0.3}

    checked: list[int] = []
    monkeypatch.setattr(agile.train.ppo, "update", one)
    coefficients = PPOCoefficients(0.11, 0.33, 0.44, 0.05, 0.02, 1.7)
    control = KLControl(0.5, target=0.25)
    train_ppo(
        Engine(actor_critic(), lr=1e-3),
        None,
        collect=lambda iteration: [],
        rewards=lambda trajectories, rng: [],
        on_iteration=lambda *_: None,
        first_iteration=1,
        num_iterations=3,
        value_warmup_epochs=4,
        coefficients=coefficients,
        seed=0,
        kl_control=control,
        check=lambda iteration, figures: checked.append(iteration),
        **given,
    )
    for arguments, coef in zip(told, (0.5, 0.6), strict=True):
        assert arguments == {**given, "coefficients": replace(coefficients, kl_coef=coef)}
    assert checked == [1, 2] and order[0] != order[1], "each iteration has an order of its own"


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
