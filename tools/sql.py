"""SQL search over a product table, for SQL that a language model wrote.

The statement is hostile until proven otherwise. What stands between it and the file, outermost first: a scan of its
words (one plain SELECT, few uses of the table), SQLite's own limits, an authorizer that admits one table and a few
functions, a read-only connection, a deadline, a row limit, and a cap on the text that comes back.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agile.errors import AgileError
from agile.types import Item, Observation, ToolResult

# Deterministic ones; what they can return is bounded by the longest value that LIMITS admits.
FUNCTIONS = frozenset(
    {"abs", "avg", "coalesce", "count", "dense_rank", "glob", "group_concat", "ifnull", "iif", "instr", "length"}
    | {"like", "lower", "ltrim", "max", "min", "nullif", "rank", "replace", "round", "row_number", "rtrim", "substr"}
    | {"substring", "sum", "total", "trim", "typeof", "upper"}
)

MAX_SQL_BYTES = 2000  # the longest gold statement of ProductQA has 213
LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_SQL_BYTES,
    sqlite3.SQLITE_LIMIT_LENGTH: 20_000,  # bytes of a value; no deadline cuts short a function call, one opcode
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 4,
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 25_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
}
MAX_USES = 8  # of the table, and of SELECT: the planner runs outside the deadline, and its time grows with both
MAX_RESULT_CHARS = 2000
INLINE_S = 0.01
PROGRESS_OPCODES = 200  # between two looks at the clock: microseconds, or a dozen slow function calls

_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)""", re.DOTALL)
_SQL_TYPE = re.compile(r"[A-Za-z]+( ?\(\d+(, ?\d+)?\))?")
_RESERVED = frozenset({"id", "asin", "title", "product_id"})


ALIAS = "products"  # every group's table goes by this name too, so that a prompt need not hold its own


class QueryError(Exception):
    """A statement was refused or failed; the message is one line for the LLM."""


class QueryTimeout(QueryError):
    """A statement ran longer than it may."""


@dataclass(slots=True)
class _Table:
    """An open connection that sees one table; `deadline` is in seconds of `time.thread_time`."""

    connection: sqlite3.Connection
    deadline: float = 0.0

    def late(self) -> bool:
        return time.thread_time() > self.deadline


