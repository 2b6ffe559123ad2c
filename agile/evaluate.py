"""What an agent achieved: accuracy, advice rate and score, with bootstrap intervals. Pure functions over outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from agile.types import Trajectory

Floats = NDArray[np.float64]

GRADE = "grade"  # the component of a reward that a grader gave
TRAINED = ("dpo", "ppo", "sft")  # names of agents from the last stage of training to the first
MIN_STREAMS = 10  # fewer streams than this are too few to resample; blocks of questions are resampled instead
MIN_BLOCKS = 6  # of a stream: two of 10 questions each are equal too often, and far apart too often


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question went.

    Attributes:
        position: Index of the question in its stream, from 0.
        length: Number of questions in its stream.
        correct: Whether it counts as right; the task says when an expert's answer does.
        advised: Whether an expert answered (and was paid).
        failed: Whether the session broke off; it is then not correct.
        grade: What a grader gave, where one grades; it then counts in the score in place of `correct`.
        questions: Names the stream's questions where several runs played the same ones; these are resampled together.
    """

    item_id: str
    stream_id: str
    position: int
    length: int
    kind: str
    correct: bool
    advised: bool
    failed: bool = False
    grade: float | None = None
    questions: str | None = None


def outcomes(trajectories: Iterable[Trajectory]) -> list[Outcome]:
    """One outcome per session, right if its reward has `correct` above 0.5: the task decides, see `Task.score`.

    Where answers are graded, those of grade 1 and above are right.

    Raises:
        ValueError: A session has no reward.
    """
    result = []
    for trajectory in trajectories:
        for session in trajectory.sessions:
            if session.reward is None:
                raise ValueError(f"Session {session.id} has no reward; score it before it is evaluated.")
            grade = session.reward.components.get(GRADE)
            result.append(
                Outcome(
                    session.item_id,
                    trajectory.stream_id,
                    session.index,
                    len(trajectory.sessions),
                    session.kind,
                    bool(session.correct) if grade is None else grade >= 1 - 1e-9,
                    session.advised,
                    session.failed,
                    grade,
                )
            )
    return result


def grading_errors(trajectories: Iterable[Trajectory]) -> dict[str, int]:
    """How many sessions' rewards name each error of grading (a component of 0); what did not occur is left out."""
    rewards = [s.reward for t in trajectories for s in t.sessions if s.reward is not None]
    counts = Counter(name for reward in rewards for name in reward.components if name.endswith("_error"))
    return dict(sorted(counts.items()))


