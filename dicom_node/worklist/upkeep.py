"""Retention, forgetting, reconciling with the spool, and checking that the database is sound.

Purging removes bytes, never facts: UIDs and digests stay, so that a resend is recognised. A row that waits, is analysed
or sends is never purged, and the order is: mark here first, remove the bytes after. Then a row that is retried at that
moment is either not marked or not retried; a crash in between leaves bytes that nobody names: reconciling finds them.
"""

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Engine, RowMapping, delete, or_, select, text, update

from dicom_node.worklist import history
from dicom_node.worklist.clock import now, parse, read_clock, seconds_between, shifted
from dicom_node.worklist.engine import NODE_EVENTS_LOCK, lock, reading, writing
from dicom_node.worklist.schema import schema_is_current
from dicom_node.worklist.states import QUARANTINED, REST
from dicom_node.worklist.tables import delivery, event_table, identity, instance, relay, result, scan

NOT_OURS_DAYS = 2
"""Days for rows that are at rest without any result: not a scan we answer."""

DISPUTED_DAYS = 90
"""Days for failed rows, unreadable objects and quarantined bytes: a person may have to look at them."""

WARNING_DAYS = 14
"""Days before such bytes go that an alarm says so."""

Loss = Literal["bytes_missing", "bytes_damaged"]
"""What can become of bytes that a row owns, beside retention."""

_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class PurgeableFile:
    """Bytes whose retention is over. `kind` says where `file_name` is: "instance" in the spool, or "result"."""

    kind: Literal["instance", "result"]
    id: int
    scan_id: int
    file_name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class KeptFile:
    """Bytes that a row owns. `size_bytes` is that of the dataset of an object, None for a result; `purged_at` is None
    where the bytes must be on the disk."""

    kind: Literal["instance", "result"]
    id: int
    scan_id: int
    file_name: str
    sha256: str
    purged_at: str | None
    size_bytes: int | None


def purgeable(engine: Engine, retention_days: float) -> tuple[PurgeableFile, ...]:
    """Files of rows that have been at rest long enough, oldest first.

    `retention_days` is for findings and notes that were delivered; `NOT_OURS_DAYS` and `DISPUTED_DAYS` for the rest.
    """
    with reading(engine) as conn:
        clock = read_clock(conn)
        at_rest = (
            conn.execute(
                select(scan)
                .where(scan.c.state.in_(REST), scan.c.purged_at.is_(None), scan.c.at_rest_since.is_not(None))
                .order_by(scan.c.at_rest_since, scan.c.id)
            )
            .mappings()
            .all()
        )
        files: list[PurgeableFile] = []
        for row in at_rest:
            days = seconds_between(row["at_rest_since"], clock) / _DAY_S
            if days >= min(retention_days, NOT_OURS_DAYS):
                files += [one.file for one in _files(conn, row, retention_days) if days >= one.keep_days]
        return tuple(files)


