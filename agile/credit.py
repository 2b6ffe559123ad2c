"""Credit: what each action token of a trajectory earned, by one GAE across segments and sessions.

`transitions` lays a trajectory out as arrays over its action tokens, `pad` stacks trajectories, `gae` runs over them.
All boundaries are data, per-token discounts and lambdas, so the recursion knows none.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agile.types import SegmentEnd

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


# --------------------------------------------------------------------------------------------------------------------
# Rewards: what a session is worth, to itself and to later ones


class Credit(StrEnum):
    """How a session is credited for what its memory brings to later ones."""

    NONE = "none"
    UTILITY = "utility"  # the paper's bonus for asking what will come up again
    CHAIN = "chain"  # no bonus: gamma_session > 0 lets `gae` carry later rewards back
    LINEAGE = "lineage"  # what sessions gained from the entries that this one wrote


def utility(similarities: ArrayLike, advised: ArrayLike, *, beta: float = 0.1, threshold: float = 0.46) -> Floats:
    """Bonus of each session of a stream for advice that later questions can reuse.

        beta * 1[N > 0] / (M + 1)   if advised, else 0

    N is the number of later and M of earlier questions of the stream with at least `threshold` similarity to its own.
    Source: AGILE, arXiv 2405.14751, Eq. 7.

    Args:
        similarities: (n, n), cosine of the questions' embeddings, in stream order.
        advised: (n,), whether an expert answered.

    Returns:
        (n,).
    """
    similar = np.asarray(similarities, dtype=np.float64) >= threshold
    asked = np.asarray(advised, dtype=np.bool_)
    if similar.shape != (asked.size, asked.size):
        raise ValueError(f"similarities of shape {similar.shape} for {asked.size} sessions; expected (n, n).")
    earlier = np.tril(similar, -1).sum(axis=1)
    later = np.triu(similar, 1).any(axis=1)
    return np.where(asked & later, beta / (earlier + 1), 0.0)


def lineage(
    rewards: ArrayLike,
    baselines: ArrayLike,
    written: Sequence[Collection[int]],
    retrieved: Sequence[Collection[int]],
    *,
    gamma_session: float,
) -> Floats:
    """What the sessions of a stream gained from the memory that each of them wrote.

        L_i = sum over j > i of gamma_session^(j - i) * |W_i & R_j| / |R_j| * (r_j - b_j)

    Each entry has an equal share in what its reader gained over the critic's value of the same session without any. The
    critic learns the task's rewards alone, so both sides of the difference are of one kind, whatever the reader is
    credited for in its turn.

    Args:
        rewards: (n,), r_j, totals of the task's rewards, in stream order.
        baselines: (n,), b_j, the critic's value of each session's first decision with what it retrieved taken out of
            its context; NaN where there is none (nothing retrieved, nothing decided, left out of the loss), which
            credits nobody.
        written: n sets W_i, ids of the memory entries that each session wrote.
        retrieved: n sets R_j, ids of those that each was shown; an id that no earlier session of the stream wrote takes
            its share along, and one that is listed twice counts once.

    Returns:
        (n,).
    """
    reward, baseline = np.asarray(rewards, dtype=np.float64), np.asarray(baselines, dtype=np.float64)
    if not len(reward) == len(baseline) == len(written) == len(retrieved):
        raise ValueError(
            f"{len(reward)} rewards, {len(baseline)} baselines, {len(written)} written and {len(retrieved)} retrieved; "
            "expected one of each for every session."
        )
    writer = {entry: i for i, entries in enumerate(written) for entry in entries}
    weights = np.zeros((len(reward), len(reward)))  # [i, j], what i gets of each unit that j gained
    for j in np.flatnonzero(~np.isnan(baseline)):
        entries = set(retrieved[j])
        for i in (writer.get(entry, j) for entry in entries):
            if i < j:
                weights[i, j] += gamma_session ** (j - i) / len(entries)
    gained = np.where(np.isnan(baseline), 0.0, reward - baseline)
    return np.asarray(weights @ gained, dtype=np.float64)


def session_rewards(
    rewards: ArrayLike,
    mode: Credit,
    *,
    similarities: ArrayLike | None = None,
    advised: ArrayLike | None = None,
    beta: float = 0.1,
    threshold: float = 0.46,
) -> Floats:
    """Terminal reward of each session of a stream, the credit term of `mode` included.

    Only `utility` adds something here: in `chain` the credit comes from `transitions` with gamma_session > 0, and
    `lineage` needs the critic, so the trainer adds it, to advantages.

    Args:
        rewards: (n,), totals of the task's rewards, in stream order.
        similarities, advised, beta, threshold: See `utility`; needed for that mode only.

    Returns:
        (n,).

    Raises:
        ValueError: `utility` without similarities or advised.
    """
    base = np.asarray(rewards, dtype=np.float64)
    if mode != Credit.UTILITY:
        return base
    if similarities is None or advised is None:
        raise ValueError("Credit 'utility' needs both the questions' similarities and which sessions were advised.")
    return base + utility(similarities, advised, beta=beta, threshold=threshold)


# --------------------------------------------------------------------------------------------------------------------
# Layout: one trajectory as arrays over its action tokens


@dataclass(frozen=True, slots=True)
class SegmentCredit:
    """One context window.

    Attributes:
        num_actions: Number of its action tokens; may be 0.
        end: How it ended.
        bootstrap: The critic's value after its last token; read only if it was `TRUNCATED`.
    """

    num_actions: int
    end: SegmentEnd
    bootstrap: float = 0.0


@dataclass(frozen=True, slots=True)
class SessionCredit:
    """One session: its context windows in order, and its terminal reward with the credit term."""

    segments: tuple[SegmentCredit, ...]
    reward: float


@dataclass(frozen=True, slots=True, eq=False)
class Transitions:
    """What `gae` needs: (T,) over the action tokens of one trajectory, or (N, T) after `pad`."""

    rewards: Floats
    values: Floats
    next_values: Floats
    discounts: Floats
    lambdas: Floats


def transitions(
    sessions: Sequence[SessionCredit],
    values: ArrayLike,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    gamma_session: float = 0.0,
    lam_session: float = 0.95,
) -> Transitions:
    """Lay out a trajectory's action tokens in order, across segments and sessions.

    | last action token of      | next value        | discount        | lambda        |
    |---------------------------|-------------------|-----------------|---------------|
    | a cleared context         | V of next action  | `gamma`         | `lam`         |
    | a truncated segment       | its `bootstrap`   | `gamma`         | 0             |
    | a session before another  | V of next action  | `gamma_session` | `lam_session` |
    | the trajectory            | 0                 | 0               | 0             |

    and as in the first row everywhere inside a segment. A session is truncated if its last segment is. A segment
    without actions ends where the session's last action before it stands. A session without any action (the policy
    failed at once) has nothing that could have earned its reward: it is skipped, and the sessions around it are
    neighbours.

    Args:
        sessions: Of one stream, in order.
        values: (T,), V(s_t) of every action token in order.

    Returns:
        Arrays (T,); rewards are 0 but at each session's last action.

    Raises:
        ValueError: `values` is not as long as there are action tokens.
    """
    v = np.asarray(values, dtype=np.float64)
    acting = [s for s in sessions if any(segment.num_actions for segment in s.segments)]
    num_actions = sum(segment.num_actions for s in acting for segment in s.segments)
    if v.shape != (num_actions,):
        raise ValueError(f"values of shape {v.shape} but {num_actions} action tokens; expected one value for each.")
    rewards = np.zeros(num_actions)
    next_values = np.append(v[1:], 0.0)[:num_actions]
    discounts = np.full(num_actions, gamma)
    lambdas = np.full(num_actions, lam)

    start = end = 0  # of the session's action tokens
    for session in acting:
        for segment in session.segments:
            end += segment.num_actions
            if segment.end is SegmentEnd.TRUNCATED and end > start:
                next_values[end - 1], lambdas[end - 1] = segment.bootstrap, 0.0
        last, start = end - 1, end
        rewards[last] = session.reward
        if session.segments[-1].end is SegmentEnd.TRUNCATED:
            continue
        if end < num_actions:
            next_values[last], discounts[last], lambdas[last] = v[end], gamma_session, lam_session
        else:
            next_values[last], discounts[last], lambdas[last] = 0.0, 0.0, 0.0
    return Transitions(rewards, v, next_values, discounts, lambdas)


def pad(trajectories: Sequence[Transitions]) -> tuple[Transitions, Bools]:
    """Stack N trajectories, zeros on the right.

    Returns:
        Arrays (N, T) with T the longest, and the mask (N, T) of real tokens: `advantages[mask]` is, flat and in
        order, one entry per action token.
    """
    lengths = np.array([len(t.rewards) for t in trajectories], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]

    def stacked(name: str) -> Floats:
        out = np.zeros(mask.shape)
        out[mask] = np.concatenate([np.zeros(0), *(getattr(t, name) for t in trajectories)])
        return out

    return Transitions(**{f.name: stacked(f.name) for f in fields(Transitions)}), mask


# --------------------------------------------------------------------------------------------------------------------
# Advantages


class Estimator(StrEnum):
    """How advantages are found. Without a critic values are 0 and lambdas 1: returns are discounted sums of rewards."""

    GAE = "gae"  # generalised advantage estimation with a critic, whitened
    GROUP = "group"  # GRPO: returns of a session, normalised over the rollouts of the same question
    REINFORCE = "reinforce++"  # returns of each token, whitened

    @property
    def has_critic(self) -> bool:
        return self is Estimator.GAE


def gae(
    rewards: Floats, values: Floats, next_values: Floats, discounts: Floats, lambdas: Floats, mask: Bools
) -> tuple[Floats, Floats]:
    """Generalised advantage estimation with a discount and a lambda per transition.

        delta_t = r_t + g_t * V(s_{t+1}) - V(s_t)
        A_t     = delta_t + g_t * lam_t * A_{t+1}        R_t = A_t + V(s_t)

    Args:
        rewards, values, next_values, discounts, lambdas, mask: (N, T). Masked positions, wherever they stand and
            whatever they hold, are skipped: t + 1 is the next position that is not masked.

    Returns:
        Advantages and returns, (N, T), 0 where masked. Source: Schulman et al., arXiv 1506.02438, Eq. 16.
    """
    r, v, v_next, g, lam = (np.where(mask, x, 0.0) for x in (rewards, values, next_values, discounts, lambdas))
    delta, decay = r + g * v_next - v, g * lam
    advantages = np.zeros_like(delta)
    following = np.zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        following = np.where(mask[:, t], delta[:, t] + decay[:, t] * following, following)
        advantages[:, t] = following
    advantages = np.where(mask, advantages, 0.0)
    return advantages, advantages + v


def group_relative(returns: ArrayLike, groups: Sequence[Hashable]) -> Floats:
    """Advantages relative to the group that a rollout belongs to.

        A_i = (R_i - mean of its group) / (population) standard deviation of its group

    Args:
        returns: (n,), one for each rollout.
        groups: n names; rollouts of one name are compared with each other.

    Returns:
        (n,), 0 in groups of one and in those without spread up to rounding, as in `whiten`. Source: Shao et al., arXiv
        2402.03300, section 4.1.2.
    """
    values = np.asarray(returns, dtype=np.float64)
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    number_of = np.array([names[name] for name in groups], dtype=np.int64)
    advantages = np.zeros_like(values)
    for number in range(len(names)):
        members = number_of == number
        advantages += whiten(values, members)
    return advantages


def whiten(advantages: Floats, mask: Bools) -> Floats:
    """Shift and scale to mean 0 and (population) standard deviation 1 over the unmasked entries.

    A standard deviation below 1e-8, or below 1e-8 of the mean, is rounding: such entries, and a single one, become
    0 up to rounding.

    Args:
        advantages, mask: Any one shape.

    Returns:
        The same shape, 0 where masked.
    """
    kept = advantages[mask]
    if not kept.size:
        return np.zeros_like(advantages)
    mean, std = kept.mean(), kept.std()
    scale = std if std > 1e-8 * max(1.0, abs(mean)) else 1.0
    return np.where(mask, (advantages - mean) / scale, 0.0)


def explained_variance(values: Floats, returns: Floats, mask: Bools) -> float:
    """Share of the returns' variance that the critic explains, 1 - Var(R - V) / Var(R).

    Args:
        values, returns, mask: Any one shape.

    Returns:
        At most 1; negative if the critic is worse than a constant; 0 if the returns do not vary.
    """
    kept = returns[mask]
    variance = float(kept.var()) if kept.size else 0.0
    return 1.0 - float((kept - values[mask]).var()) / variance if variance > 0 else 0.0
