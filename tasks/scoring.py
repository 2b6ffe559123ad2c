"""The reward of a question, and when an advised session counts as right: the one place that decides it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from agile.types import Reward, Session

AdviceCounts = Literal["always", "if_right"]

UNREADABLE = "unreadable"  # components that are worth nothing and say that a text could not be read as an answer
UNREADABLE_ADVICE = "unreadable advice"


def fold(text: str) -> str:
    """A text as answers are compared: letter case and white space folded.

    >>> fold(" Red  Wine")
    'red wine'
    """
    return " ".join(text.lower().split())


def question_reward(
    session: Session,
    is_right: Callable[[str | None], bool],
    counts: AdviceCounts,
    *,
    readable: Callable[[str], bool] = lambda text: True,
) -> Reward:
    """1 for a right answer, 0 for a wrong one or a failed session; advice costs its price.

    Args:
        is_right: Judges the session's answer, or an expert's.
        counts: An advised session is right `always` (the paper's rule: the expert's answer is the truth), or
            `if_right`: only if the expert's answer was.
        readable: Whether a text can be read as an answer at all; what cannot is wrong, and marked.

    Returns:
        The components `correct` and, if advice was paid for, `advice`; and of 0, to be counted, `unreadable` and
        `unreadable advice`.
    """
    advice = session.advice if session.advised else None
    right = is_right(session.answer) if advice is None else counts == "always" or is_right(advice.answer)
    components = {"correct": float(right and not session.failed)}
    if advice is not None:
        components["advice"] = -advice.price
        if not readable(advice.answer):
            components[UNREADABLE_ADVICE] = 0.0
    elif session.answer is not None and not readable(session.answer):
        components[UNREADABLE] = 0.0
    return Reward(components)


def unreadable(sessions: Iterable[Session]) -> dict[str, int]:
    """How many answers, and how many pieces of advice, could not be read; what did not occur is left out."""
    counts = Counter(
        name
        for session in sessions
        if session.reward is not None
        for name in (UNREADABLE, UNREADABLE_ADVICE)
        if name in session.reward.components
    )
    return dict(counts)
