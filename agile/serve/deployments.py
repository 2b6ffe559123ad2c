"""Which agent is served, and which ones were: what was said last holds, by the config or by a swap."""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import Select, or_, select, update

from agile.serve.database import Database
from agile.serve.models import Deployment

BY_CONFIG = "config"
WANTED, SERVED, FAILED = "wanted", "served", "failed"


def newest(database: Database) -> Deployment | None:
    """The one that is to be served: the last that could be."""
    with database.reading() as session:
        return session.scalars(_newest().where(Deployment.state != FAILED)).first()


def by_id(database: Database, deployment: int) -> Deployment | None:
    with database.reading() as session:
        return session.get(Deployment, deployment)


def deploy(database: Database, run: Path, agent: str, by: str) -> Deployment:
    """Say that the agent of a run is to be served; a server that runs takes it within a second or so."""
    found = Deployment(run=str(run.resolve()), agent=agent, by=by, at=time.time(), state=WANTED)
    with database.writing() as session:
        session.add(found)
    return found


def starting(database: Database, run: Path, agent: str) -> Deployment:
    """What a server starts with: the agent of its config if the config is new, else what was served last."""
    with database.reading() as session:
        said = session.scalars(_newest().where(Deployment.by == BY_CONFIG)).first()
    last = newest(database)
    if said is None or last is None or (said.run, said.agent) != (str(run.resolve()), agent):
        return deploy(database, run, agent, BY_CONFIG)
    return last


def settle(database: Database, deployment: int, error: str = "") -> None:
    """That a server has taken an agent, or cannot."""
    with database.writing() as session:
        state = FAILED if error else SERVED
        session.execute(update(Deployment).where(Deployment.id == deployment).values(state=state, error=error))


def before(database: Database) -> Deployment | None:
    """The agent that was served before the one that is served now."""
    now = newest(database)
    if now is None:
        return None
    earlier = _newest().where(Deployment.state == SERVED, Deployment.id < now.id)
    with database.reading() as session:
        return session.scalars(earlier.where(or_(Deployment.run != now.run, Deployment.agent != now.agent))).first()


def _newest() -> Select[Deployment]:
    return select(Deployment).order_by(Deployment.id.desc()).limit(1)
