"""What a received object means for the rows: one transaction from the durable bytes to the row that owns them.

Objects arrive in any order and from several associations at once. Which views belong together is decided by
`pipeline.views.group`, a pure function of everything received so far of this patient and study, so that the outcome
does not depend on the order of arrival. Nothing here decides by guessing: what the rule calls ambiguous becomes a row
that says so.

Nothing received is ever overwritten. The same bytes again change nothing; other bytes under a known SOP Instance UID
(PS3.5 section 9 forbids them, the field has them) are kept beside the first until the worker has compared the two.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, bindparam, exists, insert, select, update

from dicom_node.whose import Identity
from dicom_node.worklist import history
from dicom_node.worklist.clock import now, parse, read_clock, text_of
from dicom_node.worklist.engine import INTAKE_LOCK, lock, straight, writing
from dicom_node.worklist.guard import Standing, change
from dicom_node.worklist.states import NEW, QUARANTINED, REST, TransitionRefused
from dicom_node.worklist.tables import delivery, identity, instance, result, scan
from pipeline.finding import ViewName
from pipeline.views import FrameFacts, HeaderFacts, group

NM_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.20"

KEY_OBJECT = "kos"
"""The kind of a result that withdraws others."""

# Statements that every object needs are put together once: that takes SQLAlchemy longer than SQLite takes to run them.
# What the tables know of an object before it is entered; the time; always one row.
_HEARD_OF = select(
    now().label("at"),
    exists().where(instance.c.sop_instance_uid == bindparam("uid")).label("known"),
    select(result.c.scan_id).where(result.c.sop_instance_uid == bindparam("uid")).scalar_subquery().label("made_by"),
    exists().where(scan.c.study_instance_uid == bindparam("study")).label("of_study"),
)
_NEW_SCAN = (
    insert(scan).values(received_at=now(), updated_at=now(), attempts=0, claims=0, lease_counter=0).returning(scan.c.id)
)
_NOTHING_YET = {"outcome": None, "reason": None, "intake_reason": None, "views_deadline": None, "at_rest_since": None}
_NEW_INSTANCE = insert(instance).values(received_at=now()).returning(instance.c.id)
_STATE = select(scan.c.state).where(scan.c.id == bindparam("row"))
_PATIENTS = (
    select(scan.c.patient_id)
    .where(scan.c.study_instance_uid == bindparam("study"), scan.c.patient_id.is_not(None))
    .distinct()
)
_OF_PATIENT_AND_STUDY = (
    (scan.c.study_instance_uid == bindparam("study"))
    & (scan.c.patient_id == bindparam("patient"))
    & (scan.c.issuer_of_patient_id == bindparam("issuer"))
)
_KEPT_ROW = select(scan).where(scan.c.kind == "kept", _OF_PATIENT_AND_STUDY).with_for_update()
_KEEP = (
    update(scan)
    .where(scan.c.id == bindparam("row"))
    .values(reason=bindparam("why"), updated_at=now(), at_rest_since=now(), purged_at=None)
)
_CLUSTER = select(scan).where(scan.c.kind == "acquisition", _OF_PATIENT_AND_STUDY).order_by(scan.c.id).with_for_update()
# Purged ones may not be joined any more: their pixels are gone, a late partner stands alone.
_MEMBERS = (
    select(instance)
    .where(
        instance.c.scan_id.in_(bindparam("rows", expanding=True)),
        instance.c.candidate == 1,
        instance.c.version == 1,
        instance.c.purged_at.is_(None),
    )
    .order_by(instance.c.id)
)
_MOVE = (
    update(instance)
    .where(instance.c.sop_instance_uid.in_(bindparam("uids", expanding=True)), instance.c.scan_id != bindparam("row"))
    .values(scan_id=bindparam("row"))
    .returning(instance.c.id)
)
_MOVE_IDENTITIES = (
    update(identity)
    .where(identity.c.instance_id.in_(bindparam("moved", expanding=True)))
    .values(scan_id=bindparam("row"), settled_at=None, accepted_revision=None)
)
_DISPUTED = (
    select(instance.c.id)
    .where(
        instance.c.scan_id == bindparam("row"),
        instance.c.verdict == "identity_changed",
        instance.c.candidate == 1,
        ~select(identity.c.id)
        .where(identity.c.instance_id == instance.c.id, identity.c.settled_at.is_not(None))
        .exists(),
    )
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class IntakeRules:
    """When views make a whole. `timezone` reads acquisition times of headers without an offset; None: the system's."""

    require_views: Sequence[ViewName]
    pair_window_s: float
    views_timeout_s: float
    timezone: tzinfo | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the durable bytes of an object are: name in the spool, SHA-256 (hex) and size of the dataset."""

    spool_name: str
    sha256: str
    size_bytes: int
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a received object.

    `new` is False for bytes that were here before; `queued` is True where the worker has something to do; `alarms` are
    tokens of `history.EVENTS` that a person should hear of.
    """

    scan_id: int
    state: str
    new: bool
    queued: bool
    alarms: tuple[str, ...] = ()


