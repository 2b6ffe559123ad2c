"""A whole run that vLLM samples: its logprobs stay the trainer's, and nothing is learned where they do not."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agile.errors import AgileError
from agile.policies.serving import ServedModel, mean_difference
from agile.policies.vllm import VLLMPolicy
from agile.replay import replay_run
from agile.training import train
from tests.runs import metrics, run_config, saved_model

VLLM = [
    *("rollout.policy=vllm", "vllm.kv_cache_gib=0.25", "vllm.enforce_eager=true"),
    *("model.hidden_size=64", "model.num_heads=2", "ppo.num_iterations=6", "sft.num_steps=10"),
]


@pytest.mark.vllm
def test_rollout_and_trainer_agree_before_and_after_five_updates(tmp_path: Path) -> None:
    train(run_config(*VLLM), tmp_path / "run")
    steps = [row for row in metrics(tmp_path / "run") if row["stage"] == "ppo"]
    assert len(steps) == 6
    assert max(row["rollout_difference"] for row in steps) < 1e-4
    assert all(row["staleness"] == 0 for row in steps)
    result = replay_run(tmp_path / "run", Console(quiet=True))
    assert result.different is None


@pytest.mark.vllm
def test_an_update_that_does_not_arrive_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: VLLMPolicy, weights: Any, version: int) -> None:
        self.version = version

    monkeypatch.setattr(VLLMPolicy, "update_weights", forget)
    with pytest.raises(AgileError, match=r"Iteration [3-6]: .*rollout.policy=vllm and of the trainer differ by"):
        train(run_config(*VLLM, "ppo.lr=3e-3"), tmp_path / "run")
    assert max(row["rollout_difference"] for row in metrics(tmp_path / "run") if row["stage"] == "ppo") < 0.01


@pytest.mark.vllm
def test_adapters_reach_vllm_merged_and_what_is_exported_loads(tmp_path: Path) -> None:
    run = tmp_path / "run"
    learns = ("ppo.lr=1e-2", "ppo.entropy_coef=0.1")  # whatever the rewards are
    model = f"model.path={saved_model(tmp_path / 'model', *VLLM)}"
    train(run_config(*VLLM, model, "lora.rank=4", "ppo.num_iterations=3", *learns), run)
    steps = [row for row in metrics(run) if row["stage"] == "ppo"]
    assert max(row["rollout_difference"] for row in steps) < 1e-4
    policy = VLLMPolicy(run / "ppo", dtype="float32", kv_cache_gib=0.25, enforce_eager=True)
    with closing(policy):
        found = policy._probe()
    learned, start = (ServedModel.read(run / n, max_model_len=None, num_tokens=None) for n in ("ppo", "sft"))
    assert mean_difference(found, learned.folder_logprobs()) < 1e-4
    assert mean_difference(found, start.folder_logprobs()) > 1e-3, "the test needs an adapter that learned something"


@pytest.mark.vllm
def test_adapters_are_swapped_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no rows of action tokens learn beside them."""
    swapped: list[int] = []
    swap = VLLMPolicy._swap

    def counted(self: VLLMPolicy, config: Any, weights: Any, version: int) -> None:
        swapped.append(version)
        swap(self, config, weights, version)

    monkeypatch.setattr(VLLMPolicy, "_swap", counted)
    plain = (*VLLM, "prompt.special_tokens=false", "model.tokenizer=bpe")
    model = f"model.path={saved_model(tmp_path / 'model', *plain)}"
    learns = ("ppo.lr=1e-2", "ppo.entropy_coef=0.1", "ppo.num_iterations=3")
    train(run_config(*plain, model, "lora.rank=4", *learns), tmp_path / "run")
    steps = [row for row in metrics(tmp_path / "run") if row["stage"] == "ppo"]
    assert swapped == [0, 1, 2] and max(row["rollout_difference"] for row in steps) < 1e-4
    assert steps[-1]["kl"] > 0, "the test needs an adapter that learned something"
