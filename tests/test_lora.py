"""LoRA: nothing changes before the first step, everything that must learn does, and plain weights say the same."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from agile import ranks
from agile.batching import make_batch
from agile.engine import Engine
from agile.errors import AgileError
from agile.export import Trained
from agile.lora import adapter_config, adapter_off, adapter_weights, add_adapter, plain_parameters, save_adapter
from agile.losses import sft_loss, token_logprobs
from agile.model import ActorCritic
from agile.reference import adapter_free
from tests.doors import llama, random_rows, weights
from tests.test_model import SIZES

CPU = torch.device("cpu")
NEW = [3, 5]  # rows of tokens that the model was never trained on
IDS = torch.arange(10)[None]


def families() -> dict[str, Callable[[], PreTrainedModel]]:
    return {
        "untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "conv1d": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
        ),
    }


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = families()[family]()
    lm.eval()
    return lm


@torch.no_grad()
def logits(lm: nn.Module) -> Tensor:
    return torch.as_tensor(lm(input_ids=IDS).logits)


def adapted(family: str, *, trained: bool = False) -> PreTrainedModel:
    """With an adapter, whose parameters are random if it is `trained`."""
    lm = make(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of Conv1D, whose weights lie the other way round
        add_adapter(lm, rank=4, alpha=8, token_ids=NEW)
    if trained:
        for parameter in lm.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    return lm


@pytest.mark.parametrize("family", families())
def test_a_new_adapter_changes_nothing(family: str) -> None:
    assert torch.equal(logits(adapted(family)), logits(make(family)))


@pytest.mark.parametrize("family", families())
def test_with_the_adapter_off_the_model_is_its_base(family: str) -> None:
    lm = adapted(family, trained=True)
    learned = logits(lm)
    next(p for p in lm.parameters() if p.requires_grad).requires_grad_(False)
    before = [p.requires_grad for p in lm.parameters()]
    with pytest.raises(KeyError), adapter_off(lm):
        assert torch.equal(logits(lm), logits(make(family)))
        raise KeyError
    assert torch.equal(logits(lm), learned)
    assert [p.requires_grad for p in lm.parameters()] == before, "what was frozen stays so"


@pytest.mark.parametrize("family", families())
def test_plain_weights_are_those_of_a_model_without_adapter(family: str) -> None:
    lm, plain = adapted(family, trained=True), make(family)
    before = weights(lm)
    merged = {name: value() for name, _, value in plain_parameters(lm)}
    assert list(merged) == [name for name, _ in plain.named_parameters(remove_duplicate=False)]
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(lm), atol=1e-5, rtol=1e-5)
    assert (logits(plain) - logits(make(family))).abs().max() > 0.1, "the test needs an adapter that does something"
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items()), "merging changed it"


def test_without_adapter_the_weights_are_the_parameters_themselves() -> None:
    lm = make("tied")
    parameters = dict(lm.named_parameters(remove_duplicate=False))
    assert {name: value().data_ptr() for name, _, value in plain_parameters(lm)} == {
        name: parameter.data_ptr() for name, parameter in parameters.items()
    }
    assert not list(adapter_weights(lm))


@pytest.mark.parametrize("family", families())
def test_peft_loads_what_was_saved(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    lm = adapted(family, trained=True)
    save_adapter(tmp_path, adapter_config(lm, "the/base"), adapter_weights(lm))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = PeftModel.from_pretrained(make(family), tmp_path)
    assert torch.equal(logits(loaded), logits(lm))
    assert loaded.peft_config["default"].base_model_name_or_path == "the/base"


@pytest.mark.parametrize("target", ["q_projj", "lm_head", "embed_tokens"])
def test_a_target_that_matches_nothing_is_refused(target: str) -> None:
    with pytest.raises(AgileError, match=rf"names '{target}', which matches no linear.* down_proj, gate_proj, k_proj"):
        add_adapter(make("untied"), rank=4, alpha=8, target_modules=["v_proj", target])


def test_only_what_is_named_learns() -> None:
    lm = make("untied")
    add_adapter(lm, rank=4, alpha=8, target_modules=["v_proj", "layers.0.mlp.up_proj"])
    learning = {n.partition(".lora_")[0] for n, p in lm.named_parameters() if p.requires_grad}
    assert learning == {"model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"}


# --------------------------------------------------------------------------------------------------------------------
# Trained


def train(stage: int, steps: int = 3) -> tuple[Engine, dict[str, Tensor]]:
    """An engine after some steps of imitation, and the weights that the model began with."""
    lm = llama(num_layers=2)
    base = weights(lm)
    torch.manual_seed(1)
    add_adapter(lm, rank=4, alpha=8, token_ids=NEW)
    model = ActorCritic(lm)
    groups = model.parameter_groups(0.01)
    engine = Engine(model, lr=0.01, groups=groups, weight_decay=0.1, zero_stage=stage)
    for step in range(steps):
        batch = make_batch(random_rows(4, seed=step), CPU)
        logits, values, _ = engine.forward(batch)
        logprobs = token_logprobs(logits, batch.action_ids)
        loss = sft_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), num_tokens=20.0)
        engine.backward((loss + values.square().mean()) / ranks.world_size(), last=True)  # all learn from the same
        engine.step()
    return engine, base


@cache
def learned(stage: int) -> dict[str, Tensor]:
    """The plain weights after training, which changed what should change and nothing else."""
    engine, base = train(stage)
    found = {name: tensor.clone() for name, tensor in engine.weights()}
    assert found.keys() == base.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (found[name] != base[name]).any(-1).nonzero()[:, 0].tolist()
        assert set(changed) <= set(NEW) and changed, f"{name}: rows {changed} learned"
    assert torch.equal(found["model.norm.weight"], base["model.norm.weight"])
    assert not torch.equal(found["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])

    batch = make_batch(random_rows(4), CPU)
    with torch.no_grad():
        plain = ActorCritic(llama(num_layers=2))
        torch.testing.assert_close(adapter_free(engine)(batch)[0], plain(batch)[0])
        plain.lm.load_state_dict(found)
        expected = plain(batch)[0]
        torch.testing.assert_close(engine.forward(batch)[0], expected, atol=1e-5, rtol=1e-5)
    engine.close()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_and_new_rows_learn_under_every_stage_of_zero(stage: int) -> None:
    expected = learned(0) if stage else {}
    found = learned(stage)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", families())
def test_an_export_is_the_model_without_and_with_its_adapter(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = make(family)
    base.save_pretrained(tmp_path / "base")
    lm = adapted(family, trained=True)
    engine = Engine(ActorCritic(lm), lr=0.1, groups=[{"params": [p for p in lm.parameters() if p.requires_grad]}])
    Trained.gather(engine, str(tmp_path / "base")).save_pretrained(tmp_path / "agent")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    assert type(plain) is type(base) and plain.dtype == base.dtype
    torch.testing.assert_close(logits(plain), logits(lm), atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "agent" / "adapter")
    assert torch.equal(logits(loaded), logits(lm))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_learn_and_export_what_one_does(stage: int, tmp_path: Path) -> None:
    program = (
        "import os, sys, torch; from pathlib import Path; from tests.test_lora import learned, train\n"
        "from agile.export import Trained\n"
        "stage, out = int(sys.argv[1]), Path(sys.argv[2])\n"
        "torch.save(learned(stage), out / f'{os.environ[\"RANK\"]}.pt')\n"
        "trained = Trained.gather(train(stage)[0], 'base')\n"
        "if os.environ['RANK'] == '0': trained.save_pretrained(out / 'agent')"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [*launcher, sys.executable, "-c", program, str(stage), str(tmp_path)]
    root = Path(__file__).parents[1]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, check=True, timeout=800)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    for name, expected in learned(0).items():
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}.pt")[name]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=f"{rank} {name}")
        torch.testing.assert_close(exported.get_parameter(name).data, expected, atol=1e-5, rtol=1e-4, msg=name)
