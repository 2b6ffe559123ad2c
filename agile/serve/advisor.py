"""The people at the desk, as an `Advisor`: for the server, and for runs that share its database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from agile.config.hours import HoursConfig
from agile.conversation import TURNS
from agile.protocols import Advisor
from agile.serve import requests
from agile.serve.database import Database, DatabaseAway
from agile.serve.requests import NobodyAsked, Outcome, Similar
from agile.subjects import OPTIONS, meaning
from agile.types import Advice, AdviceRequest, AdviceStatus

logger = logging.getLogger(__name__)
POLL_S = 0.2


class DeskAdvisor:
    """Posts a question in the database and waits until an expert has answered it there.

    Args:
        database: Of the desk.
        scope: Who asks; questions of different scopes are never joined.
        lasting: Whether session ids are unique for good, so that one that asks again, after a restart, is not a new
            one. If not, an answer that an identical question had before in this scope is used again.
        timeout_s: Seconds to wait; None for as long as it takes.
        fallback: Who is asked where the desk has no answer: nobody is there, can be paid, knows, agrees or is in time;
            None for nobody.
        hours: When people are there. What they were asked before is waited for at any time.
        agree: How many experts must give the same answer, see `agile.serve.agreement`.
        similar: Says which of the waiting questions means the same; None joins those of the same words alone.
    """

    def __init__(
        self,
        database: Database,
        scope: str,
        *,
        lasting: bool = False,
        timeout_s: float | None = None,
        fallback: Advisor | None = None,
        hours: HoursConfig | None = None,
        agree: int = 1,
        similar: Similar | None = None,
    ) -> None:
        self.database = database
        self.scope = scope
        self.lasting = lasting
        self.timeout_s = timeout_s
        self.fallback = fallback
        self.hours = hours
        self.agree = agree
        self.similar = similar
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def advise(
        self, request: AdviceRequest, detail: Mapping[str, Any] | None = None, *, budget: float | None = None
    ) -> Advice:
        """Raises DatabaseAway: whoever lasts may ask again.

        Args:
            detail: What else experts should see of the request.
            budget: What may be spent in a day; nobody is asked whose answer would exceed it. None for any sum.
        """
        item = request.item
        special = bool(item.context.get(TURNS) or item.context.get(OPTIONS))  # its words alone do not say what it means
        try:
            asker = await asyncio.to_thread(
                requests.post,
                self.database,
                scope=self.scope,
                session_id=request.session_id,
                session_key=f"{self.scope}:{request.session_id}" if self.lasting else None,
                question=item.question,
                group=item.group,
                product=item.product,
                matched=meaning(item.question, item.context) if special else None,
                detail={**about(request), **(detail or {})},
                price=request.price,
                reuse=not self.lasting,
                similar=None if special else self.similar,
                budget=budget,
                agree=self.agree,
                closed=self.hours is not None and not self.hours.are(time.time()),
            )
        except NobodyAsked as why:
            return await self._instead(request, AdviceStatus.REFUSED, str(why))
        try:
            outcome = await asyncio.wait_for(self._outcome(asker), self.timeout_s)
        except TimeoutError:
            if await asyncio.to_thread(requests.expire, self.database, asker):
                return await self._instead(request, AdviceStatus.TIMEOUT, f"no answer within {self.timeout_s:g} s")
            outcome = (await asyncio.to_thread(requests.outcomes, self.database, [asker]))[asker]  # the last moment
        except asyncio.CancelledError:
            if not self.lasting:  # a session that lasts asks again
                requests.expire(self.database, asker)
            raise
        if outcome.answer is None:
            return await self._instead(request, AdviceStatus.REFUSED, "no expert knows")
        return Advice(outcome.answer, outcome.explanation, outcome.expert, request.price)

    async def _instead(self, request: AdviceRequest, status: AdviceStatus, why: str) -> Advice:
        if self.fallback is not None:
            return await self.fallback.advise(request)
        return Advice("", why, status=status)

    async def _outcome(self, asker: int) -> Outcome:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        self._waiting[asker] = future
        if self._poller is None or self._poller.done() or self._poller.get_loop() is not loop:
            self._poller = loop.create_task(self._poll())
        try:
            return await future
        finally:
            self._waiting.pop(asker, None)

    async def _poll(self) -> None:
        """One look for all who wait: the desk may be in another process."""
        while self._waiting:
            try:
                told = await asyncio.to_thread(requests.outcomes, self.database, list(self._waiting))
            except DatabaseAway as error:  # it may come back
                logger.warning("%s", error)
                told = {}
            for asker, outcome in told.items():
                if (future := self._waiting.get(asker)) is not None and not future.done():
                    future.set_result(outcome)
            await asyncio.sleep(POLL_S)


def about(request: AdviceRequest) -> dict[str, Any]:
    """What is known of a question, for an expert: what the task says of the product, and what the agent added."""
    metadata = request.item.context.get("metadata") or {}
    return {
        "product": {str(k): str(v) for k, v in metadata.items() if v is not None},
        "options": {str(k): str(v) for k, v in (request.item.context.get("options") or {}).items()},
        TURNS: request.item.context.get(TURNS) or [],
        "message": request.message.strip(),
    }
