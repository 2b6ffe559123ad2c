"""Rows in one line, with or without shared prefixes, give what each gives on its own: outputs, loss and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agile.attention import _varlen, arrange
from agile.batching import Row, make_batch, micro_batches
from agile.errors import AgileError
from agile.losses import token_logprobs
from agile.model import ActorCritic
from agile.types import SegmentEnd

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, grouped heads": llama,
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)),
    "qwen3, window in one layer": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, head_dim=8, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    ),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    ),
}


@cache
def model(family: str = "llama, grouped heads", critic: str = "shared") -> ActorCritic:
    torch.manual_seed(0)
    lm = FAMILIES[family]()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(5.0)  # weights as small as those that models begin with would hide a wrong key
    found = ActorCritic(lm, critic)
    for parameter in found.value_head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found


def row(rng: np.random.Generator, ids: Sequence[int]) -> Row:
    """With actions anywhere but at the first token."""
    mask = rng.random(len(ids)) < 0.4
    mask[0] = False
    mask[-1] |= len(ids) > 1
    return Row(np.array(ids, np.int64), mask, np.zeros(int(mask.sum()), np.float32), SegmentEnd.TERMINATED)


def tree() -> list[Row]:
    """Three levels of common prefixes, rows that are prefixes of others, equal ones, one alone, one of one token."""
    rng = np.random.default_rng(0)

    def grown(ids: Sequence[int], count: int) -> list[int]:
        return [*ids, *rng.integers(1, 40, count).tolist()]

    root = grown([], 18)
    branch, other = grown(root, 20), grown(root, 17)
    twig = grown(branch, 16)
    leaves = [grown(twig, 5), grown(twig, 1), grown(twig, 9), grown(branch, 3), grown(other, 4), grown(root, 2)]
    ids = [*leaves, twig, branch, leaves[0], leaves[0], grown([], 30), [7]]
    rows = [row(rng, i) for i in ids]
    return [rows[i] for i in rng.permutation(len(rows))]


Outputs = tuple[Tensor, Tensor, Tensor]  # logprobs (N,), values (N,), values after the last tokens (B,)


def alone(actor: ActorCritic, rows: Sequence[Row]) -> Outputs:
    """Row by row through transformers' own forward pass."""
    logprobs, values, last = [], [], []
    for r in rows:
        ids, where = torch.from_numpy(r.token_ids)[None], torch.from_numpy(np.flatnonzero(r.action_mask) - 1)
        logits = actor.lm(input_ids=ids).logits[0]
        trunk = actor.lm.base_model if actor.critic_trunk is None else actor.critic_trunk
        hidden = trunk(input_ids=ids).last_hidden_state[0]
        value = actor.value_head(hidden.detach() if actor.critic_trunk is None else hidden)[:, 0]
        logprobs.append(logits[where].log_softmax(-1)[torch.arange(len(where)), torch.from_numpy(r.action_ids)])
        values.append(value[where])
        last.append(value[-1:])
    return torch.cat(logprobs), torch.cat(values), torch.cat(last)


