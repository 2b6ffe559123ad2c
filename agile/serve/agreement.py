"""Several experts who must say the same, and who is asked next."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session
from sqlalchemy.sql import func

from agile.serve.accounts import ADMINISTRATOR, EXPERT
from agile.serve.models import Claim, Opinion, Request, User


@dataclass(frozen=True, slots=True)
class Given:
    """What one of several experts answered."""

    expert: str
    answer: str
    explanation: str


def normalised(text: str) -> str:
    """The words of a question or an answer.

    >>> normalised("Is it  OVEN-safe?")
    'is it oven safe'
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def agreed(session: Session, request: Request, user_id: int, answer: str, explanation: str, key: str) -> str | None:
    """The explanation to go with an answer that holds, or None if others must be asked first.

    An answer holds that `request.agree` experts gave, letter case and punctuation aside, or an administrator.
    """
    role = session.scalars(select(User.role).where(User.id == user_id)).one()
    before = session.scalars(select(Opinion).where(Opinion.request_id == request.id).order_by(Opinion.at)).all()
    same = [opinion for opinion in before if _words(opinion.answer) == _words(answer)]
    opinion = Opinion(
        request_id=request.id, user_id=user_id, answer=answer, explanation=explanation, key=key, at=time.time()
    )
    session.add(opinion)
    session.flush()
    if role != ADMINISTRATOR and len(same) + 1 < request.agree:
        return None
    return next((o.explanation for o in (opinion, *reversed(same)) if o.explanation), "")


def _words(answer: str) -> str:
    return normalised(answer) or answer  # an answer may be a sign alone


def somebody_left(session: Session, request_id: str) -> bool:
    """Whether anybody can still settle a request: an expert who has said nothing of it, else, where experts gave
    answers that do not agree, an administrator."""
    passed = select(Claim.user_id).where(Claim.request_id == request_id, Claim.outcome == "unknown")
    given = select(Opinion.user_id).where(Opinion.request_id == request_id)

    def left(role: str) -> bool:
        free = select(func.count()).where(
            User.role == role, ~User.disabled, User.id.not_in(passed), User.id.not_in(given)
        )
        return bool(session.scalar(free))

    return left(EXPERT) or (
        bool(session.scalar(select(func.count()).where(Opinion.request_id == request_id))) and left(ADMINISTRATOR)
    )


def opinions(session: Session, request_ids: Sequence[str]) -> Mapping[str, list[Given]]:
    """What experts answered to each request so far, where several must agree."""
    found = (
        select(Opinion, User.name)
        .join(User, User.id == Opinion.user_id)
        .where(Opinion.request_id.in_(request_ids))
        .order_by(Opinion.at)
    )
    given: dict[str, list[Given]] = {}
    if not request_ids:
        return given
    for opinion, name in session.execute(found):
        given.setdefault(opinion.request_id, []).append(Given(name, opinion.answer, opinion.explanation))
    return given
