"""What people say of answers that the agent gave on its own. The newest review of an answer holds; all are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select

from agile.conversation import TURNS, Turn
from agile.serve.database import Database
from agile.serve.memory import DeskMemory
from agile.serve.models import MemoryRead, Question, Review, User
from agile.serve.requests import Said
from agile.types import MemoryItem

RIGHT, WRONG, CORRECTED = VERDICTS = ("right", "wrong", "corrected")
ORDERS = ("unsure", "sample", "done")


@dataclass(frozen=True, slots=True)
class Word:
    """One review, as it is shown."""

    verdict: str
    user: str
    at: float
    answer: str
    explanation: str


@dataclass(frozen=True, slots=True)
class Reviewed:
    """An answer of the agent's own, and what was said of it.

    Attributes:
        confidence: The probability that it gave to the tokens of its answer; None where that is not known.
        retrieved: `(id, text, similarity)` of every entry of memory that it was shown.
        words: Its reviews, the newest first.
        turns: What was said before the question.
    """

    id: str
    number: int
    question: str
    product: str
    answer: str
    confidence: float | None
    created_at: float
    retrieved: tuple[tuple[int, str, float], ...]
    words: tuple[Word, ...]
    turns: Sequence[Turn] = ()


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many reviewed answers there are, and how many of them are right."""

    number: int
    right: int

    @property
    def share(self) -> float | None:
        return self.right / self.number if self.number else None


def own_answers(database: Database, order: str, *, limit: int = 20) -> list[Reviewed]:
    """Answers that no expert gave: `unsure` and `sample` those without a review, `done` those with one.

    `unsure` begins with the one that the agent was least sure of. `sample` begins anywhere: ids are random, so the
    first so many of them are a sample of all. `done` begins with the newest review.
    """
    said = select(Review.question, func.max(Review.id).label("last")).group_by(Review.question).subquery()
    found = select(Question).where(Question.status == "answered", ~Question.advised)
    if order == "done":
        found = found.join(said, said.c.question == Question.number).order_by(said.c.last.desc())
    else:
        found = found.where(Question.number.not_in(select(said.c.question)))
        by = (Question.id,) if order == "sample" else (Question.confidence.asc().nulls_last(), Question.number)
        found = found.order_by(*by)
    with database.reading() as session:
        questions = session.scalars(found.limit(limit)).all()
    words = history(database, [q.number for q in questions])
    return [
        Reviewed(
            q.id,
            q.number,
            q.text,
            q.product,
            q.answer or "",
            q.confidence,
            q.created_at,
            _retrieved(json.loads(q.session or "{}")),
            tuple(words.get(q.number, ())),
            json.loads(q.context).get(TURNS, ()),
        )
        for q in questions
    ]


def num_left(database: Database) -> int:
    """How many answers of the agent's own nobody has reviewed."""
    left = select(func.count()).where(
        Question.status == "answered", ~Question.advised, Question.number.not_in(select(Review.question))
    )
    with database.reading() as session:
        return session.scalar(left) or 0


def history(database: Database, numbers: Sequence[int]) -> dict[int, list[Word]]:
    """All reviews of these questions, the newest first."""
    found: dict[int, list[Word]] = {}
    with database.reading() as session:
        rows = session.execute(
            select(Review, User.name)
            .join(User, User.id == Review.user_id)
            .where(Review.question.in_(numbers))
            .order_by(Review.id.desc())
        )
        for review, name in rows:
            word = Word(review.verdict, name, review.at, review.answer or "", review.explanation)
            found.setdefault(review.question, []).append(word)
    return found


def review(
    database: Database,
    memory: DeskMemory,
    question: Question,
    user_id: int,
    verdict: str,
    *,
    answer: str = "",
    explanation: str = "",
    sampled: bool = False,
    key: str,
    lesson: Sequence[MemoryItem] = (),
) -> Said:
    """Keep what a person said of an answer, and have memory hold it; the same `key` again changes nothing.

    Args:
        question: One that the agent answered on its own.
        answer: The right one, for the verdict `corrected`.
        lesson: What memory should hold from now on. Entries that answer the same otherwise are retired, and so is what
            an earlier review of this answer wrote.
    """
    with database.writing() as session:
        if session.scalar(select(Review.id).where(Review.key == key)) is not None:
            return Said.AGAIN
        corrected = select(Review.id).where(Review.question == question.number, Review.verdict == CORRECTED)
        if verdict == CORRECTED or session.scalar(corrected.limit(1)) is not None:
            memory.correct(session, user_id, f"served/{question.number}", () if verdict == WRONG else lesson)
        session.add(
            Review(
                question=question.number,
                user_id=user_id,
                verdict=verdict,
                answer=answer if verdict == CORRECTED else None,
                explanation=explanation,
                sampled=sampled,
                key=key,
                at=time.time(),
            )
        )
    return Said.TAKEN


def newest() -> Select[Any]:
    """Ids of the reviews that hold."""
    return select(func.max(Review.id)).group_by(Review.question)


def accuracy(database: Database, *, sampled: bool) -> Accuracy:
    """Of all reviewed answers, or of those that were drawn at random: only these tell how right the agent is."""
    found = select(Review.verdict, func.count()).where(Review.id.in_(newest())).group_by(Review.verdict)
    with database.reading() as session:
        return _counted(session.execute(found.where(Review.sampled) if sampled else found))


def use_of(database: Database, entry_id: int) -> tuple[int, Accuracy]:
    """How many finished sessions were shown an entry of memory, and how many of their own answers were right."""
    reads = select(MemoryRead.question).where(MemoryRead.entry_id == entry_id)
    verdicts = (
        select(Review.verdict, func.count())
        .where(Review.id.in_(newest()), Review.question.in_(reads))
        .group_by(Review.verdict)
    )
    with database.reading() as session:
        number = session.scalar(select(func.count()).select_from(reads.subquery())) or 0
        return number, _counted(session.execute(verdicts))


def _counted(rows: Iterable[Any]) -> Accuracy:
    """Of verdicts and how often each was given."""
    counts = {verdict: number for verdict, number in rows}  # noqa: C416  (rows are no tuples to mypy)
    return Accuracy(sum(counts.values()), counts.get(RIGHT, 0))


def _retrieved(session: Any) -> tuple[tuple[int, str, float], ...]:
    entries = [e for read in session.get("reads", ()) for e in read["entries"]]
    return tuple((int(e["item"]["id"]), str(e["item"]["text"]), float(e["similarity"])) for e in entries)
