"""The Hugging Face policy: exact log-probabilities, seeds, stops, kept keys and values, weights, and failures."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from agile.errors import AgileError
from agile.executor import Limits
from agile.policies.hf import HFPolicy
from agile.rollout import collect
from agile.types import Completion, SessionStatus, Stream, Usage
from tests.worlds import ListMemory, item, make_codec, make_executor

PAD = make_codec("word").tokenizer.pad_token_id
PROMPTS: list[list[int]] = [[7], [3, 5, 9, 11], [20, 21], [7, 8, 9, 10, 12, 13, 14, 2, 4, 6, 30], [3, 5, 9, 11]]
SEEDS = [11, 12, 13, 14, 2**62]


def sample(policy: HFPolicy, prompts: Sequence[Sequence[int]], seeds: Sequence[int], n: int = 10) -> list[Completion]:
    return policy.sample(prompts, max_tokens=[n] * len(prompts), stop=[()] * len(prompts), seeds=seeds)


def logits_after(model: LlamaForCausalLM, ids: Sequence[int]) -> torch.Tensor:
    """(T, V), by one plain forward pass."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits
    return logits[0].float()


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    """Equal ids, and log-probabilities that differ by rounding alone; what they took may differ."""
    for a, b in zip(found, expected, strict=True):
        assert replace(a, logprobs=b.logprobs, usage=b.usage) == b
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_plain_forward_pass(model: LlamaForCausalLM, temperature: float) -> None:
    """Of softmax(logits / temperature); greedy ones of temperature 1."""
    for prompt, completion in zip(
        PROMPTS, sample(HFPolicy(model, temperature=temperature), PROMPTS, SEEDS), strict=True
    ):
        logits = logits_after(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1] / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        assert len(completion.token_ids) == 10


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_what_is_forbidden_is_never_sampled_and_the_rest_share_its_probability(
    model: LlamaForCausalLM, temperature: float
) -> None:
    policy = HFPolicy(model, temperature=temperature)
    free = sample(policy, PROMPTS, SEEDS)
    policy.forbidden = sorted({i for completion in free for i in completion.token_ids})
    for prompt, completion in zip(PROMPTS, sample(policy, PROMPTS, SEEDS), strict=True):
        assert not set(policy.forbidden) & set(completion.token_ids)
        logits = logits_after(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1] / (temperature or 1.0)
        logits[:, policy.forbidden] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    policy.forbidden = ()
    assert_same(sample(policy, PROMPTS, SEEDS), free)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(model: LlamaForCausalLM, temperature: float) -> None:
    """Chi-square of 4,000 draws of one token."""
    draws = sample(HFPolicy(model, temperature=temperature, max_batch_size=4000), [PROMPTS[1]] * 4000, range(4000), 1)
    expected = (logits_after(model, PROMPTS[1])[-1] / temperature).softmax(-1) * 4000
    counts = torch.bincount(torch.tensor([d.token_ids[0] for d in draws]), minlength=len(expected))
    rare = expected < 5
    assert expected[~rare].max() > 3 * expected[~rare].min(), "the test needs a distribution that is not uniform"
    pairs = [(e, c) for e, c, r in zip(expected, counts, rare, strict=True) if not r]
    pairs.append((expected[rare].sum() + 1e-9, counts[rare].sum()))
    statistic = float(sum((c - e) ** 2 / e for e, c in pairs))
    degrees = len(pairs) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_sample_depends_on_its_seed_alone(model: LlamaForCausalLM) -> None:
    policy = HFPolicy(model)
    expected = sample(policy, PROMPTS, SEEDS)
    assert expected[1].token_ids != expected[4].token_ids, "other seeds must give other samples"
    order = list(range(len(PROMPTS)))
    random.Random(0).shuffle(order)
    assert_same(sample(policy, [PROMPTS[i] for i in order], [SEEDS[i] for i in order]), [expected[i] for i in order])
    for i, prompt in enumerate(PROMPTS):
        assert_same(sample(policy, [prompt], [SEEDS[i]]), [expected[i]])
    for max_batch_size in (1, 2, 3):
        assert_same(sample(HFPolicy(model, max_batch_size=max_batch_size), PROMPTS, SEEDS), expected)


