"""What advice costs and what may be spent on it in a day: administrators say so at the desk, and it holds at once."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session
from sqlalchemy.sql import func

from agile.serve.database import Database
from agile.serve.models import Request, Terms, User

WAITING = ("open", "claimed")


@dataclass(frozen=True, slots=True)
class Change:
    """Terms that somebody set; `daily_budget` is None for any sum."""

    advice_price: float
    daily_budget: float | None
    user: str
    at: float


def newest(session: Session) -> Terms | None:
    """The terms that hold, if anybody has set some."""
    return session.scalars(select(Terms).order_by(Terms.id.desc()).limit(1)).first()


def current(database: Database) -> Terms | None:
    """As `newest`, in a transaction of its own."""
    with database.reading() as session:
        return newest(session)


def change(database: Database, user_id: int, advice_price: float, daily_budget: float | None) -> None:
    """Set the terms of all sessions that begin from now on."""
    with database.writing() as session:
        session.add(Terms(advice_price=advice_price, daily_budget=daily_budget, user_id=user_id, at=time.time()))


def history(database: Database, *, limit: int = 10) -> list[Change]:
    """Who set which terms, the newest first."""
    found = select(Terms, User.name).join(User, User.id == Terms.user_id).order_by(Terms.id.desc()).limit(limit)
    with database.reading() as session:
        return [Change(t.advice_price, t.daily_budget, name, t.at) for t, name in session.execute(found)]


def committed(session: Session, scope: str) -> float:
    """What answers of experts cost today, and those that are waited for will; several who asked the same pay once."""
    today = (Request.status == "answered") & (Request.answered_at >= midnight())
    found = select(func.sum(Request.price)).where(Request.scope == scope, or_(Request.status.in_(WAITING), today))
    return float(session.scalar(found) or 0.0)


def midnight(days: int = 0) -> float:
    """When today began, where the server stands; or the day so many days before it."""
    today = datetime.datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    return (today - datetime.timedelta(days=days)).timestamp()
