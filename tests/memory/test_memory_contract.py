"""What every Memory must do; a new one subclasses `MemoryContract` and gives the fixture `memory`."""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agile.memory.encoders import CachedEncoder, HashingEncoder
from agile.memory.store import SqliteMemory
from agile.serve.database import Database
from agile.serve.memory import DeskMemory
from agile.types import MemoryItem, MemoryKind, Scope

SCARF = Scope(MemoryKind.HISTORY, "apparel", "scarf")
APPAREL = Scope(MemoryKind.HISTORY, "apparel")
KNOWLEDGE = Scope(MemoryKind.KNOWLEDGE, "apparel")


def history(key: str, product: str = "scarf", group: str = "apparel", answer: str = "yes") -> MemoryItem:
    return MemoryItem(MemoryKind.HISTORY, key, f"Q: {key} A: {answer}", answer, group, product, "s/1", "advice")


def knowledge(key: str, group: str = "apparel") -> MemoryItem:
    return MemoryItem(MemoryKind.KNOWLEDGE, key, key, group=group, session_id="s/2", origin="reflection")


class MemoryContract:
    """Fixture `memory`: an empty memory with a hashing encoder."""

    def test_starts_empty(self, memory: SqliteMemory) -> None:
        assert len(memory) == 0
        assert memory.retrieve("anything", 3, SCARF) == []
        assert memory.count_similar("anything", -1.0, SCARF) == 0
        assert memory.write([]) == []

    def test_gives_back_every_field_and_the_id(self, memory: SqliteMemory) -> None:
        item = dataclasses.replace(history("is it 'warm'?\n\0 \N{SNOWMAN}"), id=77)
        (identity,) = memory.write([item])
        (found,) = memory.retrieve(item.key, 1, SCARF)
        assert found.item == dataclasses.replace(item, id=identity)
        assert found.similarity == 1.0 and type(found.similarity) is float

    def test_ids_rise_and_are_not_reused(self, memory: SqliteMemory) -> None:
        ids = memory.write([history("a"), history("a")]) + memory.write([knowledge("b")])
        assert ids == sorted(set(ids)) and all(type(i) is int for i in ids) and len(memory) == 3

    @pytest.mark.parametrize(
        ("scope", "keys"),
        [
            (SCARF, {"warm scarf"}),
            (APPAREL, {"warm scarf", "warm glove", "warm all"}),
            (
                Scope(MemoryKind.HISTORY, "apparel", ""),
                {"warm all"},
            ),  # the empty product is a product, None is every one
            (KNOWLEDGE, {"wool is warm"}),
            (Scope(MemoryKind.KNOWLEDGE, "apparel", ""), {"wool is warm"}),
            (Scope(MemoryKind.KNOWLEDGE, "kitchen"), {"pans get warm"}),
            (Scope(MemoryKind.HISTORY, "kitchen", "scarf"), {"warm scarf for pans"}),
            (Scope(MemoryKind.HISTORY, "garden"), set()),
            (Scope(MemoryKind.KNOWLEDGE, "apparel", "scarf"), set()),
        ],
    )
    def test_sees_its_scope_and_nothing_else(self, memory: SqliteMemory, scope: Scope, keys: set[str]) -> None:
        memory.write([history("warm scarf"), history("warm glove", "glove"), history("warm all", "")])
        memory.write([history("warm scarf for pans", group="kitchen"), knowledge("wool is warm")])
        memory.write([knowledge("pans get warm", "kitchen")])
        assert {r.item.key for r in memory.retrieve("warm", 10, scope)} == keys
        assert memory.count_similar("warm", -1.0, scope) == len(keys)

    def test_most_similar_first_and_at_most_k(self, memory: SqliteMemory) -> None:
        memory.write([history("price of postage"), history("is the scarf warm"), history("is the scarf long")])
        found = memory.retrieve("is the scarf warm", 2, SCARF)
        assert [r.item.key for r in found] == ["is the scarf warm", "is the scarf long"]
        assert 1.0 == found[0].similarity > found[1].similarity
        assert len(memory.retrieve("is the scarf warm", 99, SCARF)) == 3
        assert memory.retrieve("is the scarf warm", 0, SCARF) == []
        assert len(memory.retrieve("", 99, SCARF)) == 3

    def test_ties_go_to_the_lower_id_in_every_scope(self, memory: SqliteMemory) -> None:
        """Enough equal keys to outrun any over-fetching, with others between them."""
        ids = memory.write([history("same" if i % 3 else f"other {i}", f"p{i % 2}") for i in range(300)])
        same = [i for n, i in enumerate(ids) if n % 3]
        assert [r.item.id for r in memory.retrieve("same", 5, APPAREL)] == same[:5]
        assert [r.item.id for r in memory.retrieve("same", 200, APPAREL)] == same
        odd = [i for n, i in enumerate(ids) if n % 3 and n % 2]
        assert [r.item.id for r in memory.retrieve("same", 7, Scope(MemoryKind.HISTORY, "apparel", "p1"))] == odd[:7]

    def test_counts_at_least_the_threshold(self, memory: SqliteMemory) -> None:
        memory.write([history("is it warm"), history("is it warm"), history("is it"), history("zzz")])
        assert memory.count_similar("is it warm", 1.0, SCARF) == 2
        (third,) = (r.similarity for r in memory.retrieve("is it warm", 4, SCARF) if r.item.key == "is it")
        assert memory.count_similar("is it warm", third, SCARF) == 3
        assert memory.count_similar("is it warm", third + 1e-5, SCARF) == 2

    def test_reads_see_each_write_at_once(self, memory: SqliteMemory) -> None:
        for n in range(1, 40):
            memory.write([history(f"question {n}")])
            assert memory.retrieve(f"question {n}", 1, SCARF)[0].item.key == f"question {n}"
            assert len(memory) == memory.count_similar("x", -1.0, SCARF) == n

    def test_what_utf8_cannot_hold_is_no_reason_to_fail(self, memory: SqliteMemory) -> None:
        memory.write([history("\ud800 broken", answer="\udfff")])
        assert memory.retrieve("\ud800 broken", 1, SCARF)[0].item.answer == "?"


class TestSqliteMemory(MemoryContract):
    @pytest.fixture(params=["ram", "file", "uncached"])
    def memory(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqliteMemory]:
        encoder = HashingEncoder() if request.param == "uncached" else CachedEncoder(HashingEncoder())
        with SqliteMemory(encoder, tmp_path / "memory.db" if request.param == "file" else None) as memory:
            yield memory


class TestDeskMemory(MemoryContract):
    @pytest.fixture
    def memory(self, tmp_path: Path) -> Iterator[DeskMemory]:
        with closing(Database(f"sqlite:///{tmp_path / 'desk.sqlite'}")) as database:
            yield DeskMemory(database, CachedEncoder(HashingEncoder()))
