"""Old backups, damaged databases, lost rows, at a real node: mended at its start with a line, or refused with one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydicom import Dataset

from pipeline.camera import examination, expose
from pipeline.phantom import phantom


def _scan(seed: int) -> tuple[Dataset, ...]:
    return expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), "two_frames")


def remnant(node: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", *arguments, "--config", str(node.config)],
        cwd=node.directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_scans_acknowledged_after_a_backup_survive_a_kill_and_its_return(
    make_node: Callable[..., Any], camera: Callable[..., None], tmp_path: Path
) -> None:
    node = make_node()
    scans = [_scan(900 + index) for index in range(3)]
    node.start("receive")
    camera(node.port, scans[0])
    backup = tmp_path / "backup.db"
    assert remnant(node, "db", "backup", str(backup)).returncode == 0
    camera(node.port, scans[1])
    camera(node.port, scans[2])
    refused = remnant(node, "db", "restore", str(backup))
    assert refused.returncode == 3
    assert "Another process holds the role receive" in refused.stderr
    node.kill("receive")  # right behind Success

    assert remnant(node, "db", "restore", str(backup)).returncode == 0
    assert len(node.rows()) == 1, "the old database does not know the others"
    node.start("receive").start("work")

    rows = node.wait_for_rows(3, ("delivered",))
    assert {row["study_instance_uid"] for row in rows} == {str(ds.StudyInstanceUID) for (ds,) in scans}
    assert {row["source_aet"] for row in rows} == {"OPTIMA1"}, "a file still says who sent it"
    told = [event for (event,) in node.query("select event from event")]
    assert told.count("adopted") == 2
    camera(node.port, scans[2])  # and what is sent again is still known
    assert len(node.rows()) == 3
    for command in (("db", "check"), ("audit", "verify")):
        done = remnant(node, *command)
        assert done.returncode == 0, done.stdout


def test_a_node_with_a_damaged_database_says_so_in_one_sentence_and_does_not_start(
    make_node: Callable[..., Any], camera: Callable[..., None]
) -> None:
    node = make_node()
    node.start("receive")
    camera(node.port, _scan(910))
    node.stop()
    data = bytearray(node.database.read_bytes())
    for page in range(3, len(data) // 4096, 3):
        data[page * 4096 : (page + 1) * 4096] = b"\xa5" * 4096
    node.database.write_bytes(data)
    for role in ("serve", "receive"):
        done = remnant(node, role)
        assert done.returncode == 3, done.stderr
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("remnant:")]
        assert "damaged" in said
        assert "remnant db restore" in said