def test_greedy_is_the_argmax(model: LlamaForCausalLM) -> None:
    for prompt, completion in zip(PROMPTS, sample(HFPolicy(model, temperature=0), PROMPTS, SEEDS), strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(logits_after(model, ids)[-1].argmax()))
        assert completion.token_ids == tuple(ids[len(prompt) :])


def test_every_row_has_its_own_stops_and_limit(model: LlamaForCausalLM) -> None:
    """A stop or a limit cuts the unbounded sample, and changes nothing before the cut."""
    policy = HFPolicy(model)
    free = sample(policy, PROMPTS, SEEDS)
    stop = [set(), {free[1].token_ids[6]}, {free[2].token_ids[0], PAD}, set(free[3].token_ids[-1:]), set(range(60))]
    limits = [1, 10, 10, 7, 10]
    cut = policy.sample(PROMPTS, max_tokens=limits, stop=stop, seeds=SEEDS)
    for whole, part, ends, limit in zip(free, cut, stop, limits, strict=True):
        n = next((i + 1 for i, token in enumerate(whole.token_ids) if token in ends), limit)
        n = min(n, limit)
        assert part.token_ids == whole.token_ids[:n]
        assert part.logprobs == pytest.approx(whole.logprobs[:n], abs=1e-5)
        assert part.finish_reason == ("stop" if part.token_ids[-1] in ends else "length")
    assert [len(c.token_ids) for c in cut][::2] == [1, 1, 1]


def test_the_models_own_generation_config_changes_nothing(model: LlamaForCausalLM) -> None:
    """Models of the hub bring end tokens, penalties and truncation of their own, and modes of their own."""
    expected = sample(HFPolicy(model), PROMPTS, SEEDS)
    own = model.generation_config
    hostile = GenerationConfig(
        eos_token_id=[t for c in expected for t in c.token_ids[2:4]],
        repetition_penalty=5.0,
        do_sample=True,
        top_k=2,
        temperature=0.1,
        max_length=3,
    )
    model.generation_config = hostile
    model.train()
    try:
        assert_same(sample(HFPolicy(model), PROMPTS, SEEDS), expected)
        assert model.generation_config is hostile and model.training
    finally:
        model.generation_config = own
        model.eval()


# --------------------------------------------------------------------------------------------------------------------
# Many sessions at once


