"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import jinja2
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse

from agile.config.serve import ServeConfig
from agile.serve import requests
from agile.serve.access import Access, Login
from agile.serve.database import Database, DatabaseAway
from agile.serve.memory import DeskMemory
from agile.serve.metrics import Metrics
from agile.serve.runner import Runner

LOOK_S = 0.2  # how often the queue is looked at while somebody watches it
KEEP_ALIVE_S = 15.0


@dataclass(slots=True)
class Watch:
    """Tells browsers that the queue has changed, whoever changed it: runs share the database."""

    database: Database
    _seen: list[tuple[Any, ...]] | None = None
    _version: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _watchers: int = 0

    async def look(self) -> None:
        """For the life of the server."""
        while True:
            if self._watchers:
                with contextlib.suppress(DatabaseAway):
                    now = await run_in_threadpool(requests.snapshot, self.database)
                    if now != self._seen:
                        self._seen, self._version = now, self._version + 1
                        async with self._changed:
                            self._changed.notify_all()
            await asyncio.sleep(LOOK_S)

    async def changes(self) -> AsyncIterator[bool]:
        """True for each change, False where nothing has changed for a while."""
        self._watchers += 1
        seen = self._version
        try:
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S), self._changed:
                        await self._changed.wait_for(lambda: self._version != seen)  # noqa: B023
                    seen = self._version
                    yield True
                except TimeoutError:
                    yield False
        finally:
            self._watchers -= 1


@dataclass(frozen=True, slots=True)
class Desk:
    """The parts of a server."""

    config: ServeConfig
    database: Database
    runner: Runner
    memory: DeskMemory
    metrics: Metrics
    access: Access
    templates: jinja2.Environment
    watch: Watch


def desk_of(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


def page(desk: Desk, name: str, login: Login | None, /, **values: Any) -> HTMLResponse:
    """A page of a template, for somebody."""
    template = desk.templates.get_template(f"{name}.html.j2")
    return HTMLResponse(template.render(login=login, **values))


def to(path: str, **query: str) -> RedirectResponse:
    """Where a browser goes after a form; what is empty is left out of the query."""
    said = urlencode({name: value for name, value in query.items() if value})
    return RedirectResponse(f"{path}?{said}" if said else path, 303)
