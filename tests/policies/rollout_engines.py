"""What the tests of both vLLM policies share: small models in folders, changed weights, and plain forward passes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from agile.protocols import Policy
from agile.types import Completion
from tests.policies.contract import CODEC

MAX_LEN = 256
PROMPTS: list[list[int]] = [[7], [3, 5, 9, 11], [20, 21], [7, 8, 9, 10, 12, 13, 14, 2, 4, 6, 30], list(range(2, 100))]


def make_model(seed: int = 0, *, tied: bool = False, vocab_size: int | None = None) -> LlamaForCausalLM:
    """Next tokens are neither certain nor uniform."""
    torch.manual_seed(seed)
    lm: LlamaForCausalLM = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size or len(CODEC.tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_LEN,
            tie_word_embeddings=tied,
            pad_token_id=CODEC.tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=CODEC.tokenizer.eos_token_id,
        )
    )
    lm.eval()
    with torch.no_grad():
        lm.lm_head.weight.mul_(3 if tied else 10)
    return lm


def save(lm: LlamaForCausalLM, folder: Path) -> Path:
    lm.save_pretrained(folder)
    CODEC.tokenizer.save_pretrained(folder)
    # what hubs ship, and no policy may follow
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "eos_token_id": [5, 6, 7]}'
    )
    return folder


@torch.no_grad()
def perturb(lm: LlamaForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def weights(lm: LlamaForCausalLM, *, drop: str = "") -> Iterator[tuple[str, Tensor]]:
    """As a trainer gives them: each tensor is gone when the next is asked for."""
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if name != drop:
            lent = parameter.detach().clone()
            yield name, lent
            lent.fill_(float("nan"))


def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int = 12, stop: Sequence[int] = ()
) -> list[Completion]:
    async def together() -> list[Completion]:
        calls = (policy.complete(p, max_tokens=max_tokens, stop=stop, seed=s) for s, p in enumerate(prompts))
        return await asyncio.gather(*calls)

    return asyncio.run(together())


def largest_error(lm: LlamaForCausalLM, policy: Policy, temperature: float = 1.0) -> float:
    """Of the policy's log-probabilities, against a plain forward pass of `lm`."""
    worst = 0.0
    for prompt, completion in zip(PROMPTS, sample(policy, PROMPTS), strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        assert expected.min() < -0.1, "the test needs samples that are not certain"
        worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return worst
