"""Train and test in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agile.errors import AgileError
from agile.types import Item

TEST_SHARE = 5


def held_out(items: Sequence[Item], path: Path) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Questions to train on, and the last fifth of them, at least one, to test on.

    Raises:
        AgileError: There is only one.
    """
    if len(items) < 2:
        raise AgileError(f"{path}: one question cannot be parted into train and test; give task.test_data=FILE.")
    start = len(items) - max(1, len(items) // TEST_SHARE)
    return tuple(items[:start]), tuple(items[start:])