def warn_before_purge(engine: Engine, retention_days: float) -> tuple[int, ...]:
    """Write an alarm into the history of each row whose disputed bytes go within `WARNING_DAYS`; returns their ids.
    Told once for each time that a row came to rest."""
    with reading(engine) as conn:
        clock = read_clock(conn)
        near = [
            row
            for row in conn.execute(
                select(scan).where(
                    scan.c.state.in_(REST),
                    scan.c.purged_at.is_(None),
                    scan.c.at_rest_since <= now(-(DISPUTED_DAYS - WARNING_DAYS) * _DAY_S),
                )
            ).mappings()
            if any(
                one.disputed and seconds_between(row["at_rest_since"], clock) / _DAY_S >= one.keep_days - WARNING_DAYS
                for one in _files(conn, row, retention_days)
            )
        ]
    told = []
    for row in near:
        detail = f"disputed bytes of a row at rest since {row['at_rest_since']}"
        with writing(engine) as conn:
            held = conn.execute(select(scan).where(scan.c.id == row["id"]).with_for_update()).mappings().one()
            if held["at_rest_since"] == row["at_rest_since"] and not history.tells(
                conn, row["id"], "purge_near", detail
            ):
                history.append(conn, row["id"], "purge_near", revision=held["revision"], detail=detail)
                told.append(int(row["id"]))
    return tuple(told)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A file that a row still has, the days that it is kept, and whether a person may have to look at it."""

    file: PurgeableFile
    keep_days: float
    disputed: bool


def _files(conn: Connection, row: RowMapping, retention_days: float) -> list[_Kept]:
    results = conn.execute(select(result).where(result.c.scan_id == row["id"]).order_by(result.c.id)).mappings().all()
    long_days = max(DISPUTED_DAYS, retention_days)
    # An unreadable object may be a scan that somebody waits for: nothing was sent for it, not even a note.
    disputed = row["state"] in {"failed", "recalled"} or (row["reason"] == "unreadable" and not results)
    keep_days = retention_days if results else min(NOT_OURS_DAYS, retention_days)
    if disputed:
        keep_days = long_days
    found: list[_Kept] = []
    for one in conn.execute(
        select(instance).where(instance.c.scan_id == row["id"], instance.c.purged_at.is_(None)).order_by(instance.c.id)
    ).mappings():
        file = PurgeableFile("instance", one["id"], row["id"], one["spool_name"], one["sha256"])
        quarantined = one["verdict"] in QUARANTINED
        found.append(_Kept(file, long_days if quarantined else keep_days, disputed or quarantined))
    found += [
        _Kept(PurgeableFile("result", one["id"], row["id"], one["file_name"], one["sha256"]), keep_days, disputed)
        for one in results
        if one["purged_at"] is None
    ]
    return found


def mark_purged(engine: Engine, file: PurgeableFile) -> bool:
    """Write down that a file is about to be removed; remove it only when this says True. False: its row has been taken
    up again, or another has marked it."""
    files = instance if file.kind == "instance" else result
    with writing(engine) as conn:
        row = conn.execute(select(scan).where(scan.c.id == file.scan_id).with_for_update()).mappings().first()
        if row is None or row["state"] not in REST:
            return False
        marked = conn.execute(
            update(files)
            .where(files.c.id == file.id, files.c.scan_id == file.scan_id, files.c.purged_at.is_(None))
            .values(purged_at=now())
        )
        if marked.rowcount != 1:
            return False
        detail = f"{file.kind} sha256 {file.sha256}"
        history.append(conn, file.scan_id, "purged", revision=row["revision"], detail=detail)
        if not _files(conn, row, 0.0):
            conn.execute(update(scan).where(scan.c.id == file.scan_id).values(purged_at=now()))
        return True


def forget(engine: Engine, days: float) -> int:
    """Empty the identity columns of rows at rest for so long whose bytes are gone; returns how many. UIDs, digests and
    history stay: they hold no identity."""
    with writing(engine) as conn:
        old = (
            conn.execute(
                select(scan.c.id, scan.c.revision)
                .where(
                    scan.c.state.in_(REST),
                    scan.c.purged_at.is_not(None),
                    scan.c.forgotten_at.is_(None),
                    scan.c.at_rest_since <= now(-days * _DAY_S),
                )
                .order_by(scan.c.id)
                .with_for_update(skip_locked=True)
            )
        ).all()
        for row in old:
            conn.execute(
                update(scan)
                .where(scan.c.id == row.id)
                .values(
                    patient_id=None,
                    issuer_of_patient_id=None,
                    patient_name=None,
                    accession_number=None,
                    forgotten_at=now(),
                )
            )
            conn.execute(delete(identity).where(identity.c.scan_id == row.id))
            history.append(conn, row.id, "forgotten", revision=row.revision)
        return len(old)


def clock_s(engine: Engine) -> float:
    """The database's clock in seconds since 1970."""
    with reading(engine) as conn:
        return parse(read_clock(conn)).timestamp()


def follow_clock(engine: Engine, jumped_s: float) -> int:
    """After the database's clock jumped (forward when positive), move with it what was reckoned on the old one: when a
    view is given up, when something is tried again, since when a delivery is tried and a row is at rest. Returns how
    many; 0 also where another machine saw the same jump first.

    What was written before a jump forward is known by its stamps, which lie further back than the half of it; what a
    jump back has left lies further ahead than that, where no new deadline can lie that matters.
    """
    half_s = jumped_s / 2
    with writing(engine) as conn:
        lock(conn, NODE_EVENTS_LOCK)
        newest = (
            select(event_table.c.at)
            .where(event_table.c.scan_id.is_(None), event_table.c.event == "clock_jumped")
            .order_by(event_table.c.sequence.desc())
            .limit(1)
        )
        last = conn.scalar(newest)
        if last is not None and abs(seconds_between(last, read_clock(conn))) < min(60.0, abs(half_s)):
            return 0
        moved = 0
        for column, where in (
            (scan.c.views_deadline, scan.c.state == "receiving"),
            (scan.c.not_before, scan.c.state == "queued"),
            (scan.c.at_rest_since, scan.c.state.in_(REST)),
            (delivery.c.not_before, delivery.c.state == "pending"),
            (delivery.c.first_tried_at, delivery.c.state == "pending"),
            (relay.c.not_before, relay.c.state.in_(("asking", "reporting"))),
            (relay.c.requested_at, relay.c.state == "asking"),
            (relay.c.decided_at, relay.c.state == "reporting"),
        ):
            if jumped_s < 0:
                before = column > now(-half_s)
            else:
                before = or_(column.table.c.updated_at < now(-half_s), column < now(-half_s))
            moved += conn.execute(
                update(column.table)
                .where(where, column.is_not(None), before)
                .values({column: shifted(column, jumped_s)})
            ).rowcount
        history.append(conn, None, "clock_jumped", detail=f"by {jumped_s:+.0f} s; {moved} times moved with it")
        return moved


