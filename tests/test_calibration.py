"""Calibration, in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agile.calibration import Belief, calibration, reliability, risks_by_coverage


def belief(confidence: float, right: bool, *, readiness: float = 0.5, asked: bool = False) -> Belief:
    return Belief("s/0", "fact", asked, readiness, confidence, right)


def test_by_hand() -> None:
    """Confidences .95 right, .85 wrong, .85 right, .25 wrong; readiness puts the wrong ones first."""
    told = [
        belief(0.95, True, readiness=0.1),
        belief(0.85, False, readiness=0.9),
        belief(0.85, True, readiness=0.2, asked=True),
        belief(0.25, False, readiness=0.8),
    ]
    found = calibration(told)
    assert (found["n"], found["asked"], found["accuracy"]) == (4, 1, 0.5)
    assert found["confidence"] == pytest.approx(0.725)
    assert [(b["from"], b["n"], b["asked"], b["accuracy"]) for b in found["bins"]] == [
        (0.2, 1, 0, 0.0),
        (0.8, 2, 1, 0.5),
        (0.9, 1, 0, 1.0),
    ]
    assert found["ece"] == pytest.approx((0.25 + 2 * 0.35 + 0.05) / 4)
    # of the two at .85 either may come first, so the risk of the first two questions is 1/4
    assert found["risk_coverage"] == [[0.25, 0.0], [0.5, 0.25], [0.75, pytest.approx(1 / 3)], [1.0, 0.5]]
    assert found["aurc"] == pytest.approx((0 + 0.25 + 1 / 3 + 0.5) / 4)
    assert found["aurc_readiness"] == pytest.approx((1 + 1 + 2 / 3 + 0.5) / 4)
    assert found["aurc_best"] == pytest.approx((0 + 0 + 1 / 3 + 0.5) / 4)


def test_edges_of_bins() -> None:
    assert [b["from"] for b in reliability([belief(0.0, True), belief(0.5, True), belief(1.0, True)], 2)] == [0.0, 0.5]
    assert [b["n"] for b in reliability([belief(0.0, True), belief(0.5, True), belief(1.0, True)], 2)] == [1, 2]
    found = reliability([belief(value, True) for value in (0.26, 0.3, 0.39, 0.96)])
    assert [(b["from"], b["to"], b["n"]) for b in found] == [(0.2, 0.3, 1), (0.3, 0.4, 2), (0.9, 1.0, 1)]


def test_a_policy_that_knows_has_no_error() -> None:
    """A thousand questions at each of ten confidences, right exactly as often as the policy expects."""
    told = [belief((k + 0.5) / 10, i < 1000 * (k + 0.5) / 10) for k in range(10) for i in range(1000)]
    assert calibration(told)["ece"] == pytest.approx(0.0, abs=1e-9)
    assert len(calibration(told)["risk_coverage"]) == 100


def test_nothing_to_tell() -> None:
    with pytest.raises(ValueError, match="No beliefs"):
        calibration([])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.booleans()), min_size=1, max_size=12))
def test_ties_are_the_mean_over_orders(pairs: list[tuple[float, bool]]) -> None:
    confidence, right = np.array([c for c, _ in pairs]), np.array([float(r) for _, r in pairs])
    rng = np.random.default_rng(0)
    sampled = []
    for _ in range(2000):
        order = np.lexsort((rng.random(len(pairs)), -confidence))
        sampled.append(np.cumsum(1 - right[order]) / np.arange(1, len(pairs) + 1))
    assert risks_by_coverage(confidence, right) == pytest.approx(np.mean(sampled, axis=0), abs=0.06)
