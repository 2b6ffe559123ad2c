from __future__ import annotations

import asyncio

import pytest

from agile.policies.scripted import ScriptedPolicy
from agile.types import Action, Fn
from tests.worlds import make_codec

CODEC = make_codec()
READ, PREDICT = CODEC.action_ids[Fn.RETRIEVE_MEMORY], CODEC.action_ids[Fn.PREDICT_ANSWER]
ANSWER = (*CODEC.encode("yes"), CODEC.end_id)


def complete(prompt: tuple[int, ...], action: Action, max_tokens: int = 50) -> tuple[int, ...]:
    policy = ScriptedPolicy(CODEC, lambda context: action)
    return asyncio.run(policy.complete(prompt, max_tokens=max_tokens, stop={CODEC.end_id}, seed=0)).token_ids


@pytest.mark.parametrize(
    ("prompt", "action", "expected"),
    [
        ((READ,), Action(Fn.PREDICT_ANSWER, "yes"), (PREDICT, *ANSWER)),
        ((READ,), Action(Fn.SEEK_ADVICE), (CODEC.action_ids[Fn.SEEK_ADVICE],)),
        ((READ, PREDICT), Action(Fn.PREDICT_ANSWER, "yes"), ANSWER),
        ((READ, PREDICT), Action(Fn.REFLECTION, "yes"), ANSWER),  # the name stands there already
    ],
)
def test_emits_what_an_llm_would(prompt: tuple[int, ...], action: Action, expected: tuple[int, ...]) -> None:
    assert complete(prompt, action) == expected
    assert complete(prompt, action, max_tokens=1) == expected[:1]


def test_decides_from_the_text_of_the_context() -> None:
    seen = []

    def decide(context: str) -> Action:
        seen.append(context)
        return Action(Fn.SEEK_ADVICE)

    policy = ScriptedPolicy(CODEC, decide)
    asyncio.run(policy.complete((READ, *CODEC.encode("is it é ?")), max_tokens=1, stop=(), seed=0))
    assert seen == ["[RetrieveMemory]is it é ?"]
