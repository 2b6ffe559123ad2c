"""Answers questions: sessions of the agent on an event loop of their own, apart from the web server's."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agile.config.hours import HoursConfig
from agile.errors import AgileError
from agile.executor import Executor
from agile.own_answers import confidence
from agile.protocols import Advisor, Policy
from agile.seeding import derive_seed
from agile.serve import deployments, questions, requests, terms, webhooks
from agile.serve.advisor import DeskAdvisor
from agile.serve.database import Database
from agile.serve.memory import DeskMemory
from agile.serve.metrics import Metrics
from agile.serve.models import Question
from agile.serve.requests import Similar
from agile.serve.session import STREAM, patiently, play
from agile.session_log import JsonLines, append_sessions, parts, read_lines
from agile.subjects import question_about
from agile.types import Advice, AdviceRequest, Item, Session, Source

logger = logging.getLogger(__name__)
LOG = "sessions-served.jsonl"
LOG_S = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """The agent that is served.

    Attributes:
        name: Of the model in the API.
        checkpoint: Which agent of the run it is, `ppo`; the log says so.
        products: What can be asked about; the item of each holds what is known of it. One of the name "" for agents
            that are asked about nothing in particular.
        seed: Of sampling, together with a question's number.
        deployment: Its number in the database; None where nothing is swapped.
    """

    name: str
    checkpoint: str
    executor: Executor
    policy: Policy
    products: Mapping[str, Item]
    seed: int
    deployment: int | None = None

    def close(self) -> None:
        """Give back what its policy holds."""
        try:
            if close := getattr(self.policy, "close", None):
                close()
        except AgileError as error:  # it goes with the last reference to it
            logger.warning("%s", error)

    def item(self, question: Question) -> Item:
        known = json.loads(question.context)
        return question_about(
            self.products[question.product], f"{STREAM}/{question.number}", question.text, STREAM, known
        )


@dataclass(slots=True)
class Progress:
    """How far a question is.

    Attributes:
        asking: Whether an expert is being asked.
        read, written: Tokens of the session, once it has ended: what the agent was given, and what it wrote.
        done: Resolves when the answer, or that there is none, is in the database and in the question.
    """

    asking: bool = False
    read: int = 0
    written: int = 0
    done: Future[None] = field(default_factory=Future)


class Runner:
    """Plays a session for every question, and goes on with those that an earlier server left behind.

    A session ends with the agent that it began with, whatever is served meanwhile.

    Args:
        served: Who answers from now on, see `swap`.
        folder: Where the log of sessions is, for `agile show`; what a crash kept from it is added.
        advice_timeout_s, fallback, hours, agree, similar: See `DeskAdvisor`.
        load: Gives the agent of a deployment that is served no more, for sessions that it began.
    """

    def __init__(
        self,
        database: Database,
        served: Served,
        memory: DeskMemory,
        metrics: Metrics,
        folder: Path,
        *,
        advice_timeout_s: float | None = None,
        fallback: Advisor | None = None,
        hours: HoursConfig | None = None,
        agree: int = 1,
        similar: Similar | None = None,
        load: Callable[[int], Served] | None = None,
    ) -> None:
        self.database, self.served, self.memory, self.metrics = database, served, memory, metrics
        self._desk = DeskAdvisor(
            database,
            STREAM,
            lasting=True,
            timeout_s=advice_timeout_s,
            fallback=fallback,
            hours=hours,
            agree=agree,
            similar=similar,
        )
        self._load = load
        self._lock = threading.Lock()
        self._busy: Counter[Served] = Counter()  # sessions under way of each agent
        self._progress: dict[str, Progress] = {}
        self._unlogged: list[str] = []
        self._log = _whole_log(folder / LOG, database, served.checkpoint)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, daemon=True, name="agile-agent")
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> int:
        """Begin; how many questions an earlier server left, which are gone on with."""
        left = questions.unfinished(self.database)
        self._thread.start()
        agents = {self.served.deployment: self.served}
        for question in left:
            if question.deployment not in agents:
                agents[question.deployment] = self._earlier(question.deployment)
            self._begin(question, self._take(agents[question.deployment]), fresh=False)
        return len(left)

    def _work(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _earlier(self, deployment: int | None) -> Served:
        if self._load is None or deployment is None:
            return self.served
        try:
            return self._load(deployment)
        except AgileError as error:  # its journal tells whether this agent can go on with a session of that one
            logger.error("%s", error)
            return self.served

    def look(self) -> None:
        """Swap in the agent that the database says is to be served, if it is another one; blocks while it loads."""
        wanted = deployments.newest(self.database)
        if self._load is None or wanted is None or wanted.id == self.served.deployment:
            return
        began = time.monotonic()
        try:
            self.swap(self._load(wanted.id))
        except Exception as error:  # whatever is wrong with it, the one that is served goes on
            logger.exception("deployment %d", wanted.id)
            deployments.settle(self.database, wanted.id, f"{type(error).__name__}: {error}")
            return
        deployments.settle(self.database, wanted.id)
        logger.info("%s/%s is served, after %.1f s", wanted.run, wanted.agent, time.monotonic() - began)

    def swap(self, served: Served) -> None:
        """Who answers what is asked from now on."""
        with self._lock:
            before, self.served = self.served, served
            idle = not self._busy[before]
        if idle:
            before.close()

    def _take(self, served: Served | None = None) -> Served:
        """An agent for a session, by default the one that is served; it is kept until `_give_back`."""
        with self._lock:
            taken = served or self.served
            self._busy[taken] += 1
            return taken

    def _give_back(self, served: Served) -> None:
        with self._lock:
            self._busy[served] -= 1
            over = not self._busy[served] and served is not self.served
        if over:
            served.close()

    def stop(self) -> None:
        """Leave what is under way to the next server."""

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._log_sessions()

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._log.close()

    def ask(
        self, user_id: int, text: str, product: str, webhook: str = "", known: Mapping[str, Any] | None = None
    ) -> Future[tuple[Question, Progress]]:
        """Keep a question and begin to answer it. What it gives raises DatabaseAway."""
        served = self._take()
        kept = questions.ask(self.database, user_id, text, product, served.deployment, webhook, known)
        begun: Future[tuple[Question, Progress]] = Future()
        begun.set_running_or_notify_cancel()

        def begin(kept: Future[Question]) -> None:  # also where nobody waits for it any more
            try:
                question = kept.result()
            except BaseException as error:
                self._give_back(served)
                begun.set_exception(error)
            else:
                self.metrics.questions.inc()
                begun.set_result((question, self._begin(question, served, fresh=True)))

        kept.add_done_callback(begin)
        return begun

    def learn(self, request_id: str) -> None:
        """Remember an answer that came when nobody waited any more, and tell it to those who gave an address."""
        found = requests.settled(self.database, request_id)
        if found is None or found[0].scope != STREAM or found[1].answer is None:
            return
        request, said = found
        like = self.served.products.get(request.product)
        if like is None or said.answer is None:
            return
        item = question_about(like, request_id, request.question, STREAM, json.loads(request.detail))
        advice = Advice(said.answer, said.explanation, said.expert, request.price)
        self.memory.write(self.served.executor.agent.remember(item, f"late/{request_id}", advice, ""))
        webhooks.tell_late(self.database, request_id, said.answer)

    def progress(self, question_id: str) -> Progress | None:
        """Of a question that is not answered yet."""
        return self._progress.get(question_id)

    def _begin(self, question: Question, served: Served, *, fresh: bool) -> Progress:
        progress = self._progress[question.id] = Progress(asking=question.status == "waiting")
        self._loop.call_soon_threadsafe(self._start, self._run(question, progress, served, fresh))
        return progress

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, question: Question, progress: Progress, served: Served, fresh: bool) -> None:
        async def played() -> Session:
            nonlocal fresh
            first, fresh = fresh, False
            return await self._play(question, progress, served, first)

        try:
            try:
                session = await patiently(played)
            except Exception as error:
                logger.exception("question %d", question.number)
                await self._finish(question, progress, None, f"{type(error).__name__}: {error}", served)
            else:
                why = f"{session.status}: {session.error}".removesuffix(": ")
                failed = (session.answer is None or session.failed) and not session.advised
                await self._finish(question, progress, session, why if failed else "", served)
        finally:
            self._give_back(served)
            self._progress.pop(question.id, None)
            if not progress.done.done():
                progress.done.set_result(None)

    async def _play(self, question: Question, progress: Progress, served: Served, fresh: bool) -> Session:
        def on_asking() -> None:
            question.status = "waiting"
            progress.asking = True

        return await play(
            served.executor,
            served.policy,
            self.memory,
            self.database,
            served.item(question),
            question.number,
            derive_seed(served.seed, STREAM, question.number),
            fresh=fresh,
            price=question.price,
            advise=self._advise,
            on_asking=on_asking,
        )

    async def _advise(self, request: AdviceRequest, detail: Mapping[str, Any]) -> Advice:
        began = time.monotonic()
        self.metrics.asked.inc()
        held = await asyncio.to_thread(terms.current, self.database)
        advice = await self._desk.advise(request, detail, budget=None if held is None else held.daily_budget)
        self.metrics.advised.labels(str(advice.status)).inc()
        if advice.answered:
            self.metrics.waited.observe(time.monotonic() - began)
        return advice

    async def _finish(
        self, question: Question, progress: Progress, session: Session | None, error: str, served: Served
    ) -> None:
        sure = None if session is None or session.advised else confidence(session, served.executor.codec)
        answer = None
        if session is not None and not error:
            answer = None if session.failed else session.answer
            if answer is None and session.advice is not None:  # it failed after it had asked
                answer = session.advice.answer
        text = None if session is None else json.dumps(session, separators=(",", ":"), default=parts)

        async def keep() -> None:
            ended = questions.finish(
                self.database, question.number, answer=answer, error=error, played=session, text=text, confidence=sure
            )
            await asyncio.wrap_future(ended)

        await patiently(keep)
        question.answer, question.error, question.status = answer, error, "failed" if error else "answered"
        self.metrics.seconds.observe(time.time() - question.created_at)
        self.metrics.failed.inc(bool(error))
        if session is not None:
            spans = [span for segment in session.segments for span in segment.spans]
            progress.written = sum(len(span.token_ids) for span in spans if span.source is Source.LLM)
            progress.read = sum(len(span.token_ids) for span in spans) - progress.written
            self.metrics.tokens.inc(progress.read + progress.written)
            if not self._unlogged:
                self._loop.call_later(LOG_S, self._log_sessions)
            self._unlogged.append(f'{{"agent":{json.dumps(served.checkpoint)},"session":{text}}}')

    def _log_sessions(self) -> None:
        """What has ended meanwhile; the database holds it already."""
        self._log.append_json(self._unlogged)
        self._unlogged = []


def _whole_log(path: Path, database: Database, checkpoint: str) -> JsonLines:
    """The log of sessions, without a torn end, with all sessions that the database holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    log = JsonLines(path, synced=False)  # the database holds the same
    known = {record["session"]["id"] for record in read_lines(path)}
    for number in questions.finished(database):
        if f"{STREAM}/{number}" not in known and (session := questions.session_of(database, number)) is not None:
            append_sessions(log, [session], agent=checkpoint)
    return log
