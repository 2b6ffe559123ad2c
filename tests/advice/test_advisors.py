"""Experts: one contract for all of them, then what is particular to each."""

from __future__ import annotations

import asyncio
import io
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from agile.advice import (
    NOTHING_READABLE,
    AdviceDesk,
    CallbackAdvisor,
    DatasetAdvisor,
    NoisyAdvisor,
    RecordedAdvisor,
    TerminalAdvisor,
    wrong_answer,
)
from agile.errors import AgileError
from agile.protocols import Advisor
from agile.types import Advice, AdviceRequest, AdviceStatus, Item

ITEM = Item("q0", "Is it [bold]oven safe[/bold]?", "yes", "fact", "pans", "B01", {"long_answer": "Yes, to 400 F."})


def request(item: Item = ITEM, session_id: str = "s/0", message: str = "") -> AdviceRequest:
    return AdviceRequest(session_id, item, message, price=0.3)


def ask(advisor: Advisor, asked: AdviceRequest | None = None) -> Advice:
    return asyncio.run(advisor.advise(asked or request()))


def terminal(read_line: Callable[[], str]) -> TerminalAdvisor:
    return TerminalAdvisor(read_line, Console(file=io.StringIO(), width=100))


def shown(advisor: TerminalAdvisor) -> str:
    file = advisor._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


async def slow_yes(asked: AdviceRequest) -> str:
    await asyncio.sleep(0.01)
    return "yes"


class AsyncCallable:
    async def __call__(self, asked: AdviceRequest) -> str:
        return "yes"


# The contract

ADVISORS: dict[str, Callable[[], Advisor]] = {
    "sync": lambda: CallbackAdvisor(lambda asked: "yes"),
    "async": lambda: CallbackAdvisor(slow_yes),
    "async object": lambda: CallbackAdvisor(AsyncCallable()),
    "advice": lambda: CallbackAdvisor(lambda asked: Advice("yes", "Yes, to 400 F.", "Ann")),
    "dataset": lambda: DatasetAdvisor(),
    "noisy": lambda: NoisyAdvisor(DatasetAdvisor(), 0.0, lambda asked: "no", seed=0),
    "terminal": lambda: terminal(lambda: "yes\n"),
}


@pytest.mark.parametrize("name", ADVISORS)
def test_contract(name: str) -> None:
    """Answers with text, through the desk at the desk's price, one and many at once, in one loop after another."""
    advisor = ADVISORS[name]()
    for _ in range(2):
        advice = ask(advisor)
        assert (advice.answer, advice.status) == ("yes", AdviceStatus.ANSWERED)
        assert isinstance(advice.explanation, str) and advice.expert

    async def many() -> list[Advice]:
        desk = AdviceDesk(advisor, price=0.25, timeout_s=30)
        return await asyncio.gather(*(desk.seek(f"s/{i}", ITEM, "") for i in range(20)))

    assert {(advice.answer, advice.price) for advice in asyncio.run(many())} == {("yes", 0.25)}


# CallbackAdvisor


@pytest.mark.parametrize("reply", [None, "", "  \n"])
def test_callback_that_does_not_know(reply: str | None) -> None:
    advice = ask(CallbackAdvisor(lambda asked: reply, name="Ann"))
    assert (advice.status, advice.price, advice.expert) == (AdviceStatus.REFUSED, 0.0, "Ann")


@pytest.mark.parametrize("reply", [7, b"yes", ["yes"], {"answer": "yes"}])
def test_callback_of_a_wrong_type(reply: Any) -> None:
    with pytest.raises(TypeError, match=r"'callback' returned \w+; expected str, Advice, or None"):
        ask(CallbackAdvisor(lambda asked: reply))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(KeyError("x"), KeyError), (StopIteration(), RuntimeError), (SystemExit(3), RuntimeError)],
)
def test_callback_that_raises(error: BaseException, expected: type[Exception]) -> None:
    def function(asked: AdviceRequest) -> str:
        raise error

    with pytest.raises(expected):
        ask(CallbackAdvisor(function))


def test_sync_callback_does_not_block_the_loop() -> None:
    release = threading.Event()

    def function(asked: AdviceRequest) -> str:
        return "yes" if release.wait(60) else "never released"

    async def both() -> str:
        task = asyncio.create_task(CallbackAdvisor(function).advise(request()))
        await asyncio.sleep(0.01)
        assert not task.done()
        release.set()  # only a loop that goes on gets here
        return (await task).answer

    assert asyncio.run(both()) == "yes"


