"""What keeps an update small: the weight of the KL, the end of epochs, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from agile.config import load_config
from agile.engine import Engine
from agile.losses import PPOCoefficients
from agile.model import ActorCritic
from agile.reference import Reference
from agile.stages.ppo import lr_factor
from agile.train.kl import KLControl
from agile.train.ppo import Discounts, train_ppo, update
from agile.types import Trajectory
from tests.doors import actor_critic, largest_difference, llama, rollouts, totals, weights


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.04, 0.1),  # at the target
        (0.044, 0.11),  # a tenth above: a tenth more
        (0.036, 0.09),
        (9.0, 0.12),  # at most a fifth
        (0.0, 0.08),
        (math.inf, 0.12),
    ],
)
def test_the_coefficient_follows_the_error(kl: float, expected: float) -> None:
    control = KLControl(0.1, target=0.04)
    control.observe(kl)
    assert control.coef == pytest.approx(expected)


def test_without_a_target_it_stays() -> None:
    control = KLControl(0.1)
    control.observe(9.0)
    assert control.coef == 0.1


def test_the_controller_reaches_its_target() -> None:
    """Of a KL that falls with the coefficient as 0.01 / coef: coef 0.01 has one of 1, and 0.05 the wanted 0.2."""
    control = KLControl(0.01, target=0.2)
    for _ in range(50):
        control.observe(0.01 / control.coef)
    assert control.coef == pytest.approx(0.05, rel=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# In the loop


def train(
    engine: Engine, trajectories: Sequence[Trajectory], num_iterations: int, **changes: Any
) -> list[dict[str, float]]:
    """PPO on the same rollouts over and over; returns the metrics of each iteration."""
    found: list[dict[str, float]] = []
    arguments: dict[str, Any] = {
        "first_iteration": 0,
        "value_warmup_epochs": 0,
        "discounts": Discounts(),
        "coefficients": PPOCoefficients(kl_coef=0.1),
        "batch_size": 32,
        "micro_batch_tokens": 4096,
        "num_epochs": 3,
        "temperature": 1.0,
        "seed": 0,
        **changes,
    }
    train_ppo(
        engine,
        Reference(ActorCritic(llama())),
        collect=lambda iteration: trajectories,
        rewards=lambda trajectories, rng: totals(trajectories),
        on_iteration=lambda iteration, trajectories, metrics: found.append(metrics),
        num_iterations=num_iterations,
        **arguments,
    )
    return found


@pytest.fixture(scope="module")
def played() -> list[Trajectory]:
    return rollouts(llama())


def test_each_iteration_uses_the_coefficient_and_tells_the_controller(played: list[Trajectory]) -> None:
    control = KLControl(0.1, target=1e-3)
    found = train(Engine(ActorCritic(llama()), lr=3e-3), played, 4, kl_control=control, value_warmup_epochs=1)
    assert found[0]["kl_coef"] == found[1]["kl_coef"] == 0.1, "the warm-up tells it nothing"
    expected = KLControl(0.1, target=1e-3)
    for metrics in found[1:]:
        assert metrics["kl_coef"] == pytest.approx(expected.coef)
        expected.observe(metrics["kl"])
    assert control == expected and control.coef != 0.1


def test_a_heavier_kl_keeps_the_policy_nearer(played: list[Trajectory]) -> None:
    """Of two runs that differ in the coefficient that the controller gives, whatever the coefficients say."""
    last = [train(Engine(ActorCritic(llama()), lr=3e-3), played, 4, kl_control=KLControl(c))[-1] for c in (0.0, 10.0)]
    assert last[1]["kl"] < 0.5 * last[0]["kl"]


def test_epochs_end_once_the_policy_has_moved_too_far(played: list[Trajectory]) -> None:
    """The first minibatch has a KL of 0 and is always learned from; the next is the last."""

    def learn(lr: float, limit: float) -> tuple[dict[str, float], dict[str, Any]]:
        model = actor_critic()
        metrics = update(
            Engine(model, lr=lr),
            None,
            played,
            totals(played),
            discounts=Discounts(),
            coefficients=PPOCoefficients(kl_coef=0.0),
            batch_size=16,
            micro_batch_tokens=4096,
            num_epochs=3,
            temperature=1.0,
            rng=np.random.default_rng(0),
            max_epoch_kl=limit,
        )
        return metrics, weights(model)

    whole, _ = learn(1e-2, math.inf)
    stopped, after = learn(1e-2, 1e-4)
    assert whole["epochs"] == 3 and whole["num_action_tokens"] == stopped["num_action_tokens"]
    rows = stopped["num_rows"]
    assert 16 / rows < stopped["epochs"] < 1, "two minibatches of sixteen rows or so"
    assert stopped["approx_kl"] > 0 and stopped["first_ratio"] == pytest.approx(1, abs=1e-6)
    assert largest_difference(after, learn(1e-2, 1e-4)[1]) == 0, "the same data stop at the same place"
    assert learn(1e-9, 1e-4)[0]["epochs"] == 3, "nothing moves, nothing stops"
    assert learn(1e-2, 10 * whole["approx_kl"])[0]["epochs"] == 3, "the limit is of the mean, not of the sum"


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25])])
def test_schedule_of_the_learning_rate(schedule: str, expected: list[float]) -> None:
    ppo = load_config(None, [f"ppo.lr_schedule={schedule}", "ppo.num_iterations=4"]).ppo
    assert [lr_factor(ppo, i) for i in range(4)] == expected


def test_the_learning_rate_of_each_group_follows_and_is_resumed(played: list[Trajectory], tmp_path: Any) -> None:
    def engine() -> tuple[ActorCritic, Engine]:
        model = actor_critic()
        return model, Engine(model, lr=2e-3, groups=model.parameter_groups(1e-2))

    def factor(iteration: int) -> float:
        return 1 - iteration / 3

    whole, one = engine()
    found = train(one, played, 3, lr_factor=factor)
    assert [m["lr"] for m in found] == pytest.approx([2e-3, 4e-3 / 3, 2e-3 / 3])
    assert [g["lr"] for g in one.optimizer.param_groups] == pytest.approx([2e-3 / 3, 1e-2 / 3])
    _, two = engine()
    train(two, played, 2, lr_factor=factor)
    two.save(tmp_path, "two")
    resumed, three = engine()
    three.load(tmp_path, "two")
    train(three, played, 3, lr_factor=factor, first_iteration=2)
    assert largest_difference(weights(whole), weights(resumed)) == 0
