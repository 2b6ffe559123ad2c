"""vLLM in this process: exact ids and log-probabilities, weights that arrive or are refused, and failures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from agile.batching import make_batch
from agile.engine import Engine
from agile.errors import AgileError
from agile.lora import adapter_config, adapter_weights, add_adapter, plain_parameters
from agile.model import ActorCritic
from agile.policies.vllm import VLLMPolicy
from agile.types import Completion
from tests.doors import random_rows
from tests.policies.contract import PolicyContract
from tests.policies.rollout_engines import MAX_LEN, PROMPTS, largest_error, make_model, perturb, sample, save, weights

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    return make_model()


def start(folder: Path, **arguments: Any) -> VLLMPolicy:
    return VLLMPolicy(folder, dtype="float32", kv_cache_gib=0.05, enforce_eager=True, block_size=32, **arguments)


@pytest.fixture(scope="module")
def started(lm: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMPolicy]:
    torch.manual_seed(5)
    drawn = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_rng_state()
    threads = torch.get_num_threads()
    policy = start(save(lm, tmp_path_factory.mktemp("model")), max_num_seqs=16)
    assert random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[2])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == drawn[1]
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"
    yield policy
    policy.close()


@pytest.fixture
def policy(started: VLLMPolicy, lm: LlamaForCausalLM) -> Iterator[VLLMPolicy]:
    """At temperature 1, with the weights of `lm`."""
    yield started
    started.temperature = 1.0
    assert not started._engine.has_unfinished_requests()


class TestVLLMPolicy(PolicyContract):
    pass


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_plain_forward_pass(
    policy: VLLMPolicy, lm: LlamaForCausalLM, temperature: float
) -> None:
    """Of softmax(logits / temperature); greedy ones of temperature 1."""
    policy.temperature = temperature
    assert largest_error(lm, policy, temperature) < 1e-4


def test_a_long_prompt_is_cached_until_the_weights_change(policy: VLLMPolicy, lm: LlamaForCausalLM) -> None:
    prompt = list(range(3, 103))
    sample(policy, [prompt])
    (again,) = sample(policy, [prompt])
    assert (again.usage.prompt_tokens, again.usage.cached_tokens, again.usage.completion_tokens) == (100, 96, 12)
    policy.update_weights(weights(lm), 0)
    assert sample(policy, [prompt])[0].usage.cached_tokens == 0


def test_weights_are_taken_over_again_and_again(policy: VLLMPolicy, lm: LlamaForCausalLM) -> None:
    for version in range(1, 6):
        before = largest_error(lm, policy)
        perturb(lm, version)
        assert before < 1e-4 < largest_error(lm, policy)
        policy.update_weights(weights(lm), version)
        assert largest_error(lm, policy) < 1e-4
        assert {c.policy_version for c in sample(policy, PROMPTS)} == {version}


Reload = Callable[..., Any]


def reload_nothing(reload: Reload, method: str, kwargs: dict[str, Any]) -> None:
    pass


def read_and_drop_all(reload: Reload, method: str, kwargs: dict[str, Any]) -> None:
    list(kwargs["weights_iterator"])


def drop_one(reload: Reload, method: str, kwargs: dict[str, Any]) -> None:
    kept = [(n, t) for n, t in kwargs["weights_iterator"] if n != "model.layers.1.mlp.up_proj.weight"]
    reload(method, kwargs={"weights_iterator": kept})


def stale_head(reload: Reload, method: str, kwargs: dict[str, Any]) -> None:
    kept = [(n, t) for n, t in kwargs["weights_iterator"] if n != "lm_head.weight"]
    reload(method, kwargs={"weights_iterator": kept})


@pytest.mark.parametrize("fault", [reload_nothing, read_and_drop_all, drop_one, stale_head])
def test_a_reload_that_does_not_reload_is_noticed(
    policy: VLLMPolicy, lm: LlamaForCausalLM, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = policy.version
    perturb(lm, 77)
    with monkeypatch.context() as patched:
        reload = policy._engine.collective_rpc
        patched.setattr(policy._engine, "collective_rpc", lambda method, kwargs: fault(reload, method, kwargs))
        with pytest.raises(AgileError, match=r"did not take over the weights|vLLM read 0 of 21 weights"):
            policy.update_weights(weights(lm), version + 1)
    with pytest.raises(AgileError, match=f"weights to version {version + 1} failed"):
        sample(policy, [[7]])
    policy.update_weights(weights(lm), version + 1)
    assert largest_error(lm, policy) < 1e-4


def test_incomplete_weights_are_refused(policy: VLLMPolicy, lm: LlamaForCausalLM) -> None:
    for bad, reason in (
        (weights(lm, drop="lm_head.weight"), "1 of 21 weights are missing, among them .'lm_head.weight'"),
        ([("model.norm.bias", torch.zeros(64))], "model.norm.bias is none of"),
        ([("model.norm.weight", torch.zeros(65))], r"model.norm.weight is of shape \(65,\), but \(64,\)"),
        ([("model.norm.weight", torch.zeros(64))] * 2, "model.norm.weight comes twice"),
    ):
        with pytest.raises(AgileError, match=reason):
            policy.update_weights(bad, 9)
        with pytest.raises(AgileError, match="weights to version 9 failed"):
            sample(policy, [[7]])
    policy.update_weights(weights(lm), 9)
    assert largest_error(lm, policy) < 1e-4


def test_an_update_while_requests_run_is_refused(policy: VLLMPolicy, lm: LlamaForCausalLM) -> None:
    async def both() -> Completion:
        running = asyncio.ensure_future(policy.complete([7], max_tokens=50, stop=(), seed=0))
        for _ in range(30):
            await asyncio.sleep(0)
        with pytest.raises(AgileError, match="while 1 requests are under way"):
            policy.update_weights(weights(lm), 3)
        return await running

    assert len(asyncio.run(both()).token_ids) == 50


def test_concurrent_requests_share_steps(policy: VLLMPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = policy._engine.step

    def counted() -> Any:
        steps.append(1)
        return step()

    monkeypatch.setattr(policy._engine, "step", counted)
    sample(policy, PROMPTS * 3)
    assert len(steps) <= 14

    async def session(first: int) -> None:
        for turn in range(4):
            await policy.complete([first, 20 + turn], max_tokens=5, stop=(), seed=0)

    async def sessions() -> None:
        await asyncio.gather(*(session(i) for i in range(10)))

    steps.clear()
    asyncio.run(sessions())
    assert len(steps) <= 4 * 6


def test_a_cancelled_request_leaves_the_engine_and_the_others_alone(policy: VLLMPolicy) -> None:
    async def two_of_three() -> list[Completion]:
        tasks = [asyncio.ensure_future(policy.complete(PROMPTS[i], max_tokens=40, stop=(), seed=i)) for i in range(3)]
        for _ in range(30):
            await asyncio.sleep(0)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert policy._engine.get_num_unfinished_requests() == 2
        return [await tasks[0], await tasks[2]]

    first, _, third = sample(policy, PROMPTS[:3], 40)
    found = asyncio.run(two_of_three())
    assert [c.token_ids for c in found] == [first.token_ids, third.token_ids]


def test_requests_of_a_loop_that_was_torn_down_do_not_haunt_the_next(policy: VLLMPolicy) -> None:
    async def abandoned() -> None:
        _ = asyncio.ensure_future(policy.complete([7], max_tokens=50, stop=(), seed=0))
        for _ in range(15):
            await asyncio.sleep(0)

    asyncio.run(abandoned())
    assert not policy._engine.has_unfinished_requests()
    assert len(sample(policy, [[7]])[0].token_ids) == 12


def test_an_engine_that_fails_fails_everyone_who_waits(policy: VLLMPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    async def all_of_them() -> list[Completion | BaseException]:
        calls = (policy.complete([7], max_tokens=5, stop=(), seed=s) for s in range(5))
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)

    with monkeypatch.context() as patched:
        patched.setattr(policy._engine, "step", fails)
        assert [str(e) for e in asyncio.run(all_of_them())] == ["out of memory"] * 5
    assert not policy._engine.has_unfinished_requests()
    assert len(sample(policy, [[7]])[0].token_ids) == 12


def test_requests_that_do_not_fit_are_refused_with_the_remedy(policy: VLLMPolicy, lm: LlamaForCausalLM) -> None:
    for prompt, reason in (
        ([5] * (MAX_LEN - 11), f"245 tokens and max_tokens=12 do not fit max_model_len={MAX_LEN}"),
        ([], "prompt of at least one token"),
        ([5, lm.config.vocab_size], f"Token id {lm.config.vocab_size} is none of the"),
        ([-1], "Token id -1 is none"),
    ):
        with pytest.raises(AgileError, match=reason):
            sample(policy, [prompt])
    assert len(sample(policy, [[5] * (MAX_LEN - 12)])[0].token_ids) == 12


def test_it_shares_the_process_with_the_trainer_and_tied_weights_are_taken_over(
    policy: VLLMPolicy, tmp_path: Path
) -> None:
    """DeepSpeed starts after one engine and before another, trains a model of tied embeddings, and outlives both."""
    tied = make_model(1, tied=True)
    trainer = Engine(ActorCritic(tied), lr=0.01)
    other = start(save(tied, tmp_path / "tied"), num_tokens=tied.config.vocab_size)
    assert largest_error(tied, other) < 1e-4
    batch = make_batch(random_rows(2), trainer.device)
    for version in (1, 2):
        logits, _, _ = trainer.forward(batch)
        trainer.backward(logits.square().mean(), last=True)
        trainer.step()
        assert largest_error(tied, other) > 1e-3
        other.update_weights(trainer.weights(), version)
        assert largest_error(tied, other) < 1e-4
    other.close()
    assert torch.distributed.is_initialized()
    assert len(sample(policy, [[7]])[0].token_ids) == 12
    with pytest.raises(AgileError, match="closed"):
        sample(other, [[7]])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"max_model_len": MAX_LEN + 1}, "257 tokens is wanted, but the model in .* knows 256 positions"),
        ({"num_tokens": 10**4}, "tokenizer has 10000 tokens, the model in .* has"),
        ({"kv_cache_gib": 1e-6}, "vLLM does not start with the model in"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(AgileError, match=reason):
        VLLMPolicy(save(make_model(), tmp_path), enforce_eager=True, **arguments)


def learn(lm: LlamaForCausalLM, seed: int) -> None:
    """Change the adapter's weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_weights(lm):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.timeout(2400)
def test_an_adapter_is_swapped_and_agrees_with_merged_weights(policy: VLLMPolicy, tmp_path: Path) -> None:
    lm = make_model(3)
    folder = save(lm, tmp_path / "model")
    add_adapter(lm, rank=3, alpha=6)
    with closing(start(folder, max_num_seqs=16, adapter=adapter_config(lm, str(folder)))) as swapping:
        assert largest_error(lm, swapping) < 1e-4, "an adapter that learned nothing is the model"
        for version in range(1, 4):
            learn(lm, version)
            assert largest_error(lm, swapping) > 1e-3, "the test needs an adapter that learned something"
            swapping.update_weights(adapter_weights(lm), version)
            assert largest_error(lm, swapping) < 1e-4
            assert {c.policy_version for c in sample(swapping, PROMPTS)} == {version}
        swapped = sample(swapping, PROMPTS)
    policy.update_weights(((name, value()) for name, _, value in plain_parameters(lm)), 3)
    for one, other in zip(sample(policy, PROMPTS), swapped, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
