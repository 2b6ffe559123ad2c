"""Questions to the experts: posted, claimed by one of them at a time, answered once for all who wait.

Every function is one transaction, and what it returns is on disk. `status` in an UPDATE's WHERE decides who was first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import CursorResult, Select, case, func, or_, select, text, update
from sqlalchemy.orm import Session

from agile.serve.agreement import Given, agreed, normalised, opinions, somebody_left
from agile.serve.database import Database, new_id
from agile.serve.models import Asker, Claim, MemoryChange, MemoryEntry, Opinion, Question, Request, User
from agile.serve.terms import WAITING, committed

# Which of the waiting questions means the same as this one, if any does.
Similar = Callable[[str, Sequence[str]], int | None]


class NobodyAsked(Exception):
    """Nobody is there to be asked; it says why."""


class BudgetSpent(NobodyAsked):
    """What may be spent in a day is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the desk said: an answer, or that nobody knows (`answer` is None)."""

    answer: str | None
    explanation: str = ""
    expert: str = ""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request as an expert sees it.

    Attributes:
        asked: The question in the words of each session that waits, the first one's first.
        claimed_by: Name of the expert who has it; empty if it is free.
        mine: Whether that is who looks.
        passed: What who looks said of it before: `unknown`, `skipped`, `answered` (and others must too) or nothing.
        agree: How many experts must give the same answer.
        given: What they answered so far, where that is more than one.
    """

    id: str
    scope: str
    question: str
    asked: tuple[str, ...]
    group: str
    product: str
    detail: Mapping[str, Any]
    price: float
    created_at: float
    claimed_by: str
    mine: bool
    passed: str
    agree: int = 1
    given: tuple[Given, ...] = ()


class Said(StrEnum):
    """What became of an expert's answer."""

    TAKEN = "taken"
    NOTED = "noted"  # kept, but another expert must say the same
    AGAIN = "again"  # the same answer was here before
    LATE = "late"  # taken, but who asked had given up
    LOST = "lost"  # the request is not this expert's


def post(
    database: Database,
    *,
    scope: str,
    session_id: str,
    session_key: str | None,
    question: str,
    group: str,
    product: str,
    detail: Mapping[str, Any],
    price: float,
    reuse: bool,
    matched: str | None = None,
    similar: Similar | None = None,
    budget: float | None = None,
    agree: int = 1,
    closed: bool = False,
) -> int:
    """Put a question to the experts, or wait with others for its answer.

    A session of this server that may have read memory before the answer to an identical question was in it takes that
    answer.

    Args:
        session_key: One that posted before is the same asker; None makes a new one each time.
        matched: What must be the same in questions that are answered together; None for the words of the question.
        reuse: Whether an answer that an identical question had before is taken at once.
        budget: What answers of this scope may cost in a day, those that are waited for included; None for any sum.
        agree: How many experts must give the same answer.
        closed: Whether no expert is there: only what was asked before is waited for.

    Returns:
        The number of the asker, whose outcome `outcomes` tells.

    Raises:
        NobodyAsked: The desk is closed, or (`BudgetSpent`) another question would exceed the budget.
    """
    now, words = time.time(), normalised(question if matched is None else matched)
    with database.writing() as session:
        if not database.is_sqlite:  # two who ask the same at once must find each other
            session.execute(text("SELECT pg_advisory_xact_lock(1095189318)"))
        if session_key is not None:
            known = session.scalars(select(Asker.id).where(Asker.session_key == session_key)).one_or_none()
            if known is not None:
                return known
        about = (Request.scope == scope, Request.group == group, Request.product == product)
        answered = None
        if reuse:
            found = select(Request).where(*about, Request.matched == words, Request.status == "answered")
            answered = session.scalars(found.order_by(Request.answered_at.desc()).limit(1)).first()
        joined = answered or (None if closed else _same(session, about, words, similar))
        if joined is None and not reuse:
            same = select(Request).where(*about, Request.matched == words, Request.status == "answered")
            joined = answered = _unread(session, same, session_id)
        if joined is None and closed:
            raise NobodyAsked("no expert is there at this time")
        if joined is None and budget is not None and committed(session, scope) + price > budget + 1e-9:
            raise BudgetSpent("the budget of the day is spent")
        if joined is None:
            joined = Request(
                id=new_id(),
                scope=scope,
                question=question,
                matched=words,
                group=group,
                product=product,
                detail=json.dumps(detail),
                price=price,
                status="open",
                agree=agree,
                created_at=now,
            )
            session.add(joined)
            session.flush()
        asker = Asker(
            request_id=joined.id,
            session_id=session_id,
            session_key=session_key,
            question=question,
            status="told" if answered else "waiting",
            created_at=now,
        )
        session.add(asker)
        session.flush()
        return asker.id


def _same(session: Session, about: Sequence[Any], words: str, similar: Similar | None) -> Request | None:
    """The waiting request that asks the same, locked until this transaction ends."""
    waiting = select(Request).where(*about, Request.status.in_(WAITING)).order_by(Request.created_at).with_for_update()
    found = session.scalars(waiting).all()
    for request in found:
        if request.matched == words:
            return request
    index = similar(words, [request.matched for request in found]) if similar and found else None
    return None if index is None else found[index]


