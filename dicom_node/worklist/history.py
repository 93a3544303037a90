"""The history: append-only, chained by digest within a row's history.

Each event's digest covers the digest before it, so that a changed, removed or inserted line shows (`verify_events`).
What was cut off at the end of a row's history, or a whole history that is gone, shows against the daily checkpoint: an
event of the node's own history with a digest over the ends of all histories that grew since the one before. Only what
came after the last checkpoint can be cut off unseen; its digest is in the log too, which a hospital keeps elsewhere.
`detail` never holds patient identity: the history outlives it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from types import MappingProxyType

from sqlalchemy import Connection, Engine, RowMapping, bindparam, func, insert, select, text

from dicom_node.worklist.clock import now, read_clock, seconds_between
from dicom_node.worklist.engine import NODE_EVENTS_LOCK, lock, reading, straight, writing
from dicom_node.worklist.tables import event_table, scan

EVENTS = MappingProxyType(
    {
        "received": "an object is durable and hangs on this row",
        "version_received": "other bytes arrived under a known SOP Instance UID; kept beside the first",
        "version_judged": "the worker compared such bytes with the first",
        "patient_differs_in_study": "ALARM: another patient's object carries this StudyInstanceUID",
        "other_pixels": "ALARM: another image arrived under a known SOP Instance UID; quarantined",
        "identity_changed": "ALARM: the same image, or an archive's answer, has another identity; sending stopped",
        "identity_accepted": "a person accepted another identity for the scan: a new revision",
        "adopted": "its bytes lay in the spool without a row: entered again after a kill or an old backup",
        "bytes_missing": "ALARM: bytes that this row owns are not on the disk",
        "bytes_damaged": "ALARM: bytes that this row owns are not what was received or made",
        "released": "a person took an object out of quarantine: it is the one that is analysed now",
        "discarded": "a person removed the bytes of a quarantined object",
        "returned": "a result of this row came back from an archive; kept, never analysed",
        "recalled": "a person withdrew results that were sent",
        "revised": "the set of views changed",
        "views_taken": "another row took this row's views",
        "complete": "all required views are here, or the header says why the scan cannot be judged",
        "views_expired": "a required view did not arrive in time",
        "claimed": "a worker took the row",
        "requeued": "the worker was lost",
        "claims_used_up": "workers were lost too often over this row: it gets a note instead of an analysis",
        "try_later": "an attempt failed and another is due",
        "attempt_failed": "the last attempt failed",
        "finished": "the analysis ended",
        "cancelled": "deliveries not yet made were cancelled",
        "stored": "an archive took a result; it counts as delivered when the archive has committed itself to keep it",
        "committed": "an archive committed itself to keep a result (Storage Commitment)",
        "not_committed": "an archive does not keep a result that it took: it is sent again, or a person is asked",
        "commitment_requested": "a camera asked for Storage Commitment of objects; the archives are asked for it",
        "commitment_reported": "the camera was told which objects an archive has committed itself to keep",
        "commitment_not_reported": "the camera could not be told: given up",
        "delivery": "a delivery came to rest",
        "substituted": "another object goes to a destination that does not take the first",
        "settled": "every delivery is at rest",
        "retry": "a person asked for a retry",
        "purge_near": "ALARM: bytes that a person may want to look at go within 14 days",
        "purged": "bytes were removed by retention",
        "forgotten": "identity columns were emptied",
        "clock_jumped": "the database's clock jumped; deadlines moved with it",
        "checkpoint": "the ends of all histories that grew since the last checkpoint, as one digest",
        "node": "something happened to the node itself",
    }
)
"""The closed list of events: name -> what it says."""


_newest = (
    select(event_table.c.sequence, event_table.c.digest)
    .where(func.coalesce(event_table.c.scan_id, 0) == bindparam("whose"))
    .order_by(event_table.c.sequence.desc())
    .limit(1)
    .subquery()
)
# One row always: the database's time, and the end of the chain or nulls.
_HEAD = select(
    now().label("at"),
    select(_newest.c.sequence).scalar_subquery().label("sequence"),
    select(_newest.c.digest).scalar_subquery().label("digest"),
)


_APPEND = insert(event_table)


_CHECKPOINTS = (
    select(event_table)
    .where(event_table.c.scan_id.is_(None), event_table.c.event == "checkpoint")
    .order_by(event_table.c.sequence)
)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the history. `scan_id` is None for the node's own."""

    id: int
    scan_id: int | None
    sequence: int
    at: str
    revision: int | None
    event: str
    from_state: str | None
    to_state: str | None
    detail: str
    digest: str