class SqlSearch:
    """A tool that answers SQL about the table of the item's group in an official ProductQA database.

    The column `product_id` of the official gold SQL, which the file lacks, is `asin`. Rows come back as `a , b , c`,
    those of several columns as `a | x , b | y`, no rows (or a lone NULL) as `none`, a failure as `error : ...` with
    `ok` False: separators stand between spaces, so splitting at white space isolates the ids. Threads may share it.

    Args:
        database: SQLite file with one table per group; opened read-only.
        name: The action that calls this tool.
        timeout_s: Seconds of the processor that one statement may take; a busy machine cuts no honest one short.
        max_rows: Further rows are left out.
        key: The column of names that every table has.

    Raises:
        AgileError: The file is missing or no SQLite database, or a limit is not positive.
    """

    def __init__(
        self,
        database: Path,
        *,
        name: str = "SearchProduct",
        timeout_s: float = 1.0,
        max_rows: int = 10,
        key: str = "asin",
    ) -> None:
        if not timeout_s > 0 or max_rows < 1:
            raise AgileError(
                f"SqlSearch: timeout_s={timeout_s} and max_rows={max_rows}, expected a positive time and at least one "
                "row; raise them."
            )
        if not database.is_file():
            raise AgileError(
                f"{database}: no such file; SqlSearch expected a SQLite database with one table per product group "
                "(ProductQA: product_qa.db). Check the path."
            )
        self.database = database
        self.name = name
        self.timeout_s = timeout_s
        self.max_rows = max_rows
        self.key = key
        self.description = f"Run one SQL SELECT on the table of this product group; at most {max_rows} rows come back."
        self._local = threading.local()  # a connection serves one thread, so no caller waits for another's slow query
        try:
            with closing(self._connect()) as connection:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        except sqlite3.Error as error:
            raise AgileError(
                f"{database}: cannot be read as a SQLite database ({error}); get it again or check its permissions."
            ) from error

    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        """Run `argument` on the table `item.group`; never raises for a bad statement."""
        # Nearly every statement takes microseconds, less than handing it to a thread. The rare slow one starts again
        # in a thread, where it holds up no other session.
        try:
            return ToolResult(_text(self.rows(argument, item.group, min(INLINE_S, self.timeout_s))))
        except QueryTimeout:
            return await asyncio.to_thread(self.search, argument, item.group)
        except QueryError as error:
            return ToolResult(f"error : {error}", ok=False)

    def search(self, argument: str, group: str) -> ToolResult:
        """Run `argument` on the table `group`; never raises for a bad statement."""
        try:
            return ToolResult(_text(self.rows(argument, group)))
        except QueryError as error:
            return ToolResult(f"error : {error}", ok=False)

    def rows(self, sql: str, group: str, timeout_s: float | None = None) -> list[tuple[Any, ...]]:
        """The first `max_rows` rows of one SELECT on the table `group`, within `timeout_s` (default: the tool's).

        Raises:
            QueryError: The statement is not admitted or not valid, or there is no such table.
            QueryTimeout: It ran too long.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        _check(sql, group)
        try:
            table = self._table(group)
            table.deadline = time.thread_time() + timeout_s
            with closing(table.connection.execute(sql)) as cursor:
                return cursor.fetchmany(self.max_rows)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            # ValueError: lone surrogates; Warning: several statements (Python 3.11).
            message = " ".join(str(error).split())[:200] or type(error).__name__
            if message == "interrupted":
                raise QueryTimeout(f"the query ran longer than {timeout_s:g} s") from error
            raise QueryError(message) from error

    def columns(self, group: str) -> tuple[str, ...]:
        """The columns of the group's table that describe products; none if there is no such table."""
        with closing(self._connect()) as connection:
            names = connection.execute("SELECT name FROM pragma_table_info(?, 'main')", (group,)).fetchall()
        return tuple(name for (name,) in names if name not in ("id", "asin", "title"))

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self.database.resolve().as_uri()}?mode=ro"
        # A writer of the file may hold a lock: wait no longer than a statement may run.
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=self.timeout_s, check_same_thread=False)

    def _table(self, group: str) -> _Table:
        tables: dict[str, _Table] = self._local.__dict__
        if group not in tables:
            tables[group] = self._open(group)
        return tables[group]

    def _open(self, group: str) -> _Table:
        connection = self._connect()
        try:
            columns = connection.execute("SELECT name FROM pragma_table_info(?, 'main')", (group,)).fetchall()
            if (self.key,) not in columns:
                raise QueryError("there is no table of products for this group")
            # Sorting must not write temporary files. First, for changing the store drops what is in it.
            connection.execute("PRAGMA temp_store = MEMORY")
            # A temporary view shadows the table of its name.
            name, extra = _quote(group), "" if ("product_id",) in columns else f", {_quote(self.key)} AS product_id"
            connection.execute(f"CREATE TEMP VIEW {name} AS SELECT *{extra} FROM main.{name}")
            if group.lower() != ALIAS:
                connection.execute(f"CREATE TEMP VIEW {ALIAS} AS SELECT * FROM temp.{name}")
            connection.execute(f"SELECT * FROM {name} LIMIT 0")  # reads the schema, which the limits would hinder
            connection.execute("PRAGMA query_only = ON")
            for category, limit in LIMITS.items():
                connection.setlimit(category, limit)
            table = _Table(connection)
            connection.set_progress_handler(table.late, PROGRESS_OPCODES)
            connection.set_authorizer(_authorizer(group))
            return table
        except BaseException:
            connection.close()
            raise


