"""Whose a row's scan is: as received, as an archive or a second sending has it, as a person accepted it.

The columns of `scan` keep what was received, because later views of the camera are joined by it. What results are made
for is `expected`: the identity that a person accepted last, else the received one. No event, log line or error text
holds a value; a person reads the values in `remnant worklist show`.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, func, select, update

from dicom_node.whose import AcceptedIdentity, Identity
from dicom_node.worklist.clock import now
from dicom_node.worklist.engine import reading, writing
from dicom_node.worklist.guard import Standing, change
from dicom_node.worklist.intake import cancel_deliveries, fresh, record_identity
from dicom_node.worklist.states import REST, TransitionRefused
from dicom_node.worklist.tables import identity, instance, scan


def received(row: RowMapping) -> Identity:
    """The identity of a row of `scan` as the camera sent it."""
    return Identity(
        study_instance_uid=row["study_instance_uid"],
        patient_id=row["patient_id"] or "",
        issuer_of_patient_id=row["issuer_of_patient_id"] or "",
        patient_name=row["patient_name"] or "",
        accession_number=row["accession_number"] or "",
    )


def accepted(conn: Connection, row: RowMapping) -> AcceptedIdentity | None:
    """The identity that a person accepted last for a row of `scan`; None where none was."""
    one = (
        conn.execute(
            select(identity)
            .where(identity.c.scan_id == row["id"], identity.c.accepted_revision.is_not(None))
            .order_by(identity.c.accepted_revision.desc())
            .limit(1)
        )
        .mappings()
        .first()
    )
    if one is None:
        return None
    series: Sequence[Any] = ()
    if one["study_instance_uid"] != row["study_instance_uid"]:
        series = _series_in(conn, row["id"], one["study_instance_uid"])
    return AcceptedIdentity(
        identity=_identity(one),
        origin=one["origin"],
        said_by=one["said_by"],
        received_from=row["source_aet"],
        accepted_at=one["settled_at"],
        series=tuple((each.sop_instance_uid, each.series_instance_uid) for each in series),
    )


def expected(conn: Connection, row: RowMapping) -> Identity:
    """Whose the results of a row of `scan` have to be."""
    one = accepted(conn, row)
    return received(row) if one is None else one.identity


def whose(engine: Engine, scan_id: int) -> Identity:
    """Whose a row is, as far as the worklist still knows: `expected`, by the row's id.

    Raises
    ------
    TransitionRefused: there is no such row.
    """
    with reading(engine) as conn:
        row = conn.execute(select(scan).where(scan.c.id == scan_id)).mappings().first()
        if row is None:
            raise TransitionRefused(f"there is no scan {scan_id}", hint="see `remnant worklist list`")
        return expected(conn, row)


def study_of_revision(conn: Connection, scan_id: int, received_in: str, revision: int) -> str:
    """The study in which the results of a revision stand."""
    study: str | None = conn.scalar(
        select(identity.c.study_instance_uid)
        .where(identity.c.scan_id == scan_id, identity.c.accepted_revision <= revision)
        .order_by(identity.c.accepted_revision.desc())
        .limit(1)
    )
    return study or received_in


def hold_identity(
    engine: Engine,
    scan_id: int,
    revision: int,
    *,
    destination: str,
    known: Sequence[Identity],
    differing: Sequence[str],
) -> bool:
    """Stop a row whose study an archive knows under another identity; False when it has gone on to another revision.

    Everything not yet sent, to any destination, is cancelled; the archive's values are kept for a person to compare.
    `differing` are keywords.
    """
    with writing(engine) as conn:
        row = conn.execute(select(scan).where(scan.c.id == scan_id).with_for_update()).mappings().one()
        if row["revision"] != revision or row["state"] not in {"sending", "recalled"}:
            return False
        conn.execute(
            update(identity)
            .where(
                identity.c.scan_id == scan_id,
                identity.c.origin == "archive",
                identity.c.said_by == destination,
                identity.c.settled_at.is_(None),
            )
            .values(settled_at=now())
        )
        for one in known:
            record_identity(conn, scan_id, one, origin="archive", said_by=destination)
        cancel_deliveries(conn, scan_id, revision, recalls=True)
        said = f"{destination} knows this study with another {', '.join(differing)}"
        change(
            conn,
            Standing(scan_id, row["state"], revision),
            "failed",
            "identity_changed",
            detail=said,
            outcome="failed",
            reason="identity_changed",
            finding=None,
            probability=None,
            last_error=said,
        )
        return True


def accept_identity(engine: Engine, scan_id: int, identity_id: int | None = None) -> int:
    """Make another identity of a row's scan the one its results are for, and analyse it again; returns the revision.

    `identity_id` chooses one where several are open.

    Raises
    ------
    TransitionRefused: the row is not at rest or has no images left, no other identity is open, or it must be chosen.
    """
    with writing(engine) as conn:
        row = conn.execute(select(scan).where(scan.c.id == scan_id).with_for_update()).mappings().first()
        if row is None:
            raise TransitionRefused(f"there is no scan {scan_id}", hint="see `remnant worklist list`")
        if row["state"] not in REST:
            raise TransitionRefused(f"scan {scan_id} is {row['state']}: it is still being worked on", hint="wait")
        if not _images(conn, scan_id):
            raise TransitionRefused(
                f"scan {scan_id} has no images left to analyse", hint="send them again from the camera or the archive"
            )
        chosen = _chosen(conn, scan_id, _open(conn, scan_id), identity_id)
        if chosen["study_instance_uid"] != row["study_instance_uid"]:
            there = {one.sop_instance_uid for one in _series_in(conn, scan_id, chosen["study_instance_uid"])}
            if there != _images(conn, scan_id):
                raise TransitionRefused(
                    f"identity {chosen['id']} is of another study, and not every image of scan {scan_id} came with it",
                    hint="send the other views of that study too, then accept it",
                )
        revision = int(row["revision"]) + 1
        conn.execute(
            update(identity)
            .where(identity.c.scan_id == scan_id, identity.c.settled_at.is_(None))
            .values(settled_at=now())
        )
        conn.execute(update(identity).where(identity.c.id == chosen["id"]).values(accepted_revision=revision))
        cancel_deliveries(conn, scan_id, row["revision"])
        return change(
            conn,
            Standing(scan_id, row["state"], row["revision"]),
            "queued",
            "identity_accepted",
            detail=f"identity {chosen['id']}, as {chosen['said_by']} has it ({chosen['origin']})",
            **(fresh() | {"reason": row["intake_reason"]}),
            revision=revision,
        ).revision


def _identity(one: RowMapping) -> Identity:
    return Identity(
        study_instance_uid=one["study_instance_uid"],
        patient_id=one["patient_id"],
        issuer_of_patient_id=one["issuer_of_patient_id"],
        patient_name=one["patient_name"],
        accession_number=one["accession_number"],
        patient_birth_date=one["patient_birth_date"],
        patient_sex=one["patient_sex"],
    )


def _open(conn: Connection, scan_id: int) -> Sequence[RowMapping]:
    """What nobody has decided about yet; a second sending counts once its content was compared."""
    return (
        conn.execute(
            select(identity)
            .outerjoin(instance, instance.c.id == identity.c.instance_id)
            .where(
                identity.c.scan_id == scan_id,
                identity.c.settled_at.is_(None),
                (identity.c.origin == "archive") | (instance.c.verdict == "identity_changed"),
            )
            .order_by(identity.c.id)
        )
        .mappings()
        .all()
    )


def _chosen(conn: Connection, scan_id: int, candidates: Sequence[RowMapping], identity_id: int | None) -> RowMapping:
    if not candidates:
        raise TransitionRefused(
            f"scan {scan_id} has no other identity that could be accepted",
            hint=f"see `remnant worklist show {scan_id}`",
        )
    numbers = ", ".join(str(one["id"]) for one in candidates)
    if identity_id is None:
        if len({_identity(one) for one in candidates}) > 1:
            raise TransitionRefused(
                f"scan {scan_id} is known under several other identities: {numbers}",
                hint=f"compare them with `remnant worklist show {scan_id}`, then give --identity NUMBER",
            )
        return candidates[-1]
    for one in candidates:
        if one["id"] == identity_id:
            return one
    raise TransitionRefused(f"{identity_id} is no open identity of scan {scan_id}; open are {numbers}")


def _images(conn: Connection, scan_id: int) -> set[str]:
    return set(
        conn.scalars(
            select(instance.c.sop_instance_uid).where(
                instance.c.scan_id == scan_id,
                instance.c.candidate == 1,
                instance.c.version == 1,
                instance.c.purged_at.is_(None),
            )
        )
    )


def _series_in(conn: Connection, scan_id: int, study_instance_uid: str) -> Sequence[Any]:
    """(SOP Instance UID, Series Instance UID) of a row's images as they came under another study."""
    newest = func.max(instance.c.version).label("version")
    each = (
        select(instance.c.sop_instance_uid, newest)
        .where(
            instance.c.scan_id == scan_id,
            instance.c.candidate == 1,
            instance.c.study_instance_uid == study_instance_uid,
            instance.c.verdict == "identity_changed",
        )
        .group_by(instance.c.sop_instance_uid)
        .subquery()
    )
    return conn.execute(
        select(instance.c.sop_instance_uid, instance.c.series_instance_uid)
        .join(
            each,
            (each.c.sop_instance_uid == instance.c.sop_instance_uid) & (each.c.version == instance.c.version),
        )
        .order_by(instance.c.sop_instance_uid)
    ).all()