def receive(
    engine: Engine,
    facts: HeaderFacts,
    stored: Stored,
    *,
    source_aet: str,
    rules: IntakeRules,
    adopted: bool = False,
    settle: Callable[[], None] = lambda: None,
) -> Receipt:
    """Enter an object into the worklist; when this returns, it is committed. `adopted`: it was found in the spool
    without a row, which its history then says. `settle`: called before anything is committed; returns when the object
    is durable.

    Raises
    ------
    DatabaseUnavailable, or what `settle` raises: nothing was entered; the sender must keep its copy.
    """
    facts = storable(facts)
    source_aet = _clean(source_aet)
    with writing(engine) as conn:
        lock(conn, INTAKE_LOCK)
        receipt = _enter(conn, facts, stored, source_aet, rules)
        if adopted and receipt.new:
            detail = f"{facts.sop_instance_uid} sha256 {stored.sha256}"
            history.append(conn, receipt.scan_id, "adopted", detail=detail)
        settle()
        return receipt


def _enter(conn: Connection, facts: HeaderFacts, stored: Stored, source_aet: str, rules: IntakeRules) -> Receipt:
    asked = {"uid": facts.sop_instance_uid, "study": facts.study_instance_uid}
    at, is_known, made_by, of_study = straight(conn, _HEARD_OF, asked)
    known = _known(conn, facts.sop_instance_uid) if is_known else ()
    for row in known:
        if row["sha256"] == stored.sha256:
            return Receipt(row["scan_id"], _state(conn, row["scan_id"]), new=False, queued=False)
    if known:
        return _receive_version(conn, facts, stored, source_aet, known)
    if made_by is not None:
        return _receive_returned(conn, facts, stored, source_aet, made_by)
    if of_study:
        return _join(conn, facts, stored, source_aet, rules)
    return _begin(conn, facts, stored, source_aet, rules, at)


def _join(conn: Connection, facts: HeaderFacts, stored: Stored, source_aet: str, rules: IntakeRules) -> Receipt:
    """Enter a new object of a study that has rows."""
    alarms = _alarms(conn, facts)
    if _may_be_analysed(facts):
        scan_id, queued = _receive_view(conn, facts, stored, source_aet, rules)
    else:
        scan_id, queued = _receive_kept(conn, facts, stored, source_aet, rules), False
    for alarm in alarms:
        history.append(conn, scan_id, alarm, detail=facts.sop_instance_uid)
    return Receipt(scan_id, _state(conn, scan_id), new=True, queued=queued, alarms=alarms)


def _begin(
    conn: Connection, facts: HeaderFacts, stored: Stored, source_aet: str, rules: IntakeRules, at: str
) -> Receipt:
    """Enter the first object of a study. Nothing can be joined, moved or contradicted: row, object and history are
    written once, as they stand in the end. A test holds it to `_join`, which would come to the same."""
    lines = []
    values: dict[str, Any] = {"acquired_at": _acquired_at((facts,), rules)}
    if _may_be_analysed(facts):
        (one,) = _groups((facts,), rules)
        queued = not _waits(one, rules)
        state = "queued" if queued else "receiving"
        values |= {
            "views": ",".join(one.views),
            "reason": one.reason,
            "intake_reason": one.reason,
            "views_deadline": None if queued else text_of(parse(at) + timedelta(seconds=rules.views_timeout_s)),
        }
        kind, born = "acquisition", "receiving"
        lines = [history.Line("complete", one.reason or "", "receiving", "queued")] if queued else []
    else:
        queued = False
        state = born = "declined"
        values |= {"views": "", "outcome": "declined", "reason": facts.reason, "at_rest_since": at}
        kind = "kept"
    scan_id = _insert_scan(conn, kind, facts, source_aet, state, 1, values)
    _insert_instance(conn, scan_id, facts, stored, source_aet)
    history.begin(
        conn,
        scan_id,
        at,
        1,
        [
            history.Line("received", str(facts.reason or "") if kind == "kept" else "", NEW, born),
            history.Line("received", f"{facts.sop_instance_uid} sha256 {stored.sha256}"),
            *lines,
        ],
    )
    return Receipt(scan_id, state, new=True, queued=queued)