def _check(sql: str, group: str) -> None:
    """Refuse by its words what neither authorizer nor deadline sees: EXPLAIN, and statements that take long to plan.

    Common table expressions are among them: twenty that each join the one before twice make the planner copy a million.

    Raises:
        QueryError: The statement is not admitted.
    """
    if len(sql) > MAX_SQL_BYTES:  # before anything looks at all of it
        raise QueryError(f"the statement is longer than {MAX_SQL_BYTES} characters")
    words = re.findall(r"\w+", _QUOTED.sub(" ", sql).lower())
    if not words or words[0] != "select":
        raise QueryError("expected a SELECT statement")
    if "with" in words:
        raise QueryError("WITH is not admitted")
    uses = len(re.findall(rf"\b{re.escape(group.lower())}\b", sql.lower()))
    if max(uses, words.count("select") + words.count("values")) > MAX_USES:
        raise QueryError(f"more than {MAX_USES} uses of the table or of SELECT")


def _authorizer(group: str) -> Any:
    """SQLite's callback at each step of compiling: SELECT, reads of the group's table, and harmless functions."""
    tables = {group.lower(), ALIAS}

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        admitted = (
            action == sqlite3.SQLITE_SELECT
            or (action == sqlite3.SQLITE_READ and first is not None and first.lower() in tables)
            or (action == sqlite3.SQLITE_FUNCTION and second is not None and second.lower() in FUNCTIONS)
        )
        return sqlite3.SQLITE_OK if admitted else sqlite3.SQLITE_DENY

    return authorize


def _text(rows: list[tuple[Any, ...]]) -> str:
    if not rows or rows == [(None,)]:
        return "none"
    return " , ".join(" | ".join(map(_value, row)) for row in rows)[:MAX_RESULT_CHARS]


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):  # prices and means: 32.95, 33.3333, 400
        return f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, bytes):
        return value.hex()
    return " ".join(str(value).split())


def _quote(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def write_products(
    database: Path, group: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Add the table `group` to a product database in the official ProductQA layout; all of it or nothing.

    Args:
        database: Made if missing.
        group: Name of the new table.
        columns: SQL type of each column beside `id`, `asin` and `title`, as in `{"price": "NUMERIC(10,2)"}`.
        rows: One product each, `asin` in all of them; a column that a row lacks is NULL.

    Raises:
        AgileError: A name, type or row does not fit, the table exists already, or the file cannot be written.
    """
    for name, kind in columns.items():
        if name.lower() in _RESERVED or not _SQL_TYPE.fullmatch(kind):
            raise AgileError(
                f"{database}: table {group!r}: column {name!r} {kind!r}; expected a name other than "
                f"{', '.join(sorted(_RESERVED))} and a type such as VARCHAR(50) or NUMERIC(10,2)."
            )
    declared = "".join(f",\n    {_quote(name)} {kind}" for name, kind in columns.items())
    create = (
        f"CREATE TABLE {_quote(group)} (\n    id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,\n"
        f"    asin VARCHAR(32) NOT NULL UNIQUE,\n    title VARCHAR(200){declared}\n)"
    )
    names = ("asin", "title", *columns)
    insert = f"INSERT INTO {_quote(group)} ({', '.join(map(_quote, names))}) VALUES ({', '.join('?' * len(names))})"
    try:
        with closing(sqlite3.connect(database, isolation_level=None)) as connection, connection:
            connection.execute("BEGIN")
            connection.execute(create)
            for row in rows:
                if unknown := row.keys() - set(names):
                    raise AgileError(
                        f"{database}: table {group!r}: a row has {sorted(unknown)}, expected only {list(names)}; "
                        "add the column or drop the value."
                    )
                connection.execute(insert, [row.get(name) for name in names])
    except sqlite3.Error as error:
        raise AgileError(
            f"{database}: table {group!r} could not be written ({error}); expected a writable database without that "
            "table, and rows with unique asin."
        ) from error
