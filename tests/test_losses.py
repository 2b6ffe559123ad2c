"""Losses: closed form at the clip edges, gradients, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agile.losses import PPOCoefficients, entropy, k3, ppo_loss, sft_loss, token_logprobs

COEFFICIENTS = PPOCoefficients(
    clip=0.2, value_clip=0.3, value_coef=0.5, kl_coef=0.1, entropy_coef=0.01, max_importance_weight=2.0
)
POLICY_ONLY = replace(COEFFICIENTS, value_coef=0, kl_coef=0, entropy_coef=0)
Batch = dict[str, Any]  # the tensors of ppo_loss by name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def batch() -> Batch:
    """4 segments of 6 tokens, about half of them actions, in float64."""

    def noise(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(4, 6, dtype=torch.float64)

    old, old_values = -noise().abs(), noise()
    mask = torch.rand(4, 6) < 0.5
    assert 0 < mask.sum() < 24
    return {
        "logprobs": old + noise(0.3),
        "old_logprobs": old,
        "rollout_logprobs": old + noise(0.5),
        "ref_logprobs": old + noise(0.5),
        "values": old_values + noise(0.3),
        "old_values": old_values,
        "advantages": noise(),
        "returns": noise(),
        "entropy": noise().abs(),
        "action_mask": mask,
    }


TRAINED = ("logprobs", "values", "entropy")


def loss_and_grads(
    batch: Batch, num_tokens: float = 12, c: PPOCoefficients = COEFFICIENTS
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    leaves = {name: batch[name].detach().clone().requires_grad_() for name in TRAINED}
    loss, metrics = ppo_loss(**{**batch, **leaves}, num_tokens=num_tokens, coefficients=c)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, grads, strict=True)), metrics


def one_token(**changes: float | None) -> Batch:
    """A batch of a single action token, all zeros but for `changes`."""
    names = [*TRAINED, "old_logprobs", "rollout_logprobs", "ref_logprobs", "old_values", "advantages", "returns"]
    values = {name: changes.get(name, 0.0) for name in names}
    tensors = {k: None if v is None else torch.tensor([[v]], dtype=torch.float64) for k, v in values.items()}
    return {**tensors, "action_mask": torch.tensor([[True]])}


# --------------------------------------------------------------------------------------------------------------------
# Log-probabilities and entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_logprobs_and_entropy_equal_log_softmax(temperature: float) -> None:
    logits, ids = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    expected = torch.log_softmax(logits / temperature, -1)
    logprobs, entropies = token_logprobs(logits, ids, temperature), entropy(logits, temperature)
    assert logprobs.shape == entropies.shape == (2, 5)
    for b in range(2):
        for t in range(5):
            torch.testing.assert_close(logprobs[b, t], expected[b, t, ids[b, t]])
            torch.testing.assert_close(entropies[b, t], -(expected[b, t].exp() * expected[b, t]).sum())


def test_temperature_makes_logprobs_those_of_the_sampling_distribution() -> None:
    logits, n = torch.tensor([2.0, 0.0, -1.0]), 200_000
    samples = torch.multinomial(torch.softmax(logits / 0.5, -1), n, replacement=True)
    probs = token_logprobs(logits.expand(3, 3), torch.arange(3), temperature=0.5).exp()
    torch.testing.assert_close(probs, torch.bincount(samples) / n, atol=0.003, rtol=0)


def test_entropy_in_closed_form() -> None:
    assert entropy(torch.zeros(8)) == pytest.approx(math.log(8))
    assert entropy(torch.tensor([1e4, 0.0])) == 0
    p = torch.tensor([0.25, 0.75])
    assert entropy(p.log()) == pytest.approx(-(p * p.log()).sum().item())


@pytest.mark.parametrize("f", [lambda x: token_logprobs(x, torch.tensor([[0, 1, 2]]), 0.7), lambda x: entropy(x, 0.7)])
def test_gradients_of_logprobs_and_entropy(f: Callable[[Tensor], Tensor]) -> None:
    torch.autograd.gradcheck(f, torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, ids = torch.randn(1, 3, 1000).bfloat16(), torch.randint(1000, (1, 3))
    torch.testing.assert_close(token_logprobs(logits, ids), token_logprobs(logits.float(), ids), atol=0, rtol=0)
    assert entropy(logits).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature {temperature}"):
        token_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), temperature)


# --------------------------------------------------------------------------------------------------------------------
# PPO, term by term


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad", "clipped"),
    [
        (1.5, 1.0, -1.2, 0.0, 1),  # above the clip, wanted: no further
        (1.5, -1.0, 1.5, 1.5, 0),  # above, unwanted: pulled back
        (0.5, 1.0, -0.5, -0.5, 0),  # below, wanted: pulled back
        (0.5, -1.0, 0.8, 0.0, 1),  # below, unwanted: no further
        (1.1, 2.0, -2.2, -2.2, 0),  # inside: the plain policy gradient, rho * A
        (0.9, -2.0, 1.8, 1.8, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clip_edges(ratio: float, advantage: float, loss: float, grad: float, clipped: int) -> None:
    data = one_token(logprobs=math.log(ratio) - 1, old_logprobs=-1, rollout_logprobs=None, advantages=advantage)
    value, grads, metrics = loss_and_grads(data, 1, POLICY_ONLY)
    assert value == pytest.approx(loss) and metrics["policy"] == pytest.approx(loss)
    assert grads["logprobs"].item() == pytest.approx(grad)
    assert metrics["ratio"] == pytest.approx(ratio) and metrics["clip_fraction"] == clipped
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize(("gap", "weight"), [(0.5, 0.5), (1.5, 1.5), (7.0, 2.0)])
def test_importance_weight_is_capped_and_carries_no_gradient(gap: float, weight: float) -> None:
    data = one_token(logprobs=-1, old_logprobs=-1, rollout_logprobs=-1 - math.log(gap), advantages=1)
    loss, grads, metrics = loss_and_grads(data, 1, POLICY_ONLY)
    assert loss == pytest.approx(-weight) and grads["logprobs"].item() == pytest.approx(-weight)
    assert metrics["rollout_ratio"] == pytest.approx(gap)


@pytest.mark.parametrize(
    ("value", "ret", "loss", "grad"),
    [
        (1.1, 2.0, 0.5 * 0.9**2, -0.9),  # within 0.3 of the old value, 1: plain squared error
        (1.5, 2.0, 0.5 * 0.7**2, 0.0),  # moved too far towards the return: clipped at 1.3, no gradient
        (1.5, 0.0, 0.5 * 1.5**2, 1.5),  # moved too far away from it: the larger, unclipped error
    ],
)
def test_value_clip_edges(value: float, ret: float, loss: float, grad: float) -> None:
    data = one_token(values=value, old_values=1, returns=ret)
    total, grads, metrics = loss_and_grads(data, 1, replace(POLICY_ONLY, value_coef=0.5))
    assert metrics["value"] == pytest.approx(loss) and total == pytest.approx(0.5 * loss)
    assert grads["values"].item() == pytest.approx(0.5 * grad)


def test_k3_is_never_negative_and_in_closed_form() -> None:
    logp, ref = -5 * torch.rand(2, 1000, dtype=torch.float64)
    assert (k3(logp, ref) >= 0).all() and (k3(logp, logp) == 0).all()
    assert k3(torch.tensor(-1.0), torch.tensor(-2.0)) == pytest.approx(math.exp(-1) + 1 - 1)
    policy, reference = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.3, 0.1])
    exact = (policy * (policy / reference).log()).sum()  # its mean over the policy is the KL itself
    assert (policy * k3(policy.log(), reference.log())).sum() == pytest.approx(exact.item())


def test_the_kl_that_is_logged_is_of_the_policy_that_played() -> None:
    """k3 of the old policy (its samples are what it is a mean of), whatever the policy in training has become."""
    _, _, metrics = loss_and_grads(one_token(logprobs=-1, old_logprobs=-2, ref_logprobs=-3), 1)
    assert metrics["kl"] == pytest.approx(math.exp(-1) + 1 - 1)


def test_loss_is_the_formula_token_by_token(batch: Batch) -> None:
    c, total = COEFFICIENTS, 0.0
    for index in batch["action_mask"].nonzero().tolist():
        x = {name: t[*index].item() for name, t in batch.items()}
        rho = math.exp(x["logprobs"] - x["old_logprobs"])
        w = min(math.exp(x["old_logprobs"] - x["rollout_logprobs"]), c.max_importance_weight)
        clipped = min(max(rho, 1 - c.clip), 1 + c.clip)
        near = min(max(x["values"], x["old_values"] - c.value_clip), x["old_values"] + c.value_clip)
        value = 0.5 * max((x["values"] - x["returns"]) ** 2, (near - x["returns"]) ** 2)
        log_ref = x["ref_logprobs"] - x["logprobs"]
        total -= min(rho * x["advantages"], clipped * x["advantages"]) * w
        total += c.value_coef * value + c.kl_coef * 0.5 * log_ref**2 - c.entropy_coef * x["entropy"]
    assert loss_and_grads(batch, num_tokens=12)[0].item() == pytest.approx(total / 12)


def test_gradient_by_finite_differences(batch: Batch) -> None:
    """Random float64 inputs lie off the kinks of clip, min and max."""

    def loss(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        changed = {**batch, "logprobs": logprobs, "values": values, "entropy": entropy}
        return ppo_loss(**changed, num_tokens=12, coefficients=COEFFICIENTS)[0]

    torch.autograd.gradcheck(loss, [batch[name].requires_grad_() for name in TRAINED])


# --------------------------------------------------------------------------------------------------------------------
# What must hold


def test_ratio_is_exactly_one_before_the_first_update(batch: Batch) -> None:
    same = batch | {"old_logprobs": batch["logprobs"]}
    _, grads, metrics = loss_and_grads(same, 1, POLICY_ONLY)
    assert metrics["ratio"] == batch["action_mask"].sum()
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0
    weight = (batch["logprobs"] - batch["rollout_logprobs"]).exp().clamp(max=2)
    torch.testing.assert_close(grads["logprobs"], -batch["advantages"] * weight * batch["action_mask"])


def test_zero_advantage_gives_zero_policy_gradient(batch: Batch) -> None:
    _, grads, metrics = loss_and_grads(batch | {"advantages": torch.zeros(4, 6)}, c=POLICY_ONLY)
    assert metrics["policy"] == 0 and not grads["logprobs"].any()


def test_optional_logprobs_default_to_no_correction_and_no_kl(batch: Batch) -> None:
    without = loss_and_grads({**batch, "rollout_logprobs": None, "ref_logprobs": None})
    neutral = batch | {"rollout_logprobs": batch["old_logprobs"]}
    with_neutral = loss_and_grads(neutral, c=replace(COEFFICIENTS, kl_coef=0))
    torch.testing.assert_close(without[:2], with_neutral[:2])
    assert "kl" not in without[2]


@pytest.mark.parametrize("cuts", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_micro_batches_add_up(batch: Batch, cuts: list[int]) -> None:
    loss, grads, metrics = loss_and_grads(batch)
    parts = [
        dict(zip(batch, rows, strict=True))
        for rows in zip(*(torch.split(x, cuts) for x in batch.values()), strict=True)
    ]
    losses, part_grads, part_metrics = zip(*(loss_and_grads(part) for part in parts), strict=True)
    torch.testing.assert_close(sum(losses), loss)
    for name in TRAINED:
        torch.testing.assert_close(torch.cat([g[name] for g in part_grads]), grads[name])
    for name, total in metrics.items():
        torch.testing.assert_close(sum(m[name] for m in part_metrics), total)


@pytest.mark.parametrize("junk", [0.0, -1e30, math.inf, -math.inf, math.nan])
def test_padding_and_masked_junk_change_nothing(batch: Batch, junk: float) -> None:
    loss, grads, metrics = loss_and_grads(batch)
    mask = batch["action_mask"]
    padded = {
        name: torch.nn.functional.pad(torch.where(mask, x, junk), (0, 2, 0, 1), value=junk)
        for name, x in batch.items()
        if name != "action_mask"
    }
    padded["action_mask"] = torch.nn.functional.pad(mask, (0, 2, 0, 1), value=False)
    junk_loss, junk_grads, junk_metrics = loss_and_grads(padded)
    torch.testing.assert_close(junk_loss, loss)
    torch.testing.assert_close(junk_metrics, metrics)
    for name in TRAINED:
        torch.testing.assert_close(junk_grads[name][:4, :6], grads[name])
        assert (junk_grads[name][~padded["action_mask"]] == 0).all()


def test_gradient_reaches_the_trained_tensors_alone(batch: Batch) -> None:
    floats = {name: x.requires_grad_() for name, x in batch.items() if name != "action_mask"}
    loss, metrics = ppo_loss(**batch, num_tokens=12, coefficients=COEFFICIENTS)
    grads = torch.autograd.grad(loss, list(floats.values()), allow_unused=True)
    assert {name for name, x in zip(floats, grads, strict=True) if x is not None} == set(TRAINED)
    assert not any(x.requires_grad for x in metrics.values())


def test_infinite_bounds_turn_clipping_off(batch: Batch) -> None:
    free = replace(COEFFICIENTS, clip=math.inf, value_clip=math.inf, max_importance_weight=math.inf)
    _, _, metrics = loss_and_grads(batch, c=free)
    x = {name: t[batch["action_mask"]] for name, t in batch.items()}
    torch.testing.assert_close(
        metrics["policy"], -((x["logprobs"] - x["rollout_logprobs"]).exp() * x["advantages"]).sum()
    )
    torch.testing.assert_close(metrics["value"], 0.5 * (x["values"] - x["returns"]).square().sum())


def test_bad_arguments_are_named(batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"\(4, 6, 1\)"):
        ppo_loss(**batch | {"values": batch["values"][..., None]}, num_tokens=12, coefficients=COEFFICIENTS)
    with pytest.raises(ValueError, match="num_tokens 0"):
        ppo_loss(**batch, num_tokens=0, coefficients=COEFFICIENTS)


def test_sft_loss_is_the_masked_mean_and_safe() -> None:
    logprobs = torch.tensor([[math.nan, -1.0, -2.0], [-3.0, -math.inf, math.nan]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    loss = sft_loss(logprobs, mask, num_tokens=4)
    assert loss.item() == 1.5
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [[0, -0.25, -0.25], [-0.25, 0, 0]]