def expire_views(engine: Engine) -> tuple[int, ...]:
    """Queue the rows whose required views did not arrive in time; they yield a note. Returns their ids."""
    with writing(engine) as conn:
        late = conn.execute(
            select(scan.c.id, scan.c.revision)
            .where(scan.c.state == "receiving", scan.c.views_deadline <= now())
            .order_by(scan.c.id)
            .with_for_update(skip_locked=True)
        ).all()
        for row in late:
            change(
                conn,
                Standing(row.id, "receiving", row.revision),
                "queued",
                "views_expired",
                reason="view_missing",
                intake_reason="view_missing",
                views_deadline=None,
            )
        return tuple(row.id for row in late)


def _may_be_analysed(facts: HeaderFacts) -> bool:
    """Say whether an object is an acquisition, or part of one. A nuclear medicine image that cannot be read may be a
    scan that somebody waits for, so it gets a row of its own and, if need be, a note."""
    if facts.reason == "unreadable":
        return facts.sop_class_uid == NM_IMAGE_STORAGE
    return facts.reason in {None, "unknown_view", "ambiguous_views"}


def _known(conn: Connection, sop_instance_uid: str) -> Sequence[RowMapping]:
    return (
        conn.execute(
            select(instance).where(instance.c.sop_instance_uid == sop_instance_uid).order_by(instance.c.version)
        )
        .mappings()
        .all()
    )


def _state(conn: Connection, scan_id: int) -> str:
    return str(conn.scalar(_STATE, {"row": scan_id}))


def _hold(conn: Connection, scan_id: int) -> RowMapping:
    """Lock a row and read it."""
    return conn.execute(select(scan).where(scan.c.id == scan_id).with_for_update()).mappings().one()


def _alarms(conn: Connection, facts: HeaderFacts) -> tuple[str, ...]:
    """Another PatientID under a known StudyInstanceUID: told once for each patient, when the first object arrives."""
    patients = set(conn.scalars(_PATIENTS, {"study": facts.study_instance_uid}))
    return ("patient_differs_in_study",) if patients and facts.patient_id not in patients else ()


def _receive_version(
    conn: Connection, facts: HeaderFacts, stored: Stored, source_aet: str, known: Sequence[RowMapping]
) -> Receipt:
    row = _hold(conn, known[0]["scan_id"])
    version = known[-1]["version"] + 1
    instance_id = _insert_instance(conn, row["id"], facts, stored, source_aet, version=version, verdict="pending")
    if known[0]["candidate"] and _names_another(row, facts):
        record_identity(
            conn,
            row["id"],
            Identity(
                study_instance_uid=facts.study_instance_uid,
                patient_id=facts.patient_id,
                issuer_of_patient_id=facts.issuer_of_patient_id,
                patient_name=facts.patient_name,
                accession_number=facts.accession_number,
            ),
            origin="resend",
            said_by=source_aet,
            instance_id=instance_id,
        )
    history.append(
        conn,
        row["id"],
        "version_received",
        revision=row["revision"],
        detail=f"{facts.sop_instance_uid} version {version} sha256 {stored.sha256}",
    )
    return Receipt(row["id"], row["state"], new=True, queued=True, alarms=("version_received",))


