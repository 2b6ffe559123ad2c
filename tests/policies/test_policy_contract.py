"""What every policy promises; a new one joins by a line in `POLICIES`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator

import pytest
from transformers import LlamaForCausalLM

from agile.policies import HFPolicy, ScriptedPolicy
from agile.policies.endpoint import Endpoint
from agile.policies.openai import OpenAIPolicy
from agile.protocols import Policy
from agile.types import Action, Completion, Fn
from tests.stub_endpoint import stub_endpoint
from tests.worlds import make_codec

CODEC = make_codec("word")
POLICIES: dict[str, Callable[[LlamaForCausalLM], Policy]] = {
    "hf": lambda model: HFPolicy(model, CODEC.tokenizer.pad_token_id),
    "scripted": lambda model: ScriptedPolicy(CODEC, lambda context: Action(Fn.PREDICT_ANSWER, "steel is washable")),
}


@pytest.fixture(params=[*POLICIES, "openai"])
def policy(request: pytest.FixtureRequest, model: LlamaForCausalLM) -> Iterator[Policy]:
    if request.param in POLICIES:
        yield POLICIES[request.param](model)
        return
    with stub_endpoint() as stub:  # its carrier has the same end token
        yield OpenAIPolicy(make_codec("bpe"), 0.3, Endpoint(stub.url, "m", api_key_env=None), tools="text")


def complete(policy: Policy, seed: int, max_tokens: int = 6, stop: Collection[int] = (CODEC.end_id,)) -> Completion:
    return asyncio.run(policy.complete([20, 21, 22], max_tokens=max_tokens, stop=stop, seed=seed))


def test_a_seed_gives_one_sample(policy: Policy) -> None:
    assert complete(policy, 4) == complete(policy, 4)


@pytest.mark.parametrize("max_tokens", [1, 3, 6])
def test_length_stop_and_reason(policy: Policy, max_tokens: int) -> None:
    for seed in range(5):
        completion = complete(policy, seed, max_tokens)
        ids = completion.token_ids
        assert 1 <= len(ids) <= max_tokens
        assert all(type(i) is int for i in ids) and all(p <= 0 for p in completion.logprobs)
        assert CODEC.end_id not in ids[:-1]
        assert completion.finish_reason == ("stop" if ids[-1] == CODEC.end_id else "length")
        assert completion.finish_reason == "stop" or len(ids) == max_tokens


def test_concurrent_calls_do_not_mix(policy: Policy) -> None:
    async def together() -> list[Completion]:
        calls = (policy.complete([20 + s, 21], max_tokens=6, stop={CODEC.end_id}, seed=s) for s in range(8))
        return await asyncio.gather(*calls)

    async def alone(seed: int) -> Completion:
        return await policy.complete([20 + seed, 21], max_tokens=6, stop={CODEC.end_id}, seed=seed)

    assert [c.token_ids for c in asyncio.run(together())] == [asyncio.run(alone(s)).token_ids for s in range(8)]
