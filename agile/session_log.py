"""Sessions on disk: one JSON object a line, appended and synced, so that a crash loses at most a torn last line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agile.errors import AgileError
from agile.types import (
    Action,
    Advice,
    AdviceStatus,
    MemoryItem,
    MemoryKind,
    MemoryRead,
    Observation,
    Retrieved,
    Reward,
    Segment,
    SegmentEnd,
    Session,
    SessionStatus,
    Source,
    Span,
    Usage,
    to_json,
)

logger = logging.getLogger(__name__)


def session_from_json(data: Mapping[str, Any]) -> Session:
    """The inverse of `agile.types.to_json` for a session."""
    spans = [
        (
            SegmentEnd(segment["end"]),
            tuple(
                Span(Source(s["source"]), tuple(s["token_ids"]), tuple(s["logprobs"]), s["policy_version"])
                for s in segment["spans"]
            ),
        )
        for segment in data["segments"]
    ]
    advice = data["advice"]
    return Session(
        **{
            **data,
            "segments": tuple(Segment(s, end) for end, s in spans),
            "steps": tuple(
                Observation(Action(**s["action"]), Source(s["source"]), s["text"], s["ok"]) for s in data["steps"]
            ),
            "retrieved": tuple((int(i), float(similarity)) for i, similarity in data["retrieved"]),
            "written": tuple(data["written"]),
            "advice": None if advice is None else Advice(**{**advice, "status": AdviceStatus(advice["status"])}),
            "status": SessionStatus(data["status"]),
            "reward": None if data["reward"] is None else Reward(data["reward"]["components"]),
            "reads": tuple(
                MemoryRead(tuple(Retrieved(_memory_item(e["item"]), e["similarity"]) for e in r["entries"]), r["count"])
                for r in data["reads"]
            ),
            "usage": Usage(**data["usage"]),
        }
    )


def _memory_item(data: Mapping[str, Any]) -> MemoryItem:
    return MemoryItem(**{**data, "kind": MemoryKind(data["kind"])})


class JsonLines:
    """An append-only file of JSON lines, synced to disk at each `append`."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("ab")

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the records and return when they are on disk."""
        self._file.write(b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, size: int) -> None:
        """Drop what was written after a checkpoint that noted this `size`."""
        self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


def append_sessions(log: JsonLines, sessions: Sequence[Session], **tags: Any) -> None:
    """Write sessions, each with `tags` (such as the iteration that played it)."""
    log.append([{**tags, "session": to_json(s)} for s in sessions])


def read_lines(path: Path) -> Iterator[Any]:
    """Every record of a file of JSON lines; a torn last line is skipped with a warning.

    Raises:
        AgileError: The file is missing, or a line before the last is not JSON.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise AgileError(f"Cannot read {path}: {error.strerror}.") from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise AgileError(f"{path}, line {number}: expected a JSON object, found {line[:80]!r}.") from None
            logger.warning("%s: the last line is torn (the run was killed while it wrote) and is skipped.", path)
