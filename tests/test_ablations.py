"""What is taken from an agent is gone, and nothing else changes."""

import asyncio
from collections.abc import Collection, Sequence

import pytest

from agile.ablations import (
    NoMemory,
    PoisonedMemory,
    RandomAdvice,
    ablated,
    falsified,
    removed_actions,
    without_actions,
)
from agile.agents.product_qa import SEARCH, SPEC
from agile.errors import AgileError
from agile.tokens import ActionCodec
from agile.types import Action, Advice, Completion, Fn, MemoryItem, MemoryKind, Scope
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
    def texts(seed: int, kind: MemoryKind = MemoryKind.KNOWLEDGE) -> list[str]:
        memory = ListMemory()
        poisoned = PoisonedMemory(memory, 0.1, seed)
        for k in range(1000):
            poisoned.write([lesson(k, kind)])
        assert all(entry.key == entry.text for entry in memory.items)
        assert len(poisoned) == len(memory) == poisoned.count_similar("", -1.0, Scope(kind, "shop"))
        return [entry.text for entry in memory.items]

    first = texts(0)
    assert 70 < first.count("steel : no") < 130 and set(first) == {"steel : yes", "steel : no"}
    assert texts(0) == first != texts(1)
    assert set(texts(0, MemoryKind.HISTORY)) == {"steel : yes"}  # what experts said stays


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
