"""What keeps PPO inside limits: the best and the last good checkpoint, and what to do when a limit is passed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from agile.config import GuardConfig
from agile.errors import AgileError

logger = logging.getLogger(__name__)

VALIDATION_SCORE = "validation/score"


class Finished(Exception):
    """PPO ends before its last iteration."""


def trouble(guard: GuardConfig, metrics: Mapping[str, float], best_score: float | None) -> str | None:
    """Which limit the figures of an iteration pass, and by how much; None if they pass none.

    Args:
        metrics: `kl` and `entropy` (nats per token), and `validation/score` in an iteration that was validated.
        best_score: The best validation score so far, this one left out.
    """
    score, drop = metrics.get(VALIDATION_SCORE), guard.max_score_drop
    if score is not None and drop is not None and best_score is not None and not score >= best_score - drop:
        fall = f"more than guard.max_score_drop={drop:g} below its best, {best_score:.3f}"
        return f"the validation score is {score:.3f}, {fall}"
    # so compared that NaN is outside
    if score is not None and guard.min_score is not None and not score >= guard.min_score:
        return f"the validation score is {score:.3f}, below guard.min_score={guard.min_score:g}"
    if guard.max_kl is not None and not metrics["kl"] <= guard.max_kl:
        return f"kl is {metrics['kl']:.4g}, above guard.max_kl={guard.max_kl:g}"
    if guard.min_entropy is not None and not metrics["entropy"] >= guard.min_entropy:
        return f"entropy is {metrics['entropy']:.4g}, below guard.min_entropy={guard.min_entropy:g}"
    if guard.max_entropy is not None and not metrics["entropy"] <= guard.max_entropy:
        return f"entropy is {metrics['entropy']:.4g}, above guard.max_entropy={guard.max_entropy:g}"
    return None


@dataclass
class Course:
    """How a stage of PPO has gone so far; part of a checkpoint, in JSON's types.

    Attributes:
        best_step: Iteration whose weights scored best in validation, from 1; None before the first.
        good_step: Iteration of the checkpoint that a rollback goes back to. Those made by the clock are none: the same
            run must go back to the same one.
        saved_step: Iteration of the last such checkpoint. KL and entropy of its weights are known one iteration later.
        num_rollbacks: How often that was done.
    """

    best_step: int | None = None
    best_score: float | None = None
    good_step: int = 0
    saved_step: int = 0
    num_rollbacks: int = 0

    def validated(self, iteration: int, score: float) -> bool:
        """Note a validation score; returns whether it is the best so far (the earlier of equal ones stays)."""
        if self.best_score is not None and not score > self.best_score:
            return False
        self.best_step, self.best_score = iteration, score
        return True

    def respond(self, guard: GuardConfig, iteration: int, reason: str) -> None:
        """Count a rollback to `good_step`, or end the run.

        Raises:
            Finished: The guard ends PPO, and the best agent is kept.
            AgileError: The guard stops the run, at once or after too many rollbacks.
        """
        if guard.action == "finish" and self.best_step is not None:
            logger.warning("PPO ends at iteration %d: %s. Kept is iteration %d.", iteration, reason, self.best_step)
            raise Finished
        remedy = (
            f"The weights of iteration {self.good_step} were within the limits. Lower ppo.lr or ppo.num_epochs, raise "
            "ppo.kl_coef in a new run, or go on by --resume, with another limit or with guard.action=rollback."
        )
        if iteration == 1:
            raise AgileError(
                f"The agent that PPO starts from is outside the limits: {reason}. Set another limit, or train it "
                "longer by imitation."
            )
        if guard.action != "rollback":
            raise AgileError(f"Iteration {iteration} was stopped by the guard: {reason}. {remedy}")
        if self.num_rollbacks == guard.max_rollbacks:
            raise AgileError(
                f"Iteration {iteration} was stopped by the guard after guard.max_rollbacks={guard.max_rollbacks} "
                f"rollbacks: {reason}. {remedy}"
            )
        self.num_rollbacks += 1
        logger.warning(
            "Iteration %d: %s. Rolled back to the weights of iteration %d (rollback %d of at most %d).",
            iteration,
            reason,
            self.good_step,
            self.num_rollbacks,
            guard.max_rollbacks,
        )
