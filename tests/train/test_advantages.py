"""Advantages lie on the tokens they belong to, within a session and from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agile.train.ppo import Discounts, Scored, advantages, lay_out
from agile.types import SegmentEnd, Session, SessionStatus, Trajectory
from tests.doors import segment, session

TERMINATED, TRUNCATED, CLEARED = SegmentEnd.TERMINATED, SegmentEnd.TRUNCATED, SegmentEnd.CONTEXT_CLEARED


def random_session(rng: np.random.Generator, first_token: int, index: int) -> Session:
    """One to three segments of up to five tokens; each begins with an id of its own, 10 apart."""
    segments = []
    count = int(rng.integers(1, 4))
    end = TERMINATED if rng.random() < 0.6 else TRUNCATED
    for i in range(count):
        length = int(rng.integers(0 if i else 1, 6))
        mask = (np.arange(length) > 0) & (rng.random(length) < 0.6)
        ids = first_token + 10 * i + np.arange(length)
        segments.append(segment(ids.tolist(), mask.tolist(), end if i == count - 1 else CLEARED))
    status = SessionStatus.FAILED if rng.random() < 0.2 else SessionStatus.COMPLETED
    return session(*segments, status=status, index=index)


def value_before(token: int) -> float:
    return float(np.sin(token))


def bootstrap_after(token: int) -> float:
    return float(np.cos(token))


def by_token(trajectory: Trajectory, rewards: Sequence[float], d: Discounts) -> dict[int, float]:
    """Advantage of every action token by its id: the design's rules, one token at a time, from the end."""
    found: dict[int, float] = {}
    after: tuple[float, float] | None = None  # value and advantage of the following session's first action token
    for played, reward in reversed(list(zip(trajectory.sessions, rewards, strict=True))):
        tokens = [token for s in played.segments for token in s.token_ids]
        actions = [t for s in played.segments for t, a in zip(s.token_ids, s.action_mask, strict=True) if a]
        if played.status is SessionStatus.FAILED or not actions:
            continue
        if played.segments[-1].end is TRUNCATED:
            future = d.gamma * bootstrap_after(tokens[-1])
        elif after is None:
            future = 0.0
        else:
            future = d.gamma_session * (after[0] + d.lam_session * after[1])
        advantage = reward + future - value_before(actions[-1])
        found[actions[-1]] = advantage
        for token, following in zip(actions[-2::-1], actions[:0:-1], strict=True):
            advantage = d.gamma * (value_before(following) + d.lam * advantage) - value_before(token)
            found[token] = advantage
        after = value_before(actions[0]), advantage
    return found


@given(st.integers(0, 2**32), st.sampled_from([(1, 1, 0, 0), (0.9, 0.8, 0, 0), (1, 1, 1, 1), (0.9, 0.8, 0.7, 0.6)]))
def test_advantages_lie_on_the_tokens_they_belong_to(seed: int, discounts: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    trajectories, token = [], 100
    for _ in range(int(rng.integers(1, 4))):
        sessions = []
        for index in range(int(rng.integers(0, 5))):
            sessions.append(random_session(rng, token, index))
            token += 30
        trajectories.append(Trajectory("s", tuple(sessions)))
    trajectories.append(Trajectory("last", (session(segment([9, 10], [False, True], TERMINATED)),)))
    rewards = [rng.normal(size=len(t.sessions)).tolist() for t in trajectories]
    d = Discounts(*discounts)
    expected: dict[int, float] = {}
    for trajectory, row_rewards in zip(trajectories, rewards, strict=True):
        expected |= by_token(trajectory, row_rewards, d)

    rows, plan = lay_out(trajectories, rewards)
    nothing = np.zeros(0, np.float32)
    scored = [
        Scored(nothing, nothing, np.array([value_before(i) for i in r.action_ids]), bootstrap_after(r.token_ids[-1]))
        for r in rows
    ]
    found_advantages, found_returns, variance = advantages(plan, rows, scored, d)
    everything = np.array(list(expected.values()))
    scale = everything.std() or 1.0
    learned = [i for r in rows for i in r.action_ids]
    assert sorted(learned) == sorted(expected), "failed sessions are left out, all others are there"
    for row, row_advantages, row_returns in zip(rows, found_advantages, found_returns, strict=True):
        assert len(row_advantages) == len(row_returns) == row.num_actions
        for i, advantage, target in zip(row.action_ids, row_advantages, row_returns, strict=True):
            assert advantage == pytest.approx((expected[i] - everything.mean()) / scale, abs=1e-5)
            assert target == pytest.approx(expected[i] + value_before(i), abs=1e-5)
    returns = np.array([expected[i] + value_before(i) for i in expected])
    if returns.std() > 1e-6:
        assert variance == pytest.approx(1 - everything.var() / returns.var(), abs=1e-5)


def test_chain_carries_a_later_reward_back_and_a_cut_off_session_does_not() -> None:
    """Values are 0 and lambdas 1: returns are discounted sums of rewards."""
    first = session(segment([5, 6], [False, True], CLEARED), segment([7, 8], [False, True], TERMINATED))
    second = session(segment([9, 10], [False, True], TERMINATED), index=1)
    third = session(segment([11, 12], [False, True], TERMINATED), index=2)
    cut = replace(second, segments=(segment([9, 10], [False, True], TRUNCATED),))
    rewards = [[1.0, 0.0, 1.0]]

    def returns(*sessions: Session) -> list[float]:
        rows, plan = lay_out([Trajectory("s", sessions)], rewards)
        zeros = [Scored(r.logprobs, r.logprobs, np.zeros(r.num_actions, np.float32), 0.0) for r in rows]
        _, found, _ = advantages(plan, rows, zeros, Discounts(1.0, 1.0, 0.5, 1.0))
        return [float(x) for row in found for x in row]

    assert returns(first, second, third) == [1.25, 1.25, 0.5, 1.0]
    assert returns(first, cut, third) == [1.0, 1.0, 0.0, 1.0]
    assert returns(first, replace(second, status=SessionStatus.FAILED), third) == [1.5, 1.5, 1.0]
