"""How much the KL to the reference policy weighs: a constant, or what keeps that KL near a target."""

from __future__ import annotations

from dataclasses import dataclass

GAIN = 1.0  # the source has 0.1 a batch; an iteration here takes tens of them
MAX_ERROR = 0.2


@dataclass(slots=True)
class KLControl:
    """The coefficient of the KL, and its controller: part of a checkpoint.

        e    = clip(KL / target - 1, -0.2, 0.2)
        coef = coef * (1 + GAIN * e)

    Source: Ziegler et al., arXiv 1909.08593, section 2.2.

    Attributes:
        coef: The coefficient now.
        target: KL to the reference policy in nats per action token; None leaves the coefficient as it is.
    """

    coef: float
    target: float | None = None

    def observe(self, kl: float) -> None:
        """Adapt the coefficient to the mean KL of an iteration, in nats per action token."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
            self.coef *= 1 + GAIN * error
