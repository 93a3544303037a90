"""From received objects to rows: which views become one scan, whatever the order, the hour and the sender do."""

import itertools
import json
from dataclasses import replace
from datetime import timedelta, timezone

import pytest
from sqlalchemy import select

from dicom_node import worklist
from dicom_node.worklist import intake
from dicom_node.worklist.tables import metadata


def uids(engine, scan_id):
    return {one["sop_instance_uid"] for one in worklist.details(engine, scan_id)["instances"]}


def by_state(engine):
    found = {}
    for row in worklist.rows(engine):
        found.setdefault(row["state"], []).append(row)
    return found


def test_an_object_with_both_views_is_queued_at_once(camera):
    receipt = camera.send("scan")

    assert (receipt.state, receipt.new, receipt.queued, receipt.alarms) == ("queued", True, True, ())
    row = worklist.row(camera.engine, receipt.scan_id)
    assert (row["views"], row["revision"], row["reason"], row["outcome"]) == ("anterior,posterior", 1, None, None)
    assert row["acquired_at"] == "2026-11-23T17:00:00.000Z"
    assert (row["source_aet"], row["patient_id"], row["accession_number"]) == ("OPTIMA1", "RMN-1", "A-1")


def test_the_second_view_completes_the_row_of_the_first(camera):
    first = camera.send("a", "anterior")
    assert (first.state, first.queued) == ("receiving", False)

    second = camera.send("p", "posterior", minute=0)

    assert (second.scan_id, second.state, second.queued) == (first.scan_id, "queued", True)
    assert uids(camera.engine, first.scan_id) == {camera.facts(name).sop_instance_uid for name in ("a", "p")}
    assert len(worklist.rows(camera.engine)) == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_two_acquisitions_of_one_study_end_as_two_rows_in_every_order_of_arrival(sqlite_camera, order):
    objects = [("a24", "anterior", 0), ("p24", "posterior", 0), ("a48", "anterior", 20), ("p48", "posterior", 20)]

    for index in order:
        name, view, minute = objects[index]
        sqlite_camera.send(name, view, minute)

    engine = sqlite_camera.engine
    queued = by_state(engine)["queued"]
    assert len(queued) == 2
    assert {frozenset(uids(engine, row["id"])) for row in queued} == {
        frozenset(sqlite_camera.facts(name).sop_instance_uid for name in pair)
        for pair in (("a24", "p24"), ("a48", "p48"))
    }
    for row in worklist.rows(engine):
        assert row["state"] == "queued" or (row["state"], row["reason"]) == ("declined", "ambiguous_views")
        assert row["state"] == "queued" or not uids(engine, row["id"])
    assert worklist.check(engine) == worklist.verify_events(engine) == ()


def test_interleaved_acquisitions_end_the_same_on_both_databases(camera):
    for name, view, minute in [("a1", "anterior", 0), ("p2", "posterior", 20), ("a2", "anterior", 20)]:
        camera.send(name, view, minute)
    camera.send("p1", "posterior", 0)

    queued = [row for row in worklist.rows(camera.engine) if row["state"] == "queued"]
    assert sorted(row["views"] for row in queued) == ["anterior,posterior"] * 2


def test_views_for_which_there_are_two_candidates_are_never_guessed(camera):
    camera.send("a1", "anterior", 0)
    camera.send("a2", "anterior", 10)
    last = camera.send("p", "posterior", 5)

    queued = by_state(camera.engine)["queued"]
    assert [(row["id"], row["reason"]) for row in queued] == [(last.scan_id, "ambiguous_views")]
    assert len(uids(camera.engine, last.scan_id)) == 3
    (empty,) = by_state(camera.engine)["declined"]
    assert (empty["reason"], empty["views"], uids(camera.engine, empty["id"])) == ("ambiguous_views", "", set())
    taken = [one for one in worklist.events(camera.engine, empty["id"]) if one.event == "views_taken"]
    assert taken[-1].detail == f"scan {last.scan_id} has them now"


def test_the_same_bytes_again_change_nothing(camera):
    first = camera.send("scan")
    before = worklist.row(camera.engine, first.scan_id), worklist.events(camera.engine, first.scan_id)

    again = camera.send("scan")

    assert again == replace(first, new=False, queued=False)
    assert (worklist.row(camera.engine, first.scan_id), worklist.events(camera.engine, first.scan_id)) == before


