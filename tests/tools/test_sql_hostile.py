"""SQL search: hostile and broken statements are refused in time, and leave no trace on the disk."""

from __future__ import annotations

import random
import sqlite3
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agile.tools.sql import SqlSearch

CROSS_JOIN = "SELECT count(*) FROM " + ", ".join(f"pans a{i}" for i in range(8))
GROWN = "replace(replace(title, 'a', 'aaaaaaaaaa'), 'a', 'aaaaaaaaaa')"

PRAGMAS = (
    "database_list; journal_mode = WAL; journal_mode; writable_schema = ON; query_only = OFF; temp_store = 1; "
    "temp_store_directory = '/tmp'; user_version = 7; table_info(secrets); integrity_check; optimize; "
    "wal_checkpoint; foreign_keys = OFF; hard_heap_limit = 1; cache_size = 1000000; mmap_size = 1; locking_mode = "
    "EXCLUSIVE; busy_timeout = 100000; trusted_schema = ON; encoding = 'UTF-16'"
)
CALLS = (
    "load_extension('evil'); load_extension('evil', 'init'); randomblob(1000000000); zeroblob(1000000000); "
    "random(); hex(zeroblob(1000000000)); printf('%1000000000d', 1); format('%1000000000d', 1); printf('%.*c', 1e9, "
    "'x'); quote(title); char(0); unicode(title); hex(title); readfile('/etc/passwd'); writefile('x', 'y'); "
    "edit('x'); eval('DROP TABLE pans'); fts3_tokenizer('x'); sqlite_version(); sqlite_source_id(); sqlite_log(1, "
    "'x'); sqlite_compileoption_get(0); last_insert_rowid(); changes(); total_changes(); date('now'); julianday(); "
    "strftime('%s', 'now'); current_timestamp; json_group_array(title); json('[]'); likelihood(1, 0.5); soundex(1); "
    "sqlite_offset(asin); ntile(2) OVER (); title REGEXP 'a'; title MATCH 'a'; title -> 'a'; raise(ABORT, 'x')"
)
FRAGMENTS = (
    "SELECT FROM WHERE pans secrets sqlite_master ( ) ' \" ` [ ] -- /* */ ; , * = < || AND OR NOT IN LIKE UNION "
    "ALL WITH RECURSIVE AS VALUES asin product_id price 1 -1 1e999 x'00' NULL count( max( hex( GROUP BY ORDER "
    "LIMIT JOIN DROP DELETE INSERT INTO PRAGMA ATTACH CREATE TABLE OVER CASE WHEN END ?1 :a"
)

