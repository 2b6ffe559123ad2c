"""Does the policy know what it knows? Reliability, risk against coverage, and their summaries. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_POINTS = 100  # of a curve in a report


@dataclass(frozen=True, slots=True)
class Belief:
    """What the policy thought of its answer to one question, see `agile.own_answers`.

    Attributes:
        asked: Whether the session asked an expert; `right` is then about the answer it would have given.
        readiness: Probability of not asking, in [0, 1].
        confidence: Probability of the tokens of its answer, in [0, 1].
        right: Whether that answer is right.
    """

    session_id: str
    kind: str
    asked: bool
    readiness: float
    confidence: float
    right: bool


def calibration(beliefs: Sequence[Belief], num_bins: int = 10) -> dict[str, Any]:
    """How the report tells of the beliefs of one agent; plain JSON values.

    Returns:
        `n`, `asked` (a number), `accuracy` of its own answers, mean `confidence`, `ece`, `bins` (see `reliability`),
        and for confidence and for readiness as the order in which questions are answered: `risk_coverage` and
        `risk_coverage_readiness`, lists of [coverage, risk], with their areas `aurc` and `aurc_readiness`; `aurc_best`
        is the area of an order that has all right answers first.

    Raises:
        ValueError: There are no beliefs.
    """
    if not beliefs:
        raise ValueError("No beliefs to summarise; expected at least one session that came to an answer.")
    right = np.array([b.right for b in beliefs], np.float64)
    confidence = np.array([b.confidence for b in beliefs])
    risks = {
        "": risks_by_coverage(confidence, right),
        "_readiness": risks_by_coverage(np.array([b.readiness for b in beliefs]), right),
    }
    bins = reliability(beliefs, num_bins)
    return {
        "n": len(beliefs),
        "asked": sum(b.asked for b in beliefs),
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "ece": expected_calibration_error(bins),
        "bins": bins,
        **{f"risk_coverage{name}": _curve(values) for name, values in risks.items()},
        **{f"aurc{name}": float(values.mean()) for name, values in risks.items()},
        "aurc_best": float(risks_by_coverage(right, right).mean()),
    }


def reliability(beliefs: Sequence[Belief], num_bins: int = 10) -> list[dict[str, Any]]:
    """Bins of equal width over confidence, those that hold a belief.

    Returns:
        For each `from`, `to`, `n`, `asked` (a number), mean `confidence`, and `accuracy`, the share that was right.
        A confidence on an edge belongs to the upper bin, 1 to the last.
    """
    bins: dict[int, list[Belief]] = {}
    for belief in beliefs:
        bins.setdefault(min(num_bins - 1, int(belief.confidence * num_bins)), []).append(belief)
    return [
        {
            "from": k / num_bins,
            "to": (k + 1) / num_bins,
            "n": len(part),
            "asked": sum(b.asked for b in part),
            "confidence": float(np.mean([b.confidence for b in part])),
            "accuracy": float(np.mean([b.right for b in part])),
        }
        for k, part in sorted(bins.items())
    ]


def expected_calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Mean distance of accuracy from confidence over the bins, weighted by their counts (Naeini et al., 2015)."""
    return float(np.average([abs(b["accuracy"] - b["confidence"]) for b in bins], weights=[b["n"] for b in bins]))


def risks_by_coverage(confidence: Floats, right: Floats) -> Floats:
    """Share of wrong answers among the k most confident ones, for k = 1 .. n; their mean is the AURC.

    Of equal confidence any may come first: the risk is the mean over all orders (El-Yaniv and Wiener, 2010;
    Geifman, Uziel and El-Yaniv, 2019).

    Args:
        confidence, right: Shape (n,); right is 0 or 1.

    Returns:
        Shape (n,).
    """
    _, group, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, 1 - right) / counts  # in each group of equals
    return np.asarray(np.cumsum(np.repeat(wrong, counts)) / np.arange(1, len(right) + 1), np.float64)


def _curve(risks: Floats) -> list[list[float]]:
    """At most `MAX_POINTS` points [coverage, risk]."""
    n = len(risks)
    chosen = np.unique(np.linspace(1, n, min(n, MAX_POINTS)).round().astype(int))
    return [[float(k / n), float(risks[k - 1])] for k in chosen]
