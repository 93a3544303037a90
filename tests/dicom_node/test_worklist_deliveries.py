"""Deliveries: at least once, one destination never in the way of another, and the row rests when all are at rest."""

import threading

import pytest

from dicom_node import worklist
from dicom_node.worklist import due_deliveries, record_delivery


@pytest.fixture
def sending(camera, worker):
    """A row with two results for two destinations; returns its claim."""
    camera.send("scan")
    held = worker.claim()
    worker.finish(held, "pacs", "ris")
    return held


def due(engine, destination="pacs", **changed):
    return due_deliveries(engine, destination, **({"owner": "sender", "limit": 10, "hold_s": 60} | changed))


def test_a_due_delivery_brings_what_the_sender_needs(engine, worker, sending):
    one, two = due(engine)
    results = worker.results(sending, "sr", "sc")
    assert [one.file_name, two.file_name] == [result.file_name for result in results]
    assert (one.scan_id, one.revision, one.kind, one.attempts) == (sending.scan_id, sending.revision, "sr", 0)
    assert (one.sha256, one.sop_instance_uid) == (results[0].sha256, results[0].sop_instance_uid)
    assert 0 <= one.tried_for_s < 60
    assert one.first_tried_at.endswith("Z")


def test_what_one_sender_took_no_other_gets_until_the_hold_ends_or_its_next_life_begins(engine, sending):
    assert len(due(engine, limit=1)) == 1
    assert len(due(engine, owner="sender-2")) == 1
    assert due(engine, owner="sender-3") == ()
    assert len(due(engine, "ris", hold_s=-1)) == 2
    assert len(due(engine, "ris", owner="sender-3")) == 2, "a hold that has ended"

    assert worklist.release_deliveries(engine, "sender") == 1
    assert len(due(engine)) == 1


def test_a_delivery_to_be_tried_again_waits_and_keeps_count(engine, sending):
    for one in due(engine):
        record_delivery(engine, one.id, state="pending", status=0xA700, error="out of resources", delay_s=30)
    assert due(engine) == ()
    due_s = worklist.next_delivery_in_s(engine, "pacs")
    assert due_s is not None
    assert 25 < due_s <= 30
    assert worklist.next_delivery_in_s(engine, "ris") == 0.0
    assert worklist.next_delivery_in_s(engine, "elsewhere") is None
    line = worklist.details(engine, sending.scan_id)["deliveries"][0]
    assert (line["attempts"], line["last_status"], line["last_error"]) == (1, 0xA700, "out of resources")
    assert line["sop_instance_uid"]


def test_the_row_says_why_a_delivery_waits_and_forgets_it_when_the_archive_took_it(engine, worker, sending):
    first, second = due(engine)
    record_delivery(engine, first.id, state="acknowledged", status=0)
    record_delivery(engine, second.id, state="pending", error="no connection")
    assert worklist.row(engine, sending.scan_id)["last_error"] == "pacs: will be tried again: no connection"
    record_delivery(engine, second.id, state="acknowledged", status=0)
    worker.deliver("ris")
    row = worklist.row(engine, sending.scan_id)
    assert (row["state"], row["last_error"]) == ("delivered", None)


def test_a_warning_of_the_archive_stays_on_the_row(engine, worker, sending):
    first, second = due(engine)
    record_delivery(engine, first.id, state="acknowledged", status=0xB000, error="coerced")
    record_delivery(engine, second.id, state="acknowledged", status=0)
    worker.deliver("ris")
    row = worklist.row(engine, sending.scan_id)
    assert (row["state"], row["last_error"]) == ("delivered", "pacs: acknowledged with status B000: coerced")