REFUSED: dict[str, list[str]] = {
    "writes": [
        form.format(table)
        for table in (
            "pans",
            "`pans`",
            "main.pans",
            "temp.pans",
            "secrets",
            "sqlite_master",
            "sqlite_sequence",
            "nothing",
        )
        for form in (
            "INSERT INTO {} (asin) VALUES ('X')",
            "INSERT OR REPLACE INTO {} (id, asin) VALUES (1, 'X')",
            "REPLACE INTO {} (asin) VALUES ('B01')",
            "INSERT INTO {} SELECT * FROM pans",
            "UPDATE {} SET price = 0",
            "UPDATE {} SET price = 0 WHERE id = 1 RETURNING *",
            "DELETE FROM {}",
            "DELETE FROM {} WHERE 1 RETURNING asin",
            "WITH x AS (SELECT 1) DELETE FROM {}",
            "TRUNCATE TABLE {}",
            "SELECT * INTO copy FROM {}",
        )
    ],
    "definitions": [
        form.format(table)
        for table in ("pans", "main.pans", "temp.pans", "secrets", "sqlite_master", "fresh")
        for form in (
            "CREATE TABLE {} (x)",
            "CREATE TABLE fresh2 AS SELECT * FROM {}",
            "CREATE TEMP TABLE {} (x)",
            "CREATE TEMP VIEW v AS SELECT * FROM {}",
            "CREATE INDEX i ON {} (asin)",
            "CREATE TRIGGER t AFTER INSERT ON {} BEGIN SELECT 1; END",
            "CREATE VIRTUAL TABLE v USING fts5({})",
            "DROP TABLE {}",
            "DROP VIEW {}",
            "DROP TABLE IF EXISTS {}",
            "ALTER TABLE {} RENAME TO gone",
            "ALTER TABLE {} ADD COLUMN x",
            "REINDEX {}",
            "ANALYZE {}",
        )
    ],
    "disguises": [
        disguise.format(sql)
        for sql in (
            "DELETE FROM pans",
            "DROP TABLE pans",
            "SELECT * FROM secrets",
            "SELECT * FROM sqlite_master",
            "VACUUM",
        )
        for disguise in (
            "/* SELECT */ {}",
            "-- SELECT\n{}",
            "/* */ /* -- */\t{} -- SELECT",
            ";{}",
            "SELECT 1;{}",
            "SELECT 1; -- \n {}",
            "SELECT '1'';'; {}",
            "SELECT asin FROM pans WHERE brand = ''; {} --'",
            "SELECT ({})",
            "SELECT asin FROM pans WHERE id IN ({})",
            "EXPLAIN {}",
            "{} UNION SELECT asin FROM pans",
        )
    ],
    "the connection": [
        "ATTACH DATABASE 'evil.db' AS evil",
        "ATTACH ':memory:' AS m",
        "ATTACH 'file:evil.db?mode=rwc' AS evil",
        "DETACH DATABASE main",
        "DETACH temp",
        "VACUUM",
        "VACUUM INTO 'copy.db'",
        "BEGIN",
        "BEGIN EXCLUSIVE",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT s",
        "RELEASE s",
        *(f"PRAGMA {pragma}" for pragma in PRAGMAS.split("; ")),
    ],
    "other tables": [
        form.format(table)
        for table in (
            "secrets",
            "main.secrets",
            "[secrets]",
            '"SECRETS"',
            "sqlite_master",
            "main.sqlite_master",
            "sqlite_temp_master",
            "sqlite_schema",
            "sqlite_sequence",
            "pragma_table_info('secrets')",
            "pragma_database_list",
            "pragma_function_list",
            "json_each('[1]')",
            "json_tree('{{}}')",
            "dbstat",
            "sqlite_dbpage",
            "generate_series(1, 9)",
            "fts5vocab",
        )
        for form in (
            "SELECT * FROM {}",
            "SELECT count(*) FROM {}",
            "SELECT 1 FROM {}",
            "SELECT asin FROM pans WHERE EXISTS (SELECT 1 FROM {})",
            "SELECT asin FROM pans UNION ALL SELECT * FROM {}",
            "SELECT (SELECT max(rowid) FROM {}) FROM pans",
            "SELECT p.asin FROM pans p LEFT JOIN {} s",
            "SELECT p.asin FROM pans p, (SELECT * FROM {}) s",
        )
    ],
    "functions": [f"SELECT {call} FROM pans" for call in CALLS.split("; ")],
    "recursion": [
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n",
        "WITH n(x) AS (VALUES(1) UNION ALL SELECT x FROM n) SELECT max(x) FROM n",
        "WITH n(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM n) SELECT length(x) FROM n",
        "SELECT * FROM (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n)",
        "SELECT (WITH n(x) AS (SELECT 1 UNION SELECT x + 1 FROM n) SELECT max(x) FROM n) FROM pans",
        # Each step doubles what the planner must copy; no deadline reaches the planner.
        *(
            "WITH c0 AS (SELECT 1)"
            + "".join(f", c{i + 1} AS (SELECT 1 FROM c{i}, c{i})" for i in range(n))
            + f" SELECT count(*) FROM c{n}"
            for n in (20, 30, 40)
        ),
    ],
    "spins": [
        CROSS_JOIN,
        CROSS_JOIN.replace("count(*)", "max(a0.price * a7.price)"),
        CROSS_JOIN.replace("count(*)", "count(DISTINCT a0.id + a3.id + a7.id)"),
        CROSS_JOIN.replace("count(*)", "a0.title || a4.title AS t") + " ORDER BY t",
        CROSS_JOIN.replace("count(*)", "1") + " WHERE a0.id + a7.id < 0",
        CROSS_JOIN.replace("count(*)", "row_number() OVER (ORDER BY a0.title)"),
        CROSS_JOIN + f" WHERE {GROWN.replace('title', 'a0.title || a7.title')} LIKE '{'%_a' * 60}b'",
        CROSS_JOIN.replace("count(*)", "a0.id") + " GROUP BY a1.title, a2.title, a3.title HAVING count(*) < 0",
    ],
    "heavy plans": [
        "SELECT count(*) FROM " + "pans NATURAL JOIN " * 40 + "pans",
        "SELECT count(*) FROM " + ", ".join(f"pans a{i}" for i in range(64)),
        "SELECT 1 FROM " + ", ".join(f"(SELECT 1 UNION ALL SELECT 2) a{i}" for i in range(20)),
        "SELECT 1 FROM " + ", ".join(f"(VALUES (1), (2)) a{i}" for i in range(60)),
        "SELECT asin FROM pans" + " UNION SELECT asin FROM pans" * 50,
        "SELECT " + "(SELECT " * 50 + "1" + ")" * 50,
        "SELECT * FROM " + "(SELECT * FROM " * 50 + "pans" + ")" * 50,
    ],
    "size": [
        "SELECT '" + "x" * 3000 + "'",
        "SELECT '" + "x" * 10_000_000 + "'",
        "SELECT " + "1, " * 600 + "1",
        "SELECT " + "1 + " * 400 + "1",
        "SELECT " + "(" * 900 + "1" + ")" * 900,
        "SELECT " + "NOT " * 400 + "1",
        "SELECT " + "CASE WHEN 1 THEN " * 90 + "1" + " END" * 90,
        "SELECT " + "abs(" * 300 + "1" + ")" * 300,
        "SELECT group_concat(a.title || b.title || c.title) FROM pans a, pans b, pans c",
        "SELECT " + "replace(" * 12 + "'aa'" + ", 'a', 'aaaa')" * 12,
        "SELECT asin FROM pans WHERE title LIKE '" + "%a" * 200 + "'",
        "SELECT coalesce(" + "NULL, " * 300 + "1)",
        " " * 100_000 + "SELECT 1",
    ],
    "broken": [
        "",
        " ",
        ";",
        "\n\t",
        "-- only a comment",
        "/* never closed",
        "SELECT",
        "SELECT FROM",
        "SELECT * FROM",
        "SELECT * FROM pans WHERE",
        "SELECT * FROM pans WHERE brand = 'Lodge",
        'SELECT * FROM pans WHERE brand = "Lodge',
        "SELECT * FROM `pans",
        "SELECT * FROM [pans",
        "SELECT ((1) FROM pans",
        "SELECT asin FROM pans LIMIT 'a'",
        "SELECT colour FROM pans",
        "SELECT asin FROM pans p, pans q",
        "SELECT max(max(price)) FROM pans",
        "SELECT asin FROM pans ORDER BY 7",
        "SELECT abs(-9223372036854775807 - 1) FROM pans",
        "SELECT sum(9223372036854775807) FROM pans",
        "SELECT ?",
        "SELECT :name, @other, $third",
        "SELECT ?999999999",
        "EXPLAIN SELECT * FROM pans",
        "EXPLAIN QUERY PLAN SELECT * FROM secrets",
        "VALUES (1)",
        "SELEC asin FROM pans",
        "Which pan is the cheapest?",
        "[SearchProduct] SELECT asin FROM pans",
        "```sql\nSELECT asin FROM pans\n```",
        "SELECT 1\0",
        "SELECT '\0' FROM pans",
        "\0",
        "SELECT '\ud800' FROM pans",
        "\udfff" * 10,
        "\uff33\uff25\uff2c\uff25\uff23\uff34 asin FROM pans",  # full-width letters
        "SELECT\u00a0asin\u00a0FROM\u00a0pans",  # no-break spaces
        "\u202eSELECT asin FROM pans WHERE \u202d",
        "SELECT CAST(x'ff' AS TEXT)",
        "🍳",
    ],
    "several statements": [
        f"SELECT asin FROM pans; {second}"
        for second in ("SELECT 1", "DROP TABLE pans", "DELETE FROM pans", "PRAGMA query_only = OFF", "ATTACH 'x' AS x")
    ],
}


