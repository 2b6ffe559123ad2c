"""Several rollouts of one stream: copies that have its questions, and ids, seeds and memories of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from agile.errors import AgileError
from agile.types import Stream

_COPY = re.compile(r"#\d+$")


def copies(streams: Sequence[Stream], num: int) -> list[Stream]:
    """Each stream `num` times, side by side; with more than one they are named `<id>#0`, `<id>#1`, ...

    Raises:
        AgileError: A stream is named like a copy.
    """
    if num == 1:
        return list(streams)
    if named := next((stream.id for stream in streams if _COPY.search(stream.id)), None):
        raise AgileError(
            f"The stream {named!r} is named like a copy, and ppo.rollouts_per_stream is {num}. Rename the stream so "
            "that it does not end in # and a number."
        )
    return [replace(stream, id=f"{stream.id}#{i}") for stream in streams for i in range(num)]


def original_id(stream_id: str) -> str:
    """The id of the stream that this one is a copy of; its own if it is none."""
    return _COPY.sub("", stream_id)
