"""Train and test of questions in one file, or in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from agile.errors import AgileError
from agile.tasks.rows import cut
from agile.types import Item, Stream

TEST_SHARE = 5


def train_and_test(
    read: Callable[[Path], tuple[Item, ...]], data: Path, test_data: Path | None, stream_length: int | None
) -> dict[str, tuple[Stream, ...]]:
    """The streams of `train` and `test`, of questions in file order; each file is read once.

    Args:
        read: Reads the questions of a file.
        test_data: The file to test on; without one the last fifth of the questions of `data`.
        stream_length: Questions of a stream; None for all in one.

    Raises:
        AgileError: A file cannot be read, or there is only one question for both.
    """
    train = read(data)
    if test_data is None:
        train, test = _held_out(train, data)
    else:
        test = train if test_data == data else read(test_data)
    return {
        name: tuple(Stream(stream_id, part) for stream_id, part in cut(name, items, stream_length))
        for name, items in (("train", train), ("test", test))
    }


def _held_out(items: Sequence[Item], path: Path) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Questions to train on, and the last fifth of them, at least one, to test on.

    Raises:
        AgileError: There is only one.
    """
    if len(items) < 2:
        raise AgileError(f"{path}: one question cannot be parted into train and test; give task.test_data=FILE.")
    start = len(items) - max(1, len(items) // TEST_SHARE)
    return tuple(items[:start]), tuple(items[start:])
