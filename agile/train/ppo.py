"""Segment-level PPO: collect, credit, batch, score, advantages, epochs, sync, checkpoint.

Reads from top to bottom. The mathematics is in `agile.credit` and `agile.losses`; see docs/design.md, section 3.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from agile import ranks
from agile.batching import Row, make_batch, micro_batches, minibatches, session_rows
from agile.copies import original_id
from agile.credit import (
    Estimator,
    SegmentCredit,
    SessionCredit,
    explained_variance,
    gae,
    group_relative,
    lineage,
    transitions,
    whiten,
)
from agile.credit import pad as stack
from agile.engine import Engine
from agile.errors import AgileError
from agile.losses import PPOCoefficients, entropy, ppo_loss, token_logprobs
from agile.reference import Reference
from agile.train.kl import KLControl
from agile.types import BLAMELESS, SegmentEnd, SessionStatus, Trajectory

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Discounts:
    """How value flows inside a session and from one to the next (docs/design.md, section 3).

    Attributes:
        lineage: Per session from a reader back to the writer of what it read; 0 for no such credit.
    """

    gamma: float = 1.0
    lam: float = 1.0
    gamma_session: float = 0.0
    lam_session: float = 0.0
    lineage: float = 0.0


@dataclass(frozen=True, slots=True)
class Scored:
    """What the trainer's own models say of a row's action tokens before the first update; arrays (A,)."""

    logprobs: Floats
    ref_logprobs: Floats
    values: Floats  # of the state before each token
    bootstrap: float  # value after the row's last token


@dataclass(frozen=True, slots=True)
class Played:
    """A session as it is laid out.

    Attributes:
        question: Stream, and place in it; the same for all rollouts of a stream.
        rows: Numbers of its rows.
        reward: Terminal reward, which the critic learns.
        credit: Added to the advantages of its tokens, which the critic does not learn.
    """

    question: tuple[str, int]
    rows: range
    reward: float
    credit: float = 0.0


@torch.no_grad()
def score_rows(
    engine: Engine,
    reference: Reference | None,
    rows: Sequence[Row],
    *,
    micro_batch_tokens: int,
    share_prefixes: bool = False,
    temperature: float = 1.0,
) -> list[Scored]:
    """Recompute logprobs and values of every row, and those of the reference policy (zeros without one)."""
    found: dict[int, Scored] = {}
    parts_of_all = micro_batches(
        rows, np.arange(len(rows)), micro_batch_tokens, share_prefixes=share_prefixes, num_ranks=ranks.world_size()
    )
    for chosen in parts_of_all[ranks.rank()]:
        data = make_batch([rows[i] for i in chosen], engine.device, share_prefixes=share_prefixes)
        logits, values, last = engine.forward(data)
        logprobs = token_logprobs(logits, data.action_ids, temperature)
        if reference is None:
            ref = torch.zeros_like(logprobs)
        else:
            ref = token_logprobs(reference(data)[0], data.action_ids, temperature)
        if not len(chosen):  # others have more rows
            continue
        ends = np.cumsum([rows[i].num_actions for i in chosen])[:-1]
        parts = (np.split(x.cpu().numpy(), ends) for x in (logprobs, ref, values))
        for i, own, other, value, after in zip(chosen.tolist(), *parts, last.tolist(), strict=True):
            found[i] = Scored(own, other, value, after)
    scored = {i: s for part in ranks.gather(found) for i, s in part.items()}
    return [scored[i] for i in range(len(rows))]


def lineage_terms(
    engine: Engine,
    trajectories: Sequence[Trajectory],
    rewards: Sequence[Sequence[float]],
    *,
    discount: float,
    micro_batch_tokens: int,
    share_prefixes: bool = False,
    masked: Collection[SessionStatus] = BLAMELESS,
) -> list[list[float]]:
    """Credit `lineage` of each session of each trajectory; see `agile.credit.lineage`.

    Each session that retrieved something is measured against the value of its first decision without it: one more
    forward pass, over `Session.counterfactual`.
    """
    readers = [
        (t, j, np.array(session.counterfactual, dtype=np.int64))
        for t, trajectory in enumerate(trajectories)
        for j, session in enumerate(trajectory.sessions)
        if session.counterfactual and session.status not in masked
    ]
    rows = [
        Row(ids, np.zeros(len(ids), bool), np.zeros(0, np.float32), SegmentEnd.CONTEXT_CLEARED) for _, _, ids in readers
    ]
    baselines = [np.full(len(trajectory.sessions), np.nan) for trajectory in trajectories]
    found = score_rows(engine, None, rows, micro_batch_tokens=micro_batch_tokens, share_prefixes=share_prefixes)
    for (t, j, _), scored in zip(readers, found, strict=True):
        baselines[t][j] = scored.bootstrap
    return [
        lineage(
            row,
            baseline,
            [session.written for session in trajectory.sessions],
            [[entry for entry, _ in session.retrieved] for session in trajectory.sessions],
            gamma_session=discount,
        ).tolist()
        for trajectory, row, baseline in zip(trajectories, rewards, baselines, strict=True)
    ]


def lay_out(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[Sequence[float]],
    masked: Collection[SessionStatus] = BLAMELESS,
    credits: Sequence[Sequence[float]] | None = None,
) -> tuple[list[Row], list[list[Played]]]:
    """The rows of all sessions in order, and the sessions of each trajectory.

    Args:
        rewards, credits: Of each session of each trajectory, see `Played`; no credits are zeros.
        masked: Sessions that ended so are left out of the loss, and of what flows from session to session.

    Raises:
        AgileError: No session holds a sampled token.
    """
    rows: list[Row] = []
    plan: list[list[Played]] = []
    for trajectory, *figures in zip(trajectories, rewards, credits or [[0.0] * len(r) for r in rewards], strict=True):
        sessions = []
        for session, reward, credit in zip(trajectory.sessions, *figures, strict=True):
            if session.status not in masked:
                start = len(rows)
                rows += session_rows(session)
                question = original_id(trajectory.stream_id), session.index
                sessions.append(Played(question, range(start, len(rows)), reward, credit))
        plan.append(sessions)
    if not any(row.num_actions for row in rows):
        last = next((s for t in reversed(trajectories) for s in reversed(t.sessions)), None)
        raise AgileError(
            "There is nothing to learn from: no session of this iteration holds a token that the LLM sampled. "
            + (f"The last one, {last.id}: {last.status}, {last.error}" if last else "No stream has a question.")
        )
    return rows, plan


def credited(
    engine: Engine,
    trajectories: Sequence[Trajectory],
    rewards: Sequence[Sequence[float]],
    discounts: Discounts,
    *,
    micro_batch_tokens: int,
    share_prefixes: bool,
    masked: Collection[SessionStatus],
) -> tuple[list[Row], list[list[Played]], dict[str, float]]:
    """`lay_out` with the credit `lineage`, where it is asked for, and its mean size under the name that is logged."""
    if not discounts.lineage:
        return *lay_out(trajectories, rewards, masked), {}
    credits = lineage_terms(
        engine,
        trajectories,
        rewards,
        discount=discounts.lineage,
        micro_batch_tokens=micro_batch_tokens,
        share_prefixes=share_prefixes,
        masked=masked,
    )
    size = float(np.mean(np.abs(np.concatenate(credits))))
    return *lay_out(trajectories, rewards, masked, credits), {"lineage": size}


def advantages(
    plan: Sequence[Sequence[Played]],
    rows: Sequence[Row],
    scored: Sequence[Scored],
    discounts: Discounts,
    estimator: Estimator = Estimator.GAE,
) -> tuple[list[Floats], list[Floats], float]:
    """One recursion over each trajectory's action tokens, and each session's credit, laid back onto the rows.

    Args:
        plan, rows: As `lay_out` gives them.

    Returns:
        Advantages, normalised as the estimator does, and returns per row, arrays (A,), and the critic's explained
        variance.
    """
    trust = float(estimator.has_critic)

    def end(row: Row) -> SegmentEnd:
        """Without a critic nothing stands in for what a truncated session lost; the stream goes on behind it."""
        return row.end if estimator.has_critic else SegmentEnd.TERMINATED

    layouts = []
    for sessions in plan:
        credits = [
            SessionCredit(
                tuple(
                    SegmentCredit(rows[i].num_actions, end(rows[i]), trust * scored[i].bootstrap) for i in played.rows
                ),
                played.reward,
            )
            for played in sessions
        ]
        values = [trust * scored[i].values for played in sessions for i in played.rows]
        layouts.append(
            transitions(
                credits,
                np.concatenate([np.zeros(0), *values]),
                gamma=discounts.gamma,
                lam=discounts.lam if estimator.has_critic else 1.0,
                gamma_session=discounts.gamma_session,
                lam_session=discounts.lam_session if estimator.has_critic else 1.0,
            )
        )
    t, mask = stack(layouts)
    raw, returns = gae(t.rewards, t.values, t.next_values, t.discounts, t.lambdas, mask)
    raw[mask] += [p.credit for sessions in plan for p in sessions for i in p.rows for _ in range(rows[i].num_actions)]
    flat = by_group(plan, rows, returns[mask]) if estimator is Estimator.GROUP else whiten(raw, mask)[mask]
    ends = np.cumsum([row.num_actions for row in rows])[:-1]  # rows are numbered in the order of the plan
    row_advantages, row_returns = (np.split(x.astype(np.float32), ends) for x in (flat, returns[mask]))
    return row_advantages, row_returns, explained_variance(t.values, returns, mask)


def by_group(
    plan: Sequence[Sequence[Played]], rows: Sequence[Row], returns: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Advantages (T,) of all action tokens: each has its session's, from the return at its first one."""
    acting = [
        (played.question, num)
        for sessions in plan
        for played in sessions
        if (num := sum(rows[i].num_actions for i in played.rows))
    ]
    lengths = np.array([num for _, num in acting])
    firsts = np.cumsum(lengths) - lengths
    return np.repeat(group_relative(returns[firsts], [question for question, _ in acting]), lengths)