def best_of(names: Iterable[str]) -> str | None:
    """The agent that a report is about: that of the last stage of training, else the prompted one."""
    return next((name for name in (*TRAINED, "prompted") if name in names), None)


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

    Questions of one stream share a memory, so the interval comes from resampling more than single questions. With at
    least 10 streams whole streams are drawn: it is about streams like these. With fewer, blocks of consecutive
    questions are drawn within each stream: it is about these streams, asked other questions. A block is twice as
    long as the root of the stream's length, for with the cube root, which would be best for the variance under little
    dependence (Hall, Horowitz and Jing, 1995), intervals covered 90 % where neighbours depended much, and with the root
    itself 93 % (now 93 to 94 %). A stream has at least 6 blocks, of single questions if need be: with two of 10
    questions intervals covered 88 %, and one in six had no width. Few units make the bootstrap too sure of itself: its
    deviations are stretched by
    sqrt(n / (n - 1)) and by Student's t over the normal quantile (Hesterberg, 2015, "What teachers should know about
    the bootstrap", section 4.3).

    Args:
        macro: Weigh every stream alike (the mean of the streams' figures, as ProductQA is reported), not every
            question alike.
        bins: Number of equal parts of the stream in `by_position`. A quarter is two eighths weighted by their `n`.

    Returns:
        `accuracy`, `advice_rate`, `score`, `n`, `score_ci` (95 %, endless for one question), `failed` (a number of
        sessions), `by_type` (a dict of the first four per kind) and `by_position` (a list of them with `from` and `to`,
        shares of the stream; parts without a question are left out). Plain JSON values.

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
    total = rates(results, price, macro)
    spread = _deviations(_units(results), _scores(results, price), _weights(results, macro), seed, num_resamples)
    return {
        **total,
        "score_ci": _interval(total["score"], spread),
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
        `difference` of the scores, `ci` (95 %) and the two-sided `p`, the share of resampled differences, stretched
        as in `summarise`, at least as far from the difference as it is from 0.

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
    spread = _deviations(_units(a), values, weights, seed, num_resamples)
    return {"difference": difference, "ci": _interval(difference, spread), "p": _p(difference, spread)}


def _scores(results: Sequence[Outcome], price: float | Sequence[float]) -> Floats:
    worth = np.array([o.correct if o.grade is None else o.grade for o in results], np.float64)
    return np.asarray(worth - np.asarray(price) * np.array([o.advised for o in results]), np.float64)


def _weights(results: Sequence[Outcome], macro: bool) -> Floats:
    """1 per question, or under `macro` 1 per stream, shared by its questions."""
    if not macro:
        return np.ones(len(results))
    _, stream, counts = np.unique([o.stream_id for o in results], return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[stream], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Units:
    """What is resampled: streams, or blocks of their questions.

    Attributes:
        unit: The unit of each question.
        first, size: For each unit the first and the number of those that a draw may put in its place.
    """

    unit: NDArray[np.int64]
    first: NDArray[np.int64]
    size: NDArray[np.int64]


def _units(results: Sequence[Outcome]) -> _Units:
    """Streams, or where these are few, blocks of consecutive questions within each."""
    streams, stream = np.unique([o.questions or o.stream_id for o in results], return_inverse=True)
    few = len(streams) < MIN_STREAMS
    blocks = np.zeros(len(results), np.int64)
    if few:
        blocks = np.array([o.position * max(MIN_BLOCKS, round(o.length**0.5 / 2)) // o.length for o in results])
    units, unit = np.unique(np.stack([stream, blocks]), axis=1, return_inverse=True)
    num = units.shape[1]
    if few:
        _, first, of, size = np.unique(units[0], return_index=True, return_inverse=True, return_counts=True)
        if size.min() > 1:
            return _Units(unit, first[of], size[of])
    return _Units(unit, np.zeros(num, np.int64), np.full(num, num))


def _deviations(units: _Units, values: Floats, weights: Floats, seed: int, num_resamples: int) -> Floats:
    """How far weighted means of resamples are from the mean, (num_resamples,), stretched as `summarise` says."""
    total, mass = np.bincount(units.unit, weights * values), np.bincount(units.unit, weights)
    strata = np.unique(units.first)  # units are sorted by stream; each stream keeps its share, whatever is drawn of it
    freedom = len(mass) - len(strata)
    if not freedom:  # one question says nothing of others
        return np.full(num_resamples, np.inf)
    draws = units.first + np.random.default_rng(seed).integers(units.size, size=(num_resamples, len(mass)))
    means = np.add.reduceat(total[draws], strata, axis=1) / np.add.reduceat(mass[draws], strata, axis=1)
    stretch = np.sqrt(len(mass) / freedom) * stdtrit(freedom, 0.975) / stdtrit(np.inf, 0.975)
    shares = np.add.reduceat(mass, strata) / mass.sum()
    return np.asarray((means @ shares - total.sum() / mass.sum()) * stretch, dtype=np.float64)


def _p(difference: float, deviations: Floats) -> float:
    """The two-sided p; the slack lets a difference of exactly 0 count rounding errors as equal."""
    extreme = int(np.sum(np.abs(deviations) >= abs(difference) - 1e-12))
    return (extreme + 1) / (len(deviations) + 1)


def _interval(centre: float, deviations: Floats) -> list[float]:
    if np.isinf(deviations).any():
        return [-np.inf, np.inf]
    return [float(centre + q) for q in np.quantile(deviations, (0.025, 0.975))]
