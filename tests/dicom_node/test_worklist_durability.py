"""Locks, readers, wrong places and sudden death: what was committed stands, what was not is gone, nobody is lied to."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from dicom_node import worklist
from dicom_node.worklist.engine import writing


def test_an_open_reader_does_not_block_reception(sqlite_camera, tmp_path):
    sqlite_camera.send("before")
    reader = sqlite3.connect(tmp_path / "worklist.db", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM worklist").fetchone() == (1,)

    receipt = sqlite_camera.send("after", study_instance_uid="2.25.3")

    assert receipt.new
    assert reader.execute("SELECT count(*) FROM worklist").fetchone() == (1,), "the reader keeps its own picture"
    reader.execute("COMMIT")
    assert reader.execute("SELECT count(*) FROM worklist").fetchone() == (2,)
    reader.close()


def test_a_write_lock_gives_an_error_after_the_busy_timeout_and_loses_nothing(sqlite_camera, tmp_path):
    kept = sqlite_camera.send("before")
    impatient = replace(
        sqlite_camera, engine=worklist.open_worklist(f"sqlite:///{tmp_path / 'worklist.db'}", busy_timeout_s=0.1)
    )
    admin = sqlite3.connect(tmp_path / "worklist.db", isolation_level=None)
    admin.execute("BEGIN IMMEDIATE")

    with pytest.raises(worklist.DatabaseUnavailable, match="locked") as refused:
        impatient.send("scan", study_instance_uid="2.25.3", patient_id="RMN-7")
    with pytest.raises(worklist.DatabaseUnavailable):
        worklist.claim(impatient.engine, "w", "b")

    assert refused.value.retry is True
    assert refused.value.hint
    assert "RMN-7" not in str(refused.value)
    assert [row["id"] for row in worklist.rows(impatient.engine)] == [kept.scan_id]
    admin.execute("COMMIT")
    admin.close()
    assert impatient.send("scan", study_instance_uid="2.25.3").new is True
    impatient.engine.dispose()


def test_a_lock_on_postgresql_gives_the_same_error(postgresql_server):
    engine = worklist.open_worklist(postgresql_server(), busy_timeout_s=0.1)
    worklist.upgrade(engine)
    with engine.connect() as admin, admin.begin():
        admin.execute(text("LOCK TABLE scan IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(worklist.DatabaseUnavailable, match="lock timeout") as refused:
            worklist.claim(engine, "w", "b")
    assert refused.value.retry is True
    assert worklist.claim(engine, "w", "b") is None
    engine.dispose()


def test_a_server_that_is_away_is_an_error_that_names_no_password(tmp_path):
    engine = worklist.open_worklist(f"postgresql://u:s3cret@/worklist?host={tmp_path}")
    with pytest.raises(worklist.DatabaseUnavailable) as away:
        worklist.claim(engine, "w", "b")
    assert away.value.retry is True
    assert "s3cret" not in str(away.value)


def test_a_transaction_that_fails_in_the_middle_leaves_nothing(camera):
    camera.send("scan")

    def fail_half_way():
        with writing(camera.engine) as conn:
            conn.execute(text("UPDATE scan SET last_error = 'half'"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert worklist.rows(camera.engine)[0]["last_error"] is None


def test_threads_that_write_wait_for_their_turn_and_one_that_waits_too_long_is_told_so(tmp_path):
    engine = worklist.open_worklist(f"sqlite:///{tmp_path / 'worklist.db'}", busy_timeout_s=0.2)
    worklist.upgrade(engine)
    told = []

    def write():
        try:
            worklist.record_event(engine, "node", "waited")
        except worklist.DatabaseUnavailable as error:
            told.append(error)

    with writing(engine) as conn:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        conn.execute(text("SELECT 1"))
    assert [error.retry for error in told] == [True]
    assert "busy timeout" in str(told[0])

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1, "each of them had its turn"
    assert len(worklist.events(engine, None)) == 8
    engine.dispose()


def test_no_file_of_the_worklist_stays_open_behind_an_engine_that_was_disposed_of(tmp_path):
    path = tmp_path / "worklist.db"
    engine = worklist.open_worklist(f"sqlite:///{path}")
    worklist.upgrade(engine)
    worklist.record_event(engine, "node", "started")
    folder = Path("/proc/self/fd")

    def held():
        return [one for one in folder.iterdir() if one.is_symlink() and str(one.readlink()).startswith(str(path))]

    assert held()
    engine.dispose()
    assert held() == []
    worklist.record_event(engine, "node", "started again")
    assert len(worklist.events(engine, None)) == 2
    engine.dispose()


def test_many_associations_may_send_parts_of_one_study_at_once(camera):
    """Eight threads, four acquisitions of two views, all of one study: four rows, whatever the interleaving."""
    objects = [(f"{view[0]}{n}", view, 30 * n) for n in range(4) for view in ("anterior", "posterior")]
    start = threading.Barrier(len(objects))
    failed = []

    def send(name, view, minute):
        start.wait()
        try:
            camera.send(name, view, minute)
        except worklist.DatabaseUnavailable as error:
            failed.append(error)

    threads = [threading.Thread(target=send, args=one) for one in objects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []
    queued = worklist.rows(camera.engine, state="queued")
    assert [row["views"] for row in queued] == ["anterior,posterior"] * 4
    assert worklist.check(camera.engine) == worklist.verify_events(camera.engine) == ()


def test_the_database_file_is_for_its_user_only_and_its_folder_is_made(tmp_path):
    path = tmp_path / "var" / "deep" / "worklist.db"
    previous = os.umask(0)
    try:
        engine = worklist.open_worklist(f"sqlite:///{path}")
        worklist.upgrade(engine)
        worklist.record_event(engine, "node", "started")
        modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
        engine.dispose()
    finally:
        os.umask(previous)
    assert modes
    assert set(modes.values()) == {0o600}


def test_every_connection_writes_through_to_the_disk(sqlite_engine):
    with sqlite_engine.connect() as conn:
        values = [conn.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        foreign_keys = conn.exec_driver_sql("PRAGMA foreign_keys").scalar()
    assert (*values, foreign_keys) == ("wal", 2, 1)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("mysql://localhost/x", "mysql"),
        ("worklist.db", "cannot be read"),
        ("postgresql+nodriver://x/y", "not installed"),
    ],
)
def test_a_url_that_cannot_serve_is_refused_with_what_to_write(url, says):
    with pytest.raises(worklist.WorklistFault, match=says) as refused:
        worklist.open_worklist(url)
    assert refused.value.hint


def test_a_file_that_is_no_database_is_an_error_and_is_left_as_it_is(tmp_path):
    path = tmp_path / "worklist.db"
    path.write_bytes(b"not a database, but somebody's file " * 40)
    engine = worklist.open_worklist(f"sqlite:///{path}")
    with pytest.raises(worklist.DatabaseUnavailable, match="not a database"):
        worklist.upgrade(engine)
    engine.dispose()
    assert path.read_bytes().startswith(b"not a database, but")


_SENDER = """
import sys
from datetime import datetime
from dicom_node.worklist import IntakeRules, Stored, claim, finish, NewResult, open_worklist, receive
from pipeline.views import FrameFacts, HeaderFacts

