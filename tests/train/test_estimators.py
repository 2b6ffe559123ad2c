"""Estimators without a critic: by hand at every kind of boundary, and what must not move them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agile.credit import Estimator, group_relative
from agile.train.ppo import Discounts, Scored, advantages, lay_out
from agile.types import SegmentEnd, Session, SessionStatus, Trajectory
from tests.doors import segment, session

TERMINATED, TRUNCATED, CLEARED = SegmentEnd.TERMINATED, SegmentEnd.TRUNCATED, SegmentEnd.CONTEXT_CLEARED
HALF = Discounts(gamma=0.5, lam=0.3, gamma_session=0.25, lam_session=0.3)  # lambdas are the critic's: they do nothing


def acting(*ends: tuple[int, SegmentEnd], index: int = 0, **changes: SessionStatus) -> Session:
    """A session of segments with one observed token and this many action tokens."""
    segments = [segment(range(5, 6 + n), [False] + [True] * n, end) for n, end in ends]
    return session(*segments, index=index, **changes)


def estimate(
    trajectories: Sequence[Trajectory], rewards: Sequence[Sequence[float]], estimator: Estimator, d: Discounts
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of all action tokens, with a critic that says nonsense."""
    rows, plan = lay_out(trajectories, rewards)
    scored = [Scored(r.logprobs, r.logprobs, np.full(r.num_actions, 7.0, np.float32), 9.0) for r in rows]
    found, returns, _ = advantages(plan, rows, scored, d, estimator)
    return np.concatenate(found), np.concatenate(returns)


# gamma 1/2 inside, 1/4 from session to session: the discounted sums of rewards by hand, from the end
RETURNS = {
    "terminated": ([acting((3, TERMINATED))], [4], [1, 2, 4]),
    "cleared": ([acting((2, CLEARED), (1, TERMINATED))], [4], [1, 2, 4]),
    "truncated": ([acting((3, TRUNCATED))], [4], [1, 2, 4]),
    "truncated without action": ([acting((3, CLEARED), (0, TRUNCATED))], [4], [1, 2, 4]),
    # 4 + 8 / 4 = 6
    "next session": ([acting((2, TERMINATED)), acting((1, TERMINATED), index=1)], [4, 8], [3, 6, 8]),
    "truncated before next": ([acting((2, TRUNCATED)), acting((1, TERMINATED), index=1)], [4, 8], [3, 6, 8]),
    # the failed one is left out, the sessions around it are neighbours
    "failed between": (
        [
            acting((2, TERMINATED)),
            acting((2, TERMINATED), index=1, status=SessionStatus.FAILED),
            acting((1, TERMINATED), index=2),
        ],
        [4, -9, 8],
        [3, 6, 8],
    ),
}


@pytest.mark.parametrize("case", RETURNS)
def test_reinforce_by_hand(case: str) -> None:
    sessions, rewards, expected = RETURNS[case]
    found, returns = estimate([Trajectory("s", tuple(sessions))], [rewards], Estimator.REINFORCE, HALF)
    assert returns.tolist() == expected
    np.testing.assert_allclose(found, (np.array(expected) - np.mean(expected)) / np.std(expected), atol=1e-6)


def test_reinforce_is_whitened_over_the_whole_batch() -> None:
    """Two streams, one whitening: 1, 2, 4 and 1 have mean 2 and variance 3 / 2."""
    trajectories = [Trajectory("s", (acting((3, TERMINATED)),)), Trajectory("t", (acting((1, TERMINATED)),))]
    found, _ = estimate(trajectories, [[4], [1]], Estimator.REINFORCE, HALF)
    np.testing.assert_allclose(found, np.array([-1, 0, 2, -1]) / np.sqrt(1.5), atol=1e-6)


ONE = Discounts(gamma=1.0, lam=0.3)


def test_group_by_hand() -> None:
    """Three rollouts of two questions; a session's tokens have one advantage, whatever its windows and its length."""
    trajectories = [
        Trajectory("s#0", (acting((2, CLEARED), (1, TERMINATED)), acting((1, TERMINATED), index=1))),
        Trajectory("s#1", (acting((2, TRUNCATED)), acting((2, TERMINATED), index=1))),
        Trajectory("t#0", (acting((1, TERMINATED)),)),
        Trajectory("t#1", (acting((1, TERMINATED)),)),
    ]
    # question 0 of s: 1 and 0; question 1: 3 and 3, no spread; question 0 of t: .1 and .3, of a scale of its own
    found, returns = estimate(trajectories, [[1, 3], [0, 3], [0.1], [0.3]], Estimator.GROUP, ONE)
    assert returns.tolist() == pytest.approx([1, 1, 1, 3, 0, 0, 3, 3, 0.1, 0.3])
    np.testing.assert_allclose(found, [1, 1, 1, 0, -1, -1, 0, 0, -1, 1], atol=1e-6)


def test_group_with_chain_compares_what_followed_too() -> None:
    """1 + 1/4 * 0 against 0 + 1/4 * 8, which is better."""
    trajectories = [Trajectory(f"s#{i}", (acting((1, TERMINATED)), acting((1, TERMINATED), index=1))) for i in range(2)]
    discounts = Discounts(gamma=1.0, gamma_session=0.25)
    found, returns = estimate(trajectories, [[1, 0], [0, 8]], Estimator.GROUP, discounts)
    assert returns.tolist() == [1, 0, 2, 8]
    np.testing.assert_allclose(found, [-1, -1, 1, 1], atol=1e-6)


def test_group_leaves_out_rollouts_that_failed_or_did_nothing() -> None:
    """Of three rollouts one failed; the second question was reached by one alone, which has nobody to compare with."""
    failed = acting((2, TERMINATED), status=SessionStatus.FAILED)
    trajectories = [
        Trajectory("s#0", (acting((1, TERMINATED)), acting((1, TERMINATED), index=1))),
        Trajectory("s#1", (failed, acting((0, TRUNCATED), index=1))),
        Trajectory("s#2", (acting((1, TERMINATED)),)),
    ]
    found, _ = estimate(trajectories, [[1, 5], [9, -9], [0]], Estimator.GROUP, ONE)
    np.testing.assert_allclose(found, [1, 0, -1], atol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), max_size=12))
def test_group_relative_equals_the_loop(rollouts: list[tuple[int, float]]) -> None:
    expected = []
    for group, value in rollouts:
        members = [v for g, v in rollouts if g == group]
        mean, spread = float(np.mean(members)), float(np.std(members))
        expected.append((value - mean) / spread if spread > 1e-8 * max(1.0, abs(mean)) else 0.0)
    found = group_relative([v for _, v in rollouts], [g for g, _ in rollouts])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("estimator", [Estimator.GROUP, Estimator.REINFORCE])
def test_what_the_critic_says_is_not_heard(estimator: Estimator) -> None:
    trajectory = Trajectory("s#0", (acting((3, TRUNCATED)),)), Trajectory("s#1", (acting((2, TERMINATED)),))
    rows, plan = lay_out(trajectory, [[1.0], [0.0]])
    found = []
    for said in (0.0, 5.0):
        scored = [Scored(r.logprobs, r.logprobs, np.full(r.num_actions, said, np.float32), said) for r in rows]
        found.append(np.concatenate(advantages(plan, rows, scored, ONE, estimator)[0]))
    assert found[0].tolist() == found[1].tolist() and found[0].any()
