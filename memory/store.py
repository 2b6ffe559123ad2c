"""Memory in one process: SQLite is the truth, FAISS the index."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt

from agile.errors import AgileError
from agile.memory.database import database_errors, open_database, transaction, utf8
from agile.memory.encoders import Encoder, Vectors
from agile.types import MemoryItem, MemoryKind, Retrieved, Scope

_MEMORY_ID = 0x41474D31  # "AGM1"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS encoder (id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, text TEXT NOT NULL, answer TEXT NOT NULL,
    "group" TEXT NOT NULL, product TEXT NOT NULL, session_id TEXT NOT NULL, origin TEXT NOT NULL, vector BLOB NOT NULL
)"""

# Similarities are known to six decimals: beyond that float32 vectors are noise, and ties would hang on it.
_DECIMALS = 6
# More than FAISS's float32 sums (which depend on the CPU and on a row's position) and the rounding can be off.
_MARGIN = 1e-4


class SqliteMemory:
    """What the agent remembers, in one SQLite file or in RAM; safe to call from any thread.

    A write is one transaction and on disk when it returns: kill -9 loses nothing acknowledged and leaves nothing
    half-written. The file holds the vectors too, so opening it rebuilds the index and embeds nothing. Reads see what
    other processes have written to the same file.

    Args:
        encoder: Best a `CachedEncoder`: keys and queries recur.
        path: The file, created if missing; None for a private memory in RAM.

    Raises:
        AgileError: The file was written with another encoder, is no memory, or cannot be read and written.
    """

    def __init__(self, encoder: Encoder, path: Path | None = None) -> None:
        self._encoder = encoder
        self._path = path
        self._lock = threading.Lock()
        self._items: list[MemoryItem] = []  # in order of id
        self._indexes: dict[Scope, _Index] = {}
        self._unread = True  # whether the database may hold items that are not indexed
        self._db = open_database(path, "memory", _MEMORY_ID, _SCHEMA)
        with database_errors("memory", path):
            self._db.execute("INSERT OR IGNORE INTO encoder VALUES (1, ?)", (encoder.name,))
            (name,) = self._db.execute("SELECT name FROM encoder").fetchone()
        if name != encoder.name:
            self._db.close()
            raise AgileError(
                f"The memory {path} was written with the encoder {name!r}, not {encoder.name!r}; similarities between "
                f"the two mean nothing. Open it with {name!r}, or give a new path."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing can be read or written after."""
        self._db.close()

    def __len__(self) -> int:
        return len(self._caught_up())

    def items(self, scope: Scope | None = None) -> list[MemoryItem]:
        """All items (of the scope) in order of id."""
        items = self._caught_up()
        if scope is None:
            return list(items)
        return list(self._indexes[scope].items) if scope in self._indexes else []

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        """Store items durably, all or none, and return their ids, which rise from 1; the items' own are ignored."""
        if not items:
            return []
        vectors = np.asarray(self._encoder.encode([item.key for item in items]), "<f4")
        rows = [(*_row(item), vector.tobytes()) for item, vector in zip(items, vectors, strict=True)]
        with self._lock, database_errors("memory", self._path), transaction(self._db):
            (last,) = self._db.execute("SELECT coalesce(max(id), 0) FROM items").fetchone()
            ids = list(range(last + 1, last + 1 + len(rows)))
            insert = "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            self._db.executemany(insert, [(i, *row) for i, row in zip(ids, rows, strict=True)])
            self._unread = True
        return ids

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        """At most `k` items of the scope, most similar first, ties (to six decimals) by lower id."""
        self._caught_up()
        index = self._indexes.get(scope)
        if index is None or k < 1:
            return []
        vector = self._encoder.encode([query])
        with self._lock:
            return index.nearest(vector, k)

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        """How many items of the scope have at least this similarity (to six decimals)."""
        self._caught_up()
        index = self._indexes.get(scope)
        if index is None:
            return 0
        vector = self._encoder.encode([query])
        with self._lock:
            return index.count(vector, threshold)

    def _caught_up(self) -> list[MemoryItem]:
        """All items, after indexing those that the database has and the index has not: the only way into it."""
        if not self._unread:
            return self._items
        with self._lock, database_errors("memory", self._path):
            self._unread = self._path is not None  # other processes write to a file, nobody else to RAM
            last = self._items[-1].id if self._items else 0
            for row in self._db.execute("SELECT * FROM items WHERE id > ? ORDER BY id", (last,)):
                item, vector = _item(row), np.frombuffer(row[-1], "<f4")
                self._items.append(item)
                for product in (None, item.product):
                    scope = Scope(item.kind, item.group, product)
                    self._indexes.setdefault(scope, _Index()).add(item, vector)
        return self._items


class _Index:
    """The items that one scope sees and their vectors, both in order of id."""

    def __init__(self) -> None:
        self.items: list[MemoryItem] = []
        self._pending: list[npt.NDArray[np.float32]] = []  # not in FAISS yet: many scopes are written and never read
        self._flat: Any = None  # an IndexFlatIP; its stubs do not know the methods that its Python wrapper replaces

    def add(self, item: MemoryItem, vector: npt.NDArray[np.float32]) -> None:
        self.items.append(item)
        self._pending.append(vector)

    def nearest(self, query: Vectors, k: int) -> list[Retrieved]:
        """The k most similar items to the (1, dim) query, ties by lower id."""
        flat = self._faiss()
        n = len(self.items)
        k = min(k, n)
        fetch = min(n, 2 * k + 16)
        while True:
            scores, rows = flat.search(query, fetch)
            if fetch == n or scores[0, -1] < scores[0, k - 1] - _MARGIN:
                break  # whatever was not fetched is certainly less similar than the k-th
            fetch = min(n, 4 * fetch)
        rows = np.sort(rows[0])
        similarities = self._similarities(query, rows)
        best = np.argsort(-similarities, kind="stable")[:k]
        return [Retrieved(self.items[rows[i]], float(similarities[i])) for i in best]

    def count(self, query: Vectors, threshold: float) -> int:
        _, _, rows = self._faiss().range_search(query, threshold - _MARGIN)
        return int(np.count_nonzero(self._similarities(query, rows) >= threshold))

    def _similarities(self, query: Vectors, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Cosines of these rows, in float64 and then rounded: equal vectors are equally similar wherever they stand."""
        cosines = self._flat.reconstruct_batch(rows).astype(np.float64) @ query[0].astype(np.float64)
        rounded: npt.NDArray[np.float64] = cosines.round(_DECIMALS)
        return rounded.clip(-1.0, 1.0)

    def _faiss(self) -> Any:
        if self._pending:
            vectors = np.stack(self._pending)
            if self._flat is None:
                self._flat = faiss.IndexFlatIP(vectors.shape[1])
            self._flat.add(vectors)
            self._pending.clear()
        return self._flat


def _row(item: MemoryItem) -> tuple[str, ...]:
    """The columns between `id` and `vector`."""
    values = (item.kind, item.key, item.text, item.answer, item.group, item.product, item.session_id, item.origin)
    return tuple(utf8(v) for v in values)


def _item(row: tuple[Any, ...]) -> MemoryItem:
    identity, kind, key, text, answer, group, product, session_id, origin, _ = row
    return MemoryItem(MemoryKind(kind), key, text, answer, group, product, session_id, origin, identity)
