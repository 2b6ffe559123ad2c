"""The desk's database: SQLite by default, PostgreSQL by URL. What a transaction wrote is on disk when it is left."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.orm import Session

from agile.errors import AgileError

BUSY_S = 10  # how long a writer waits for others
TOGETHER, GATHER_S = 256, 0.015  # how many pieces of work one transaction takes, and how long it waits for more
P = TypeVar("P")
T = TypeVar("T")
_Piece = tuple[Callable[[Session, list[Any]], Sequence[Any]], Any, Future[Any]]


class DatabaseAway(AgileError):
    """The database does not answer now; what was acknowledged is safe, and trying again later is right."""


class Database:
    """Transactions on the desk's tables, from any thread; brings the tables up to date when opened.

    Args:
        url: As SQLAlchemy reads it: `sqlite:///FILE`, `postgresql+psycopg://USER@HOST/NAME`.

    Raises:
        AgileError: The URL cannot be read or the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.is_sqlite = parsed.get_backend_name() == "sqlite"
            if self.is_sqlite and parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self.engine = create_engine(parsed, pool_pre_ping=not self.is_sqlite, **self._options())
        except (ArgumentError, NoSuchModuleError, OSError) as error:
            raise AgileError(
                f"The database {url!r} cannot be opened: {error}. Expected sqlite:///FILE or "
                "postgresql://USER:PASSWORD@HOST/NAME."
            ) from None
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare)
            event.listen(self.engine, "begin", _begin)
        self._reader = self.engine.execution_options(agile_reads=True)
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._line = _Line()
        try:
            migrate(self)
        except SQLAlchemyError as error:
            raise AgileError(
                f"The database {parsed.render_as_string()} cannot be used: {str(error).splitlines()[0]}"
            ) from None

    def _options(self) -> dict[str, Any]:
        if self.is_sqlite:
            return {"connect_args": {"timeout": BUSY_S}}
        return {
            "pool_size": 10,
            "max_overflow": 10,
            "pool_timeout": BUSY_S,
            "connect_args": {"connect_timeout": BUSY_S},
        }

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction: all or nothing, on disk when the block is left.

        Raises:
            DatabaseAway: It cannot be reached, is full, or another writer does not end.
        """
        turn = self._line.turn() if self.is_sqlite else nullcontext()
        with _away(), turn, Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def together(self, work: Callable[[Session, list[P]], Sequence[T]], given: P) -> Future[T]:
        """Do work in a transaction with what others want to write just then: one sync of the disk for all of them.

        The result is there when it is on disk. Where something fails, everything is done again on its own, so that
        nothing takes the rest with it.

        Args:
            work: Called with what was given to it by all who want the same work done, it returns a result for each.
        """
        found: Future[T] = Future()
        found.set_running_or_notify_cancel()  # who waits no more cannot take the work back
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, daemon=True, name="agile-writer")
                self._writer.start()
        self._pieces.put((work, given, found))
        return found

    def _write(self) -> None:
        """Until it is closed."""
        closing = False
        while not closing:
            pieces = [self._pieces.get()]
            time.sleep(GATHER_S)
            while len(pieces) < TOGETHER and not self._pieces.empty():
                pieces.append(self._pieces.get())
            closing = None in pieces
            self._commit([piece for piece in pieces if piece is not None])

    def _commit(self, pieces: Sequence[_Piece]) -> None:
        by_work: dict[Any, list[_Piece]] = {}
        for piece in pieces:
            by_work.setdefault(piece[0], []).append(piece)
        try:
            with self.writing() as session:
                results = [work(session, [given for _, given, _ in same]) for work, same in by_work.items()]
        except Exception as error:
            if len(pieces) > 1 and not isinstance(error, DatabaseAway):
                for piece in pieces:
                    self._commit([piece])
                return
            for _, _, found in pieces:
                found.set_exception(error)
        else:
            for same, told in zip(by_work.values(), results, strict=True):
                for (_, _, found), result in zip(same, told, strict=True):
                    found.set_result(result)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only looks; writers do not wait for it. Raises as `writing`."""
        with _away(), Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    def check(self) -> None:
        """Raises DatabaseAway."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        with self._lock:
            if self._writer is not None:
                self._pieces.put(None)
                self._writer.join()
                self._writer = None
        self.engine.dispose()


class _Line:
    """Writers of this process take turns, who came first first: SQLite would let any of them starve."""

    def __init__(self) -> None:
        self._lock, self._waiting, self._taken = threading.Lock(), deque[threading.Lock](), False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Raises NoConnection after `BUSY_S`."""
        mine = threading.Lock()
        with self._lock:
            if self._taken:
                mine.acquire()
                self._waiting.append(mine)
            self._taken = True
        if not mine.acquire(timeout=BUSY_S):
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    raise NoConnection(f"other writers did not end within {BUSY_S} s")
        try:
            yield
        finally:
            with self._lock:
                if self._waiting:
                    self._waiting.popleft().release()
                else:
                    self._taken = False


@contextmanager
def _away() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, NoConnection) as error:
        raise DatabaseAway(
            f"The desk's database is away: {str(error).splitlines()[0]}. What was acknowledged is kept; try again when "
            "it is back."
        ) from error


def database_url(given: str | None, folder: Path) -> str:
    """Of the desk: the one that a config gives, or a file in the server's folder."""
    return given or f"sqlite:///{folder.resolve() / 'desk.sqlite'}"


def new_id() -> str:
    """A name that nobody can guess."""
    return uuid.uuid4().hex


def migrate(database: Database) -> None:
    """Bring the tables to the newest version; of several processes that start at once, one does it."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with database.engine.begin() as connection:
        if not database.is_sqlite:  # SQLite's transaction holds the lock already
            connection.execute(text("SELECT pg_advisory_xact_lock(1095189317)"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _prepare(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_S * 1000}"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    # a writer that begins as a reader cannot wait for its turn
    reads = connection.get_execution_options().get("agile_reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
