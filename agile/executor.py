"""The executor: reads the actions of an LLM and routes each to memory, a tool, reflection or an expert.

Token in, token out. What the LLM sampled stays as it was sampled; what it is shown is tokenised once, when it is
appended. Nothing that an LLM emits can raise out of `Executor.run`: a bad action is answered with an error, a bad
session ends with a status.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from agile.advice import AdviceDesk
from agile.errors import AgileError
from agile.protocols import Agent, Memory, Policy, Score, Tool
from agile.seeding import derive_seed
from agile.tokens import ActionCodec
from agile.types import (
    Action,
    Advice,
    Completion,
    Fn,
    Item,
    MemoryItem,
    MemoryRead,
    Observation,
    Retrieved,
    Reward,
    Scope,
    Segment,
    SegmentEnd,
    Session,
    SessionStatus,
    Source,
    Span,
    Usage,
)
from agile.watchdog import StageTimeout, interrupted, within

Speaker = Literal["user", "llm"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a session early.

    Attributes:
        max_turns: Calls of the policy.
        max_session_tokens: Tokens of all segments together.
        max_context_tokens: Tokens of one segment. What would not fit is not shown, and the session ends.
        max_action_tokens: Tokens of one action.
        max_invalid_actions: Malformed or illegal actions that are answered with an error; one more ends the session.
        max_seconds: Wall-clock time; None for no limit (a limit makes a run depend on the machine).
        max_stage_s: Wall-clock time of one call of the policy, a tool, the expert or memory; None for no limit. Whoever
            is not done by then is left behind, and the session ends with a status that names the stage.
    """

    max_turns: int = 16
    max_session_tokens: int = 4096
    max_context_tokens: int = 2048
    max_action_tokens: int = 128
    max_invalid_actions: int = 2
    max_seconds: float | None = None
    max_stage_s: float | None = None


class _StageError(Exception):
    """Something outside the LLM failed; the message names the stage."""


class _Truncated(Exception):
    pass


class _TooManyInvalid(Exception):
    pass


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Every failure of a collaborator passes here and gets the name of its stage."""
    try:
        yield
    except AgileError:
        raise
    except Exception as error:
        raise _StageError(f"{name}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class _RecordedMemory:
    """A memory whose reads are kept for the session's log."""

    memory: Memory
    reads: list[MemoryRead]
    found: list[tuple[str, Retrieved]] = field(default_factory=list)  # with the query that found it
    counts: dict[tuple[str, float, Scope], int] = field(default_factory=dict)

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        return self.memory.write(items)

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        entries = self.memory.retrieve(query, k, scope)
        self.reads.append(MemoryRead(tuple(entries)))
        self.found.extend((query, entry) for entry in entries)
        return entries

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        count = self.memory.count_similar(query, threshold, scope)
        self.reads.append(MemoryRead(count=count))
        self.counts[query, threshold, scope] = count
        return count

    def __len__(self) -> int:
        return len(self.memory)


@dataclass(frozen=True, slots=True)
class _WithoutFound:
    """The recorded memory as if what was found in it had never been written: nothing takes its place.

    A count is less by the entries that the same query found: of others nobody knows how similar they are.
    """

    recorded: _RecordedMemory

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        raise TypeError("an agent's recall wrote to memory; it may only read")

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        return []

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        counted = {
            entry.item.id
            for asked, entry in self.recorded.found
            if asked == query and entry.similarity >= threshold and scope.covers(entry.item)
        }
        return max(0, self.recorded.counts.get((query, threshold, scope), 0) - len(counted))

    def __len__(self) -> int:
        return len(self.recorded) - len({entry.item.id for _, entry in self.recorded.found})