def _unread(session: Session, answered: Select[Request], session_id: str) -> Request | None:
    """The newest of these, if no session that was told it had ended, and so remembered it, before this one began.

    None where people have changed or retired since what was remembered of it.
    """
    began = session.scalar(select(Question.created_at).where(Question.number == number_of(session_id)))
    request = session.scalars(answered.order_by(Request.answered_at.desc()).limit(1)).first()
    if began is None or request is None:
        return None
    told = [number_of(name) for name in _sessions(session, request.id)]
    ended = select(Question.number).where(Question.number.in_(told), Question.finished_at <= began).limit(1)
    assert request.answered_at is not None
    unread = request.answered_at > began or (told and session.scalar(ended) is None)
    return request if unread and not _mended(session, request.id) else None


def number_of(session_id: str) -> int:
    """The number of the question whose session this is, 0 for those of other names.

    >>> number_of("served/12"), number_of("late/12"), number_of("s/1")
    (12, 0, 0)
    """
    number = session_id.removeprefix("served/")
    return int(number) if number.isdecimal() else 0


def _sessions(session: Session, request_id: str) -> Sequence[str]:
    """Those that were told the answer."""
    return session.scalars(select(Asker.session_id).where(Asker.request_id == request_id, Asker.status == "told")).all()


def _mended(session: Session, request_id: str) -> bool:
    """Whether a person has changed or retired what was remembered of an answer."""
    names = [*_sessions(session, request_id), f"late/{request_id}"]
    by_people = (
        select(MemoryChange.id)
        .join(MemoryEntry, MemoryEntry.id == MemoryChange.entry_id)
        .where(MemoryEntry.session_id.in_(names), MemoryChange.user_id.is_not(None))
    )
    return session.scalar(by_people.limit(1)) is not None


def is_mended(session: Session, session_id: str) -> bool:
    """Whether a person has changed or retired what others remembered of the answer that this session was told."""
    told = session.scalar(select(Asker.request_id).where(Asker.session_key == f"served:{session_id}"))
    return told is not None and _mended(session, told)


def queue(database: Database, user_id: int) -> list[Waiting]:
    """What waits for an expert: what this user has claimed, then the oldest first, then what they passed on."""
    with database.reading() as session:
        requests = session.scalars(select(Request).where(Request.status.in_(WAITING))).all()
        ids = [request.id for request in requests]
        asked: dict[str, list[str]] = {}
        for request_id, question in session.execute(
            select(Asker.request_id, Asker.question).where(Asker.request_id.in_(ids)).order_by(Asker.id)
        ):
            asked.setdefault(request_id, []).append(question)
        mine = select(Claim.request_id, Claim.outcome).where(Claim.request_id.in_(ids), Claim.user_id == user_id)
        passed = {i: outcome for i, outcome in session.execute(mine.order_by(Claim.id)) if outcome != "claimed"}
        names = {user.id: user.name for user in session.scalars(select(User))}
        given = opinions(session, [request.id for request in requests if request.agree > 1])
    found = [
        Waiting(
            id=r.id,
            scope=r.scope,
            question=r.question,
            asked=tuple(asked.get(r.id, ())),
            group=r.group,
            product=r.product,
            detail=json.loads(r.detail),
            price=r.price,
            created_at=r.created_at,
            claimed_by=names.get(r.claimed_by, "") if r.claimed_by is not None else "",
            mine=r.claimed_by == user_id,
            passed=passed.get(r.id, ""),
            agree=r.agree,
            given=tuple(given.get(r.id, ())),
        )
        for r in requests
    ]
    return sorted(found, key=lambda w: (not w.mine, bool(w.passed), w.created_at))


def claim(database: Database, request_id: str, user_id: int, *, claim_s: float) -> bool:
    """Take a request, so that nobody else answers it; False if somebody else has it, or this user is not needed.

    Args:
        claim_s: Seconds after which a claim of somebody who did not answer no longer holds.
    """
    now = time.time()
    free = or_(
        Request.status == "open",
        (Request.status == "claimed") & ((Request.claimed_by == user_id) | (Request.claimed_at < now - claim_s)),
    )
    answered = select(Opinion).where(Opinion.request_id == Request.id, Opinion.user_id == user_id).exists()
    with database.writing() as session:
        taken = _changed(
            session,
            update(Request)
            .where(Request.id == request_id, free, ~answered)
            .values(status="claimed", claimed_by=user_id, claimed_at=now),
        )
        if taken:
            session.add(Claim(request_id=request_id, user_id=user_id, outcome="claimed", at=now))
        return taken


