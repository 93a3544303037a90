"""Opening the worklist's database, and the two kinds of transaction that the product uses on it.

SQLite and PostgreSQL are served by the same code. A committed transaction is on the disk (SQLite: WAL, synchronous
FULL; PostgreSQL: synchronous_commit on). A write transaction on SQLite begins with BEGIN IMMEDIATE, because one that
reads first and writes later fails at once in WAL mode when another has written in between, whatever the busy timeout.

When the database cannot be reached or is locked for longer than the busy timeout, `DatabaseUnavailable` is raised and
nothing of the transaction stands; the receiver answers A700 and the camera keeps its copy. Messages of the driver are
cut to their first line and never carry parameters, because these hold patient identity.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Dialect, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.sql import ClauseElement

from dicom_node.errors import RemnantError

_WRITES = "remnant_writes"

# Intake reads a whole cluster of rows and then decides; two intakes at once could both create the row. SQLite has one
# writer anyway, PostgreSQL gets these locks (held until the transaction ends).
INTAKE_LOCK = 7_131_001
NODE_EVENTS_LOCK = 7_131_002
SCHEMA_LOCK = 7_131_003


DAMAGED = "stop the node and bring back a backup with `remnant db restore`; what came since lies in the spool"
"""What a person can do about a damaged database."""


class DatabaseUnavailable(RemnantError):  # noqa: N818 - the name says what is the case, for whoever catches it
    """The worklist's database cannot be reached, or is locked for longer than the busy timeout; nothing was changed."""


class WorklistFault(RemnantError):  # noqa: N818 - see above
    """The database refused what we asked for: a fault of ours or of the file. Nothing was changed."""


