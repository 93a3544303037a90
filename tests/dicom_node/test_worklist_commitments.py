"""What an archive stored, was asked to keep, and says of it: in the worklist, on SQLite and PostgreSQL."""

import threading

import pytest

from dicom_node import worklist
from dicom_node.worklist import ask_commitment, due_deliveries, record_delivery, record_report, record_stored


def pause_s(attempts: int) -> float:
    return 0.0


def due(engine, destination="pacs"):
    return due_deliveries(engine, destination, owner="sender", limit=10, hold_s=60)


@pytest.fixture
def stored(camera, worker, engine):
    """The two deliveries of a row, both stored by the archive."""
    camera.send("scan")
    worker.finish(worker.claim(), "pacs")
    taken = due(engine)
    for one in taken:
        record_stored(engine, one.id, status=0)
    return taken


def report(engine, transaction, committed=(), failed=None, destinations=("pacs",)):
    return record_report(engine, destinations, transaction, set(committed), failed or {}, pause_s=pause_s)


def events(engine, scan_id, name):
    return [one.detail for one in worklist.events(engine, scan_id) if one.event == name]


def test_a_stored_object_is_asked_for_next_and_the_row_waits_for_the_report(engine, stored):
    again = due(engine)
    assert [one.id for one in again] == [one.id for one in stored]
    assert all(one.stored_at for one in again)
    ask_commitment(engine, [one.id for one in again], "2.25.1", delay_s=60)
    assert due(engine) == ()
    assert worklist.row(engine, stored[0].scan_id)["state"] == "sending"
    said = report(engine, "2.25.1", [one.sop_instance_uid for one in stored])
    assert [(one.kind, one.destination, one.failure) for one in said] == [("sr", "pacs", ""), ("sc", "pacs", "")]
    row = worklist.row(engine, stored[0].scan_id)
    assert (row["state"], row["delivered_to"], row["last_error"]) == ("delivered", {"pacs": "acknowledged"}, None)
    assert events(engine, stored[0].scan_id, "committed") == ["pacs: sr", "pacs: sc"]
    assert worklist.verify_events(engine) == ()


def test_an_object_that_a_report_leaves_out_stays_asked(engine, stored):
    ask_commitment(engine, [one.id for one in stored], "2.25.1", delay_s=0)
    assert len(report(engine, "2.25.1", [stored[0].sop_instance_uid])) == 1
    assert [one.id for one in due(engine)] == [stored[1].id]
    assert len(report(engine, "2.25.1", [one.sop_instance_uid for one in stored])) == 1, "the first was reported before"
    assert worklist.row(engine, stored[0].scan_id)["state"] == "delivered"


@pytest.mark.parametrize("reason", [0x0110, 0x0112, 0x0131, 0x0213, 0x4711])
def test_an_object_that_the_archive_does_not_have_is_sent_again(engine, stored, reason):
    ask_commitment(engine, [one.id for one in stored], "2.25.1", delay_s=60)
    report(engine, "2.25.1", [stored[1].sop_instance_uid], {stored[0].sop_instance_uid: reason})
    (again,) = due(engine)
    assert (again.id, again.stored_at, again.sha256) == (stored[0].id, None, stored[0].sha256)
    assert f"({reason:04X})" in worklist.row(engine, again.scan_id)["last_error"]
    assert len(events(engine, again.scan_id, "not_committed")) == 1


@pytest.mark.parametrize("reason", [0x0119, 0x0122])
def test_what_an_archive_will_never_keep_is_for_a_person(engine, stored, reason):
    ask_commitment(engine, [one.id for one in stored], "2.25.1", delay_s=60)
    report(engine, "2.25.1", [stored[1].sop_instance_uid], {stored[0].sop_instance_uid: reason})
    row = worklist.row(engine, stored[0].scan_id)
    assert (row["state"], row["delivered_to"]) == ("failed", {"pacs": "refused"})
    assert due(engine) == ()


