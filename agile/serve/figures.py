"""How the desk did, day by day: how often people were asked, how right the agent was without, how long, how much."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from sqlalchemy import select

from agile.serve.database import Database
from agile.serve.models import Question, Request, Review
from agile.serve.reviews import RIGHT, Accuracy, newest
from agile.serve.terms import midnight

WIDTH, HEIGHT, MARGIN = 300.0, 90.0, 6.0


@dataclass(slots=True)
class Day:
    """Figures of one day.

    Attributes:
        finished: Sessions of questions of this day that came to their end; `failed` of them to no answer.
        advised: Of them, those that an expert answered.
        waits_s: Seconds that each request waited for the answer that it had this day.
        spent: On these answers, in units of a right answer.
        verdicts, sampled: Reviews that hold of answers to questions of this day: all, and of those drawn at random.
    """

    date: datetime.date
    finished: int = 0
    failed: int = 0
    advised: int = 0
    waits_s: list[float] = field(default_factory=list)
    spent: float = 0.0
    verdicts: list[str] = field(default_factory=list)
    sampled: list[str] = field(default_factory=list)

    @property
    def advice_rate(self) -> float | None:
        return self.advised / self.finished if self.finished else None

    @property
    def wait_s(self) -> float | None:
        return median(self.waits_s) if self.waits_s else None

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy(len(self.verdicts), self.verdicts.count(RIGHT))

    @property
    def sampled_accuracy(self) -> Accuracy:
        return Accuracy(len(self.sampled), self.sampled.count(RIGHT))


def days(database: Database, number: int = 30) -> list[Day]:
    """The last so many days, the newest first; those on which nothing happened are left out."""
    since = midnight(number - 1)
    found: dict[datetime.date, Day] = {}

    def of(at: float) -> Day:
        date = datetime.date.fromtimestamp(at)
        return found.setdefault(date, Day(date))

    asked = select(Question.created_at, Question.status, Question.advised)
    reviewed = select(Question.created_at, Review.verdict, Review.sampled).join(
        Question, Question.number == Review.question
    )
    paid = select(Request.created_at, Request.answered_at, Request.price).where(Request.scope == "served")
    with database.reading() as session:
        for at, status, advised in session.execute(
            asked.where(Question.created_at >= since, Question.finished_at.is_not(None))
        ):
            day = of(at)
            day.finished += 1
            day.failed += status == "failed"
            day.advised += bool(advised)
        for at, verdict, sampled in session.execute(
            reviewed.where(Question.created_at >= since, Review.id.in_(newest()))
        ):
            day = of(at)
            day.verdicts.append(verdict)
            if sampled:
                day.sampled.append(verdict)
        for at, answered_at, price in session.execute(
            paid.where(Request.status == "answered", Request.answered_at >= since)
        ):
            day = of(answered_at or at)
            day.waits_s.append((answered_at or at) - at)
            day.spent += price
    return sorted(found.values(), key=lambda day: day.date, reverse=True)


@dataclass(frozen=True, slots=True)
class Chart:
    """A line over days, in the units of an SVG of WIDTH by HEIGHT; days without a value are left out.

    Attributes:
        points: Of the line, from left to right.
        top: The value at the upper edge; 0 is at the lower.
    """

    title: str
    points: tuple[tuple[float, float], ...]
    top: float
    unit: str

    @property
    def line(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


def charts(shown: Sequence[Day]) -> list[Chart]:
    """What changes over these days, drawn."""
    of_days = sorted(shown, key=lambda day: day.date)
    values: dict[tuple[str, str], list[float | None]] = {
        ("Asked an expert", "%"): [_percent(day.advice_rate) for day in of_days],
        ("Right by review", "%"): [_percent(day.accuracy.share) for day in of_days],
        ("Median wait", "min"): [None if day.wait_s is None else day.wait_s / 60 for day in of_days],
        ("Spent", ""): [day.spent for day in of_days],
    }
    places = _places([day.date for day in of_days])
    return [_chart(title, unit, places, series) for (title, unit), series in values.items()]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _places(dates: Sequence[datetime.date]) -> list[float]:
    """Where days stand, from 0 to 1."""
    if not dates:
        return []
    span = max(1, (dates[-1] - dates[0]).days)
    return [(date - dates[0]).days / span for date in dates]


def _chart(title: str, unit: str, places: Sequence[float], series: Sequence[float | None]) -> Chart:
    known = defaultdict(float, {x: v for x, v in zip(places, series, strict=True) if v is not None})
    top = 100.0 if unit == "%" else max(known.values(), default=0.0) or 1.0
    points = tuple(
        (MARGIN + x * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - value / top * (HEIGHT - 2 * MARGIN))
        for x, value in known.items()
    )
    return Chart(title, points, top, unit)
