"""Credit: GAE by hand at every boundary, against a recursive reference, and the credit terms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agile.credit import (
    Credit,
    SegmentCredit,
    SessionCredit,
    Transitions,
    explained_variance,
    gae,
    lineage,
    pad,
    session_rewards,
    transitions,
    utility,
    whiten,
)
from agile.types import SegmentEnd

TERMINATED, TRUNCATED, CLEARED = SegmentEnd.TERMINATED, SegmentEnd.TRUNCATED, SegmentEnd.CONTEXT_CLEARED


def session(reward: float, *segments: tuple[int, SegmentEnd] | tuple[int, SegmentEnd, float]) -> SessionCredit:
    return SessionCredit(tuple(SegmentCredit(*s) for s in segments), reward)


def estimate(layout: Transitions) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns (T,) of one trajectory."""
    t, mask = pad([layout])
    advantages, returns = gae(t.rewards, t.values, t.next_values, t.discounts, t.lambdas, mask)
    return advantages[0], returns[0]


def reference(
    sessions: list[SessionCredit],
    values: list[float],
    gamma: float,
    lam: float,
    gamma_session: float,
    lam_session: float,
) -> list[float]:
    """The design's rules, one token at a time, by recursion into the future."""
    owner = [(i, j) for i, s in enumerate(sessions) for j, x in enumerate(s.segments) for _ in range(x.num_actions)]

    def advantage(t: int) -> float:
        i, j = owner[t]
        last = t == len(owner) - 1
        inside = not last and owner[t + 1][0] == i
        ended = sessions[i].segments[j : owner[t + 1][1] if inside else None]  # windows that end between t and t + 1
        truncated = [s for s in ended if s.end is TRUNCATED]
        reward = 0.0 if inside else sessions[i].reward
        if truncated and (inside or ended[-1].end is TRUNCATED):
            return reward + gamma * truncated[-1].bootstrap - values[t]
        if last:
            return reward - values[t]
        g, lam_t = (gamma, lam) if inside else (gamma_session, lam_session)
        return reward + g * values[t + 1] - values[t] + g * lam_t * advantage(t + 1)

    return [advantage(t) for t in range(len(owner))]


numbers = st.floats(-2, 2, allow_nan=False)
shares = st.floats(0, 1)
segments = st.builds(SegmentCredit, st.integers(0, 3), st.sampled_from(SegmentEnd), numbers)
streams = st.lists(st.builds(SessionCredit, st.lists(segments, min_size=1, max_size=3).map(tuple), numbers), max_size=4)


def count(sessions: list[SessionCredit]) -> int:
    return sum(x.num_actions for s in sessions for x in s.segments)