def answer(database: Database, request_id: str, user_id: int, answer: str, explanation: str, key: str) -> Said:
    """Answer a request that this user has claimed; the same `key` again changes nothing.

    Where several must agree, a further expert is asked until they do, or nobody is left (see `somebody_left`).
    """
    now = time.time()
    with database.writing() as session:
        held = select(Request).where(Request.id == request_id, Request.claimed_by == user_id, Request.agree > 1)
        if (several := session.scalars(held.where(Request.status == "claimed").with_for_update()).first()) is not None:
            why = agreed(session, several, user_id, answer, explanation, key)
            if why is None:
                _release(session, request_id, user_id, "answered")
                _pass_on(session, request_id)
                return Said.NOTED
            explanation = why
        taken = _changed(
            session,
            update(Request)
            .where(Request.id == request_id, Request.status == "claimed", Request.claimed_by == user_id)
            .values(
                status="answered",
                answer=answer,
                explanation=explanation,
                answered_by=user_id,
                answered_at=now,
                answer_key=key,
            ),
        )
        if not taken:
            request, opinion = session.get(Request, request_id), session.get(Opinion, (request_id, user_id))
            again = request is not None and request.answered_by == user_id and request.answer_key == key
            return Said.AGAIN if again or (opinion is not None and opinion.key == key) else Said.LOST
        session.add(Claim(request_id=request_id, user_id=user_id, outcome="answered", at=now))
        return Said.TAKEN if _tell(session, request_id) else Said.LATE


def unknown(database: Database, request_id: str, user_id: int) -> bool:
    """That this user does not know: the next expert may, and if none is left the agent hears that nobody does."""
    with database.writing() as session:
        if not _release(session, request_id, user_id, "unknown"):
            return False
        _pass_on(session, request_id)
        return True


def skip(database: Database, request_id: str, user_id: int) -> bool:
    """Leave a claimed request to others."""
    with database.writing() as session:
        return _release(session, request_id, user_id, "skipped")


def outcomes(database: Database, askers: Sequence[int]) -> dict[int, Outcome]:
    """What those of the askers were told that have been told something."""
    with database.reading() as session:
        found = session.execute(
            select(Asker.id, Request.answer, Request.explanation, User.name)
            .join(Request, Request.id == Asker.request_id)
            .outerjoin(User, User.id == Request.answered_by)
            .where(Asker.id.in_(askers), Asker.status == "told")
        )
        return {i: Outcome(answer, explanation, name or "") for i, answer, explanation, name in found}


def expire(database: Database, asker: int) -> bool:
    """That a session waits no longer; False if it was told in this very moment."""
    with database.writing() as session:
        gone = update(Asker).where(Asker.id == asker, Asker.status == "waiting").values(status="expired")
        if not _changed(session, gone):
            return False
        request_id = session.scalars(select(Asker.request_id).where(Asker.id == asker)).one()
        still = select(func.count()).where(Asker.request_id == request_id, Asker.status == "waiting")
        if session.scalar(still) == 0:  # an expert who is at it may finish
            unwanted = update(Request).where(Request.id == request_id, Request.status == "open")
            session.execute(unwanted.values(status="withdrawn"))
        return True


def settled(database: Database, request_id: str) -> tuple[Request, Outcome] | None:
    """A request and what was answered to it."""
    with database.reading() as session:
        found = select(Request, User.name).join(User, User.id == Request.answered_by).where(Request.id == request_id)
        row = session.execute(found).one_or_none()
        return None if row is None else (row[0], Outcome(row[0].answer, row[0].explanation, row[1]))


def num_waiting(database: Database) -> int:
    with database.reading() as session:
        return session.scalar(select(func.count()).where(Request.status.in_(WAITING))) or 0


def snapshot(database: Database) -> list[tuple[Any, ...]]:
    """The queue in short, which differs when anything in it has changed: id, status, claimer, how many ask, and what
    experts did with it."""
    done = select(func.count()).where(Claim.request_id == Request.id).scalar_subquery()
    with database.reading() as session:
        found = session.execute(
            select(Request.id, Request.status, Request.claimed_by, func.count(Asker.id), done)
            .join(Asker, Asker.request_id == Request.id)
            .where(Request.status.in_(WAITING))
            .group_by(Request.id, Request.status, Request.claimed_by)
            .order_by(Request.id)
        )
        return [tuple(row) for row in found]


def _tell(session: Session, request_id: str) -> bool:
    """That the request is settled; False if nobody waits for it."""
    waiting = update(Asker).where(Asker.request_id == request_id, Asker.status == "waiting")
    return _changed(session, waiting.values(status="told"))


def _pass_on(session: Session, request_id: str) -> None:
    """Leave a request that was given back to whoever is left, or tell that nobody knows."""
    if not somebody_left(session, request_id):
        still = update(Request).where(Request.id == request_id, Request.status == "open")
        session.execute(still.values(status="unknown"))
        _tell(session, request_id)


def _release(session: Session, request_id: str, user_id: int, outcome: str) -> bool:
    held = update(Request).where(Request.id == request_id, Request.status == "claimed", Request.claimed_by == user_id)
    waited_for = select(Asker).where(Asker.request_id == Request.id, Asker.status == "waiting").exists()
    status = case((waited_for, "open"), else_="withdrawn")
    if not _changed(session, held.values(status=status, claimed_by=None, claimed_at=None)):
        return False
    session.add(Claim(request_id=request_id, user_id=user_id, outcome=outcome, at=time.time()))
    session.flush()
    return True


def _changed(session: Session, statement: Any) -> bool:
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    return bool(result.rowcount > 0)
