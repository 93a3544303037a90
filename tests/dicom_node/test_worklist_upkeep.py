"""Retention: bytes go when their time has come, facts stay, and a row at work is never touched."""

import pytest
from sqlalchemy import text

from dicom_node import worklist
from dicom_node.worklist.clock import now, parse
from dicom_node.worklist.engine import writing


def kept(engine):
    return {file.file_name for file in worklist.kept_files(engine) if file.purged_at is None}


NOTE = {"outcome": "declined", "finding": None, "probability": None}


def age(engine, scan_id, days):
    """Let a row have come to rest so many days ago."""
    with writing(engine) as conn:
        at = conn.scalar(now(-days * 86_400).select())
        conn.execute(text("UPDATE scan SET at_rest_since = :at WHERE id = :id"), {"at": at, "id": scan_id})


def purge(engine, retention_days=30):
    return [file for file in worklist.purgeable(engine, retention_days) if worklist.mark_purged(engine, file)]


def test_each_kind_of_row_is_kept_for_its_own_time(camera, worker):
    def scan(number, **answer):
        scan_id = camera.send(f"s{number}", study_instance_uid=f"2.25.4{number}").scan_id
        kinds = answer.pop("kinds", ("sr",))
        worker.finish(worker.claim(), kinds=kinds, **answer)
        return scan_id

    found = scan(1)
    note = scan(2, **NOTE, reason="low_counts")
    not_ours = scan(3, kinds=(), **NOTE, reason="flood")
    failed = scan(4, kinds=(), **(NOTE | {"outcome": "failed", "reason": "gate_failed"}))
    kept = camera.send("ct", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", reason="wrong_class", frames=()).scan_id
    waiting = camera.send("a", "anterior").scan_id
    rows = {found, note, not_ours, failed, kept, waiting}

    gone = {}
    for days in (1, 3, 29, 31, 89, 91):
        for scan_id in rows:
            age(camera.engine, scan_id, days)
        for file in purge(camera.engine):
            gone.setdefault(file.scan_id, days)
    assert gone == {found: 31, note: 31, not_ours: 3, failed: 91, kept: 3}


def test_purging_leaves_facts_so_that_a_resend_is_recognised_and_nothing_is_retried(camera, worker):
    scan_id = camera.send("scan").scan_id
    worker.finish(worker.claim())
    age(camera.engine, scan_id, 31)

    files = purge(camera.engine)

    assert sorted(file.kind for file in files) == ["instance", "result", "result"]
    assert kept(camera.engine) == set()
    assert worklist.purgeable(camera.engine, 30) == ()
    assert camera.send("scan").new is False
    with pytest.raises(worklist.TransitionRefused, match="removed by retention"):
        worklist.retry(camera.engine, scan_id)
    assert worklist.row(camera.engine, scan_id)["finding"] == "present"


def test_a_row_taken_up_again_keeps_its_bytes(camera, worker):
    scan_id = camera.send("scan").scan_id
    worker.finish(worker.claim())
    age(camera.engine, scan_id, 31)
    files = worklist.purgeable(camera.engine, 30)
    worklist.retry(camera.engine, scan_id)

    assert [worklist.mark_purged(camera.engine, file) for file in files] == [False] * 3
    assert len(worker.claim().instances) == 1


def test_quarantined_bytes_stay_longer_than_the_row_they_came_to(camera, worker):
    scan_id = camera.send("scan").scan_id
    camera.send("scan", data="another image")
    (pending,) = worklist.pending_versions(camera.engine)
    worklist.judge_version(camera.engine, pending.instance_id, "other_pixels")
    worker.finish(worker.claim())
    age(camera.engine, scan_id, 31)
    purge(camera.engine)
    assert kept(camera.engine) == {pending.spool_name}
    age(camera.engine, scan_id, 91)
    assert len(purge(camera.engine)) == 1


def test_a_late_view_of_a_purged_scan_waits_for_a_partner_of_its_own(camera, worker):
    scan_id = camera.send("a", "anterior").scan_id
    camera.send("p", "posterior")
    worker.finish(worker.claim())
    age(camera.engine, scan_id, 31)
    purge(camera.engine)

    late = camera.send("a2", "anterior", 0.01)

    assert (late.scan_id != scan_id, late.state) == (True, "receiving")
    assert worklist.row(camera.engine, scan_id)["state"] == "delivered"


def test_forgetting_empties_identity_only_where_the_bytes_are_gone(camera, worker):
    first = camera.send("scan").scan_id
    worker.finish(worker.claim())
    second = camera.send("other", study_instance_uid="2.25.3").scan_id
    worker.finish(worker.claim())
    age(camera.engine, first, 400)
    purge(camera.engine)
    age(camera.engine, second, 400)

    assert worklist.forget(camera.engine, 365) == 1
    assert worklist.forget(camera.engine, 365) == 0

    row = worklist.row(camera.engine, first)
    assert (row["patient_id"], row["accession_number"], row["finding"]) == (None, None, "present")
    assert worklist.row(camera.engine, second)["patient_id"] == "RMN-1"
    with camera.engine.connect() as conn:
        assert conn.execute(text("SELECT patient_name FROM scan WHERE id = :id"), {"id": first}).scalar() is None
    assert camera.send("scan").new is False
    assert worklist.check(camera.engine) == worklist.verify_events(camera.engine) == ()
    assert "forgotten" in {one.event for one in worklist.events(camera.engine, first)}


def test_lost_bytes_are_told_once_and_never_where_retention_removed_them(camera, worker):
    scan_id = camera.send("scan").scan_id
    worker.finish(worker.claim())
    first, *_ = files = worklist.kept_files(camera.engine)
    assert [file.kind for file in files] == ["instance", "result", "result"]

    assert worklist.note_lost(camera.engine, first, "bytes_missing") is True
    assert worklist.note_lost(camera.engine, first, "bytes_missing") is False
    age(camera.engine, scan_id, 31)
    purge(camera.engine)
    assert worklist.note_lost(camera.engine, files[1], "bytes_missing") is False

    told = [one.detail for one in worklist.events(camera.engine, scan_id) if one.event == "bytes_missing"]
    assert told == [f"instance sha256 {first.sha256}"]


def test_check_names_what_contradicts_itself(camera):
    scan_id = camera.send("a", "anterior").scan_id
    assert worklist.check(camera.engine) == ()
    with writing(camera.engine) as conn:
        conn.execute(text("UPDATE scan SET views_deadline = NULL"))
    assert worklist.check(camera.engine) == (f"scan {scan_id} waits for a view without a deadline",)


def test_the_clock_is_the_databases_and_counts_in_utc(engine):
    with engine.connect() as conn:
        earlier, here, later = (conn.scalar(now(seconds).select()) for seconds in (-90.5, 0, 3600))
    assert earlier < here < later
    assert 90.4 < (parse(here) - parse(earlier)).total_seconds() < 92
    assert abs((parse(later) - parse(here)).total_seconds() - 3600) < 2
    with engine.connect() as conn:
        sql = {"sqlite": "SELECT strftime('%s', 'now')", "postgresql": "SELECT extract(epoch FROM clock_timestamp())"}
        epoch = float(conn.exec_driver_sql(sql[engine.dialect.name]).scalar())
    assert abs(parse(here).timestamp() - epoch) < 60