def kept_files(engine: Engine) -> tuple[KeptFile, ...]:
    """Every file that a row owns or owned, by id; received objects first, then results."""
    received = select(
        instance.c.id, instance.c.scan_id, instance.c.spool_name, instance.c.sha256, instance.c.purged_at,
        instance.c.size_bytes,
    ).order_by(instance.c.id)  # fmt: skip
    made = select(
        result.c.id, result.c.scan_id, result.c.file_name, result.c.sha256, result.c.purged_at
    ).order_by(result.c.id)  # fmt: skip
    with reading(engine) as conn:
        return (
            *(
                KeptFile("instance", one.id, one.scan_id, one.spool_name, one.sha256, one.purged_at, one.size_bytes)
                for one in conn.execute(received)
            ),
            *(
                KeptFile("result", one.id, one.scan_id, one.file_name, one.sha256, one.purged_at, None)
                for one in conn.execute(made)
            ),
        )


def patients_and_studies(engine: Engine) -> dict[int, tuple[str, str, str]]:
    """PatientID, its issuer and StudyInstanceUID of the row of each object that may be analysed, by the object's id:
    first versions only, for the row holds what was received first, and none of rows whose identity was forgotten."""
    wanted = (
        select(instance.c.id, scan.c.patient_id, scan.c.issuer_of_patient_id, scan.c.study_instance_uid)
        .join(scan, scan.c.id == instance.c.scan_id)
        .where(instance.c.version == 1, instance.c.candidate == 1, scan.c.forgotten_at.is_(None))
    )
    with reading(engine) as conn:
        return {one[0]: (one[1], one[2], one[3]) for one in conn.execute(wanted)}


def note_lost(engine: Engine, file: KeptFile, event: Loss) -> bool:
    """Write into a row's history that bytes it owns are gone or changed; True where this is news. A file that was
    purged in the meantime is no loss, and a loss is told once."""
    files = instance if file.kind == "instance" else result
    detail = f"{file.kind} sha256 {file.sha256}"
    with writing(engine) as conn:
        row = conn.execute(select(scan).where(scan.c.id == file.scan_id).with_for_update()).mappings().first()
        purged_at = conn.scalar(select(files.c.purged_at).where(files.c.id == file.id))
        if row is None or purged_at is not None or history.tells(conn, file.scan_id, event, detail):
            return False
        history.append(conn, file.scan_id, event, revision=row["revision"], detail=detail)
        return True


def damage(engine: Engine) -> tuple[str, ...]:
    """What SQLite finds wrong with its own file: pages, indexes, references; one sentence each. Other databases check
    themselves while they read."""
    if engine.dialect.name != "sqlite":
        return ()
    with reading(engine) as conn:
        found = [str(said) for said in conn.scalars(text("PRAGMA integrity_check(3)")) if said != "ok"]
        broken = conn.execute(text("PRAGMA foreign_key_check")).all()
    return (*found, *(f"a line of {one[0]} refers to one of {one[2]} that is not there" for one in broken))


def check(engine: Engine) -> tuple[str, ...]:
    """Faults of the database, one sentence each; empty when it is sound. The history has `verify_events`."""
    if not schema_is_current(engine):
        return ("the tables are not those of this version: run `remnant db upgrade`",)
    faults = [f"the database's file is damaged: {one}" for one in damage(engine)]
    with reading(engine) as conn:
        faults += [
            f"scan {scan_id} waits for a view without a deadline"
            for scan_id in conn.scalars(
                select(scan.c.id).where(scan.c.state == "receiving", scan.c.views_deadline.is_(None))
            )
        ]
        faults += [
            f"scan {scan_id} is at rest without the time since when"
            for scan_id in conn.scalars(select(scan.c.id).where(scan.c.state.in_(REST), scan.c.at_rest_since.is_(None)))
        ]
        faults += [
            f"scan {scan_id} has an identity that was to be forgotten"
            for scan_id in conn.scalars(
                select(scan.c.id).where(
                    scan.c.forgotten_at.is_not(None),
                    or_(scan.c.patient_id.is_not(None), scan.c.patient_name.is_not(None)),
                )
            )
        ]
    return tuple(faults)