@pytest.fixture
def batches(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of sequences of all forward passes."""
    sizes: list[int] = []
    forward = model.forward

    def counted(**kwargs: Any) -> Any:
        if "attention_plan" in kwargs:
            sizes.append(len(kwargs["attention_plan"].last))
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return sizes


def streams(count: int, length: int = 3) -> list[Stream]:
    return [Stream(f"stream{s}", tuple(replace(item(), id=f"{s}/{i}") for i in range(length))) for s in range(count)]


def ask(policy: HFPolicy, i: int, max_tokens: int = 4) -> asyncio.Task[Completion]:
    return asyncio.ensure_future(policy.complete(PROMPTS[i % len(PROMPTS)], max_tokens=max_tokens, stop={1}, seed=i))


@pytest.mark.parametrize("max_batch_size", [256, 8])
def test_requests_share_steps_and_wait_for_a_slot(
    model: LlamaForCausalLM, batches: list[int], max_batch_size: int
) -> None:
    """Whoever ends makes room for the next: no step but the last ones has a free slot."""
    policy = HFPolicy(model, max_batch_size=max_batch_size)
    batches.clear()

    async def together() -> list[Completion]:
        return await asyncio.gather(*(ask(policy, i) for i in range(32)))

    found = asyncio.run(together())
    total = sum(len(c.token_ids) for c in found)
    assert sum(batches) == total and max(batches) == min(32, max_batch_size)
    assert len(batches) <= total // min(32, max_batch_size) + 4
    alone = [policy.sample([PROMPTS[i % len(PROMPTS)]], max_tokens=[4], stop=[{1}], seeds=[i])[0] for i in range(32)]
    assert_same(found, alone)


def test_sessions_share_batches(model: LlamaForCausalLM, batches: list[int]) -> None:
    policy = HFPolicy(model)
    batches.clear()
    run = collect(
        make_executor(codec=make_codec("word"), limits=Limits(max_action_tokens=8)),
        policy,
        streams(16),
        lambda s: ListMemory(),
        seed=0,
        max_failed=1.0,
    )
    sessions = [s for t in asyncio.run(run) for s in t.sessions]
    requests = sum(span.policy_version is not None for s in sessions for g in s.segments for span in g.spans)
    assert requests >= 16 * 3
    assert batches[0] == 16, "the first requests of all streams are one batch"
    assert sum(batches) / len(batches) >= 8
    usage = sum((s.usage for s in sessions), Usage())
    assert usage.completion_tokens == sum(batches)


def fail_at(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, failing: Callable[[int], bool]) -> None:
    """From now on forward passes of these numbers fail, counted from 1, after their first layer has written."""
    calls: list[int] = []
    layer = model.model.layers[1]
    forward = layer.forward

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if failing(len(calls)):
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", fails)


def test_a_failing_model_fails_every_waiting_session_and_hangs_none(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make_executor(codec=make_codec("word"), limits=Limits(max_action_tokens=8))
    policy = HFPolicy(model)

    async def bounded(numbers: int) -> list[str]:
        run = collect(executor, policy, streams(numbers), lambda s: ListMemory(), seed=0, max_failed=1.0)
        trajectories = await asyncio.wait_for(run, 60)
        return [f"{s.status} {s.error}" for t in trajectories for s in t.sessions]

    with monkeypatch.context() as patch:
        fail_at(model, patch, lambda n: True)
        assert asyncio.run(bounded(4)) == ["failed policy: RuntimeError: out of memory"] * 12
    with monkeypatch.context() as patch:
        fail_at(model, patch, lambda n: n == 11)
        later = asyncio.run(bounded(4))
    assert 1 <= sum(s.startswith(SessionStatus.FAILED) for s in later) <= 4, "one step fails those that are in it"
    assert not model.training and model.config._attn_implementation == "sdpa"
    assert_same(sample(policy, PROMPTS, SEEDS), sample(HFPolicy(model), PROMPTS, SEEDS))


def test_a_failing_sample_leaves_nothing_behind(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = HFPolicy(model, max_batch_size=2)
    expected = sample(policy, PROMPTS, SEEDS)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        fail_at(model, patch, lambda n: n == 3)
        sample(policy, PROMPTS, SEEDS)
    policy.close()  # it would refuse if requests were left
    assert_same(sample(policy, PROMPTS, SEEDS), expected)


@pytest.mark.parametrize("turns", [1, 12, 14, 16])
def test_a_cancelled_request_leaves_the_others_alone(model: LlamaForCausalLM, batches: list[int], turns: int) -> None:
    """Whether it waits, runs, or is done."""
    policy = HFPolicy(model, max_batch_size=2)

    async def two_of_three() -> list[Completion]:
        tasks = [ask(policy, i, 6) for i in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        return [await tasks[0], await tasks[2]]

    expected = [HFPolicy(model).sample([PROMPTS[i]], max_tokens=[6], stop=[{1}], seeds=[i])[0] for i in (0, 2)]
    batches.clear()
    assert_same(asyncio.run(two_of_three()), expected)
    if turns == 1:
        assert sum(batches) == sum(len(c.token_ids) for c in expected), "it costs nothing before it runs"
    policy.close()


def test_requests_of_a_loop_that_was_torn_down_do_not_haunt_the_next(
    model: LlamaForCausalLM, batches: list[int]
) -> None:
    policy = HFPolicy(model)

    async def abandoned() -> None:
        ask(policy, 0)
        await asyncio.sleep(0)

    async def one() -> Completion:
        return await ask(policy, 1)

    asyncio.run(abandoned())
    batches.clear()
    assert asyncio.run(one()).token_ids
    assert set(batches) == {1}


def test_a_short_session_does_not_wait_for_a_long_one(model: LlamaForCausalLM, batches: list[int]) -> None:
    """Ten short requests in turn, beside a long one, take no step more than their own tokens."""
    policy = HFPolicy(model)
    batches.clear()

    async def both() -> tuple[int, Completion]:
        long = asyncio.ensure_future(policy.complete([7], max_tokens=100, stop=(), seed=0))
        prompt = [3, 5]
        for seed in range(10):
            prompt += (await policy.complete(prompt, max_tokens=2, stop=(), seed=seed)).token_ids
        return len(batches), await long

    steps, long = asyncio.run(both())
    assert steps == 20 and batches == [2] * 20 + [1] * 80
    assert_same([long], sample(policy, [[7]], [0], 100))


# --------------------------------------------------------------------------------------------------------------------
# Keys and values kept between turns


def talk(policy: HFPolicy, seeds: Sequence[int], num_turns: int = 4) -> list[list[Completion]]:
    """Concurrent sessions of some turns each, whose observations and turns are of different lengths."""

    async def session(seed: int) -> list[Completion]:
        ids, turns = [2 + seed % 5, 9, 11][: 1 + seed % 3], []
        for turn in range(num_turns):
            turns.append(await policy.complete(ids, max_tokens=1 + (seed + turn) % 4, stop={5}, seed=seed + 100 * turn))
            ids = [*ids, *turns[-1].token_ids, *range(20, 20 + (seed * turn) % 6)]
        return turns

    async def together() -> list[list[Completion]]:
        return await asyncio.gather(*(session(s) for s in seeds))

    return asyncio.run(together())


@pytest.mark.parametrize("max_batch_size", [64, 12, 5])
def test_reuse_changes_nothing_but_the_usage(model: LlamaForCausalLM, max_batch_size: int) -> None:
    kept = talk(HFPolicy(model, max_batch_size=max_batch_size), range(12))
    fresh = talk(HFPolicy(model, max_batch_size=max_batch_size, reuse=False), range(12))
    for ours, theirs in zip(kept, fresh, strict=True):
        assert_same(ours, theirs)
        assert all(turn.usage.cached_tokens == 0 for turn in theirs)
        for before, turn in pairwise(ours):
            held = before.usage.prompt_tokens + len(before.token_ids) - 1  # the last one sampled was not computed yet
            expected = {held} if max_batch_size >= 12 else {held, 0}
            assert turn.usage.cached_tokens in expected
    assert sum(turn.usage.cached_tokens > 0 for turns in kept for turn in turns) >= 12


def test_the_same_requests_give_the_same_bits(model: LlamaForCausalLM) -> None:
    """Also after the cache was dropped: a resumed run is the same run."""
    policy = HFPolicy(model, max_batch_size=7)
    first = talk(policy, range(12))
    policy.update_weights((), 0)
    assert talk(policy, range(12)) == first
    assert talk(HFPolicy(model, max_batch_size=7), range(12)) == first


def test_long_prompts_are_computed_in_several_passes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And prompts of very different lengths side by side."""
    prompts = [[(7 * i) % 50 + 2 for i in range(n)] for n in (1, 2, 63, 66, 150, 129, 3, 1)]
    expected = [sample(HFPolicy(model), [p], [i])[0] for i, p in enumerate(prompts)]
    assert_same(sample(HFPolicy(model), prompts, range(8)), expected)
    monkeypatch.setattr("agile.policies.hf.MAX_PASS_TOKENS", 70)
    assert_same(sample(HFPolicy(model), prompts, range(8)), expected)


def test_the_least_recently_used_slot_is_evicted(model: LlamaForCausalLM) -> None:
    policy = HFPolicy(model, max_batch_size=2)

    def turn(prompt: list[int]) -> tuple[list[int], int]:
        completion = policy.sample([prompt], max_tokens=[3], stop=[()], seeds=[1])[0]
        return [*prompt, *completion.token_ids], completion.usage.cached_tokens

    a, _ = turn([7, 8])
    b, _ = turn([9, 10])
    a, cached = turn(a)
    assert cached == 4
    c, cached = turn([11, 12])  # b makes room
    assert cached == 0
    assert turn(a)[1] == 7
    assert turn(b)[1] == 0
    assert turn(c)[1] == 0


def test_a_slot_is_taken_only_by_a_prompt_that_goes_on_from_it(model: LlamaForCausalLM) -> None:
    first = HFPolicy(model).sample([[7, 8, 9]], max_tokens=[2], stop=[()], seeds=[1])[0]
    held = [7, 8, 9, first.token_ids[0]]
    for prompt, cached in (
        ([7, 8, 9, 10], 0),
        (held[:-1], 0),
        (held, 0),
        ([*held[:-1], held[-1] + 1, 4], 0),
        ([*held, 4], 4),
    ):
        policy = HFPolicy(model)
        assert policy.sample([[7, 8, 9]], max_tokens=[2], stop=[()], seeds=[1]) == [first]
        assert sample(policy, [prompt], [2], 1)[0].usage.cached_tokens == cached


# --------------------------------------------------------------------------------------------------------------------
# Weights


def other_model(model: LlamaForCausalLM) -> LlamaForCausalLM:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


@pytest.mark.parametrize("how", ["sent", "shared", "unannounced"])
def test_new_weights_leave_nothing_stale(model: LlamaForCausalLM, how: str) -> None:
    """Whether they are sent, or changed in place by a trainer that says so, or does not."""
    mine, new = copy.deepcopy(model), other_model(model)
    policy = HFPolicy(mine)
    prompts = [[*p, *c.token_ids, 4] for p, c in zip(PROMPTS, sample(policy, PROMPTS, SEEDS), strict=True)]
    if how == "sent":
        policy.update_weights(new.state_dict().items(), 3)
    else:
        with torch.no_grad():
            for parameter, changed in zip(mine.parameters(), new.parameters(), strict=True):
                parameter.copy_(changed)
        if how == "shared":
            policy.update_weights((), 3)
    found = sample(policy, prompts, SEEDS)
    assert {c.policy_version for c in found} == {0 if how == "unannounced" else 3}
    assert [c.usage.cached_tokens for c in found] == [0] * len(prompts)
    expected = sample(HFPolicy(new), prompts, SEEDS)
    assert_same([replace(c, policy_version=0) for c in found], expected)


def test_the_version_is_stamped_by_an_update_alone(model: LlamaForCausalLM) -> None:
    policy = HFPolicy(model)
    with pytest.raises(AttributeError):
        policy.version = 4  # type: ignore[misc]
    policy.update_weights(None, 4)
    assert policy.version == 4


def test_weights_of_another_model_are_refused(model: LlamaForCausalLM) -> None:
    policy = HFPolicy(copy.deepcopy(model))
    weights = dict(model.named_parameters())
    with pytest.raises(AgileError, match=r"no parameter 'lm_head\.bias'"):
        policy.update_weights([("lm_head.bias", torch.zeros(1))], 1)
    with pytest.raises(AgileError, match=r"lm_head\.weight came with shape \(2, 3\), expected \(117, 16\)"):
        policy.update_weights([("lm_head.weight", torch.zeros(2, 3))], 1)
    del weights["model.norm.weight"]
    with pytest.raises(AgileError, match=r"lacks the parameters \['model\.norm\.weight'\]"):
        policy.update_weights(weights.items(), 1)


def test_an_update_while_requests_run_is_refused(model: LlamaForCausalLM) -> None:
    policy = HFPolicy(model)

    async def during() -> None:
        task = ask(policy, 0)
        await asyncio.sleep(0)
        with pytest.raises(AgileError, match="1 requests are being sampled"):
            policy.update_weights((), 1)
        await task
        policy.update_weights((), 1)

    asyncio.run(during())