def append(
    conn: Connection,
    scan_id: int | None,
    event: str,
    *,
    revision: int | None = None,
    from_state: str | None = None,
    to_state: str | None = None,
    detail: str = "",
) -> None:
    """Write one event. The caller holds the row (has updated or locked it) in this transaction."""
    if event not in EVENTS:
        raise KeyError(event)
    if scan_id is None:
        lock(conn, NODE_EVENTS_LOCK)
    at, newest, before = straight(conn, _HEAD, {"whose": scan_id or 0})
    fields: dict[str, str | int | None] = {
        "scan_id": scan_id,
        "sequence": (newest or 0) + 1,
        "at": at,
        "revision": revision,
        "event": event,
        "from_state": from_state,
        "to_state": to_state,
        "detail": detail,
    }
    straight(conn, _APPEND, {**fields, "digest": _digest(before or "", fields)})


@dataclass(frozen=True, slots=True)
class Line:
    """What an event says, before it has its place in a history."""

    event: str
    detail: str = ""
    from_state: str | None = None
    to_state: str | None = None


def begin(conn: Connection, scan_id: int, at: str, revision: int, lines: Sequence[Line]) -> None:
    """Write the first events of a row that this transaction made, as so many `append` would, in one statement.
    `at`: the database's time."""
    digest = ""
    rows: list[dict[str, str | int | None]] = []
    for sequence, line in enumerate(lines, start=1):
        if line.event not in EVENTS:
            raise KeyError(line.event)
        fields: dict[str, str | int | None] = {
            "scan_id": scan_id,
            "sequence": sequence,
            "at": at,
            "revision": revision,
            "event": line.event,
            "from_state": line.from_state,
            "to_state": line.to_state,
            "detail": line.detail,
        }
        digest = _digest(digest, fields)
        rows.append({**fields, "digest": digest})
    straight(conn, _APPEND, *rows)


def tells(conn: Connection, scan_id: int | None, event: str, detail: str) -> bool:
    """Say whether a history holds this very line already."""
    return (
        conn.execute(
            select(event_table.c.id)
            .where(
                func.coalesce(event_table.c.scan_id, 0) == (scan_id or 0),
                event_table.c.event == event,
                event_table.c.detail == detail,
            )
            .limit(1)
        ).first()
        is not None
    )


def record_event(engine: Engine, event: str, detail: str = "", *, once: bool = False) -> bool:
    """Write an event of the node's own history; with `once` only where it does not say this already. True: written."""
    with writing(engine) as conn:
        lock(conn, NODE_EVENTS_LOCK)
        if once and tells(conn, None, event, detail):
            return False
        append(conn, None, event, detail=detail)
        return True


# Made once: `json.dumps` makes another for each call that has options.
_line_of = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode


def _digest(previous: str, fields: dict[str, str | int | None]) -> str:
    return hashlib.sha256(f"{previous}\n{_line_of(fields)}".encode()).hexdigest()


def _event(row: RowMapping) -> Event:
    return Event(**row)


def events(engine: Engine, scan_id: int | None) -> tuple[Event, ...]:
    """The history of one row, oldest first; of the node itself for None."""
    with reading(engine) as conn:
        found = conn.execute(
            select(event_table)
            .where(func.coalesce(event_table.c.scan_id, 0) == (scan_id or 0))
            .order_by(event_table.c.sequence)
        ).mappings()
        return tuple(_event(row) for row in found)


def changes_since(engine: Engine, event_id: int, *, limit: int = 1000) -> tuple[Event, ...]:
    """Events after `event_id` in the order of their ids. On PostgreSQL a slow transaction may commit a lower id late;
    this is for people who watch, the history itself is complete."""
    with reading(engine) as conn:
        found = conn.execute(
            select(event_table).where(event_table.c.id > event_id).order_by(event_table.c.id).limit(limit)
        ).mappings()
        return tuple(_event(row) for row in found)


