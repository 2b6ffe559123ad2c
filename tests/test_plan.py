"""`agile plan`: parameters exact, states as the engine allocates them, activations as they are on real tensors."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from agile.activations import Peak, activation_bytes, shaped
from agile.config import load_config
from agile.engine import Engine
from agile.errors import AgileError
from agile.losses import token_logprobs
from agile.plan import GIB, Counts, architecture, at_most, count, memory, state_bytes, step_bytes
from agile.training import check_processes
from tests.tiny import agile

CONFIGS = Path(__file__).parents[1] / "configs"
GPUS = {"vicuna-13b": (8, 80), "qwen2.5-7b": (4, 80), "qwen2.5-0.5b": (1, 24)}
SMALL = LlamaConfig(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("name, billions", [("vicuna-13b-v1.5", 13.015864320), ("Qwen2.5-7B-Instruct", 7.615616512)])
def test_known_models_have_their_number_of_parameters(name: str, billions: float) -> None:
    config = load_config(None, [f"model.path=somebody/{name}"])
    counts = count(config, architecture(config))
    assert counts.lm == round(billions * 1e9) and counts.trained == counts.total > counts.lm


def test_tied_weights_count_once() -> None:
    config = load_config(None, ["model.path=Qwen/Qwen2.5-0.5B-Instruct"])
    assert count(config, architecture(config)).lm == 494_032_768


def test_adapters_are_all_that_is_trained() -> None:
    config = load_config(None, ["model.path=Qwen/Qwen2.5-0.5B-Instruct", "lora.rank=16"])
    counts = count(config, architecture(config))
    assert counts.total - counts.trained == 494_032_768 and counts.trained < 0.03 * counts.total


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm = LlamaForCausalLM(SMALL)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm(input_ids=input_ids).logits
        return logits


@pytest.mark.parametrize("zero_stage, dtype", [(0, "float32"), (2, "float32"), (2, "bfloat16")])
def test_states_are_what_the_engine_allocates(zero_stage: int, dtype: str) -> None:
    model = _Model()
    size = sum(p.numel() for p in model.parameters())
    with Peak() as seen:
        for parameter in model.parameters():
            seen.count(parameter)
        engine = Engine(model, lr=1e-3, zero_stage=zero_stage, dtype=dtype)
        for _ in range(2):  # AdamW's state is there from the first step on
            engine.backward(engine.forward(torch.zeros(1, 2, dtype=torch.int64)).float().sum(), last=True)
            held, seen.peak = seen.now, seen.now
            engine.step()
            gc.collect()
    engine.close()
    counts = Counts(size, size, size, 0)
    planned, _ = state_bytes(counts, zero_stage=zero_stage, offload="none", dtype=dtype, num_gpus=1)
    if zero_stage == 0:  # its step works on one weight after the other here, on many at a time on a GPU
        assert planned == pytest.approx(held, rel=0.05)
    else:
        assert planned + step_bytes(size, zero_stage=zero_stage, num_gpus=1) == pytest.approx(seen.peak, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_pass(checkpointing: bool) -> None:
    num_tokens, num_actions = 512, 128
    model = LlamaForCausalLM(SMALL)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def forget(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call]
    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    with Peak(model) as seen:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :num_actions]
        token_logprobs(model.lm_head(hidden), ids[0, :num_actions]).sum().backward()  # type: ignore[no-untyped-call]
    planned = activation_bytes(
        SMALL,
        num_tokens=num_tokens,
        num_actions=num_actions,
        dtype=torch.float32,
        checkpointing=checkpointing,
        separate_critic=False,
        learning=True,
    )
    assert seen.peak / 1.25 <= planned <= 1.25 * seen.peak


def test_checkpointing_and_shorter_passes_take_less() -> None:
    options: dict[str, Any] = {"num_actions": 64, "dtype": torch.bfloat16, "separate_critic": False, "learning": True}
    whole = activation_bytes(SMALL, num_tokens=512, checkpointing=False, **options)
    assert activation_bytes(SMALL, num_tokens=512, checkpointing=True, **options) < 0.7 * whole
    assert activation_bytes(SMALL, num_tokens=256, checkpointing=False, **options) < 0.7 * whole


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_configs_for_gpus_fit_them(name: str) -> None:
    num_gpus, gpu_gib = GPUS[name]
    path = CONFIGS / f"productqa-{name}.yaml"
    assert memory(load_config(path, ["task.data=DIR"]), num_gpus, gpu_gib, 0.25).fits


@pytest.mark.parametrize("name", GPUS)
def test_configs_for_gpus_have_the_papers_settings_and_the_command_of_their_gpus(name: str) -> None:
    path = CONFIGS / f"productqa-{name}.yaml"
    config = load_config(path, ["task.data=DIR"])
    sft, ppo = config.sft, config.ppo
    assert (sft.lr, sft.batch_size, ppo.lr, ppo.batch_size, ppo.num_epochs) == (1e-5, 64, 1e-6, 64, 1)
    assert (config.agent.product_k, config.agent.knowledge_k, config.memory.encoder) == (1, 1, "all-MiniLM-L6-v2")
    assert sft.num_steps == 2 * 73_864 // sft.batch_size
    check_processes(config, GPUS[name][0])
    opening = path.read_text().partition("task:")[0]
    gpus, gib = GPUS[name]
    assert f"--gpus {gpus} --gpu-memory {gib} " in opening and f"--nproc-per-node {gpus} " in opening


TINY_PLAN = (
    CONFIGS / "demo.yaml",
    *("model.num_layers=2", "model.hidden_size=256", "model.vocab_size=8000", "rollout.max_batch_size=4"),
)


def test_a_run_that_fits_ends_with_0_and_names_the_largest_part() -> None:
    result = agile("plan", *TINY_PLAN, "--gpus", "1", "--gpu-memory", "24")
    assert result.exit_code == 0, result.output
    assert "It fits" in result.output and "the largest: CUDA" in result.output


def test_one_that_does_not_fit_ends_with_1_and_says_what_would() -> None:
    result = agile("plan", *TINY_PLAN, "rollout.max_batch_size=40000", "--gpu-memory", "24")
    assert result.exit_code == 1, result.output
    (share,) = re.findall(r"rollout\.max_batch_size=(\d+): ([\d.]+) GiB", result.output)
    assert float(share[1]) < 24 * 0.95
    assert agile("plan", *TINY_PLAN, f"rollout.max_batch_size={share[0]}", "--gpu-memory", "24").exit_code == 0


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--gpus", "7", "ppo.streams_per_iteration=3"], "fewer than the 7 processes"),
        (["--gpus", "2", "rollout.policy=vllm"], "set rollout.policy=vllm-server"),
        (["stages=[dpo]", "model.path=x", "preferences.data=x"], "stages has dpo, which TRL trains"),
        (["stages=[sft,ppo,reward-model]"], "Plan stages=[sft,ppo]"),
        (["model.path=somebody/unknown"], "The shape of model.path=somebody/unknown is not known"),
        (["rollout.policy=vllm", "vllm.gpu_memory_utilization=0.001"], "vllm.gpu_memory_utilization"),
    ],
)
def test_what_cannot_work_is_refused_by_name(words: list[str], problem: str) -> None:
    result = agile("plan", *TINY_PLAN, *words)
    assert result.exit_code == 2 and problem in result.output


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    config = load_config(None, [f"model.path={tmp_path}"])
    expected = sum(p.numel() for p in shaped(SMALL).parameters())
    assert count(config, AutoConfig.from_pretrained(tmp_path)).lm == expected
    assert architecture(config).hidden_size == SMALL.hidden_size
    with pytest.raises(AgileError, match="not known"):
        architecture(load_config(None, [f"model.path={tmp_path}/none"]))
    (tmp_path / "config.json").write_text(json.dumps({**SMALL.to_dict(), "hidden_size": "large"}))
    with pytest.raises(AgileError, match=r"not known: .*hidden_size"):
        architecture(config)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL.to_dict(), "max_position_embeddings": 8}))
    with pytest.raises(AgileError, match="the model reads at most 8 tokens"):
        architecture(config)


def test_servers_take_memory_where_they_share_the_gpus() -> None:
    words = ["model.num_layers=2", "model.hidden_size=256", "rollout.policy=vllm-server", "vllm.weights_dir=DIR"]
    words.append("vllm.servers=[http://127.0.0.1:8000]")
    shape = architecture(load_config(None, words))
    weights = 4 * count(load_config(None, words), shape).lm
    apart, beside = (memory(load_config(None, [*words, *word]), 1, 24, 0.25) for word in ([], ["vllm.kv_cache_gib=2"]))
    assert beside.total - apart.total == weights + 3 * GIB
    engine = {item.name: item.num_bytes for item in beside.items if item.name.startswith("vLLM")}
    assert engine == {"vLLM's weights": weights, "vLLM's keys and values": 2 * GIB, "vLLM's workspace": GIB}


def test_an_engine_in_process_takes_its_share_of_which_the_cache_is_the_rest() -> None:
    words = ["model.num_layers=2", "model.hidden_size=256", "rollout.policy=vllm", "vllm.gpu_memory_utilization=0.5"]
    engine = [i.num_bytes for i in memory(load_config(None, words), 1, 24, 0.25).items if i.name.startswith("vLLM")]
    assert len(engine) == 3 and sum(engine) == 12 * GIB and engine[1] > 10 * GIB


@pytest.mark.parametrize(
    ("words", "kept", "peak"),
    [
        (["ppo.kl_coef=0"], 0, 3),  # each of three processes loads one
        (["ppo.reference=keep"], 0, 3),
        (["ppo.reference=offload"], 3, 3),  # and keeps it, a whole one
        (["ppo.reference=offload", "engine.zero_stage=3"], 1, 4),  # one in shards, and then the copy that plays
        (["ppo.reference=offload", "rollout.lag=1"], 3, 6),
        (["stages=[sft]", "ppo.reference=offload"], 0, 3),
    ],
)
def test_the_memory_of_the_cpu_in_copies_of_the_model(words: list[str], kept: int, peak: int) -> None:
    tiny = ["model.num_layers=2", "model.hidden_size=256", "ppo.kl_coef=0.1", "ppo.streams_per_iteration=3"]
    config = load_config(None, [*tiny, *words])
    copy = 4 * count(config, architecture(config)).lm
    host = memory(config, 3, 24, 0.25).host
    assert sum(i.num_bytes for i in host if i.when == "always") / copy == pytest.approx(kept, abs=0.02)
    assert at_most(host) / copy == pytest.approx(peak, abs=0.1), "the critic's head is small"


def test_what_the_optimizer_offloads_stays_on_the_cpu() -> None:
    words = ["model.num_layers=2", "model.hidden_size=256", "engine.zero_stage=2", "engine.offload=optimizer"]
    config = load_config(None, [*words, "ppo.reference=offload", "ppo.kl_coef=0.1"])
    counts = count(config, architecture(config))
    _, states = state_bytes(counts, zero_stage=2, offload="optimizer", dtype="float32", num_gpus=1)
    assert at_most(memory(config, 1, 24, 0.25).host) == states + 4 * counts.lm > 16 * counts.trained


def test_a_reference_takes_turns_with_the_update_when_it_is_offloaded() -> None:
    words = ["model.num_layers=2", "model.hidden_size=256", "ppo.kl_coef=0.1"]
    kept, offloaded, absent = (
        memory(load_config(None, [*words, word]), 1, 24, 0.25).total / GIB
        for word in ("ppo.reference=keep", "ppo.reference=offload", "ppo.kl_coef=0")
    )
    assert absent <= offloaded < kept
