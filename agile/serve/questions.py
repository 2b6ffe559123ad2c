"""What was asked of the agent, and the journal that lets a session go on after a restart.

A session is played by an executor that asks for one thing after another: completions, reads, results, advice. Each is
kept in order. Played again from the start, it is given what is kept and then goes on, so nothing is sampled, run or
asked twice.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session as Transaction

from agile.errors import AgileError
from agile.serve import requests, terms, webhooks
from agile.serve.database import Database, new_id
from agile.serve.models import JournalEntry, MemoryRead, Question, User
from agile.session_log import session_from_json
from agile.types import Session, to_json

FINISHED = ("answered", "failed")


def ask(
    database: Database, user_id: int, text: str, product: str, deployment: int | None = None, webhook: str = ""
) -> Question:
    """Keep a question; from now on it will be answered, by the agent of this deployment, at the price of now.

    Args:
        webhook: Where the answer is told.
    """
    question_id, now = new_id(), time.time()

    def keep(session: Transaction) -> Question:
        held = terms.newest(session)
        question = Question(
            id=question_id,
            user_id=user_id,
            text=text,
            product=product,
            status="working",
            deployment=deployment,
            price=None if held is None else held.advice_price,
            created_at=now,
        )
        session.add(question)
        session.flush()
        if webhook:
            webhooks.add(session, question.number, webhook)
        return question

    return database.together(keep).result()


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
        return session.scalar(select(Question.id).where(Question.number == requests.number_of(session_id)))


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


def finish(
    database: Database,
    number: int,
    *,
    answer: str | None,
    error: str,
    played: Session | None,
    confidence: float | None = None,
) -> Future[None]:
    """Keep how a question ended; its journal is needed no more. To end again changes nothing.

    Args:
        confidence: How probable the agent found its own answer.
    """
    ended = {
        "status": "failed" if error else "answered",
        "answer": answer,
        "error": error,
        "session": None if played is None else json.dumps(to_json(played)),
        "advised": None if played is None else played.advised,
        "confidence": confidence,
        "finished_at": time.time(),
    }
    entries = sorted({i for i, _ in played.retrieved}) if played is not None else ()

    def keep(session: Transaction) -> None:
        under_way = update(Question).where(Question.number == number, Question.status.not_in(FINISHED))
        if requests.changed(session, under_way.values(ended)):
            if entries:
                session.execute(insert(MemoryRead), [{"entry_id": entry, "question": number} for entry in entries])
            session.execute(delete(JournalEntry).where(JournalEntry.question == number))

    return database.together(keep)


class Journal:
    """What one session was given so far.

    What only costs time to get again is kept in the process until `save`, which those call that do something in the
    world: tools, experts, memory.

    Args:
        fresh: Whether nothing can have been kept yet.
    """

    def __init__(self, database: Database, number: int, *, fresh: bool = False) -> None:
        self._database, self._number = database, number
        self._kept = deque([] if fresh else _kept(database, number))
        self._next = len(self._kept)
        self._unsaved: list[dict[str, Any]] = []
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
        self._unsaved.append(self._row(kind, payload))
        self._next += 1

    def _row(self, kind: str, payload: Any) -> dict[str, Any]:
        return {"question": self._number, "place": self._next, "kind": kind, "payload": json.dumps(payload)}

    async def save(self, *, waiting: bool = False) -> None:
        """Write what is new to disk, and that an expert is being asked."""

        def keep(session: Transaction) -> None:
            if self._unsaved:
                session.execute(insert(JournalEntry), self._unsaved)
            if waiting:
                session.execute(update(Question).where(Question.number == self._number).values(status="waiting"))

        await asyncio.wrap_future(self._database.together(keep))
        self._unsaved = []

    def save_with(self, kind: str, work: Callable[[Transaction], Any]) -> Any:
        """Do work, and write what is new and what came of it to disk, all in one transaction."""

        def keep(session: Transaction) -> Any:
            found = work(session)
            session.execute(insert(JournalEntry), [*self._unsaved, self._row(kind, found)])
            return found

        found = self._database.together(keep).result()
        self._unsaved, self._next = [], self._next + 1
        return found


def _kept(database: Database, number: int) -> list[tuple[str, str]]:
    with database.reading() as session:
        found = session.execute(
            select(JournalEntry.kind, JournalEntry.payload)
            .where(JournalEntry.question == number)
            .order_by(JournalEntry.place)
        )
        return [(kind, payload) for kind, payload in found]
