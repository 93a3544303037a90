"""What becomes of a second object under a known SOP Instance UID, as one table, by a real camera and a real worker."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from dicom_node import spool, worklist
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

AT_ONCE = 4
SUCCESS = "Received Store Response (Success)"
OF_VERSIONS = ("received", "version_received", "version_judged", "other_pixels", "identity_changed", "revised")


def _set(**elements: Any) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for keyword, value in elements.items():
            setattr(ds, keyword, value)

    return change


def _other_file(ds: Dataset) -> None:
    ds.preamble = b"II*\0" + bytes(124)
    ds.file_meta.SourceApplicationEntityTitle = "ROUTER"


def _other_pixel(ds: Dataset) -> None:
    ds.PixelData = bytes([ds.PixelData[0] ^ 1]) + ds.PixelData[1:]


@dataclass(frozen=True)
class Case:
    """How the second object differs, how it is sent, and what is there in the end: the row's state and reason, the
    versions with their verdicts, the events about them, and what a person finds in quarantine."""

    change: Callable[[Dataset], None]
    options: tuple[str, ...] = ()
    state: str = "delivered"
    reason: str | None = None
    verdicts: tuple[str | None, ...] = (None,)
    events: tuple[str, ...] = ()
    quarantine: tuple[str, ...] = ()


NOTHING: dict[str, Any] = {}
EQUAL = {"verdicts": (None, "same_content"), "events": ("version_received", "version_judged")}
OTHER = {
    "verdicts": (None, "other_pixels"),
    "events": ("version_received", "other_pixels"),
    "quarantine": ("other_pixels",),
}
SOMEBODY = {
    "state": "failed",
    "reason": "identity_changed",
    "verdicts": (None, "identity_changed"),
    "events": ("version_received", "identity_changed"),
    "quarantine": ("identity_changed",),
}
CASES = {
    "the same bytes": Case(lambda ds: None, **NOTHING),
    "the same dataset in another file": Case(_other_file, **NOTHING),
    "another transfer syntax": Case(lambda ds: None, ("-xi",), **EQUAL),
    "an element that says nothing of whose it is": Case(_set(InstitutionName="ELSEWHERE"), **EQUAL),
    "another pixel": Case(_other_pixel, **OTHER),
    "another spacing": Case(_set(PixelSpacing=[1.5, 1.5]), **OTHER),
    "another pixel of another patient": Case(lambda ds: (_other_pixel(ds), _set(PatientID="SIM-X")(ds))[0], **OTHER),
    "another patient": Case(_set(PatientID="SIM-SOMEBODY-ELSE"), **SOMEBODY),
    "another name": Case(_set(PatientName="Erfunden^Else"), **SOMEBODY),
    "another order": Case(_set(AccessionNumber="OTHER"), **SOMEBODY),
    "another study": Case(_set(StudyInstanceUID="2.25.4711"), **SOMEBODY),
}


def _scan(number: int) -> Dataset:
    (ds,) = expose(phantom(1, residual=True, stratum="uptake_1_up"), examination(6000 + number), "two_frames")
    return ds


def _told(node: Any) -> dict[str, dict[str, Any]]:
    """Everything that the table speaks of, as it stands, by SOP Instance UID."""
    listed = subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", "quarantine", "list", "--json", "--config", str(node.config)],
        cwd=node.directory,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    versions: dict[str, list[tuple[int, str | None]]] = {}
    rows: dict[str, set[int]] = {}
    for uid, scan_id, version, verdict in node.query(
        "select sop_instance_uid, scan_id, version, verdict from instance order by version"
    ):
        versions.setdefault(uid, []).append((version, verdict))
        rows.setdefault(uid, set()).add(scan_id)
    scans = {scan_id: rest for scan_id, *rest in node.query("select id, state, reason, revision from scan")}
    happened = node.query("select scan_id, event from event order by id")
    told = {}
    for uid, of_uid in versions.items():
        (scan_id,) = rows[uid]
        state, reason, revision = scans[scan_id]
        told[uid] = {
            "state": state,
            "reason": reason,
            "revision": revision,
            "versions": of_uid,
            "events": [event for whose, event in happened if whose == scan_id and event in OF_VERSIONS],
            "quarantine": [one["why"] for one in map(json.loads, listed) if one["sop_instance_uid"] == uid],
        }
    assert len(told) == len(scans), "a row for each UID, and no other"
    return told


def _expected(case: Case) -> dict[str, Any]:
    return {
        "state": case.state,
        "reason": case.reason,
        "revision": 1,
        "versions": list(enumerate(case.verdicts, start=1)),
        "events": ["received", "received", *case.events],
        "quarantine": list(case.quarantine),
    }


def _purge(node: Any, sop_instance_uid: str) -> None:
    """Remove an object as retention does when its time is over."""
    (spool_name,) = (
        name for uid, name in node.query("select sop_instance_uid, spool_name from instance") if uid == sop_instance_uid
    )
    engine = worklist.open_worklist(f"sqlite:///{node.database}")
    (item,) = (one for one in worklist.purgeable(engine, retention_days=0) if one.file_name == spool_name)
    assert worklist.mark_purged(engine, item)
    spool.remove(node.directory / "var" / "spool" / "objects" / spool_name)
    engine.dispose()


@pytest.fixture
def at_once(peer: Callable[[str], Path], tmp_path: Path) -> Callable[..., None]:
    """Send objects in as many associations at the same time; each must get Success."""
    storescu = str(peer("/usr/bin/storescu"))

    def send(port: int, objects: list[Dataset]) -> None:
        running = []
        for number, ds in enumerate(objects):
            path = tmp_path / f"at-once-{number}.dcm"
            ds.save_as(path, enforce_file_format=True)
            command = [storescu, "-v", "-aet", "OPTIMA1", "-aec", "REMNANT", "127.0.0.1", str(port), str(path)]
            environment = {**os.environ, "TCP_NODELAY": "1"}
            running.append(subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True, env=environment))
        for process in running:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, said
            assert SUCCESS in said

    return send


def test_a_second_object_under_a_known_uid_ends_as_the_table_says(
    make_node: Callable[..., Any],
    camera: Callable[..., None],
    at_once: Callable[..., None],
    wait: Callable[..., Any],
) -> None:
    # `camera` fails unless the answer is Success, which it is for every line: what arrived is kept.
    node = make_node().start("receive")
    firsts = {name: _scan(number) for number, name in enumerate(CASES)}
    camera(node.port, list(firsts.values()))
    expected = {}
    for name, case in CASES.items():
        second = copy.deepcopy(firsts[name])
        case.change(second)
        camera(node.port, [second], *case.options)
        expected[name] = _expected(case)

    firsts["the same bytes, all at once"] = _scan(90)
    at_once(node.port, [firsts["the same bytes, all at once"]] * AT_ONCE)
    expected["the same bytes, all at once"] = _expected(Case(lambda ds: None))
    several = []
    for number in range(AT_ONCE):
        ds = _scan(91)
        ds.PixelData = bytes([number]) + ds.PixelData[1:]
        several.append(ds)
    firsts["other pixels, all at once"] = several[0]
    at_once(node.port, several)
    more = AT_ONCE - 1
    expected["other pixels, all at once"] = _expected(
        Case(
            _other_pixel,
            verdicts=(None, *["other_pixels"] * more),
            events=("version_received",) * more + ("other_pixels",) * more,
            quarantine=("other_pixels",) * more,
        )
    )

    # Versions are compared before the first scan is claimed, so that what is disputed is never analysed.
    node.start("work")
    node.wait_for_rows(len(firsts))
    uids = {name: str(ds.SOPInstanceUID) for name, ds in firsts.items()}
    table = {uids[name]: line for name, line in expected.items()}
    assert _told(node) == table

    # What was quarantined comes again, and another one: the first changes nothing, the second is one more.
    disputed = firsts["another pixel"]
    again, third = copy.deepcopy(disputed), copy.deepcopy(disputed)
    _other_pixel(again)
    third.PixelData = b"\x07" + third.PixelData[1:]
    camera(node.port, [again])
    camera(node.port, [third])
    line = table[uids["another pixel"]]
    line["versions"].append((3, "other_pixels"))
    line["events"] += ["version_received", "other_pixels"]
    line["quarantine"].append("other_pixels")

    # After the bytes were purged: the same ones are recognised by their digest, others cannot be called equal any more.
    purged = firsts["the same bytes"]
    _purge(node, str(purged.SOPInstanceUID))
    camera(node.port, [purged])
    camera(node.port, [purged], "-xi")
    line = table[uids["the same bytes"]]
    line["versions"].append((2, "other_pixels"))
    line["events"] += OTHER["events"]
    line["quarantine"].append("other_pixels")

    wait(lambda: not node.query("select 1 from instance where verdict = 'pending'"), "compared")
    assert _told(node) == table