def mismatch(rows: Sequence[Row], scored: Sequence[Scored]) -> dict[str, float]:
    """How the trainer's probabilities of the sampled tokens differ from those that the rollout engine reported.

    Returns:
        Mean of the ratio trainer / rollout, share of tokens whose ratio is outside [0.9, 1.1], and the largest absolute
        difference of the logprobs, in nats.
    """
    difference = np.concatenate([s.logprobs - r.logprobs for r, s in zip(rows, scored, strict=True)]).astype(np.float64)
    ratio = np.exp(difference)
    return {
        "rollout_ratio": float(ratio.mean()),
        "rollout_outside": float(((ratio < 0.9) | (ratio > 1.1)).mean()),
        "rollout_difference": float(np.abs(difference).max()),
    }


def update(
    engine: Engine,
    reference: Reference | None,
    trajectories: Sequence[Trajectory],
    rewards: Sequence[Sequence[float]],
    *,
    discounts: Discounts,
    coefficients: PPOCoefficients,
    batch_size: int,
    micro_batch_tokens: int,
    share_prefixes: bool = False,
    num_epochs: int,
    temperature: float,
    rng: np.random.Generator,
    estimator: Estimator = Estimator.GAE,
    max_epoch_kl: float = math.inf,
    masked: Collection[SessionStatus] = BLAMELESS,
    check: Callable[[Mapping[str, float]], None] = lambda mismatch: None,
) -> dict[str, float]:
    """One PPO iteration on collected trajectories.

    Args:
        rewards: Terminal reward of each session of each trajectory, credit `utility` included.
        max_epoch_kl: After a minibatch whose `approx_kl` is above, the rest of the epochs is left out.
        masked: Sessions that ended so are left out.
        check: Called with `mismatch` of rollout and trainer before anything is learned; may raise.

    Returns:
        Means over the action tokens of all steps that were not skipped, NaN if all were; `first_ratio` is the mean
        ratio at the first minibatch, which must be 1; `epochs`, how many were done, skipped steps left out.
    """
    rows, plan, credit = credited(
        engine,
        trajectories,
        rewards,
        discounts,
        micro_batch_tokens=micro_batch_tokens,
        share_prefixes=share_prefixes,
        masked=masked,
    )
    with nullcontext() if reference is None else reference.scoring():
        scored = score_rows(
            engine,
            reference,
            rows,
            micro_batch_tokens=micro_batch_tokens,
            share_prefixes=share_prefixes,
            temperature=temperature,
        )
    between = mismatch(rows, scored)
    check(between)
    row_advantages, row_returns, variance = advantages(plan, rows, scored, discounts, estimator)

    def flat(arrays: Iterable[Floats]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *arrays])).to(engine.device)

    sums: dict[str, float] = defaultdict(float)
    total_tokens, first_ratio, norms, moved_too_far = 0, float("nan"), [], False
    epoch_tokens = sum(row.num_actions for row in rows)
    for _ in range(num_epochs):
        for batch in minibatches(rows, batch_size, rng):
            if moved_too_far:
                break
            num_tokens = sum(rows[i].num_actions for i in batch)
            batch_sums: dict[str, float] = defaultdict(float)
            micros = micro_batches(
                rows, batch, micro_batch_tokens, share_prefixes=share_prefixes, num_ranks=ranks.world_size()
            )[ranks.rank()]
            for micro in micros:
                data = make_batch([rows[i] for i in micro], engine.device, share_prefixes=share_prefixes)
                logits, values, _ = engine.forward(data)
                logprobs = token_logprobs(logits, data.action_ids, temperature)
                with torch.set_grad_enabled(coefficients.entropy_coef > 0):
                    entropies = entropy(logits, temperature)
                loss, metrics = ppo_loss(
                    logprobs=logprobs,
                    old_logprobs=flat(scored[i].logprobs for i in micro),
                    rollout_logprobs=flat(rows[i].logprobs for i in micro),
                    ref_logprobs=None if reference is None else flat(scored[i].ref_logprobs for i in micro),
                    values=values,
                    old_values=flat(scored[i].values for i in micro),
                    advantages=flat(row_advantages[i] for i in micro),
                    returns=flat(row_returns[i] for i in micro),
                    entropy=entropies,
                    action_mask=torch.ones_like(logprobs, dtype=torch.bool),
                    num_tokens=num_tokens,
                    coefficients=coefficients,
                )
                engine.backward(loss, last=micro is micros[-1])
                for name, value in metrics.items():
                    batch_sums[name] += value.item()
            norm, of_all = engine.step(), ranks.total(batch_sums)
            for name, total in of_all.items():
                sums[name] += 0.0 if engine.skipped else total
            if engine.skipped:
                continue
            norms.append(norm)
            if total_tokens == 0:
                first_ratio = of_all["ratio"] / num_tokens
            total_tokens += num_tokens
            moved_too_far = of_all["approx_kl"] > max_epoch_kl * num_tokens
    return {
        "first_ratio": first_ratio,
        **between,
        **credit,
        "explained_variance": variance,
        "grad_norm": float(np.mean(norms)) if norms else math.nan,
        "num_rows": float(len(rows)),
        "num_action_tokens": float(epoch_tokens),
        "epochs": total_tokens / epoch_tokens,
        **{name: value / total_tokens if total_tokens else math.nan for name, value in sums.items()},
    }


