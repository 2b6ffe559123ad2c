"""Sessions to rows, rows to lines of tokens, and how optimizer batches are drawn and cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from agile.batching import Batch, Row, make_batch, micro_batches, minibatches, session_rows
from agile.types import Segment, SegmentEnd
from tests.doors import random_rows, segment, session

CPU = torch.device("cpu")
TERMINATED, TRUNCATED, CLEARED = SegmentEnd.TERMINATED, SegmentEnd.TRUNCATED, SegmentEnd.CONTEXT_CLEARED


def test_rows_are_the_segments_that_hold_tokens() -> None:
    played = session(
        segment([5, 6, 7, 8], [False, True, False, True], CLEARED),
        segment([9, 10], [False, False], CLEARED),
        segment([11, 12], [False, True], TERMINATED),
    )
    rows = session_rows(played)
    assert [row.token_ids.tolist() for row in rows] == [[5, 6, 7, 8], [9, 10], [11, 12]]
    assert [row.action_ids.tolist() for row in rows] == [[6, 8], [], [12]]
    assert [row.num_actions for row in rows] == [2, 0, 1]
    assert [row.logprobs.tolist() for row in rows] == [pytest.approx([-0.06, -0.08]), [], pytest.approx([-0.12])]
    assert [row.end for row in rows] == [CLEARED, CLEARED, TERMINATED]


@pytest.mark.parametrize(
    ("segments", "ends"),
    [
        ([segment([5, 6], [False, True], CLEARED), segment([], [], TRUNCATED)], [TRUNCATED]),
        ([segment([5, 6], [False, True], CLEARED), segment([7], [False], TRUNCATED)], [CLEARED, TRUNCATED]),
        ([segment([], [], TRUNCATED)], []),
    ],
)
def test_a_session_cut_off_in_an_empty_context_ended_where_the_window_before_it_did(
    segments: list[Segment], ends: list[SegmentEnd]
) -> None:
    assert [row.end for row in session_rows(session(*segments))] == ends


def row(ids: Sequence[int], *actions: int) -> Row:
    """Of these tokens, sampled at these places."""
    mask = np.isin(np.arange(len(ids)), actions)
    return Row(np.array(ids, np.int64), mask, np.zeros(int(mask.sum()), np.float32), TERMINATED)


def stand(batch: Batch, of: Tensor) -> list[int]:
    """Where in the line tokens stand that are read."""
    return batch.plan.read[of].tolist()


def keys(batch: Batch) -> list[list[int]]:
    return [places.tolist() for places in batch.plan.runs.places]


def test_batch_by_hand() -> None:
    batch = make_batch([row([5, 6, 7, 8], 1, 3), row([9, 10]), row([11, 12, 13], 1, 2)], CPU)
    assert batch.input_ids.tolist() == [9, 10, 11, 12, 13, 5, 6, 7, 8], "the shortest first"
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert keys(batch) == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
    assert stand(batch, batch.before) == [5, 7, 2, 3], "row by row as they were given"
    assert stand(batch, batch.last) == [8, 1, 4]
    assert batch.action_ids.tolist() == [6, 8, 12, 13]
    reads = batch.plan.reads
    assert batch.plan.read.tolist() == [2, 3, 4, 1, 5, 7, 8], "9 and 7 are read by nobody"
    assert [p.tolist() for p in reads.places] == [[2, 3, 4], [0, 1], [5, 6, 7, 8]]
    assert [q.tolist() for q in reads.queries] == [[0, 1, 2], [1], [0, 2, 3]]


def test_shared_batch_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agile.batching.MIN_SHARED_TOKENS", 2)
    rows = [row([1, 2, 3, 4, 5], 1, 4), row([1, 2, 3, 6], 3), row([1, 9], 1), row([1, 2, 3]), row([1, 2, 3, 4, 5], 4)]
    batch = make_batch(rows, CPU, share_prefixes=True)
    # [1 2 3] is whole, [1 9] has too little in common with it; then [4 5] and [6] with 3 keys before their own
    assert batch.input_ids.tolist() == [1, 9, 1, 2, 3, 6, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 3, 4]
    assert keys(batch) == [[0, 1], [2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 6, 7]]
    assert stand(batch, batch.before) == [2, 6, 4, 0, 6]
    assert stand(batch, batch.last) == [7, 5, 1, 4, 7]
    assert batch.action_ids.tolist() == [2, 5, 6, 9, 5]


def test_no_rows_are_a_line_of_one_token() -> None:
    batch = make_batch([], CPU, share_prefixes=True)
    assert batch.input_ids.shape == batch.position_ids.shape == (1,)
    assert len(batch.before) == len(batch.last) == len(batch.action_ids) == 0


def test_optimizer_batches_hold_every_row_with_an_action_once_an_epoch() -> None:
    rows = random_rows(21)
    rows[3:3] = rows[len(rows) :] = [row([5, 6])]

    def epoch(seed: int) -> list[list[int]]:
        return [batch.tolist() for batch in minibatches(rows, 8, np.random.default_rng(seed))]

    assert [len(batch) for batch in epoch(0)] == [8, 8, 5]
    assert sorted(i for batch in epoch(0) for i in batch) == [*range(3), *range(4, 22)]
    assert epoch(0) == epoch(0) != epoch(1)


# --------------------------------------------------------------------------------------------------------------------
# Micro-batches


@st.composite
def families(draw: st.DrawFn) -> list[Row]:
    """Rows of which some continue others, or a part of others."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 20))):
        old = rows[rng.integers(len(rows))] if rows and rng.random() < 0.7 else []
        rows.append([*old[: rng.integers(len(old) + 1)], *rng.integers(3, 9, rng.integers(1, 30)).tolist()])
    return [row(ids, len(ids) - 1) for ids in rows]


