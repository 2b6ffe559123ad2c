"""SqliteMemory beyond the contract: exact against brute force, rebuilt from the file, safe after kill -9."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agile.errors import AgileError
from agile.memory.encoders import CachedEncoder, HashingEncoder, Vectors
from agile.memory.store import SqliteMemory
from agile.types import MemoryItem, MemoryKind, Scope

ENCODER = CachedEncoder(HashingEncoder(24))  # few dimensions: many near and exact ties
WORDS = st.lists(st.sampled_from(["is", "it", "warm", "red", "big"]), max_size=3).map(" ".join)
ITEMS = st.builds(
    MemoryItem,
    kind=st.sampled_from(MemoryKind),
    key=WORDS,
    text=st.text(max_size=5),
    group=st.sampled_from("AB"),
    product=st.sampled_from(["", "p", "q"]),
)
SCOPES = st.builds(Scope, st.sampled_from(MemoryKind), st.sampled_from("AB"), st.sampled_from([None, "", "p", "q"]))


def item(key: str, product: str = "p") -> MemoryItem:
    return MemoryItem(MemoryKind.HISTORY, key, key.upper(), "yes", "A", product, "s/0", "advice")


def in_scope(entry: MemoryItem, scope: Scope) -> bool:
    same_product = scope.product is None or entry.product == scope.product
    return entry.kind == scope.kind and entry.group == scope.group and same_product


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(ITEMS, max_size=40), max_size=3), WORDS, st.integers(0, 50), SCOPES, st.floats(-1, 1))
def test_equals_brute_force(batches: Any, query: str, k: int, scope: Scope, threshold: float) -> None:
    written = []
    with SqliteMemory(ENCODER) as memory:
        for batch in batches:
            written += list(zip(memory.write(batch), batch, strict=True))
            assert len(memory) == len(written)
        q = HashingEncoder(24).encode([query])[0].astype(np.float64)
        cosines = [
            (i, round(float(HashingEncoder(24).encode([entry.key])[0].astype(np.float64) @ q), 6))
            for i, entry in written
            if in_scope(entry, scope)
        ]
        expected = sorted(cosines, key=lambda pair: (-pair[1], pair[0]))[:k]
        assert [(r.item.id, r.similarity) for r in memory.retrieve(query, k, scope)] == expected
        assert memory.count_similar(query, threshold, scope) == sum(c >= threshold for _, c in cosines)
        assert [m.id for m in memory.items(scope)] == [i for i, _ in cosines]
        assert [m.id for m in memory.items()] == [i for i, _ in written]


def test_vectors_equal_up_to_float_noise_are_ties() -> None:
    """Encoders of real models differ in the last bits between batches; the lower id must win nonetheless."""

    class Noisy(HashingEncoder):
        noise = np.random.default_rng(0)

        def encode(self, texts: Sequence[str]) -> Vectors:
            vectors = super().encode(texts)
            return (vectors + self.noise.normal(0, 5e-8, vectors.shape)).astype(np.float32)

    memory = SqliteMemory(Noisy())
    memory.write([item("the same question") for _ in range(200)])
    assert [r.item.id for r in memory.retrieve("the same question", 5, Scope(MemoryKind.HISTORY, "A"))] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_reopening_rebuilds_the_index_without_embedding_anything(tmp_path: Path) -> None:
    class Counting(HashingEncoder):
        embedded = 0

        def encode(self, texts: Sequence[str]) -> Vectors:
            self.embedded += len(texts)
            return super().encode(texts)

    path, scope = tmp_path / "run" / "memory.db", Scope(MemoryKind.HISTORY, "A")
    with SqliteMemory(HashingEncoder(), path) as memory:
        memory.write([item(f"question {i}", f"p{i % 7}") for i in range(500)])
        before = memory.retrieve("question 17", 20, scope), memory.items()
    encoder = Counting()
    with SqliteMemory(encoder, path) as memory:
        assert (memory.retrieve("question 17", 20, scope), memory.items()) == before
        assert encoder.embedded == 1  # the query
        assert memory.write([item("one more")]) == [501]
    with pytest.raises(sqlite3.ProgrammingError):
        len(memory)
    memory.close()


def test_two_open_memories_of_one_file_see_each_other(tmp_path: Path) -> None:
    scope = Scope(MemoryKind.HISTORY, "A")
    with SqliteMemory(ENCODER, tmp_path / "m.db") as one, SqliteMemory(ENCODER, tmp_path / "m.db") as two:
        assert one.write([item("a")]) + two.write([item("b")]) + one.write([item("c")]) == [1, 2, 3]
        assert [m.key for m in one.items()] == [m.key for m in two.items()] == ["a", "b", "c"]
        assert one.retrieve("b", 3, scope) == two.retrieve("b", 3, scope)


def test_threads_share_a_memory(tmp_path: Path) -> None:
    memory, scope, failures = SqliteMemory(ENCODER, tmp_path / "m.db"), Scope(MemoryKind.HISTORY, "A"), []

    def work(name: str) -> None:
        try:
            for i in range(20):
                (identity,) = memory.write([item(f"{name} {i}")])
                assert identity in {r.item.id for r in memory.retrieve(f"{name} {i}", 1000, scope)}
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and [m.id for m in memory.items()] == list(range(1, 81))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with SqliteMemory(ENCODER, tmp_path / "m.db") as memory:
        memory.write([item("a")])
        memory._db.execute("PRAGMA max_page_count = 1")  # a full disk, as SQLite reports it
        with pytest.raises(AgileError, match="full"):
            memory.write([item(f"{i} " * 200) for i in range(500)])
        assert [m.key for m in memory.items()] == ["a"]
        memory._db.execute("PRAGMA max_page_count = 1000000")
        assert memory.write([item("b")]) == [2]


_WRITER = """
import sys
from pathlib import Path
from agile.memory.encoders import HashingEncoder
from agile.memory.store import SqliteMemory
from agile.types import MemoryItem, MemoryKind
memory = SqliteMemory(HashingEncoder(), Path(sys.argv[1]))
while True:
    n = len(memory)
    items = [MemoryItem(MemoryKind.HISTORY, f"question {n + i}", "text " * 200, group="A") for i in range(10)]
    print(*memory.write(items), flush=True)
