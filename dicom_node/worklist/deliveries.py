"""The sender's side: which object goes where, what became of it, and when a row comes to rest.

Taking a delivery pushes its `not_before` into the future instead of locking anything: a sender that dies is followed by
another when the hold ends, or at once by its own next life. At least once, the same bytes under the same UID.
"""

from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import ColumnElement, Connection, Engine, case, func, insert, or_, select, update

from dicom_node.whose import Identity
from dicom_node.worklist import history, identities
from dicom_node.worklist.clock import now, read_clock, seconds_between
from dicom_node.worklist.engine import reading, writing
from dicom_node.worklist.guard import Standing, change
from dicom_node.worklist.states import TransitionRefused
from dicom_node.worklist.tables import delivery, result, scan

DeliveryEnd = Literal["acknowledged", "refused", "pending", "given_up"]


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """An object to send to the destination that was asked for.

    `attempts` counts the ended tries, `first_tried_at` is this try's time for the first, `tried_for_s` the seconds
    since then by the database's clock: what `give_up_after_days` is compared with. `stored_at`: since when the archive
    has the object, and only has to commit itself. `whose`: the identity that the object has to have at the destination.
    """

    id: int
    scan_id: int
    revision: int
    kind: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    file_name: str
    sha256: str
    attempts: int
    first_tried_at: str
    tried_for_s: float
    stored_at: str | None
    study_instance_uid: str
    whose: Identity = field(repr=False)


def sent_there() -> ColumnElement[bool]:
    """A delivery whose destination has the object, also where it has not committed itself to keep it."""
    return or_(delivery.c.state == "acknowledged", delivery.c.stored_at.is_not(None))


@dataclass(frozen=True, slots=True)
class NewResult:
    """A result object whose bytes are durable under `file_name`."""

    kind: str
    variant: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    sha256: str
    file_name: str


def insert_result(conn: Connection, scan_id: int, revision: int, one: NewResult) -> int:
    return int(
        conn.execute(
            insert(result)
            .values(
                scan_id=scan_id,
                revision=revision,
                kind=one.kind,
                variant=one.variant,
                sop_class_uid=one.sop_class_uid,
                sop_instance_uid=one.sop_instance_uid,
                series_instance_uid=one.series_instance_uid,
                sha256=one.sha256,
                file_name=one.file_name,
                created_at=now(),
            )
            .returning(result.c.id)
        ).scalar_one()
    )


def insert_delivery(conn: Connection, scan_id: int, result_id: int, destination: str) -> int:
    return int(
        conn.execute(
            insert(delivery)
            .values(
                result_id=result_id,
                scan_id=scan_id,
                destination=destination,
                state="pending",
                attempts=0,
                not_before=now(),
                updated_at=now(),
            )
            .returning(delivery.c.id)
        ).scalar_one()
    )