def release_version(engine: Engine, instance_id: int, facts: HeaderFacts, rules: IntakeRules) -> Receipt:
    """Let a quarantined version take the place of the first one, which is quarantined instead: a new revision.

    `facts` are the header's of the quarantined bytes. Only for another image of the same patient, study and order: what
    names somebody else cannot be his under a UID that is in use already.

    Raises
    ------
    TransitionRefused: it is not in quarantine, was not compared yet, is never analysed, or is somebody else's.
    """
    facts = storable(facts)
    with writing(engine) as conn:
        lock(conn, INTAKE_LOCK)
        held = quarantined_version(conn, instance_id)
        row = _hold(conn, held["scan_id"])
        if held["verdict"] != "other_pixels":
            raise TransitionRefused(
                f"object {instance_id} is {held['verdict']}: it is not for a release",
                hint="see `remnant worklist accept-identity`"
                if held["verdict"] == "identity_changed"
                else "wait until the worker has compared it",
            )
        if row["kind"] != "acquisition" or not _may_be_analysed(facts):
            raise TransitionRefused(f"object {instance_id} is never analysed", hint="it can only be discarded")
        if _names_another(row, facts):
            raise TransitionRefused(
                f"object {instance_id} names another patient, study or order than the scan that has its UID",
                hint="have it sent again under a UID of its own; `remnant quarantine show` says where its file is",
            )
        first = _known(conn, facts.sop_instance_uid)[0]
        for one_id, values in (
            (first["id"], {"version": -1, "verdict": "other_pixels"}),
            (instance_id, {"version": 1, "verdict": None}),
            (first["id"], {"version": held["version"]}),
        ):
            conn.execute(update(instance).where(instance.c.id == one_id).values(**values))

        def enter(scan_id: int, revision: int) -> None:
            detail = f"{facts.sop_instance_uid} sha256 {held['sha256']} in place of {first['sha256']}"
            history.append(conn, scan_id, "released", revision=revision, detail=detail)

        scan_id, queued = _regroup(conn, facts, held["source_aet"], rules, enter)
        return Receipt(scan_id, _state(conn, scan_id), new=True, queued=queued)


def discard_version(engine: Engine, instance_id: int, reason: str) -> str:
    """Write down that a person gives up a quarantined version; returns the name of the file to remove.

    Raises
    ------
    TransitionRefused: it is not in quarantine, was not compared yet, or nobody has decided whose the scan is.
    """
    with writing(engine) as conn:
        held = quarantined_version(conn, instance_id)
        row = _hold(conn, held["scan_id"])
        if held["verdict"] == "pending":
            raise TransitionRefused(f"object {instance_id} was not compared yet", hint="wait for the worker")
        if held["verdict"] == "identity_changed" and identity_disputed(conn, row["id"]):
            raise TransitionRefused(
                f"object {instance_id} says that scan {row['id']} is somebody else's, and nobody has decided",
                hint="see `remnant worklist accept-identity`",
            )
        conn.execute(update(instance).where(instance.c.id == instance_id).values(purged_at=now()))
        detail = f"{held['sop_instance_uid']} version {held['version']} sha256 {held['sha256']}: {_clean(reason)}"
        history.append(conn, row["id"], "discarded", revision=row["revision"], detail=detail)
        return str(held["spool_name"])


def quarantined_version(conn: Connection, instance_id: int) -> RowMapping:
    """A version in quarantine, locked. Raises TransitionRefused where there is none of that id."""
    found = (
        conn.execute(
            select(instance)
            .where(instance.c.id == instance_id, instance.c.verdict.in_(QUARANTINED), instance.c.purged_at.is_(None))
            .with_for_update()
        )
        .mappings()
        .first()
    )
    if found is None:
        raise TransitionRefused(f"there is no object {instance_id} in quarantine", hint="see `remnant quarantine list`")
    return found


def _receive_returned(conn: Connection, facts: HeaderFacts, stored: Stored, source_aet: str, scan_id: int) -> Receipt:
    """Keep our own result, sent back by a router, with the row that made it: no row of its own, whoever it names."""
    row = _hold(conn, scan_id)
    ours = replace(facts, reason=facts.reason or "wrong_class", ours=False)
    _insert_instance(conn, scan_id, ours, stored, source_aet, candidate=False)
    # Its bytes have to be purged too, also where those of the row are gone.
    conn.execute(update(scan).where(scan.c.id == scan_id).values(purged_at=None))
    history.append(
        conn,
        scan_id,
        "returned",
        revision=row["revision"],
        detail=f"{facts.sop_instance_uid} sha256 {stored.sha256} from {source_aet}",
    )
    return Receipt(scan_id, row["state"], new=True, queued=False)


def _names_another(row: RowMapping, facts: HeaderFacts) -> bool:
    names = ("study_instance_uid", "patient_id", "issuer_of_patient_id", "patient_name", "accession_number")
    return any(row[name] != getattr(facts, name) for name in names)


