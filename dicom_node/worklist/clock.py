"""The database's clock, as SQL for both databases.

Several machines may share one worklist, and their clocks differ; the database's does not differ from itself. Every time
in the worklist is therefore taken there: UTC, ISO 8601 with milliseconds and a Z ("2026-11-23T17:51:23.123Z"), as text
of fixed width, so that comparing texts compares times and a person reads them without a tool.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Text, literal, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

_PG_FORMAT = """'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'"""


class _Now(FunctionElement[str]):
    """The time of the database plus an interval ("0.000 seconds"), as text."""

    type = Text()
    name = "remnant_now"
    inherit_cache = True


@compiles(_Now, "sqlite")
def _now_sqlite(element: _Now, compiler: Any, **kwargs: Any) -> str:
    interval = compiler.process(element.clauses, **kwargs)
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', 'now', {interval})"


@compiles(_Now, "postgresql")
def _now_postgresql(element: _Now, compiler: Any, **kwargs: Any) -> str:
    # clock_timestamp(), not now(): a transaction that waited for a lock must not stamp the time before its wait.
    interval = compiler.process(element.clauses, **kwargs)
    return f"to_char((clock_timestamp() + CAST({interval} AS interval)) AT TIME ZONE 'UTC', {_PG_FORMAT})"


class _Shifted(FunctionElement[str]):
    """A time of the worklist plus an interval."""

    type = Text()
    name = "remnant_shifted"
    inherit_cache = True


@compiles(_Shifted, "sqlite")
def _shifted_sqlite(element: _Shifted, compiler: Any, **kwargs: Any) -> str:
    column, interval = (compiler.process(clause, **kwargs) for clause in element.clauses)
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column}, {interval})"


@compiles(_Shifted, "postgresql")
def _shifted_postgresql(element: _Shifted, compiler: Any, **kwargs: Any) -> str:
    column, interval = (compiler.process(clause, **kwargs) for clause in element.clauses)
    return f"to_char((CAST({column} AS timestamptz) + CAST({interval} AS interval)) AT TIME ZONE 'UTC', {_PG_FORMAT})"


def shifted(column: ColumnElement[Any], by_s: float) -> FunctionElement[str]:
    """SQL for the time in `column`, `by_s` seconds later (earlier when negative)."""
    return _Shifted(column, literal(f"{by_s:.3f} seconds", Text()))


def now(plus_s: float = 0.0) -> FunctionElement[str]:
    """SQL for the database's time, `plus_s` seconds later (earlier when negative)."""
    return _Now(literal(f"{plus_s:.3f} seconds", Text()))


def read_clock(conn: Connection) -> str:
    """The database's time as text."""
    return str(conn.scalar(select(now())))


def parse(text: str) -> datetime:
    """A time of the worklist as an aware datetime in UTC."""
    return datetime.fromisoformat(text).astimezone(UTC)


def text_of(moment: datetime) -> str:
    """An aware datetime as a time of the worklist."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from one time of the worklist to another, negative when they are the other way round."""
    return (parse(later) - parse(earlier)).total_seconds()
