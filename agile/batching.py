"""From sessions to padded tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agile.types import Session


@dataclass(frozen=True, slots=True)
class Row:
    """One segment as the trainer sees it: arrays of shape (T,)."""

    token_ids: np.ndarray
    action_mask: np.ndarray
    logprobs: np.ndarray

    @property
    def num_actions(self) -> int:
        return int(self.action_mask.sum())

    def __len__(self) -> int:
        return len(self.token_ids)


def session_rows(session: Session) -> list[Row]:
    """The segments of a session, in order, without those that hold no sampled token."""
    rows = []
    for segment in session.segments:
        row = Row(
            np.array(segment.token_ids, dtype=np.int64),
            np.array(segment.action_mask, dtype=bool),
            np.array(segment.logprobs, dtype=np.float32),
        )
        if row.num_actions:
            rows.append(row)
    return rows


def pad(arrays: Sequence[np.ndarray], value: float = 0) -> Tensor:
    """Arrays of shape (T_i, ) as one tensor (B, max T), padded on the right."""
    out = np.full((len(arrays), max(len(a) for a in arrays)), value, dtype=arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)


def attention_mask(arrays: Sequence[np.ndarray]) -> Tensor:
    """1 where `pad` put a token, 0 where it put padding: (B, max T)."""
    return pad([np.ones(len(a), dtype=np.int64) for a in arrays])


def minibatches(
    lengths: Sequence[int], batch_size: int, micro_batch_size: int, rng: np.random.Generator
) -> Iterator[list[np.ndarray]]:
    """Shuffled optimizer batches of row numbers, each cut into micro-batches of similar length (less padding)."""
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        batch = batch[np.argsort(np.asarray(lengths)[batch], kind="stable")]
        yield [batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size)]
