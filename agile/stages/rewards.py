"""What a session is worth: the task's reward and the credit that the config asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agile.config import PPOConfig, RunConfig
from agile.copies import original_id
from agile.credit import Credit, session_rewards
from agile.train.ppo import Discounts
from agile.types import Session, Trajectory


def terminal_rewards(
    config: RunConfig,
    similarities: Callable[[str], NDArray[np.float32]],
    trajectories: Sequence[Trajectory],
    rng: np.random.Generator,
) -> list[list[float]]:
    """What each session of each trajectory is worth: the task's reward and the credit term of `config.ppo`.

    Args:
        similarities: The cosine of every pair of a stream's questions, (n, n), by its id.
        rng: Shuffles the task's rewards where the config asks for that control.
    """
    ppo, copied = config.ppo, config.ppo.rollouts_per_stream > 1
    totals = [[_reward(s, config.rollout.failed_reward) for s in t.sessions] for t in trajectories]
    if config.demo.shuffle_rewards:
        flat = rng.permutation([r for row in totals for r in row]).tolist()
        totals = [[flat.pop() for _ in row] for row in totals]
    return [
        session_rewards(
            row,
            Credit(ppo.credit),
            similarities=similarities(original_id(t.stream_id) if copied else t.stream_id)
            if ppo.credit == "utility"
            else None,
            advised=[s.advised for s in t.sessions],
            beta=ppo.utility_beta,
            threshold=ppo.utility_similarity,
        ).tolist()
        for t, row in zip(trajectories, totals, strict=True)
    ]


def discounts(ppo: PPOConfig) -> Discounts:
    """How value flows. `lineage` takes `gamma_session` for itself: GAE would carry the same credit a second time."""
    if ppo.credit == "lineage":
        return Discounts(ppo.gamma, ppo.lam, lineage=ppo.gamma_session)
    return Discounts(ppo.gamma, ppo.lam, ppo.gamma_session, ppo.lam_session)


def _reward(session: Session, failed_reward: float | None) -> float:
    if session.failed and failed_reward is not None:
        return failed_reward
    return session.reward.total if session.reward else 0.0
