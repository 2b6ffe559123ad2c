"""What every policy promises: a test class for it inherits these tests and has a fixture `policy`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from agile.protocols import Policy
from agile.types import Completion
from tests.worlds import make_codec

CODEC = make_codec("word")


def complete(policy: Policy, seed: int, max_tokens: int = 6, stop: Collection[int] = (CODEC.end_id,)) -> Completion:
    return asyncio.run(policy.complete([20, 21, 22], max_tokens=max_tokens, stop=stop, seed=seed))


class PolicyContract:
    """The model behind `policy`, if there is one, has the vocabulary of `CODEC`."""

    def test_a_seed_gives_one_sample(self, policy: Policy) -> None:
        first, second = complete(policy, 4), complete(policy, 4)
        assert first.token_ids == second.token_ids
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-5)

    @pytest.mark.parametrize("max_tokens", [1, 3, 6])
    def test_length_stop_and_reason(self, policy: Policy, max_tokens: int) -> None:
        for seed in range(5):
            completion = complete(policy, seed, max_tokens)
            ids = completion.token_ids
            assert 1 <= len(ids) <= max_tokens
            assert all(type(i) is int for i in ids) and all(p <= 0 for p in completion.logprobs)
            assert CODEC.end_id not in ids[:-1]
            assert completion.finish_reason == ("stop" if ids[-1] == CODEC.end_id else "length")
            assert completion.finish_reason == "stop" or len(ids) == max_tokens

    def test_a_stop_token_ends_the_sample_and_stays(self, policy: Policy) -> None:
        free = complete(policy, 2, stop=())
        token = free.token_ids[-1]
        cut = complete(policy, 2, stop={token, CODEC.end_id})
        n = next(i for i, t in enumerate(free.token_ids) if t in (token, CODEC.end_id)) + 1
        assert cut.token_ids == free.token_ids[:n]
        assert cut.finish_reason == "stop"

    def test_concurrent_calls_do_not_mix(self, policy: Policy) -> None:
        async def together() -> list[Completion]:
            calls = (policy.complete([20 + s, 21], max_tokens=6, stop={CODEC.end_id}, seed=s) for s in range(8))
            return await asyncio.gather(*calls)

        async def alone(seed: int) -> Completion:
            return await policy.complete([20 + seed, 21], max_tokens=6, stop={CODEC.end_id}, seed=seed)

        assert [c.token_ids for c in asyncio.run(together())] == [asyncio.run(alone(s)).token_ids for s in range(8)]