@dataclass(slots=True)
class _Draft:
    """A session while it runs."""

    item: Item
    memory: Memory
    policy: Policy
    id: str
    seed: int
    progress: float
    price: float
    started: float
    spans: list[Span] = field(default_factory=list)
    speaker: Speaker | None = None
    segments: list[Segment] = field(default_factory=list)
    steps: list[Observation] = field(default_factory=list)
    retrieved: list[tuple[int, float]] = field(default_factory=list)
    reads: list[MemoryRead] = field(default_factory=list)
    blanks: dict[int, tuple[int, ...]] = field(default_factory=dict)  # spans of this window without what was retrieved
    counterfactual: tuple[int, ...] = ()
    written: list[int] = field(default_factory=list)
    advice: Advice | None = None
    reflection: str = ""
    prediction: str | None = None
    answer: str | None = None
    usage: Usage = field(default_factory=Usage)
    turns: int = 0
    invalid: int = 0

    def context(self) -> list[int]:
        return [i for span in self.spans for i in span.token_ids]

    def num_context_tokens(self) -> int:
        return sum(len(span.token_ids) for span in self.spans)

    def num_tokens(self) -> int:
        closed = sum(len(span.token_ids) for segment in self.segments for span in segment.spans)
        return closed + self.num_context_tokens()

    def close(self, end: SegmentEnd) -> None:
        self.segments.append(Segment(tuple(self.spans), end))
        self.spans, self.blanks = [], {}
        self.speaker = None

    def without_retrieved(self) -> tuple[int, ...]:
        """The context as it would be without what was retrieved."""
        return tuple(i for n, span in enumerate(self.spans) for i in self.blanks.get(n, span.token_ids))


