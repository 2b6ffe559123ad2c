"""A Hugging Face causal LM as a policy: many sessions at once through one `generate`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from agile.types import Completion


@dataclass(slots=True)
class _Request:
    prompt_ids: Sequence[int]
    max_tokens: int
    stop: Collection[int]
    seed: int
    future: asyncio.Future[Completion]


class _GumbelNoise(LogitsProcessor):
    """Makes greedy decoding sample: argmax(logits / T + Gumbel) is a draw from softmax(logits / T).

    Every row draws from a generator of its own, so that a sample depends on its seed and not on who shares the batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - noise.log()


class _StopPerRow(StoppingCriteria):
    """Each row ends at a token of its own stop set, or at its own limit."""

    def __init__(self, stop: Tensor, limits: Tensor, prompt_length: int):
        self.stop = stop  # (B, V) bool
        self.limits = limits  # (B,)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        last = input_ids[:, -1:]
        return self.stop.gather(1, last).squeeze(1) | (input_ids.shape[1] - self.prompt_length >= self.limits)


class HFPolicy:
    """Batches the requests of concurrent sessions and samples them with transformers' `generate`.

    A batch is formed when no further session can ask before it gets an answer. The distribution is
    softmax(logits / temperature), never truncated, so that the returned logprobs are those of what was sampled;
    temperature 0 is greedy, its logprobs those of temperature 1.

    Args:
        model: A causal LM; it is used as it is, in its device and dtype.
        pad_id: Padding token id (padding is on the left).
        max_batch_size: Most sequences in one `generate`.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, *, temperature: float = 1.0, max_batch_size: int = 256):
        self.model = model
        self.pad_id = pad_id
        self.temperature = temperature
        self.max_batch_size = max_batch_size
        self.version = 0
        self._pending: list[_Request] = []
        self._flush: asyncio.Task[None] | None = None

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        self._pending.append(_Request(prompt_ids, max_tokens, stop, seed, future))
        if self._flush is None or self._flush.done():
            self._flush = loop.create_task(self._flush_when_idle())
        return await future

    async def _flush_when_idle(self) -> None:
        """Let every other ready task run until none adds a request, then sample all of them."""
        while self._pending:
            seen, quiet = len(self._pending), 0
            while quiet < 10:  # a session needs some turns of the loop between two requests
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._pending) == seen else 0
                seen = len(self._pending)
            self._pending = [r for r in self._pending if not r.future.done()]  # without those of cancelled sessions
            # equal lengths together: less padding, and the same batches whatever order the requests came in
            self._pending.sort(key=lambda r: (len(r.prompt_ids), r.seed))
            batch, self._pending = self._pending[: self.max_batch_size], self._pending[self.max_batch_size :]
            try:
                completions = self.sample(
                    [r.prompt_ids for r in batch],
                    max_tokens=[r.max_tokens for r in batch],
                    stop=[r.stop for r in batch],
                    seeds=[r.seed for r in batch],
                )
            except Exception as error:
                for request in batch:
                    if not request.future.done():
                        request.future.set_exception(error)
            else:
                for request, completion in zip(batch, completions, strict=True):
                    if not request.future.done():
                        request.future.set_result(completion)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        stop: Sequence[Collection[int]],
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Sample one completion per prompt; all arguments have one entry per prompt."""
        device = self.model.device
        length = max(len(p) for p in prompts)
        input_ids = torch.full((len(prompts), length), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        stop_rows = torch.zeros(len(prompts), self.model.config.vocab_size, dtype=torch.bool)
        for row, (prompt, ends) in enumerate(zip(prompts, stop, strict=True)):
            input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, length - len(prompt) :] = 1
            stop_rows[row, list(ends)] = True
        processors = LogitsProcessorList()
        if self.temperature > 0:
            processors.append(_GumbelNoise(seeds, self.temperature, device))
        # generate() fills what its config leaves open (end tokens, repetition penalty, ...) from the model's own.
        was_training, own_config = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            output = self.model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(max_tokens),
                    do_sample=False,
                    pad_token_id=self.pad_id,
                    output_logits=True,
                    return_dict_in_generate=True,
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList(
                    [_StopPerRow(stop_rows.to(device), torch.tensor(max_tokens, device=device), length)]
                ),
            )
        finally:
            self.model.generation_config = own_config
            self.model.train(was_training)
        sampled = output.sequences[:, length:]  # (B, T)
        logits = torch.stack(output.logits, dim=1).float()  # (B, T, V)
        logprobs = (logits / (self.temperature or 1.0)).log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
        completions = []
        for ids, row_logprobs, ends, limit in zip(sampled.tolist(), logprobs.tolist(), stop, max_tokens, strict=True):
            n = next((i + 1 for i, token in enumerate(ids[:limit]) if token in ends), min(limit, len(ids)))
            finish = "stop" if ids[n - 1] in ends else "length"
            completions.append(Completion(tuple(ids[:n]), tuple(row_logprobs[:n]), finish, self.version))
        return completions
