"""The Hugging Face policy and its models: which architectures it plays, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agile.errors import AgileError
from agile.policies.hf import HFPolicy


def tiny(kind: str) -> PreTrainedModel:
    """Logits of a deviation of about 1."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.3}
    sizes |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    gpt2 = GPT2Config(**sizes)
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": kind == "qwen2"}
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=40)),
        "eager": lambda: LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="eager"),
        "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4)),
    }
    return models[kind]()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "qwen3", "mistral", "eager"])
def test_other_architectures(kind: str) -> None:
    """Grouped heads, learned positions, tied embeddings, dropout: each turn is that of a plain forward pass."""
    lm = tiny(kind).train()
    policy = HFPolicy(lm, max_batch_size=6)
    own, ids = lm.config._attn_implementation, [list(range(1 + i)) for i in range(6)]
    for turn in range(3):
        completions = policy.sample(ids, max_tokens=[1 + i % 3 for i in range(6)], stop=[()] * 6, seeds=range(6))
        assert lm.training and lm.config._attn_implementation == own
        lm.eval()
        for prompt, completion in zip(ids, completions, strict=True):
            assert (completion.usage.cached_tokens > 0) == (turn > 0)
            with torch.no_grad():
                logits = lm(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
            expected = (
                logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])
            )
            assert completion.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
        lm.train()
        ids = [[*p, *c.token_ids, 7, 8][: 40 + i] for i, (p, c) in enumerate(zip(ids, completions, strict=True))]


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_a_model_that_cannot_is_named(kind: str) -> None:
    with pytest.raises(AgileError, match=r"(MambaForCausalLM|BloomForCausalLM) .*Serve it with vLLM"):
        HFPolicy(tiny(kind))


@pytest.mark.parametrize(("kind", "limit"), [("gpt2", 64), ("mistral", 40)])
def test_a_context_that_is_too_long_is_refused_before_anything_is_computed(kind: str, limit: int) -> None:
    policy = HFPolicy(tiny(kind))
    assert len(policy.sample([[1] * (limit - 4)], max_tokens=[4], stop=[()], seeds=[0])[0].token_ids) == 4
    name = "sliding_window" if kind == "mistral" else "max_position_embeddings"
    with pytest.raises(AgileError, match=rf"are {limit + 1}, but {name} .* is {limit}"):
        asyncio.run(policy.complete([1] * (limit - 3), max_tokens=4, stop=(), seed=0))
