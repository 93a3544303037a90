"""Whose a row's scan is: an archive or a second sending disagrees, a person decides, nothing is sent meanwhile."""

from dataclasses import replace

import pytest

from dicom_node import worklist
from dicom_node.whose import Identity

STUDY = "1.2.826.0.1.3680043.10.1.77"
KNOWN = Identity(STUDY, "RMN-MERGED", "HOSPITAL", "Invented^Ida=王^小东", "A-1", "19700101", "F")


def hold(engine, scan_id, revision=1, *known, destination="pacs"):
    return worklist.hold_identity(
        engine, scan_id, revision, destination=destination, known=known or (KNOWN,), differing=("PatientID",)
    )


@pytest.fixture
def held(camera, worker):
    """A row whose archive knows the study under another identity, found before the first send."""
    scan_id = camera.send("scan").scan_id
    worker.finish(worker.claim(), "pacs", "ris")
    (due, _) = worklist.due_deliveries(camera.engine, "pacs", owner="s", limit=9, hold_s=60)
    assert due.whose == Identity(STUDY, "RMN-1", "HOSPITAL", "Invented^Iris", "A-1")
    assert hold(camera.engine, scan_id)
    return scan_id


def test_another_identity_at_the_archive_stops_everything_and_shows_no_value(camera, held):
    row = worklist.row(camera.engine, held)
    assert (row["state"], row["reason"], row["finding"]) == ("failed", "identity_changed", None)
    assert row["last_error"] == "pacs knows this study with another PatientID"
    assert row["delivered_to"] == {"pacs": "cancelled", "ris": "cancelled"}
    assert worklist.due_deliveries(camera.engine, "ris", owner="s", limit=9, hold_s=60) == ()
    assert "RMN-MERGED" not in str(worklist.events(camera.engine, held))
    received, other = worklist.details(camera.engine, held)["identities"]
    assert (received["id"], received["patient_id"]) == (0, "RMN-1")
    assert (other["patient_id"], other["patient_name"], other["settled_at"]) == (
        "RMN-MERGED",
        "Invented^Ida=王^小东",
        None,
    )
    assert worklist.verify_events(camera.engine) == ()
    assert not hold(camera.engine, held), "the row is at rest already"


def test_an_accepted_identity_opens_a_revision_that_is_claimed_and_sent_with_it(camera, worker, held):
    assert worklist.accept_identity(camera.engine, held) == 2
    claimed = worker.claim()
    assert (claimed.revision, claimed.accepted.identity, claimed.accepted.origin) == (2, KNOWN, "archive")
    assert (claimed.accepted.said_by, claimed.accepted.received_from) == ("pacs", "OPTIMA1")
    worker.finish(claimed, "pacs")
    due = worklist.due_deliveries(camera.engine, "pacs", owner="s", limit=9, hold_s=60)
    assert {one.whose for one in due} == {KNOWN}
    worker_state = worklist.row(camera.engine, held)
    assert (worker_state["state"], worker_state["patient_id"]) == ("sending", "RMN-1")
    assert "RMN-MERGED" not in repr(claimed)


def test_a_retry_asks_the_archive_again_and_keeps_what_was_received(camera, worker, held):
    assert worklist.retry(camera.engine, held) == 2
    claimed = worker.claim()
    assert claimed.accepted is None
    worker.finish(claimed, "pacs")
    assert hold(camera.engine, held, 2)
    open_ones = [one for one in worklist.details(camera.engine, held)["identities"][1:] if one["settled_at"] is None]
    assert len(open_ones) == 1


def test_of_several_other_identities_a_person_has_to_name_one(camera, worker, held):
    worklist.retry(camera.engine, held)
    worker.finish(worker.claim(), "pacs")
    second = replace(KNOWN, patient_id="RMN-THIRD")
    assert hold(camera.engine, held, 2, KNOWN, second)
    with pytest.raises(worklist.TransitionRefused, match="several other identities: 2, 3"):
        worklist.accept_identity(camera.engine, held)
    with pytest.raises(worklist.TransitionRefused, match="no open identity"):
        worklist.accept_identity(camera.engine, held, 1)
    worklist.accept_identity(camera.engine, held, 3)
    assert worker.claim().accepted.identity == second