@given(families(), st.integers(1, 200), st.booleans(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_micro_batches(rows: list[Row], max_tokens: int, share: bool, num_ranks: int) -> None:
    numbers = np.random.default_rng(0).permutation(len(rows))
    ranks = micro_batches(rows, numbers, max_tokens, share_prefixes=share, num_ranks=num_ranks)
    assert sorted(i for micros in ranks for micro in micros for i in micro) == list(range(len(rows))), "each row once"
    (per_rank,) = {len(micros) for micros in ranks}
    assert len(ranks) == num_ranks, "and as many micro-batches for each rank"

    def size(micro: NDArray[np.int64]) -> int:
        return len(make_batch([rows[i] for i in micro], CPU, share_prefixes=share).input_ids) if len(micro) else 0

    sizes = np.array([[size(micro) for micro in micros] for micros in ranks])
    counts = np.array([[len(micro) for micro in micros] for micros in ranks])
    assert ((sizes <= max_tokens) | (counts == 1)).all(), "the budget is kept"
    if not share:
        total, longest = sizes.sum(), max(map(len, rows))
        assert sizes.max() <= total / sizes.size + longest
        assert (per_rank - 1) * num_ranks * max_tokens < 2 * total, "no more than twice as many as needed"
    assert sizes.sum(1).max() - sizes.sum(1).min() <= sizes.max(), "ranks differ by a micro-batch at most"
    again = micro_batches(rows, numbers[::-1], max_tokens, share_prefixes=share, num_ranks=num_ranks)
    assert [[m.tolist() for m in ms] for ms in again] == [[m.tolist() for m in ms] for ms in ranks]


def test_ranks_get_the_same_work() -> None:
    """64 rows of 40 to 90 tokens on 4 ranks, in micro-batches of 512: within 5 percent of equal."""
    rng = np.random.default_rng(0)
    rows = [row(rng.integers(3, 99, n).tolist(), 1) for n in rng.integers(40, 90, 64)]
    ranks = micro_batches(rows, np.arange(64), 512, num_ranks=4)
    loads = [sum(len(rows[i]) for micro in micros for i in micro) for micros in ranks]
    assert max(loads) < 1.05 * np.mean(loads)
    (one,) = micro_batches(rows, np.arange(64), 10**6)
    assert [len(micro) for micro in one] == [64]


def test_rows_with_a_common_prefix_lie_in_one_micro_batch() -> None:
    prompts = [[p] * 50 for p in range(8)]
    rows = [row([*prompts[i % 8], 100 + i, 7], 51) for i in range(64)]
    (micros,) = micro_batches(rows, np.arange(64), 66, share_prefixes=True)
    assert sorted(sorted(micro.tolist()) for micro in micros) == [list(range(p, 64, 8)) for p in range(8)]
