"""kill -9 of every role at several points: every acknowledged scan ends with exactly one result set, the same bytes."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined] # pynetdicom makes these names at run time
    Comprehensive3DSRStorage,
    SecondaryCaptureImageStorage,
)

from pipeline.camera import Shape, examination, expose
from pipeline.phantom import phantom


def _scan(seed: int, shape: Shape = "two_frames") -> tuple[Dataset, ...]:
    return expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), shape)


class SlowArchive:
    """An archive that holds its answers back until it is told, and keeps every copy that it was sent."""

    def __init__(self) -> None:
        self.ae_title = "SLOW"
        self.copies: list[tuple[str, bytes]] = []
        self.arrived = threading.Event()
        self.answer = threading.Event()
        ae = AE(ae_title=self.ae_title)
        ae.add_supported_context(Comprehensive3DSRStorage)
        ae.add_supported_context(SecondaryCaptureImageStorage)
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])
        self.port = self._server.server_address[1]

    def _store(self, event: evt.Event) -> int:
        self.copies.append((str(event.request.AffectedSOPInstanceUID), event.encoded_dataset(include_meta=False)))
        self.arrived.set()
        self.answer.wait(60)
        return 0x0000

    def stop(self) -> None:
        self.answer.set()
        self._server.shutdown()


@pytest.fixture
def slow_archive() -> Iterator[SlowArchive]:
    archive = SlowArchive()
    yield archive
    archive.stop()


def _results_in(orthanc: Any, ds: Dataset) -> list[Dataset]:
    return [dcmread(BytesIO(orthanc.file(one))) for one in orthanc.find(str(ds.StudyInstanceUID))]


def test_scans_acknowledged_before_the_receiver_was_killed_are_analysed_after_its_restart(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None]
) -> None:
    node = make_node(orthanc)
    scans = [_scan(500 + index) for index in range(4)]
    for index, scan in enumerate(scans):
        node.start("receive")
        camera(node.port, scan)
        node.kill("receive")  # right behind Success
        assert len(node.rows()) == index + 1
    node.start("work").start("send")
    rows = node.wait_for_rows(4, ("delivered",))
    for row, scan in zip(rows, scans, strict=True):
        assert row["study_instance_uid"] == scan[0].StudyInstanceUID
        assert {str(ds.SOPInstanceUID) for ds in _results_in(orthanc, scan[0])} == {
            result["sop_instance_uid"] for result in json.loads(row["results"])
        }


def test_a_receiver_killed_under_four_senders_keeps_all_it_acknowledged_and_takes_the_rest_on_resend(
    make_node: Callable[..., Any], peer: Callable[[str], Path], tmp_path: Path
) -> None:
    node = make_node()
    storescu = str(peer("/usr/bin/storescu"))
    folder = tmp_path / "burst"
    folder.mkdir()
    files = []
    for seed in range(40):
        (ds,) = _scan(600 + seed)
        path = folder / f"{ds.SOPInstanceUID}.dcm"
        ds.save_as(path, enforce_file_format=True)
        files.append(str(path))

    def send(port: int, some: Sequence[str]) -> str:
        command = [
            storescu,
            "-v",
            "-R",
            "--no-halt",
            "-aet",
            "OPTIMA1",
            "-aec",
            "REMNANT",
            "127.0.0.1",
            str(port),
            *some,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr

    for round_number in range(3):
        node.start("receive")
        before = len(node.rows())
        with ThreadPoolExecutor(4) as pool:
            senders = [pool.submit(send, node.port, files[part::4]) for part in range(4)]
            while len(node.rows()) < before + 3 + 4 * round_number and not all(sender.done() for sender in senders):
                pass  # kill in the middle of the burst, each round at another point of it
            node.kill("receive")
        acknowledged = sum(sender.result().count("(Success)") for sender in senders)
        assert len(node.rows()) >= min(acknowledged, len(files))
    node.start("receive")
    assert send(node.port, files).count("(Success)") == len(files)
    rows = node.rows()
    assert len(rows) == len(files)
    assert {row["state"] for row in rows} == {"queued"}
    assert node.query("select count(*), count(distinct sop_instance_uid) from instance") == [(40, 40)]
    assert not list((node.directory / "var" / "spool" / "incoming").iterdir())


@pytest.mark.parametrize("point", ["while claiming", "in analysis", "behind the result"])
def test_a_worker_killed_at_any_point_leaves_one_result_set_with_the_same_uids_and_bytes(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None], wait: Callable[..., Any], point: str
) -> None:
    node = make_node(orthanc)
    node.start("receive").start("work")
    scan = _scan(700 + len(point))
    reached = {
        "while claiming": lambda: node.query("select 1 from scan where state in ('queued', 'analysing')"),
        "in analysis": lambda: node.query("select 1 from scan where state = 'analysing'"),
        "behind the result": lambda: list((node.directory / "var" / "results").glob("??/*.dcm")),
    }[point]
    killed = threading.Event()

    def kill() -> None:
        while not reached():
            if killed.is_set():
                return
        node.kill("work")
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    camera(node.port, scan)
    killer.join(60)
    assert killed.is_set(), "the point was never reached"
    before = {path.name: path.read_bytes() for path in (node.directory / "var" / "results").glob("??/*.dcm")}
    node.start("work").start("send")
    (row,) = node.wait_for_rows(1, ("delivered",))
    results = json.loads(row["results"])
    assert sorted(result["kind"] for result in results) == ["sc", "sr"]
    after = {path.name: path.read_bytes() for path in (node.directory / "var" / "results").glob("??/*.dcm")}
    assert before.items() <= after.items()
    assert len(after) == 2, "a second run rendered other bytes"
    assert {str(ds.SOPInstanceUID) for ds in _results_in(orthanc, scan[0])} == {r["sop_instance_uid"] for r in results}


def test_an_analysis_child_that_is_killed_costs_an_attempt_and_the_scan_is_still_delivered(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None], wait: Callable[..., Any]
) -> None:
    node = make_node(orthanc)
    node.start("receive").start("work").start("send")
    child = int(next(line for line in node.log.splitlines() if "analyst_ready" in line).split("pid=")[1].split()[0])
    os.kill(child, signal.SIGSTOP)  # so that it holds the scan when it dies
    camera(node.port, _scan(720))
    wait(lambda: node.query("select 1 from scan where state = 'analysing'"), "analysing")
    os.kill(child, signal.SIGKILL)
    (row,) = node.wait_for_rows(1, ("delivered",))
    assert (row["attempts"], row["finding"]) == (1, "present")


def test_a_scan_that_always_kills_its_analysis_fails_with_a_note_after_three_attempts(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None]
) -> None:
    node = make_node(orthanc, timeout_s=0.001)  # every analysis is ended at once; the note gets no more time either
    node.start()
    camera(node.port, _scan(721))
    (row,) = node.wait_for_rows(1, ("failed",))
    assert (row["reason"], row["finding"]) == ("analysis_failed", None)
    assert "took longer" in row["last_error"]
    assert _results_in(orthanc, _scan(721)[0]) == []


def test_a_sender_killed_before_it_read_the_answer_sends_the_same_bytes_under_the_same_uid_again(
    make_node: Callable[..., Any], slow_archive: SlowArchive, camera: Callable[..., None]
) -> None:
    node = make_node(slow_archive)
    node.start("receive").start("work").start("send")
    camera(node.port, _scan(730))
    assert slow_archive.arrived.wait(60)
    node.kill("send")  # the archive has the first object, we do not know
    assert node.rows()[0]["state"] == "sending"
    slow_archive.answer.set()
    node.start("send")
    (row,) = node.wait_for_rows(1, ("delivered",))
    copies: dict[str, set[bytes]] = {}
    for uid, data in slow_archive.copies:
        copies.setdefault(uid, set()).add(data)
    assert set(copies) == {result["sop_instance_uid"] for result in json.loads(row["results"])}
    assert all(len(versions) == 1 for versions in copies.values())
    assert len(slow_archive.copies) == 3  # the first one twice, the second once


def test_the_whole_node_killed_and_started_again_finishes_what_it_had_acknowledged(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None], wait: Callable[..., Any]
) -> None:
    node = make_node(orthanc)
    node.start()
    children = [node.pid(role) for role in ("receive", "work", "send")]
    scans = [_scan(740 + index) for index in range(3)]
    for scan in scans:
        camera(node.port, scan)
    supervisor = node.processes.pop("serve")
    supervisor.kill()
    supervisor.wait()
    # Nobody has to hunt for orphans: the roles notice that their supervisor is gone.
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the roles end by themselves")
    node.start()
    rows = node.wait_for_rows(3, ("delivered",))
    for row, scan in zip(rows, scans, strict=True):
        assert len(_results_in(orthanc, scan[0])) == len(json.loads(row["results"])) == 2


def test_a_role_that_dies_under_the_supervisor_is_started_again_and_work_goes_on(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None]
) -> None:
    node = make_node(orthanc)
    node.start()
    for index, role in enumerate(("receive", "send", "work")):
        node.kill(role)
        node.wait_until_ready(role)
        camera(node.port, _scan(750 + index))
        node.wait_for_rows(index + 1, ("delivered",))