def test_where_nobody_disagrees_nothing_can_be_accepted(camera, worker):
    scan_id = camera.send("scan").scan_id
    worker.finish(worker.claim(), "pacs")
    worker.deliver()
    with pytest.raises(worklist.TransitionRefused, match="no other identity"):
        worklist.accept_identity(camera.engine, scan_id)
    with pytest.raises(worklist.TransitionRefused, match="there is no scan"):
        worklist.accept_identity(camera.engine, 4711)


def test_the_identity_of_a_second_sending_can_be_accepted_and_a_later_retry_keeps_it(camera, worker):
    scan_id = camera.send("scan").scan_id
    worker.finish(worker.claim(), "pacs")
    worker.deliver()
    camera.send("scan", data="other", patient_id="RMN-2", patient_name="Invented^Ida")
    (version,) = worklist.pending_versions(camera.engine)
    with pytest.raises(worklist.TransitionRefused, match="no other identity"):
        worklist.accept_identity(camera.engine, scan_id)  # nobody has compared the two images yet
    worklist.judge_version(camera.engine, version.instance_id, "identity_changed")
    with pytest.raises(worklist.TransitionRefused, match="two identities"):
        worklist.retry(camera.engine, scan_id)
    assert worklist.accept_identity(camera.engine, scan_id) == 2
    claimed = worker.claim()
    assert (claimed.accepted.identity.patient_id, claimed.accepted.origin) == ("RMN-2", "resend")
    assert [one.kind for one in claimed.predecessors] == ["sr", "sc"]
    worker.finish(claimed, "pacs")
    worker.deliver()
    worklist.retry(camera.engine, scan_id)
    assert worker.claim().accepted.identity.patient_id == "RMN-2"


def test_another_study_is_accepted_only_when_every_view_came_with_it(camera, worker):
    scan_id = camera.send("a", "anterior").scan_id
    camera.send("b", "posterior", minute=0.5)
    worker.finish(worker.claim(), "pacs")
    worker.deliver()
    for name, view in (("a", "anterior"), ("b", "posterior")):
        camera.send(name, view, data="2", study_instance_uid="2.25.99", series_instance_uid=f"2.25.99{len(view)}")
        (version,) = worklist.pending_versions(camera.engine)
        worklist.judge_version(camera.engine, version.instance_id, "identity_changed")
        if name == "a":
            with pytest.raises(worklist.TransitionRefused, match="another study"):
                worklist.accept_identity(camera.engine, scan_id)
    worklist.accept_identity(camera.engine, scan_id)
    claimed = worker.claim()
    assert claimed.accepted.identity.study_instance_uid == "2.25.99"
    assert {series for _, series in claimed.accepted.series} == {"2.25.998", "2.25.999"}
    assert {one.study_instance_uid for one in claimed.predecessors} == {STUDY}


def test_forgetting_takes_the_other_identities_too(camera, held):
    for file in worklist.purgeable(camera.engine, 0):
        worklist.mark_purged(camera.engine, file)
    with camera.engine.begin() as conn:
        conn.exec_driver_sql("UPDATE scan SET at_rest_since = '2020-01-01T00:00:00.000Z'")
    for file in worklist.purgeable(camera.engine, 0):
        assert worklist.mark_purged(camera.engine, file)
    assert worklist.forget(camera.engine, 365) == 1
    assert worklist.details(camera.engine, held)["identities"] == []


def test_our_own_result_sent_back_to_us_makes_no_row_and_no_work(camera, worker):
    scan_id = camera.send("scan").scan_id
    claimed = worker.claim()
    worker.finish(claimed, "pacs")
    worker.deliver()
    for one in worker.results(claimed, "sr", "sc"):
        for data in ("", "", "coerced"):
            receipt = camera.send(
                "x",
                data=one.sop_instance_uid + data,
                sop_class_uid=one.sop_class_uid,
                sop_instance_uid=one.sop_instance_uid,
                patient_id="RMN-COERCED",
                reason="wrong_class",
                ours=False,
            )
            assert (receipt.scan_id, receipt.state) == (scan_id, "delivered")
    for version in worklist.pending_versions(camera.engine):
        worklist.judge_version(camera.engine, version.instance_id, "identity_changed")
    assert [row["id"] for row in worklist.rows(camera.engine)] == [scan_id]
    assert worklist.row(camera.engine, scan_id)["state"] == "delivered"
    assert worklist.claim(camera.engine, "host:work", "boot-1") is None
    assert [line.event for line in worklist.events(camera.engine, scan_id)].count("returned") == 2
    assert worklist.check(camera.engine) == ()
