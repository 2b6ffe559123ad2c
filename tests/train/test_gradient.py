"""The gradient of the whole loss, from tokens to a number, against central differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from agile.batching import make_batch
from agile.losses import PPOCoefficients, entropy, ppo_loss, token_logprobs
from agile.model import ActorCritic
from tests.doors import actor_critic, random_rows

# Wide bounds on some tokens, narrow on others: both branches of every clip are taken, none at its kink.
COEFFICIENTS = PPOCoefficients(
    clip=0.1, value_clip=0.1, value_coef=0.7, kl_coef=0.3, entropy_coef=0.05, max_importance_weight=1.5
)
TEMPERATURE = 0.8
STEP = 1e-6


def in_float64() -> ActorCritic:
    """A tiny one; the norms of transformers would compute in float32, whose rounding is all that a step would show."""
    model = actor_critic().double()
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, LlamaRMSNorm):
                exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                setattr(parent, name, exact)
                nn.init.normal_(exact.weight, 1.0, 0.1)
    return model


def whole_loss(model: ActorCritic) -> Callable[[Tensor | None], Tensor]:
    """The loss of four rows at the model's weights; of given values in place of the critic's."""
    rows = random_rows(4, seed=3)
    data = make_batch(rows, torch.device("cpu"))
    with torch.no_grad():
        logits, old_values, _ = model(data)
        logprobs = token_logprobs(logits, data.action_ids, TEMPERATURE)
    generator = torch.Generator().manual_seed(0)

    def near(x: Tensor, scale: float) -> Tensor:
        return x + scale * torch.randn(x.shape, dtype=torch.float64, generator=generator)

    old, rollout, ref = (near(logprobs, scale) for scale in (0.15, 0.4, 0.5))
    around = {"old_values": near(old_values, 0.1), "returns": near(old_values, 1.0), "advantages": near(0 * old, 1.0)}

    def loss(values: Tensor | None) -> Tensor:
        logits, found, _ = model(data)
        total, metrics = ppo_loss(
            logprobs=token_logprobs(logits, data.action_ids, TEMPERATURE),
            old_logprobs=old,
            rollout_logprobs=rollout,
            ref_logprobs=ref,
            values=found if values is None else values,
            entropy=entropy(logits, TEMPERATURE),
            action_mask=torch.ones_like(old, dtype=torch.bool),
            num_tokens=sum(row.num_actions for row in rows),
            coefficients=COEFFICIENTS,
            **around,
        )
        assert 0 < metrics["clip_fraction"] < len(old)
        return total

    return loss


def test_gradient_of_the_whole_loss_by_central_differences() -> None:
    """A random subset of all parameters; the value loss reaches the critic's alone, so for the LM values are held."""
    model = in_float64()
    loss = whole_loss(model)
    loss(None).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        held = model(make_batch(random_rows(4, seed=3), torch.device("cpu")))[1]
    rng = np.random.default_rng(0)
    largest = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        values = None if name.startswith("value_head") else held
        flat, grad = parameter.detach().view(-1), parameter.grad.view(-1)
        likely = torch.topk(grad.abs(), min(3, len(grad))).indices.tolist()  # most of an embedding has none
        for i in {*likely, *rng.choice(len(flat), min(3, len(flat)), replace=False).tolist()}:
            found = []
            for step in (STEP, -2 * STEP, STEP):  # up, down and back
                flat[i] += step
                with torch.no_grad():
                    found.append(float(loss(values)))
            difference = (found[0] - found[1]) / (2 * STEP)
            assert float(grad[i]) == pytest.approx(difference, rel=1e-4, abs=1e-7), f"{name}[{i}]"
            largest = max(largest, abs(difference))
    assert largest > 0.01