def test_other_bytes_under_a_known_uid_are_kept_beside_the_first_and_wake_the_worker(camera):
    first = camera.send("scan")

    other = camera.send("scan", data="re-encoded")

    assert (other.scan_id, other.state, other.queued) == (first.scan_id, "queued", True)
    assert other.alarms == ("version_received",)
    assert worklist.next_work_in_s(camera.engine) == 0.0
    (pending,) = worklist.pending_versions(camera.engine)
    one, two = worklist.details(camera.engine, first.scan_id)["instances"]
    assert (one["version"], one["verdict"], two["version"], two["verdict"]) == (1, None, 2, "pending")
    assert (pending.instance_id, pending.known_spool_name) == (two["id"], one["spool_name"])
    assert (pending.spool_name, pending.known_purged) == (two["spool_name"], False)
    assert camera.send("scan", data="re-encoded").new is False
    assert worklist.row(camera.engine, first.scan_id)["revision"] == 1


def test_a_third_version_is_told_from_the_second(camera):
    camera.send("scan")
    for data in ("2", "3"):
        camera.send("scan", data=data)
    assert len(worklist.pending_versions(camera.engine)) == 2


def test_objects_never_analysed_hang_on_one_declined_row_for_each_study_and_patient(camera):
    ct = "1.2.840.10008.5.1.4.1.1.2"
    kept = [camera.send(f"ct{n}", sop_class_uid=ct, reason="wrong_class", frames=(), ours=False) for n in range(3)]
    assert {(one.scan_id, one.state, one.queued) for one in kept} == {(kept[0].scan_id, "declined", False)}
    row = worklist.row(camera.engine, kept[0].scan_id)
    assert (row["outcome"], row["reason"], row["views"], row["revision"]) == ("declined", "wrong_class", "", 1)

    bone = camera.send("bone", reason="not_131i", frames=(), ours=False)
    camera.send("ct9", sop_class_uid=ct, reason="wrong_class", frames=(), ours=False)

    assert bone.scan_id == kept[0].scan_id
    assert worklist.row(camera.engine, bone.scan_id)["reason"] == "not_131i"
    other = camera.send("ct4", sop_class_uid=ct, reason="wrong_class", frames=(), patient_id="RMN-2")
    assert other.scan_id != bone.scan_id


