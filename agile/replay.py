"""`agile replay`: recorded completions, reads, results and advice through today's executor, agent, tokenizer and task.

What comes out must be what was logged, token for token. So a change of a prompt, a parser or a score that was not meant
shows at the first session that it touches, without a model, an encoder or an expert.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from agile.advice import AdviceDesk, DatasetAdvisor
from agile.build import Setup
from agile.config import load_config
from agile.copies import original_id
from agile.errors import AgileError
from agile.executor import Executor
from agile.session_log import Logged, logged_sessions, session_logs
from agile.show import text_of
from agile.tokens import ActionCodec
from agile.types import (
    Advice,
    Completion,
    Item,
    MemoryItem,
    MemoryRead,
    Observation,
    Retrieved,
    Reward,
    Scope,
    Segment,
    Session,
    SessionStatus,
    Source,
    Stream,
    ToolResult,
    Usage,
)
from agile.watchdog import StageTimeout

T = TypeVar("T")
NO_MORE = "the log holds no more"
CONTEXT = 5  # tokens to show on each side of a difference

# --------------------------------------------------------------------------------------------------------------------
# Stand-ins: each gives what the log says it gave, in order


class RanOut(StageTimeout):
    """A stand-in was asked for more than was logged; the executor ends the session as at a stage that hangs."""

    def __init__(self, stage: str):
        BaseException.__init__(self, f"{stage}: {NO_MORE}")
        self.stage = stage


def _next(rest: Iterator[T], stage: str) -> T:
    for value in rest:
        return value
    raise RanOut(stage)


class _Policy:
    def __init__(self, session: Session):
        spans = [span for segment in session.segments for span in segment.spans if span.source is Source.LLM]
        usages = [session.usage] + [Usage()] * len(spans)  # only their sum is known
        self._rest = iter(list(zip(spans, usages, strict=False)))

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        span, usage = _next(self._rest, "policy")
        return Completion(span.token_ids, span.logprobs, "stop", span.policy_version or 0, usage)


class _Memory:
    def __init__(self, session: Session):
        self._reads, self._written = iter(session.reads), iter(session.written)

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        return [_next(self._written, "memory") for _ in items]

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        return list(self._read(counts=False).entries)

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        return self._read(counts=True).count or 0

    def _read(self, *, counts: bool) -> MemoryRead:
        read = _next(self._reads, "memory")
        if (read.count is not None) is not counts:
            raise RanOut("memory")
        return read

    def __len__(self) -> int:
        raise AgileError("This agent asks how much memory holds, which logs do not say: its sessions have no replay.")


class _Tool:
    """Every tool of the session: the log holds their results in one row."""

    name = description = "replay"

    def __init__(self, session: Session):
        self._rest: Iterator[Observation] = iter([step for step in session.steps if step.source is Source.TOOL])

    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        step = _next(self._rest, "tool")
        return ToolResult(step.text, step.ok)


class _Desk(AdviceDesk):
    def __init__(self, session: Session):
        super().__init__(DatasetAdvisor(), price=1.0)
        self._rest = iter(() if session.advice is None else (session.advice,))

    async def seek(self, session_id: str, item: Item, message: str, price: float | None = None) -> Advice:
        return _next(self._rest, "advisor")


async def replay_session(executor: Executor, session: Session, item: Item, progress: float) -> Session:
    """What today's code makes of a session; equal to it if nothing has changed.

    Where something outside the LLM ended the session (a failure, a time limit), it ends as it did, at the same point.

    Args:
        executor: Its agent, codec, score and limits are used; its tools and desk are not asked.
        item, progress: The question, and the share of its stream that lies before it.
    """

    def score(question: Item, found: Session) -> Reward | Awaitable[Reward]:
        return executor.score(question, _ended_alike(found, session))

    player = Executor(
        executor.agent,
        executor.codec,
        dict.fromkeys(executor.tools, _Tool(session)),
        _Desk(session),
        score,
        replace(executor.limits, max_seconds=None, max_stage_s=None),
        counterfactual=bool(session.counterfactual),
    )
    found = await player.run(
        _Policy(session),
        item,
        _Memory(session),
        stream_id=session.stream_id,
        index=session.index,
        progress=progress,
        seed=session.seed,
        price=session.price,
    )
    return _ended_alike(found, session)


def _ended_alike(found: Session, recorded: Session) -> Session:
    """With the recorded end, if that is no doing of the LLM's and the log ended at the same stage."""
    stage, _, why = found.error.partition(": ")
    timed_out = recorded.status is SessionStatus.TRUNCATED and recorded.error.endswith(" s, the limit")
    failed = recorded.status is SessionStatus.FAILED or recorded.status.endswith("timeout")
    same_stage = stage == "policy" if timed_out else failed and recorded.error.startswith(f"{stage}:")
    if why != NO_MORE or not same_stage:
        return found
    return replace(found, status=recorded.status, error=recorded.error)


