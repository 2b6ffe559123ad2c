"""SQL search: right answers to honest statements, clear errors, tables in the official layout."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agile.errors import AgileError
from agile.protocols import Tool
from agile.tools.sql import MAX_RESULT_CHARS, SqlSearch, write_products
from agile.types import Item

COLUMNS = {"price": "NUMERIC(10,2)", "brand": "VARCHAR(50)"}
ROWS: list[dict[str, object]] = [
    {"asin": "B1", "title": "Pan", "price": 32.95, "brand": "Ozeri"},
    {"asin": "B2", "title": "Pot"},
]


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ('SELECT product_id FROM `pans` WHERE brand = "Lodge";', "B02 , B03"),
        ("select asin from PANS where Brand like 'LOD%' order by price desc limit 1", "B03"),
        ('SELECT product_id FROM `pans` WHERE NOT brand = "Bulk" AND price > (SELECT AVG(price) FROM pans)', "none"),
        ("SELECT product_id, price FROM pans WHERE price < 40", "B01 | 32.95 , B02 | 20"),
        ("SELECT AVG(price) FROM pans WHERE brand IN ('Ozeri', 'Lodge')", "33.3333"),
        ("SELECT count(*) FROM pans", "21"),
        ("SELECT title FROM pans WHERE id = 1", "Stone Pan"),
        ("SELECT price FROM pans WHERE asin = 'B99'", "none"),
        ("SELECT product_id, brand FROM pans WHERE price IS NULL", "B99 | none"),
        ("SELECT product_id FROM pans WHERE brand = 'with select; -- drop'", "none"),
        ("SELECT product_id FROM (SELECT * FROM pans WHERE price < 40) ORDER BY price", "B02 , B01"),
        ("SELECT product_id FROM pans WHERE price < 30 UNION SELECT asin FROM pans WHERE price < 40", "B01 , B02"),
        ("SELECT product_id /* why */ FROM pans -- because\nWHERE id = 2", "B02"),
        ("SELECT product_id FROM pans", " , ".join(f"B{i:02}" for i in range(1, 11))),  # max_rows
    ],
)
def test_rows_come_back_as_text(tool: SqlSearch, sql: str, text: str) -> None:
    result = tool.search(sql, "pans")
    assert (result.text, result.ok) == (text, True)


def test_is_a_tool(database: Path) -> None:
    tool: Tool = SqlSearch(database, name="Find", max_rows=2)
    assert tool.name == "Find"
    assert "2 rows" in tool.description
    item = Item("q", "?", None, "search", group="pans")
    assert asyncio.run(tool("SELECT product_id FROM pans", item)).text == "B01 , B02"
    assert asyncio.run(tool("SELECT colour FROM pans", item)).text == "error : no such column: colour"


@pytest.mark.parametrize("group", ["", "pots", "sqlite_master", "pans; DROP TABLE pans", 'pa"ns', "pa\0ns", "\ud800"])
def test_unknown_group_is_an_error_observation(tool: SqlSearch, group: str) -> None:
    assert not tool.search("SELECT 1", group).ok


@pytest.mark.parametrize("group", ['order "by"', "select", "größe", "a'b"])
def test_group_names_are_quoted(tmp_path: Path, group: str) -> None:
    write_products(tmp_path / "p.db", group, {"full size": "NUMERIC(10, 2)"}, [{"asin": "B1", "full size": 3}])
    result = SqlSearch(tmp_path / "p.db").search(
        'SELECT product_id FROM {} WHERE "full size" = 3'.format('"' + group.replace('"', '""') + '"'), group
    )
    assert (result.text, result.ok) == ("B1", True)


def test_long_results_are_capped(tmp_path: Path) -> None:
    write_products(tmp_path / "p.db", "g", {}, [{"asin": "B1", "title": "word " * 3000}])
    result = SqlSearch(tmp_path / "p.db").search("SELECT title FROM g", "g")
    assert result.ok and len(result.text) == MAX_RESULT_CHARS


def test_threads_share_a_tool(tool: SqlSearch) -> None:
    def ask(i: int) -> str:
        return tool.search(f"SELECT product_id FROM pans WHERE id = {i % 20 + 1}", "pans").text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(400))) == [f"B{i % 20 + 1:02}" for i in range(400)]


def test_slow_statement_holds_up_nobody(database: Path) -> None:
    tool = SqlSearch(database, timeout_s=0.5)
    item = Item("q", "?", None, "search", group="pans")

    async def race() -> bool:
        slow = asyncio.create_task(
            tool("SELECT count(*) FROM pans a, pans b, pans c, pans d, pans e, pans f, pans g", item)
        )
        await asyncio.sleep(0)  # the slow one has used up its time on the event loop
        fast = [await tool("SELECT product_id FROM pans LIMIT 1", item) for _ in range(3)]
        assert all(result.text == "B01" for result in fast)
        assert not slow.done()
        return (await slow).ok

    assert not asyncio.run(race())


def test_locked_database_is_an_error_observation(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    write_products(path, "pans", COLUMNS, ROWS)
    tool = SqlSearch(path, timeout_s=0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert tool.search("SELECT 1 FROM pans", "pans").text == "error : database is locked"
    assert tool.search("SELECT 1 FROM pans", "pans").ok


# Construction and writing


def test_bad_files_are_clear_errors(tmp_path: Path, database: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("not a database, but long enough to be looked at " * 50)
    for path, words in ((tmp_path / "no.db", "no such file"), (tmp_path, "no such file"), (text, "not a database")):
        with pytest.raises(AgileError, match=words) as caught:
            SqlSearch(path)
        assert str(path) in str(caught.value)
    assert not (tmp_path / "no.db").exists()
    for limits in ({"timeout_s": 0}, {"timeout_s": float("nan")}, {"max_rows": 0}):
        with pytest.raises(AgileError, match=r"timeout_s=.*max_rows="):
            SqlSearch(database, **limits)


def test_written_tables_have_the_official_layout(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        columns = [(name, kind) for _, name, kind, *_ in connection.execute("PRAGMA table_info(pans)")]
        rows = connection.execute("SELECT id, asin FROM pans ORDER BY id").fetchall()
    official = [("id", "INTEGER"), ("asin", "VARCHAR(32)"), ("title", "VARCHAR(200)")]
    assert columns == official + list(COLUMNS.items())
    assert rows[:3] == [(1, "B01"), (2, "B02"), (3, "B03")]


def test_writing_is_deterministic(tmp_path: Path) -> None:
    for name in ("a.db", "b.db"):
        write_products(tmp_path / name, "pans", COLUMNS, ROWS)
    assert (tmp_path / "a.db").read_bytes() == (tmp_path / "b.db").read_bytes()


@pytest.mark.parametrize(
    ("group", "columns", "rows"),
    [
        ("pans", {}, []),  # exists
        ("pots", {"price": "NUMERIC); DROP TABLE pans; --"}, []),
        ("pots", {"Title": "VARCHAR(50)"}, []),
        ("pots", {"product_id": "VARCHAR(50)"}, []),
        ("pots", {}, [{"asin": "B1"}, {"asin": "B1"}]),
        ("pots", {}, [{"asin": "B1"}, {"title": "no asin"}]),
        ("pots", {}, [{"asin": "B1", "colour": "red"}]),
        ("pots", {"size": "VARCHAR(50)"}, [{"asin": "B1", "size": object()}]),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_bad_table_is_not_written_at_all(
    database: Path, group: str, columns: dict[str, str], rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(AgileError, match=group):
        write_products(database, group, columns, rows)


def test_unwritable_path_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match="unable to open"):
        write_products(tmp_path / "missing" / "p.db", "pans", COLUMNS, ROWS)


# Real data


@pytest.mark.parametrize("group", ["all_pans", "camera_cases", "leggings", "rifle_scopes"])
def test_official_gold_sql_finds_the_gold_products(group: str) -> None:
    if "AGILE_DATA" not in os.environ:
        pytest.skip("AGILE_DATA is not set: it must name the folder that holds productqa/")
    folder = Path(os.environ["AGILE_DATA"]) / "productqa"
    tool = SqlSearch(folder / "product_qa.db")
    asked = 0
    with (folder / "test" / group / "qa.jsonl").open(encoding="utf-8") as lines:
        for qa in map(json.loads, lines):
            if qa["type"] == "search_qa":
                result = tool.search(qa["extra_data"]["sql"], group)
                gold = {product["asin"] for product in qa["short_answer"]} or {"none"}
                assert result.ok and result.text in gold, qa["id"]
                asked += 1
    assert asked > 500