"""


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """The writer is killed in the middle of its work, again and again, on the same file."""
    path = tmp_path / "memory.db"
    acknowledged: list[int] = []
    for lines in (1, 7, 25):
        with subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(lines):
                acknowledged += map(int, writer.stdout.readline().split())
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.stdout.read()
            acknowledged += [
                int(i) for line in rest.splitlines(keepends=True) if line.endswith("\n") for i in line.split()
            ]
        assert writer.returncode == -signal.SIGKILL
        with SqliteMemory(HashingEncoder(), path) as memory:
            stored = [m.id for m in memory.items()]
            assert stored[: len(acknowledged)] == acknowledged
            assert len(stored) - len(acknowledged) in (0, 10)  # at most the one write whose answer was on its way
            acknowledged = stored
            (found,) = memory.retrieve(f"question {len(stored) - 1}", 1, Scope(MemoryKind.HISTORY, "A"))
            assert found.item.id == stored[-1] and found.similarity == 1.0
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def _cache(path: Path) -> None:
    CachedEncoder(HashingEncoder(), path).close()


def _other_encoder(path: Path) -> None:
    SqliteMemory(HashingEncoder(8), path).close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_other_encoder, "'hashing-8', not 'hashing-24'"),
        (_cache, "not a memory"),
        (lambda path: path.write_bytes(b"\x00garbage" * 512), "not a database"),
        (Path.mkdir, "unable to open"),
    ],
)
def test_refuses_what_is_no_memory_of_this_encoder(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "m.db")
    with pytest.raises(AgileError, match=says):
        SqliteMemory(ENCODER, tmp_path / "m.db")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AgileError, match="file"):
        SqliteMemory(ENCODER, tmp_path / "file" / "m.db")