def test_callback_that_never_answers_does_not_keep_the_process() -> None:
    program = """
import asyncio, threading
from agile.advice import AdviceDesk, CallbackAdvisor
from agile.types import Item
desk = AdviceDesk(CallbackAdvisor(lambda request: threading.Event().wait()), price=0.3, timeout_s=0.05)
print(asyncio.run(desk.seek("s/0", Item("q", "?", "yes", "fact"), "")).status)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "timeout\n", "")


# DatasetAdvisor


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("yes", "yes"),
        (7, "7"),
        ([{"asin": "B1", "title": "a"}, {"asin": "B2", "title": "b"}], "B1"),
        ([], "none"),
        (("red", "blue"), "red"),
    ],
)
def test_gold_answers_as_text(answer: Any, text: str) -> None:
    assert ask(DatasetAdvisor(), request(Item("q", "?", answer, "fact"))) == Advice(text, "", "dataset", 0.3)


def test_dataset_explanations() -> None:
    assert ask(DatasetAdvisor()).explanation == "Yes, to 400 F."
    advisor = DatasetAdvisor(answer=lambda item: item.id, explain=lambda item: item.kind)
    assert ask(advisor) == Advice("q0", "fact", "dataset", 0.3)


# NoisyAdvisor


def noisy(rate: float, seed: int = 0) -> NoisyAdvisor:
    return NoisyAdvisor(DatasetAdvisor(), rate, lambda asked: "no", seed)


def verdicts(advisor: Advisor, order: list[int]) -> dict[int, str]:
    async def run() -> dict[int, str]:
        return {i: (await advisor.advise(request(session_id=f"s/{i}", message=str(order[0])))).answer for i in order}

    return asyncio.run(run())


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_noise_has_its_rate(rate: float) -> None:
    n = 4000
    wrong = sum(answer == "no" for answer in verdicts(noisy(rate), list(range(n))).values())
    assert abs(wrong - rate * n) <= 4 * (n * rate * (1 - rate)) ** 0.5  # four binomial standard deviations


def test_noise_depends_on_seed_and_request_alone() -> None:
    order = list(range(200))
    once = verdicts(noisy(0.5), order)
    assert once == verdicts(noisy(0.5), order[::-1])
    assert once != verdicts(noisy(0.5, seed=1), order)
    # The same in every process and version, whatever PYTHONHASHSEED is.
    assert "".join(once[i][0] for i in range(20)) == "ynnnynnnnynnnnnyynny"


def test_noise_tells_no_truth_and_invents_no_advice() -> None:
    assert ask(noisy(1.0)) == Advice("no", "", "dataset", 0.3)
    silent = NoisyAdvisor(CallbackAdvisor(lambda asked: None), 1.0, lambda asked: "no", seed=0)
    assert ask(silent).status is AdviceStatus.REFUSED


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_noise_needs_a_probability(rate: float) -> None:
    with pytest.raises(AgileError, match="error_rate="):
        noisy(rate)


# TerminalAdvisor


def test_terminal_shows_the_question_as_it_is() -> None:
    advisor = terminal(lambda: " 400 F \n")
    assert ask(advisor, request(message="which [red]temperature[/red]?")) == Advice("400 F", "", "terminal", 0.3)
    screen = shown(advisor)
    for text in ("Is it [bold]oven safe[/bold]?", "which [red]temperature[/red]?", "pans / B01"):
        assert text in screen


def end_of_file() -> str:
    raise EOFError


@pytest.mark.parametrize("read_line", [lambda: "\n", lambda: "   ", end_of_file])
def test_terminal_that_does_not_know(read_line: Callable[[], str]) -> None:
    assert ask(terminal(read_line)) == Advice("", expert="terminal", status=AdviceStatus.REFUSED)


def test_terminal_asks_one_question_at_a_time() -> None:
    reading = threading.Lock()

    def read_line() -> str:
        assert reading.acquire(blocking=False), "two reads at once"
        time.sleep(0.005)
        reading.release()
        return "yes"

    advisor = terminal(read_line)

    async def many() -> list[Advice]:
        return await asyncio.gather(*(advisor.advise(request()) for _ in range(5)))

    assert [advice.answer for advice in asyncio.run(many())] == ["yes"] * 5


def test_line_typed_after_a_timeout_answers_the_next_question() -> None:
    typed: queue.Queue[str] = queue.Queue()
    advisor = terminal(typed.get)

    async def two() -> tuple[Advice, Advice]:
        first = await AdviceDesk(advisor, price=0.3, timeout_s=0.05).seek("s/0", ITEM, "")
        second = asyncio.create_task(AdviceDesk(advisor, price=0.3).seek("s/1", ITEM, ""))
        await asyncio.sleep(0.01)
        typed.put("yes")
        return first, await second

    first, second = asyncio.run(two())
    assert first.status is AdviceStatus.TIMEOUT
    assert second.answer == "yes"


# --------------------------------------------------------------------------------------------------------------------
# Recorded answers, and wrong ones


def test_recorded_answers_are_given_and_null_is_one_that_nobody_can_read() -> None:
    known = RecordedAdvisor({"q0": "B"}, "m")
    assert ask(known) == Advice("B", expert="m", price=0.3)
    assert ask(RecordedAdvisor({"q0": None}, "m")) == Advice(NOTHING_READABLE, expert="m", price=0.3)
    assert ask(RecordedAdvisor({"q1": "B"}, "m")).status is AdviceStatus.REFUSED


@pytest.mark.parametrize(("gold", "wrong"), [("yes", "no"), ("No", "yes"), ("a pan", "unknown")])
def test_wrong_answers_of_short_ones(gold: str, wrong: str) -> None:
    assert wrong_answer(request(Item("q0", "?", gold, "fact"))) == wrong


def test_wrong_answers_are_other_options_evenly() -> None:
    item = Item("q0", "?", "B", "k", context={"options": dict.fromkeys("ABCD", "words")})
    given = [wrong_answer(request(item, f"s/{n}")) for n in range(300)]
    assert set(given) == {"A", "C", "D"}
    assert min(map(given.count, "ACD")) > 60
    assert given == [wrong_answer(request(item, f"s/{n}")) for n in range(300)]


def test_a_wrong_answer_is_no_letter_of_a_gold_answer_in_words() -> None:
    item = Item("q0", "?", "cool", "choice", context={"options": {"A": "warm", "B": "cool"}})
    assert {wrong_answer(request(item, f"s/{n}")) for n in range(30)} == {"A"}
