"""The worker's side: claim a row, keep its lease, finish it; and what happens to rows whose worker was lost.

A claim is one statement. A lease carries owner, boot and a counter that only a living worker moves; it is broken by who
has watched the counter stand still for `lease_s` of his own monotonic clock, never by comparing clocks. Whatever a
worker writes is guarded by its lease, so that one who was taken for dead changes nothing when he wakes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import Connection, Engine, RowMapping, func, or_, select, update

from dicom_node.whose import AcceptedIdentity
from dicom_node.worklist import history, identities
from dicom_node.worklist.clock import now, read_clock, seconds_between
from dicom_node.worklist.deliveries import NewResult, insert_delivery, insert_result, sent_there, settle
from dicom_node.worklist.engine import reading, writing
from dicom_node.worklist.guard import Lease, Standing, change
from dicom_node.worklist.intake import cancel_deliveries, fresh, identity_disputed
from dicom_node.worklist.states import REST, LeaseLost, TransitionRefused
from dicom_node.worklist.tables import delivery, instance, result, scan
from pipeline.reasons import REASONS

Outcome = Literal["analysed", "declined", "failed"]
Version = Literal["same_content", "identity_changed", "other_pixels"]

CLAIMS_CAP = 20
"""So many workers may be lost over one revision. After that the row is handed out with the reason `analysis_failed`,
for a note and without an analysis: a scan that kills its worker must not end in silence, which reads as "negative"."""

NOTE_CLAIMS = 3
"""So many workers may be lost over that note. Then the row is `failed` without one."""


@dataclass(frozen=True, slots=True)
class ClaimedInstance:
    """An object to analyse. `sha256` is that of the dataset bytes as received."""

    instance_id: int
    sop_class_uid: str
    sop_instance_uid: str
    spool_name: str
    sha256: str
    transfer_syntax_uid: str
    source_aet: str


@dataclass(frozen=True, slots=True)
class Predecessor:
    """A result of an earlier revision that at least one destination has; the new result replaces it."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    kind: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A row that this worker holds.

    Attributes
    ----------
    reason: set where there can be no finding (`view_missing`, `ambiguous_views`, `analysis_failed`, ...): make the
        note, analyse nothing.
    attempts: ended attempts of the analysis of this revision.
    analysed_at: when this revision was first claimed; a later claim of it gets the same time, so that it renders the
        same bytes.
    views: as in the worklist, "anterior,posterior".
    instances: in the order of their SOP Instance UIDs.
    accepted: whose the results are to be, where a person accepted another identity than the received one.
    """

    scan_id: int
    revision: int
    lease: Lease
    reason: str | None
    attempts: int
    analysed_at: str
    views: str
    study_instance_uid: str
    patient_id: str | None = field(repr=False)
    issuer_of_patient_id: str | None = field(repr=False)
    patient_name: str | None = field(repr=False)
    accession_number: str | None = field(repr=False)
    instances: tuple[ClaimedInstance, ...] = ()
    predecessors: tuple[Predecessor, ...] = ()
    accepted: AcceptedIdentity | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ObservedLease:
    """A lease as it stood when somebody looked. Two equal observations: no heartbeat in between."""

    scan_id: int
    owner: str
    boot: str
    counter: int


@dataclass(frozen=True, slots=True)
class PendingVersion:
    """Other bytes under a known SOP Instance UID, to be compared with those received first (`known_...`).

    Where `known_purged` is True those are gone: nothing can be called equal any longer.
    """

    instance_id: int
    scan_id: int
    sop_instance_uid: str
    spool_name: str
    sha256: str
    transfer_syntax_uid: str
    known_spool_name: str
    known_transfer_syntax_uid: str
    known_purged: bool


def claim(engine: Engine, owner: str, boot: str) -> Claim | None:
    """Take the row that has waited longest; None when nothing is due.

    `owner` names the worker's place (host and role), `boot` this life of it.
    """
    with writing(engine) as conn:
        due = (
            select(scan.c.id)
            .where(scan.c.state == "queued", or_(scan.c.not_before.is_(None), scan.c.not_before <= now()))
            .order_by(scan.c.received_at, scan.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .cte("due")
        )
        row = (
            conn.execute(
                update(scan)
                .where(scan.c.id.in_(select(due.c.id)), scan.c.state == "queued")
                .values(
                    state="analysing",
                    lease_owner=owner,
                    lease_boot=boot,
                    lease_counter=scan.c.lease_counter + 1,
                    claims=scan.c.claims + 1,
                    not_before=None,
                    analysed_at=func.coalesce(scan.c.analysed_at, now()),
                    updated_at=now(),
                )
                .returning(scan)
            )
            .mappings()
            .first()
        )
        if row is None:
            return None
        history.append(
            conn,
            row["id"],
            "claimed",
            revision=row["revision"],
            from_state="queued",
            to_state="analysing",
            detail=f"by {owner}, claim {row['claims']}",
        )
        return Claim(
            scan_id=row["id"],
            revision=row["revision"],
            lease=Lease(owner, boot, row["claims"]),
            reason=row["reason"],
            attempts=row["attempts"],
            analysed_at=row["analysed_at"],
            views=row["views"],
            study_instance_uid=row["study_instance_uid"],
            patient_id=row["patient_id"],
            issuer_of_patient_id=row["issuer_of_patient_id"],
            patient_name=row["patient_name"],
            accession_number=row["accession_number"],
            instances=_instances(conn, row["id"]),
            predecessors=_predecessors(conn, row),
            accepted=identities.accepted(conn, row),
        )


def _instances(conn: Connection, scan_id: int) -> tuple[ClaimedInstance, ...]:
    found = conn.execute(
        select(instance)
        .where(
            instance.c.scan_id == scan_id,
            instance.c.candidate == 1,
            instance.c.version == 1,
            instance.c.purged_at.is_(None),
        )
        .order_by(instance.c.sop_instance_uid)
    ).mappings()
    return tuple(_claimed(row) for row in found)


def _claimed(row: RowMapping) -> ClaimedInstance:
    return ClaimedInstance(
        instance_id=row["id"],
        sop_class_uid=row["sop_class_uid"],
        sop_instance_uid=row["sop_instance_uid"],
        spool_name=row["spool_name"],
        sha256=row["sha256"],
        transfer_syntax_uid=row["transfer_syntax_uid"],
        source_aet=row["source_aet"],
    )


def _predecessors(conn: Connection, row: RowMapping) -> tuple[Predecessor, ...]:
    """What a doctor may have seen of these views: the acknowledged results of the last revision that has any, of this
    row and of each row whose views it took."""
    sent = conn.execute(
        select(result, scan.c.study_instance_uid)
        .join(scan, scan.c.id == result.c.scan_id)
        .where(
            or_(
                (result.c.scan_id == row["id"]) & (result.c.revision < row["revision"]),
                result.c.successor_scan_id == row["id"],
            ),
            select(delivery.c.id).where(delivery.c.result_id == result.c.id, sent_there()).exists(),
        )
        .order_by(result.c.id)
    ).mappings()
    by_row: dict[int, list[RowMapping]] = {}
    for one in sent:
        by_row.setdefault(one["scan_id"], []).append(one)
    return tuple(
        Predecessor(
            one["sop_class_uid"],
            one["sop_instance_uid"],
            one["series_instance_uid"],
            identities.study_of_revision(conn, one["scan_id"], one["study_instance_uid"], one["revision"]),
            one["kind"],
        )
        for results in by_row.values()
        for one in results
        if one["revision"] == max(other["revision"] for other in results)
    )


def _standing(held: Claim) -> Standing:
    return Standing(held.scan_id, "analysing", held.revision, held.lease)


def heartbeat(engine: Engine, held: Claim) -> bool:
    """Say that the worker lives; False when it no longer holds the row."""
    with writing(engine) as conn:
        moved = conn.execute(
            update(scan)
            .where(
                scan.c.id == held.scan_id,
                scan.c.state == "analysing",
                scan.c.revision == held.revision,
                scan.c.lease_owner == held.lease.owner,
                scan.c.lease_boot == held.lease.boot,
                scan.c.claims == held.lease.claims,
            )
            .values(lease_counter=scan.c.lease_counter + 1)
        )
        return moved.rowcount == 1


def finish(
    engine: Engine,
    held: Claim,
    *,
    outcome: Outcome,
    reason: str | None = None,
    finding: str | None = None,
    probability: float | None = None,
    model: str | None = None,
    results: Sequence[NewResult] = (),
    deliveries: Sequence[tuple[str, str]] = (),
    last_error: str | None = None,
) -> str:
    """End the analysis; returns the state that the row is in then. The results' bytes are durable already.

    `deliveries` are pairs of a result's SOP Instance UID and a destination's name. Without results a row comes to rest
    at once, silently: only for a scan that is not ours, or where not even a note could be made. Without destinations it
    comes to rest with its results on the disk.

    Raises
    ------
    LeaseLost: the row is no longer held; nothing was written and the results must not be sent.
    ValueError: outcome, reason, finding and results do not fit together.
    """
    _check_answer(outcome, reason, finding, probability, results, deliveries)
    with writing(engine) as conn:
        to_state = "sending" if results else outcome
        standing = change(
            conn,
            _standing(held),
            to_state,
            "finished",
            detail=reason or finding or "",
            outcome=outcome,
            reason=reason,
            finding=finding,
            probability=probability,
            model=model,
            last_error=last_error,
            not_before=None,
        )
        if not results:
            return standing.state
        ids = {one.sop_instance_uid: insert_result(conn, held.scan_id, held.revision, one) for one in results}
        for sop_instance_uid, destination in deliveries:
            insert_delivery(conn, held.scan_id, ids[sop_instance_uid], destination)
        return settle(conn, held.scan_id) or standing.state


def _check_answer(
    outcome: str,
    reason: str | None,
    finding: str | None,
    probability: float | None,
    results: Sequence[NewResult],
    deliveries: Sequence[tuple[str, str]],
) -> None:
    if reason is not None and reason not in REASONS:
        raise ValueError(f"{reason!r} is not a reason of the closed list")
    if outcome == "analysed":
        if finding is None or probability is None or reason is not None or not results:
            raise ValueError("an analysed scan has a finding, a probability and results, and no reason")
    elif finding is not None or probability is not None or reason is None:
        raise ValueError(f"a scan that is {outcome} has a reason, and neither finding nor probability")
    if unknown := {uid for uid, _ in deliveries} - {one.sop_instance_uid for one in results}:
        raise ValueError(f"a delivery names a result that is not there: {sorted(unknown)}")


def try_again(engine: Engine, held: Claim, *, error: str, delay_s: float, max_attempts: int) -> str:
    """Record that an attempt of the analysis ended badly; returns the state that the row is in then.

    "queued": another attempt is due in `delay_s`. "analysing": that was the last one, the row is still held, and the
    caller finishes it as failed, with a note.
    """
    attempts = held.attempts + 1
    with writing(engine) as conn:
        if attempts < max_attempts:
            return change(
                conn,
                _standing(held),
                "queued",
                "try_later",
                detail=f"attempt {attempts} of {max_attempts}: {error}",
                attempts=attempts,
                last_error=error,
                not_before=now(delay_s),
            ).state
        kept = conn.execute(
            update(scan)
            .where(
                scan.c.id == held.scan_id,
                scan.c.state == "analysing",
                scan.c.revision == held.revision,
                scan.c.lease_owner == held.lease.owner,
                scan.c.lease_boot == held.lease.boot,
                scan.c.claims == held.lease.claims,
            )
            # With this reason on the row, a worker that is lost right now leaves a note to be made, not an analysis.
            .values(attempts=attempts, last_error=error, reason="analysis_failed", updated_at=now())
        )
        if kept.rowcount != 1:
            raise LeaseLost(f"scan {held.scan_id} is no longer held by this worker")
        detail = f"attempt {attempts} of {max_attempts}: {error}"
        history.append(conn, held.scan_id, "attempt_failed", revision=held.revision, detail=detail)
        return "analysing"


# --- workers that were lost -------------------------------------------------------------------------------------------


def release_owner(engine: Engine, owner: str, *, except_boot: str) -> int:
    """Requeue at once what earlier lives of this owner held; returns how many rows. Called when a worker starts."""
    with writing(engine) as conn:
        held = (
            conn.execute(
                select(scan)
                .where(scan.c.state == "analysing", scan.c.lease_owner == owner, scan.c.lease_boot != except_boot)
                .order_by(scan.c.id)
                .with_for_update(skip_locked=True)
            )
            .mappings()
            .all()
        )
        for row in held:
            _requeue(conn, row, "the worker ended without finishing")
        return len(held)


def observe_leases(engine: Engine) -> tuple[ObservedLease, ...]:
    """Every lease and where its counter stands."""
    with reading(engine) as conn:
        found = conn.execute(
            select(scan.c.id, scan.c.lease_owner, scan.c.lease_boot, scan.c.lease_counter)
            .where(scan.c.state == "analysing")
            .order_by(scan.c.id)
        )
        return tuple(ObservedLease(*row) for row in found)


def break_lease(engine: Engine, observed: ObservedLease) -> bool:
    """Requeue a row whose lease still stands as it was observed; False when it has moved or the row is not held."""
    with writing(engine) as conn:
        row = (
            conn.execute(
                select(scan)
                .where(
                    scan.c.id == observed.scan_id,
                    scan.c.state == "analysing",
                    scan.c.lease_owner == observed.owner,
                    scan.c.lease_boot == observed.boot,
                    scan.c.lease_counter == observed.counter,
                )
                .with_for_update()
            )
            .mappings()
            .first()
        )
        if row is None:
            return False
        _requeue(conn, row, "the worker's heartbeat stopped")
        return True


def _requeue(conn: Connection, row: RowMapping, why: str) -> None:
    """Back to the queue at once; with a cap, so that a scan which kills workers does not do so for ever."""
    lease = Lease(row["lease_owner"], row["lease_boot"], row["claims"])
    standing = Standing(row["id"], "analysing", row["revision"], lease)
    detail = f"{why} (claim {row['claims']})"
    if row["claims"] >= CLAIMS_CAP + NOTE_CLAIMS:
        change(
            conn,
            standing,
            "failed",
            "claims_used_up",
            detail=detail,
            outcome="failed",
            reason="analysis_failed",
            last_error=f"{row['claims']} workers were lost over this scan; no note could be made",
        )
    elif row["claims"] >= CLAIMS_CAP:
        change(
            conn,
            standing,
            "queued",
            "claims_used_up",
            detail=detail,
            reason="analysis_failed",
            last_error=f"{row['claims']} workers were lost over this scan",
        )
    else:
        change(conn, standing, "queued", "requeued", detail=detail)


def next_work_in_s(engine: Engine) -> float | None:
    """Seconds until something is due for the worker (a queued row, or versions to compare); None when nothing waits."""
    with reading(engine) as conn:
        if conn.execute(select(instance.c.id).where(instance.c.verdict == "pending").limit(1)).first():
            return 0.0
        if not conn.scalar(select(func.count()).select_from(scan).where(scan.c.state == "queued")):
            return None
        clock = read_clock(conn)
        due = conn.scalar(select(func.min(func.coalesce(scan.c.not_before, ""))).where(scan.c.state == "queued"))
        return max(0.0, seconds_between(clock, due)) if due else 0.0


# --- a person asks ----------------------------------------------------------------------------------------------------


def retry(engine: Engine, scan_id: int) -> int:
    """Analyse a row at rest once more, as a new revision; returns that revision.

    Raises
    ------
    TransitionRefused: the row is not at rest, nothing on it can be analysed, or its identity is disputed.
    """
    with writing(engine) as conn:
        row = conn.execute(select(scan).where(scan.c.id == scan_id).with_for_update()).mappings().first()
        if row is None:
            raise TransitionRefused(f"there is no scan {scan_id}", hint="see `remnant worklist list`")
        if row["state"] not in REST:
            raise TransitionRefused(
                f"scan {scan_id} is {row['state']}: it is still being worked on", hint="wait for it"
            )
        if identity_disputed(conn, scan_id):
            raise TransitionRefused(
                f"scan {scan_id} arrived with two identities, and a retry would choose one of them",
                hint=REASONS["identity_changed"].hint,
            )
        if not _instances(conn, scan_id):
            why = (
                "holds only objects that are never analysed"
                if row["kind"] == "kept"
                else "has no images left to analyse: they were removed by retention, or another row has them"
            )
            raise TransitionRefused(f"scan {scan_id} {why}", hint="nothing can be retried here")
        cancel_deliveries(conn, scan_id, row["revision"])
        return change(
            conn,
            Standing(scan_id, row["state"], row["revision"]),
            "queued",
            "retry",
            **(fresh() | {"reason": row["intake_reason"]}),
            revision=row["revision"] + 1,
        ).revision


# --- other bytes under a known UID ------------------------------------------------------------------------------------


def pending_versions(engine: Engine) -> tuple[PendingVersion, ...]:
    """Versions that nobody has compared yet, oldest first."""
    known = instance.alias("known")
    with reading(engine) as conn:
        pending = conn.execute(
            select(
                instance.c.id.label("instance_id"),
                instance.c.scan_id,
                instance.c.sop_instance_uid,
                instance.c.spool_name,
                instance.c.sha256,
                instance.c.transfer_syntax_uid,
                known.c.spool_name.label("known_spool_name"),
                known.c.transfer_syntax_uid.label("known_transfer_syntax_uid"),
                known.c.purged_at.is_not(None).label("known_purged"),
            )
            .join(known, (known.c.sop_instance_uid == instance.c.sop_instance_uid) & (known.c.version == 1))
            .where(instance.c.verdict == "pending")
            .order_by(instance.c.id)
        ).mappings()
        return tuple(PendingVersion(**row) for row in pending)


def judge_version(engine: Engine, instance_id: int, verdict: Version) -> None:
    """Write down what the comparison said. "identity_changed" stops the row: its unsent deliveries are cancelled and a
    person decides. "other_pixels" is an alarm and stays in quarantine. A verdict is written once.

    Raises
    ------
    TransitionRefused: there is no such version.
    """
    with writing(engine) as conn:
        scan_id = conn.scalar(select(instance.c.scan_id).where(instance.c.id == instance_id))
        if scan_id is None:
            raise TransitionRefused(f"there is no object {instance_id} to judge")
        row = conn.execute(select(scan).where(scan.c.id == scan_id).with_for_update()).mappings().one()
        judged = conn.execute(
            update(instance)
            .where(instance.c.id == instance_id, instance.c.verdict == "pending")
            .values(verdict=verdict)
            .returning(instance.c.sop_instance_uid, instance.c.version, instance.c.candidate)
        ).first()
        if judged is None:
            return
        detail = f"{judged.sop_instance_uid} version {judged.version}"
        event = "version_judged" if verdict == "same_content" else verdict
        if verdict != "identity_changed" or row["kind"] == "kept" or not judged.candidate:
            history.append(conn, scan_id, event, revision=row["revision"], detail=f"{detail}: {verdict}")
            return
        cancel_deliveries(conn, scan_id, row["revision"])
        if row["state"] == "failed":
            conn.execute(update(scan).where(scan.c.id == scan_id).values(reason="identity_changed", updated_at=now()))
            history.append(conn, scan_id, event, revision=row["revision"], detail=detail)
            return
        change(
            conn,
            Standing(scan_id, row["state"], row["revision"]),
            "failed",
            event,
            detail=detail,
            outcome="failed",
            reason="identity_changed",
            finding=None,
            probability=None,
            views_deadline=None,
            not_before=None,
        )
