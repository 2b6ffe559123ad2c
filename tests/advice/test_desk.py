"""The desk: price, budget and timeout, whatever the advisor does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from agile.advice import AdviceDesk
from agile.errors import AgileError
from agile.types import Advice, AdviceRequest, AdviceStatus, Item

ITEM = Item("q0", "Is it oven safe?", "yes", "fact")


@dataclass
class Scripted:
    """An advisor that does what a test says."""

    script: Callable[[AdviceRequest], Awaitable[Any]]

    async def advise(self, request: AdviceRequest) -> Advice:
        reply: Advice = await self.script(request)
        return reply


async def answer(request: AdviceRequest) -> Advice:
    await asyncio.sleep(0.001)
    return Advice("yes", "because", "Ann", price=99.0)


async def refuse(request: AdviceRequest) -> Advice:
    return Advice("", price=99.0, status=AdviceStatus.REFUSED)


async def forever(request: AdviceRequest) -> Advice:
    await asyncio.Event().wait()
    raise AssertionError


async def stubborn(request: AdviceRequest) -> Advice:
    """Ignores its cancellation for a while."""
    for _ in range(6):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)
    LATE.append(request.session_id)
    return Advice("late")


LATE: list[str] = []


async def cancel(request: AdviceRequest) -> Advice:
    raise asyncio.CancelledError


def desk(script: Callable[[AdviceRequest], Awaitable[Any]], **rules: Any) -> AdviceDesk:
    return AdviceDesk(Scripted(script), **{"price": 0.3, **rules})


def seek(at: AdviceDesk) -> Advice:
    return asyncio.run(at.seek("s/0", ITEM, "help"))


def test_request_and_price() -> None:
    seen: list[AdviceRequest] = []

    async def script(request: AdviceRequest) -> Advice:
        seen.append(request)
        return await answer(request)

    assert seek(desk(script)) == Advice("yes", "because", "Ann", 0.3)
    assert seen == [AdviceRequest("s/0", ITEM, "help", 0.3)]


def test_only_answers_cost() -> None:
    at = desk(refuse, budget=1)
    assert [seek(at).price for _ in range(3)] == [0.0] * 3
    assert at.answered == 0


def raising(error: BaseException) -> Callable[[AdviceRequest], Awaitable[Any]]:
    async def script(request: AdviceRequest) -> Advice:
        raise error

    return script


def returning(reply: Any) -> Callable[[AdviceRequest], Awaitable[Any]]:
    async def script(request: AdviceRequest) -> Any:
        return reply

    return script


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (raising(ValueError("no idea")), "ValueError: no idea"),
        (raising(StopAsyncIteration()), "StopAsyncIteration"),
        (raising(TimeoutError("theirs")), "TimeoutError: theirs"),
        (cancel, "cancelled"),
        (returning(None), "returned None"),
        (returning("yes"), "returned 'yes'"),
        (returning(Advice(7)), "expected Advice made of text"),  # type: ignore[arg-type]
        (returning(Advice("yes", None)), "expected Advice made of text"),  # type: ignore[arg-type]
        (returning(Advice("yes", status="fine")), "expected Advice made of text"),  # type: ignore[arg-type]
        (lambda request: 7, "TypeError"),
    ],
)
def test_whatever_goes_wrong_is_advice_that_failed(script: Callable[[AdviceRequest], Any], why: str) -> None:
    at = desk(script, budget=1)
    advice = seek(at)
    assert (advice.answer, advice.price, advice.status) == ("", 0.0, AdviceStatus.FAILED)
    assert why in advice.explanation
    assert at.answered == 0


@pytest.mark.parametrize("script", [forever, stubborn])
def test_timeout_gives_no_advice_and_frees_the_budget(script: Callable[[AdviceRequest], Awaitable[Any]]) -> None:
    at = desk(script, budget=1, timeout_s=0.02)

    async def run() -> Advice:
        LATE.clear()
        advice = await at.seek("s/0", ITEM, "")
        assert not LATE  # nobody waited for it
        return advice

    advice = asyncio.run(run())
    assert (advice.status, advice.price) == (AdviceStatus.TIMEOUT, 0.0)
    assert "0.02 s" in advice.explanation
    at.advisor = Scripted(answer)
    assert seek(at).answered


@pytest.mark.parametrize(("budget", "bought"), [(0, 0), (1, 1), (7, 7), (50, 30), (None, 30)])
def test_concurrent_sessions_do_not_overspend(budget: int | None, bought: int) -> None:
    at = desk(answer, budget=budget)

    async def many() -> list[Advice]:
        return await asyncio.gather(*(at.seek(f"s/{i}", ITEM, "") for i in range(30)))

    advice = asyncio.run(many())
    assert sum(a.answered for a in advice) == at.answered == bought
    refused = [a for a in advice if not a.answered]
    assert all(a.status is AdviceStatus.REFUSED and a.price == 0.0 and "spent" in a.explanation for a in refused)
    assert seek(at).answered is (budget is None or bought < budget)


def test_a_cancelled_session_cancels_its_request_and_frees_the_budget() -> None:
    ended: list[str] = []

    async def script(request: AdviceRequest) -> Advice:
        try:
            return await forever(request)
        finally:
            ended.append(request.session_id)

    at = desk(script, budget=1)

    async def run() -> Advice:
        session = asyncio.create_task(at.seek("s/0", ITEM, ""))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        session.cancel()
        with pytest.raises(asyncio.CancelledError):
            await session
        await asyncio.sleep(0)
        at.advisor = Scripted(answer)
        return await at.seek("s/1", ITEM, "")

    assert asyncio.run(run()).answered
    assert ended == ["s/0"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        *(({"price": price}, "advice price") for price in (0, -0.1, 1.01, float("nan"))),
        *(({"budget": budget}, "advice budget") for budget in (-1, 2.5)),
        *(({"timeout_s": timeout_s}, "advice timeout_s") for timeout_s in (0, -1, float("nan"))),
    ],
)
def test_rules_out_of_range_are_clear_errors(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(AgileError, match=message):
        desk(answer, **rules)
