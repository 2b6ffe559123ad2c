"""Keys and values of many sequences, each in a row of its own, and attention of tokens that stand in one line.

The new tokens of all sequences go through a model as one sequence without padding, so that all but attention works on
as few tokens as there are. Keys and values are written where a `Plan` says, by a transformers `Cache`; attention is
that of `agile.attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from agile.attention import attend_by_plans, check_layers, evaluation
from agile.errors import AgileError

MIN_CAPACITY = 64
REMEDY = "Serve it with vLLM, or choose a model like Llama, Qwen or Mistral."

_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Part:
    """Sequences that attend together: B lines of T queries, n of them real, to K keys each.

    Attributes:
        rows: (B,) rows of the store to attend to; None if they are those of `span`.
        span: Their first row and their last + 1.
        pad: (B * T,) which of the n tokens is the query there; any where there is none.
        unpad: (n,) where each token's query is.
        visible: (B, 1, T, K) which keys each query sees.
    """

    rows: Tensor | None
    span: tuple[int, int]
    pad: Tensor
    unpad: Tensor
    visible: Tensor

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """Of queries (H, n, D) to the rows of stores (rows, tokens, heads, D); (n, H, D)."""
        lines, _, width, length = self.visible.shape
        queries = query.index_select(1, self.pad).view(len(query), lines, width, -1).transpose(0, 1)  # (B, H, T, D)
        keys, values = (self._held(store, length).transpose(1, 2) for store in (keys, values))  # (B, heads, K, D)
        output = scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.visible, scale=scale, enable_gqa=keys.shape[1] != queries.shape[1]
        )
        return output.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad)

    def _held(self, store: Tensor, length: int) -> Tensor:
        if self.rows is None:
            return store[slice(*self.span), :length]
        return store[:, :length].index_select(0, self.rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass over N new tokens.

    Attributes:
        write: (N,) their places in the store, seen as one long list of tokens.
        positions: (1, N) their positions in their sequences.
        last: (sequences,) the last token of each sequence among the N.
        parts: How they attend: sequences with like numbers of new tokens together, in order.
    """

    write: Tensor
    positions: Tensor
    last: Tensor
    parts: tuple[_Part, ...]

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Of queries (1, H, N, D) to the stores that `_SlotLayer.update` returned; (1, N, H, D).

        No sequence is longer than a window: `max_context` sees to it.
        """
        outputs, first = [], 0
        for part in self.parts:
            end = first + len(part.unpad)
            outputs.append(part.attend(query[0, :, first:end], key, value, scale))
            first = end
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, tokens, heads, D) each: what one token writes is contiguous."""

    is_sliding = False

    def __init__(self, cache: SlotCache):
        CacheLayerMixin.__init__(cast(Any, self))
        self.cache = cache
        self.stores: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores as large as the cache is to be, and keep what they hold."""
        # zeros, not empty: what is masked has weight 0, and 0 times a NaN that lay in memory would be NaN
        stores = tuple(s.new_zeros(*self.cache.shape, s.shape[1], s.shape[3]) for s in (key_states, value_states))
        for new, old in zip(stores, self.stores, strict=False):  # at first there is no old one
            new[: old.shape[0], : old.shape[1]] = old
        self.stores = stores
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (1, heads, N, D) where the plan says; returns the whole stores, of which the plan takes its part."""
        if not self.stores or self.stores[0].shape[:2] != self.cache.shape:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stores
        for store, states in ((keys, key_states), (values, value_states)):
            store.flatten(0, 1).index_copy_(0, self.cache.plan.write, states[0].transpose(0, 1))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A store of rows that grows as needed; `prepare` says before each forward pass what it is about.

    Args:
        num_layers: Layers of the model.
        device: Where the model is.
    """

    plan: Plan

    def __init__(self, num_layers: int, device: torch.device):
        super().__init__(layers=[_SlotLayer(self) for _ in range(num_layers)])
        self.device = device
        self.shape = (0, MIN_CAPACITY)

    def prepare(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Plan:
        """Plan a pass over `counts[i]` new tokens of each row, behind the `starts[i]` that it holds.

        Args:
            rows: Distinct rows, ordered by `part_of` their counts.
        """
        self.shape = (
            _grown(self.shape[0], max(rows) + 1),
            _grown(self.shape[1], max(map(sum, zip(starts, counts, strict=True)))),
        )
        r, s, c = (np.asarray(a, dtype=np.int64) for a in (rows, starts, counts))
        ends = np.cumsum(c)
        positions = np.arange(ends[-1]) + np.repeat(s + c - ends, c)  # (N,)
        kinds = [part_of(count) for count in counts]
        cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
        self.plan = Plan(
            self._tensor(np.repeat(r, c) * self.shape[1] + positions),
            self._tensor(positions[None]),
            self._tensor(ends - 1),
            tuple(self._part(r[i:j], s[i:j], c[i:j]) for i, j in pairwise(cuts)),
        )
        return self.plan

    def _part(self, rows: _Ints, starts: _Ints, counts: _Ints) -> _Part:
        width, length = int(counts.max()), int((starts + counts).max())
        first, end = int(rows.min()), int(rows.max()) + 1
        # a view of all rows in between is cheaper than a copy, unless most of them have no query
        view = width == 1 and end - first <= 2 * len(rows)
        lines = rows - first if view else np.arange(len(rows))
        steps = np.arange(width)
        real = steps < counts[:, None]  # (b, T)
        unpad = (lines[:, None] * width + steps)[real]
        size = (end - first if view else len(rows)) * width
        pad, places = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        pad[unpad] = np.arange(len(unpad))
        places[unpad] = (starts[:, None] + steps)[real]
        visible = np.arange(length) <= places.reshape(-1, 1, width, 1)
        return _Part(
            None if view else self._tensor(rows),
            (first, end),
            self._tensor(pad),
            self._tensor(unpad),
            self._tensor(visible),
        )

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def part_of(count: int) -> int:
    """Which part of a pass a sequence of so many new tokens belongs to: padding at most doubles a part of long ones."""
    return 0 if count == 1 else max(6, (count - 1).bit_length())


def _grown(size: int, needed: int) -> int:
    """The first power of two that holds `needed`, if `size` does not."""
    return size if needed <= size else 1 << (needed - 1).bit_length()


@contextmanager
def slot_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model attends by slots, in evaluation mode."""
    own = attend_by_plans(model)
    with evaluation(model):
        try:
            yield
        finally:
            model.config.get_text_config()._attn_implementation = own