def test_a_scan_is_found_beside_the_hybrid_studys_other_objects(camera):
    camera.send("ct", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", reason="wrong_class", frames=())
    scan = camera.send("scan")
    assert {row["state"] for row in worklist.rows(camera.engine)} == {"declined", "queued"}
    assert scan.state == "queued"


@pytest.mark.parametrize("reason", ["unknown_view", "ambiguous_views", "unreadable"])
def test_a_scan_whose_header_cannot_be_placed_is_queued_alone_for_its_note(camera, reason):
    receipt = camera.send("odd", reason=reason, frames=())
    camera.send("a", "anterior")

    row = worklist.row(camera.engine, receipt.scan_id)
    assert (row["state"], row["reason"], len(uids(camera.engine, receipt.scan_id))) == ("queued", reason, 1)


def test_an_unreadable_object_of_another_class_is_kept_not_queued(camera):
    receipt = camera.send("pdf", sop_class_uid="1.2.840.10008.5.1.4.1.1.104.1", reason="unreadable", frames=())
    assert (receipt.state, receipt.queued) == ("declined", False)


def test_another_patient_under_the_same_study_gets_his_own_row_and_an_alarm_once(camera):
    mine = camera.send("a", "anterior")

    his = camera.send("p", "posterior", patient_id="RMN-2")
    more = camera.send("p2", "posterior", 500, patient_id="RMN-2")

    assert his.scan_id != mine.scan_id
    assert (mine.alarms, his.alarms, more.alarms) == ((), ("patient_differs_in_study",), ())
    assert "patient_differs_in_study" in {one.event for one in worklist.events(camera.engine, his.scan_id)}
    assert {row["state"] for row in worklist.rows(camera.engine)} == {"receiving"}


@pytest.mark.parametrize("state", ["queued", "analysing", "sending", "delivered", "failed", "declined"])
def test_a_view_that_comes_late_opens_a_new_revision_in_every_state(camera, worker, state):
    scan_id = camera.send("a1", "anterior", 0).scan_id
    camera.send("p1", "posterior", 0)
    if state != "queued":
        held = worker.claim()
    if state in ("sending", "delivered"):
        worker.finish(held, "pacs")
    if state == "delivered":
        worker.deliver()
    if state == "failed":
        worker.finish(held, kinds=(), outcome="failed", reason="gate_failed", finding=None, probability=None)
    if state == "declined":
        worker.finish(held, kinds=(), outcome="declined", reason="flood", finding=None, probability=None)
    before = worklist.row(camera.engine, scan_id)
    assert before["state"] == state

    # At the same second as the pair: a third view makes it impossible to say which two belong together.
    late = camera.send("a2", "anterior", 0.01)

    row = worklist.row(camera.engine, scan_id)
    assert (late.scan_id, row["state"], row["reason"]) == (scan_id, "queued", "ambiguous_views")
    assert row["revision"] == before["revision"] + 1
    assert (row["outcome"], row["finding"], row["probability"], row["results"]) == (None, None, None, [])
    if state == "analysing":
        assert worklist.heartbeat(camera.engine, held) is False
        with pytest.raises(worklist.LeaseLost):
            worker.finish(held, "pacs")
    if state == "sending":
        assert {one["state"] for one in worklist.details(camera.engine, scan_id)["deliveries"]} == {"cancelled"}
        assert worklist.next_delivery_in_s(camera.engine, "pacs") is None
    if state == "delivered":
        again = worker.claim()
        assert {one.sop_instance_uid for one in again.predecessors} == {
            one.sop_instance_uid for one in worker.results(held, "sr", "sc")
        }
    assert worklist.verify_events(camera.engine) == ()


def test_what_a_row_sent_before_another_row_took_its_views_becomes_the_others_predecessor(camera, worker):
    camera.send("a1", "anterior", 0)
    camera.send("a2", "anterior", 30)
    for row in worklist.rows(camera.engine):
        assert row["state"] == "receiving"
    short = replace(camera, rules=replace(camera.rules, views_timeout_s=-1))
    note = short.send("a3", "anterior", 15)
    assert worklist.expire_views(camera.engine) == (note.scan_id,)
    held = worker.claim()
    assert (held.scan_id, held.reason) == (note.scan_id, "view_missing")
    worker.finish(held, "pacs", outcome="declined", reason="view_missing", finding=None, probability=None)
    worker.deliver()

    camera.send("p", "posterior", 10)  # joins all four: the row with the note loses its view

    joined = worker.claim()
    assert len(joined.instances) == 4
    assert joined.scan_id != note.scan_id
    assert {one.sop_instance_uid for one in joined.predecessors} == {
        one.sop_instance_uid for one in worker.results(held, "sr", "sc")
    }


def test_a_view_never_meets_a_revision_twice_so_that_no_result_uid_is_made_twice(camera, worker):
    short = replace(camera, rules=replace(camera.rules, views_timeout_s=-1))
    first = short.send("a", "anterior", 0)
    worklist.expire_views(camera.engine)
    held = worker.claim()
    assert (held.scan_id, held.revision) == (first.scan_id, 1)
    worker.finish(held, outcome="declined", reason="view_missing", finding=None, probability=None)
    camera.send("p", "posterior", 20)  # joins "a" for want of a better partner
    camera.send("a2", "anterior", 20)  # the better partner: "a" stands alone again

    seen = {}
    for row in worklist.rows(camera.engine):
        for uid in uids(camera.engine, row["id"]):
            seen[uid] = row["revision"]
    assert seen[camera.facts("a").sop_instance_uid] > 1
    assert len({row["id"] for row in worklist.rows(camera.engine) if uids(camera.engine, row["id"])}) == 2


def test_a_required_view_that_does_not_come_leads_to_a_note_and_never_to_a_finding(camera, worker):
    waiting = camera.send("a", "anterior")
    assert worklist.expire_views(camera.engine) == ()
    late = replace(camera, rules=replace(camera.rules, views_timeout_s=-1)).send("b", "anterior", 300)

    assert worklist.expire_views(camera.engine) == (late.scan_id,)

    row = worklist.row(camera.engine, late.scan_id)
    assert (row["state"], row["reason"]) == ("queued", "view_missing")
    assert worklist.row(camera.engine, waiting.scan_id)["state"] == "receiving"
    held = worker.claim()
    assert held.reason == "view_missing"
    # The missing view after all: the scan is analysed.
    camera.send("q", "posterior", 300)
    assert worklist.row(camera.engine, late.scan_id)["reason"] is None
    assert worklist.row(camera.engine, late.scan_id)["state"] == "queued"


def test_a_single_required_view_is_enough_where_the_settings_say_so(camera):
    one_view = replace(camera, rules=replace(camera.rules, require_views=("anterior",)))
    assert one_view.send("a", "anterior").state == "queued"


def test_acquisition_times_are_told_in_utc_by_the_headers_offset_else_by_the_nodes_zone(camera):
    with_offset = camera.send("x", timezone_offset_from_utc="+0530")
    east = replace(camera, rules=replace(camera.rules, timezone=timezone(timedelta(hours=1))))
    without = east.send("y", minute=120)
    no_offset = camera.send("z", minute=240, timezone_offset_from_utc="+9900")
    never = camera.send("w", acquired_at=None)

    told = [worklist.row(camera.engine, one.scan_id)["acquired_at"] for one in (with_offset, without, no_offset, never)]
    assert told == ["2026-11-23T11:30:00.000Z", "2026-11-23T18:00:00.000Z", "2026-11-23T21:00:00.000Z", None]


def test_text_that_a_database_refuses_does_not_lose_the_scan(camera):
    receipt = camera.send("odd", patient_id="RMN\0-9", patient_name="Bro\udcffken", accession_number="\0")
    row = worklist.row(camera.engine, receipt.scan_id)
    assert (row["patient_id"], row["accession_number"]) == ("RMN-9", "")


def test_no_patient_identity_stands_in_the_history_or_in_the_facts(camera):
    receipt = camera.send("a", "anterior")
    camera.send("a", "anterior", data="other")
    camera.send("p", "posterior", patient_id="RMN-2")
    with camera.engine.connect() as conn:
        facts = conn.exec_driver_sql("SELECT facts FROM instance").scalars().all()
        history = conn.exec_driver_sql("SELECT detail FROM event").scalars().all()
    for text in [*facts, *history]:
        for secret in ("RMN-", "Invented", "A-1", "HOSPITAL"):
            assert secret not in text
    assert json.loads(facts[0])["rows"] == 256
    assert receipt.new


TIMES = {"at", "digest", "views_deadline", "at_rest_since"}


def everything(engine):
    """All rows of the tables that intake writes; of times, and of digests over them, only whether there are any."""
    told = []
    with engine.connect() as conn:
        for table in (metadata.tables[name] for name in ("scan", "instance", "event", "identity")):
            for row in conn.execute(select(table).order_by(table.c.id)).mappings():
                told.append({k: v is not None if k in TIMES or k.endswith("_at") else v for k, v in row.items()})
    return told


FIRST = {
    "both views": {},
    "one view": {"view": "anterior"},
    "one view where one is enough": {"view": "posterior", "rules": {"require_views": ("posterior",)}},
    "no view is waited for": {"view": "anterior", "rules": {"require_views": ()}},
    "no view": {"frames": ()},
    "no time": {"acquired_at": None},
    "a view that nobody knows": {"reason": "unknown_view", "frames": ()},
    "views that cannot be told apart": {"reason": "ambiguous_views"},
    "a scan that cannot be read": {"reason": "unreadable"},
    "another object that cannot be read": {"reason": "unreadable", "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2"},
    "not ours": {"reason": "not_131i", "ours": False},
    "another class": {"reason": "wrong_class", "ours": False, "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2"},
}


@pytest.mark.parametrize("shape", FIRST.values(), ids=FIRST.keys())
def test_the_first_object_of_a_study_is_entered_as_any_other_would_be(camera, tmp_path, monkeypatch, shape):
    changed = dict(shape)
    at_once = replace(camera, rules=replace(camera.rules, **changed.pop("rules", {})))
    other = worklist.open_worklist(f"sqlite:///{tmp_path / 'other.db'}")
    worklist.upgrade(other)
    in_steps = replace(at_once, engine=other)
    told, receipts = [], []
    for one in (at_once, in_steps):
        if one is in_steps:
            # The road of an object whose study has rows already, although there are none.
            monkeypatch.setattr(intake, "_begin", lambda *given: intake._join(*given[:-1]))
        receipts.append([one.send("first", **changed), one.send("first", data="again", **changed)])
        receipts[-1] += [one.send("later", "posterior", minute=1), one.send("first", **changed)]
        assert worklist.verify_events(one.engine) == ()
        told.append(everything(one.engine))
    other.dispose()
    assert receipts[0] == receipts[1]
    assert told[0] == told[1]