# gamma 1/2, lam 1/2 inside and gamma_session 1/4, lam_session 1/2 across; values 1, 2, 4. By hand, from the end:
HALF = {"gamma": 0.5, "lam": 0.5, "gamma_session": 0.25, "lam_session": 0.5}
BY_HAND = {
    # 3 - 4 = -1; 2 - 2 - .25 = -.25; 1 - 1 - .0625
    "terminated": ([session(3, (3, TERMINATED))], [-0.0625, -0.25, -1]),
    # 3 + .5 * 6 - 4 = 2; 2 - 2 + .5 = .5; 1 - 1 + .125
    "truncated": ([session(3, (3, TRUNCATED, 6))], [0.125, 0.5, 2]),
    # as if the context had not been cleared
    "cleared": ([session(3, (2, CLEARED), (1, TERMINATED))], [-0.0625, -0.25, -1]),
    # -1; 5 + .25 * 4 - 2 - .125 = 3.875; 1 - 1 + .96875
    "next session": ([session(5, (2, TERMINATED)), session(3, (1, TERMINATED))], [0.96875, 3.875, -1]),
    # -1; 5 + .5 * 6 - 2 = 6, nothing of the next session; 1 - 1 + 1.5
    "truncated before next": ([session(5, (2, TRUNCATED, 6)), session(3, (1, TERMINATED))], [1.5, 6, -1]),
    # the window after the clearing was filled by what was shown: bootstrap from there
    "truncated without action": ([session(3, (3, CLEARED), (0, TRUNCATED, 6))], [0.125, 0.5, 2]),
    # the failed session has no token to carry its reward of -9: skipped
    "session without action": (
        [session(5, (2, TERMINATED)), session(-9, (0, TRUNCATED, 7)), session(3, (1, TERMINATED))],
        [0.96875, 3.875, -1],
    ),
    "only empty sessions follow": ([session(3, (3, TERMINATED)), session(-9, (0, TERMINATED))], [-0.0625, -0.25, -1]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_gae_by_hand(case: str) -> None:
    sessions, expected = BY_HAND[case]
    advantages, returns = estimate(transitions(sessions, [1, 2, 4], **HALF))
    assert advantages.tolist() == expected  # binary fractions: exact
    assert returns.tolist() == [expected[0] + 1, expected[1] + 2, expected[2] + 4]


@given(st.lists(streams, max_size=4), st.lists(numbers, min_size=36, max_size=36), shares, shares, shares, shares)
def test_vectorised_gae_equals_recursive_reference(
    trajectories: list[list[SessionCredit]], values: list[float], gamma: float, lam: float, gs: float, ls: float
) -> None:
    layouts = [
        transitions(t, values[: count(t)], gamma=gamma, lam=lam, gamma_session=gs, lam_session=ls) for t in trajectories
    ]
    t, mask = pad(layouts)
    assert mask.shape == (len(trajectories), max(map(count, trajectories), default=0))
    advantages, returns = gae(t.rewards, t.values, t.next_values, t.discounts, t.lambdas, mask)
    expected = [a for t in trajectories for a in reference(t, values[: count(t)], gamma, lam, gs, ls)]
    np.testing.assert_allclose(advantages[mask], expected, atol=1e-12)
    np.testing.assert_allclose(returns[mask], expected + t.values[mask], atol=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_lambda_one_is_monte_carlo_return_minus_value() -> None:
    sessions = [session(1, (2, CLEARED), (1, TERMINATED)), session(0, (1, TERMINATED)), session(0.7, (3, TERMINATED))]
    values = np.random.default_rng(0).normal(size=7)
    advantages, returns = estimate(transitions(sessions, values, gamma=1, lam=1, gamma_session=1, lam_session=1))
    to_go = np.array([1.7, 1.7, 1.7, 0.7, 0.7, 0.7, 0.7])
    np.testing.assert_allclose(returns, to_go)
    np.testing.assert_allclose(advantages, to_go - values)


@given(streams.filter(count), numbers, st.data())
def test_gamma_session_zero_makes_sessions_independent(
    sessions: list[SessionCredit], other: float, data: st.DataObject
) -> None:
    values = np.array(data.draw(st.lists(numbers, min_size=count(sessions), max_size=count(sessions))))
    together, _ = estimate(transitions(sessions, values, gamma_session=0))
    start = 0
    for s in sessions:
        n = count([s])
        alone, _ = estimate(transitions([s], values[start : start + n], gamma_session=other))
        np.testing.assert_allclose(together[start : start + n], alone, atol=1e-12)
        start += n


@pytest.mark.parametrize(("gamma_session", "expected"), [(0.5, [0.5, 0.5, 1, 1]), (0.0, [0, 0, 1, 1])])
def test_gamma_session_carries_later_rewards_back(gamma_session: float, expected: list[float]) -> None:
    sessions = [session(0, (2, TERMINATED)), session(1, (2, TERMINATED))]
    layout = transitions(sessions, np.zeros(4), lam=1, gamma_session=gamma_session, lam_session=1)
    assert estimate(layout)[0].tolist() == expected


def test_gae_skips_masked_positions_whatever_they_hold() -> None:
    layout = transitions([session(3, (3, TERMINATED))], [1, 2, 4], **HALF)
    r, v, v_next, g, lam = (
        np.array([[x[0], np.nan, x[1], x[2], np.inf]])
        for x in (layout.rewards, layout.values, layout.next_values, layout.discounts, layout.lambdas)
    )
    mask = np.array([[True, False, True, True, False]])
    for dense, holed in zip(estimate(layout), gae(r, v, v_next, g, lam, mask), strict=True):
        assert holed[mask].tolist() == dense.tolist()
        assert not holed[~mask].any()


def test_transitions_rejects_values_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"\(4,\) but 3 action tokens"):
        transitions([session(0, (3, TERMINATED))], np.zeros(4))


# Five questions: 0, 2 and 4 alike (2 and 4 exactly at the threshold), 1 and 3 like none. 1 / (M + 1) with M = 0, 1, 2.
SIMILAR = np.eye(5)
for i, j, s in [(0, 2, 0.9), (0, 4, 0.8), (2, 4, 0.46), (1, 3, 0.4599)]:
    SIMILAR[i, j] = SIMILAR[j, i] = s


@pytest.mark.parametrize(
    ("advised", "expected"),
    [
        ([1, 1, 1, 1, 1], [0.1, 0, 0.05, 0, 0]),  # 4 has two earlier but no later; 1 and 3 are just below the threshold
        ([0, 0, 1, 0, 1], [0, 0, 0.05, 0, 0]),  # earlier questions count whether advised or not
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_utility_by_hand(advised: list[int], expected: list[float]) -> None:
    assert utility(SIMILAR, advised).tolist() == expected


def test_utility_arguments() -> None:
    assert utility(SIMILAR, np.ones(5), beta=3, threshold=0.85).tolist() == [3, 0, 0, 0, 0]
    assert utility(np.ones((4, 4)), np.ones(4), beta=1).tolist() == [1, 1 / 2, 1 / 3, 0]
    assert utility(np.zeros((0, 0)), []).tolist() == []
    with pytest.raises(ValueError, match=r"\(2, 2\) for 3 sessions"):
        utility(np.eye(2), [True] * 3)


# Session 0 wrote entries 1 and 2, session 1 entry 3; gamma_session 1/2. Gains are r - b.
NAN = float("nan")
LINEAGE: dict[str, tuple[list[float], list[float], list[list[int]], list[float]]] = {
    # session 2 gained 1 - .25 = .75 from entry 1 alone, two sessions later: .25 * .75
    "one reader": ([0, 0, 1], [NAN, NAN, 0.25], [[], [], [1]], [0.1875, 0, 0]),
    # as much was lost: it is charged
    "a loss": ([0, 0, 0], [NAN, NAN, 0.5], [[], [], [1]], [-0.125, 0, 0]),
    # half of the gain of 1 for each writer, at distances 2 and 1
    "two writers": ([0, 0, 1], [NAN, NAN, 0], [[], [], [1, 3]], [0.125, 0.25, 0]),
    # two of three shares; entries count, not sessions
    "two entries of one writer": ([0, 0, 1], [NAN, NAN, 0.25], [[], [], [1, 2, 3]], [0.125, 0.125, 0]),
    # entry 9 was there before the stream, or is of another: nobody gets its half
    "no writer": ([0, 0, 1], [NAN, NAN, 0], [[], [], [1, 9]], [0.125, 0, 0]),
    "the same entry twice": ([0, 0, 1], [NAN, NAN, 0.25], [[], [], [1, 1]], [0.1875, 0, 0]),
    # without a baseline (nothing decided, or left out of the loss) there is no evidence
    "no baseline": ([0, 0, 1], [NAN, NAN, NAN], [[], [], [1]], [0, 0, 0]),
    # a session that reads what it wrote itself earned that in its own reward
    "its own": ([0, 1, 0], [NAN, 0, NAN], [[], [3], []], [0, 0, 0]),
    "nothing read": ([1, 1, 1], [NAN, 0, 0], [[], [], []], [0, 0, 0]),
    # session 1 gained .5, and what session 2 gained through it is its own: session 0 gets .5 * .5
    "a reader that writes": ([0, 0.5, 1], [NAN, 0, 0], [[], [1], [3]], [0.25, 0.5, 0]),
}


@pytest.mark.parametrize("case", LINEAGE)
def test_lineage_by_hand(case: str) -> None:
    rewards, baselines, retrieved, expected = LINEAGE[case]
    found = lineage(rewards, baselines, [[1, 2], [3], []], retrieved, gamma_session=0.5)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def lineage_by_loop(
    rewards: list[float], baselines: list[float], written: list[list[int]], retrieved: list[list[int]], gamma: float
) -> list[float]:
    """Each reader hands what it gained to the writers of what it read."""
    credit = [0.0] * len(rewards)
    for j in range(len(rewards)):
        if np.isnan(baselines[j]):
            continue
        entries = set(retrieved[j])
        for entry in entries:
            for i in range(j):
                if entry in written[i]:
                    credit[i] += gamma ** (j - i) * (rewards[j] - baselines[j]) / len(entries)
    return credit


@given(st.integers(0, 7), shares, st.data())
def test_lineage_equals_the_loop(n: int, gamma: float, data: st.DataObject) -> None:
    def per_session(what: st.SearchStrategy[float]) -> list[float]:
        return data.draw(st.lists(what, min_size=n, max_size=n))

    writers = data.draw(st.lists(st.integers(0, max(0, n - 1)), max_size=8))
    written = [[entry for entry, writer in enumerate(writers) if writer == i] for i in range(n)]
    rewards, baselines = per_session(numbers), per_session(st.one_of(numbers, st.just(NAN)))
    retrieved = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=n, max_size=n))
    found = lineage(rewards, baselines, written, retrieved, gamma_session=gamma)
    np.testing.assert_allclose(found, lineage_by_loop(rewards, baselines, written, retrieved, gamma), atol=1e-9)


def test_lineage_is_what_readers_save_where_a_question_recurs() -> None:
    """Asked at .7: without the entry both readers would have paid the .3 as well."""
    found = lineage([0.7, 1, 1], [NAN, 0.7, 0.7], [[1], [], []], [[], [1], [1]], gamma_session=1.0)
    np.testing.assert_allclose(found, [0.6, 0, 0], atol=1e-12)


def test_lineage_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="2 rewards, 1 baselines, 2 written and 2 retrieved"):
        lineage([0, 0], [0], [[], []], [[], []], gamma_session=0.5)


def test_session_rewards_by_mode() -> None:
    base, advised = [1.0, 0.0, 0.7, 1.0, 0.0], [1, 0, 1, 0, 0]
    for mode in (Credit.NONE, Credit.CHAIN, Credit.LINEAGE):
        assert session_rewards(base, mode).tolist() == base
    rewards = session_rewards(base, Credit.UTILITY, similarities=SIMILAR, advised=advised)
    assert rewards.tolist() == [1.1, 0, 0.75, 1, 0]
    with pytest.raises(ValueError, match="similarities"):
        session_rewards(base, Credit.UTILITY, advised=advised)


def test_whiten_by_hand() -> None:
    mask = np.array([[True, True, False], [True, True, False]])
    x = np.array([[1.0, 5, np.nan], [1, 5, np.inf]])  # mean 3, std 2
    assert whiten(x, mask).tolist() == [[-1, 1, 0], [-1, 1, 0]]


@pytest.mark.parametrize("kept", [[], [5.0], [0.1] * 7, [0.1 + 0.2, 0.3]])
def test_whiten_without_spread_is_zero(kept: list[float]) -> None:
    x = np.array([*kept, np.nan])
    assert whiten(x, ~np.isnan(x)) == pytest.approx(np.zeros(len(x)), abs=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30).filter(lambda x: np.std(x) > 1e-3))
def test_whiten_gives_mean_zero_and_std_one_and_keeps_order(kept: list[float]) -> None:
    x = whiten(np.array(kept), np.ones(len(kept), dtype=bool))
    assert x.mean() == pytest.approx(0, abs=1e-9) and x.std() == pytest.approx(1)
    assert (np.diff(x[np.argsort(kept)]) >= 0).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2, 3], 1), ([6.0, 7, 8], 1), ([2.0, 2, 2], 0), ([3.0, 2, 1], -3), ([1.0, 2, 2], 1 - 2 / 9 / (2 / 3))],
)
def test_explained_variance(values: list[float], expected: float) -> None:
    mask = np.array([True, True, True, False])
    returns = np.array([1, 2, 3, np.nan])
    assert explained_variance(np.array([*values, 9]), returns, mask) == pytest.approx(expected)


def test_explained_variance_of_constant_returns_is_zero() -> None:
    assert explained_variance(np.array([0.0, 1.0, 2.0]), np.ones(3), np.ones(3, dtype=bool)) == 0
    assert explained_variance(np.ones(3), np.ones(3), np.zeros(3, dtype=bool)) == 0
