"""What is taken from an agent is gone, and nothing else changes."""

import asyncio
from collections.abc import Collection, Sequence

import pytest

from agile.ablations import (
    NoMemory,
    RandomAdvice,
    ablated,
    falsified,
    poisoned,
    removed_actions,
    without_actions,
)
from agile.agents.multiple_choice import MultipleChoiceAgent
from agile.agents.product_qa import SEARCH, SPEC
from agile.errors import AgileError
from agile.tokens import ActionCodec
from agile.types import Action, Advice, Completion, Fn, Item, MemoryItem, MemoryKind, Scope
from tests.worlds import AGENT, LIMITS, ListMemory, item, make_codec, make_executor, play, script

TOOLS = ("SearchProduct",)


def lesson(number: int, kind: MemoryKind = MemoryKind.KNOWLEDGE) -> MemoryItem:
    return MemoryItem(kind, "steel : yes", "steel : yes", group="shop", session_id=f"s/{number}")


def test_actions_are_taken_from_the_table() -> None:
    spec = without_actions(SPEC, {Fn.SEEK_ADVICE})
    assert spec[Fn.RETRIEVE_MEMORY].followed_by == (SEARCH, Fn.PREDICT_ANSWER)
    assert spec[SEARCH].followed_by == (Fn.PREDICT_ANSWER, SEARCH)
    assert Fn.SEEK_ADVICE not in [a.name for a in spec.actions]
    with pytest.raises(AgileError, match=r"cannot do without \[UpdateMemory\]: nothing else may follow \[Reflection\]"):
        without_actions(SPEC, {Fn.UPDATE_MEMORY})


def test_which_actions_are_removed() -> None:
    assert removed_actions({"tools", "memory"}, TOOLS) == {"SearchProduct"}
    assert removed_actions({"advice"}, TOOLS) == removed_actions({"random_advice"}, TOOLS) == {Fn.SEEK_ADVICE}
    assert ablated(AGENT, (), TOOLS) is AGENT
    assert ablated(AGENT, ("memory",), TOOLS) is AGENT  # its memory is what changes


def test_an_agent_without_advice_cannot_ask() -> None:
    agent = ablated(AGENT, ("advice",), TOOLS)
    codec = make_codec(spec=agent.spec)
    whole = make_codec()
    session = play(
        make_executor(agent, codec=ActionCodec(whole.tokenizer, agent.spec)),
        script(whole, Action(Fn.SEEK_ADVICE), Action(Fn.PREDICT_ANSWER, "yes")),
    )
    assert codec.spec == agent.spec and session.advice is None and session.answer == "yes"
    assert [step.ok for step in session.steps].count(False) == 1  # what it may not do is answered with an error


def test_what_it_reflects_is_lost() -> None:
    memory = ListMemory()
    codec = make_codec()
    lines = Action(Fn.SEEK_ADVICE), Action(Fn.REFLECTION, "steel is washable"), Action(Fn.PREDICT_ANSWER, "yes")
    session = play(make_executor(ablated(AGENT, ("reflection",), TOOLS)), script(codec, *lines), memory=memory)
    assert session.answer == "yes" and [entry.kind for entry in memory.items] == [MemoryKind.HISTORY]
    play(make_executor(), script(codec, *lines), memory=memory)
    assert [entry.kind for entry in memory.items][1:] == [MemoryKind.HISTORY, MemoryKind.KNOWLEDGE]
    assert AGENT.remember(item(), "s/0", Advice("yes"), "") == ablated(AGENT, ("reflection",), TOOLS).remember(
        item(), "s/0", Advice("yes"), "steel is washable"
    )


def test_no_memory_gives_nothing_back() -> None:
    memory, scope = NoMemory(), Scope(MemoryKind.KNOWLEDGE, "shop")
    assert memory.write([lesson(0)]) == [] == memory.retrieve("steel", 3, scope)
    assert memory.count_similar("steel", 0.0, scope) == len(memory) == 0


def test_a_tenth_of_the_reflections_turns_false() -> None:
    def reflections(seed: int, text: str = "steel : yes") -> list[str]:
        return [poisoned(f"s/{k}", text, seed) for k in range(1000)]

    first = reflections(0)
    assert 70 < first.count("steel : no") < 130 and set(first) == {"steel : yes", "steel : no"}
    assert reflections(0) == first != reflections(1)
    assert set(reflections(0, " none ")) == {" none "}


def test_poison_reaches_whatever_an_agent_writes_of_a_reflection() -> None:
    """ProductQA's agent writes it as knowledge; of multiple choice it may stand in the history alone."""
    choice = Item("1", "Which?", "A", "S", "medicine", "S", {"options": {"A": "iron", "B": "zinc"}})
    false = next(k for k in range(1000) if poisoned(f"s/{k}", "iron is good", 0) != "iron is good")
    for agent, asked, answer in ((AGENT, item(), "yes"), (MultipleChoiceAgent(), choice, "A")):
        sick = ablated(agent, ("poisoned_memory",), TOOLS)
        said = sick.remember(asked, f"s/{false}", Advice(answer), "iron is good")
        assert ["It is not true that iron is good" in entry.text for entry in said].count(True) == 1
        assert all(entry.answer != "no" for entry in said)  # what experts said stays


def test_false_sentences() -> None:
    assert falsified("Yes, it is true.") == "no, it is false."
    assert falsified("nobody knows") == "It is not true that nobody knows"


class Answers:
    """A policy that never asks."""

    def __init__(self, codec: ActionCodec):
        self.codec = codec

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        forced = self.codec.awaited(prompt_ids) is not None
        action = Action(Fn.PREDICT_ANSWER, "no")
        ids = self.codec.encode_argument(action) if forced else self.codec.encode_action(action)
        return Completion(ids, (-0.1,) * len(ids), "stop")


def test_chance_asks_at_its_rate_and_once_a_session() -> None:
    codec = make_codec()
    policy = Answers(codec)

    async def first(seed: int, rate: float) -> tuple[str | None, str | None]:
        chance = RandomAdvice(policy, codec, rate)
        both = [await chance.complete((1, 2), max_tokens=9, stop=(), seed=seed + 10_000 * turn) for turn in range(2)]
        return codec.name_of(both[0].token_ids[0]), codec.name_of(both[1].token_ids[0])

    found = [asyncio.run(first(seed, 0.3)) for seed in range(300)]
    asked = sum(name == Fn.SEEK_ADVICE for name, _ in found)
    assert 60 < asked < 120
    assert {second for _, second in found} == {Fn.PREDICT_ANSWER}
    assert asyncio.run(first(0, 0.0))[0] == Fn.PREDICT_ANSWER and asyncio.run(first(0, 1.0))[0] == Fn.SEEK_ADVICE
    session = play(make_executor(limits=LIMITS), RandomAdvice(policy, codec, 1.0))
    assert session.advised and session.answer == "no"
