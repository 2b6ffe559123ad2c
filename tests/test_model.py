"""The actor and the critic: logits where they are needed, values beside them, and whom gradients reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from agile.batching import make_batch
from agile.errors import AgileError
from agile.model import ActorCritic, load_lm, small_llama
from tests.doors import actor_critic, codec, llama, random_rows, weights

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def test_logits_and_values_are_those_of_the_full_forward_before_each_action() -> None:
    model, rows = actor_critic(num_layers=2), random_rows(6)
    with torch.no_grad():
        logits, values, last = model(make_batch(rows, CPU))
        expected_logits, expected_values, expected_last = [], [], []
        for row in rows:  # one by one, nothing padded
            out = model.lm(input_ids=torch.from_numpy(row.token_ids)[None], output_hidden_states=True)
            before = row.action_mask.nonzero()[0] - 1
            everywhere = model.value_head(out.hidden_states[-1][0])[:, 0]
            expected_logits.append(out.logits[0, before])
            expected_values.append(everywhere[before])
            expected_last.append(everywhere[-1])
    assert len({len(row) for row in rows}) > 1, "the test needs rows of different lengths"
    torch.testing.assert_close(logits, torch.cat(expected_logits), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, torch.cat(expected_values), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, torch.stack(expected_last), atol=1e-5, rtol=1e-5)


def grads(model: ActorCritic, pick: Callable[[tuple[Tensor, Tensor, Tensor]], Tensor]) -> set[str]:
    """Which parameters a loss on some of the outputs reaches."""
    model.zero_grad()
    pick(model(make_batch(random_rows(4), CPU))).square().sum().backward()  # type: ignore[no-untyped-call]
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_values_send_no_gradient_into_the_trunk() -> None:
    model = actor_critic()
    assert grads(model, lambda out: out[0]) == {"lm"}
    assert grads(model, lambda out: out[1]) == {"value_head"}
    assert grads(model, lambda out: out[2]) == {"value_head"}


def test_the_critic_starts_at_zero() -> None:
    _, values, last = ActorCritic(llama())(make_batch(random_rows(4), CPU))
    assert not values.any() and not last.any()


def test_a_frozen_policy_thaws_but_for_what_was_frozen_before() -> None:
    model = actor_critic()
    model.lm.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), model.policy_frozen():
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"value_head"}
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before
    assert not before[-5], "the head"


@pytest.mark.parametrize(
    "lm",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)),
    ],
    ids=["cap", "scale"],
)
def test_a_model_that_changes_its_logits_is_refused(lm: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(AgileError, match=r"(Gemma2|Cohere)ForCausalLM does more to its last hidden state"):
        ActorCritic(lm())


@pytest.mark.parametrize(
    "lm",
    [
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
    ],
    ids=["tied", "dropout"],
)
def test_other_families_and_no_dropout(lm: Callable[[], PreTrainedModel]) -> None:
    model = ActorCritic(lm())
    batch = make_batch(random_rows(3), CPU)
    torch.testing.assert_close(model(batch)[0], model(batch)[0], rtol=0, atol=0)


def test_the_value_head_has_its_own_rate() -> None:
    model = actor_critic()
    policy, critic = model.parameter_groups(0.5)
    assert len(policy["params"]) + len(critic["params"]) == len(list(model.parameters()))
    assert "lr" not in policy and critic["lr"] == 0.5
    assert {id(p) for p in critic["params"]} == {id(p) for p in model.value_head.parameters()}


def test_a_small_llama_is_a_function_of_its_seed() -> None:
    def head(seed: int) -> Tensor:
        lm = small_llama(codec().tokenizer, num_layers=1, hidden_size=16, num_heads=2, max_tokens=32, seed=seed)
        return torch.as_tensor(lm.lm_head.weight)

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_load_gives_back_what_was_saved(tmp_path: Path) -> None:
    lm = llama()
    lm.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path), codec().tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(lm).values(), weights(loaded).values(), strict=True))


def test_embeddings_grow_with_the_tokenizer(tmp_path: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "vocab_size": 4})).save_pretrained(tmp_path)
    assert load_lm(str(tmp_path), codec().tokenizer).config.vocab_size == len(codec().tokenizer)


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match=f"Cannot load a causal language model from '{tmp_path}'"):
        load_lm(str(tmp_path), codec().tokenizer)


# --------------------------------------------------------------------------------------------------------------------
# A critic with a trunk of its own


def test_a_separate_critic_has_a_trunk_that_learns_from_values_alone() -> None:
    model = ActorCritic(llama(), "separate")
    for parameter in model.value_head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert grads(model, lambda out: out[0]) == {"lm"}
    assert grads(model, lambda out: out[1]) == {"value_head", "critic_trunk"}
    assert grads(model, lambda out: out[2]) == {"value_head", "critic_trunk"}
    policy, critic = model.parameter_groups(0.5)
    parts = {n: {id(p) for p in m.parameters()} for n, m in model.named_children()}
    assert {id(p) for p in policy["params"]} == parts["lm"]
    assert {id(p) for p in critic["params"]} == parts["value_head"] | parts["critic_trunk"] and critic["lr"] == 0.5
    with model.policy_frozen():
        assert all(p.requires_grad for p in model.critic_trunk.parameters())  # type: ignore[union-attr]
        assert not any(p.requires_grad for p in model.lm.parameters())


def test_a_separate_critic_begins_as_the_shared_one() -> None:
    shared, separate = actor_critic(num_layers=2), ActorCritic(llama(num_layers=2), "separate")
    separate.value_head.load_state_dict(shared.value_head.state_dict())
    batch = make_batch(random_rows(4), CPU)
    for ours, theirs in zip(shared(batch), separate(batch), strict=True):
        assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------------------
# Half precision


def test_values_are_computed_in_float32() -> None:
    model = actor_critic().to(torch.bfloat16)
    logits, values, last = model(make_batch(random_rows(4), CPU))
    assert logits.dtype == torch.bfloat16 and values.dtype == last.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float()), "no value was rounded"
    assert actor_critic().double()(make_batch(random_rows(4), CPU))[1].dtype == torch.float64


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_model_is_loaded_in_the_dtype_that_is_wanted(dtype: str, tmp_path: Path) -> None:
    lm = llama()
    torch.nn.Module.to(lm, torch.bfloat16)
    lm.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path), codec().tokenizer, dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
