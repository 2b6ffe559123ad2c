"""The keys and values of many sequences, each in a row of its own, as a transformers `Cache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

MIN_CAPACITY = 64


@dataclass(slots=True)
class _Plan:
    """What the next forward pass writes and reads.

    Attributes:
        shape: (rows, tokens) that the store must hold.
        write: (B * T,) places in the store, seen as one long list of tokens, of the keys that are computed next.
        rows: (B,) rows to attend to; None if they are `span`.
        span: First and last row + 1.
        length: Tokens of each row to attend to, K.
    """

    shape: tuple[int, int]
    write: Tensor
    rows: Tensor | None
    span: tuple[int, int]
    length: int


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, tokens, heads, head size) each: what one token writes is contiguous."""

    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the store as large as the plan asks, and keep what it holds."""
        shape = self.cache.plan.shape
        # zeros, not empty: what is masked has weight 0, and 0 times a NaN that lay in memory would be NaN
        stores = [s.new_zeros(*shape, s.shape[1], s.shape[3]) for s in (key_states, value_states)]
        if self.is_initialized:
            for new, old in zip(stores, (self.keys, self.values), strict=True):
                new[: old.shape[0], : old.shape[1]] = old
        self.keys, self.values = stores
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) where the plan says; returns all that its rows hold, (B, H, K, D)."""
        if not self.is_initialized or self.keys.shape[:2] != self.cache.plan.shape:
            self.lazy_initialization(key_states, value_states)
        return self._exchange(self.keys, key_states), self._exchange(self.values, value_states)

    def _exchange(self, store: Tensor, states: Tensor) -> Tensor:
        plan = self.cache.plan
        store.flatten(0, 1).index_copy_(0, plan.write, states.transpose(1, 2).flatten(0, 1))
        held = store[plan.span[0] : plan.span[1], : plan.length] if plan.rows is None else None
        if held is None:
            held = store[:, : plan.length].index_select(0, plan.rows)
        return held.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.plan.length, 0

    def get_seq_length(self) -> int:
        return self.cache.plan.length

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A store of rows that grows as needed; `prepare` says before each forward pass what it is about.

    Args:
        num_layers: Layers of the model.
        device: Where the model is.
    """

    plan: _Plan

    def __init__(self, num_layers: int, device: torch.device):
        super().__init__(layers=[_SlotLayer(self) for _ in range(num_layers)])
        self.device = device
        self.shape = (0, MIN_CAPACITY)

    def prepare(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Plan a pass over `counts[b]` new tokens of each row, padded on the left to T = max(counts).

        Args:
            rows: Distinct rows, ascending if they are a range.
            starts: How many tokens each row holds already.

        Returns:
            (B, T) places of all tokens in their rows; those of padding lie behind what its row holds, where the next
            tokens overwrite them.
        """
        width = max(counts)
        length = max(start + width for start in starts)
        num_rows, capacity = self.shape
        self.shape = (_grown(num_rows, max(rows) + 1), _grown(capacity, length))
        places = torch.arange(width)[None] - (width - torch.tensor(counts))[:, None]  # (B, T), negative: padding
        places = torch.where(places < 0, places + width, places) + torch.tensor(starts)[:, None]
        row = torch.tensor(rows)
        first, last = rows[0], rows[-1] + 1
        dense = last - first == len(rows)
        self.plan = _Plan(
            self.shape,
            (row[:, None] * self.shape[1] + places).flatten().to(self.device),
            None if dense else row.to(self.device),
            (first, last),
            max(start + count for start, count in zip(starts, counts, strict=True)),
        )
        return places.to(self.device)


def _grown(size: int, needed: int) -> int:
    """The first power of two that holds `needed`, if `size` does not."""
    return size if needed <= size else 1 << (needed - 1).bit_length()
