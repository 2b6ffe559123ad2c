"""What tests of sessions share: a small shop, a list as memory, an executor and its parts, and what always holds."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from agile.advice import AdviceDesk, DatasetAdvisor
from agile.agents.product_qa import SPEC, ProductQAAgent
from agile.executor import Executor, Limits
from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Advisor, Agent, Memory, Policy, Score, Tool
from agile.tasks.minishop import MiniShopSpec, write_minishop
from agile.tasks.productqa import ProductQA
from agile.tokens import ActionCodec, build_tokenizer
from agile.types import (
    Action,
    ActionSpec,
    Advice,
    AgentSpec,
    Completion,
    Fn,
    Item,
    MemoryItem,
    MemoryKind,
    Observation,
    Retrieved,
    Reward,
    Scope,
    SegmentEnd,
    Session,
    SessionStatus,
    Source,
    ToolResult,
)

AGENT = ProductQAAgent(show_schema=False)
LIMITS = Limits()


def item(question: str = "is it washable ?", answer: str = "yes", **context: Any) -> Item:
    """A question about the red product p1 of the group `shop`, whose expert explains `steel is washable`."""
    known = {"metadata": {"color": "red", "size": None}, "sql": "", "knowledge": "", "long_answer": "steel is washable"}
    return Item("shop/q1", question, answer, "fact", "shop", "p1", {**known, **context})


class ListMemory:
    """The `Memory` protocol in a list; similar is what shares words (Jaccard)."""

    def __init__(self, items: Sequence[MemoryItem] = ()) -> None:
        self.items: list[MemoryItem] = []
        self.write(items)

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        first = len(self.items) + 1
        self.items += [replace(entry, id=first + i) for i, entry in enumerate(items)]
        return list(range(first, first + len(items)))

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        words = set(query.split())
        found = [
            Retrieved(e, len(words & set(e.key.split())) / max(1, len(words | set(e.key.split()))))
            for e in self.items
            if e.kind == scope.kind and e.group == scope.group and scope.product in (None, e.product)
        ]
        return sorted(found, key=lambda r: -r.similarity)[:k]

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        return sum(r.similarity >= threshold for r in self.retrieve(query, len(self), scope))

    def __len__(self) -> int:
        return len(self.items)


class Echo:
    """A tool that says what it was asked."""

    name = "SearchProduct"
    description = "Repeats its argument."

    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        return ToolResult(f"found {argument}")


class Replay:
    """A policy that emits given token ids, whatever the context; `logprobs` counts down from -0.5."""

    def __init__(self, completions: Sequence[Sequence[int]]) -> None:
        self._rest: Iterator[Sequence[int]] = iter(completions)
        self.prompts: list[tuple[int, ...]] = []

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        self.prompts.append(tuple(prompt_ids))
        ids = tuple(next(self._rest))
        return Completion(ids, tuple(-0.5 - i for i in range(len(ids))), "stop", 3)


@cache
def make_codec(kind: str = "bpe", spec: AgentSpec = SPEC) -> ActionCodec:
    texts = [*AGENT.corpus([item()]), "steel is washable yes no red blue found SELECT 1"]
    return ActionCodec(build_tokenizer(kind, texts, spec, 400), spec)


def script(codec: ActionCodec, *actions: Action) -> ScriptedPolicy:
    """A policy that takes these actions in turn."""
    rest = iter(actions)
    return ScriptedPolicy(codec, lambda context: next(rest))


def exact(question: Item, session: Session) -> Reward:
    return Reward({"correct": float(not session.failed and session.answer == question.answer)})


def make_executor(
    agent: Agent = AGENT,
    *,
    codec: ActionCodec | None = None,
    tools: Mapping[str, Tool] | None = None,
    advisor: Advisor | None = None,
    timeout_s: float | None = None,
    score: Score = exact,
    limits: Limits = LIMITS,
) -> Executor:
    return Executor(
        agent,
        codec or make_codec(),
        {"SearchProduct": Echo()} if tools is None else tools,
        AdviceDesk(advisor or DatasetAdvisor(), 0.3, timeout_s=timeout_s),
        score,
        limits,
    )


def play(executor: Executor, policy: Policy, question: Item | None = None, memory: Memory | None = None) -> Session:
    """The session `s/0`, the first of ten."""
    run = executor.run(
        policy,
        question or item(),
        ListMemory() if memory is None else memory,
        stream_id="s",
        index=0,
        progress=0.0,
        seed=7,
    )
    return asyncio.run(asyncio.wait_for(run, 120))


def render(codec: ActionCodec, session: Session) -> str:
    """A session as a person reads it: who wrote what, how each segment ended, and what came of it."""
    lines = []
    for segment in session.segments:
        lines += [f"{span.source}: {codec.decode(span.token_ids)}".replace("\n", " / ") for span in segment.spans]
        lines.append(f"-- {segment.end}")
    lines.append(f"{session.status}, answer {session.answer}, reward {session.reward and session.reward.total}")
    return "\n".join(line.rstrip() for line in lines)


def write_shop(folder: Path) -> ProductQA:
    """Two train worlds and a test world of twelve questions."""
    write_minishop(folder / "shop", MiniShopSpec(num_train_worlds=2, num_test_worlds=1, num_questions=12), seed=5)
    return ProductQA(folder / "shop")


# An agent that notes what it read, forgets its context and goes on from its notes, with a tool of its own.
NOTES = AgentSpec(
    "notes",
    (
        ActionSpec(Fn.GET_QUESTION, "Read.", (Fn.REFLECTION, Fn.PREDICT_ANSWER)),
        ActionSpec(Fn.REFLECTION, "Note.", (Fn.UPDATE_MEMORY,), takes_argument=True),
        ActionSpec(Fn.UPDATE_MEMORY, "Keep the note.", (Fn.CLEAR_CONTEXT,)),
        ActionSpec(Fn.CLEAR_CONTEXT, "Forget the rest.", (Fn.RETRIEVE_MEMORY,)),
        ActionSpec(Fn.RETRIEVE_MEMORY, "Look.", ("Add", Fn.PREDICT_ANSWER, Fn.GET_QUESTION)),
        ActionSpec("Add", "Add numbers.", ("Add", Fn.PREDICT_ANSWER), takes_argument=True),
        ActionSpec(Fn.PREDICT_ANSWER, "Answer.", (Fn.SUBMIT_ANSWER,), takes_argument=True),
        ActionSpec(Fn.SUBMIT_ANSWER, "Hand in.", ()),
    ),
)


@dataclass(frozen=True, slots=True)
class NoteAgent:
    spec: AgentSpec = NOTES

    def question(self, item: Item, progress: float, price: float) -> str:
        return f"question: {item.question}\n"

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        entries = memory.retrieve("", 1, Scope(MemoryKind.KNOWLEDGE, item.group))
        return entries, "".join(f"note: {e.item.text}\n" for e in entries)

    def advice(self, advice: Advice) -> str:
        return advice.answer

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        return [MemoryItem(MemoryKind.KNOWLEDGE, reflection, reflection, group=item.group)]


class Add:
    name = "Add"
    description = "Adds numbers."

    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        return ToolResult(str(sum(int(n) for n in argument.split())) + "\n")


def note_executor(limits: Limits = LIMITS) -> Executor:
    return make_executor(NoteAgent(), codec=make_codec("bpe", NOTES), tools={"Add": Add()}, limits=limits)


def check_session(session: Session, codec: ActionCodec, limits: Limits) -> None:
    """What holds for every session."""
    assert session.reward is not None
    assert (session.status == SessionStatus.COMPLETED) == (session.error == "")
    assert (session.answer is not None) == (session.status == SessionStatus.COMPLETED)
    last = {
        SessionStatus.COMPLETED: SegmentEnd.TERMINATED,
        SessionStatus.INVALID_ACTION: SegmentEnd.TERMINATED,
        SessionStatus.TRUNCATED: SegmentEnd.TRUNCATED,
        SessionStatus.FAILED: SegmentEnd.TRUNCATED,
    }.get(session.status, SegmentEnd.TRUNCATED)  # timeouts
    cleared = [SegmentEnd.CONTEXT_CLEARED] * (len(session.segments) - 1)
    assert [segment.end for segment in session.segments] == [*cleared, last]
    total, turns = 0, 0
    for segment in session.segments:
        tokens = len(segment.token_ids)
        assert tokens == len(segment.action_mask) == len(segment.logprobs) <= limits.max_context_tokens
        assert not any(segment.action_mask[:1]), "an LLM continues something"
        total += tokens
        for span in segment.spans:
            if span.source is Source.LLM:
                turns += 1
                assert len(span.token_ids) <= limits.max_action_tokens
                continue
            if span.source in (Source.TEMPLATE, Source.CARRIED):  # may end a turn, and hold what was sampled
                continue
            names = [codec.name_of(i) for i in span.token_ids]
            if span.source is Source.EXECUTOR:  # the name it wrote comes last, after an error if there was one
                names.pop()
            assert not any(names) and codec.end_id not in span.token_ids
    assert total <= limits.max_session_tokens and turns <= limits.max_turns
