"""Segment-level PPO: collect, credit, batch, score, advantages, epochs, sync, checkpoint.

Reads from top to bottom. The mathematics is in `agile.credit` and `agile.losses`; see docs/design.md, section 3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad as shift

from agile.batching import Row, attention_mask, minibatches, pad, session_rows
from agile.credit import SegmentCredit, SessionCredit, explained_variance, gae, transitions, whiten
from agile.credit import pad as stack
from agile.engine import Engine
from agile.losses import PPOCoefficients, entropy, ppo_loss, token_logprobs
from agile.types import SegmentEnd, Session, SessionStatus, Trajectory


@dataclass(frozen=True, slots=True)
class Discounts:
    """How value flows inside a session and from one to the next (docs/design.md, section 3)."""

    gamma: float = 1.0
    lam: float = 1.0
    gamma_session: float = 0.0
    lam_session: float = 0.0


@dataclass(frozen=True, slots=True)
class Scored:
    """What the trainer's own models say of the tokens of a row before the first update; arrays (T,)."""

    logprobs: np.ndarray
    ref_logprobs: np.ndarray
    values: np.ndarray  # of the state before each token
    bootstrap: float  # value after the last token


@torch.no_grad()
def score_rows(
    engine: Engine, reference: torch.nn.Module | None, rows: Sequence[Row], *, batch_size: int, temperature: float
) -> list[Scored]:
    """Recompute logprobs and values of every row, and those of the reference policy (zeros without one)."""
    scored: list[Scored | None] = [None] * len(rows)
    order = np.argsort([len(r) for r in rows], kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = pad([rows[i].token_ids for i in chosen]).to(engine.device)
        mask = attention_mask([rows[i].token_ids for i in chosen]).to(engine.device)
        logits, after = engine.forward(ids, mask)
        logprobs = token_logprobs(logits, ids, temperature)
        if reference is None:
            ref = torch.zeros_like(logprobs)
        else:
            ref = token_logprobs(reference(ids, mask)[0], ids, temperature)
        before = shift(after[:, :-1], (1, 0))
        for row, i in enumerate(chosen):
            n = len(rows[i])
            scored[i] = Scored(
                logprobs[row, :n].cpu().numpy(),
                ref[row, :n].cpu().numpy(),
                before[row, :n].float().cpu().numpy(),
                float(after[row, n - 1]),
            )
    return [s for s in scored if s is not None]


def advantages(
    trajectories: Sequence[Sequence[tuple[list[int], Session, float]]],
    rows: Sequence[Row],
    scored: Sequence[Scored],
    discounts: Discounts,
) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """One GAE over each trajectory's action tokens, laid back onto the rows.

    Args:
        trajectories: For each stream its sessions in order: numbers of their rows, the session, its reward.

    Returns:
        Whitened advantages and returns per row, arrays (T,), and the critic's explained variance.
    """
    layouts = []
    for sessions in trajectories:
        credits, values = [], []
        for numbers, session, reward in sessions:
            ends = [s.end for s in session.segments if any(s.action_mask)]
            segments = tuple(
                SegmentCredit(rows[i].num_actions, end, scored[i].bootstrap)
                for i, end in zip(numbers, ends, strict=True)
            )
            credits.append(SessionCredit(segments, reward))
            values += [scored[i].values[rows[i].action_mask] for i in numbers]
        flat = np.concatenate([np.zeros(0), *values])
        layouts.append(
            transitions(
                credits,
                flat,
                gamma=discounts.gamma,
                lam=discounts.lam,
                gamma_session=discounts.gamma_session,
                lam_session=discounts.lam_session,
            )
        )
    t, mask = stack(layouts)
    raw, returns = gae(t.rewards, t.values, t.next_values, t.discounts, t.lambdas, mask)
    variance = explained_variance(t.values, returns, mask)
    flat_advantages, flat_returns = whiten(raw, mask)[mask], returns[mask]
    row_advantages = [np.zeros(len(r), dtype=np.float32) for r in rows]
    row_returns = [np.zeros(len(r), dtype=np.float32) for r in rows]
    place = 0
    for sessions in trajectories:
        for numbers, _, _ in sessions:
            for i in numbers:
                n = rows[i].num_actions
                row_advantages[i][rows[i].action_mask] = flat_advantages[place : place + n]
                row_returns[i][rows[i].action_mask] = flat_returns[place : place + n]
                place += n
    return row_advantages, row_returns, variance


def update(
    engine: Engine,
    reference: torch.nn.Module | None,
    trajectories: Sequence[Trajectory],
    rewards: Sequence[Sequence[float]],
    *,
    discounts: Discounts,
    coefficients: PPOCoefficients,
    batch_size: int,
    micro_batch_size: int,
    num_epochs: int,
    temperature: float,
    train_policy: bool,
    rng: np.random.Generator,
) -> dict[str, float]:
    """One PPO iteration on collected trajectories; failed sessions are masked from the loss.

    Args:
        rewards: Terminal reward of each session of each trajectory, credit term included.
        train_policy: False trains the critic alone.

    Returns:
        Means over action tokens; `first_ratio` is the mean ratio at the first minibatch, which must be 1.
    """
    rows: list[Row] = []
    plan: list[list[tuple[list[int], Session, float]]] = []
    for trajectory, trajectory_rewards in zip(trajectories, rewards, strict=True):
        plan.append([])
        for session, reward in zip(trajectory.sessions, trajectory_rewards, strict=True):
            if session.status is SessionStatus.FAILED:
                continue
            own = session_rows(session)
            plan[-1].append((list(range(len(rows), len(rows) + len(own))), session, reward))
            rows += own

    scored = score_rows(engine, reference, rows, batch_size=micro_batch_size, temperature=temperature)
    row_advantages, row_returns, variance = advantages(plan, rows, scored, discounts)

    sums: dict[str, float] = defaultdict(float)
    total_tokens, first_ratio, norms = 0, float("nan"), []
    lengths = [len(r) for r in rows]
    for _ in range(num_epochs):
        for batch in minibatches(lengths, batch_size, micro_batch_size, rng):
            num_tokens = sum(rows[i].num_actions for micro in batch for i in micro)
            batch_ratio = 0.0
            for micro in batch:
                chosen = [rows[i] for i in micro]
                ids = pad([r.token_ids for r in chosen]).to(engine.device)
                logits, after = engine.forward(ids, attention_mask([r.token_ids for r in chosen]))

                def padded(arrays: list[np.ndarray]) -> torch.Tensor:
                    return pad(arrays).to(engine.device)

                logprobs = token_logprobs(logits, ids, temperature)
                loss, metrics = ppo_loss(
                    logprobs=logprobs if train_policy else logprobs.detach(),
                    old_logprobs=padded([scored[i].logprobs for i in micro]),
                    rollout_logprobs=padded([r.logprobs for r in chosen]),
                    ref_logprobs=None if reference is None else padded([scored[i].ref_logprobs for i in micro]),
                    values=shift(after[:, :-1], (1, 0)),
                    old_values=padded([scored[i].values for i in micro]),
                    advantages=padded([row_advantages[i] for i in micro]),
                    returns=padded([row_returns[i] for i in micro]),
                    entropy=entropy(logits if train_policy else logits.detach(), temperature),
                    action_mask=padded([r.action_mask for r in chosen]),
                    num_tokens=num_tokens,
                    coefficients=coefficients,
                )
                engine.backward(loss, last=micro is batch[-1])
                batch_ratio += metrics["ratio"].item()
                for name, value in metrics.items():
                    sums[name] += value.item()
            norms.append(engine.step())
            if total_tokens == 0:
                first_ratio = batch_ratio / num_tokens
            total_tokens += num_tokens
    return {
        "first_ratio": first_ratio,
        "explained_variance": variance,
        "grad_norm": float(np.mean(norms)),
        "num_rows": float(len(rows)),
        "num_action_tokens": float(total_tokens / num_epochs),
        **{name: value / total_tokens for name, value in sums.items()},
    }


def train_ppo(
    engine: Engine,
    reference: torch.nn.Module | None,
    *,
    collect: Callable[[int], Sequence[Trajectory]],
    rewards: Callable[[Sequence[Trajectory], np.random.Generator], Sequence[Sequence[float]]],
    on_iteration: Callable[[int, Sequence[Trajectory], dict[str, float]], None],
    first_iteration: int,
    num_iterations: int,
    value_warmup_iterations: int,
    discounts: Discounts,
    coefficients: PPOCoefficients,
    batch_size: int,
    micro_batch_size: int,
    num_epochs: int,
    temperature: float,
    seed: int,
) -> None:
    """Collect and learn, `num_iterations` times, of which `first_iteration` are done.

    Whatever is random in an iteration derives from `seed` and its number, so that a resumed run is the same run.

    Args:
        collect: Plays the streams of an iteration with the engine's current weights.
        rewards: Terminal reward of each session of each trajectory, credit term included.
        on_iteration: Called after each with its number (from 1), its trajectories and metrics.
        value_warmup_iterations: How many first iterations train the critic alone.
    """
    for iteration in range(first_iteration, num_iterations):
        rng = np.random.default_rng([seed, iteration])
        trajectories = collect(iteration)
        metrics = update(
            engine,
            reference,
            trajectories,
            rewards(trajectories, rng),
            discounts=discounts,
            coefficients=coefficients,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            num_epochs=num_epochs,
            temperature=temperature,
            train_policy=iteration >= value_warmup_iterations,
            rng=rng,
        )
        on_iteration(iteration + 1, trajectories, metrics)