@pytest.mark.parametrize("end", ["refused", "given_up"])
def test_one_object_refused_or_given_up_fails_the_row_and_says_why_and_where(engine, worker, sending, end):
    first, second = due(engine)
    record_delivery(engine, first.id, state=end, status=0xA900, error="class mismatch")
    record_delivery(engine, second.id, state="acknowledged", status=0)
    assert worklist.row(engine, sending.scan_id)["state"] == "sending", "the other destination is still outstanding"
    worker.deliver("ris")

    row = worklist.row(engine, sending.scan_id)
    assert (row["state"], row["outcome"], row["finding"]) == ("failed", "analysed", "present")
    assert row["delivered_to"] == {"pacs": end, "ris": "acknowledged"}
    assert row["last_error"] == f"pacs: {end.replace('_', ' ')} with status A900: class mismatch"


@pytest.mark.parametrize(("outcome", "to"), [("declined", "declined"), ("failed", "failed")])
def test_a_delivered_note_rests_as_declined_or_failed_never_as_delivered(camera, worker, outcome, to):
    scan_id = camera.send("scan").scan_id
    reason = {"declined": "low_counts", "failed": "analysis_failed"}[outcome]
    worker.finish(worker.claim(), "pacs", outcome=outcome, reason=reason, finding=None, probability=None)
    worker.deliver()
    assert worklist.row(camera.engine, scan_id)["state"] == to


def test_an_acknowledgement_that_comes_after_the_cancelling_is_still_the_truth(camera, engine, worker, sending):
    one, two = due(engine)
    camera.send("late", "anterior", 0.01)  # the pair in one object is its own scan: nothing changes here
    assert worklist.row(engine, sending.scan_id)["state"] == "sending"
    record_delivery(engine, one.id, state="acknowledged", status=0)
    camera.send("scan", data="another name")
    (pending,) = worklist.pending_versions(engine)
    worklist.judge_version(engine, pending.instance_id, "identity_changed")

    record_delivery(engine, two.id, state="acknowledged", status=0)

    assert worklist.row(engine, sending.scan_id)["state"] == "failed"
    states = [line["state"] for line in worklist.details(engine, sending.scan_id)["deliveries"]]
    assert sorted(states) == ["acknowledged", "acknowledged", "cancelled", "cancelled"]


def test_a_delivery_at_rest_is_not_taken_back(engine, worker, sending):
    (one, _) = due(engine)
    record_delivery(engine, one.id, state="acknowledged", status=0)
    record_delivery(engine, one.id, state="refused", status=0x0111)
    assert worklist.details(engine, sending.scan_id)["deliveries"][0]["state"] == "acknowledged"
    with pytest.raises(worklist.TransitionRefused):
        record_delivery(engine, 999, state="acknowledged")


def test_another_object_goes_where_the_first_is_not_taken(engine, worker, sending):
    sr = due(engine)[0]
    plain = worker.results(sending, "sr", "sc", "basic_text_sr")[2]
    substitute = worklist.substitute_delivery(engine, sr.id, plain)

    assert [one.id for one in due(engine)] == [substitute]
    record_delivery(engine, substitute, state="acknowledged", status=0)
    sc = worklist.details(engine, sending.scan_id)["deliveries"]
    for line in sc:
        if line["state"] == "pending":
            record_delivery(engine, line["id"], state="acknowledged", status=0)
    row = worklist.row(engine, sending.scan_id)
    assert (row["state"], row["delivered_to"]["pacs"]) == ("delivered", "acknowledged")
    assert [one["kind"] for one in row["results"]] == ["sr", "sc", "basic_text_sr"]
    with pytest.raises(worklist.TransitionRefused):
        worklist.substitute_delivery(engine, substitute, plain)


def test_two_senders_that_end_together_settle_the_row_once(engine, worker, sending):
    ids = [one.id for name in ("pacs", "ris") for one in due(engine, name)]
    start = threading.Barrier(len(ids))

    def end(delivery_id):
        start.wait()
        record_delivery(engine, delivery_id, state="acknowledged", status=0)

    threads = [threading.Thread(target=end, args=(one,)) for one in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worklist.row(engine, sending.scan_id)["state"] == "delivered"
    assert [one.event for one in worklist.events(engine, sending.scan_id)].count("settled") == 1
    assert worklist.verify_events(engine) == ()
