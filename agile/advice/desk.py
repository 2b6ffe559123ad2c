"""Where the executor asks for advice."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from agile.errors import AgileError
from agile.protocols import Advisor
from agile.types import Advice, AdviceRequest, AdviceStatus, Item
from agile.watchdog import StageTimeout, within


@dataclass(slots=True)
class AdviceDesk:
    """Asks an advisor by the rules: a price for each answer, a budget of answers, and a limit on the wait.

    Whatever the advisor does, the session goes on: without an answer it gets an `Advice` that costs nothing, whose
    status says what happened and whose explanation says why.

    Args:
        advisor: Who is asked.
        price: Of one answer, in (0, 1], in units of reward, unless a session has a price of its own.
        budget: How many answers may be bought in the desk's life; None for any number. Requests under way count, so
            that concurrent sessions cannot overspend.
        timeout_s: Seconds to wait for one answer; None for as long as it takes.

    Raises:
        AgileError: A value is out of range.
    """

    advisor: Advisor
    price: float
    budget: int | None = None
    timeout_s: float | None = None
    answered: int = field(default=0, init=False)
    _pending: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.price <= 1:
            raise AgileError(
                f"advice price {self.price}: expected a number in (0, 1]; a right answer earns 1, so advice must cost "
                "something and is worth no more."
            )
        if self.budget is not None and (not isinstance(self.budget, int) or self.budget < 0):
            raise AgileError(
                f"advice budget {self.budget!r}: expected a whole number of answers, at least 0; omit it for no limit."
            )
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise AgileError(
                f"advice timeout_s {self.timeout_s}: expected seconds above 0; omit it to wait as long as it takes."
            )

    async def seek(self, session_id: str, item: Item, message: str, price: float | None = None) -> Advice:
        """Ask about `item`, at the desk's price or this one; never raises, unless the caller is cancelled."""
        if self.budget is not None and self.answered + self._pending >= self.budget:
            return _without(AdviceStatus.REFUSED, f"the budget of {self.budget} answers is spent")
        self._pending += 1
        try:
            advice = await self._ask(AdviceRequest(session_id, item, message, self.price if price is None else price))
        finally:
            self._pending -= 1
        self.answered += advice.answered
        return advice

    async def _ask(self, request: AdviceRequest) -> Advice:
        try:
            advice = await within("advisor", self.timeout_s, _advise(self.advisor, request))
        except StageTimeout:
            if self.timeout_s is None:  # a limit on the whole session's stages, not the desk's
                raise
            return _without(AdviceStatus.TIMEOUT, f"no answer within {self.timeout_s:g} s")
        return replace(advice, price=request.price if advice.answered else 0.0)


async def _advise(advisor: Advisor, request: AdviceRequest) -> Advice:
    """What the advisor returns, or a failure that says what it raised or returned instead of advice."""
    try:
        advice = await advisor.advise(request)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return _without(AdviceStatus.FAILED, "the advisor was cancelled")
    except Exception as error:
        return _without(AdviceStatus.FAILED, f"{type(error).__name__}: {error}")
    texts = (advice.answer, advice.explanation, advice.expert) if isinstance(advice, Advice) else (None,)
    if not all(isinstance(text, str) for text in texts) or not isinstance(advice.status, AdviceStatus):
        return _without(AdviceStatus.FAILED, f"the advisor returned {advice!r:.200}, expected Advice made of text")
    return advice


def _without(status: AdviceStatus, why: str) -> Advice:
    return Advice("", why, status=status)
