"""Whole runs of what may be trained: adapters, a critic with a trunk of its own, a reference policy or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from agile.training import train
from tests.runs import assert_same_run, metrics, run_config, saved_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def logits(lm: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(lm(input_ids=torch.arange(3, 20)[None]).logits)


def test_an_adapter_learns_on_top_of_imitation(tmp_path: Path) -> None:
    from peft import PeftModel

    run = tmp_path / "run"
    lora = ("lora.rank=4", f"model.path={saved_model(tmp_path / 'model')}")
    train(run_config(*lora, "ppo.lr=1e-2", "sft.num_steps=10", "sft.checkpoint_every=10"), run)
    steps = [row for row in metrics(run) if row["stage"] == "ppo"]
    assert all(row["first_ratio"] == pytest.approx(1, abs=1e-6) for row in steps)
    assert steps[0]["kl"] == 0, "the reference is the policy that imitation left"
    plain, start = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("ppo", "sft"))
    assert (logits(plain) - logits(start)).abs().max() > 1e-3
    adapted = PeftModel.from_pretrained(start, run / "ppo" / "adapter")
    torch.testing.assert_close(logits(adapted), logits(plain), atol=1e-5, rtol=1e-5)


def test_where_the_reference_lies_changes_nothing(tmp_path: Path) -> None:
    for name in ("keep", "offload"):
        train(run_config(f"ppo.reference={name}", "model.critic=separate", "sft.num_steps=10"), tmp_path / name)
    assert_same_run(tmp_path / "offload", tmp_path / "keep")


def test_without_a_coefficient_there_is_no_reference_and_no_kl(tmp_path: Path) -> None:
    train(run_config("ppo.kl_coef=0", "sft.num_steps=10"), tmp_path / "run")
    assert not any("kl" in row for row in metrics(tmp_path / "run"))
