"""A Hugging Face causal LM as a policy: many sessions at once through one `generate`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from agile.types import Completion, Usage


@dataclass(slots=True, eq=False)
class _Request:
    """One prompt, what was sampled for it so far, and the noise that is to come."""

    prompt_ids: Sequence[int]
    max_tokens: int
    stop: Collection[int]
    seed: int
    generator: torch.Generator
    future: asyncio.Future[Completion] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] in self.stop

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) >= self.max_tokens

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


class _GumbelNoise(LogitsProcessor):
    """Makes greedy decoding sample: argmax(logits / T + Gumbel) is a draw from softmax(logits / T).

    Every row draws from a generator of its own, so that a sample depends on its seed and not on who shares the batch.
    """

    def __init__(self, requests: Sequence[_Request], temperature: float):
        self.requests = requests
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, request in zip(noise, self.requests, strict=True):
            row.exponential_(generator=request.generator)
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

    A batch is formed when no further session can ask before it gets an answer. It is sampled a few tokens at a time:
    then finished sessions go on, and what they ask next joins the unfinished ones: nobody waits for the longest.
    The distribution is softmax(logits / temperature), never truncated, so that the returned logprobs are those of what
    was sampled; temperature 0 is greedy, its logprobs those of temperature 1.

    Args:
        model: A causal LM; it is used as it is, in its device and dtype.
        pad_id: Padding token id (padding is on the left).
        temperature: Of sampling.
        max_batch_size: Most sequences in one `generate`.
        chunk_tokens: Most tokens that one `generate` samples before the batch is formed anew.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pad_id: int,
        *,
        temperature: float = 1.0,
        max_batch_size: int = 256,
        chunk_tokens: int = 4,
    ):
        self.model = model
        self.pad_id = pad_id
        self.temperature = temperature
        self.max_batch_size = max_batch_size
        self.chunk_tokens = chunk_tokens
        self.version = 0
        self._pending: list[_Request] = []
        self._flush: asyncio.Task[None] | None = None

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        loop = asyncio.get_running_loop()
        request = self._request(prompt_ids, max_tokens, stop, seed)
        request.future = loop.create_future()
        self._pending.append(request)
        if self._flush is None or self._flush.done():
            self._flush = loop.create_task(self._flush_when_idle())
        return await request.future

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        stop: Sequence[Collection[int]],
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Sample one completion per prompt, without an event loop; all arguments have one entry per prompt."""
        requests = [self._request(*parts) for parts in zip(prompts, max_tokens, stop, seeds, strict=True)]
        while unfinished := [r for r in requests if not r.done]:
            self._extend(unfinished[: self.max_batch_size])
        return [self._completion(r) for r in requests]

    def _request(self, prompt_ids: Sequence[int], max_tokens: int, stop: Collection[int], seed: int) -> _Request:
        generator = torch.Generator(self.model.device).manual_seed(seed)
        return _Request(prompt_ids, max_tokens, stop, seed, generator)

    def _completion(self, request: _Request) -> Completion:
        finish = "stop" if request.stopped else "length"
        usage = Usage(len(request.prompt_ids), 0, len(request.token_ids))
        return Completion(tuple(request.token_ids), tuple(request.logprobs), finish, self.version, usage)

    async def _flush_when_idle(self) -> None:
        """Let every other ready task run until none adds a request, then extend all of them."""
        while self._pending:
            seen, quiet = len(self._pending), 0
            while quiet < 10:  # a session needs some turns of the loop between two requests
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._pending) == seen else 0
                seen = len(self._pending)
            self._pending = [r for r in self._pending if r.future is not None and not r.future.done()]
            # equal lengths together: less padding, and the same batches whatever order the requests came in
            self._pending.sort(key=lambda r: (r.length, r.seed))
            batch, waiting = self._pending[: self.max_batch_size], self._pending[self.max_batch_size :]
            try:
                self._extend(batch)
            except Exception as error:
                for request in batch:
                    if request.future is not None and not request.future.done():
                        request.future.set_exception(error)
                batch = []
            self._pending = waiting
            for request in batch:
                if request.future is None or request.future.done():  # whoever asked is gone
                    continue
                if request.done:
                    request.future.set_result(self._completion(request))
                else:
                    self._pending.append(request)

    @torch.no_grad()
    def _extend(self, requests: Sequence[_Request]) -> None:
        """Sample up to `chunk_tokens` more tokens of each."""
        device = self.model.device
        length = max(r.length for r in requests)
        room = [min(r.max_tokens - len(r.token_ids), self.chunk_tokens) for r in requests]
        input_ids = torch.full((len(requests), length), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        stop = torch.zeros(len(requests), self.model.config.vocab_size, dtype=torch.bool)
        for row, request in enumerate(requests):
            input_ids[row, length - request.length :] = torch.tensor([*request.prompt_ids, *request.token_ids])
            attention_mask[row, length - request.length :] = 1
            stop[row, list(request.stop)] = True
        # generate() fills what its config leaves open (end tokens, repetition penalty, ...) from the model's own.
        was_training, own_config = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            output = cast(Any, self.model).generate(  # a method of a mixin that PreTrainedModel lacks
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(room),
                    do_sample=False,
                    pad_token_id=self.pad_id,
                    output_logits=True,
                    return_dict_in_generate=True,
                ),
                logits_processor=LogitsProcessorList(
                    [_GumbelNoise(requests, self.temperature)] if self.temperature > 0 else []
                ),
                stopping_criteria=StoppingCriteriaList(
                    [_StopPerRow(stop.to(device), torch.tensor(room, device=device), length)]
                ),
            )
        finally:
            self.model.generation_config = own_config
            self.model.train(was_training)
        sampled = output.sequences[:, length:]  # (B, T)
        logits = torch.stack(output.logits, dim=1).float()  # (B, T, V)
        logprobs = (logits / (self.temperature or 1.0)).log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
        for request, ids, row, limit in zip(requests, sampled.tolist(), logprobs.tolist(), room, strict=True):
            n = next((i + 1 for i, token in enumerate(ids[:limit]) if token in request.stop), min(limit, len(ids)))
            request.token_ids += ids[:n]
            request.logprobs += row[:n]
