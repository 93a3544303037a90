"""Withdrawing results that were sent: which they are, and the one transaction that takes a row to `recalled`."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, func, select

from dicom_node.worklist.deliveries import NewResult, insert_delivery, insert_result, sent_there
from dicom_node.worklist.engine import reading, writing
from dicom_node.worklist.guard import Standing, change
from dicom_node.worklist.intake import KEY_OBJECT, cancel_deliveries
from dicom_node.worklist.states import TRANSITIONS, TransitionRefused
from dicom_node.worklist.tables import delivery, result, scan


@dataclass(frozen=True, slots=True)
class SentResult:
    """A result that destinations have, and that no earlier recall has withdrawn."""

    sop_instance_uid: str
    file_name: str
    sha256: str
    destinations: tuple[str, ...]


def sent_results(engine: Engine, scan_id: int) -> tuple[SentResult, ...]:
    """Every result of a row that a destination has, of any revision since its last recall."""
    with reading(engine) as conn:
        return _sent(conn, scan_id)


def _sent(conn: Connection, scan_id: int) -> tuple[SentResult, ...]:
    recalled = (
        select(func.coalesce(func.max(result.c.revision), 0))
        .where(result.c.scan_id == scan_id, result.c.kind == KEY_OBJECT)
        .scalar_subquery()
    )
    found = conn.execute(
        select(result.c.sop_instance_uid, result.c.file_name, result.c.sha256, delivery.c.destination)
        .join(delivery, delivery.c.result_id == result.c.id)
        .where(
            result.c.scan_id == scan_id,
            result.c.kind != KEY_OBJECT,
            result.c.revision > recalled,
            sent_there(),
        )
        .order_by(result.c.id, delivery.c.destination)
    ).all()
    by_uid: dict[str, SentResult] = {}
    for one in found:
        before = by_uid[one.sop_instance_uid].destinations if one.sop_instance_uid in by_uid else ()
        names = (*before, one.destination)
        by_uid[one.sop_instance_uid] = SentResult(one.sop_instance_uid, one.file_name, one.sha256, names)
    return tuple(by_uid.values())


def recall(
    engine: Engine,
    scan_id: int,
    *,
    withdrawn: Sequence[str],
    key_objects: Sequence[tuple[NewResult, Sequence[str]]],
    detail: str,
) -> None:
    """Take a row to `recalled` and send its key objects, whose bytes are durable, to the destinations beside them.

    `withdrawn` are the SOP Instance UIDs that they name. What was not sent yet is cancelled. The key objects stay to be
    sent although the row is at rest, and also when a retry opens a new revision.

    Raises
    ------
    TransitionRefused: nothing was sent, the row is being worked on, or more was sent meanwhile.
    """
    with writing(engine) as conn:
        row = conn.execute(select(scan).where(scan.c.id == scan_id).with_for_update()).mappings().first()
        if row is None:
            raise TransitionRefused(f"there is no scan {scan_id}", hint="see `remnant worklist list`")
        if (row["state"], "recalled") not in TRANSITIONS:
            raise TransitionRefused(f"scan {scan_id} is {row['state']} and cannot be recalled now", hint="wait for it")
        sent = _sent(conn, scan_id)
        if not sent:
            raise TransitionRefused(f"nothing was sent of scan {scan_id} that is not withdrawn already")
        under_way = conn.execute(
            select(delivery.c.id)
            .where(delivery.c.scan_id == scan_id, delivery.c.state == "pending", delivery.c.claimed_by.is_not(None))
            .limit(1)
        ).first()
        if under_way is not None or {one.sop_instance_uid for one in sent} != set(withdrawn):
            raise TransitionRefused(f"scan {scan_id} is just being sent", hint="give the command again in a moment")
        cancel_deliveries(conn, scan_id, row["revision"])
        for document, destinations in key_objects:
            result_id = insert_result(conn, scan_id, row["revision"], document)
            for name in destinations:
                insert_delivery(conn, scan_id, result_id, name)
        change(conn, Standing(scan_id, row["state"], row["revision"]), "recalled", "recalled", detail=detail)
