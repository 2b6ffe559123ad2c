"""A Hugging Face causal LM as a policy: many sessions at once, each with its keys and values kept between its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agile.errors import AgileError
from agile.policies.slots import SlotCache, check_attention, last_logits, max_context, part_of, slot_attention
from agile.types import Completion, Usage

MAX_PASS_TOKENS = 8192  # of one forward pass, unless a single prompt has more: bounds memory


@dataclass(slots=True, eq=False)
class _Slot:
    """A row of the cache: the tokens whose keys and values it holds while no request runs in it, and their number."""

    row: int
    ids: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(slots=True, eq=False)
class _Request:
    """One prompt, what was sampled for it so far, and the noise that is to come."""

    ids: list[int]  # prompt and what was sampled
    num_prompt: int
    max_tokens: int
    stop: Collection[int]
    seed: int
    generator: torch.Generator
    future: asyncio.Future[Completion] | None = None
    logprobs: list[float] = field(default_factory=list)
    slot: _Slot | None = None
    num_cached: int = 0

    @property
    def stopped(self) -> bool:
        return bool(self.logprobs) and self.ids[-1] in self.stop

    @property
    def done(self) -> bool:
        return len(self.logprobs) >= self.max_tokens or self.stopped

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future is not None and (self.future.done() or self.future.get_loop().is_closed())

    def completion(self, version: int) -> Completion:
        usage = Usage(self.num_prompt, self.num_cached, len(self.logprobs))
        finish = "stop" if self.stopped else "length"
        return Completion(tuple(self.ids[self.num_prompt :]), tuple(self.logprobs), finish, version, usage)


class HFPolicy:
    """Samples the requests of concurrent sessions together, one token of each at a time.

    A finished request leaves at once, and what its session asks next joins at the next token: nobody waits for the
    longest. Keys and values stay in their slot until another session needs it; a prompt that begins with the tokens of
    a slot computes only the rest. Requests of sessions that still have a slot go first, all others in their order.

    The distribution is softmax(logits / temperature), never truncated, so that the returned logprobs are those of what
    was sampled; temperature 0 is greedy, its logprobs those of temperature 1. A sample depends on its prompt and seed;
    who shares the batch changes its logprobs by rounding alone.

    Args:
        model: A causal LM; it is used as it is, in its device and dtype. A trainer may share it, see `update_weights`.
        temperature: Of sampling.
        max_batch_size: Slots: most sequences that are sampled at once and kept. Further requests wait.
        reuse: Whether keys and values are kept between requests; without, each computes its whole prompt.

    Attributes:
        forbidden: Ids that are never sampled; the distribution is that of all others.
        max_context: Most tokens of a prompt and what is sampled for it.

    Raises:
        AgileError: The model cannot have sequences of different lengths in one cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        max_batch_size: int = 256,
        reuse: bool = True,
    ):
        self.model = model
        self.temperature = temperature
        self.forbidden: Collection[int] = ()
        self.max_batch_size = max_batch_size
        self.reuse = reuse
        self._version = 0
        self.max_context, self._limit_name = max_context(model)
        self._arrived: list[_Request] = []  # since the last step
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
        self._server: asyncio.Task[None] | None = None
        self.close()
        check_attention(model)

    @property
    def version(self) -> int:
        """Number of weight updates; only `update_weights` changes it, as it alone forgets what old weights cached."""
        return self._version

    def update_weights(self, weights: Iterable[tuple[str, Any]] | None, version: int) -> None:
        """Forget all keys and values, stamp `version`, and copy `weights` into the model, if there are any.

        Args:
            weights: `(name, tensor)` of every parameter of the model; none if the trainer shares the model.

        Raises:
            AgileError: Requests are running, or names or shapes are not those of the model.
        """
        self.close()
        expected = dict(self.model.named_parameters(remove_duplicate=False))
        found = set()
        with torch.no_grad():
            for name, tensor in weights or ():
                if name not in expected:
                    raise AgileError(f"{type(self.model).__name__} has no parameter {name!r}; send those that it has.")
                if tensor.shape != expected[name].shape:
                    raise AgileError(
                        f"Parameter {name} came with shape {tuple(tensor.shape)}, expected "
                        f"{tuple(expected[name].shape)}; send the weights of a model of the same config."
                    )
                expected[name].copy_(tensor)
                found.add(name)
        if found and (missing := sorted(expected.keys() - found)):
            raise AgileError(f"The update lacks the parameters {missing}; send all of them, tied ones included.")
        self._weights_seen = self._fingerprint()
        self._version = version

    def close(self) -> None:
        """Give back the memory of the cache; the policy can be used again.

        Raises:
            AgileError: Requests are running.
        """
        self._drop_gone()
        if count := len(self._arrived) + len(self._waiting) + len(self._running):
            raise AgileError(f"{count} requests are being sampled; update or close a policy when all are answered.")
        layers = self.model.config.get_text_config().num_hidden_layers
        self._device = self.model.device
        self._cache = SlotCache(layers, self._device)
        self._free = [_Slot(row) for row in reversed(range(self.max_batch_size))]
        self._idle: list[_Slot] = []  # least recently used first
        self._weights_seen = self._fingerprint()

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        """Sample until a token of `stop` (kept) or `max_tokens`.

        Raises:
            AgileError: The model's context is shorter than the prompt and `max_tokens`.
        """
        loop = asyncio.get_running_loop()
        request = self._request(prompt_ids, max_tokens, stop, seed)
        request.future = loop.create_future()
        self._arrived.append(request)
        if self._server is None or self._server.done() or self._server.get_loop() is not loop:
            self._server = loop.create_task(self._serve())
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
        self._forget_stale()
        self._arrived += requests
        while not all(r.done for r in requests):
            self._admit()
            if error := self._step():
                self._waiting = [r for r in self._waiting if r not in requests]
                raise error
        return [r.completion(self._version) for r in requests]

    def _request(self, prompt_ids: Sequence[int], max_tokens: int, stop: Collection[int], seed: int) -> _Request:
        num_prompt = len(prompt_ids)
        if num_prompt < 1 or max_tokens < 1:
            raise ValueError(f"A prompt of {num_prompt} tokens, max_tokens {max_tokens}; both must be at least 1.")
        if num_prompt + max_tokens > self.max_context:
            raise AgileError(
                f"A prompt of {num_prompt} tokens and up to {max_tokens} sampled ones are {num_prompt + max_tokens}, "
                f"but {self._limit_name} of {type(self.model).__name__} is {self.max_context}. Lower "
                "rollout.max_context_tokens to that, or take a model with a longer context."
            )
        generator = torch.Generator(self._device).manual_seed(seed)
        return _Request(list(prompt_ids), num_prompt, max_tokens, stop, seed, generator)

    # ------------------------------------------------------------------------------------------------------------------
    # Who runs

    async def _serve(self) -> None:
        """Sample while there are requests."""
        self._forget_stale()
        some_left = True
        while self._arrived or self._waiting or self._running:
            if some_left:
                await self._settle()
            else:
                await asyncio.sleep(0)  # tools, experts and cancellations have their turn
            self._admit()
            before = len(self._running)
            self._step()
            some_left = len(self._running) < before

    async def _settle(self) -> None:
        """Let every other ready task run until none adds a request."""
        seen, quiet = len(self._arrived), 0
        while quiet < 10:  # a session needs some turns of the loop between two requests
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._arrived) == seen else 0
            seen = len(self._arrived)

    def _forget_stale(self) -> None:
        """Start with an empty cache if somebody changed the weights in place and did not say so."""
        self._drop_gone()
        if not self._running and self._fingerprint() != self._weights_seen:
            arrived, self._arrived = self._arrived, []
            self.close()
            self._arrived = arrived

    def _fingerprint(self) -> tuple[tuple[int, int], ...]:
        return tuple((p.data_ptr(), p._version) for p in self.model.parameters())

    def _drop_gone(self) -> None:
        self._arrived = [r for r in self._arrived if not r.gone]
        self._waiting = [r for r in self._waiting if not r.gone]
        for request in [r for r in self._running if r.gone]:
            self._running.remove(request)
            self._release(request)

    def _admit(self) -> None:
        """Give slots to requests: the one that holds most of the prompt, a free one, or the least recently used one."""
        self._drop_gone()
        # sessions may come in any order from their tools; the same requests must give the same batches
        self._waiting += sorted(self._arrived, key=lambda r: (r.num_prompt, r.seed))
        self._arrived = []
        if not self._waiting:
            return
        strangers = []
        for request in self._waiting:
            slot = max((s for s in self._idle if _holds(s, request.ids)), key=lambda s: s.length, default=None)
            if slot is None:
                strangers.append(request)
            else:
                self._idle.remove(slot)
                self._start(request, slot)
        taken = strangers[: len(self._free) + len(self._idle)]
        for request in taken:
            slot = self._free.pop() if self._free else self._idle.pop(0)
            slot.length = 0
            self._start(request, slot)
        self._waiting = strangers[len(taken) :]

    def _start(self, request: _Request, slot: _Slot) -> None:
        request.slot, request.num_cached = slot, slot.length
        self._running.append(request)

    def _release(self, request: _Request) -> None:
        """Keep what the request's slot holds for the next turn of its session."""
        slot = request.slot
        assert slot is not None
        slot.ids = request.ids[: slot.length]
        if self.reuse and slot.ids:
            self._idle.append(slot)
        else:
            self._free.append(slot)

    # ------------------------------------------------------------------------------------------------------------------
    # One token of each

    def _step(self) -> Exception | None:
        """Sample one token of every running request; a failure is the answer to all of them."""
        running = self._running
        if not running:
            return None
        try:
            self._sample(running)
        except Exception as error:
            self._running = []
            for request in running:
                assert request.slot is not None
                self._free.append(request.slot)  # it may be half written
                if request.future is not None and not request.gone:
                    request.future.set_exception(error)
            return error
        self._running = [r for r in running if not r.done]
        for request in running:
            if request.done:
                self._release(request)
                if request.future is not None and not request.gone:
                    request.future.set_result(request.completion(self._version))
        return None

    @torch.no_grad()
    def _sample(self, running: Sequence[_Request]) -> None:
        passes = _passes(running)
        requests = [r for group in passes for r in group]
        with slot_attention(self.model):
            logits = torch.cat([self._forward(group) for group in passes])  # (B, V)
        if self.forbidden:
            logits[:, list(self.forbidden)] = -torch.inf
        logprobs = (logits / (self.temperature or 1.0)).log_softmax(-1)
        scores = logprobs
        if self.temperature > 0:
            # argmax(logprob + Gumbel) is a draw from the distribution; each row's noise is its own generator's
            noise = torch.empty_like(logprobs)
            for row, request in zip(noise.unbind(), requests, strict=True):
                row.exponential_(generator=request.generator)
            scores = logprobs - noise.log_()
        tokens = scores.argmax(-1, keepdim=True)  # (B, 1)
        chosen = logprobs.gather(1, tokens)
        for request, token, logprob in zip(requests, tokens[:, 0].tolist(), chosen[:, 0].tolist(), strict=True):
            request.ids.append(token)
            request.logprobs.append(logprob)

    def _forward(self, group: Sequence[_Request]) -> Tensor:
        """Logits (B, V) after the last token of each request, in float32; its slot then holds all its tokens."""
        slots = [r.slot for r in group if r.slot is not None]
        counts = [_num_new(r) for r in group]
        plan = self._cache.prepare([s.row for s in slots], [s.length for s in slots], counts)
        ids = [i for r, n in zip(group, counts, strict=True) for i in r.ids[-n:]]
        logits = last_logits(self.model, self._cache, plan, torch.tensor([ids], device=self._device))
        for slot, count in zip(slots, counts, strict=True):
            slot.length += count
        return logits


def _num_new(request: _Request) -> int:
    """How many of its tokens the cache does not hold."""
    assert request.slot is not None
    return len(request.ids) - request.slot.length


def _holds(slot: _Slot, ids: list[int]) -> bool:
    """Whether the slot's tokens begin the prompt, and leave at least its last one to compute."""
    n = slot.length
    return n < len(ids) and slot.ids[-1] == ids[n - 1] and slot.ids == ids[:n]


def _passes(requests: Sequence[_Request]) -> list[list[_Request]]:
    """Requests that share a forward pass, in the order of its parts and their rows."""
    passes: list[list[_Request]] = []
    room = 0
    for request in sorted(requests, key=lambda r: (part_of(_num_new(r)), r.slot.row if r.slot else -1)):
        if not passes or _num_new(request) > room:
            passes.append([])
            room = MAX_PASS_TOKENS
        passes[-1].append(request)
        room -= _num_new(request)
    return passes