def due_deliveries(
    engine: Engine, destination: str, *, owner: str, limit: int, hold_s: float
) -> tuple[DueDelivery, ...]:
    """Take up to `limit` deliveries due at one destination, oldest first; nobody else gets them for `hold_s`."""
    with writing(engine) as conn:
        due = (
            select(delivery.c.id)
            .where(delivery.c.destination == destination, delivery.c.state == "pending", delivery.c.not_before <= now())
            .order_by(delivery.c.not_before, delivery.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .cte("due")
        )
        taken = (
            conn.execute(
                update(delivery)
                .where(delivery.c.id.in_(select(due.c.id)), delivery.c.state == "pending")
                .values(
                    not_before=now(hold_s),
                    claimed_by=owner,
                    first_tried_at=func.coalesce(delivery.c.first_tried_at, now()),
                    updated_at=now(),
                )
                .returning(delivery.c.id)
            )
            .scalars()
            .all()
        )
        clock = read_clock(conn)
        found = conn.execute(
            select(
                delivery.c.id,
                delivery.c.scan_id,
                result.c.revision,
                result.c.kind,
                result.c.sop_class_uid,
                result.c.sop_instance_uid,
                result.c.series_instance_uid,
                result.c.file_name,
                result.c.sha256,
                delivery.c.attempts,
                delivery.c.first_tried_at,
                delivery.c.stored_at,
                scan.c.study_instance_uid,
            )
            .join(result, result.c.id == delivery.c.result_id)
            .join(scan, scan.c.id == delivery.c.scan_id)
            .where(delivery.c.id.in_(taken))
            .order_by(delivery.c.id)
        ).mappings()
        lines = found.all()
        rows = conn.execute(select(scan).where(scan.c.id.in_({line["scan_id"] for line in lines}))).mappings().all()
        whose = {row["id"]: identities.expected(conn, row) for row in rows}
        return tuple(
            DueDelivery(
                **line,
                tried_for_s=max(0.0, seconds_between(line["first_tried_at"], clock)),
                whose=whose[line["scan_id"]],
            )
            for line in lines
        )


def release_deliveries(engine: Engine, owner: str) -> int:
    """Make due again at once what an earlier life of this sender had taken; returns how many."""
    with writing(engine) as conn:
        return conn.execute(
            update(delivery)
            .where(delivery.c.state == "pending", delivery.c.claimed_by == owner)
            .values(not_before=now(), claimed_by=None, updated_at=now())
        ).rowcount


def record_delivery(
    engine: Engine,
    delivery_id: int,
    *,
    state: DeliveryEnd,
    status: int | None = None,
    error: str | None = None,
    delay_s: float = 0.0,
) -> None:
    """Write down how a try ended. "pending": try again in `delay_s`; everything else is at rest, and the row settles
    when all its deliveries are. An acknowledgement is always recorded, even of a delivery cancelled meanwhile: the
    destination has the object, and what replaces it must say so.

    Raises
    ------
    TransitionRefused: there is no such delivery.
    """
    with writing(engine) as conn:
        scan_id, revision = hold_row_of(conn, delivery_id)
        before = ("pending", "cancelled", "refused", "given_up") if state == "acknowledged" else ("pending",)
        recorded = conn.execute(
            update(delivery)
            .where(delivery.c.id == delivery_id, delivery.c.state.in_(before))
            .values(
                state=state,
                attempts=delivery.c.attempts + 1,
                not_before=now(delay_s),
                claimed_by=None,
                last_status=status,
                last_error=error,
                updated_at=now(),
            )
            .returning(delivery.c.destination)
        ).first()
        if recorded is None:
            return
        if state == "pending":
            explain(conn, scan_id, revision)
            return
        said = "" if status is None else f" status {status:04X}"
        history.append(
            conn,
            scan_id,
            "delivery",
            revision=revision,
            detail=f"{recorded.destination}: {state}{said} {error or ''}".strip(),
        )
        settle(conn, scan_id)


def stored_results(engine: Engine, scan_id: int, revision: int) -> tuple[NewResult, ...]:
    """Return the result objects of a revision whose bytes are still there, oldest first."""
    with reading(engine) as conn:
        found = conn.execute(
            select(
                result.c.kind,
                result.c.variant,
                result.c.sop_class_uid,
                result.c.sop_instance_uid,
                result.c.series_instance_uid,
                result.c.sha256,
                result.c.file_name,
            )
            .where(result.c.scan_id == scan_id, result.c.revision == revision, result.c.purged_at.is_(None))
            .order_by(result.c.id)
        ).mappings()
        return tuple(NewResult(**row) for row in found)


def substitute_delivery(
    engine: Engine,
    delivery_id: int,
    replacement: NewResult,
    *,
    status: int | None = None,
    why: str = "not taken, another goes instead",
) -> int:
    """Send another object instead, to a destination that does not take this one; returns that delivery's id.

    The next object of the fallback chain, its bytes durable already. A second destination that needs the same object
    shares its result; a destination that gets the other object anyway keeps that one delivery, and the row rests if it
    was the last. `status` is what the destination said, `why` a phrase for the row, its history and a person.

    Raises
    ------
    TransitionRefused: there is no such delivery, it is at rest already, or its row has gone on to another revision.
    """
    with writing(engine) as conn:
        scan_id, revision = hold_row_of(conn, delivery_id)
        standing = conn.execute(select(scan.c.state, scan.c.revision).where(scan.c.id == scan_id)).one()
        if standing.state != "sending" or standing.revision != revision:
            raise TransitionRefused(f"scan {scan_id} no longer sends revision {revision}")
        said = f"{why}: {replacement.kind} {replacement.sop_instance_uid}"
        replaced = conn.execute(
            update(delivery)
            .where(delivery.c.id == delivery_id, delivery.c.state == "pending")
            .values(
                state="cancelled",
                attempts=delivery.c.attempts + 1,
                claimed_by=None,
                last_status=status,
                last_error=said,
                updated_at=now(),
            )
            .returning(delivery.c.destination)
        ).first()
        if replaced is None:
            raise TransitionRefused(f"delivery {delivery_id} is at rest already")
        result_id = conn.scalar(
            select(result.c.id).where(
                result.c.sop_instance_uid == replacement.sop_instance_uid, result.c.sha256 == replacement.sha256
            )
        ) or insert_result(conn, scan_id, revision, replacement)
        history.append(conn, scan_id, "substituted", revision=revision, detail=f"{replaced.destination}: {said}")
        known = conn.scalar(
            select(delivery.c.id).where(
                delivery.c.result_id == result_id, delivery.c.destination == replaced.destination
            )
        )
        if known is None:
            explain(conn, scan_id, revision)
            return insert_delivery(conn, scan_id, result_id, replaced.destination)
        if settle(conn, scan_id) is None:
            explain(conn, scan_id, revision)
        return int(known)


def hold_row_of(conn: Connection, delivery_id: int) -> tuple[int, int]:
    """Lock a delivery's row before the delivery, always in this order; returns (scan id, revision of the result)."""
    found = conn.execute(
        select(delivery.c.scan_id, result.c.revision)
        .join(result, result.c.id == delivery.c.result_id)
        .where(delivery.c.id == delivery_id)
    ).first()
    if found is None:
        raise TransitionRefused(f"there is no delivery {delivery_id}")
    conn.execute(select(scan.c.id).where(scan.c.id == found.scan_id).with_for_update())
    return found.scan_id, found.revision


def settle(conn: Connection, scan_id: int) -> str | None:
    """Bring a row to rest that has nothing outstanding any longer; returns its state then, None if nothing changed."""
    row = conn.execute(select(scan).where(scan.c.id == scan_id).with_for_update()).mappings().one()
    if row["state"] != "sending":
        return None
    states = set(
        conn.execute(
            select(delivery.c.state)
            .join(result, result.c.id == delivery.c.result_id)
            .where(delivery.c.scan_id == scan_id, result.c.revision == row["revision"])
        ).scalars()
    )
    if "pending" in states:
        return None
    if states & {"refused", "given_up"}:
        to_state = "failed"
    else:
        to_state = {"analysed": "delivered", "declined": "declined", "failed": "failed"}[row["outcome"]]
    change(conn, Standing(scan_id, "sending", row["revision"]), to_state, "settled", detail=", ".join(sorted(states)))
    explain(conn, scan_id, row["revision"])
    return to_state


def explain(conn: Connection, scan_id: int, revision: int) -> None:
    """Put on the row why a good answer has not arrived, or not without a warning: the admin reads the row first.

    The worst of its deliveries speaks: refused, given up, tried in vain, acknowledged with a warning, and last the one
    in whose place a simpler object went (of several in a chain, the last). What the analysis itself had to say (a
    failure, the detail of a reason) stays, unless the note about it cannot be delivered either.
    """
    row = conn.execute(select(scan.c.revision, scan.c.outcome).where(scan.c.id == scan_id)).one()
    if row.revision != revision or row.outcome == "failed":
        return
    weight = case({"refused": 0, "given_up": 1, "pending": 2, "acknowledged": 3}, value=delivery.c.state, else_=4)
    order = case((delivery.c.state == "cancelled", -delivery.c.id), else_=delivery.c.id)
    worst = conn.execute(
        select(
            delivery.c.destination,
            delivery.c.state,
            delivery.c.last_status,
            delivery.c.last_error,
            delivery.c.stored_at,
        )
        .join(result, result.c.id == delivery.c.result_id)
        .where(
            delivery.c.scan_id == scan_id,
            result.c.revision == revision,
            delivery.c.last_error.is_not(None),
        )
        .order_by(weight, order)
    ).first()
    said = None
    if worst is not None:
        status = "" if worst.last_status is None else f" with status {worst.last_status:04X}"
        labels = {"pending": "will be tried again", "cancelled": "substituted"}
        label = labels.get(worst.state, worst.state.replace("_", " "))
        if worst.state == "pending" and worst.stored_at is not None:
            label = "stored, waits for Storage Commitment"
        said = f"{worst.destination}: {label}{status}: {worst.last_error}"
    if row.outcome == "analysed" or (worst is not None and worst.state in ("refused", "given_up")):
        conn.execute(update(scan).where(scan.c.id == scan_id).values(last_error=said))


def next_delivery_in_s(engine: Engine, destination: str) -> float | None:
    """Seconds until a delivery is due at a destination; None when nothing waits for it."""
    with reading(engine) as conn:
        due = conn.scalar(
            select(func.min(delivery.c.not_before)).where(
                delivery.c.destination == destination, delivery.c.state == "pending"
            )
        )
        return None if due is None else max(0.0, seconds_between(read_clock(conn), due))
