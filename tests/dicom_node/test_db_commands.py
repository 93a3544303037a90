"""`remnant db ...` as an admin types it: exit codes, one sentence each, and never while a node runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from dicom_node import reconcile, service, spool, worklist
from dicom_node.service import House
from dicom_node.settings import Settings, load
from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from pipeline.views import facts_of


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(f'[storage]\ndirectory = "{tmp_path / "var"}"\nmin_free = "1 MiB"\n')
    return path


@pytest.fixture
def house(config: Path) -> Iterator[House]:
    """A node's folder with two scans."""
    settings: Settings = load(config)
    opened = service.open_house(settings)
    for seed in (1, 2):
        (ds,) = expose(phantom(seed), examination(seed), "two_frames")
        buffer = BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        data = buffer.getvalue()
        start = 144 + int.from_bytes(data[140:144], "little")
        name, digest = spool.put_object(opened.spool, data[:start], data[start:])
        stored = worklist.Stored(name, digest, len(data) - start, str(ds.file_meta.TransferSyntaxUID))
        rules = reconcile.rules_of(settings)
        worklist.receive(opened.engine, facts_of(ds), stored, source_aet="OPTIMA1", rules=rules)
    yield opened
    opened.engine.dispose()


def remnant(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dicom_node.cli", *arguments, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_check_finds_nothing_where_nothing_is_wrong(house: House, config: Path) -> None:
    done = remnant(config, "db", "check")
    assert (done.returncode, done.stdout) == (0, "no faults found\n")


def test_check_tells_each_file_that_is_not_what_it_was_and_each_row_of_another_patient(
    house: House, config: Path
) -> None:
    first, second = worklist.kept_files(house.engine)
    path = house.spool.objects / first.file_name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with house.engine.begin() as conn:
        conn.exec_driver_sql("UPDATE scan SET patient_id = 'SOMEBODY' WHERE id = ?", (second.scan_id,))

    done = remnant(config, "db", "check", "--json")

    faults = [json.loads(line)["fault"] for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert faults == [
        f"object {first.sha256} of scan {first.scan_id} is not what it was: its bytes have another digest",
        f"object {second.sha256} of scan {second.scan_id} names another patient or study than its row",
    ]


def test_a_backup_comes_back_only_while_no_role_of_the_node_runs(house: House, config: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.db"
    with service._lock(house.spool.run / "receive.lock", wait_s=0, what="the role receive"):
        made = remnant(config, "db", "backup", str(backup))
        assert made.returncode == 0, made.stderr
        again = remnant(config, "db", "backup", str(backup))
        refused = remnant(config, "db", "restore", str(backup))
        copied = remnant(config, "db", "copy", f"sqlite:///{tmp_path / 'copy.db'}")
    assert "already" in again.stderr
    for one in (refused, copied):
        assert one.returncode == 3
        assert "Another process holds the role receive" in one.stderr
    worklist.record_event(house.engine, "node", "written after the backup")

    done = remnant(config, "db", "restore", str(backup))

    assert done.returncode == 0, done.stderr
    house.engine.dispose()
    told = [one.detail for one in worklist.events(house.engine, None)]
    assert told == ["this database was restored from a backup"]
    assert len(worklist.rows(house.engine)) == 2
