"""The state machine: what the table allows, and that nothing else happens."""

import itertools

import pytest
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError

from dicom_node import worklist
from dicom_node.worklist.engine import writing
from dicom_node.worklist.guard import Lease, Standing, change
from dicom_node.worklist.states import NEW, REST, STATES, TRANSITIONS
from dicom_node.worklist.tables import scan

ALL = [*STATES, NEW]


def put(engine, state):
    """A row in any state, made behind the machine's back."""
    lease = {"lease_owner": "host", "lease_boot": "b"} if state == "analysing" else {}
    with writing(engine) as conn:
        return conn.execute(
            insert(scan)
            .values(
                kind="acquisition",
                study_instance_uid="2.25.1",
                source_aet="X",
                received_at="",
                updated_at="",
                state=state,
                revision=1,
                views="",
                attempts=0,
                claims=1,
                lease_counter=0,
                **lease,
            )
            .returning(scan.c.id)
        ).scalar_one()


@pytest.mark.parametrize(("before", "after"), sorted(set(itertools.product(STATES, ALL)) - set(TRANSITIONS)))
def test_a_change_that_is_not_in_the_table_is_refused(sqlite_engine, before, after):
    scan_id = put(sqlite_engine, before)
    with pytest.raises(worklist.TransitionRefused), writing(sqlite_engine) as conn:
        change(conn, Standing(scan_id, before, 1), after, "retry")
    assert worklist.row(sqlite_engine, scan_id)["state"] == before
    assert worklist.events(sqlite_engine, scan_id) == ()


def test_every_change_of_the_table_happens_and_leaves_its_line_in_the_history(engine):
    for (before, after), when in TRANSITIONS.items():
        assert when
        if before == NEW:
            continue
        scan_id = put(engine, before)
        owner = {"lease_owner": "host", "lease_boot": "c"} if after == "analysing" else {}
        with writing(engine) as conn:
            change(conn, Standing(scan_id, before, 1), after, "retry", detail="why", **owner)
        (line,) = worklist.events(engine, scan_id)
        assert (line.from_state, line.to_state, line.detail) == (before, after, "why")
        with engine.connect() as conn:
            row = conn.execute(scan.select().where(scan.c.id == scan_id)).mappings().one()
        assert row["state"] == after
        assert (row["at_rest_since"] is not None) == (after in REST)
        assert (row["lease_owner"] is not None) == (after == "analysing")


def test_who_lost_a_race_changes_nothing(engine):
    scan_id = put(engine, "queued")
    for standing in (Standing(scan_id, "sending", 1), Standing(scan_id, "queued", 2)):
        with pytest.raises(worklist.TransitionRefused), writing(engine) as conn:
            change(conn, standing, "receiving", "revised")
    held = put(engine, "analysing")
    for lease in (Lease("host", "b", 2), Lease("host", "other", 1), Lease("other", "b", 1)):
        with pytest.raises(worklist.LeaseLost), writing(engine) as conn:
            change(conn, Standing(held, "analysing", 1, lease), "queued", "try_later")
    assert [worklist.row(engine, one)["state"] for one in (scan_id, held)] == ["queued", "analysing"]


def test_every_state_can_be_reached_and_rest_is_left_only_by_a_person_or_another_object():
    reached = {after for _, after in TRANSITIONS}
    assert reached == set(STATES)
    for state in REST:
        assert {after for before, after in TRANSITIONS if before == state} <= {
            "queued",
            "receiving",
            "failed",
            "recalled",
        }


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "lost"},
        {"finding": "present"},
        {"outcome": "analysed"},
        {"finding": "maybe", "outcome": "analysed"},
        {"probability": 1.5},
        {"lease_owner": "host"},
        {"kind": "other"},
    ],
)
def test_the_database_itself_refuses_a_row_that_contradicts_itself(engine, wrong):
    scan_id = put(engine, "queued")
    with pytest.raises(IntegrityError), engine.begin() as conn:
        conn.execute(update(scan).where(scan.c.id == scan_id).values(**wrong))