def record_identity(
    conn: Connection, scan_id: int, one: Identity, *, origin: str, said_by: str, instance_id: int | None = None
) -> None:
    """Keep another identity of a row's scan, open until a person decides."""
    conn.execute(
        insert(identity).values(
            scan_id=scan_id,
            origin=origin,
            said_by=said_by,
            instance_id=instance_id,
            study_instance_uid=one.study_instance_uid,
            patient_id=one.patient_id,
            issuer_of_patient_id=one.issuer_of_patient_id,
            patient_name=one.patient_name,
            accession_number=one.accession_number,
            patient_birth_date=one.patient_birth_date,
            patient_sex=one.patient_sex,
            seen_at=now(),
        )
    )


# --- objects that are never analysed ---------------------------------------------------------------------------------


def _receive_kept(conn: Connection, facts: HeaderFacts, stored: Stored, source_aet: str, rules: IntakeRules) -> int:
    """Hang the object on the one declined row of its study and patient."""
    row = conn.execute(_KEPT_ROW, _patient_and_study(facts)).first()
    if row is None:
        scan_id = _create(
            conn, "kept", facts, source_aet, "declined", 1, rules, outcome="declined", reason=facts.reason
        )
    else:
        scan_id = row.id
        # wrong_class says only "part of the study"; any other reason says more about why a scan has no finding.
        reason = facts.reason if row.reason == "wrong_class" else row.reason
        conn.execute(_KEEP, {"row": scan_id, "why": reason})
    _insert_instance(conn, scan_id, facts, stored, source_aet)
    _received(conn, scan_id, facts, stored, 1)
    return int(scan_id)


# --- views ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    sop_instance_uids: frozenset[str]
    views: tuple[str, ...]
    reason: str | None


def _receive_view(
    conn: Connection, facts: HeaderFacts, stored: Stored, source_aet: str, rules: IntakeRules
) -> tuple[int, bool]:
    """Regroup the views of this patient and study with the new one among them; returns its row and whether any row
    was queued."""

    def enter(scan_id: int, revision: int) -> None:
        _insert_instance(conn, scan_id, facts, stored, source_aet)
        _received(conn, scan_id, facts, stored, revision)

    return _regroup(conn, facts, source_aet, rules, enter)


def _regroup(
    conn: Connection, facts: HeaderFacts, source_aet: str, rules: IntakeRules, enter: Callable[[int, int], None]
) -> tuple[int, bool]:
    """Group the views of a patient and study anew with one that is new, or whose content is; `enter` is called with
    the row and revision that it belongs to. Returns that row and whether any row was queued."""
    rows = {row["id"]: row for row in conn.execute(_CLUSTER, _patient_and_study(facts)).mappings()}
    members = conn.execute(_MEMBERS, {"rows": list(rows)}).mappings().all() if rows else ()
    others = [one for one in members if one["sop_instance_uid"] != facts.sop_instance_uid]
    cluster = [*(_facts_of(one, rows[one["scan_id"]]) for one in others), facts]
    groups = _groups(cluster, rules)
    held = {scan_id: frozenset(m["sop_instance_uid"] for m in members if m["scan_id"] == scan_id) for scan_id in rows}
    keeps = _assign(groups, held)
    by_uid = {one.sop_instance_uid: one for one in cluster}
    row_of = {m["sop_instance_uid"]: int(m["scan_id"]) for m in members}

    queued = False
    home = 0
    taken_by: dict[int, int] = {}
    for one, kept_row in zip(groups, keeps, strict=True):
        changed = facts.sop_instance_uid in one.sop_instance_uids
        if kept_row is not None and held[kept_row] == one.sop_instance_uids and not changed:
            continue
        former = {row_of[uid] for uid in one.sop_instance_uids if uid in row_of}
        # Above every revision that any of these views was part of: result UIDs are made from views and revision, so a
        # set of views must never meet a revision twice, on whichever row.
        revision = 1 + max((rows[scan_id]["revision"] for scan_id in former | ({kept_row} - {None})), default=0)
        of_group = [by_uid[uid] for uid in sorted(one.sop_instance_uids)]
        source = {row_of.get(uid) for uid in one.sop_instance_uids}
        if kept_row is None:
            scan_id = _create_acquisition(conn, one, of_group, facts, source_aet, rows, source, revision, rules)
            standing = Standing(scan_id, "receiving", revision)
        else:
            standing = _revise(conn, rows[kept_row], one, of_group, revision, rules)
        if changed:
            home = standing.scan_id
            enter(home, revision)
        _move(conn, one.sop_instance_uids, standing.scan_id)
        for scan_id in former - {standing.scan_id}:
            taken_by.setdefault(scan_id, standing.scan_id)
        queued |= _settle_intake(conn, standing, one, rules)
    for scan_id, row in rows.items():
        if held[scan_id] and scan_id not in keeps:
            _leave_empty(conn, row, taken_by[scan_id], rules)
    return home, queued