def train_ppo(
    engine: Engine,
    reference: Reference | None,
    *,
    collect: Callable[[int], Sequence[Trajectory]],
    rewards: Callable[[Sequence[Trajectory], np.random.Generator], Sequence[Sequence[float]]],
    on_iteration: Callable[[int, Sequence[Trajectory], dict[str, float]], None],
    first_iteration: int,
    num_iterations: int,
    value_warmup_epochs: int,
    discounts: Discounts,
    coefficients: PPOCoefficients,
    batch_size: int,
    micro_batch_tokens: int,
    share_prefixes: bool = False,
    num_epochs: int,
    temperature: float,
    seed: int,
    estimator: Estimator = Estimator.GAE,
    kl_control: KLControl | None = None,
    max_epoch_kl: float = math.inf,
    lr_factor: Callable[[int], float] = lambda iteration: 1.0,
    masked: Collection[SessionStatus] = BLAMELESS,
    check: Callable[[int, Mapping[str, float]], None] = lambda iteration, mismatch: None,
) -> None:
    """Collect and learn, `num_iterations` times, of which `first_iteration` are done.

    Whatever is random in an iteration derives from `seed` and its number, so that a resumed run is the same run.

    Args:
        collect: Plays the streams of an iteration with the engine's current weights.
        rewards: Terminal reward of each session of each trajectory, credit `utility` included.
        on_iteration: Called after each with its number (from 1), its trajectories and metrics.
        value_warmup_epochs: Epochs of the first iteration, which then trains the critic alone; 0 for none. A critic
            that is still far off pushes up whatever is done most, good or bad, and cannot tell what memory gains: the
            warm-up goes without lineage.
        kl_control: Gives `kl_coef` in place of `coefficients`, and is told the KL of each iteration but the warm-up, in
            which the policy stands still.
        max_epoch_kl: As in `update`; not in the warm-up.
        lr_factor: On every learning rate, by the number of the iteration, from 0.
        masked: Sessions that ended so are left out of the loss.
        check: Called in each iteration with its number (from 0) and the `mismatch` of rollout and trainer, before
            anything is learned; may raise.
    """
    for iteration in range(first_iteration, num_iterations):
        rng = np.random.default_rng([seed, iteration])
        trajectories = collect(iteration)
        warmup = iteration == 0 and value_warmup_epochs > 0
        kl_coef = coefficients.kl_coef if kl_control is None else kl_control.coef
        engine.scale_lr(lr_factor(iteration))
        with engine.module.policy_frozen() if warmup else nullcontext():
            metrics = update(
                engine,
                reference,
                trajectories,
                rewards(trajectories, rng),
                discounts=replace(discounts, lineage=0.0) if warmup else discounts,
                coefficients=replace(
                    coefficients,
                    kl_coef=kl_coef,
                    value_clip=math.inf if warmup else coefficients.value_clip,  # it has a long way to go
                ),
                batch_size=batch_size,
                micro_batch_tokens=micro_batch_tokens,
                share_prefixes=share_prefixes,
                num_epochs=value_warmup_epochs if warmup else num_epochs,
                temperature=temperature,
                rng=rng,
                estimator=estimator,
                max_epoch_kl=max_epoch_kl,
                masked=masked,
                check=partial(check, iteration),
            )
        if kl_control is not None and not warmup and metrics["epochs"] > 0:
            kl_control.observe(metrics.get("kl", 0.0))
        on_iteration(iteration + 1, trajectories, {**metrics, "kl_coef": kl_coef, "lr": engine.lr})
