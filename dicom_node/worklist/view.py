"""Reading the worklist: what the commands and the status page show. Nothing here changes anything.

`rows` gives the columns of the view `worklist`, which is a contract with other people's scripts; the JSON columns come
as Python values. Everything is fetched before a function returns, so that no reader holds a transaction open.
"""

import json
from typing import Any

from sqlalchemy import Engine, RowMapping, column, func, select, table

from dicom_node.worklist.engine import reading
from dicom_node.worklist.states import QUARANTINED, STATES, TransitionRefused
from dicom_node.worklist.tables import VIEW_COLUMNS, delivery, identity, instance, result, scan

_view = table("worklist", *(column(name) for name in VIEW_COLUMNS))

_INSTANCE_COLUMNS = (
    "id",
    "sop_class_uid",
    "sop_instance_uid",
    "series_instance_uid",
    "transfer_syntax_uid",
    "sha256",
    "size_bytes",
    "spool_name",
    "reason",
    "version",
    "verdict",
    "source_aet",
    "received_at",
    "purged_at",
)
_RESULT_COLUMNS = (
    "id",
    "revision",
    "kind",
    "variant",
    "sop_class_uid",
    "sop_instance_uid",
    "series_instance_uid",
    "sha256",
    "file_name",
    "created_at",
    "purged_at",
)
_DELIVERY_COLUMNS = (
    "id",
    "result_id",
    "destination",
    "state",
    "attempts",
    "not_before",
    "last_status",
    "last_error",
    "first_tried_at",
    "updated_at",
)
_IDENTITY_COLUMNS = (
    "id",
    "origin",
    "said_by",
    "patient_id",
    "issuer_of_patient_id",
    "patient_name",
    "accession_number",
    "patient_birth_date",
    "patient_sex",
    "study_instance_uid",
    "seen_at",
    "settled_at",
    "accepted_revision",
)


def rows(
    engine: Engine, *, state: str | None = None, limit: int = 100, after: int | None = None
) -> list[dict[str, Any]]:
    """Lines of the view: the newest `limit`, newest first; or the first `limit` above the id `after`, in order."""
    wanted = select(_view)
    if state is not None:
        wanted = wanted.where(_view.c.state == state)
    if after is None:
        wanted = wanted.order_by(_view.c.id.desc())
    else:
        wanted = wanted.where(_view.c.id > after).order_by(_view.c.id)
    with reading(engine) as conn:
        return [_line(one) for one in conn.execute(wanted.limit(limit)).mappings()]


def row(engine: Engine, scan_id: int) -> dict[str, Any]:
    """One line of the view.

    Raises
    ------
    TransitionRefused: there is no such row.
    """
    with reading(engine) as conn:
        found = conn.execute(select(_view).where(_view.c.id == scan_id)).mappings().first()
    if found is None:
        raise TransitionRefused(f"there is no scan {scan_id}", hint="see `remnant worklist list`")
    return _line(found)


def scan_of(engine: Engine, sop_instance_uid: str) -> int | None:
    """The id of the row on which a received object hangs; None where it was never received."""
    with reading(engine) as conn:
        found: int | None = conn.scalar(
            select(instance.c.scan_id)
            .where(instance.c.sop_instance_uid == sop_instance_uid)
            .order_by(instance.c.version)
        )
        return found


def details(engine: Engine, scan_id: int) -> dict[str, list[dict[str, Any]]]:
    """What hangs on a row: `instances` (received), `results` (made), `deliveries` (sent, with the SOP Instance UID of
    the result), `identities` (others that an archive or a second sending names; id 0 is the received one, there where
    another is), each oldest first, all revisions. Empty lists for a row that is not there."""
    received = select(*(instance.c[name] for name in _INSTANCE_COLUMNS))
    made = select(*(result.c[name] for name in _RESULT_COLUMNS))
    sent = select(*(delivery.c[name] for name in _DELIVERY_COLUMNS), result.c.sop_instance_uid, result.c.revision).join(
        result, result.c.id == delivery.c.result_id
    )
    parts = {"instances": (received, instance), "results": (made, result), "deliveries": (sent, delivery)}
    others = select(*(identity.c[name] for name in _IDENTITY_COLUMNS)).where(identity.c.scan_id == scan_id)
    ours = ("patient_id", "issuer_of_patient_id", "patient_name", "accession_number", "study_instance_uid")
    with reading(engine) as conn:
        found = {
            part: [
                dict(one)
                for one in conn.execute(wanted.where(source.c.scan_id == scan_id).order_by(source.c.id)).mappings()
            ]
            for part, (wanted, source) in parts.items()
        }
        named = [dict(one) for one in conn.execute(others.order_by(identity.c.id)).mappings()]
        if named:
            row_itself = conn.execute(select(scan).where(scan.c.id == scan_id)).mappings().one()
            first: dict[str, Any] = dict.fromkeys(_IDENTITY_COLUMNS)
            first |= {name: row_itself[name] for name in ours}
            first |= {"id": 0, "origin": "received", "said_by": row_itself["source_aet"]}
            named.insert(0, first)
        return {**found, "identities": named}


def quarantined(engine: Engine) -> list[dict[str, Any]]:
    """Objects that are kept and not used, because they came under the UID of another; oldest first, without identity.
    Columns of `instances` in `details`, and `scan_id`."""
    wanted = (
        select(instance.c.scan_id, *(instance.c[name] for name in _INSTANCE_COLUMNS))
        .where(instance.c.verdict.in_(QUARANTINED), instance.c.purged_at.is_(None))
        .order_by(instance.c.id)
    )
    with reading(engine) as conn:
        return [dict(one) for one in conn.execute(wanted).mappings()]


def counts_by_state(engine: Engine) -> dict[str, int]:
    """How many rows are in each state; every state is named, also with 0."""
    with reading(engine) as conn:
        grouped = conn.execute(select(scan.c.state, func.count().label("held")).group_by(scan.c.state))
        counted: dict[str, int] = {one.state: one.held for one in grouped}
    return {state: counted.get(state, 0) for state in STATES}


def _line(one: RowMapping) -> dict[str, Any]:
    line = dict(one)
    line["results"] = json.loads(line["results"])
    line["delivered_to"] = json.loads(line["delivered_to"])
    return line