# --------------------------------------------------------------------------------------------------------------------
# Differences


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replayed session first differs from its log.

    Attributes:
        where: `segment 0, token 5`, or the name of what differs.
        expected: What was logged.
        found: What today's code makes.
        hint: What changed, as far as can be told.
    """

    where: str
    expected: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        lines = [self.where, f"  expected  {self.expected}", f"  found     {self.found}"]
        return "\n".join(lines + [f"  {self.hint}"] * bool(self.hint))


def first_difference(expected: Session, found: Session, codec: ActionCodec) -> Difference | None:
    """The first token that differs, else the first segment end, status, reward or other field; None if none does."""
    if expected == found:
        return None
    ends = (
        f"today it ends with {found.status}{f' ({found.error})' if found.error else ''}"
        if found.status != expected.status
        else ""
    )
    for number, (a, b) in enumerate(zip_longest(expected.segments, found.segments)):
        if a is None or b is None:
            return Difference(f"segment {number}", "a segment" if a else "none", "a segment" if b else "none", ends)
        if difference := _token_difference(number, a, b, codec):
            hint = "; ".join(filter(None, (_why(expected, found, difference.hint), ends)))
            return replace(difference, hint=hint)
        if a.end != b.end:
            return Difference(f"segment {number}, its end", a.end, b.end, ends)
    names = (
        "status",
        "error",
        "answer",
        "reward",
        "steps",
        "retrieved",
        "written",
        "advice",
        "reads",
        "usage",
        "counterfactual",
    )
    name = next((n for n in names if getattr(expected, n) != getattr(found, n)), "segments")
    pair = getattr(expected, name), getattr(found, name)
    if isinstance(pair[0], tuple):
        number, pair = next((i, p) for i, p in enumerate(zip_longest(*pair)) if p[0] != p[1])
        name = f"{name}, number {number}"
    a_text, b_text = (_words(value) for value in pair)
    return Difference(name, a_text, b_text, "" if name == "status" else ends)


def _token_difference(number: int, a: Segment, b: Segment, codec: ActionCodec) -> Difference | None:
    """The first token of a segment that differs in its id or its writer; the hint is who wrote it."""
    rows = [[(i, span.source) for span in segment.spans for i in span.token_ids] for segment in (a, b)]
    if rows[0] == rows[1]:
        return None
    at = next(i for i, (x, y) in enumerate(zip_longest(*rows)) if x != y)
    expected, found = (_around(row, at, codec) for row in rows)
    source = next(row[at][1] for row in rows if at < len(row))
    return Difference(f"segment {number}, token {at}", expected, found, source)


def _around(row: Sequence[tuple[int, Source]], at: int, codec: ActionCodec) -> str:
    """A token with some of its neighbours as text."""
    before, after = ([i for i, _ in part] for part in (row[max(0, at - CONTEXT) : at], row[at + 1 : at + 1 + CONTEXT]))
    left, right = (text_of(codec, ids) for ids in (before, after))
    if at == len(row):
        return f"... {left!r} and then the segment ends"
    token, source = row[at]
    return f"... {left!r} >> {text_of(codec, [token])!r} << {right!r} ...  (id {token}, {source})"


def _why(expected: Session, found: Session, source: str) -> str:
    if source in (Source.TEMPLATE, Source.CARRIED):
        return "what the prompt format puts around turns has changed"
    for number, (a, b) in enumerate(zip(expected.steps, found.steps, strict=False)):
        if a != b:
            what = "text" if a.action == b.action else "action"
            return f"step {number}, {a.action}: another {what} ({_words(a)} became {_words(b)})"
    return "the text is the same, its tokens are not: the tokenizer is not the one that the session was played with"


def _words(value: Any) -> str:
    match value:
        case Reward():
            text = f"{value.total:g} {dict(value.components)}"
        case Observation():
            text = f"{value.action} -> {value.text!r}"
        case _:
            text = repr(value) if not isinstance(value, str) or not value else str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


# --------------------------------------------------------------------------------------------------------------------
# A run


class RunParts:
    """What today's code makes of a run's config: executors with the run's tokenizers, and the questions.

    Raises:
        AgileError: The folder is no run.
    """

    def __init__(self, run: Path):
        session_logs(run)
        if not (run / "config.yaml").exists():
            raise AgileError(
                f"{run} is no run (it has no config.yaml). Name a folder of `agile train` or `agile bench`."
            )
        self.run, self.config = run, load_config(run / "config.yaml")
        self._executors: dict[Path, Executor] = {}

    @cached_property
    def _trained(self) -> Path:
        """Where the agents are: a bench may stand in a folder of its own."""
        has_agents = any((self.run / name).is_dir() for name in ("sft", "ppo", "dpo"))
        return self.run if has_agents else next(iter(self.config.evaluate.checkpoint), self.run)

    @cached_property
    def setup(self) -> Setup:
        return Setup(self.config, self._trained if self.config.task.data is None else self.run)

    @cached_property
    def _streams(self) -> dict[str, Mapping[str, Stream]]:
        return {}

    def executor(self, logged: Logged) -> Executor:
        if logged.path not in self._executors and logged.agent == "prompted":
            carrier = self.setup.carrier()
            codec = ActionCodec(carrier, self.setup.agent.spec)
            self._executors[logged.path] = self.setup.executor(carrier, codec=codec)
        if logged.path not in self._executors:
            names = [logged.agent] if logged.agent else ["ppo", "sft", "dpo"]
            folders = [self._trained / name for name in names if (self._trained / name).is_dir()]
            if not folders:
                raise AgileError(
                    f"{self._trained} has no agent {' or '.join(names)}, whose tokenizer {logged.path.name} needs. "
                    "Finish the run, or put it back where it was."
                )
            self._executors[logged.path] = self.setup.executor(self.setup.tokenizer(folders[0]))
        return self._executors[logged.path]

    def stream(self, logged: Logged) -> Stream | None:
        """The stream of a session as the task has it today, if it still has one."""
        split = "test" if logged.step is None else "train"
        if split not in self._streams:
            self._streams[split] = {stream.id: stream for stream in self.setup.task.streams(split)}
        streams, stream_id = self._streams[split], logged.session.stream_id
        return streams.get(stream_id) or streams.get(original_id(stream_id))

    def item(self, logged: Logged) -> Item | None:
        stream, index = self.stream(logged), logged.session.index
        return stream.items[index] if stream and index < len(stream.items) else None


@dataclass(frozen=True, slots=True)
class Replayed:
    """How far the sessions of a run were identical: all of them, or those before `different`."""

    num_identical: int
    different: Logged | None = None
    difference: Difference | None = None

    def __str__(self) -> str:
        if self.different is None:
            return f"{self.num_identical:,} of {self.num_identical:,} sessions identical"
        return f"{self.num_identical:,} sessions identical, then {self.different}: {self.difference}"


def replay_run(run: Path, console: Console, *, session_id: str | None = None, step: int | None = None) -> Replayed:
    """Replay the sessions of a run until one differs.

    Raises:
        AgileError: No such run, session, step or agent.
    """
    parts = RunParts(run)
    total = None
    if session_id is None and step is None:
        total = sum(_num_lines(path) for path in session_logs(run))
    return asyncio.run(_replay_all(parts, logged_sessions(run, session_id, step), total, console))


async def _replay_all(parts: RunParts, sessions: Iterator[Logged], total: int | None, console: Console) -> Replayed:
    identical = 0
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("replay", total=total)
        for logged in sessions:
            if difference := await _replay_one(parts, logged):
                return Replayed(identical, logged, difference)
            identical += 1
            progress.advance(bar)
    return Replayed(identical)


async def _replay_one(parts: RunParts, logged: Logged) -> Difference | None:
    session, item = logged.session, parts.item(logged)
    if item is None or item.id != session.item_id:
        return Difference(
            "the question", session.item_id, "none" if item is None else item.id, "the task's data have changed"
        )
    stream, executor = parts.stream(logged), parts.executor(logged)
    assert stream is not None
    found = await replay_session(executor, session, item, stream.progress(session.index))
    return first_difference(session, found, executor.codec)


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
