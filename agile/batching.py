"""From sessions to padded tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agile.types import SegmentEnd, Session


@dataclass(frozen=True, slots=True)
class Row:
    """One segment as the trainer sees it.

    Attributes:
        token_ids: (T,).
        action_mask: (T,), true where the LLM sampled the token.
        logprobs: (A,), rollout log-probabilities of the A action tokens; A may be 0.
        end: How it ended.
    """

    token_ids: NDArray[np.int64]
    action_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    end: SegmentEnd

    @property
    def num_actions(self) -> int:
        return len(self.logprobs)

    @property
    def action_ids(self) -> NDArray[np.int64]:
        """(A,), the ids of the action tokens."""
        return self.token_ids[self.action_mask]

    def __len__(self) -> int:
        return len(self.token_ids)


def session_rows(session: Session) -> list[Row]:
    """The segments of a session that hold tokens, in order.

    Those without an action have nothing to learn, but where a session was truncated in one, the critic is asked there.
    """
    rows: list[Row] = []
    for segment in session.segments:
        mask = np.array(segment.action_mask, dtype=bool)
        if mask.size:
            logprobs = np.array(segment.logprobs, dtype=np.float32)[mask]
            rows.append(Row(np.array(segment.token_ids, dtype=np.int64), mask, logprobs, segment.end))
        elif rows:  # nothing was shown after the clearing: the session ended where the window before it did
            rows[-1] = replace(rows[-1], end=segment.end)
    return rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors: (B, T), padded on the right, and (N,) for all their action tokens, row by row."""

    input_ids: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    action_ids: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `ActorCritic.forward` takes."""
        return self.input_ids, self.attention_mask, self.action_mask


def make_batch(rows: Sequence[Row], device: torch.device) -> Batch:
    """Pad rows into one batch."""
    shape = len(rows), max(len(r) for r in rows)
    input_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    action_mask = np.zeros(shape, bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row.token_ids
        attention_mask[i, : len(row)] = 1
        action_mask[i, : len(row)] = row.action_mask
    arrays = input_ids, attention_mask, action_mask, np.concatenate([r.action_ids for r in rows])
    return Batch(*(torch.from_numpy(a).to(device) for a in arrays))


def minibatches(
    rows: Sequence[Row], batch_size: int, micro_batch_size: int, rng: np.random.Generator
) -> Iterator[list[NDArray[np.int64]]]:
    """Shuffled optimizer batches of the numbers of the rows that hold actions.

    Each is cut into micro-batches of rows of similar length, for less padding.
    """
    lengths = np.array([len(row) for row in rows])
    order = rng.permutation(np.flatnonzero([row.num_actions for row in rows]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        batch = batch[np.argsort(lengths[batch], kind="stable")]
        yield [batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size)]