def together(actor: ActorCritic, rows: Sequence[Row], *, share_prefixes: bool) -> Outputs:
    batch = make_batch(rows, CPU, share_prefixes=share_prefixes)
    logits, values, last = actor(batch)
    return token_logprobs(logits, batch.action_ids), values, last


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None, left: int
) -> Tensor:
    """What both packages say that causal flash attention over runs gives, (T, H, D); run by run, in full precision."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and [len(q), len(k)] == [int(cu_q[-1]), int(cu_k[-1])]
    assert [max_q, max_k] == [int(cu_q.diff().max()), int(cu_k.diff().max())]
    outputs = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        queries, keys, values = q[a:b], *(x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        behind = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)  # (Q, K), aligned at the end
        hidden = (behind < 0) if left < 0 else (behind < 0) | (behind > left)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * (scale or q.shape[-1] ** -0.5)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.fixture(params=["SDPA", "flash-attn", "torch's own"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Attention as on this machine, or as on a GPU, of either package; gives how many runs each call of it had."""
    calls: list[int] = []

    def flash_attn_varlen_func(*runs: Any, softmax_scale: float, causal: bool, window_size: tuple[int, int]) -> Tensor:
        assert causal and window_size[1] == 0
        calls.append(len(runs[3]) - 1)
        q, k, v, cu_q, cu_k, max_q, max_k = runs
        return varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, window_size[0])

    def varlen_attn(*runs: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        assert enable_gqa
        return flash_attn_varlen_func(*runs, softmax_scale=scale, causal=True, window_size=window_size)

    if request.param != "SDPA":
        package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
        monkeypatch.setitem(sys.modules, "flash_attn", package if request.param == "flash-attn" else None)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        monkeypatch.setattr("agile.attention._suits_flash", lambda query: True)
    _varlen.cache_clear()
    yield calls
    _varlen.cache_clear()
    assert bool(calls) == (request.param != "SDPA")


def loss_and_gradients(actor: ActorCritic, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a loss that is another function of each output."""
    actor.zero_grad()
    weights = (torch.linspace(0.5, 1.5, len(x)) for x in outputs)
    terms = [(w * gelu(x)).mean() for w, x in zip(weights, outputs, strict=True)]
    loss = torch.stack(terms).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}


def assert_same(actor: ActorCritic, found: Outputs, expected: Outputs) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    expected_loss, expected_gradients = loss_and_gradients(actor, expected)
    loss, gradients = loss_and_gradients(actor, found)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys() == dict(actor.named_parameters()).keys()
    for name, gradient in expected_gradients.items():
        assert gradient.any(), name
        bound = 1e-5 * max(1.0, float(gradient.abs().max()))  # of the largest: sums in another order
        assert float((gradients[name] - gradient).abs().max()) < bound, name


def test_a_row_that_is_one_token_longer_than_the_window_does_not_see_its_first() -> None:
    actor, rng = model("mistral, window"), np.random.default_rng(0)
    rows = [row(rng, rng.integers(1, 40, length).tolist()) for length in (10, 9)]
    assert_same(actor, together(actor, rows, share_prefixes=False), alone(actor, rows))


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize(
    ("family", "critic"), [*((family, "shared") for family in FAMILIES), ("llama, grouped heads", "separate")]
)
def test_one_line_equals_row_by_row(family: str, critic: str, share_prefixes: bool, kernel: list[int]) -> None:
    actor, rows = model(family, critic), tree()
    batch = make_batch(rows, CPU, share_prefixes=share_prefixes)
    assert (len(batch.input_ids) < 0.5 * sum(map(len, rows))) == share_prefixes
    if share_prefixes:
        first = [places.min() for places in batch.plan.runs.places]
        assert len(set(batch.before.tolist())) < len(batch.before), "actions stand in shared prefixes"
        assert len(first) < len(rows), "equal rows have no token of their own"
    kernel.clear()  # a model that is new here was tried out
    found = together(actor, rows, share_prefixes=share_prefixes)
    if kernel:
        apart = sum(1 + int((np.diff(queries) > 1).sum()) for queries in batch.plan.reads.queries)
        last = len(batch.plan.runs.places) if "gpt2" in family else apart
        assert kernel[0] == len(batch.plan.runs.places) and kernel[-1] == last, "reads that lie apart are runs"
    assert_same(actor, found, alone(actor, rows))


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["packed", "shared"])
def test_order_and_cut_change_nothing(share_prefixes: bool) -> None:
    actor, rows = model(), tree()
    for max_tokens in (1, 60, 110):
        (micros,) = micro_batches(rows, np.arange(len(rows))[::-1], max_tokens, share_prefixes=share_prefixes)
        assert len(micros) > 1
        outputs: dict[int, list[Tensor]] = {}
        for micro in micros:
            logprobs, values, last = together(actor, [rows[i] for i in micro], share_prefixes=share_prefixes)
            counts = [rows[i].num_actions for i in micro]
            parts = zip(torch.split(logprobs, counts), torch.split(values, counts), torch.split(last, 1), strict=True)
            outputs |= {int(i): list(part) for i, part in zip(micro, parts, strict=True)}
        logprobs, values, last = (torch.cat(x) for x in zip(*(outputs[i] for i in range(len(rows))), strict=True))
        assert_same(actor, (logprobs, values, last), together(actor, rows, share_prefixes=share_prefixes))


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_what_is_read_alone(family: str, share_prefixes: bool) -> None:
    actor = model(family)
    batch, lengths = make_batch(tree(), CPU, share_prefixes=share_prefixes), []
    layers = getattr(actor.lm.base_model, "layers", None) or actor.lm.base_model.h
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])) for layer in layers
    ]
    with torch.no_grad():
        actor(batch)
    for handle in handles:
        handle.remove()
    tokens, read = len(batch.input_ids), len(batch.plan.read)
    assert read < 0.8 * tokens and lengths == [tokens, tokens if "gpt2" in family else read]


def test_gradient_checkpointing_changes_nothing() -> None:
    actor, rows = model(), tree()
    expected = together(actor, rows, share_prefixes=True)
    wanted = loss_and_gradients(actor, expected)
    actor.lm.gradient_checkpointing_enable()
    actor.train()
    try:
        found = loss_and_gradients(actor, together(actor, rows, share_prefixes=True))
    finally:
        actor.lm.gradient_checkpointing_disable()
        actor.eval()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_half_precision() -> None:
    torch.manual_seed(0)
    actor, rows = ActorCritic(llama().bfloat16()), tree()
    for share_prefixes in (False, True):
        with torch.no_grad():
            found, expected = together(actor, rows, share_prefixes=share_prefixes)[0], alone(actor, rows)[0]
        assert float((found - expected).abs().max()) < 0.05


def test_no_rows_go_through_and_give_zeros() -> None:
    actor = model()
    actor.zero_grad()
    logits, values, last = actor(make_batch([], CPU))
    assert logits.shape == (0, 40) and values.shape == last.shape == (0,)
    (logits.sum() + values.sum()).backward()
    gradients = [p.grad for p in actor.parameters()]
    assert all(g is not None and not g.any() for g in gradients), "so that every rank has gradients to send"


def test_a_plain_pass_of_the_same_model_is_as_before() -> None:
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    torch.manual_seed(0)
    lm = llama()
    expected = lm(input_ids=ids, attention_mask=mask).logits
    found = ActorCritic(lm).lm(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=0, rtol=0)


def test_strange_attention_is_refused_by_name() -> None:
    config = FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    with pytest.raises(AgileError, match=r"FalconForCausalLM cannot read sequences .* Choose a model like Llama"):
        ActorCritic(FalconForCausalLM(config))


def test_groups_hold_every_run_with_a_query_and_little_padding() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 400, 200)
    counts = np.where(rng.random(200) < 0.5, sizes, rng.integers(0, 400, 200) % (sizes + 1))
    order, begins = arrange(counts, sizes)
    assert sorted(order.tolist()) == np.flatnonzero(counts).tolist()
    for numbers in np.split(order, begins[1:]):
        assert len({bool(c == s) for c, s in zip(counts[numbers], sizes[numbers], strict=True)}) == 1
        area = len(numbers) * int(counts[numbers].max()) * int(sizes[numbers].max())
        assert area <= 1.25 * int((counts[numbers] * sizes[numbers]).sum()) + 64**2


def test_flash_attention_is_looked_for_and_its_absence_is_no_error() -> None:
    assert _varlen() is None or callable(_varlen())
