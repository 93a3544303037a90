"""Storage Commitment on the sender's side: what an archive has stored, was asked about, and says that it keeps.

A delivery whose destination is asked stays "pending" until the archive has committed itself; `stored_at` says that it
has the object meanwhile, so that what replaces it names it. Every asking is a line of its own under its Transaction
UID: a report may come late, twice, or for an earlier asking, and counts each time for what it says.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from dicom_node.worklist import history
from dicom_node.worklist.clock import now
from dicom_node.worklist.deliveries import explain, hold_row_of, settle
from dicom_node.worklist.engine import writing
from dicom_node.worklist.tables import commitment, delivery, result

REASONS: Mapping[int, str] = {
    0x0110: "processing failure",
    0x0112: "it does not have the object",
    0x0119: "it knows the object under another SOP class",
    0x0122: "it commits itself to no object of this SOP class",
    0x0131: "it knows the transaction already",
    0x0213: "resource limitation",
}
"""Failure Reason (0008,1197) of a report: PS3.4 J.3.3.1.1, PS3.3 C.14.1.1."""

_FOR_GOOD = (0x0119, 0x0122)
DUPLICATE = 0x0111
"""Status of a C-STORE: the archive says that it has the object already; stored, once a commitment confirms it."""


@dataclass(frozen=True, slots=True)
class Reported:
    """What a report meant for one delivery: the row, the kind of object, the destination; `failure`: why it is not
    kept, as a phrase for the log, or ""."""

    scan_id: int
    revision: int
    kind: str
    destination: str
    failure: str


def record_stored(engine: Engine, delivery_id: int, *, status: int | None, warning: str = "") -> None:
    """Write down that the archive took the object of a delivery and has to commit itself to it; it is asked next.

    Raises
    ------
    TransitionRefused: there is no such delivery.
    """
    with writing(engine) as conn:
        scan_id, revision = hold_row_of(conn, delivery_id)
        stored = conn.execute(
            update(delivery)
            .where(delivery.c.id == delivery_id, delivery.c.state != "acknowledged")
            .values(
                stored_at=now(),
                attempts=delivery.c.attempts + 1,
                not_before=now(),
                claimed_by=None,
                last_status=status,
                last_error=warning or None,
                updated_at=now(),
            )
            .returning(delivery.c.destination)
        ).first()
        if stored is None:
            return
        said = " ".join((f"{stored.destination}:", *([] if status is None else [f"status {status:04X}"]), warning))
        history.append(conn, scan_id, "stored", revision=revision, detail=said.rstrip())
        explain(conn, scan_id, revision)


def stop_asking(engine: Engine, delivery_id: int) -> None:
    """Bring a stored delivery to rest without a commitment, because nobody asks for one any longer.

    One that the archive answered with 0111 is sent again instead: without a commitment nothing confirms that it has it.
    """
    with writing(engine) as conn:
        scan_id, revision = hold_row_of(conn, delivery_id)
        this = update(delivery).where(delivery.c.id == delivery_id, delivery.c.state == "pending")
        status = conn.scalar(select(delivery.c.last_status).where(delivery.c.id == delivery_id))
        if status == DUPLICATE:
            conn.execute(this.values(stored_at=None, claimed_by=None, not_before=now(), updated_at=now()))
            return
        known = conn.scalar(select(delivery.c.destination).where(delivery.c.id == delivery_id))
        conn.execute(this.values(state="acknowledged", claimed_by=None, last_error=_warning(status), updated_at=now()))
        said = f"{known}: acknowledged, without a commitment: it is asked for no longer"
        history.append(conn, scan_id, "delivery", revision=revision, detail=said)
        if settle(conn, scan_id) is None:
            explain(conn, scan_id, revision)


def _warning(status: int | None) -> str | None:
    """What stays on a row of the status with which an object was stored."""
    return f"stored, with a warning ({status:04X})" if status is not None and status >> 12 == 0xB else None


def ask_commitment(engine: Engine, delivery_ids: Sequence[int], transaction_uid: str, *, delay_s: float) -> None:
    """Write down an asking, before the archive hears of it; without a report it is due again in `delay_s`."""
    with writing(engine) as conn:
        asked = (
            conn.execute(
                update(delivery)
                .where(delivery.c.id.in_(delivery_ids), delivery.c.state == "pending")
                .values(attempts=delivery.c.attempts + 1, not_before=now(delay_s), claimed_by=None, updated_at=now())
                .returning(delivery.c.id)
            )
            .scalars()
            .all()
        )
        if asked:
            conn.execute(
                insert(commitment).values(transaction_uid=transaction_uid, asked_at=now()),
                [{"delivery_id": one} for one in asked],
            )


def record_unasked(engine: Engine, delivery_ids: Sequence[int], why: str) -> None:
    """Write down why the archive could not be asked; when it is asked again stands there since `ask_commitment`."""
    with writing(engine) as conn:
        for one in delivery_ids:
            scan_id, revision = hold_row_of(conn, one)
            conn.execute(
                update(delivery)
                .where(delivery.c.id == one, delivery.c.state == "pending")
                .values(last_error=why, updated_at=now())
            )
            explain(conn, scan_id, revision)


def record_report(
    engine: Engine,
    destinations: Sequence[str],
    transaction_uid: str,
    committed: AbstractSet[str],
    failed: Mapping[str, int],
    *,
    pause_s: Callable[[int], float],
) -> tuple[Reported, ...] | None:
    """Write down an archive's report; None where none of `destinations` was asked under this Transaction UID.

    `committed` and the keys of `failed` (-> Failure Reason) are SOP Instance UIDs. What the archive does not have is
    sent again after `pause_s(attempts)` seconds; what it will never keep needs a person. A report that was taken
    before, or of a delivery that is over, changes nothing, and objects that it does not name stay asked.
    """
    with writing(engine) as conn:
        asked = (
            conn.execute(
                select(
                    commitment.c.id,
                    commitment.c.delivery_id,
                    commitment.c.reported_at,
                    delivery.c.destination,
                    delivery.c.attempts,
                    delivery.c.last_status,
                    result.c.kind,
                    result.c.sop_instance_uid,
                )
                .join(delivery, delivery.c.id == commitment.c.delivery_id)
                .join(result, result.c.id == delivery.c.result_id)
                .where(commitment.c.transaction_uid == transaction_uid, delivery.c.destination.in_(destinations))
                .order_by(delivery.c.scan_id, delivery.c.id)
            )
            .mappings()
            .all()
        )
        if not asked:
            return None
        said = []
        for line in asked:
            uid = line["sop_instance_uid"]
            if line["reported_at"] is None and (uid in committed or uid in failed):
                reason = None if uid in committed else failed[uid]
                said.append(_take(conn, line, reason, pause_s))
        return tuple(one for one in said if one is not None)


def _take(conn: Connection, line: RowMapping, reason: int | None, pause_s: Callable[[int], float]) -> Reported | None:
    """What a report says about one delivery; None where another copy of it was faster."""
    scan_id, revision = hold_row_of(conn, line["delivery_id"])
    first = conn.execute(
        update(commitment)
        .where(commitment.c.id == line["id"], commitment.c.reported_at.is_(None))
        .values(reported_at=now(), failure_reason=reason)
    )
    if not first.rowcount:
        return None
    this = update(delivery).where(delivery.c.id == line["delivery_id"])
    failure = ""
    if reason is None:
        # Also of a delivery that is over: the archive has the object, whatever became of the row.
        warning = _warning(line["last_status"])
        conn.execute(this.values(state="acknowledged", claimed_by=None, last_error=warning, updated_at=now()))
    else:
        failure = f"not kept by the archive: {REASONS.get(reason, 'no reason we know')} ({reason:04X})"
        values = {"stored_at": None, "claimed_by": None, "last_error": failure, "updated_at": now()}
        if reason in _FOR_GOOD:
            values |= {"state": "refused"}
        else:
            values |= {"not_before": now(pause_s(line["attempts"]))}
        conn.execute(this.where(delivery.c.state == "pending").values(**values))
        conn.execute(this.where(delivery.c.state == "cancelled").values(stored_at=None, updated_at=now()))
    detail = f"{line['destination']}: {line['kind']} {failure}".strip()
    history.append(conn, scan_id, "not_committed" if failure else "committed", revision=revision, detail=detail)
    if settle(conn, scan_id) is None:
        explain(conn, scan_id, revision)
    return Reported(scan_id, revision, line["kind"], line["destination"], failure)