def last_logits(model: PreTrainedModel, slots: SlotCache, plan: Plan, ids: Tensor) -> Tensor:
    """Logits (B, V) after the last token of each sequence of the plan, of token ids (1, N), in float32."""
    keeps = "logits_to_keep" in _parameters(type(model).forward)
    output = model(
        input_ids=ids,
        position_ids=plan.positions,
        attention_mask=ids.new_zeros(1, 1, 1, 1),  # nobody reads it; without one, models would make their own
        past_key_values=slots,
        use_cache=True,
        attention_plan=plan,
        **({"logits_to_keep": plan.last} if keeps else {}),
    )
    logits: Tensor = output.logits[0].float()
    return logits if keeps else logits[plan.last]


def max_context(model: PreTrainedModel) -> tuple[int, str]:
    """Most tokens of a sequence, and the name of what limits it.

    Raises:
        AgileError: The model's state is more than keys and values, or its attention takes no mask.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    check_layers(model, REMEDY)
    if "past_key_values" not in _parameters(type(model).forward):
        raise AgileError(f"{name} takes no cache of keys and values. {REMEDY}")
    limits = [(getattr(config, "max_position_embeddings", None) or 2**31, "max_position_embeddings")]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window and (not kinds or "sliding_attention" in kinds):
        limits.append((window, "sliding_window"))
    return min(limits)


def check_attention(model: PreTrainedModel) -> None:
    """Compare a short sequence that comes in two parts, beside another one, to a plain forward pass.

    Raises:
        AgileError: They differ, or the model fails.
    """
    ids = torch.arange(4, device=model.device)[None]
    slots = SlotCache(model.config.get_text_config().num_hidden_layers, model.device)
    problem: Exception | str
    try:
        with torch.no_grad(), slot_attention(model):
            last_logits(model, slots, slots.prepare([1, 0], [0, 0], [1, 2]), ids[:, [3, 0, 1]])
            found = last_logits(model, slots, slots.prepare([1, 0], [1, 2], [1, 2]), ids[:, [3, 2, 3]])[1]
        with torch.no_grad(), evaluation(model):
            expected = model(input_ids=ids).logits[0, -1].float()
        problem = f"logits differ by up to {float((found - expected).abs().max()):.2g}"
        if torch.allclose(found, expected, rtol=0.0, atol=0.05 * float(expected.std()) + 1e-6):
            return
    except Exception as error:
        problem = error
    raise AgileError(
        f"{type(model).__name__} cannot sample sequences of different lengths from one cache ({problem}): its "
        f"attention is not the usual one of transformers. {REMEDY}"
    )


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
