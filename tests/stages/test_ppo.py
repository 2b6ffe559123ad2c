"""What a config says of PPO reaches the loop that learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import agile.stages.ppo
from agile.credit import Estimator
from agile.errors import AgileError
from agile.losses import PPOCoefficients
from agile.stages.rewards import discounts
from agile.train.kl import KLControl
from agile.train.ppo import Discounts
from agile.training import train
from agile.types import SessionStatus
from tests.runs import run_config

# nothing as it is by default
UPDATE: dict[str, Any] = {
    "lr": 1e-3,
    "value_lr": 2e-3,
    "weight_decay": 0.125,
    "batch_size": 7,
    "micro_batch_tokens": 333,
    "share_prefixes": False,
    "num_epochs": 3,
    "max_epoch_kl": 0.09,
    "gamma": 0.9,
    "lam": 0.8,
    "clip": 0.11,
    "value_clip": 0.33,
    "value_coef": 0.44,
    "kl_coef": 0.05,
    "kl_target": 0.01,
    "entropy_coef": 0.02,
    "max_importance_weight": 1.7,
    "value_warmup_epochs": 4,
}
EXPECTED: dict[str, Any] = {
    "coefficients": PPOCoefficients(0.11, 0.33, 0.44, 0.05, 0.02, 1.7),
    "batch_size": 7,
    "micro_batch_tokens": 333,
    "share_prefixes": False,
    "num_epochs": 3,
    "max_epoch_kl": 0.09,
    "value_warmup_epochs": 4,
    "temperature": 0.9,
    "seed": 5,
    "estimator": Estimator.GAE,
}
NO_CRITIC = {"estimator": "reinforce++", "value_coef": 0, "value_warmup_epochs": 0}


class Told(dict[str, Any]):
    """Stands for `train_ppo` and keeps what it is told."""

    def __call__(self, engine: Any, reference: Any, **arguments: Any) -> None:
        groups = [(group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups]
        self.update(arguments, groups=groups, reference=reference)


def test_a_run_tells_the_loop_what_its_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [
        *(f"ppo.{name}={str(value).lower()}" for name, value in UPDATE.items()),
        *("ppo.credit=chain", "ppo.gamma_session=0.7", "ppo.lam_session=0.6", "ppo.lr_schedule=linear", "seed=5"),
        *("rollout.temperature=0.9", "rollout.masked=[truncated]", "sft.num_steps=1"),
    ]
    told = Told()
    monkeypatch.setattr(agile.stages.ppo, "train_ppo", told)
    train(run_config(*settings), tmp_path / "a")
    assert {name: told[name] for name in EXPECTED} == EXPECTED
    assert told["discounts"] == Discounts(0.9, 0.8, 0.7, 0.6)
    assert told["kl_control"] == KLControl(0.05, 0.01)
    assert told["masked"] == (SessionStatus.TRUNCATED,)
    assert (told["first_iteration"], told["num_iterations"]) == (0, 2)
    assert [told["lr_factor"](i) for i in range(2)] == [1, 0.5]
    assert told["groups"] == [(1e-3, 0.125), (2e-3, 0.125)] and told["reference"] is not None
    with pytest.raises(AgileError, match="other weights"):
        told["check"](0, {"rollout_difference": 0.1, "rollout_ratio": 1.0, "rollout_outside": 0.0})

    other = [f"ppo.{name}={value}" for name, value in NO_CRITIC.items()]
    train(run_config(*other, "ppo.kl_coef=0", "ppo.value_clip=null", "sft.num_steps=1"), tmp_path / "b")
    assert told["estimator"] is Estimator.REINFORCE and told["reference"] is None
    assert told["max_epoch_kl"] == told["coefficients"].value_clip == math.inf


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (["none"], Discounts(0.9, 0.8)),
        (["utility"], Discounts(0.9, 0.8)),
        (["chain", "ppo.gamma_session=0.7", "ppo.lam_session=0.6"], Discounts(0.9, 0.8, 0.7, 0.6)),
        # its own discount; between sessions GAE carries nothing
        (["lineage", "ppo.gamma_session=0.7", "ppo.lam_session=0.6", "ppo.gamma=1"], Discounts(1, 0.8, lineage=0.7)),
    ],
    ids=lambda credit: credit[0] if isinstance(credit, list) else "",
)
def test_discounts_of_each_credit_mode(credit: list[str], expected: Discounts) -> None:
    mode, *others = credit
    config = run_config("ppo.gamma=0.9", "ppo.lam=0.8", f"ppo.credit={mode}", *others)
    assert discounts(config.ppo) == expected