engine = open_worklist(sys.argv[1])
rules = IntakeRules(("anterior", "posterior"), 3600, 3600)
for number in range(1_000_000):
    facts = HeaderFacts(
        "1.2.840.10008.5.1.4.1.1.20", f"2.25.{number + 1}", f"2.25.5{number}", "2.25.6", "RMN", "", "Invented^I", "",
        datetime(2026, 11, 23), "", 256, 256, 2, (2.2, 2.2), (327.6, 400.4),
        (FrameFacts("anterior", 1), FrameFacts("posterior", 2)), None, True,
    )
    receipt = receive(engine, facts, Stored("n", f"{number}", 1, "1.2.840.10008.1.2"), source_aet="X", rules=rules)
    print("acknowledged", receipt.scan_id, flush=True)
    held = claim(engine, "w", "b")
    result = NewResult("sr", "", "1.2", f"2.25.7{number}", "2.25.8", "d", "f")
    finish(engine, held, outcome="analysed", finding="absent", probability=0.1, model="m", results=[result],
           deliveries=[(result.sop_instance_uid, "pacs")])
"""


@pytest.mark.parametrize("after", [3, 8, 13])
def test_what_was_acknowledged_survives_a_kill_in_the_middle_of_transactions(sqlite_engine, tmp_path, after):
    url = f"sqlite:///{tmp_path / 'worklist.db'}"
    node = subprocess.Popen([sys.executable, "-c", _SENDER, url], stdout=subprocess.PIPE, text=True)
    acknowledged = [int(node.stdout.readline().split()[1]) for _ in range(after)]
    node.send_signal(signal.SIGKILL)
    # What it had said before it died counts as acknowledged too.
    acknowledged += [int(line.split()[1]) for line in node.stdout.read().splitlines() if line.count(" ") == 1]
    node.wait(timeout=10)
    node.stdout.close()

    rows = {row["id"]: row["state"] for row in worklist.rows(sqlite_engine, limit=1_000_000)}
    assert set(acknowledged) <= set(rows)
    assert len(rows) <= len(acknowledged) + 1
    assert worklist.check(sqlite_engine) == worklist.verify_events(sqlite_engine) == ()
    # At most the one that the dead worker held is not at "sending"; it is freed and taken again.
    assert sum(state != "sending" for state in rows.values()) <= 1
    worklist.release_owner(sqlite_engine, "w", except_boot="next")
    held = worklist.claim(sqlite_engine, "w", "next")
    assert (held is not None) == any(state != "sending" for state in rows.values())
