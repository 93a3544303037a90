"""The one function that changes the state of a row.

Every change names the state and the revision that it leaves (and the lease, where a worker makes it) in the WHERE of
its UPDATE: who lost a race changes nothing and gets an exception. A pair not in `states.TRANSITIONS` is refused.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, update

from dicom_node.worklist import history
from dicom_node.worklist.clock import now
from dicom_node.worklist.states import REST, TRANSITIONS, LeaseLost, TransitionRefused
from dicom_node.worklist.tables import scan


@dataclass(frozen=True, slots=True)
class Lease:
    """Which claim on a row is meant. `claims` tells two claims of one process apart."""

    owner: str
    boot: str
    claims: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What a change expects to find."""

    scan_id: int
    state: str
    revision: int
    lease: Lease | None = None


def change(
    conn: Connection, standing: Standing, to_state: str, event: str, *, detail: str = "", **values: Any
) -> Standing:
    """Move a row to `to_state`, set `values` on it and write the event; returns where it stands then.

    `revision` among the values opens that revision. A lease never outlives the state "analysing". Run it within
    `writing`.

    Raises
    ------
    TransitionRefused: the pair is not in the table, or the row stands elsewhere.
    LeaseLost: the row is no longer held by the lease named in `standing`.
    """
    if (standing.state, to_state) not in TRANSITIONS:
        raise TransitionRefused(f"scan {standing.scan_id} cannot go from {standing.state} to {to_state}")
    if to_state != "analysing":
        values |= {"lease_owner": None, "lease_boot": None}
    values.setdefault("at_rest_since", now() if to_state in REST else None)
    statement = update(scan).where(
        scan.c.id == standing.scan_id, scan.c.state == standing.state, scan.c.revision == standing.revision
    )
    if standing.lease is not None:
        statement = statement.where(
            scan.c.lease_owner == standing.lease.owner,
            scan.c.lease_boot == standing.lease.boot,
            scan.c.claims == standing.lease.claims,
        )
    changed = conn.execute(statement.values(state=to_state, updated_at=now(), **values))
    if changed.rowcount != 1:
        if standing.lease is not None:
            raise LeaseLost(f"scan {standing.scan_id} is no longer held by this worker", retry=False)
        raise TransitionRefused(
            f"scan {standing.scan_id} is no longer {standing.state} in revision {standing.revision}",
            hint="look at it again: `remnant worklist show`",
        )
    revision = int(values.get("revision", standing.revision))
    history.append(
        conn, standing.scan_id, event, revision=revision, from_state=standing.state, to_state=to_state, detail=detail
    )
    return Standing(standing.scan_id, to_state, revision)
