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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, bindparam, delete, insert, select, update
from sqlalchemy.orm import Session as Transaction

from agile.errors import AgileError
from agile.serve import requests, terms, webhooks
from agile.serve.database import Database, new_id
from agile.serve.models import JournalEntry, MemoryRead, Question, User
from agile.session_log import parts, session_from_json
from agile.types import Session

FINISHED = ("answered", "failed")
_ASKED = ("id", "user_id", "text", "product", "status", "error", "deployment", "price", "context", "created_at")
# of many questions at once: past the ORM, which would take longer than the rest of it
_NUMBERS: BindParameter[Sequence[int]] = bindparam("numbers", expanding=True)
_ASK = insert(Question).returning(Question.id, Question.number)
_STILL = select(Question.number).where(Question.number.in_(_NUMBERS), Question.status.not_in(FINISHED))
_END = update(Question).where(Question.number == bindparam("ended"))
_FORGET = delete(JournalEntry).where(JournalEntry.question.in_(_NUMBERS))
_READ = insert(MemoryRead)


def ask(
    database: Database,
    user_id: int,
    text: str,
    product: str,
    deployment: int | None = None,
    webhook: str = "",
    known: Mapping[str, Any] | None = None,
) -> Future[Question]:
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
        error="",
        deployment=deployment,
        context=json.dumps(known or {}),
        created_at=time.time(),
    )
    return database.together(_keep_asked, (question, webhook))


def _keep_asked(session: Transaction, asked: list[tuple[Question, str]]) -> list[Question]:
    held = terms.newest(session)
    for question, _ in asked:
        question.price = None if held is None else held.advice_price
    rows = [{name: getattr(question, name) for name in _ASKED} for question, _ in asked]
    numbers = {added.id: added.number for added in session.connection().execute(_ASK, rows)}
    for question, webhook in asked:
        question.number = numbers[question.id]
        if webhook:
            webhooks.add(session, question.number, webhook)
    return [question for question, _ in asked]


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
    text: str | None = None,
    confidence: float | None = None,
) -> Future[None]:
    """Keep how a question ended; its journal is needed no more. To end again changes nothing.

    Args:
        text: The session as JSON, where that is known.
        confidence: How probable the agent found its own answer.
    """
    ended = {
        "ended": number,
        "status": "failed" if error else "answered",
        "answer": answer,
        "error": error,
        "session": None if played is None else text or json.dumps(played, default=parts),
        "advised": None if played is None else played.advised,
        "confidence": confidence,
        "finished_at": time.time(),
    }
    entries = sorted({i for i, _ in played.retrieved}) if played is not None else []
    return database.together(_keep_ended, (ended, entries))


def _keep_ended(session: Transaction, ended: list[tuple[dict[str, Any], list[int]]]) -> list[None]:
    connection, numbers = session.connection(), [row["ended"] for row, _ in ended]
    under_way = set(connection.scalars(_STILL, {"numbers": numbers}))
    first = [(row, entries) for row, entries in ended if row["ended"] in under_way]
    reads = [{"entry_id": entry, "question": row["ended"]} for row, entries in first for entry in entries]
    if first:
        connection.execute(_END, [row for row, _ in first])
        connection.execute(_FORGET, {"numbers": numbers})
    if reads:
        connection.execute(_READ, reads)
    return [None] * len(ended)


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
        self._unsaved: list[tuple[str, Any]] = []
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
        """Keep what the session was given, as JSON where it is no plain value."""
        self._unsaved.append((kind, payload))

    def _rows(self, *more: tuple[str, Any]) -> list[dict[str, Any]]:
        """What is new, as rows of the table."""
        return [
            {"question": self._number, "place": place, "kind": kind, "payload": json.dumps(payload, default=parts)}
            for place, (kind, payload) in enumerate((*self._unsaved, *more), self._next)
        ]

    def _saved(self, number: int) -> None:
        self._next, self._unsaved = self._next + number, []

    async def save(self, *, waiting: bool = False) -> None:
        """Write what is new to disk, and that an expert is being asked."""

        rows = self._rows()

        asking = [self._number] if waiting else []
        await asyncio.wrap_future(self._database.together(_keep_journal, (rows, asking)))
        self._saved(len(rows))

    def save_with(self, kind: str, work: Callable[[Transaction], Any]) -> Any:
        """Do work, and write what is new and what came of it to disk, all in one transaction."""

        with self._database.writing() as session:
            found = work(session)
            session.execute(insert(JournalEntry), self._rows((kind, found)))
        self._saved(len(self._unsaved) + 1)
        return found


def _keep_journal(session: Transaction, given: list[tuple[list[dict[str, Any]], list[int]]]) -> list[None]:
    if rows := [row for rows, _ in given for row in rows]:
        session.execute(insert(JournalEntry), rows)
    if asking := [number for _, numbers in given for number in numbers]:
        session.execute(update(Question).where(Question.number.in_(asking)).values(status="waiting"))
    return [None] * len(given)


def _kept(database: Database, number: int) -> list[tuple[str, str]]:
    with database.reading() as session:
        found = session.execute(
            select(JournalEntry.kind, JournalEntry.payload)
            .where(JournalEntry.question == number)
            .order_by(JournalEntry.place)
        )
        return [(kind, payload) for kind, payload in found]
