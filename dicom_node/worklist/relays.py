"""A camera's requests for Storage Commitment that are passed on to the archives (`commitment = "proxy"`).

A request becomes a line of `relay` with its objects before the camera hears Success. Each asking of an archive is a
line of its own under its own Transaction UID, so that a late report counts for what it says; `relay_answer` is what
each archive said last of each object that it does not keep. An object is kept by the first archive that commits itself.
When all are kept, or nobody is asked any longer, the camera gets one report, until it has taken it.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, update

from dicom_node.worklist import history
from dicom_node.worklist.clock import now, read_clock, seconds_between
from dicom_node.worklist.engine import NODE_EVENTS_LOCK, lock, writing
from dicom_node.worklist.tables import relay, relay_answer, relay_asking, relayed_object

MOST_OPEN = 1000
"""Requests of one camera that may wait at a time: beyond them something is wrong with it, or with every archive."""

_NOT_THERE = 0x0112

RequestTaken = Literal["taken", "reused", "too_many"]


@dataclass(frozen=True, slots=True)
class RelayedObject:
    """An object that a camera asks about. `kept_by`: AE title of the archive that committed itself to keep it, or "".

    `nowhere`: whether every archive that is asked said that it does not have it (0112).
    """

    id: int
    sop_class_uid: str
    sop_instance_uid: str
    kept_by: str
    nowhere: bool


@dataclass(frozen=True, slots=True)
class DueRelay:
    """A request whose turn it is.

    `attempts`: to ask, or to tell. `age_s`: since the camera asked. `waited_s`: since it was decided.
    """

    id: int
    source: str
    address: str
    transaction_uid: str
    attempts: int
    age_s: float
    waited_s: float
    objects: tuple[RelayedObject, ...]


def record_request(
    engine: Engine,
    *,
    source: str,
    address: str,
    transaction_uid: str,
    references: Sequence[tuple[str, str]],
) -> RequestTaken:
    """Write down what a camera asks for, each object as (SOP class, SOP instance); durable when this returns.

    The same request once more is the same line: one that was reported already is reported again. "reused" says that its
    Transaction UID came before with other objects, "too_many" that `MOST_OPEN` wait; nothing was written then.
    """
    with writing(engine) as conn:
        lock(conn, NODE_EVENTS_LOCK)
        known = (
            conn.execute(select(relay).where(relay.c.source == source, relay.c.transaction_uid == transaction_uid))
            .mappings()
            .first()
        )
        if known is not None:
            before = conn.execute(
                select(relayed_object.c.sop_class_uid, relayed_object.c.sop_instance_uid).where(
                    relayed_object.c.relay_id == known["id"]
                )
            ).all()
            if {(row.sop_class_uid, row.sop_instance_uid) for row in before} != set(references):
                return "reused"
            if known["state"] in ("reported", "given_up"):
                _set(conn, known["id"], state="reporting", attempts=0, address=address, decided_at=now())
            return "taken"
        waiting = conn.scalar(
            select(func.count()).where(relay.c.source == source, relay.c.state.in_(("asking", "reporting")))
        )
        if waiting is not None and waiting >= MOST_OPEN:
            return "too_many"
        made = conn.execute(
            insert(relay)
            .values(
                source=source,
                address=address,
                transaction_uid=transaction_uid,
                state="asking",
                attempts=0,
                not_before=now(),
                requested_at=now(),
                updated_at=now(),
            )
            .returning(relay.c.id)
        ).scalar_one()
        conn.execute(
            insert(relayed_object),
            [
                {"relay_id": made, "sop_class_uid": sop_class_uid, "sop_instance_uid": sop_instance_uid}
                for sop_class_uid, sop_instance_uid in references
            ],
        )
        history.append(
            conn, None, "commitment_requested", detail=f"{source}: {transaction_uid}, {len(references)} objects"
        )
        return "taken"


def due_relay(engine: Engine, archives: Sequence[str], *, deciding: bool, owner: str, hold_s: float) -> DueRelay | None:
    """Take the request that has been due for longest; nobody else gets it for `hold_s`. None where nothing is due.

    `deciding`: one whose archives are asked, else one whose camera is to be told. `archives`: the destinations that are
    asked now; what others said no longer counts as an answer.
    """
    with writing(engine) as conn:
        due = (
            select(relay.c.id)
            .where(relay.c.state == ("asking" if deciding else "reporting"), relay.c.not_before <= now())
            .order_by(relay.c.not_before, relay.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        row = (
            conn.execute(
                update(relay)
                .where(relay.c.id == due)
                .values(not_before=now(hold_s), claimed_by=owner, updated_at=now())
                .returning(relay)
            )
            .mappings()
            .first()
        )
        if row is None:
            return None
        clock = read_clock(conn)
        said: dict[int, set[str]] = {}
        for answer in conn.execute(
            select(relay_answer.c.object_id, relay_answer.c.destination)
            .join(relayed_object, relayed_object.c.id == relay_answer.c.object_id)
            .where(relayed_object.c.relay_id == row["id"], relay_answer.c.failure_reason == _NOT_THERE)
        ):
            said.setdefault(answer.object_id, set()).add(answer.destination)
        objects = conn.execute(
            select(relayed_object).where(relayed_object.c.relay_id == row["id"]).order_by(relayed_object.c.id)
        ).mappings()
        return DueRelay(
            id=row["id"],
            source=row["source"],
            address=row["address"],
            transaction_uid=row["transaction_uid"],
            attempts=row["attempts"],
            age_s=max(0.0, seconds_between(row["requested_at"], clock)),
            waited_s=max(0.0, seconds_between(row["decided_at"] or clock, clock)),
            objects=tuple(
                RelayedObject(
                    one["id"],
                    one["sop_class_uid"],
                    one["sop_instance_uid"],
                    one["retrieve_ae_title"] or "",
                    bool(archives) and set(archives) <= said.get(one["id"], set()),
                )
                for one in objects
            ),
        )


def release_relays(engine: Engine, owner: str) -> int:
    """Make due again at once what an earlier life of this sender had taken; returns how many."""
    with writing(engine) as conn:
        return conn.execute(
            update(relay)
            .where(relay.c.state.in_(("asking", "reporting")), relay.c.claimed_by == owner)
            .values(not_before=now(), claimed_by=None, updated_at=now())
        ).rowcount


def ask_relayed(
    engine: Engine, relay_id: int, *, destination: str, retrieve_ae_title: str, transaction_uid: str
) -> None:
    """Write down an asking, before the archive hears of it."""
    with writing(engine) as conn:
        conn.execute(
            insert(relay_asking).values(
                relay_id=relay_id,
                destination=destination,
                retrieve_ae_title=retrieve_ae_title,
                transaction_uid=transaction_uid,
                asked_at=now(),
            )
        )


def wait_for_archives(engine: Engine, relay_id: int, *, delay_s: float, error: str) -> None:
    """The archives were asked: look again in `delay_s`, or as soon as one reports. `error`: whom it could not ask."""
    with writing(engine) as conn:
        # A report may have come meanwhile that left nothing open; then it is due at once.
        delay_s = delay_s if _open_objects(conn, relay_id) else 0.0
        _set(conn, relay_id, delay_s=delay_s, attempts=relay.c.attempts + 1, last_error=error or None)


def decide_relay(engine: Engine, relay_id: int) -> None:
    """Ask no archive any longer: the camera is told next what is known now."""
    with writing(engine) as conn:
        _set(conn, relay_id, state="reporting", attempts=0, decided_at=now(), last_error=None)


def record_told(
    engine: Engine, relay_id: int, *, state: Literal["reporting", "reported", "given_up"], error: str, delay_s: float
) -> None:
    """Write down whether the camera took the report; "reporting": it is told again in `delay_s`."""
    with writing(engine) as conn:
        if state != "reporting":
            lock(conn, NODE_EVENTS_LOCK)
        _set(
            conn,
            relay_id,
            delay_s=delay_s,
            state=state,
            attempts=relay.c.attempts + 1,
            last_error=error or None,
        )
        if state == "reporting":
            return
        told = conn.execute(select(relay).where(relay.c.id == relay_id)).mappings().one()
        objects = conn.execute(
            select(relayed_object.c.retrieve_ae_title).where(relayed_object.c.relay_id == relay_id)
        ).scalars()
        kept = [by is not None for by in objects]
        said = f"{told['source']}: {told['transaction_uid']}, {sum(kept)} of {len(kept)} objects kept by an archive"
        event = "commitment_reported" if state == "reported" else "commitment_not_reported"
        history.append(conn, None, event, detail=said)


def forget_relays(engine: Engine, days: float) -> int:
    """Remove what was reported, or given up, that long ago; returns how many. The history keeps its lines."""
    with writing(engine) as conn:
        over = (
            select(relay.c.id)
            .where(relay.c.state.in_(("reported", "given_up")), relay.c.updated_at <= now(-days * 86_400))
            .scalar_subquery()
        )
        objects = select(relayed_object.c.id).where(relayed_object.c.relay_id.in_(over)).scalar_subquery()
        conn.execute(delete(relay_answer).where(relay_answer.c.object_id.in_(objects)))
        for table in (relayed_object, relay_asking):
            conn.execute(delete(table).where(table.c.relay_id.in_(over)))
        return conn.execute(delete(relay).where(relay.c.id.in_(over))).rowcount


def _set(conn: Connection, relay_id: int, *, delay_s: float = 0.0, **values: object) -> None:
    """Change a request and let it go."""
    conn.execute(
        update(relay)
        .where(relay.c.id == relay_id)
        .values(not_before=now(delay_s), claimed_by=None, updated_at=now(), **values)
    )


def record_relayed(
    engine: Engine,
    destinations: Sequence[str],
    transaction_uid: str,
    committed: AbstractSet[str],
    failed: Mapping[str, int],
) -> bool:
    """Write down an archive's report on objects of a camera; False where none of `destinations` was asked under this
    Transaction UID.

    `committed` and the keys of `failed` (-> Failure Reason) are SOP Instance UIDs; others than the camera's are left
    out. A report that was taken before changes nothing.
    """
    with writing(engine) as conn:
        asking = (
            conn.execute(
                select(relay_asking)
                .where(relay_asking.c.transaction_uid == transaction_uid, relay_asking.c.destination.in_(destinations))
                .with_for_update()
            )
            .mappings()
            .first()
        )
        if asking is None:
            return False
        if asking["reported_at"] is not None:
            return True
        relay_id = asking["relay_id"]
        conn.execute(update(relay_asking).where(relay_asking.c.id == asking["id"]).values(reported_at=now()))
        for one in _open_objects(conn, relay_id):
            uid = one.sop_instance_uid
            if uid in committed:
                conn.execute(
                    update(relayed_object)
                    .where(relayed_object.c.id == one.id)
                    .values(retrieve_ae_title=asking["retrieve_ae_title"])
                )
            elif uid in failed:
                _answered(conn, one.id, asking["destination"], failed[uid])
        if not _open_objects(conn, relay_id):
            conn.execute(
                update(relay)
                .where(relay.c.id == relay_id, relay.c.state == "asking")
                .values(not_before=now(), updated_at=now())
            )
        return True


def _answered(conn: Connection, object_id: int, destination: str, reason: int) -> None:
    where = relay_answer.c.object_id == object_id, relay_answer.c.destination == destination
    if not conn.execute(update(relay_answer).where(*where).values(failure_reason=reason)).rowcount:
        conn.execute(insert(relay_answer).values(object_id=object_id, destination=destination, failure_reason=reason))


def _open_objects(conn: Connection, relay_id: int) -> Sequence[Row[tuple[object, ...]]]:
    return conn.execute(
        select(relayed_object).where(
            relayed_object.c.relay_id == relay_id, relayed_object.c.retrieve_ae_title.is_(None)
        )
    ).all()
