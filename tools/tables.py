"""A user's table as SQLite: CSV, JSON, Parquet, or a table of a database that is there."""

from __future__ import annotations

import sqlite3
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agile.errors import AgileError

FILES = ".csv, .tsv, .json, .jsonl, .parquet, or a SQLite database (.db, .sqlite, .sqlite3)"
MAX_ROW_BYTES = 1_000_000  # no row is that long: a file whose lines were lost, or one of another kind
_TEXT = (".csv", ".tsv", ".json", ".jsonl")
_SQLITE = (".db", ".sqlite", ".sqlite3")
_TABLE = "products"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of named rows.

    Attributes:
        database: The SQLite file that holds it.
        name: Of the table there.
        columns: Their names; the first one holds the names of the rows.
        rows: Each row by its name: the text of its columns, without those that are empty.
        folder: What `database` lies in if it was made here: it is there as long as this is.
    """

    database: Path
    name: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, str]]
    folder: TemporaryDirectory[str] | None = None


def open_table(path: Path) -> Table:
    """Read a table file; one that is no database, or a view, is copied into a database in a temporary folder.

    Raises:
        AgileError: The file is missing, of another kind or cannot be read; a database has several tables; a row is
            longer than `MAX_ROW_BYTES` or not in UTF-8, or its name is missing or stands twice.
    """
    if not path.is_file():
        raise AgileError(f"{path}: no such file; task.database takes a table, {FILES}.")
    if path.suffix.lower() in _SQLITE:
        name, is_view, columns, values = _read_database(path)
        if not is_view:  # the search tool admits one table and nothing that a view reads
            return Table(path, name, columns, _by_name(path, columns, values))
    else:
        columns, values = _read_file(path)
    folder = TemporaryDirectory(prefix="agile-table-")
    database = Path(folder.name) / "table.sqlite"
    quoted = ['"' + name.replace('"', '""') + '"' for name in columns]
    rows = _by_name(path, columns, values)
    try:
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute(f"CREATE TABLE {_TABLE} ({', '.join(quoted)})")
            places = ", ".join("?" * len(columns))
            connection.executemany(f"INSERT INTO {_TABLE} VALUES ({places})", values)
    except sqlite3.Error as error:
        raise AgileError(
            f"{path}: cannot be made a table ({error}). Expected column names that differ in more than letter case, "
            "and one text, number or nothing in each cell, no lists or objects."
        ) from None
    return Table(database, _TABLE, columns, rows, folder)


def _read_file(path: Path) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns, and the cells of every row as SQLite takes them."""
    import pandas  # takes a second

    if path.suffix.lower() in _TEXT:
        _check_utf8(path)
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv" as kind:
                with warnings.catch_warnings():  # pandas drops what a row has beyond the columns, and warns of it
                    warnings.simplefilter("error", pandas.errors.ParserWarning)
                    frame = pandas.read_csv(path, sep="," if kind == ".csv" else "\t", index_col=False)
            case ".json" | ".jsonl":
                frame = pandas.read_json(path, lines=path.suffix.lower() == ".jsonl", dtype=False)
            case ".parquet":
                frame = pandas.read_parquet(path)
            case other:
                raise AgileError(f"{path}: a table of the kind {other or 'without a name'!r}; expected {FILES}.")
    except pandas.errors.ParserWarning:
        raise AgileError(f"{path}: cannot be read as a table (a row has more cells than there are columns).") from None
    except (ValueError, OSError, ImportError) as error:  # pandas' own errors are ValueErrors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise AgileError(f"{path}: cannot be read as a table ({reason}). Expected {FILES}, in UTF-8.") from None
    columns = tuple(str(name) for name in frame.columns)
    if not columns or not len(frame):
        raise AgileError(f"{path}: expected a table with at least one column and one row, found an empty one.")
    plain = frame.astype(object).where(frame.notna(), None)
    return columns, [tuple(_cell(value) for value in row) for row in plain.itertuples(index=False, name=None)]


def _check_utf8(path: Path) -> None:
    """Names the first line that is not UTF-8, which pandas does not."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AgileError(f"{path}: cannot be read ({error.strerror}); expected a readable file.") from None
    for number, line in enumerate(data.splitlines(), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            found = line[max(0, error.start - 20) : error.end + 20]
            raise AgileError(f"{path}, line {number}: expected text in UTF-8, found {found!r}.") from None


def _cell(value: Any) -> Any:
    """A value as SQLite takes it; numpy's numbers become Python's, dates text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.item() if hasattr(value, "item") else value


def _read_database(path: Path) -> tuple[str, bool, tuple[str, ...], list[tuple[Any, ...]]]:
    """The name of the table, whether it is a view, its columns and rows."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
            found = connection.execute("SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')")
            types = {name: kind for name, kind in sorted(found) if not name.startswith("sqlite_")}
            names = list(types)
            chosen = names if len(names) == 1 else [name for name in names if name.lower() == _TABLE]
            if not chosen:
                raise AgileError(
                    f"{path}: expected one table or view, or one of the name {_TABLE}, found {names or 'none'}. Make a "
                    f"view of what questions are about: CREATE VIEW {_TABLE} AS SELECT ..."
                )
            quoted = '"' + chosen[0].replace('"', '""') + '"'
            cursor = connection.execute(f"SELECT * FROM {quoted}")
            columns = tuple(column[0] for column in cursor.description)
            return chosen[0], types[chosen[0]] == "view", columns, cursor.fetchall()
    except sqlite3.Error as error:
        raise AgileError(f"{path}: cannot be read as a SQLite database ({error}). Expected {FILES}.") from None


def _by_name(path: Path, columns: tuple[str, ...], values: list[tuple[Any, ...]]) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(values, 1):
        sizes = _sizes(f"{path}, row {number}", columns, cells)
        if sum(sizes) > MAX_ROW_BYTES:
            longest = columns[sizes.index(max(sizes))]
            raise AgileError(
                f"{path}, row {number}, column {longest!r}: expected a row of at most {MAX_ROW_BYTES:,} bytes, found "
                f"{sum(sizes):,}, {max(sizes):,} of them in it."
            )
        where = f"{path}, row {number}, column {columns[0]!r}"
        if cells[0] is None or not str(cells[0]).strip():
            raise AgileError(f"{where}: expected the name of the row, found nothing. The first column names the rows.")
        if str(cells[0]) in rows:
            raise AgileError(f"{where}: expected a name that is not yet used, found {str(cells[0])!r} again.")
        known = zip(columns, cells, strict=True)
        rows[str(cells[0])] = {name: " ".join(str(cell).split()) for name, cell in known if cell is not None}
    return rows


def _sizes(where: str, columns: tuple[str, ...], cells: tuple[Any, ...]) -> list[int]:
    """The bytes of each cell as text."""
    sizes = []
    for name, cell in zip(columns, cells, strict=True):
        try:
            sizes.append(len(str(cell).encode()))
        except UnicodeEncodeError:
            raise AgileError(f"{where}, column {name!r}: expected text in UTF-8, found {str(cell)[:80]!r}.") from None
    return sizes
