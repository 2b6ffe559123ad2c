"""What was asked of the agent, and the journal that lets a session go on after a restart.

A session is played by an executor that asks for one thing after another: completions, reads, results, advice. Each is
kept in order. Played again from the start, it is given what is kept and then goes on, so nothing is sampled, run or
asked twice.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session as Transaction

from agile.errors import AgileError
from agile.serve import terms, webhooks
from agile.serve.database import Database, new_id
from agile.serve.models import JournalEntry, MemoryRead, Question, User
from agile.serve.requests import number_of
from agile.session_log import session_from_json
from agile.types import Session, to_json

FINISHED = ("answered", "failed")


def ask(
    database: Database,
    user_id: int,
    text: str,
    product: str,
    deployment: int | None = None,
    webhook: str = "",
    known: Mapping[str, Any] | None = None,
) -> Question:
    """Keep a question; from now on it will be answered, by the agent of this deployment, at the price of now.

    Args:
        webhook: Where the answer is told.
        known: What goes with this question alone: `turns`, `options`.
    """
    question = Question(
        id=new_id(),
        user_id=user_id,
        text=text,
        product=product,
        status="working",
        deployment=deployment,
        context=json.dumps(known or {}),
        created_at=time.time(),
    )
    with database.writing() as session:
        held = terms.newest(session)
        question.price = None if held is None else held.advice_price
        session.add(question)
        if webhook:
            session.flush()
            webhooks.add(session, question.number, webhook)
    return question


def unfinished(database: Database) -> Sequence[Question]:
    """Those that a server left behind, in the order in which they were asked."""
    with database.reading() as session:
        found = select(Question).where(Question.status.not_in(FINISHED)).order_by(Question.number)
        return session.scalars(found).all()


def by_id(database: Database, question_id: str) -> Question | None:
    with database.reading() as session:
        return session.scalars(select(Question).where(Question.id == question_id)).one_or_none()


def id_of(database: Database, session_id: str) -> str | None:
    """The id of the question whose session this is; None if it is not one of this server's."""
    with database.reading() as session:
        return session.scalar(select(Question.id).where(Question.number == number_of(session_id)))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as a list shows it."""

    number: int
    id: str
    text: str
    product: str
    status: str
    answer: str
    user: str
    created_at: float


def newest(database: Database, *, before: int | None = None, limit: int = 50) -> list[Asked]:
    """Questions, the newest first; those with numbers below `before`, if it is given."""
    with database.reading() as session:
        found = select(Question, User.name).join(User, User.id == Question.user_id)
        if before is not None:
            found = found.where(Question.number < before)
        return [
            Asked(q.number, q.id, q.text, q.product, q.status, q.answer or "", name, q.created_at)
            for q, name in session.execute(found.order_by(Question.number.desc()).limit(limit))
        ]


def finished(database: Database) -> Sequence[int]:
    """Numbers of the questions whose sessions came to an end, in order."""
    with database.reading() as session:
        found = select(Question.number).where(Question.session.is_not(None))
        return session.scalars(found.order_by(Question.number)).all()


def session_of(database: Database, number: int) -> Session | None:
    """The session of a question, if it came to an end."""
    with database.reading() as session:
        found = session.scalar(select(Question.session).where(Question.number == number))
    return None if found is None else session_from_json(json.loads(found))


def set_waiting(database: Database, number: int) -> None:
    """That an expert is being asked."""
    with database.writing() as session:
        session.execute(update(Question).where(Question.number == number).values(status="waiting"))


def finish(
    database: Database,
    number: int,
    *,
    answer: str | None,
    error: str,
    played: Session | None,
    confidence: float | None = None,
) -> None:
    """Keep how a question ended; its journal is needed no more.

    Args:
        confidence: How probable the agent found its own answer.
    """
    with database.writing() as session:
        ended = update(Question).where(Question.number == number)
        session.execute(
            ended.values(
                status="failed" if error else "answered",
                answer=answer,
                error=error,
                session=None if played is None else json.dumps(to_json(played)),
                advised=None if played is None else played.advised,
                confidence=confidence,
                finished_at=time.time(),
            )
        )
        if played is not None:
            entries = {i for i, _ in played.retrieved}
            session.add_all(MemoryRead(entry_id=entry, question=number) for entry in sorted(entries))
        session.execute(delete(JournalEntry).where(JournalEntry.question == number))


class Journal:
    """What one session was given so far.

    What only costs time to get again is kept in the process until `save`, which those call that do something in the
    world: tools, experts, memory.
    """

    def __init__(self, database: Database, number: int) -> None:
        self._database, self._number = database, number
        with database.reading() as session:
            found = session.execute(
                select(JournalEntry.kind, JournalEntry.payload)
                .where(JournalEntry.question == number)
                .order_by(JournalEntry.place)
            )
            self._kept = deque((kind, payload) for kind, payload in found)
        self._next = len(self._kept)
        self._unsaved: list[JournalEntry] = []
        self._broken = ""

    def given(self, kind: str) -> Any:
        """What was given here before, or None if the session has never been so far.

        Raises:
            AgileError: Something of another kind was.
        """
        if not self._kept and not self._broken:
            return None
        before, payload = self._kept.popleft() if self._kept else ("", "")
        if before != kind and not self._broken:
            self._broken = (
                f"Question {self._number} was interrupted by a restart and cannot go on: its journal holds a {before} "
                f"where the agent now asks for a {kind}. Serve it with the agent that began it."
            )
        if self._broken:
            raise AgileError(self._broken)
        return json.loads(payload)

    def add(self, kind: str, payload: Any) -> None:
        self._unsaved.append(
            JournalEntry(question=self._number, place=self._next, kind=kind, payload=json.dumps(payload))
        )
        self._next += 1

    def save(self, session: Transaction | None = None) -> None:
        """Write what is new to disk, or add it to a transaction."""
        new, self._unsaved = self._unsaved, []
        if session is not None:
            session.add_all(new)
        elif new:
            with self._database.writing() as own:
                own.add_all(new)
