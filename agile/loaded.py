"""A trained agent in a program of your own: `agile.load`."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from agile.advice import AdviceDesk, CallbackAdvisor
from agile.advice.advisors import Reply as Said
from agile.build import Setup
from agile.config import load_config
from agile.conversation import TURNS, Turn
from agile.errors import AgileError
from agile.executor import Executor
from agile.memory.store import SqliteMemory
from agile.protocols import Advisor, TrainablePolicy
from agile.subjects import OPTIONS, question_about, subjects
from agile.types import Advice, AdviceRequest, Item, Reward, Session

AGENTS = ("dpo", "ppo", "sft")
STREAM = "asked"
Ask = Callable[[AdviceRequest], Said | Awaitable[Said]]


def agent_of(run: Path, chosen: str | None = None) -> str:
    """The name of an agent of a run: the chosen one, else the one that was trained last.

    Raises:
        AgileError: There is none.
    """
    trained = [name for name in AGENTS if (run / name / "config.json").exists()]
    if not trained or not (run / "config.yaml").exists():
        raise AgileError(
            f"There is no trained agent in {run}. Train one first: agile demo, or agile train CONFIG out={run}."
        )
    if chosen is not None and chosen not in trained:
        raise AgileError(f"{run} has no agent {chosen}, only {', '.join(trained)}.")
    return chosen or trained[0]


def ready(setup: Setup, folder: Path, advisor: Advisor | None = None) -> tuple[Executor, TrainablePolicy]:
    """What plays sessions of the agent saved in a folder, without sampling, for people: nothing is scored."""
    tokenizer = setup.tokenizer(folder)
    executor = setup.executor(tokenizer, advisor)
    executor.score = lambda item, session: Reward({})
    executor.limits = replace(executor.limits, max_stage_s=None)  # people think as long as they like
    return executor, setup.greedy(tokenizer, folder)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent answered.

    Attributes:
        text: None if it came to no answer; `session.status` and `session.error` say why.
        advised: Whether an expert told it.
        session: Token by token.
    """

    text: str | None
    advised: bool
    session: Session

    def __str__(self) -> str:
        return self.text or ""


@dataclass(frozen=True, slots=True)
class _There:
    """An advisor who is asked in another event loop, where what it uses lives."""

    advisor: Advisor
    loop: asyncio.AbstractEventLoop

    async def advise(self, request: AdviceRequest) -> Advice:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.advisor.advise(request), self.loop))


class LoadedAgent:
    """An agent that answers questions, asks an expert where it is worth the price, and remembers what it was told.

    From any thread, any event loop, and several at once: sessions are played together on an event loop of its own.

    Args:
        run: Its folder.
        agent: Which of its agents, `sft`, `ppo` or `dpo`; by default the one that was trained last.
        memory: The SQLite file that it remembers in; None forgets everything at the end.

    Attributes:
        products: What can be asked about; "" is nothing in particular.

    Raises:
        AgileError: The folder holds no such agent, or its questions need more than somebody could say.
    """

    def __init__(self, run: Path, *, agent: str | None = None, memory: Path | None = None) -> None:
        self.folder = run / agent_of(run, agent)
        self._setup = Setup(load_config(run / "config.yaml"), run)
        self._subjects = subjects(self._setup.task, self._setup.config.task.name)
        self.products = tuple(self._subjects)
        self._executor, self._policy = ready(self._setup, self.folder, CallbackAdvisor(lambda request: None, "nobody"))
        self._memory = SqliteMemory(self._setup.encoder, memory)
        last = max((int(entry.session_id.rpartition("/")[2]) for entry in self._memory.items()), default=-1)
        self._numbers = itertools.count(last + 1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="agile-agent")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(
        self,
        question: str,
        *,
        product: str = "",
        advisor: Ask | Advisor | None = None,
        options: Mapping[str, str] | None = None,
        turns: Sequence[Turn] = (),
    ) -> Answer:
        """Ask, and wait for the answer.

        Args:
            product: What the question is about, one of `products`; may be left out where there is only one.
            advisor: Who is asked for advice: a function of the request, sync or async, which returns the answer or
                None if it does not know, or an `Advisor`. Without one the agent hears that nobody is there.
            options: By letter, for agents that choose: `{"A": "iron", "B": "zinc"}`.
            turns: What was said before, pairs of `user` or `assistant` and a text; see `agent.show_turns`.

        Raises:
            AgileError: The product is unknown, the question empty, options are missing, or the agent is closed.
        """
        item = self._item(question, product, options, turns)
        playing = asyncio.run_coroutine_threadsafe(self._play(item, _advisor(advisor)), self._loop)
        try:
            return playing.result()
        except BaseException:  # whoever interrupts the wait wants no answer
            playing.cancel()
            raise

    async def ask_async(
        self,
        question: str,
        *,
        product: str = "",
        advisor: Ask | Advisor | None = None,
        options: Mapping[str, str] | None = None,
        turns: Sequence[Turn] = (),
    ) -> Answer:
        """`ask` without blocking; an advisor that is async runs in the event loop of who asks."""
        item = self._item(question, product, options, turns)
        who = _advisor(advisor)
        there = None if who is None else _There(who, asyncio.get_running_loop())
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._play(item, there), self._loop))

    def close(self) -> None:
        """End the sessions under way and give back model and memory; a second time does nothing."""
        if self._loop.is_closed():
            return

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._policy.close()
        self._memory.close()
        self._setup.encoder.close()

    def _item(self, question: str, product: str, options: Mapping[str, str] | None, turns: Sequence[Turn]) -> Item:
        if self._loop.is_closed():
            raise AgileError(f"The agent {self.folder} is closed; load it again to ask {question!r:.80}.")
        if not question.strip():
            raise AgileError(f"The question is {question!r:.80}, expected text.")
        if not product and len(self.products) == 1:
            product = self.products[0]
        if product not in self._subjects:
            some = ", ".join(self.products[:8])
            raise AgileError(f"The product is {product!r:.80}, expected one of {some}; product=... names it.")
        known = {OPTIONS: options or {}, TURNS: turns}
        return question_about(self._subjects[product], "", question.strip(), STREAM, known)

    async def _play(self, item: Item, advisor: Advisor | None) -> Answer:
        number, own = next(self._numbers), self._executor
        item = replace(item, id=f"{STREAM}/{number}")
        desk = AdviceDesk(advisor or own.desk.advisor, own.desk.price)
        executor = Executor(own.agent, own.codec, own.tools, desk, own.score, own.limits)
        session = await executor.run(
            self._policy, item, self._memory, stream_id=STREAM, index=number, progress=0.0, seed=number
        )
        return Answer(None if session.failed else session.answer, session.advised, session)


def _advisor(given: Ask | Advisor | None) -> Advisor | None:
    return given if given is None or hasattr(given, "advise") else CallbackAdvisor(given)


def load(run: str | Path, *, agent: str | None = None, memory: str | Path | None = None) -> LoadedAgent:
    """The trained agent of a run folder, ready to be asked; see `LoadedAgent`."""
    return LoadedAgent(
        Path(run).expanduser(), agent=agent, memory=None if memory is None else Path(memory).expanduser()
    )
