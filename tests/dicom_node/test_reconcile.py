"""Spool and worklist after kills, old backups and damaged disks: mended with a line in the history, or refused."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import Dataset

from dicom_node import reconcile, service, spool, worklist
from dicom_node.errors import RemnantError
from dicom_node.service import House
from dicom_node.settings import Settings
from dicom_node.worker import Worker
from pipeline.camera import examination, expose, foreign
from pipeline.phantom import phantom
from pipeline.views import facts_of

SYNTAX = "1.2.840.10008.1.2.1"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    opened = service.open_house(Settings(storage={"directory": tmp_path / "var", "min_free": "1 MiB"}))
    yield opened
    opened.engine.dispose()


def parts(ds: Dataset) -> tuple[bytes, bytes]:
    """What the receiver would hand to the spool: file meta information, and the dataset as sent."""
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    start = 144 + int.from_bytes(data[140:144], "little")
    return data[:start], data[start:]


def put(house: House, ds: Dataset) -> str:
    """Only the bytes: as a receiver leaves them that dies before the transaction."""
    return spool.put_object(house.spool, *parts(ds))[0]


def receive(house: House, ds: Dataset) -> worklist.Receipt:
    name = put(house, ds)
    stored = worklist.Stored(name, Path(name).stem, len(parts(ds)[1]), SYNTAX)
    return worklist.receive(
        house.engine, facts_of(ds), stored, source_aet="OPTIMA1", rules=reconcile.rules_of(house.settings)
    )


def mend(house: House) -> reconcile.Reconciled:
    return reconcile.reconcile(house.engine, house.spool, reconcile.rules_of(house.settings))


@cache
def scan(seed: int) -> Dataset:
    (ds,) = expose(phantom(seed), examination(seed), "two_frames")
    return ds


def told(house: House, scan_id: int | None) -> list[str]:
    return [one.event for one in worklist.events(house.engine, scan_id)]


def test_a_sound_house_is_left_alone(house: House) -> None:
    receive(house, scan(1))
    receive(house, foreign("ct_slice", examination(1)))
    assert str(mend(house)) == ""
    assert told(house, None) == []


def test_an_object_without_a_row_is_entered_as_received_and_once(house: House) -> None:
    ds = scan(1)
    put(house, ds)

    assert mend(house).adopted == 1

    (row,) = worklist.rows(house.engine)
    assert (row["state"], row["patient_id"], row["study_instance_uid"]) == (
        "queued",
        ds.PatientID,
        ds.StudyInstanceUID,
    )
    assert "adopted" in told(house, row["id"])
    assert told(house, None) == ["node"]
    assert receive(house, ds).new is False  # the camera had no answer and sends again
    assert str(mend(house)) == ""
    held = worklist.claim(house.engine, "w", "b")
    assert held is not None
    assert [spool.dataset_digest(house.spool.objects / one.spool_name) for one in held.instances] == [
        one.sha256 for one in held.instances
    ]


def test_the_views_of_one_neck_found_without_rows_are_one_acquisition(house: House) -> None:
    for ds in expose(phantom(2), examination(2), "two_objects"):
        put(house, ds)
    assert mend(house).adopted == 2
    (row,) = worklist.rows(house.engine, state="queued")
    assert row["views"] == "anterior,posterior"


def test_what_a_newer_database_had_acknowledged_is_received_again_when_an_old_one_comes_back(house: House) -> None:
    old = scan(1)
    receive(house, old)
    backup = house.spool.run.parent / "backup.db"
    with closing(sqlite3.connect(house.engine.url.database)) as now, closing(sqlite3.connect(backup)) as copy:
        now.backup(copy)
    receive(house, scan(2))
    receive(house, foreign("ct_slice", examination(3)))
    house.engine.dispose()
    for suffix in ("-wal", "-shm"):
        Path(f"{house.engine.url.database}{suffix}").unlink(missing_ok=True)
    shutil.copy(backup, house.engine.url.database)

    again = service.open_house(house.settings)
    assert [row["study_instance_uid"] for row in worklist.rows(again.engine)] == [old.StudyInstanceUID]
    assert mend(again).adopted == 2
    assert sorted(row["state"] for row in worklist.rows(again.engine)) == ["declined", "queued", "queued"]
    assert worklist.check(again.engine) == worklist.verify_events(again.engine) == ()
    again.engine.dispose()


def test_a_file_whose_bytes_are_not_those_received_is_set_apart_and_never_entered(house: House) -> None:
    name = put(house, scan(1))
    path = house.spool.objects / name
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(data)

    assert mend(house).set_apart == 1

    assert worklist.rows(house.engine) == []
    assert (house.spool.quarantine / Path(name).name).read_bytes() == data
    (event,) = [one for one in worklist.events(house.engine, None) if "quarantine: its" in one.detail]
    assert event.detail.endswith("its bytes are not those that were received")
    assert str(mend(house)) == ""


@pytest.mark.parametrize("content", [b"", b"no DICOM", bytes(128) + b"DICM" + bytes(40)])
def test_a_file_that_is_no_dicom_is_set_apart(house: House, content: bytes) -> None:
    name = f"ab/ab{'0' * 62}.dcm"
    (house.spool.objects / name).write_bytes(content)
    assert mend(house).set_apart == 1


def test_what_an_admin_put_on_a_shelf_is_not_ours_and_stays(house: House) -> None:
    note = house.spool.objects / "ab" / "notes.txt"
    note.write_text("an admin's")
    assert str(mend(house)) == ""
    assert note.exists()


def test_a_row_without_its_bytes_is_an_alarm_told_once_and_healed_by_a_resend(house: House) -> None:
    ds = scan(1)
    receipt = receive(house, ds)
    (file,) = worklist.kept_files(house.engine)
    (house.spool.objects / file.file_name).unlink()

    assert mend(house).missing == 1
    assert str(mend(house)) == ""
    assert told(house, receipt.scan_id).count("bytes_missing") == 1

    assert receive(house, ds).new is False
    assert spool.dataset_digest(house.spool.objects / file.file_name) == file.sha256


@pytest.mark.parametrize("harm", ["gone", "one bit flipped"])
def test_bytes_that_a_disk_has_changed_are_never_analysed(house: House, harm: str) -> None:
    """Nor is a note sent: pixels and names are both no longer to be trusted. A resend and a retry bring it back."""
    ds = scan(1)
    receipt = receive(house, ds)
    (file,) = worklist.kept_files(house.engine)
    path = house.spool.objects / file.file_name
    data = bytearray(path.read_bytes())
    data[-1000] ^= 0x01
    path.unlink() if harm == "gone" else path.write_bytes(data)

    worker = Worker(house.settings, house.engine, house.spool, owner="w", boot="b")
    assert worker._work_once()  # its child was never started: whatever asked it would fail here

    row = worklist.row(house.engine, receipt.scan_id)
    assert (row["state"], row["outcome"], row["reason"], row["results"]) == ("failed", "failed", "unreadable", [])
    assert f"remnant worklist retry {receipt.scan_id}" in row["last_error"]
    assert {"bytes_missing", "bytes_damaged"} & set(told(house, receipt.scan_id))
    receive(house, ds)
    worklist.retry(house.engine, receipt.scan_id)
    held = worklist.claim(house.engine, "w", "b")
    assert held is not None
    assert [spool.dataset_digest(house.spool.objects / one.spool_name) for one in held.instances] == [file.sha256]


def test_a_file_cut_short_under_a_row_is_an_alarm(house: House) -> None:
    receipt = receive(house, scan(1))
    (file,) = worklist.kept_files(house.engine)
    os.truncate(house.spool.objects / file.file_name, 4096)
    assert mend(house).damaged == 1
    assert "bytes_damaged" in told(house, receipt.scan_id)


def test_bytes_that_retention_wrote_off_go_also_when_they_come_again(house: House) -> None:
    """A kill between mark and removal, and a camera that sends a purged study again, both leave such a file."""
    ds = foreign("ct_slice", examination(1))
    receipt = receive(house, ds)
    with house.engine.begin() as conn:
        conn.exec_driver_sql("UPDATE instance SET purged_at = received_at")
        conn.exec_driver_sql("UPDATE scan SET purged_at = received_at")
    assert receive(house, ds).new is False
    assert mend(house).removed == 1
    assert list(spool.shelved(house.spool.objects)) == []
    assert "adopted" not in told(house, receipt.scan_id)


def test_a_result_without_a_row_stays_until_nobody_can_ask_for_it_any_more(house: House) -> None:
    young, _ = spool.put_result(house.spool, b"rendered just now")
    old, _ = spool.put_result(house.spool, b"rendered long ago")
    long_ago = time.time() - 91 * 86_400
    os.utime(house.spool.results / old, (long_ago, long_ago))
    assert mend(house).removed == 1
    assert [file.name for file in spool.shelved(house.spool.results)] == [young]


def test_a_database_that_is_gone_is_made_again_from_the_spool(house: House) -> None:
    studies = {receive(house, scan(seed)) and str(scan(seed).StudyInstanceUID) for seed in (1, 2, 3)}
    house.engine.dispose()
    for path in house.spool.run.parent.glob("worklist.db*"):
        path.unlink()
    again = service.open_house(house.settings)
    assert mend(again).adopted == 3
    assert {row["study_instance_uid"] for row in worklist.rows(again.engine)} == studies
    again.engine.dispose()


_KILLED = """
import os, sys
from pathlib import Path
from pydicom import dcmread
from dicom_node import reconcile, service, spool, worklist
from dicom_node.settings import Settings
from pipeline.views import facts_of
house = service.open_house(Settings(storage={"directory": sys.argv[1], "min_free": "1 MiB"}))
for path in sys.argv[2:]:
    data = Path(path).read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    name, digest = spool.put_object(house.spool, data[:start], data[start:])
    stored = worklist.Stored(name, digest, len(data) - start, "1.2.840.10008.1.2.1")
    worklist.receive(house.engine, facts_of(dcmread(path)), stored, source_aet="OPTIMA1",
                     rules=reconcile.rules_of(house.settings))
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The storage folder of a node that died with three committed scans, most of them only in the WAL."""
    paths = []
    for seed in (1, 2, 3):
        paths.append(str(tmp_path / f"{seed}.dcm"))
        scan(seed).save_as(paths[-1], enforce_file_format=True)
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "var"), *paths], check=False, timeout=120)
    assert ended.returncode == -9
    return tmp_path / "var"


@pytest.mark.parametrize("harm", ["shm deleted", "wal deleted", "wal flipped", "wal cut"])
def test_a_log_of_the_database_that_is_harmed_after_a_kill_costs_no_scan(killed: Path, harm: str) -> None:
    wal, shm = killed / "worklist.db-wal", killed / "worklist.db-shm"
    if harm == "shm deleted":
        shm.unlink()
    elif harm == "wal deleted":
        wal.unlink()
        shm.unlink()
    elif harm == "wal flipped":
        data = bytearray(wal.read_bytes())
        data[len(data) * 2 // 3] ^= 0xFF
        wal.write_bytes(data)
    else:
        os.truncate(wal, wal.stat().st_size * 2 // 3)

    house = service.open_house(Settings(storage={"directory": killed, "min_free": "1 MiB"}))
    service.refuse_damage(house.engine)
    mended = mend(house)

    assert (mended.adopted > 0) == (harm != "shm deleted")
    rows = worklist.rows(house.engine)
    assert {row["study_instance_uid"] for row in rows} == {str(scan(seed).StudyInstanceUID) for seed in (1, 2, 3)}
    assert {row["state"] for row in rows} == {"queued"}
    assert worklist.check(house.engine) == worklist.verify_events(house.engine) == ()
    house.engine.dispose()


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9])
def test_a_page_of_the_database_that_was_overwritten_is_refused_in_one_sentence(house: House, where: float) -> None:
    for seed in range(1, 6):
        receive(house, scan(seed))
    path = Path(str(house.engine.url.database))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    house.engine.dispose()
    data = bytearray(path.read_bytes())
    page = int(where * len(data)) // 4096 * 4096
    data[page : page + 4096] = b"\xa5" * 4096
    path.write_bytes(data)

    def start() -> None:
        again = service.open_house(house.settings)
        try:
            service.refuse_damage(again.engine)
        finally:
            again.engine.dispose()

    with pytest.raises(RemnantError, match="damaged") as refused:
        start()
    assert "remnant db restore" in str(refused.value)
    assert "\n" not in str(refused.value)