def _patient_and_study(facts: HeaderFacts) -> dict[str, str]:
    return {
        "study": facts.study_instance_uid,
        "patient": facts.patient_id,
        "issuer": facts.issuer_of_patient_id,
    }


def _groups(cluster: Sequence[HeaderFacts], rules: IntakeRules) -> list[_Group]:
    """Every object of the cluster in exactly one group; a header that cannot be placed is a group of its own."""
    groups = [
        _Group(frozenset({one.sop_instance_uid}), tuple(one.views), one.reason)
        for one in cluster
        if one.reason is not None
    ]
    groups += [
        _Group(frozenset(one.sop_instance_uids), tuple(one.views), one.reason)
        for one in group([one for one in cluster if one.reason is None], pair_window_s=rules.pair_window_s)
    ]
    return sorted(groups, key=lambda one: sorted(one.sop_instance_uids))


def _assign(groups: Sequence[_Group], held: Mapping[int, frozenset[str]]) -> list[int | None]:
    """For each group the existing row that goes on with it: the one sharing most views, ties to the lower id."""
    shared = sorted(
        (-len(one.sop_instance_uids & uids), scan_id, index)
        for index, one in enumerate(groups)
        for scan_id, uids in held.items()
        if one.sop_instance_uids & uids
    )
    keeps: list[int | None] = [None] * len(groups)
    for _, scan_id, index in shared:
        if keeps[index] is None and scan_id not in keeps:
            keeps[index] = scan_id
    return keeps


def _create_acquisition(
    conn: Connection,
    one: _Group,
    of_group: Sequence[HeaderFacts],
    facts: HeaderFacts,
    source_aet: str,
    rows: Mapping[int, RowMapping],
    source: set[int | None],
    revision: int,
    rules: IntakeRules,
) -> int:
    """A new row; with the identity and sender of the new object, or of the row that its views came from."""
    lead, aet = facts, source_aet
    if facts.sop_instance_uid not in one.sop_instance_uids:
        row = rows[min(scan_id for scan_id in source if scan_id is not None)]
        lead, aet = of_group[0], row["source_aet"]
    return _create(
        conn,
        "acquisition",
        lead,
        aet,
        "receiving",
        revision,
        rules,
        views=",".join(one.views),
        acquired_at=_acquired_at(of_group, rules),
    )


def _revise(
    conn: Connection, row: RowMapping, one: _Group, of_group: Sequence[HeaderFacts], revision: int, rules: IntakeRules
) -> Standing:
    """Open a revision: the lease is void, what was not sent is cancelled, what was sent stays as predecessor."""
    cancel_deliveries(conn, row["id"], row["revision"])
    return change(
        conn,
        Standing(row["id"], row["state"], row["revision"]),
        "receiving",
        "revised",
        detail=f"views {','.join(one.views) or 'none'}; {len(one.sop_instance_uids)} objects",
        **fresh(),
        revision=revision,
        intake_reason=None,
        views=",".join(one.views),
        acquired_at=_acquired_at(of_group, rules),
    )


def fresh() -> dict[str, Any]:
    """The columns of a revision about which nothing is known yet."""
    return {
        "outcome": None,
        "reason": None,
        "finding": None,
        "probability": None,
        "model": None,
        "attempts": 0,
        "claims": 0,
        "not_before": None,
        "last_error": None,
        "analysed_at": None,
        "purged_at": None,
    }


def _waits(one: _Group, rules: IntakeRules) -> bool:
    """Say whether a required view is missing that may still come."""
    return one.reason is None and not set(rules.require_views) <= set(one.views)


def _settle_intake(conn: Connection, standing: Standing, one: _Group, rules: IntakeRules) -> bool:
    """Queue a row that waits for nothing more; set the deadline of one that does."""
    if identity_disputed(conn, standing.scan_id):
        # Another view does not settle whose scan it is: the row goes back to the person who has to say.
        change(
            conn,
            standing,
            "failed",
            "identity_changed",
            outcome="failed",
            reason="identity_changed",
            views_deadline=None,
        )
        return False
    if _waits(one, rules):
        conn.execute(
            update(scan).where(scan.c.id == standing.scan_id).values(views_deadline=now(rules.views_timeout_s))
        )
        return False
    change(
        conn,
        standing,
        "queued",
        "complete",
        detail=one.reason or "",
        reason=one.reason,
        intake_reason=one.reason,
        views_deadline=None,
    )
    return True