def test_there_are_at_least_500_hostile_statements() -> None:
    assert len({sql for family in REFUSED.values() for sql in family}) >= 500


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("family", REFUSED)
def test_hostile_statements_are_refused(tool: SqlSearch, family: str) -> None:
    for sql in REFUSED[family]:
        started = time.thread_time()  # of the processor: a busy machine is no hang
        result = tool.search(sql, "pans")
        seconds = time.thread_time() - started
        assert not result.ok, (sql[:200], result.text)
        assert result.text.startswith("error : ") and "\n" not in result.text and len(result.text) < 300
        assert seconds < tool.timeout_s + 0.2, (sql[:200], seconds)
    assert tool.search("SELECT product_id FROM pans LIMIT 1", "pans").text == "B01"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("seed", range(4))
def test_random_statements_never_raise_nor_reach_other_tables(tool: SqlSearch, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        body = " ".join(rng.choices([*FRAGMENTS.split(), "é", "\0", "\n"], k=rng.randint(1, 15)))
        sql = rng.choice(["", "SELECT ", "SELECT asin FROM pans ", "SELECT * FROM pans WHERE "]) + body
        assert "xyzzy" not in tool.search(sql, "pans").text


@settings(max_examples=100, deadline=None)
@given(argument=st.text(st.characters(codec=None, exclude_categories=()), max_size=60), group=st.text(max_size=5))
def test_any_text_gives_a_result(tool: SqlSearch, argument: str, group: str) -> None:
    for chosen in (group, "pans"):
        assert isinstance(tool.search(argument, chosen).text, str)


@pytest.mark.usefixtures("untouched")
def test_the_connection_itself_is_read_only(tool: SqlSearch) -> None:
    """Behind scan and authorizer: even a statement that passed both could not write."""
    tool.search("SELECT 1", "pans")
    connection = tool._table("pans").connection
    connection.set_authorizer(None)
    for sql in ("DELETE FROM main.pans", "CREATE TABLE x (y)", "CREATE TEMP TABLE x (y)", "DROP VIEW temp.pans"):
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute(sql)
    tool._local.__dict__.clear()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("family", ["writes", "the connection"])
def test_the_authorizer_alone_refuses_them_too(tool: SqlSearch, family: str) -> None:
    assert tool.search("SELECT 1", "pans").ok
    for sql in REFUSED[family]:
        with pytest.raises(sqlite3.Error):
            tool._table("pans").connection.execute(sql)
