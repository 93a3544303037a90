"""The worklist as a whole: a backup while the node runs, the way back, and the move to another database.

A backup is one SQLite file, whatever the worklist lives in; it holds patient identity and is made with mode 0600. It
is written under another name, checked, made durable and only then given its name. Copying compares every line of every
table on both sides before it commits, so that the chains of the history come over whole or not at all.

Nothing here overwrites: a backup refuses a name that is taken, a copy a database that holds rows, and what a restore
replaces stays beside it under another name.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

from sqlalchemy import Connection, Engine, Table, func, insert, inspect, select, text
from sqlalchemy.engine import make_url

from dicom_node import disk
from dicom_node.worklist.engine import DatabaseUnavailable, WorklistFault, open_worklist, reading, writing
from dicom_node.worklist.history import record_event, verify_history
from dicom_node.worklist.schema import schema_is_current, upgrade
from dicom_node.worklist.tables import metadata
from dicom_node.worklist.upkeep import check

_CHUNK = 500


def backup(engine: Engine, path: Path) -> None:
    """Write a backup of the worklist as it is at one moment; the node may go on working.

    Raises
    ------
    WorklistFault: the name is taken, or the copy is not sound (then it is removed).
    DatabaseUnavailable: the database cannot be read, or the file not be written.
    """
    if path.exists():
        raise WorklistFault(f"there is a file {path} already", hint="give the backup a new name")
    with _beside(path) as part:
        if engine.dialect.name == "sqlite":
            _copy_file(Path(str(engine.url.database)), part)
        else:
            target = open_worklist(f"sqlite:///{part}")
            try:
                upgrade(target)
                _copy_rows(engine, target)
            finally:
                target.dispose()
        _as_one_file(part)
        _refuse_unsound(part)
        _put(part, path)
    _record_patiently(engine, "a backup was written")


def _record_patiently(engine: Engine, detail: str) -> None:
    """SQLite hands its write lock to whoever asks first: beside busy receivers one wait may end empty-handed.

    The backup stands already, so it is not called a failure before a minute of waiting.
    """
    for attempts_left in reversed(range(12)):
        try:
            record_event(engine, "node", detail)
        except DatabaseUnavailable as error:
            if not error.retry or not attempts_left:
                raise
        else:
            return


def restore(url: str, path: Path) -> Path | None:
    """Make the worklist at `url` that of a backup; returns where the replaced file lies, None where there was none.

    Nobody may use the database meanwhile: the caller holds every role of the node. A backup of an older version is
    brought to this one's tables first.

    Raises
    ------
    WorklistFault: the backup is damaged, no worklist or of a newer version; or the worklist is no file and not empty.
    DatabaseUnavailable: a file cannot be read or written. The worklist is what it was.
    """
    if not path.is_file():
        raise WorklistFault(f"there is no backup {path}", hint="give the file that `remnant db backup` wrote")
    parsed = make_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    place = Path(str(parsed.database)).absolute() if sqlite else path.absolute()
    with _beside(place) as part:
        _copy_file(path, part)
        engine = open_worklist(f"sqlite:///{part}")
        try:
            if not _holds_worklist(engine):
                raise WorklistFault(f"{path} holds no worklist", hint="give the file that `remnant db backup` wrote")
            upgrade(engine)
            if sqlite:
                record_event(engine, "node", "this database was restored from a backup")
        finally:
            engine.dispose()
        _as_one_file(part)
        _refuse_unsound(part)
        if sqlite:
            return _replace(place, part)
        source, target = open_worklist(f"sqlite:///{part}"), open_worklist(url)
        try:
            copy(source, target)
        finally:
            source.dispose()
            target.dispose()
    return None


def copy(source: Engine, target: Engine) -> dict[str, int]:
    """Copy the whole worklist into an empty database, which gets this version's tables; returns lines by table.

    Raises
    ------
    WorklistFault: the source is of another version, the target holds rows, or a line did not come over as it was.
    DatabaseUnavailable: one of them cannot be used. The target then has empty tables, or none.
    """
    if not schema_is_current(source):
        raise WorklistFault("the database to copy has another version's tables", hint="run `remnant db upgrade`")
    upgrade(target)
    copied = _copy_rows(source, target)
    record_event(target, "node", f"this database was copied from one on {source.dialect.name}")
    return copied


def _holds_worklist(engine: Engine) -> bool:
    """Say whether the database holds a worklist, of whatever version."""
    with reading(engine) as conn:
        return inspect(conn).has_table("alembic_version") and inspect(conn).has_table("scan")


def other_sessions(engine: Engine) -> int:
    """How many other connections of a node hold the database; 0 on SQLite, where role locks tell."""
    if engine.dialect.name != "postgresql":
        return 0
    with reading(engine) as conn:
        found: int | None = conn.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'remnant' AND pid <> pg_backend_pid()"
            )
        )
        return found or 0


def _copy_rows(source: Engine, target: Engine) -> dict[str, int]:
    # One moment for all tables, also where others go on writing.
    if source.dialect.name == "postgresql":
        source = source.execution_options(isolation_level="REPEATABLE READ")
    with reading(source) as there, writing(target) as here:
        for table in metadata.sorted_tables:
            if here.execute(select(table.c.id).limit(1)).first() is not None:
                raise WorklistFault("the database to copy to is not empty", hint="give a new, empty one")
        copied = {}
        for table in metadata.sorted_tables:
            for lines in _lines(there, table):
                here.execute(insert(table), [dict(line) for line in lines])
            copied[table.name] = _compare(there, here, table)
            if here.dialect.name == "postgresql" and copied[table.name]:
                here.execute(
                    text("SELECT setval(pg_get_serial_sequence(:table, 'id'), :last)"),
                    {"table": table.name, "last": here.scalar(select(func.max(table.c.id)))},
                )
        return copied


def _lines(conn: Connection, table: Table) -> Iterator[list[dict[str, object]]]:
    """The lines of a table by id, in portions."""
    last = 0
    while True:
        found = conn.execute(select(table).where(table.c.id > last).order_by(table.c.id).limit(_CHUNK)).mappings().all()
        if not found:
            return
        yield [dict(line) for line in found]
        last = found[-1]["id"]


def _compare(there: Connection, here: Connection, table: Table) -> int:
    count = 0
    for ours, theirs in zip_longest(_lines(there, table), _lines(here, table)):
        if ours != theirs:
            raise WorklistFault(f"lines of the table {table.name} did not come over as they were; nothing was copied")
        count += len(ours)
    return count


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name for what is not whole yet, in the folder where it is to be; gone when the block ends."""
    part = path.absolute().with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield part
    except OSError as error:
        raise DatabaseUnavailable(
            f"{path} cannot be written: {error.strerror or error}", hint="check the folder and its free space"
        ) from error
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with suppress(OSError):
                Path(f"{part}{suffix}").unlink(missing_ok=True)


