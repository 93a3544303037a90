"""Retention: bytes go when their time has come, facts stay, and a row at work is never touched."""

import pytest
from sqlalchemy import text

from dicom_node import worklist
from dicom_node.worklist.clock import now, parse, shifted
from dicom_node.worklist.engine import writing
from dicom_node.worklist.tables import metadata


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
    unreadable = camera.send("nm", study_instance_uid="2.25.45", reason="unreadable", frames=()).scan_id
    worker.finish(worker.claim(), kinds=(), **NOTE, reason="unreadable")
    waiting = camera.send("a", "anterior").scan_id
    rows = {found, note, not_ours, failed, kept, unreadable, waiting}

    gone = {}
    for days in (1, 3, 29, 31, 89, 91):
        for scan_id in rows:
            age(camera.engine, scan_id, days)
        for file in purge(camera.engine):
            gone.setdefault(file.scan_id, days)
    assert gone == {found: 31, note: 31, not_ours: 3, failed: 91, kept: 3, unreadable: 91}


def test_an_alarm_comes_two_weeks_before_disputed_bytes_go_and_once(camera, worker):
    disputed = camera.send("scan").scan_id
    camera.send("scan", data="another image")
    (pending,) = worklist.pending_versions(camera.engine)
    worklist.judge_version(camera.engine, pending.instance_id, "other_pixels")
    worker.finish(worker.claim())
    failed = camera.send("f", study_instance_uid="2.25.46").scan_id
    worker.finish(worker.claim(), kinds=(), **(NOTE | {"outcome": "failed", "reason": "gate_failed"}))
    fine = camera.send("d", study_instance_uid="2.25.47").scan_id
    worker.finish(worker.claim())

    for days, expected in ((75, ()), (77, (disputed, failed)), (78, ())):
        for scan_id in (disputed, failed, fine):
            if days != 78:
                age(camera.engine, scan_id, days)
        assert worklist.warn_before_purge(camera.engine, 30) == expected
    assert "purge_near" in {one.event for one in worklist.events(camera.engine, failed)}
    assert purge(camera.engine)
    assert worklist.verify_history(camera.engine) == ()


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


def tamper(engine, *statements):
    """Edit the history behind our back, as somebody with the file, or the password, could."""
    unlock = {
        "sqlite": ("DROP TRIGGER event_no_update", "DROP TRIGGER event_no_delete"),
        "postgresql": ("DROP TRIGGER event_no_change ON event",),
    }
    with engine.begin() as conn:
        for statement in (*unlock[engine.dialect.name], *statements):
            conn.execute(text(statement))


@pytest.fixture
def checked(camera, worker):
    """Two scans, a checkpoint, a third scan, another checkpoint."""
    for number in (1, 2):
        camera.send(f"s{number}", study_instance_uid=f"2.25.4{number}")
    worker.finish(worker.claim())
    assert worklist.checkpoint(camera.engine) is not None
    camera.send("s3", study_instance_uid="2.25.43")
    assert worklist.checkpoint(camera.engine, every_s=0) is not None
    return camera.engine


def test_a_checkpoint_covers_what_happened_since_the_one_before_once_a_day(camera):
    assert worklist.checkpoint(camera.engine) is None, "nothing has happened yet"
    scan_id = camera.send("scan").scan_id
    first = worklist.checkpoint(camera.engine)
    assert (first.first, first.histories) == (1, 1)
    assert worklist.checkpoint(camera.engine) is None, "the last one is young"
    assert worklist.checkpoint(camera.engine, every_s=0) is None, "nothing has happened since"
    camera.send("ct", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", reason="wrong_class", frames=())
    second = worklist.checkpoint(camera.engine, every_s=0)
    assert (second.first, second.histories) == (first.last + 1, 2), "the other row and the node's own"
    assert worklist.checkpoints(camera.engine) == (first, second)
    assert worklist.verify_history(camera.engine) == ()
    assert scan_id


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("UPDATE event SET detail = 'nothing happened' WHERE scan_id = 1 AND sequence = 1", "was changed after"),
        ("UPDATE event SET at = '2026-01-01T00:00:00.000Z' WHERE scan_id = 2 AND sequence = 2", "was changed after"),
        ("DELETE FROM event WHERE scan_id = 1 AND sequence = 2", "lacks event 2"),
        ("DELETE FROM event WHERE scan_id = 2 AND sequence = 3", "is not what it was at the checkpoint"),
        ("DELETE FROM event WHERE scan_id = 3", "is not what it was at the checkpoint"),
        ("DELETE FROM event WHERE scan_id IS NULL AND sequence = 1", "the history of the node lacks event 1"),
        (
            "INSERT INTO event (scan_id, sequence, at, event, detail, digest)"
            " SELECT scan_id, 99, at, event, detail, digest FROM event WHERE scan_id = 1 AND sequence = 1",
            "lacks event",
        ),
        ("UPDATE scan SET state = 'failed' WHERE id = 2", "its history ends elsewhere"),
    ],
)
def test_an_event_that_was_changed_removed_or_added_is_found(checked, harm, says):
    assert worklist.verify_history(checked) == ()
    tamper(checked, harm)
    assert any(says in fault for fault in worklist.verify_history(checked))


def test_purge_and_forgetting_keep_the_history_whole(checked, camera):
    camera.send("ct", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", reason="wrong_class", frames=())
    for scan_id in (1, 2, 3, 4):
        age(checked, scan_id, 400)
    assert purge(checked)
    assert worklist.forget(checked, 365) == 2
    assert worklist.checkpoint(checked, every_s=0) is not None
    assert worklist.verify_history(checked) == ()


@pytest.mark.parametrize("jumped_s", [3 * 86_400, -7_200])
def test_deadlines_move_with_a_clock_that_jumped_and_only_once(camera, worker, jumped_s):
    """The stamps are moved instead of the clock: as it looks right after the jump."""
    waiting = camera.send("a", "anterior").scan_id
    camera.send("done", study_instance_uid="2.25.51")
    worker.finish(worker.claim())
    camera.send("s", study_instance_uid="2.25.52")
    worker.finish(worker.claim(), "pacs")
    assert worklist.due_deliveries(camera.engine, "pacs", owner="s", limit=9, hold_s=3600)
    columns = {
        "scan": ("views_deadline", "not_before", "at_rest_since", "updated_at"),
        "delivery": ("not_before", "first_tried_at", "updated_at"),
    }

    def times():
        with camera.engine.connect() as conn:
            return {
                (table, one["id"], name): parse(one[name]).timestamp()
                for table, names in columns.items()
                for one in conn.execute(metadata.tables[table].select()).mappings()
                for name in names
                if one[name] is not None and name != "updated_at"
            }

    def shift_all(by_s):
        with writing(camera.engine) as conn:
            for table, names in columns.items():
                for name in names:
                    column = metadata.tables[table].c[name]
                    conn.execute(
                        column.table.update().where(column.is_not(None)).values({column: shifted(column, by_s)})
                    )

    right = times()
    shift_all(-jumped_s)

    assert worklist.follow_clock(camera.engine, jumped_s) == len(right)

    assert times() == pytest.approx(right, abs=0.01)
    assert worklist.follow_clock(camera.engine, jumped_s) == 0, "another machine saw it too"
    assert worklist.expire_views(camera.engine) == ()
    assert worklist.purgeable(camera.engine, 30) == ()
    camera.send("p", "posterior")
    assert worklist.row(camera.engine, waiting)["state"] == "queued"
    assert worklist.verify_history(camera.engine) == ()
