"""Nothing that an LLM emits can raise out of the executor: ten thousand sessions of random token streams."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from agile.agents.product_qa import SPEC
from agile.executor import Limits
from agile.tokens import ActionCodec
from agile.types import AgentSpec, Completion, Session, SessionStatus
from tests.families import ASKS, family_codec
from tests.worlds import (
    NOTES,
    Add,
    ListMemory,
    NoteAgent,
    check_session,
    item,
    make_codec,
    make_executor,
    note_executor,
)


class Noise:
    """Emits random ids: of actions, of text, beyond the vocabulary, or none at all."""

    def __init__(self, codec: ActionCodec, rng: random.Random) -> None:
        self.rng, self.codec = rng, codec
        thinking = [i for t, i in codec.tokenizer.get_added_vocab().items() if t in ("<think>", "</think>")]
        self.actions = [*codec.action_ids.values(), *thinking] or [codec.encode(a.token)[0] for a in codec.spec.actions]
        self.end_id = codec.end_id
        self.size = len(codec.tokenizer)

    def _id(self) -> int:
        rng = self.rng
        if rng.random() < 0.05:
            return rng.choice(self.actions)
        if rng.random() < 0.01:
            return rng.choice([-1, 2**40])
        return rng.randrange(self.size + 20)

    def _name(self) -> list[int]:
        if self.codec.special_tokens:
            return [self.rng.choice(self.actions)]
        thought = self.rng.choice([(), self.codec.turns.end_thinking])
        return [*thought, *self.codec.encode(f"{self.rng.choice(self.codec.spec.actions).token} ")]

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        rng = self.rng
        ids = [self._id() for _ in range(rng.choice([0, 0, 1, 1, 2, 3, 8, 40]))]
        if rng.random() < 0.7:  # something an agent could mean
            ids[:0] = self._name()
        if rng.random() < 0.7:
            ids.append(self.end_id)
        if rng.random() < 0.4:  # all that an action without argument may be
            ids = [rng.choice(list(stop))]
        if rng.random() < 0.999:
            ids = ids[:max_tokens]
        return Completion(tuple(ids), (-1.0,) * len(ids), "stop")


@pytest.mark.parametrize("family", ["qwen", "vicuna"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("options", [(), (False, "open_thinking")], ids=["", "cut"])
def test_no_token_stream_raises_in_a_chat(family: str, special: bool, options: tuple[Any, ...]) -> None:
    limits = Limits(
        max_turns=8, max_context_tokens=250, max_session_tokens=400, max_action_tokens=30, max_invalid_actions=5
    )
    codec = family_codec(family, special, *options)
    executor = make_executor(NoteAgent(spec=ASKS), codec=codec, tools={"Add": Add()}, limits=limits)
    policy, question = Noise(codec, random.Random(family)), item()
    for i in range(150):
        run = executor.run(policy, question, ListMemory(), stream_id="s", index=i, progress=0.5, seed=i)
        check_session(asyncio.run(run), codec, limits)


@pytest.mark.parametrize("spec", [SPEC, pytest.param(NOTES, marks=pytest.mark.slow)], ids=lambda spec: str(spec.name))
def test_no_token_stream_raises(spec: AgentSpec) -> None:
    limits = Limits(
        max_turns=8, max_context_tokens=250, max_session_tokens=300, max_action_tokens=30, max_invalid_actions=5
    )
    codec, rng = make_codec("bpe", spec), random.Random(spec.name)
    executor = note_executor(limits) if spec is NOTES else make_executor(limits=limits)
    question = item()

    async def sessions() -> list[Session]:
        policy = Noise(codec, rng)
        return [
            await executor.run(policy, question, ListMemory(), stream_id="s", index=i, progress=0.5, seed=i)
            for i in range(5000)
        ]

    seen: Counter[str] = Counter()
    for session in asyncio.run(sessions()):
        check_session(session, codec, limits)
        seen[session.status] += 1
        seen["cleared"] += len(session.segments) > 1
    expected = {s for s in SessionStatus if not s.endswith("timeout")} | ({"cleared"} if spec is NOTES else set())
    assert all(seen[kind] >= 20 for kind in expected), f"the streams are too tame: {seen}"
