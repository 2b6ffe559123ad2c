"""From sessions to rows, from rows to lines of tokens without padding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agile.attention import Ints, Line, Runs, arrange
from agile.types import SegmentEnd, Session

MIN_SHARED_TOKENS = 16  # fewer are cheaper to compute again than to look up


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
    """Rows as one line of T tokens without padding; N action tokens, row by row.

    Attributes:
        input_ids, position_ids: (T,).
        plan: How the tokens of the line attend, and which of them are read: those before action tokens, and the last
            ones of rows.
        before: (N,), which of those that are read stands before each action token; rows that share it name it twice.
        last: (B,), which of them is each row's last token.
        action_ids: (N,).
    """

    input_ids: Tensor
    position_ids: Tensor
    plan: Line
    before: Tensor
    last: Tensor
    action_ids: Tensor


def make_batch(rows: Sequence[Row], device: torch.device, *, share_prefixes: bool = False) -> Batch:
    """Lay rows into one line, each a run of tokens that attend to nothing else.

    With `share_prefixes` a row begins where it parts from the rows before it in sorted order: what it has in common
    with them stands in the line once, and its own tokens attend to it there. Logits, values and gradients are those of
    the rows on their own, up to the order of sums.

    No rows give a line of one token without an action: its loss is 0, and so are its gradients.
    """
    if not rows:
        rows = [Row(np.zeros(1, np.int64), np.zeros(1, bool), np.zeros(0, np.float32), SegmentEnd.TRUNCATED)]
        return replace(make_batch(rows, device), last=torch.zeros(0, dtype=torch.int64, device=device))
    order, shared = _sorted(rows, np.arange(len(rows)), share_prefixes)
    lengths = np.array([len(rows[i]) for i in order])
    line, groups = arrange(lengths - shared, lengths)
    starts = np.zeros(len(rows), np.int64)
    starts[line] = np.cumsum((lengths - shared)[line]) - (lengths - shared)[line]
    places: list[Ints] = []  # (len,) of each sorted row: where in the line its tokens stand
    for i, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        own = starts[i] + np.arange(length - common)
        places.append(np.concatenate([places[-1][:common], own]) if common else own)
    where = [places[i] for i in np.argsort(order)]  # as the rows are given
    own_tokens = [rows[order[i]].token_ids[shared[i] :] for i in line]
    positions = [np.arange(shared[i], lengths[i]) for i in line]
    before = np.concatenate([w[np.flatnonzero(row.action_mask) - 1] for w, row in zip(where, rows, strict=True)])
    last = np.array([w[-1] for w in where])
    read, reads = _reads([places[i] for i in line], positions, np.concatenate([before, last]), device)
    number = np.zeros(int((lengths - shared).sum()), np.int64)
    number[read] = np.arange(len(read))

    def tensor(array: Ints) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        tensor(np.concatenate(own_tokens)),
        tensor(np.concatenate(positions)),
        Line(Runs([places[i] for i in line], positions, groups, device), tensor(read), reads),
        tensor(number[before]),
        tensor(number[last]),
        tensor(np.concatenate([row.action_ids for row in rows])),
    )


def _reads(places: Sequence[Ints], positions: Sequence[Ints], wanted: Ints, device: torch.device) -> tuple[Ints, Runs]:
    """The tokens of the line that are wanted, each once, as they stand together in attention; and how they attend.

    Args:
        places, positions: Of the line's runs: where their keys stand, and which of those are their own tokens.
        wanted: Where these tokens stand.
    """
    is_wanted = np.zeros(sum(map(len, positions)), bool)
    is_wanted[wanted] = True
    queries = [own[is_wanted[keys[own]]] for keys, own in zip(places, positions, strict=True)]
    keys = [p[: q[-1] + 1] if len(q) else p[:0] for p, q in zip(places, queries, strict=True)]
    counts, sizes = (np.array([len(x) for x in of]) for of in (queries, keys))
    order, groups = arrange(counts, sizes)
    read = np.concatenate([keys[i][queries[i]] for i in order])
    runs = Runs([keys[i] for i in order], [queries[i] for i in order], groups, device, part=True)
    return read, runs


def minibatches(rows: Sequence[Row], batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Shuffled optimizer batches of the numbers of the rows that hold actions."""
    order = rng.permutation(np.flatnonzero([row.num_actions for row in rows]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def micro_batches(
    rows: Sequence[Row],
    numbers: NDArray[np.int64],
    max_tokens: int,
    *,
    share_prefixes: bool = False,
    num_ranks: int = 1,
) -> list[list[NDArray[np.int64]]]:
    """Cut rows into micro-batches for each rank: as few as fit, as equal in tokens as can be, as many for each rank.

    A micro-batch holds at most `max_tokens` of the line that `make_batch` makes of it; a row that is longer is alone.
    Rows of like length lie together, with `share_prefixes` those of like beginnings. Of K micro-batches none holds more
    than a K-th of all tokens and one row; two ranks differ by no more than the largest micro-batch.

    Args:
        numbers: The rows of one optimizer batch, the same on every rank.

    Returns:
        For each rank its micro-batches, the largest first, of row numbers; with more ranks than work some are empty.
    """
    order, shared = _sorted(rows, numbers, share_prefixes)
    lengths = np.array([len(rows[i]) for i in order], dtype=np.int64)

    def cut(budget: int) -> list[int]:
        """Where the micro-batches begin."""
        begins: list[int] = []
        total = budget
        for i, (length, common) in enumerate(zip(lengths.tolist(), shared.tolist(), strict=True)):
            if total + length - common > budget or not begins:
                begins.append(i)
                total = length
            else:
                total += length - common
        return begins

    per_rank = -(-len(cut(max_tokens)) // num_ranks)
    budgets = range(1, max_tokens + 1)
    found = bisect_left(budgets, True, key=lambda budget: len(cut(budget)) <= per_rank * num_ranks)
    begins = cut(budgets[min(found, max_tokens - 1)])
    parts = np.split(order, begins[1:]) if begins else []
    parts += [order[:0]] * (per_rank * num_ranks - len(parts))
    sizes = [int((lengths - shared)[i:j].sum() + shared[i]) for i, j in pairwise([*begins, len(order)])]
    sizes += [0] * (len(parts) - len(sizes))
    dealt = np.argsort(-np.array(sizes), kind="stable").reshape(per_rank, num_ranks)
    dealt[1::2] = dealt[1::2, ::-1]  # there and back, so that no rank always has the larger one
    return [[parts[i] for i in dealt[:, rank]] for rank in range(num_ranks)]


def _sorted(
    rows: Sequence[Row], numbers: NDArray[np.int64], share_prefixes: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers, those that go together side by side, and how many tokens each shares with the one before it."""
    if not share_prefixes:
        lengths = np.array([len(rows[i]) for i in numbers], dtype=np.int64)
        order = numbers[np.lexsort((numbers, lengths))]
        return order, np.zeros(len(order), dtype=np.int64)
    # big-endian bytes sort as the tokens do, a prefix before what continues it
    keys = {i: rows[i].token_ids.astype(">i8").tobytes() for i in numbers.tolist()}
    order = np.array(sorted(keys, key=lambda i: (keys[i], i)), dtype=np.int64)
    shared = np.zeros(len(order), dtype=np.int64)
    for i, (a, b) in enumerate(pairwise(order), start=1):
        n = min(len(rows[a]), len(rows[b]))
        different = np.flatnonzero(rows[a].token_ids[:n] != rows[b].token_ids[:n])
        common = int(different[0]) if different.size else n
        shared[i] = common if common >= MIN_SHARED_TOKENS else 0
    return order, shared
