"""SQLite as this project uses it: durable, shared between processes, and sure whose file it is."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agile.errors import AgileError

_TIMEOUT_S = 60.0  # how long to wait for other processes that use the same file


def open_database(path: Path | None, what: str, application_id: int, schema: str) -> sqlite3.Connection:
    """Open or create a database; None is a private one in RAM.

    Args:
        path: The file; missing folders are made.
        what: What the file is, for error messages: `"memory"`.
        application_id: Marks files of this schema, 31 bits; change it whenever the schema changes.
        schema: `CREATE TABLE IF NOT EXISTS` statements, run once for a new file.

    Raises:
        AgileError: The file belongs to something else, or cannot be read and written.
    """
    with database_errors(what, path):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path or ":memory:", timeout=_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            # Tables first: another process may be creating this very file, and it sets the mark together with them.
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            owner = db.execute("PRAGMA application_id").fetchone()[0]
            if owner != application_id and (tables or owner):
                raise AgileError(
                    f"{path} is an SQLite database, but not a {what} of this version of AGILE; give the path of one, "
                    "or a path that does not exist yet."
                )
            if path is not None:
                _use_write_ahead_log(db)
                db.execute("PRAGMA synchronous=FULL")
            if owner != application_id:
                db.executescript(f"BEGIN IMMEDIATE; {schema}; PRAGMA application_id={application_id}; COMMIT;")
        except BaseException:
            db.close()
            raise
    return db


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Readers and a writer at once, one sync a commit; SQLite itself does not wait while another process does this."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def database_errors(what: str, path: Path | None) -> Iterator[None]:
    """Turn what SQLite and the file system say into an `AgileError`; misuse of the connection stays what it is."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise AgileError(
            f"The {what} {path or 'in RAM'} cannot be used: {error}. Expected an SQLite file of AGILE, or a new path, "
            "that can be read and written on a disk with free space."
        ) from error


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; with a file, on disk when the block is left."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold (lone surrogates) replaced by `?`."""
    return text.encode("utf-8", "replace").decode()
