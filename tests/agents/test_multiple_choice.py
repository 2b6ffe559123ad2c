"""The multiple-choice agent: what it shows and remembers, and what its teacher does."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from agile.advice import AdviceDesk, DatasetAdvisor, RecordedAdvisor
from agile.agents.multiple_choice import NO_LESSON, MultipleChoiceAgent, lesson_of
from agile.executor import Executor
from agile.experts import who_always_asks, who_never_asks
from agile.memory.encoders import HashingEncoder
from agile.memory.store import SqliteMemory
from agile.protocols import Advisor, Policy
from agile.tasks.medmcqa import MedMCQA
from agile.tokens import ActionCodec, build_tokenizer
from agile.types import Advice, AdviceStatus, Fn, Item, MemoryKind, Scope, Session

OPTIONS = {"A": "Vitamin A", "B": "Vitamin C", "C": "Vitamin D", "D": "Vitamin K"}


def item(question: str = "Which dissolves in water?", answer: str = "B", **context: Any) -> Item:
    whole = {"options": OPTIONS, "long_answer": "", "reflection": "", **context}
    return Item(question, question, answer, "Biochemistry", "medicine", "Biochemistry", whole)


AGENT = MultipleChoiceAgent(group_k=5)
AGENT_SCOPE = Scope(MemoryKind.HISTORY, "medicine")
KNOWN = item(reflection="Fat dissolves the others.")


def executor(advisor: Advisor | None = None, agent: MultipleChoiceAgent = AGENT) -> Executor:
    tokenizer = build_tokenizer("bpe", agent.corpus([KNOWN]), agent.spec)
    desk = AdviceDesk(advisor or DatasetAdvisor(), 0.4)
    score = MedMCQA.__new__(MedMCQA)
    score.advice_counts = "if_right"
    return Executor(agent, ActionCodec(tokenizer, agent.spec), {}, desk, score.score)


def play(runner: Executor, policy: Policy, asked: Item, memory: SqliteMemory) -> Session:
    return asyncio.run(runner.run(policy, asked, memory, stream_id="s", index=0, progress=0.25, seed=0))


def test_the_question_shows_all_options_and_the_price_on_request() -> None:
    text = AGENT.question(item(), 0.25, 0.4)
    assert text == (
        "round 2\nquestion: Which dissolves in water?\nA: Vitamin A\nB: Vitamin C\nC: Vitamin D\nD: Vitamin K\n"
    )
    assert "advice costs 0.40\n" in MultipleChoiceAgent(show_price=True).question(item(), 0.25, 0.4)


def test_memory_holds_words_not_letters_and_what_they_teach() -> None:
    memory = SqliteMemory(HashingEncoder())
    memory.write(AGENT.lessons(KNOWN))
    (entry,), text = AGENT.recall(item(), memory)
    assert (entry.item.answer, entry.item.product) == ("Vitamin C", "Biochemistry")
    assert text == "history 1.00 Which dissolves in water? -> Vitamin C ( Fat dissolves the others. )\n"


def test_as_many_entries_as_asked_for_each_once() -> None:
    memory = SqliteMemory(HashingEncoder())
    for n in range(8):
        memory.write(AGENT.lessons(item(f"Which dissolves in water, number {n}?")))
    assert len(AGENT.recall(item(), memory)[0]) == 5
    entries, _ = MultipleChoiceAgent(product_k=2, group_k=3).recall(item(), memory)
    assert len({e.item.id for e in entries}) == len(entries) == 5
    both = MultipleChoiceAgent(group_k=1, knowledge_k=1)
    assert [m.kind for m in both.lessons(KNOWN)] == ["history", "knowledge"]
    memory.write(both.lessons(KNOWN))
    assert both.recall(item(), memory)[1].count("Fat dissolves the others.") == 2


@pytest.mark.parametrize(
    ("advice", "words"),
    [
        (Advice("B"), "Vitamin C"),
        (Advice("(b) Vitamin C", "It does."), "Vitamin C"),
        (Advice("vitamin k"), "Vitamin K"),
        (Advice("who knows"), None),
        (Advice("", status=AdviceStatus.REFUSED), None),
        (None, None),
    ],
)
def test_only_advice_that_names_an_option_is_remembered(advice: Advice | None, words: str | None) -> None:
    entries = AGENT.remember(item(), "s/0", advice, NO_LESSON)
    assert [e.answer for e in entries] == ([] if words is None else [words])
    assert all(e.text == f"Which dissolves in water? -> {words}" for e in entries)


def test_lessons_are_reflections_or_first_sentences() -> None:
    assert lesson_of(KNOWN) == "Fat dissolves the others."
    assert lesson_of(item(long_answer="Short and whole. Both.")) == "Short and whole. Both."
    assert lesson_of(item(long_answer="First it is so. " + "And more of it. " * 30)) == "First it is so."
    assert len(lesson_of(item(long_answer="word " * 200))) <= 240
    assert lesson_of(item()) == NO_LESSON


@pytest.mark.parametrize(
    ("context", "judge_yes", "asks"),
    [
        ({"predicted": "B"}, 0.0, False),  # the stronger model was right
        ({"predicted": "A"}, 1.0, True),
        ({"predicted": None}, 1.0, True),
        ({}, 1.0, False),  # no stronger model: the judge decides
        ({}, 0.0, True),
    ],
)
def test_the_teacher_asks_where_a_stronger_model_was_wrong(
    context: dict[str, Any], judge_yes: float, asks: bool
) -> None:
    runner, memory = executor(), SqliteMemory(HashingEncoder())
    asked = item(reflection="Fat dissolves the others.", **context)
    teacher = AGENT.teacher(runner.codec, judge_yes)
    session = play(runner, teacher.policy(asked, memory, 0.4, np.random.default_rng(0)), asked, memory)
    assert (session.advised, session.answer, session.failed) == (asks, "B", False)
    written = memory.retrieve(asked.question, 1, AGENT_SCOPE)
    assert [e.item.text.endswith("( Fat dissolves the others. )") for e in written] == [True] * asks
    if asks:  # the next time memory settles it
        again = play(runner, teacher.policy(asked, memory, 0.4, np.random.default_rng(0)), asked, memory)
        assert (again.advised, again.answer) == (False, "B")


def test_initial_memory_holds_some_other_questions() -> None:
    others = [item(f"number {n}?") for n in range(100)]
    sizes = {len(AGENT.initial_memory(others[0], others, np.random.default_rng(n))) for n in range(20)}
    assert min(sizes) < 20 and 40 < max(sizes) <= 64
    every = [m.key for n in range(20) for m in AGENT.initial_memory(others[0], others, np.random.default_rng(n))]
    assert others[0].question not in every


def test_scripted_agents_never_ask_or_always_do() -> None:
    answers = {item().id: "C", "other?": None}
    memory = SqliteMemory(HashingEncoder())
    runner = executor(RecordedAdvisor(answers, "m"))
    alone = play(runner, who_never_asks(runner.codec, answers, item()), item(), memory)
    assert (alone.answer, alone.advice, dict(alone.reward.components)) == ("C", None, {"correct": 0.0})  # type: ignore[union-attr]
    asked = play(runner, who_always_asks(runner.codec, item()), item(), memory)
    assert (asked.answer, asked.advised, asked.failed) == ("C", True, False)
    assert asked.reward is not None and asked.reward.components == {"correct": 0.0, "advice": -0.4}
    assert len(memory) == 1

    lost = play(runner, who_always_asks(runner.codec, item("other?")), item("other?"), memory)
    assert lost.reward is not None
    assert lost.reward.components == {"correct": 0.0, "advice": -0.4, "unreadable advice": 0.0}
    unknown = play(runner, who_always_asks(runner.codec, item("third?")), item("third?"), memory)
    assert unknown.reward is not None and not unknown.advised
    assert unknown.reward.components == {"correct": 0.0, "unreadable": 0.0}
    assert len(memory) == 1  # neither taught anything
    assert unknown.called(Fn.SEEK_ADVICE)
