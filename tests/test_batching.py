"""Sessions to rows, rows to padded tensors, and how optimizer batches are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agile.batching import make_batch, minibatches, session_rows
from agile.types import Segment, SegmentEnd
from tests.doors import random_rows, segment, session

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


def test_batch_by_hand() -> None:
    rows = session_rows(
        session(
            segment([5, 6, 7, 8], [False, True, False, True], CLEARED),
            segment([9, 10], [False, False], CLEARED),
            segment([11, 12, 13], [False, True, True], TERMINATED),
        )
    )
    batch = make_batch(rows, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.action_mask.int().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert batch.action_ids.tolist() == [6, 8, 12, 13]


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(8, 8), (8, 3), (8, 1), (100, 7), (1, 1)])
def test_every_row_with_an_action_comes_once_an_epoch(batch_size: int, micro_batch_size: int) -> None:
    rows = random_rows(21)
    idle = session_rows(session(segment([5, 6], [False, False], TRUNCATED)))
    rows[3:3] = idle
    rows.extend(idle)
    batches = list(minibatches(rows, batch_size, micro_batch_size, np.random.default_rng(0)))
    assert sorted(i for batch in batches for micro in batch for i in micro) == [*range(3), *range(4, 22)]
    for batch in batches:
        lengths = [len(rows[i]) for micro in batch for i in micro]
        assert lengths == sorted(lengths), "rows of similar length share a micro-batch"
        assert all(len(micro) == micro_batch_size for micro in batch[:-1])
        assert len(lengths) == batch_size or batch is batches[-1]


def test_an_epoch_depends_on_its_seed_and_not_on_how_batches_are_cut() -> None:
    def epoch(seed: int, micro_batch_size: int = 4) -> list[list[int]]:
        batches = minibatches(random_rows(20), 8, micro_batch_size, np.random.default_rng(seed))
        return [np.concatenate(batch).tolist() for batch in batches]

    assert epoch(0) == epoch(0) == epoch(0, 1)
    assert epoch(0) != epoch(1)