def _move(conn: Connection, sop_instance_uids: frozenset[str], scan_id: int) -> None:
    """Every version of an object goes where its first goes. What a person accepted for the row it leaves is open again:
    nobody has looked at this set of views."""
    moved = conn.scalars(_MOVE, {"uids": list(sop_instance_uids), "row": scan_id}).all()
    if moved:
        conn.execute(_MOVE_IDENTITIES, {"moved": moved, "row": scan_id})


def _leave_empty(conn: Connection, row: RowMapping, taken_by: int, rules: IntakeRules) -> None:
    """A row whose views all went elsewhere comes to rest; what it has sent becomes the other row's predecessor."""
    empty = _revise(conn, row, _Group(frozenset(), (), None), (), row["revision"] + 1, rules)
    change(
        conn,
        empty,
        "declined",
        "views_taken",
        detail=f"scan {taken_by} has them now",
        outcome="declined",
        reason="ambiguous_views",
        intake_reason="ambiguous_views",
        views_deadline=None,
    )
    conn.execute(
        update(result)
        .where((result.c.scan_id == row["id"]) | (result.c.successor_scan_id == row["id"]))
        .values(successor_scan_id=taken_by)
    )


def identity_disputed(conn: Connection, scan_id: int) -> bool:
    """Say whether an image of this row also arrived with another identity, about which no person has decided."""
    return conn.execute(_DISPUTED, {"row": scan_id}).first() is not None


def cancel_deliveries(conn: Connection, scan_id: int, revision: int, *, recalls: bool = False) -> None:
    """Cancel what was not sent yet. One that is under way may still arrive; its record then says so. What withdraws
    earlier results (a key object) goes out all the same, unless `recalls`."""
    unsent = update(delivery).where(delivery.c.scan_id == scan_id, delivery.c.state == "pending")
    if not recalls:
        key_objects = select(result.c.id).where(result.c.scan_id == scan_id, result.c.kind == KEY_OBJECT)
        unsent = unsent.where(delivery.c.result_id.not_in(key_objects))
    cancelled = conn.execute(unsent.values(state="cancelled", updated_at=now()))
    if cancelled.rowcount:
        history.append(conn, scan_id, "cancelled", revision=revision, detail=f"{cancelled.rowcount} deliveries")


# --- writing rows -----------------------------------------------------------------------------------------------------


def _create(
    conn: Connection,
    kind: str,
    facts: HeaderFacts,
    source_aet: str,
    state: str,
    revision: int,
    rules: IntakeRules,
    **values: Any,
) -> int:
    row = {
        "views": "",
        "acquired_at": _acquired_at((facts,), rules),
        "at_rest_since": read_clock(conn) if state in REST else None,
    } | values
    scan_id = _insert_scan(conn, kind, facts, source_aet, state, revision, row)
    history.append(
        conn,
        scan_id,
        "revised" if revision > 1 else "received",
        revision=revision,
        from_state=NEW,
        to_state=state,
        detail=str(values.get("reason") or ""),
    )
    return scan_id


def _insert_scan(
    conn: Connection,
    kind: str,
    facts: HeaderFacts,
    source_aet: str,
    state: str,
    revision: int,
    values: Mapping[str, Any],
) -> int:
    (inserted,) = straight(
        conn,
        _NEW_SCAN,
        {
            **_NOTHING_YET,
            "kind": kind,
            "patient_id": facts.patient_id,
            "issuer_of_patient_id": facts.issuer_of_patient_id,
            "patient_name": facts.patient_name,
            "accession_number": facts.accession_number,
            "study_instance_uid": facts.study_instance_uid,
            "source_aet": source_aet,
            "state": state,
            "revision": revision,
            **values,
        },
    )
    return int(inserted)