def last_event_id(engine: Engine) -> int:
    """The id of the newest event, 0 where there is none."""
    with reading(engine) as conn:
        return conn.scalar(select(func.max(event_table.c.id))) or 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A digest over the ends of the `histories` that have events with ids from `first` to `last`."""

    first: int
    last: int
    histories: int
    sha256: str

    def __str__(self) -> str:
        return f"events {self.first} to {self.last}, {self.histories} histories, sha256 {self.sha256}"


_CHECKPOINT = re.compile(r"events ([0-9]+) to ([0-9]+), ([0-9]+) histories, sha256 ([0-9a-f]{64})")


def _checkpoint_of(line: Event) -> Checkpoint | None:
    said = _CHECKPOINT.fullmatch(line.detail)
    return said and Checkpoint(int(said[1]), int(said[2]), int(said[3]), said[4])


def checkpoint(engine: Engine, *, every_s: float = 86_400.0) -> Checkpoint | None:
    """Write a checkpoint where the last one is older than `every_s` and something has happened since; else None."""
    with writing(engine) as conn:
        lock(conn, NODE_EVENTS_LOCK)
        if conn.dialect.name == "postgresql":
            # Until we commit nobody writes an event: no lower id can be committed after we have looked.
            conn.execute(text("LOCK TABLE event IN SHARE ROW EXCLUSIVE MODE"))
        newest = _CHECKPOINTS.order_by(None).order_by(event_table.c.sequence.desc()).limit(1)
        before = conn.execute(newest).mappings().first()
        first = 1
        if before is not None:
            # Either way round: a clock that jumped must not put off checkpoints for days.
            if abs(seconds_between(before["at"], read_clock(conn))) < every_s:
                return None
            known = _checkpoint_of(_event(before))
            first = 1 if known is None else known.last + 1
        last = conn.scalar(select(func.max(event_table.c.id))) or 0
        if last < first or (before is not None and last == before["id"]):
            return None
        made = _over(conn, first, last)
        append(conn, None, "checkpoint", detail=str(made))
        return made


def _over(conn: Connection, first: int, last: int) -> Checkpoint:
    whose = func.coalesce(event_table.c.scan_id, 0)
    grown = (
        select(whose.label("whose"), func.max(event_table.c.sequence).label("sequence"))
        .where(event_table.c.id.between(first, last))
        .group_by(whose)
        .subquery()
    )
    ends = conn.execute(
        select(grown.c.whose, grown.c.sequence, event_table.c.digest)
        .join(event_table, (whose == grown.c.whose) & (event_table.c.sequence == grown.c.sequence))
        .order_by(grown.c.whose)
    ).all()
    lines = "".join(f"{one.whose} {one.sequence} {one.digest}\n" for one in ends)
    return Checkpoint(first, last, len(ends), hashlib.sha256(lines.encode()).hexdigest())


def checkpoints(engine: Engine) -> tuple[Checkpoint, ...]:
    """Every checkpoint, oldest first."""
    made = (_checkpoint_of(line) for line in events(engine, None) if line.event == "checkpoint")
    return tuple(one for one in made if one is not None)


def verify_history(engine: Engine) -> tuple[str, ...]:
    """Faults of the whole history, one sentence each: in the chains, against the checkpoints, and where a row stands
    elsewhere than its history says; empty when all of it holds."""
    faults = list(verify_events(engine))
    with reading(engine) as conn:
        next_first = 1
        for line in (_event(row) for row in conn.execute(_CHECKPOINTS).mappings()):
            said = _checkpoint_of(line)
            if said is None or said.first != next_first:
                faults.append(f"the checkpoint of {line.at} does not follow from the one before")
            elif _over(conn, said.first, said.last) != said:
                faults.append(
                    f"the history up to event {said.last} is not what it was at the checkpoint of {line.at}:"
                    " events were removed, added or changed"
                )
            next_first = next_first if said is None else said.last + 1
        ends = {
            one.scan_id: (one.to_state, one.revision)
            for one in conn.execute(
                select(event_table.c.scan_id, event_table.c.to_state, event_table.c.revision)
                .where(event_table.c.scan_id.is_not(None), event_table.c.to_state.is_not(None))
                .order_by(event_table.c.scan_id, event_table.c.sequence)
            )
        }
        faults += [
            f"scan {row.id} is {row.state} in revision {row.revision}, and its history ends elsewhere"
            for row in conn.execute(select(scan.c.id, scan.c.state, scan.c.revision).order_by(scan.c.id))
            if ends.get(row.id) != (row.state, row.revision)
        ]
    return tuple(faults)


def verify_events(engine: Engine, scan_id: int | None = None) -> tuple[str, ...]:
    """Faults in the chain of one row's history, or of every history; one sentence each, empty when they hold."""
    wanted = select(event_table).order_by(func.coalesce(event_table.c.scan_id, 0), event_table.c.sequence)
    if scan_id is not None:
        wanted = wanted.where(event_table.c.scan_id == scan_id)
    with reading(engine) as conn:
        return tuple(_faults(_event(row) for row in conn.execute(wanted).mappings()))


def _faults(history: Iterator[Event]) -> Iterator[str]:
    for scan_id, chain in groupby(history, key=lambda line: line.scan_id):
        whose = "the node" if scan_id is None else f"scan {scan_id}"
        previous = ""
        for expected, line in enumerate(chain, start=1):
            if line.sequence != expected:
                yield f"the history of {whose} lacks event {expected}"
                break
            fields = {name: value for name, value in asdict(line).items() if name not in {"id", "digest"}}
            if line.digest != _digest(previous, fields):
                yield f"event {line.sequence} in the history of {whose} was changed after it was written"
                break
            previous = line.digest