def open_worklist(url: str, *, busy_timeout_s: float = 5.0) -> Engine:
    """An engine for the worklist at `url` (`sqlite:///var/worklist.db`, `postgresql+psycopg://...`).

    Makes the folder of an SQLite file and creates the file with mode 0600 (it holds patient identity). Does not create
    tables: see `upgrade`. Nothing is connected yet on PostgreSQL.

    Raises
    ------
    WorklistFault: the URL is none we can use.
    DatabaseUnavailable: the folder or file cannot be made.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise WorklistFault(
            "the database URL cannot be read", hint="write it as sqlite:///var/worklist.db or postgresql+psycopg://..."
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _open_sqlite(parsed, busy_timeout_s)
    if backend == "postgresql":
        return _open_postgresql(parsed, busy_timeout_s)
    raise WorklistFault(
        f"a database of the kind {backend!r} is not supported",
        hint="use sqlite:///... for one machine or postgresql+psycopg://... for several",
    )


def _open_sqlite(url: URL, busy_timeout_s: float) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise WorklistFault(
            "the worklist needs a database file: in memory it would be lost with the process",
            hint="write the URL as sqlite:///var/worklist.db",
        )
    path = Path(url.database).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Created here and not by SQLite, which would leave the mode to the umask; -wal and -shm inherit it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise DatabaseUnavailable(
            f"the worklist's file cannot be opened: {error.strerror}",
            hint=f"make {path} readable and writable for the user who runs the node",
            retry=True,
        ) from error
    engine = create_engine(
        url.set(database=str(path)),
        connect_args={"timeout": busy_timeout_s},
        hide_parameters=True,
        pool_size=8,
        max_overflow=56,
        pool_timeout=busy_timeout_s,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    _writers[engine] = writer = _Writer(busy_timeout_s)
    event.listen(engine, "engine_disposed", lambda _: writer.close())
    return engine


class _Writer:
    """The one connection on which a process writes to an SQLite file, and the turn to use it.

    SQLite has one writer at a time, and whoever finds it busy looks again after ever longer sleeps: threads of one
    process wait for each other here, and SQLite's own wait is for other processes. A connection that stays open saves
    each object what the pool does around a transaction, which takes as long as its statements.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._turn = threading.Lock()
        self._conn: Connection | None = None

    @contextmanager
    def transaction(self, engine: Engine) -> Iterator[Connection]:
        """As `writing`. Raises PoolTimeoutError where the turn does not come."""
        if not self._turn.acquire(timeout=self._wait_s):
            raise PoolTimeoutError
        try:
            if self._conn is None:
                self._conn = engine.connect().execution_options(**{_WRITES: True})
                self._conn.detach()  # the pool would keep it open behind `close`
            with self._conn.begin():
                yield self._conn
        except BaseException:
            # Whatever it was, the next transaction must not meet what it left of this connection.
            self._leave()
            raise
        finally:
            self._turn.release()

    def close(self) -> None:
        with self._turn:
            self._leave()

    def _leave(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()


_writers: WeakKeyDictionary[Engine, _Writer] = WeakKeyDictionary()


def _prepare_sqlite(dbapi_connection: Any, _record: Any) -> None:
    # The driver's own transaction handling would issue deferred BEGINs of its own; we say BEGIN ourselves.
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    mode = cursor.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
    if mode != "wal":
        raise DatabaseUnavailable(
            f"SQLite does not offer its write-ahead log here (journal mode {mode})",
            hint="keep the worklist on a local disk, not on a network file system; or use PostgreSQL",
        )


def _begin_sqlite(conn: Connection) -> None:
    _drive(conn, _BEGIN_IMMEDIATE if conn.get_execution_options().get(_WRITES) else _BEGIN, {})


def _open_postgresql(url: URL, busy_timeout_s: float) -> Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    options = f"-c lock_timeout={round(busy_timeout_s * 1000)} -c timezone=UTC -c synchronous_commit=on"
    try:
        return create_engine(
            url,
            connect_args={
                "options": options,
                "application_name": "remnant",
                "connect_timeout": max(2, round(busy_timeout_s)),
            },
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=8,
            max_overflow=24,
            pool_timeout=busy_timeout_s,
        )
    except (NoSuchModuleError, ArgumentError):
        raise WorklistFault(
            f"the database driver {url.drivername!r} is not installed", hint="use postgresql+psycopg://..."
        ) from None


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A write transaction: committed durably when the block ends, rolled back when it raises. Never one in another."""
    writer = _writers.get(engine)
    with _translated():
        if writer is not None:
            with writer.transaction(engine) as conn:
                yield conn
            return
        with engine.connect() as conn, conn.begin():
            yield conn


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A read transaction. Fetch everything within the block and leave it: an open reader holds back the WAL."""
    with _translated(), engine.connect() as conn, conn.begin():
        yield conn


def lock(conn: Connection, key: int) -> None:
    """Wait for one of the locks named above. On SQLite the write transaction itself is that lock."""
    if conn.dialect.name == "postgresql":
        conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


@dataclass(frozen=True, slots=True)
class _Words:
    """A statement as the driver takes it; `names`: the order of its parameters, None where the driver goes by name."""

    sql: str
    names: tuple[str, ...] | None
    fixed: Mapping[str, Any]

    def filled(self, values: Mapping[str, Any]) -> Any:
        given = {**self.fixed, **values}
        return given if self.names is None else [given[name] for name in self.names]


_BEGIN, _BEGIN_IMMEDIATE = _Words("BEGIN", (), {}), _Words("BEGIN IMMEDIATE", (), {})


@lru_cache(maxsize=64)
def _words(statement: ClauseElement, dialect: Dialect, names: tuple[str, ...]) -> _Words:
    compiled: Any = statement.compile(dialect=dialect, column_keys=names)
    order = tuple(compiled.positiontup) if compiled.positional else None
    return _Words(str(compiled), order, {key: value for key, value in compiled.params.items() if value is not None})


def straight(conn: Connection, statement: ClauseElement, *rows: Mapping[str, Any]) -> Any:
    """Run a statement that is a constant, once for each of `rows` (all have the same keys), on the driver's own cursor;
    return the first row of what one gives, None where it gives nothing.

    What SQLAlchemy does around a statement takes four times as long as SQLite takes to run it, and a camera waits: this
    is for what every object needs. Errors come out as from SQLAlchemy.
    """
    return _drive(conn, _words(statement, conn.dialect, tuple(rows[0])), *rows)


def _drive(conn: Connection, words: _Words, *rows: Mapping[str, Any]) -> Any:
    driver = conn.dialect.loaded_dbapi
    try:
        cursor = conn.connection.cursor()
        try:
            if len(rows) > 1:
                cursor.executemany(words.sql, [words.filled(row) for row in rows])
                return None
            cursor.execute(words.sql, words.filled(rows[0]))
            return cursor.fetchone() if cursor.description else None
        finally:
            cursor.close()
    except driver.Error as error:
        raise DBAPIError.instance(None, None, error, driver.Error, hide_parameters=True, dialect=conn.dialect) from None


@contextmanager
def _translated() -> Iterator[None]:
    """Driver errors as our own, without parameters: those hold patient identity, and tracebacks end up in logs."""
    try:
        yield
    except PoolTimeoutError:
        raise DatabaseUnavailable(
            "no free connection to the worklist's database within the busy timeout",
            hint="look for a program that holds the database",
            retry=True,
        ) from None
    except DBAPIError as error:
        said = _first_line(error)
        if getattr(error.orig, "sqlstate", None) == "42P01" or said.startswith("no such table"):
            raise DatabaseUnavailable(
                "the worklist's tables are not there", hint="run `remnant db upgrade`", retry=True
            ) from None
        if "malformed" in said or "not a database" in said:
            # Still to be tried again: a camera that keeps its copy loses nothing until a backup is back.
            raise DatabaseUnavailable(f"the worklist's database is damaged: {said}", hint=DAMAGED, retry=True) from None
        # What is left is the database and not our statement: locked, gone, full, read-only, damaged.
        if not isinstance(error, ProgrammingError | DataError | IntegrityError):
            raise DatabaseUnavailable(
                f"the worklist's database is not available: {said}",
                hint="end programs that hold a lock on it; check that it runs, and the disk's free space",
                retry=True,
            ) from None
        raise WorklistFault(
            f"the worklist's database refused a statement: {said}",
            hint="run `remnant db check`; report it to the makers",
        ) from None


def _first_line(error: DBAPIError) -> str:
    """What the driver said. PostgreSQL puts values into the DETAIL line: only the primary message is taken."""
    primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    said = primary or str(error.orig)
    return said.splitlines()[0] if said else type(error.orig).__name__
