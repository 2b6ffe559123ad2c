"""Loss functions: pure, and indifferent to padding, batch order and how micro-batches are cut.

Tensors have one entry per token, in any one shape: (B, T) padded, or (N,) for the action tokens alone. The
distribution, the value and the entropy of a token are those of the state before it; who calls aligns them. Only action
tokens, those that the LLM sampled, count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the distribution that was sampled from."""
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: expected > 0; greedy samples have no logprobs to learn from.")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # sums over a vocabulary lose too much in half precision
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability (nats) of each token under the distribution that sampled it, softmax(logits / temperature).

    Autograd keeps the logits that were summed, scaled or in float32 where that had to be, but no softmax.

    Args:
        logits: (..., V), those that predict each token.
        token_ids: (...), int64.
        temperature: That of the rollout.

    Returns:
        (...), float32 or wider.
    """
    logits = _scaled(logits, temperature)
    return logits.gather(-1, token_ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy (nats) over the whole vocabulary of the distribution that produced each token.

    Args as in `token_logprobs`; finite logits only. Autograd keeps a (..., V) softmax, so call it without gradients
    when there is no entropy bonus.

    Returns:
        (...), in [0, log V].
    """
    logits = _scaled(logits, temperature)
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


@dataclass(frozen=True, slots=True)
class PPOCoefficients:
    """What weighs and bounds the terms of `ppo_loss`; `math.inf` turns a bound off.

    Attributes:
        clip: eps; the ratio to the old policy is clipped to [1 - eps, 1 + eps].
        value_clip: How far a value may move from the old one, in units of the return.
        value_coef: Weight of the value loss.
        kl_coef: Weight of the KL to the reference policy.
        entropy_coef: Weight of the entropy bonus.
        max_importance_weight: Cap C of the trainer-to-rollout importance weight.
    """

    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.5
    kl_coef: float = 0.05
    entropy_coef: float = 0.0
    max_importance_weight: float = 2.0


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate, elementwise and never negative, of KL(policy || reference) from samples of the policy.

        k3 = exp(ref - logp) - (ref - logp) - 1

    An estimate to look at, not a loss: its gradient, in expectation over the policy, is that of KL(reference ||
    policy), and one token that the policy has all but given up can outweigh all others. Source: Schulman,
    "Approximating KL divergence" (2020).
    """
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


def ppo_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    entropy: Tensor,
    action_mask: Tensor,
    num_tokens: float,
    coefficients: PPOCoefficients,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped PPO over action tokens.

        rho    = exp(logp - logp_old)                       w = min(exp(logp_old - logp_rollout), C)
        policy = -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A) * w
        value  = 0.5 * max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2)
        kl     = 0.5 * (logp - ref)^2
        loss   = sum(policy + c_v * value + c_kl * kl - c_H * entropy) / num_tokens

    The square is the loss whose gradient, in expectation over the policy, is that of KL(policy || reference).

    Gradients flow through `logprobs`, `values` and `entropy` alone, and are exactly 0 at masked positions whatever
    stands there, NaN and infinity included. Source: Schulman et al., arXiv 1707.06347, Eq. 7.

    Args:
        logprobs, values, entropy: (...), of the model in training.
        old_logprobs, old_values: (...), recomputed by the trainer before the first update.
        rollout_logprobs: (...), as sampled; None if the trainer's own model sampled (w = 1).
        ref_logprobs: (...), of the reference policy; None for no KL term.
        advantages, returns: (...).
        action_mask: (...), bool.
        num_tokens: Action tokens of the whole optimizer batch, so that losses of its micro-batches add up. If the
            engine averages gradients over N ranks or accumulation steps, this number divided by N.

    Returns:
        The scalar loss, and detached **sums** over this call's action tokens (they add up over micro-batches too):
        `policy`, `value`, `kl` (k3 of KL(old policy || reference), absent without one), `entropy`, `ratio` (rho),
        `approx_kl` (k3 of KL(old policy || policy)), `clip_fraction` (tokens whose policy gradient the clip removed)
        and `rollout_ratio` (exp(logp_old - logp_rollout) before the cap).

    Raises:
        ValueError: A tensor's shape is not that of `action_mask`, or `num_tokens` is not positive.
    """
    c, mask = coefficients, action_mask.bool()
    logprobs, values, entropy = (_keep(x, mask) for x in (logprobs, values, entropy))
    old_logprobs, old_values, advantages, returns = (
        _keep(x.detach(), mask) for x in (old_logprobs, old_values, advantages, returns)
    )
    rollout = old_logprobs if rollout_logprobs is None else _keep(rollout_logprobs.detach(), mask)
    ref = logprobs.detach() if ref_logprobs is None else _keep(ref_logprobs.detach(), mask)

    ratio = torch.exp(logprobs - old_logprobs)
    rollout_ratio = torch.exp(old_logprobs - rollout)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - c.clip, 1 + c.clip) * advantages
    policy = -torch.minimum(unclipped, clipped) * rollout_ratio.clamp(max=c.max_importance_weight)

    clipped_values = values.clamp(old_values - c.value_clip, old_values + c.value_clip)
    value = 0.5 * torch.maximum((values - returns).square(), (clipped_values - returns).square())

    kl = 0.5 * (logprobs - ref).square()
    loss = policy + c.value_coef * value + c.kl_coef * kl - c.entropy_coef * entropy
    metrics = {
        "policy": policy,
        "value": value,
        "entropy": entropy,
        "ratio": ratio,
        "approx_kl": k3(old_logprobs, logprobs),
        "clip_fraction": (clipped < unclipped).to(ratio.dtype),
        "rollout_ratio": rollout_ratio,
    }
    if ref_logprobs is not None:
        metrics["kl"] = k3(old_logprobs, ref)
    return _mean(loss, num_tokens), {name: _keep(x.detach(), mask).sum() for name, x in metrics.items()}


def sft_loss(logprobs: Tensor, action_mask: Tensor, *, num_tokens: float) -> Tensor:
    """Negative log-likelihood (nats) of the action tokens, divided by `num_tokens` as in `ppo_loss`.

    Args:
        logprobs, action_mask: (...).

    Returns:
        A scalar whose gradient is exactly 0 at masked positions.
    """
    return -_mean(_keep(logprobs, action_mask.bool()), num_tokens)


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with 0 where masked. Not a product: 0 * NaN is NaN, in the gradient too."""
    if x.shape != mask.shape:
        raise ValueError(
            f"Tensor of shape {tuple(x.shape)}, action_mask of {tuple(mask.shape)}; expected (...) for both."
        )
    return torch.where(mask, x, 0.0)


def _mean(x: Tensor, num_tokens: float) -> Tensor:
    """Sum over `num_tokens`, which is the whole batch's: never the number of tokens in `x`."""
    if num_tokens <= 0:
        raise ValueError(f"num_tokens {num_tokens}: expected the positive number of action tokens of the batch.")
    return x.sum() / num_tokens
