"""What the agent remembers, in the desk's database: people read, mend and retire it, and nothing is ever deleted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from sqlalchemy import event, func, or_, select
from sqlalchemy.orm import Session

from agile.errors import AgileError
from agile.memory.encoders import Encoder
from agile.serve.agreement import normalised
from agile.serve.database import Database
from agile.serve.models import MemoryChange, MemoryEntry, Setting, User
from agile.types import MemoryItem, MemoryKind, Retrieved, Scope

_DECIMALS = 6  # as in `agile.memory.store`: beyond that, ties would hang on noise
LOOK_S = 0.2  # how often the database is asked whether another process has written
EDITABLE = ("key", "text", "answer")
REVIEW = "review"  # origin of what a person said of the agent's own answer


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to an entry: who did what, when, and the texts before and after."""

    action: str
    user: str
    at: float
    before: dict[str, str]
    after: dict[str, str]


class DeskMemory:
    """A memory whose entries can be edited and retired; what is retired is never found.

    Reads compare the query with every entry of its scope: exact, and quick enough for what people teach an agent.

    Args:
        encoder: Best a `CachedEncoder`.

    Raises:
        AgileError: The database holds vectors of another encoder.
    """

    def __init__(self, database: Database, encoder: Encoder) -> None:
        self._database, self._encoder = database, encoder
        self._lock = threading.Lock()
        self._seen = (-1, -1)  # number and newest of the changes that are in the lists below
        self._look_at = 0.0  # when others may have written something
        self._known: dict[int, tuple[MemoryItem, npt.NDArray[np.float32]]] = {}  # what can be found, by id
        self._items: list[MemoryItem] = []
        self._vectors: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._of_scope: dict[Scope, tuple[list[MemoryItem], npt.NDArray[np.float64]]] = {}
        with database.writing() as session:
            known = session.get(Setting, "encoder")
            if known is None:
                session.add(Setting(name="encoder", value=encoder.name))
            elif known.value != encoder.name:
                raise AgileError(
                    f"The desk's memory was written with the encoder {known.value!r}, not {encoder.name!r}; "
                    f"similarities between the two mean nothing. Set memory.encoder={known.value}, or give serve."
                    "database a new one."
                )

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        """Store items durably, all or none, and return their ids; the items' own are ignored."""
        if not items:
            return []
        vectors = self._vectors_of(items)
        with self._database.writing() as session:
            return self._insert(session, items, vectors)

    def write_new(self, items: Sequence[MemoryItem], session: Session) -> list[int]:
        """Store, as part of a transaction, what is not remembered already, and return the ids of all.

        Sessions that waited for one answer would each write it.
        """
        ids = []
        for item in items:
            known = select(MemoryEntry.id).where(
                MemoryEntry.kind == str(item.kind),
                MemoryEntry.group == self._storable(item.group),
                MemoryEntry.product == self._storable(item.product),
                MemoryEntry.key == self._storable(item.key),
                MemoryEntry.text == self._storable(item.text),
                ~MemoryEntry.retired,
            )
            found = session.scalar(known.limit(1))
            ids += [found] if found is not None else self._insert(session, [item], self._vectors_of([item]))
        return ids

    def _vectors_of(self, items: Sequence[MemoryItem]) -> npt.NDArray[np.float32]:
        return np.asarray(self._encoder.encode([item.key for item in items]), "<f4")

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        """At most `k` items of the scope, most similar first, ties (to six decimals) by lower id."""
        if k < 1:
            return []
        items, similarities = self._compared(query, scope)
        if k < len(items):  # sort no more than the best ones, and what is as good as the last of them
            near = np.flatnonzero(similarities >= np.partition(similarities, -k)[-k])
        else:
            near = np.arange(len(items))
        best = near[np.argsort(-similarities[near], kind="stable")][:k]
        return [Retrieved(items[i], float(similarities[i])) for i in best]

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        """How many items of the scope have at least this similarity (to six decimals)."""
        _, similarities = self._compared(query, scope)
        return int(np.count_nonzero(similarities >= threshold))

    def __len__(self) -> int:
        with self._lock:
            return len(self._current()[0])

    def _insert(self, session: Session, items: Sequence[MemoryItem], vectors: npt.NDArray[np.float32]) -> list[int]:
        rows = [
            MemoryEntry(
                kind=str(item.kind),
                key=self._storable(item.key),
                text=self._storable(item.text),
                answer=self._storable(item.answer),
                group=self._storable(item.group),
                product=self._storable(item.product),
                session_id=item.session_id,
                origin=item.origin,
                retired=False,
                vector=vector.tobytes(),
            )
            for item, vector in zip(items, vectors, strict=True)
        ]
        session.add_all(rows)
        session.flush()
        session.add_all([_change(row.id, None, "written", None, _state(row)) for row in rows])
        event.listen(session, "after_commit", self._look)
        return [row.id for row in rows]

    def _storable(self, text: str) -> str:
        """Without what the database does not hold: lone surrogates, and NUL in PostgreSQL."""
        text = text.encode("utf-8", "replace").decode()
        return text if self._database.is_sqlite else text.replace("\0", "?")

    def _compared(self, query: str, scope: Scope) -> tuple[list[MemoryItem], npt.NDArray[np.float64]]:
        items, vectors = self._covered(scope)
        if not items:
            return [], np.zeros(0)
        vector = np.asarray(self._encoder.encode([query]), np.float32)[0].astype(np.float64)
        similarities: npt.NDArray[np.float64] = (vectors @ vector).round(_DECIMALS)
        return items, similarities.clip(-1.0, 1.0)

    def _covered(self, scope: Scope) -> tuple[list[MemoryItem], npt.NDArray[np.float64]]:
        """What is remembered now of a scope."""
        with self._lock:
            items, vectors = self._current()
            found = self._of_scope.get(scope)
            if found is None:
                rows = [n for n, item in enumerate(items) if scope.covers(item)]
                found = self._of_scope[scope] = [items[n] for n in rows], vectors[rows].astype(np.float64)
            return found

    def _current(self) -> tuple[list[MemoryItem], npt.NDArray[np.float32]]:
        """What is remembered now; of what changed since the last look only that is read.

        What this process wrote is seen at once, what others wrote within `LOOK_S`.
        """
        now = time.monotonic()
        if now < self._look_at:
            return self._items, self._vectors
        self._look_at = now + LOOK_S  # before looking: what is written meanwhile takes it back
        with self._database.reading() as session:
            number, last = session.execute(select(func.count(), func.max(MemoryChange.id))).one()
            newest = (number, last or 0)
            if newest != self._seen:
                self._read(session, newest)
        return self._items, self._vectors

    def _read(self, session: Session, newest: tuple[int, int]) -> None:
        later = select(MemoryChange.entry_id).where(MemoryChange.id > self._seen[1])
        changed = session.scalars(later).all()
        entries = select(MemoryEntry)
        if self._seen[0] + len(changed) == newest[0]:
            entries = entries.where(MemoryEntry.id.in_(later))
        else:  # of concurrent writers the later was visible first: what came before is not among the changes
            self._known.clear()
        for row in session.scalars(entries):
            self._known.pop(row.id, None)
            if not row.retired:
                self._known[row.id] = _item(row), np.frombuffer(row.vector, "<f4")
        known = [self._known[i] for i in sorted(self._known)]
        self._items = [item for item, _ in known]
        self._vectors = np.stack([v for _, v in known]) if known else np.zeros((0, 0), np.float32)
        self._of_scope.clear()
        self._seen = newest

    # ---------------------------------------------------------------------------------------------------------------
    # What people do with it

    def search(self, query: str, *, limit: int = 100) -> list[tuple[MemoryItem, bool, float | None]]:
        """Entries, whether they are retired, and how similar they are to the query; without one the newest first."""
        with self._database.reading() as session:
            if not query.strip():
                newest = select(MemoryEntry).order_by(MemoryEntry.id.desc()).limit(limit)
                return [(_item(row), row.retired, None) for row in session.scalars(newest)]
            rows = session.scalars(select(MemoryEntry)).all()
        if not rows:
            return []
        vector = np.asarray(self._encoder.encode([query]), np.float32)[0]
        words = query.casefold()
        scores = [float(np.frombuffer(row.vector, "<f4") @ vector) for row in rows]
        ranks = [
            score + (words in f"{row.text} {row.product}".casefold()) for row, score in zip(rows, scores, strict=True)
        ]
        best = np.argsort([-r for r in ranks], kind="stable")[:limit]
        return [(_item(rows[i]), rows[i].retired, scores[i]) for i in best]

    def entry(self, entry_id: int) -> tuple[MemoryItem, bool, list[Change]] | None:
        """An entry, whether it is retired, and all that happened to it, the newest first."""
        with self._database.reading() as session:
            row = session.get(MemoryEntry, entry_id)
            if row is None:
                return None
            found = session.execute(
                select(MemoryChange, User.name)
                .outerjoin(User, User.id == MemoryChange.user_id)
                .where(MemoryChange.entry_id == entry_id)
                .order_by(MemoryChange.id.desc())
            )
            changes = [
                Change(c.action, name or "the agent", c.at, json.loads(c.before or "{}"), json.loads(c.after))
                for c, name in found
            ]
            return _item(row), row.retired, changes

    def edit(self, entry_id: int, user_id: int, **texts: str) -> bool:
        """Change what an entry says (any of `key`, `text`, `answer`); False if there is no such entry."""
        with self._database.writing() as session:
            row = session.get(MemoryEntry, entry_id, with_for_update=True)
            return row is not None and self._set(session, row, user_id, "edited", {**_state(row), **texts})

    def retire(self, entry_id: int, user_id: int) -> bool:
        """Keep an entry from being found."""
        with self._database.writing() as session:
            row = session.get(MemoryEntry, entry_id, with_for_update=True)
            return row is not None and self._set(session, row, user_id, "retired", {**_state(row), "retired": "yes"})

    def correct(self, session: Session, user_id: int, session_id: str, items: Sequence[MemoryItem]) -> None:
        """As part of a transaction, hold what a person said of the answer of `session_id`, and nothing that says else.

        Entries of the same words about the same product are retired, and so is what was written of an earlier review
        of that answer; both can be taken back.
        """
        kept = set(self.write_new([replace(i, session_id=session_id, origin=REVIEW) for i in items], session))
        earlier = (MemoryEntry.session_id == session_id) & (MemoryEntry.origin == REVIEW)
        same = [
            (MemoryEntry.kind == str(i.kind)) & (MemoryEntry.group == i.group) & (MemoryEntry.product == i.product)
            for i in items
            if i.kind is MemoryKind.HISTORY
        ]
        words = {normalised(i.key) for i in items}
        for row in session.scalars(select(MemoryEntry).where(or_(earlier, *same), ~MemoryEntry.retired)).all():
            of_review = row.session_id == session_id and row.origin == REVIEW
            if row.id not in kept and (of_review or normalised(row.key) in words):
                self._set(session, row, user_id, "retired", {**_state(row), "retired": "yes"})

    def undo(self, entry_id: int, user_id: int) -> bool:
        """Take the last change back, as a change of its own; False if only the writing is left."""
        with self._database.writing() as session:
            row = session.get(MemoryEntry, entry_id, with_for_update=True)
            last = session.scalars(
                select(MemoryChange).where(MemoryChange.entry_id == entry_id).order_by(MemoryChange.id.desc()).limit(1)
            ).first()
            if row is None or last is None or last.before is None:
                return False
            return self._set(session, row, user_id, "undone", json.loads(last.before))

    def _set(self, session: Session, row: MemoryEntry, user_id: int, action: str, state: dict[str, str]) -> bool:
        before = _state(row)
        if state["key"] != row.key:
            row.vector = np.asarray(self._encoder.encode([state["key"]])[0], "<f4").tobytes()
        for name in EDITABLE:
            setattr(row, name, state[name])
        row.retired = state["retired"] == "yes"
        session.add(_change(row.id, user_id, action, before, state))
        event.listen(session, "after_commit", self._look)
        return True

    def _look(self, session: Session) -> None:
        """That what is known is old."""
        self._look_at = 0.0


def _change(
    entry_id: int, user_id: int | None, action: str, before: dict[str, str] | None, after: dict[str, str]
) -> MemoryChange:
    kept = None if before is None else json.dumps(before)
    return MemoryChange(
        entry_id=entry_id, user_id=user_id, action=action, before=kept, after=json.dumps(after), at=time.time()
    )


def _state(row: MemoryEntry) -> dict[str, str]:
    return {name: getattr(row, name) for name in EDITABLE} | {"retired": "yes" if row.retired else "no"}


def _item(row: MemoryEntry) -> MemoryItem:
    kind = MemoryKind(row.kind)
    return MemoryItem(kind, row.key, row.text, row.answer, row.group, row.product, row.session_id, row.origin, row.id)
