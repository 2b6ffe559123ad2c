"""Nobody holds up a session beyond its limit: whoever waits, blocks, or ignores cancellation is left behind."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest

from agile.executor import Limits
from agile.policies.scripted import ScriptedPolicy
from agile.rollout import collect
from agile.types import Action, Advice, AdviceRequest, Fn, Item, MemoryItem, Retrieved, Scope, Session, Stream
from agile.types import ToolResult as Result
from agile.watchdog import StageTimeout, interrupted, within
from tests.worlds import Echo, ListMemory, check_session, item, make_codec, make_executor, play, script

pytestmark = pytest.mark.filterwarnings("error")
LIMIT_S = 0.2  # what is not to be interrupted takes far less, on a busy machine too
LIMITS = Limits(max_stage_s=LIMIT_S)
SOON_S = 30.0  # who hangs does so for 60 s or for ever


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> Iterator[None]:
    """All that torch and transformers made would be walked through after each test; what other tests left is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_is_left_unheard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Errors of tasks and coroutines that nobody awaited are reported when they are collected."""
    yield
    gc.collect()
    assert not caplog.records


async def waits() -> None:
    await asyncio.Event().wait()


async def ignores() -> None:
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


async def fails_late() -> None:
    try:
        await asyncio.sleep(60)
    finally:
        raise ValueError("too late to matter")


async def sleeps() -> None:
    time.sleep(60)


async def spins() -> None:
    while True:
        with suppress(Exception):
            sum(range(100))


Hang = Callable[[], Awaitable[None]]
HANGS = [waits, ignores, fails_late, sleeps, spins]


class Hangs:
    """A policy, tool and advisor that never answers."""

    name = description = "SearchProduct"

    def __init__(self, hang: Hang) -> None:
        self.hang = hang

    async def complete(self, prompt_ids: Sequence[int], **options: Any) -> Any:
        await self.hang()

    async def __call__(self, argument: str, item: Item, earlier: Any = ()) -> Result:
        await self.hang()
        return Result("late")

    async def advise(self, request: AdviceRequest) -> Advice:
        await self.hang()
        return Advice("late")


SEARCH, PREDICT = Action("SearchProduct", "SELECT 1"), Action(Fn.PREDICT_ANSWER, "yes")
ASK = (Action(Fn.SEEK_ADVICE), Action(Fn.REFLECTION, "steel is washable"), PREDICT)


def check_timeout(session: Session, stage: str, started: float) -> None:
    assert (session.status, session.error) == (f"{stage}_timeout", f"{stage}: not done after {LIMIT_S} s")
    assert time.monotonic() - started < SOON_S
    assert session.reward is not None and session.reward.total == 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 or signal.getsignal(signal.SIGALRM) is not None


@pytest.mark.parametrize("hang", HANGS)
@pytest.mark.parametrize("stage", ["policy", "tool", "advisor"])
def test_a_call_that_never_returns_ends_its_session(stage: str, hang: Hang) -> None:
    started = time.monotonic()
    codec, hangs = make_codec(), Hangs(hang)
    match stage:
        case "policy":
            session = play(make_executor(limits=LIMITS), hangs)
        case "tool":
            executor = make_executor(tools={"SearchProduct": hangs}, limits=LIMITS)
            session = play(executor, script(codec, SEARCH))
        case _:
            session = play(make_executor(advisor=hangs, limits=LIMITS), script(codec, *ASK))
    check_timeout(session, stage, started)
    check_session(session, codec, LIMITS)


class Stuck(ListMemory):
    def __init__(self, where: str, block: Callable[[], None]) -> None:
        super().__init__()
        self.where, self.block = where, block

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        if getattr(self, "where", "") == "write":
            self.block()
        return super().write(items)

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        if self.where == "retrieve":
            self.block()
        return super().retrieve(query, k, scope)


def doze() -> None:
    time.sleep(60)


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("block", [doze, spin])
@pytest.mark.parametrize("where", ["retrieve", "write"])
def test_memory_that_blocks_ends_its_session(where: str, block: Callable[[], None]) -> None:
    started = time.monotonic()
    session = play(make_executor(limits=LIMITS), script(make_codec(), *ASK), memory=Stuck(where, block))
    check_timeout(session, "memory", started)


@pytest.mark.parametrize("hang", HANGS)
def test_the_other_sessions_go_on(hang: Hang) -> None:
    """Though their own calls take most of the limit, and several turns of the loop."""

    class Tool(Echo):
        async def __call__(self, argument: str, item: Item, earlier: Any = ()) -> Result:
            for _ in range(4):
                await asyncio.sleep(LIMIT_S / 10)
            if item.id == "bad":
                await hang()
            return await super().__call__(argument, item)

    codec = make_codec()
    executor = make_executor(codec=codec, tools={"SearchProduct": Tool()}, limits=LIMITS)

    def policy(item: Item, memory: Any) -> ScriptedPolicy:
        return script(codec, SEARCH, PREDICT)

    def question(name: str) -> Item:
        return Item(name, "?", "yes", "fact", "shop", "p1", item().context)

    streams = [Stream(n, (question(n), question("good"))) for n in ("a", "bad", "b", "c")]
    run = collect(executor, policy(item(), None), streams, lambda s: ListMemory(), seed=0, policy_for=policy)
    statuses = [[s.status for s in t.sessions] for t in asyncio.run(run)]
    good = ["completed", "completed"]
    assert statuses == [good, ["tool_timeout", "completed"], good, good]


# --------------------------------------------------------------------------------------------------------------------
# The two guards


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_what_is_done_in_time_passes_with_its_errors() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def cancel_itself() -> None:
        raise asyncio.CancelledError

    assert asyncio.run(within("tool", 5, give(3))) == asyncio.run(within("tool", None, give(3))) == 3
    with pytest.raises(KeyError):
        asyncio.run(within("tool", 5, fail()))
    with pytest.raises(RuntimeError, match="the tool was cancelled"):
        asyncio.run(within("tool", 5, cancel_itself()))


def test_a_cancelled_caller_cancels_the_call_and_waits_for_its_cleaning() -> None:
    seen = []

    async def call() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned")

    async def main(steps: int) -> None:
        task = asyncio.ensure_future(within("tool", 60, call()))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(5):
            await asyncio.sleep(0)

    for steps in (1, 5):
        asyncio.run(main(steps))
    assert seen == ["cleaned", "cleaned"]


def test_a_call_that_catches_every_error_is_interrupted_again() -> None:
    caught = 0
    with pytest.raises(StageTimeout), interrupted("memory", 0.02):
        while True:
            try:
                time.sleep(60)
            except BaseException:
                caught += 1
                if caught == 3:
                    raise


def test_a_timer_that_was_set_before_goes_on() -> None:
    fired: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 30, 7)
        with interrupted("memory", 5):
            time.sleep(0.01)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 20 < left < 30 and interval == pytest.approx(7, abs=0.01)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(StageTimeout), interrupted("memory", 0.1):
            time.sleep(60)  # the outer timer was due meanwhile
        time.sleep(0.01)
        assert len(fired) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_outside_the_main_thread_calls_that_wait_are_limited_and_others_are_let_be() -> None:
    results: list[Any] = []

    def work() -> None:
        with interrupted("memory", 0.01):
            time.sleep(0.03)
        try:
            asyncio.run(within("tool", 0.01, waits()))
        except StageTimeout as error:
            results.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert results == ["tool: not done after 0.01 s"]


def test_the_guard_costs_little() -> None:
    """Measured on two busy, slow cores: 1 ms a call, 0.1 ms for each step's timer; the bound is wide."""

    async def calls() -> float:
        started = time.monotonic()
        for i in range(300):
            await within("tool", 5, give(i))
        return (time.monotonic() - started) / 300

    assert asyncio.run(calls()) < 0.1


def test_a_call_may_cancel_itself_to_end_a_scope_of_its_own() -> None:
    """As anyio does, under every HTTP client: again and again until the scope is left."""

    async def scoped() -> str:
        task = asyncio.current_task()
        assert task is not None
        for _ in range(3):
            asyncio.get_running_loop().call_soon(task.cancel)
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(10)
            task.uncancel()
        return "done"

    assert asyncio.run(within("policy", 5.0, scoped())) == "done"