def _copy_file(source: Path, target: Path) -> None:
    """SQLite's online backup: one moment, with what is still in the log; writers go on."""
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as there,
            closing(sqlite3.connect(target)) as here,
        ):
            there.backup(here)
    except sqlite3.Error as error:
        raise WorklistFault(
            f"{source} cannot be copied: {error}", hint="is it a backup, and whole? then try another one"
        ) from error


def _as_one_file(path: Path) -> None:
    """Put what is in the log into the file, so that the file alone is the database."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")


def _refuse_unsound(path: Path) -> None:
    engine = open_worklist(f"sqlite:///{path}")
    try:
        faults = [*check(engine), *verify_history(engine)]
    finally:
        engine.dispose()
    if faults:
        raise WorklistFault(
            f"the copy is not sound: {' '.join(faults[0].split())}", hint="take another backup; see `remnant db check`"
        )
    _as_one_file(path)


def _put(part: Path, path: Path) -> None:
    disk.sync(part)
    part.rename(path)
    disk.sync(path.absolute().parent)


def _replace(place: Path, part: Path) -> Path | None:
    """Give the new file the name of the old one, which stays beside it. At no point is there no database, and the old
    one's log never meets the new file."""
    disk.sync(part)
    aside = None
    if place.exists():
        aside = place.with_name(f"{place.name}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        os.link(place, aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{place}{suffix}").rename(f"{aside}{suffix}")
        disk.sync(place.parent)
    part.rename(place)
    disk.sync(place.parent)
    return aside