def _insert_instance(
    conn: Connection,
    scan_id: int,
    facts: HeaderFacts,
    stored: Stored,
    source_aet: str,
    *,
    version: int = 1,
    verdict: str | None = None,
    candidate: bool | None = None,
) -> int:
    (inserted,) = straight(
        conn,
        _NEW_INSTANCE,
        {
            "scan_id": scan_id,
            "sop_class_uid": facts.sop_class_uid,
            "sop_instance_uid": facts.sop_instance_uid,
            "study_instance_uid": facts.study_instance_uid,
            "series_instance_uid": facts.series_instance_uid,
            "transfer_syntax_uid": stored.transfer_syntax_uid,
            "sha256": stored.sha256,
            "size_bytes": stored.size_bytes,
            "spool_name": stored.spool_name,
            "facts": _facts_json(facts),
            "candidate": int(_may_be_analysed(facts) if candidate is None else candidate),
            "reason": facts.reason,
            "version": version,
            "verdict": verdict,
            "source_aet": source_aet,
        },
    )
    return int(inserted)


def _received(conn: Connection, scan_id: int, facts: HeaderFacts, stored: Stored, revision: int) -> None:
    detail = f"{facts.sop_instance_uid} sha256 {stored.sha256}"
    history.append(conn, scan_id, "received", revision=revision, detail=detail)


# --- facts as they are kept -------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """Text that both databases take: PostgreSQL refuses NUL, both refuse halves of surrogate pairs."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


_FROM_THE_HEADER = (
    "study_instance_uid",
    "series_instance_uid",
    "patient_id",
    "issuer_of_patient_id",
    "patient_name",
    "accession_number",
    "timezone_offset_from_utc",
)


def storable(facts: HeaderFacts) -> HeaderFacts:
    """The facts as the tables hold them."""
    said: dict[str, Any] = {name: getattr(facts, name) for name in _FROM_THE_HEADER}
    clean: dict[str, Any] = {name: _clean(text) for name, text in said.items()}
    return facts if clean == said else replace(facts, **clean)


def _facts_json(facts: HeaderFacts) -> str:
    """What `group` needs beside the identity, which stands on the row and leaves with `forget`."""
    return json.dumps(
        {
            "acquired_at": facts.acquired_at.isoformat() if facts.acquired_at else None,
            "timezone_offset_from_utc": facts.timezone_offset_from_utc,
            "rows": facts.rows,
            "columns": facts.columns,
            "number_of_frames": facts.number_of_frames,
            "spacing_mm": facts.spacing_mm,
            "energy_window_kev": facts.energy_window_kev,
            "frames": [{"view": frame.view, "frame_number": frame.frame_number} for frame in facts.frames],
            "ours": facts.ours,
        }
    )


def _facts_of(member: RowMapping, row: RowMapping) -> HeaderFacts:
    kept = json.loads(member["facts"])
    return HeaderFacts(
        sop_class_uid=member["sop_class_uid"],
        sop_instance_uid=member["sop_instance_uid"],
        study_instance_uid=member["study_instance_uid"],
        series_instance_uid=member["series_instance_uid"],
        patient_id=row["patient_id"],
        issuer_of_patient_id=row["issuer_of_patient_id"],
        patient_name=row["patient_name"],
        accession_number=row["accession_number"],
        acquired_at=datetime.fromisoformat(kept["acquired_at"]) if kept["acquired_at"] else None,
        timezone_offset_from_utc=kept["timezone_offset_from_utc"],
        rows=kept["rows"],
        columns=kept["columns"],
        number_of_frames=kept["number_of_frames"],
        spacing_mm=_pair(kept["spacing_mm"]),
        energy_window_kev=_pair(kept["energy_window_kev"]),
        frames=tuple(FrameFacts(**frame) for frame in kept["frames"]),
        reason=member["reason"],
        ours=kept["ours"],
    )


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def _acquired_at(of_group: Sequence[HeaderFacts], rules: IntakeRules) -> str | None:
    """The earliest acquisition time in UTC: by the header's own offset (PS3.3 C.12.1.1.8), else by the node's zone."""
    times = []
    for one in of_group:
        if one.acquired_at is None:
            continue
        offset = _offset(one.timezone_offset_from_utc) or rules.timezone
        try:
            times.append(text_of(one.acquired_at.replace(tzinfo=offset).astimezone()))
        except (OverflowError, ValueError, OSError):
            # A camera's clock may say the year 1; a time that cannot be told in UTC is shown as none.
            continue
    return min(times, default=None)


def _offset(text: str) -> tzinfo | None:
    """TimezoneOffsetFromUTC (0008,0201), "+HHMM"; None where absent or no offset."""
    if len(text) != 5 or text[0] not in "+-" or not text[1:].isascii() or not text[1:].isdigit():
        return None
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[3:5]))
    if offset > timedelta(hours=14):
        return None
    return timezone(-offset if text[0] == "-" else offset)
