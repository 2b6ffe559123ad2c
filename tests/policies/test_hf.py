"""The batched Hugging Face policy: exact log-probabilities, seeds, stops, and what happens when generate fails."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from agile.executor import Limits
from agile.policies.hf import HFPolicy
from agile.rollout import collect
from agile.types import Completion, SessionStatus, Stream
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
    """Equal ids, and log-probabilities that differ by rounding alone."""
    for a, b in zip(found, expected, strict=True):
        assert replace(a, logprobs=b.logprobs) == b
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_plain_forward_pass(model: LlamaForCausalLM, temperature: float) -> None:
    """Of softmax(logits / temperature); greedy ones of temperature 1."""
    for prompt, completion in zip(
        PROMPTS, sample(HFPolicy(model, PAD, temperature=temperature), PROMPTS, SEEDS), strict=True
    ):
        logits = logits_after(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1] / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        assert len(completion.token_ids) == 10


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(model: LlamaForCausalLM, temperature: float) -> None:
    """Chi-square of 4,000 draws of one token."""
    draws = sample(
        HFPolicy(model, PAD, temperature=temperature, max_batch_size=4000), [PROMPTS[1]] * 4000, range(4000), 1
    )
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
    policy = HFPolicy(model, PAD)
    expected = sample(policy, PROMPTS, SEEDS)
    assert expected[1].token_ids != expected[4].token_ids, "other seeds must give other samples"
    order = list(range(len(PROMPTS)))
    random.Random(0).shuffle(order)
    assert_same(sample(policy, [PROMPTS[i] for i in order], [SEEDS[i] for i in order]), [expected[i] for i in order])
    for i, prompt in enumerate(PROMPTS):
        assert_same(sample(policy, [prompt], [SEEDS[i]]), [expected[i]])
    for chunk_tokens, max_batch_size in ((1, 256), (3, 2), (50, 3)):
        other = HFPolicy(model, PAD, chunk_tokens=chunk_tokens, max_batch_size=max_batch_size)
        assert_same(sample(other, PROMPTS, SEEDS), expected)


def test_greedy_is_the_argmax(model: LlamaForCausalLM) -> None:
    for prompt, completion in zip(PROMPTS, sample(HFPolicy(model, PAD, temperature=0), PROMPTS, SEEDS), strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(logits_after(model, ids)[-1].argmax()))
        assert completion.token_ids == tuple(ids[len(prompt) :])


def test_every_row_has_its_own_stops_and_limit(model: LlamaForCausalLM) -> None:
    """A stop or a limit cuts the unbounded sample, and changes nothing before the cut."""
    policy = HFPolicy(model, PAD)
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
    expected = sample(HFPolicy(model, PAD), PROMPTS, SEEDS)
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
        assert_same(sample(HFPolicy(model, PAD), PROMPTS, SEEDS), expected)
        assert model.generation_config is hostile and model.training
    finally:
        model.generation_config = own
        model.eval()


# --------------------------------------------------------------------------------------------------------------------
# Many sessions at once


@pytest.fixture
def batches(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all batches that `generate` is called with."""
    sizes: list[int] = []
    generate = cast(Any, model).generate

    def counted(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        return generate(input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", counted)
    return sizes


def streams(count: int, length: int = 3) -> list[Stream]:
    return [Stream(f"stream{s}", tuple(replace(item(), id=f"{s}/{i}") for i in range(length))) for s in range(count)]


def ask(policy: HFPolicy, i: int, max_tokens: int = 4) -> asyncio.Task[Completion]:
    return asyncio.ensure_future(policy.complete(PROMPTS[i % len(PROMPTS)], max_tokens=max_tokens, stop={1}, seed=i))


@pytest.mark.parametrize(("max_batch_size", "expected"), [(256, [32]), (8, [8, 8, 8, 8])])
def test_concurrent_requests_form_few_batches(
    model: LlamaForCausalLM, batches: list[int], max_batch_size: int, expected: list[int]
) -> None:
    policy = HFPolicy(model, PAD, max_batch_size=max_batch_size)

    async def together() -> list[Completion]:
        return await asyncio.gather(*(ask(policy, i) for i in range(32)))

    found = asyncio.run(together())
    assert batches == expected
    alone = [policy.sample([PROMPTS[i % len(PROMPTS)]], max_tokens=[4], stop=[{1}], seeds=[i])[0] for i in range(32)]
    assert_same(found, alone)


def test_sessions_share_batches(model: LlamaForCausalLM, batches: list[int]) -> None:
    policy = HFPolicy(model, PAD)
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


@pytest.fixture
def broken(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`generate` fails at its calls of these numbers."""
    calls: list[int] = []
    failing: list[int] = []
    generate = cast(Any, model).generate

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if not failing or len(calls) in failing:
            raise RuntimeError("out of memory")
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", fails)
    yield failing


def test_a_failing_model_fails_every_waiting_session_and_hangs_none(model: LlamaForCausalLM, broken: list[int]) -> None:
    executor = make_executor(codec=make_codec("word"), limits=Limits(max_action_tokens=8))

    async def bounded(numbers: int) -> list[str]:
        run = collect(executor, HFPolicy(model, PAD), streams(numbers), lambda s: ListMemory(), seed=0, max_failed=1.0)
        trajectories = await asyncio.wait_for(run, 60)
        return [f"{s.status} {s.error}" for t in trajectories for s in t.sessions]

    assert asyncio.run(bounded(4)) == ["failed policy: RuntimeError: out of memory"] * 12
    broken += [14]  # the calls so far are three: one a question of the four streams
    later = asyncio.run(bounded(4))
    assert 1 <= sum(s.startswith(SessionStatus.FAILED) for s in later) <= 4, "one call fails those that wait for it"


def test_a_cancelled_request_leaves_the_others_alone(model: LlamaForCausalLM, batches: list[int]) -> None:
    policy = HFPolicy(model, PAD, chunk_tokens=2)

    async def two_of_three(turns: int) -> list[Completion]:
        tasks = [ask(policy, i, 6) for i in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        return [await tasks[0], await tasks[2]]

    expected = [policy.sample([PROMPTS[i]], max_tokens=[6], stop=[{1}], seeds=[i])[0] for i in (0, 2)]
    batches.clear()
    assert_same(asyncio.run(two_of_three(turns=1)), expected)
    assert batches[0] == 2, "a cancelled request costs nothing"
    assert_same(asyncio.run(two_of_three(turns=15)), expected)


def test_requests_of_a_loop_that_was_torn_down_do_not_haunt_the_next(
    model: LlamaForCausalLM, batches: list[int]
) -> None:
    policy = HFPolicy(model, PAD)

    async def abandoned() -> None:
        ask(policy, 0)
        await asyncio.sleep(0)

    async def one() -> Completion:
        return await ask(policy, 1)

    asyncio.run(abandoned())
    assert asyncio.run(one()).token_ids
    assert batches == [1]
