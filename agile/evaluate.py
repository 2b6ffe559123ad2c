"""What an agent achieved: accuracy, advice rate and score, with bootstrap intervals. Pure functions over outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agile.types import Trajectory

Floats = NDArray[np.float64]

MIN_STREAMS = 10  # fewer streams than this are too few to resample; blocks of questions are resampled instead


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question went.

    Attributes:
        position: Index of the question in its stream, from 0.
        length: Number of questions in its stream.
        correct: Whether it counts as right; the task says when an expert's answer does.
        advised: Whether an expert answered (and was paid).
        failed: Whether the session broke off; it is then not correct.
    """

    item_id: str
    stream_id: str
    position: int
    length: int
    kind: str
    correct: bool
    advised: bool
    failed: bool = False


def outcomes(trajectories: Iterable[Trajectory]) -> list[Outcome]:
    """One outcome per session, right if its reward has `correct` above 0.5: the task decides, see `Task.score`.

    Raises:
        ValueError: A session has no reward.
    """
    result = []
    for trajectory in trajectories:
        for session in trajectory.sessions:
            if session.reward is None:
                raise ValueError(f"Session {session.id} has no reward; score it before it is evaluated.")
            result.append(
                Outcome(
                    session.item_id,
                    trajectory.stream_id,
                    session.index,
                    len(trajectory.sessions),
                    session.kind,
                    session.reward.components.get("correct", 0.0) > 0.5,
                    session.advised,
                    session.failed,
                )
            )
    return result


def by_stream(results: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each stream (ProductQA: of each product group), in order of appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in results:
        groups.setdefault(outcome.stream_id, []).append(outcome)
    return groups


def rates(results: Sequence[Outcome], price: float | Sequence[float], macro: bool = False) -> dict[str, float | int]:
    """`accuracy`, `advice_rate`, `score` and `n`; see `summarise`. `price` may be one for each outcome."""
    weights = _weights(results, macro)
    accuracy = float(np.average([o.correct for o in results], weights=weights))
    advice_rate = float(np.average([o.advised for o in results], weights=weights))
    return {
        "accuracy": accuracy,
        "advice_rate": advice_rate,
        "score": float(np.average(_scores(results, price), weights=weights)),
        "n": len(results),
    }


def summarise(
    results: Sequence[Outcome],
    price: float,
    *,
    macro: bool = False,
    bins: int = 8,
    seed: int = 0,
    num_resamples: int = 2000,
) -> dict[str, Any]:
    """Accuracy, advice rate and score = accuracy - price * advice rate, in all, by question type and by position.

    With at least 10 streams the interval comes from resampling streams, for questions of one stream share a memory;
    with fewer, from resampling blocks of consecutive questions, as long as the cube root of the stream's length (the
    optimal order for a block bootstrap's variance: Hall, Horowitz and Jing, 1995).

    Args:
        macro: Weigh every stream alike (the mean of the streams' figures, as ProductQA is reported), not every
            question alike.
        bins: Number of equal parts of the stream in `by_position`. A quarter is two eighths weighted by their `n`.

    Returns:
        `accuracy`, `advice_rate`, `score`, `n`, `score_ci` (95 %), `failed` (a number of sessions), `by_type`
        (a dict of the first four per kind) and `by_position` (a list of them with `from` and `to`, shares of the
        stream; parts without a question are left out). Plain JSON values.

    Raises:
        ValueError: There are no outcomes.
    """
    if not results:
        raise ValueError("No outcomes to summarise; expected at least one question.")
    parts: dict[int, list[Outcome]] = {}
    kinds: dict[str, list[Outcome]] = {}
    for outcome in results:
        parts.setdefault(outcome.position * bins // outcome.length, []).append(outcome)
        kinds.setdefault(outcome.kind, []).append(outcome)
    means = _resampled_means(results, _scores(results, price), _weights(results, macro), seed, num_resamples)
    return {
        **rates(results, price, macro),
        "score_ci": _interval(means),
        "failed": sum(o.failed for o in results),
        "by_type": {kind: rates(kinds[kind], price, macro) for kind in sorted(kinds)},
        "by_position": [
            {"from": part / bins, "to": (part + 1) / bins, **rates(parts[part], price, macro)} for part in sorted(parts)
        ],
    }


def paired_difference(
    a: Sequence[Outcome],
    b: Sequence[Outcome],
    price: float,
    *,
    macro: bool = False,
    seed: int = 0,
    num_resamples: int = 2000,
) -> dict[str, Any]:
    """How much higher `a` scores than `b` on the same questions, by a paired bootstrap (units as in `summarise`).

    Returns:
        `difference` of the scores, `ci` (95 %) and the two-sided `p`, the share of resampled differences at least as
        far from the difference as it is from 0.

    Raises:
        ValueError: `a` and `b` are not about the same questions, or one holds a question twice.
    """
    first, second = ({(o.stream_id, o.item_id): o for o in results} for results in (a, b))
    if len(first) != len(a) or len(second) != len(b) or not first:
        raise ValueError(
            f"{len(a)} and {len(b)} outcomes of {len(first)} and {len(second)} questions; expected each once."
        )
    if odd := first.keys() ^ second.keys():
        raise ValueError(
            f"{len(odd)} questions were answered by one side only, for example {min(odd)}; a paired comparison needs "
            "both agents on the same questions."
        )
    values = _scores(a, price) - _scores([second[key] for key in first], price)
    weights = _weights(a, macro)
    difference = float(np.average(values, weights=weights))
    means = _resampled_means(a, values, weights, seed, num_resamples)
    # The slack lets a difference of exactly 0 count rounding errors as equal.
    extreme = int(np.sum(np.abs(means - difference) >= abs(difference) - 1e-12))
    return {"difference": difference, "ci": _interval(means), "p": (extreme + 1) / (num_resamples + 1)}


def _scores(results: Sequence[Outcome], price: float | Sequence[float]) -> Floats:
    correct, advised = (np.array([getattr(o, name) for o in results], np.float64) for name in ("correct", "advised"))
    return correct - np.asarray(price) * advised


def _weights(results: Sequence[Outcome], macro: bool) -> Floats:
    """1 per question, or under `macro` 1 per stream, shared by its questions."""
    if not macro:
        return np.ones(len(results))
    _, stream, counts = np.unique([o.stream_id for o in results], return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[stream], dtype=np.float64)


def _resampled_means(
    results: Sequence[Outcome], values: Floats, weights: Floats, seed: int, num_resamples: int
) -> Floats:
    """Weighted means of `num_resamples` draws of units with replacement, shape (num_resamples,)."""
    streams, stream = np.unique([o.stream_id for o in results], return_inverse=True)
    unit = stream
    if len(streams) < MIN_STREAMS:
        block = [o.position // max(1, round(o.length ** (1 / 3))) for o in results]
        _, unit = np.unique(np.stack([stream, np.array(block)]), axis=1, return_inverse=True)
    total, mass = np.bincount(unit, weights * values), np.bincount(unit, weights)
    draws = np.random.default_rng(seed).integers(len(mass), size=(num_resamples, len(mass)))
    return np.asarray(total[draws].sum(axis=1) / mass[draws].sum(axis=1), dtype=np.float64)


def _interval(means: Floats) -> list[float]:
    return [float(q) for q in np.quantile(means, (0.025, 0.975))]