class Executor:
    """Runs sessions of one agent.

    Args:
        agent: What is shown to the LLM, and the table of its actions.
        codec: Its tokenizer.
        tools: The tools its spec names.
        desk: Where `[SeekAdvice]` goes.
        score: The task's reward of a finished session.
        limits: What ends a session early.
        counterfactual: Whether `Session.counterfactual` is recorded, which credit `lineage` needs.

    Raises:
        AgileError: The spec names an action that is neither the executor's nor a tool's, or lets the LLM choose what
            opens the empty context after `[ClearContext]`.
    """

    def __init__(
        self,
        agent: Agent,
        codec: ActionCodec,
        tools: Mapping[str, Tool],
        desk: AdviceDesk,
        score: Score,
        limits: Limits | None = None,
        *,
        counterfactual: bool = False,
    ):
        for action in agent.spec.actions:
            if action.name not in Fn.ALL and action.name not in tools:
                raise AgileError(
                    f"Agent {agent.spec.name} has an action [{action.name}] but no tool of that name (tools: "
                    f"{sorted(tools) or 'none'}). Pass a Tool named {action.name!r} or remove the action."
                )
            if action.name == Fn.CLEAR_CONTEXT and len(action.followed_by) != 1:
                raise AgileError(
                    f"Agent {agent.spec.name}: [{action.name}] may be followed by any of {list(action.followed_by)}, "
                    "but an LLM has nothing to continue in an empty context. Let exactly one action follow it."
                )
        self.agent = agent
        self.codec = codec
        self.tools = tools
        self.desk = desk
        self.score = score
        self.limits = limits or Limits()
        self.counterfactual = counterfactual

    async def run(
        self,
        policy: Policy,
        item: Item,
        memory: Memory,
        *,
        stream_id: str,
        index: int,
        progress: float,
        seed: int,
        price: float | None = None,
    ) -> Session:
        """Play one session to its end, whatever the LLM, tools and experts do in it.

        Args:
            price: What advice costs in it; None for the desk's own price.

        Raises:
            AgileError: Policy, memory or task met what only a user can mend, such as a full disk; no other session
                would fare better.
        """
        price = self.desk.price if price is None else price
        draft = _Draft(item, memory, policy, f"{stream_id}/{index}", seed, progress, price, time.monotonic())
        error = ""
        try:
            await self._play(draft)
            status, end = SessionStatus.COMPLETED, SegmentEnd.TERMINATED
        except _Truncated as reason:
            status, end, error = SessionStatus.TRUNCATED, SegmentEnd.TRUNCATED, str(reason)
        except _TooManyInvalid as reason:
            status, end, error = SessionStatus.INVALID_ACTION, SegmentEnd.TERMINATED, str(reason)
        except _StageError as reason:
            status, end, error = SessionStatus.FAILED, SegmentEnd.TRUNCATED, str(reason)
        except StageTimeout as reason:
            status, end, error = SessionStatus(f"{reason.stage}_timeout"), SegmentEnd.TRUNCATED, str(reason)
        draft.close(end)
        session = Session(
            id=draft.id,
            stream_id=stream_id,
            index=index,
            item_id=item.id,
            kind=item.kind,
            seed=seed,
            segments=tuple(draft.segments),
            steps=tuple(draft.steps),
            retrieved=tuple(draft.retrieved),
            written=tuple(draft.written),
            advice=draft.advice,
            answer=draft.answer,
            status=status,
            error=error,
            reads=tuple(draft.reads),
            usage=draft.usage,
            counterfactual=draft.counterfactual if draft.retrieved else (),
            price=price,
        )
        try:
            scored = self.score(item, session)
            reward = await scored if isinstance(scored, Awaitable) else scored
            if not math.isfinite(reward.total):
                raise ValueError(f"the reward is {dict(reward.components)}, expected finite numbers")
        except AgileError:
            raise
        except Exception as reason:  # a task that cannot score an answer must not take the other sessions with it
            error = f"task: {type(reason).__name__}: {reason}"
            return replace(session, status=SessionStatus.FAILED, error=error, reward=Reward({"failed": 0.0}))
        return replace(session, reward=reward)

    async def _play(self, draft: _Draft) -> None:
        legal: tuple[str, ...] = (self.agent.spec.first.name,)
        while True:
            action = await self._next_action(draft, legal)
            await self._perform(draft, action)
            if action.name == Fn.SUBMIT_ANSWER:
                return
            legal = self.agent.spec.legal_after(action.name, advised=draft.advice is not None)

    async def _next_action(self, draft: _Draft, legal: tuple[str, ...]) -> Action:
        """The only legal action, written here, or the one that the LLM chooses; errors give it further tries."""
        forced = legal[0] if len(legal) == 1 else None
        if forced is not None:
            argument_follows = self.agent.spec[forced].takes_argument
            self._show(draft, Source.EXECUTOR, self.codec.name_ids(forced), "llm" if argument_follows else "user")
            if not argument_follows:
                return Action(forced)
        while True:
            completion = await self._sample(draft, legal, forced)
            with _stage("policy"):  # no tokenizer decodes a negative id
                parsed = self.codec.parse(completion.token_ids, legal, forced)
            self._cut_thinking(draft)
            if isinstance(parsed, Action):
                return parsed
            draft.invalid += 1
            text = f"error : {parsed}"
            draft.steps.append(Observation(Action(forced or "?"), Source.EXECUTOR, text, ok=False))
            if draft.invalid > self.limits.max_invalid_actions:
                raise _TooManyInvalid(f"{draft.invalid} invalid actions, the last: {parsed}")
            self._show(draft, Source.EXECUTOR, self.codec.encode(text))
            if forced is not None:
                self._show(draft, Source.EXECUTOR, self.codec.name_ids(forced), "llm")

    def _show(self, draft: _Draft, source: Source, token_ids: tuple[int, ...], speaker: Speaker = "user") -> None:
        """Append observed tokens, and before them what the prompt format puts between turns, if all of it fits."""
        between = self._between(draft, speaker)
        if speaker == "llm" and token_ids:  # a name that is written here comes after thinking
            between += self.codec.turns.end_thinking
        num_tokens = len(between) + len(token_ids)
        self._check_room(draft.num_context_tokens() + num_tokens, draft.num_tokens() + num_tokens)
        if between:
            draft.spans.append(Span(Source.TEMPLATE, between))
        if token_ids:
            draft.spans.append(Span(source, token_ids))
        draft.speaker = speaker

    def _check_room(self, context: int, total: int) -> None:
        if context > self.limits.max_context_tokens or total > self.limits.max_session_tokens:
            raise _Truncated(f"{total} tokens, {context} of them in context, do not fit the limit")

    def _between(self, draft: _Draft, speaker: Speaker) -> tuple[int, ...]:
        turns, end_id = self.codec.turns, self.codec.end_id
        if draft.speaker == "llm":
            last = draft.spans[-1]
            if not (turns.to_llm or turns.to_user) or last.source is Source.EXECUTOR:  # a name, its argument to come
                return ()
            to_user = turns.to_user if last.token_ids[-1:] == (end_id,) else (end_id, *turns.to_user)
            return to_user if speaker == "user" else to_user + turns.to_llm
        match draft.speaker, speaker:
            case None, "user":
                return turns.opening
            case None, "llm":
                return turns.opening + turns.to_llm
            case "user", "llm":
                return turns.to_llm
        return ()

    def _cut_thinking(self, draft: _Draft) -> None:
        """Go on in a new window without the thinking of the last turn, where the format says so."""
        turns, sampled = self.codec.turns, draft.spans[-1].token_ids
        if turns.keep_thinking or not (thinking := self.codec.num_thinking(sampled)):
            return
        before = draft.context()[: -len(sampled)]
        if turns.to_llm and tuple(before[-len(turns.to_llm) :]) == turns.to_llm:
            before = [*before[: -len(turns.to_llm)], *turns.to_llm_before]
        carried = (*before, *sampled[thinking:])
        self._check_room(len(carried), draft.num_tokens() + len(carried))
        draft.close(SegmentEnd.CONTEXT_CLEARED)
        draft.spans.append(Span(Source.CARRIED, carried))
        draft.speaker = "llm"

    async def _sample(self, draft: _Draft, legal: tuple[str, ...], forced: str | None) -> Completion:
        self._show(draft, Source.TEMPLATE, (), "llm")
        context = draft.context()
        room = min(
            self.limits.max_action_tokens,
            self.limits.max_context_tokens - len(context),
            self.limits.max_session_tokens - draft.num_tokens(),
        )
        if draft.turns >= self.limits.max_turns:
            raise _Truncated(f"{draft.turns} turns, the limit")
        if room < 1:
            raise _Truncated(f"{draft.num_tokens()} tokens, {len(context)} of them in context, the limit")
        if self.limits.max_seconds is not None and time.monotonic() - draft.started > self.limits.max_seconds:
            raise _Truncated(f"{self.limits.max_seconds} s, the limit")
        with _stage("policy"):
            completion = await within(
                "policy",
                self.limits.max_stage_s,
                draft.policy.complete(
                    context,
                    max_tokens=room,
                    stop=self.codec.stop_ids(legal, forced),
                    seed=derive_seed(draft.seed, draft.turns),
                ),
            )
            if len(completion.token_ids) > room:
                raise ValueError(f"sampled {len(completion.token_ids)} tokens, expected at most {room}")
            sampled = Span(Source.LLM, completion.token_ids, completion.logprobs, completion.policy_version)
        if self.counterfactual and not draft.turns:
            draft.counterfactual = draft.without_retrieved()
        draft.turns += 1
        draft.usage += completion.usage
        draft.spans.append(sampled)
        return completion

    async def _perform(self, draft: _Draft, action: Action) -> None:
        """Route one action and append what it brought back."""
        source, text, ok = Source.EXECUTOR, "", True
        without: str | None = None
        match action.name:
            case Fn.GET_QUESTION:
                with _stage("agent"):
                    source, text = Source.TASK, self.agent.question(draft.item, draft.progress, draft.price)
            case Fn.RETRIEVE_MEMORY:
                with _stage("memory"), interrupted("memory", self.limits.max_stage_s):
                    recorded = _RecordedMemory(draft.memory, draft.reads)
                    entries, text = self.agent.recall(draft.item, recorded)
                    if self.counterfactual:
                        _, without = self.agent.recall(draft.item, _WithoutFound(recorded))
                source = Source.MEMORY
                draft.retrieved += [(e.item.id, e.similarity) for e in entries]
            case Fn.SEEK_ADVICE:
                asked = self.desk.seek(draft.id, draft.item, action.argument, draft.price)
                draft.advice = await within("advisor", self.limits.max_stage_s, asked)
                with _stage("agent"):
                    source, text, ok = Source.ADVISOR, self.agent.advice(draft.advice), draft.advice.answered
            case Fn.REFLECTION:
                draft.reflection = action.argument
            case Fn.UPDATE_MEMORY:
                with _stage("memory"), interrupted("memory", self.limits.max_stage_s):
                    items = self.agent.remember(draft.item, draft.id, draft.advice, draft.reflection)
                    draft.written += draft.memory.write(items)
            case Fn.PREDICT_ANSWER:
                draft.prediction = action.argument
            case Fn.SUBMIT_ANSWER:
                draft.answer = draft.prediction
            case Fn.CLEAR_CONTEXT:
                draft.close(SegmentEnd.CONTEXT_CLEARED)
            case name:
                source = Source.TOOL
                try:
                    call = self.tools[name](action.argument, draft.item, tuple(draft.steps))
                    result = await within("tool", self.limits.max_stage_s, call)
                    text, ok = str(result.text), result.ok
                except Exception as error:  # a tool that raises is answered like one that reports an error
                    text, ok = f"error : {type(error).__name__}: {error}", False
        draft.steps.append(Observation(action, source, text, ok))
        with _stage("agent"):
            from_task = source is Source.TASK
            token_ids = self.codec.question_ids(draft.item, text) if from_task else self.codec.encode(text)
            blank = None if without is None else self.codec.encode(without)
        if token_ids:
            self._show(draft, source, token_ids)
            if blank is not None:
                draft.blanks[len(draft.spans) - 1] = blank
