"""Sessions on disk: one JSON object a line, appended and synced, so that a crash loses at most a torn last line."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
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
            "counterfactual": tuple(data.get("counterfactual", ())),
        }
    )


def _memory_item(data: Mapping[str, Any]) -> MemoryItem:
    return MemoryItem(**{**data, "kind": MemoryKind(data["kind"])})


def parts(value: Any) -> Any:
    """For `json.dumps`, as `default`: what `to_json` says of a dataclass or a mapping, in a fraction of its time.

    >>> json.dumps(Action("PredictAnswer", "yes"), default=parts)
    '{"name": "PredictAnswer", "argument": "yes"}'
    """
    kind: Any = type(value)
    names = _names(kind)
    return {str(k): v for k, v in value.items()} if names is None else {name: getattr(value, name) for name in names}


@cache
def _names(kind: Any) -> tuple[str, ...] | None:
    return None if issubclass(kind, Mapping) else tuple(field.name for field in fields(kind))


class JsonLines:
    """An append-only file of JSON lines, synced to disk at each `append`.

    Args:
        synced: False where a crash of the machine may take the last lines, because they are elsewhere too.
    """

    def __init__(self, path: Path, *, synced: bool = True):
        self.path, self.synced = path, synced
        self._file = path.open("ab")

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the records and return when they are on disk."""
        self.append_json([json.dumps(r, separators=(",", ":"), default=parts) for r in records])

    def append_json(self, records: Sequence[str]) -> None:
        """As `append`, of records that are JSON already."""
        self._file.write("".join(f"{record}\n" for record in records).encode())
        self._file.flush()
        if self.synced:
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
    log.append([{**tags, "session": s} for s in sessions])


def read_lines(path: Path) -> Iterator[Any]:
    """Every record of a file of JSON lines, read as asked for; a torn last line is skipped with a warning.

    Raises:
        AgileError: The file is missing, or a line before the last is not JSON.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise AgileError(f"Cannot read {path}: {error.strerror}.") from None
    with file:
        for number, line in enumerate(file, 1):
            if line == b"\n":
                continue
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    raise AgileError(
                        f"{path}, line {number}: expected a JSON object, found {line[:80]!r}. Restore or mend the file."
                    ) from None
                logger.warning("%s: the last line is torn (the run was killed while it wrote) and is skipped.", path)


# --------------------------------------------------------------------------------------------------------------------
# The sessions of a run


@dataclass(frozen=True, slots=True)
class Logged:
    """A session and where a run logged it.

    Attributes:
        path: The log.
        agent: Who played the test; empty for sessions of training.
        step: The iteration of training, from 1; None for tests.
    """

    session: Session
    path: Path
    agent: str = ""
    step: int | None = None

    @property
    def place(self) -> str:
        return f"test of {self.agent}" if self.step is None else f"step {self.step}"

    def __str__(self) -> str:
        return f"{self.session.id} ({self.place}, {self.path.name})"


def session_logs(run: Path) -> list[Path]:
    """The logs of a run or a bench: those of training, then those of tests.

    Raises:
        AgileError: There are none.
    """
    found = [path for pattern in ("sessions-*.jsonl", "test-*.jsonl") for path in sorted(run.glob(pattern))]
    if not found:
        raise AgileError(
            f"{run} holds no sessions ({'no sessions-*.jsonl or test-*.jsonl' if run.is_dir() else 'no such folder'}). "
            "Name a folder that `agile demo`, `agile train` or `agile bench` wrote."
        )
    return found


def logged_sessions(run: Path, session_id: str | None = None, step: int | None = None) -> Iterator[Logged]:
    """The sessions of a run in the order of its logs, read as asked for.

    Args:
        session_id: Only sessions of this id; each iteration that played its stream has one.
        step: Only sessions of this iteration of training.

    Raises:
        AgileError: There are no logs, no such session, or a record that is no session of this version.
    """
    ids: dict[str, set[int]] = {}
    any_found = False
    for path in session_logs(run):
        for number, record in enumerate(read_lines(path), 1):
            try:
                name, at = record["session"]["id"], record.get("step")
                wanted = session_id in (None, name) and step in (None, at)
                logged = (
                    Logged(session_from_json(record["session"]), path, record.get("agent", ""), at) if wanted else None
                )
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise AgileError(
                    f"{path}, record {number}: expected a session as this version logs it ({error!r}). Use the version "
                    "that wrote it, or play it again."
                ) from None
            if logged is not None:
                any_found = True
                yield logged
            elif not any_found:
                ids.setdefault(name, set()).update(() if at is None else (at,))
    if not any_found and (session_id is not None or step is not None):
        raise _unknown(run, ids, session_id, step)


def last_step(run: Path) -> int | None:
    """The newest iteration of training that a run logged; None if its logs are of tests alone.

    Raises:
        AgileError: There are no logs.
    """
    steps = []
    for path in session_logs(run):
        with path.open("rb") as file:
            whole = deque((line for line in file if line.endswith(b"\n")), 1)
        steps += [json.loads(line).get("step") for line in whole]
    return max((step for step in steps if step is not None), default=None)


def _unknown(run: Path, ids: Mapping[str, set[int]], session_id: str | None, step: int | None) -> AgileError:
    if session_id is not None and session_id not in ids:
        near = difflib.get_close_matches(session_id, ids, 1, cutoff=0) or ["none"]
        return AgileError(f"{run} has no session {session_id!r}; the nearest of its {len(ids):,} ids is {near[0]!r}.")
    steps = sorted(ids[session_id] if session_id is not None else set().union(*ids.values()))
    whose = f"session {session_id}" if session_id is not None else str(run)
    if not steps:
        return AgileError(f"{whose} has no step {step}: it was played in tests alone. Leave --step out.")
    named = ", ".join(map(str, steps[:8])) + ", ..." * (len(steps) > 8)
    return AgileError(f"{whose} has no step {step}; it has {named}.")