def test_only_the_archive_that_was_asked_is_believed(engine, stored):
    ask_commitment(engine, [one.id for one in stored], "2.25.1", delay_s=60)
    uids = [one.sop_instance_uid for one in stored]
    assert report(engine, "2.25.2", uids) is None
    assert report(engine, "2.25.1", uids, destinations=("ris",)) is None
    assert worklist.row(engine, stored[0].scan_id)["state"] == "sending"


def test_a_report_changes_nothing_of_a_delivery_that_is_over(engine, stored):
    ask_commitment(engine, [one.id for one in stored], "2.25.1", delay_s=60)
    ask_commitment(engine, [one.id for one in stored], "2.25.2", delay_s=60)
    uids = [one.sop_instance_uid for one in stored]
    report(engine, "2.25.1", uids)
    assert report(engine, "2.25.1", (), dict.fromkeys(uids, 0x0112)) == ()
    assert {one.failure != "" for one in report(engine, "2.25.2", (), dict.fromkeys(uids, 0x0112))} == {True}
    row = worklist.row(engine, stored[0].scan_id)
    assert (row["state"], row["delivered_to"]) == ("delivered", {"pacs": "acknowledged"})


def test_what_is_stored_but_not_committed_counts_as_sent_for_its_successor_and_for_a_recall(
    engine, camera, worker, stored
):
    camera.send("second", "anterior", minute=1)
    sent = worklist.sent_results(engine, stored[0].scan_id)
    assert {one.sop_instance_uid for one in sent} == {one.sop_instance_uid for one in stored}
    ask_commitment(engine, [one.id for one in stored], "2.25.1", delay_s=60)
    report(engine, "2.25.1", (), {one.sop_instance_uid: 0x0112 for one in stored})
    assert worklist.sent_results(engine, stored[0].scan_id) == (), "the archive has lost them"


def test_a_warning_with_which_it_was_stored_stays_when_the_archive_commits_itself(engine, camera, worker):
    camera.send("scan")
    worker.finish(worker.claim(), "pacs", kinds=("sr",))
    (one,) = due(engine)
    record_stored(engine, one.id, status=0xB000, warning="stored, with data elements coerced (B000)")
    ask_commitment(engine, [one.id], "2.25.1", delay_s=60)
    worklist.record_unasked(engine, [one.id], "no connection")
    assert "no connection" in worklist.row(engine, one.scan_id)["last_error"]
    report(engine, "2.25.1", [one.sop_instance_uid])
    assert "(B000)" in worklist.row(engine, one.scan_id)["last_error"]


def test_an_acknowledged_delivery_is_not_stored_once_more(engine, stored):
    record_delivery(engine, stored[0].id, state="acknowledged", status=0)
    record_stored(engine, stored[0].id, status=0)
    assert [one.id for one in due(engine)] == [stored[1].id]


def test_without_the_setting_what_was_stored_rests_and_a_duplicate_that_nobody_confirmed_is_sent_again(
    engine, camera, worker
):
    camera.send("scan")
    worker.finish(worker.claim(), "pacs")
    first, second = due(engine)
    record_stored(engine, first.id, status=0xB000, warning="stored, with data elements coerced (B000)")
    record_stored(engine, second.id, status=0x0111)
    for one in due(engine):
        worklist.stop_asking(engine, one.id)
    (again,) = due(engine)
    assert (again.id, again.stored_at) == (second.id, None)
    assert worklist.row(engine, again.scan_id)["state"] == "sending"
    record_delivery(engine, again.id, state="acknowledged", status=0)
    row = worklist.row(engine, again.scan_id)
    assert row["state"] == "delivered"
    assert "(B000)" in row["last_error"]


def test_a_report_that_comes_twice_at_once_is_written_once(engine, stored):
    ask_commitment(engine, [one.id for one in stored], "2.25.1", delay_s=60)
    uids = [one.sop_instance_uid for one in stored]
    start = threading.Barrier(4)
    taken = []

    def hear():
        start.wait(20)
        taken.extend(report(engine, "2.25.1", uids))

    threads = [threading.Thread(target=hear) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(taken) == 2
    assert len(events(engine, stored[0].scan_id, "committed")) == 2
    assert worklist.verify_events(engine) == ()
