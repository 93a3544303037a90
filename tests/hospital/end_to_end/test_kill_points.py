"""The order that makes Success true, as the kernel sees it: what is synced before the answer; a kill at every point.

Receiver, worker and sender are killed -9 at the calls named in the tables, started again, and asked what they kept.
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from dicom_node import worklist
from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from tests.hospital.end_to_end.killing import CALLS, Killer, Point, call_at, watched

WRITTEN, SYNCED = r"pwrite64\(\d+<[^>]*worklist\.db-wal>", r"fdatasync\(\d+<[^>]*worklist\.db-wal>"
OPENED, FILLED = r"openat\(.*/{}/.*O_CREAT", r"write\(\d+<[^>]*/{}/"
FLUSHED, NAMED, SHELVED = r"fsync\(\d+<[^>]*/{}/", r"rename\w*\(.*/{}/", r"fsync\(\d+<[^>]*/{}/[0-9a-f]{{2}}>"
SENT = r'send(to|msg)\(.*"\\{}\\0'  # the PDU's type (PS3.8 9.3.1)


def _seeds(first: int) -> Iterator[int]:
    """Scans of the same person of the simulated camera: another character set would be loaded when it first comes."""
    return itertools.count(first, 7)


def _scan(seed: int) -> tuple[Dataset, ...]:
    return expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), "two_frames")


RECORD = r"{}\(\d+<[^>]*\.journal>"
# Written whole, synced, named, then the folder that holds the name; or written and synced in the journal, and named.
ALONE = (
    r"openat\(.*spool.*O_CREAT",
    r"write\(\d+<[^>]*spool",
    r"fsync\(\d+<[^>]*spool",
    "rename",
    r"fsync\(\d+<[^>]*spool",
)
OF_A_BURST = (r"write\(\d+<[^>]*spool/incoming", RECORD.format("pwritev2?"), RECORD.format("fdatasync"), "rename")


@pytest.mark.parametrize("order", [ALONE, OF_A_BURST], ids=["alone", "of a burst"])
def test_object_name_and_worklist_are_synced_before_success_is_written(
    make_node: Callable[..., Any],
    camera: Callable[..., None],
    wait: Callable[..., Any],
    peer: Callable[[str], Path],
    tmp_path: Path,
    order: tuple[str, ...],
) -> None:
    strace = peer("strace")
    node = make_node(storage="journal = false\n" if order is ALONE else "").start("receive")
    camera(node.port, _scan(600))  # once unseen, so that nothing is opened for the first time
    _into_the_journal(node, order is OF_A_BURST, lambda: camera(node.port, _scan(600) * 12))
    log = tmp_path / "calls"
    with watched(strace, node.pid("receive"), wait, log, "-e", f"trace={CALLS}"):
        camera(node.port, _scan(601))
        wait(lambda: call_at(log, (SENT.format(4),)), "answered")
    lines = log.read_text(errors="replace").splitlines()

    def first(pattern: str, after: int = 0) -> int:
        for number in range(after, len(lines)):
            if re.search(pattern, lines[number]):
                return number
        raise AssertionError(f"no {pattern} after line {after}:\n" + "\n".join(lines[-60:]))

    # Then the row's transaction; then the answer. A C-STORE response is the first P-DATA PDU (type 04) that goes out.
    passed = 0
    for pattern in (*order, WRITTEN, SYNCED):
        passed = first(pattern, passed + 1)
    answers = [number for number, line in enumerate(lines) if re.search(SENT.format(4), line)]
    assert len(answers) == 1, "\n".join(lines[-60:])
    assert passed < answers[0]
    late = [line for line in lines[passed + 1 : answers[0]] if "pwrite64" in line and "worklist.db-wal" in line]
    assert late == [], "written to the worklist behind its last barrier and before the answer"
    early = [line for line in lines[: first(order[-1], first(order[-2]))] if re.search(WRITTEN, line)]
    assert early == [], "written to the worklist before the object is durable"


def _into_the_journal(node: Any, burst: bool, send: Callable[[], object]) -> None:
    """Send until there is a journal, where the next object goes."""
    while burst and not list((node.directory / "var" / "spool" / "journal").glob("*.journal")):
        send()


RECEIVING: dict[str, Point] = {
    "before the object is opened": (OPENED.format("incoming"),),
    "before its bytes are written": (FILLED.format("incoming"),),
    "before the object is synced": (FLUSHED.format("incoming"),),
    "before the object has its name": (NAMED.format("incoming"),),
    "before its folder is synced": (SHELVED.format("objects"),),
    "before the row is written": (WRITTEN,),
    "before the row is synced": (SYNCED,),
    "before the association is answered": (SENT.format(2),),
    "before success is sent": (SENT.format(4),),
    "before the release is answered": (SENT.format(6),),
}

RECEIVING_A_BURST: dict[str, Point] = {
    "before its record is written": (RECORD.format("pwritev2?"),),
    "before its record is synced": (RECORD.format("fdatasync"),),
    "before the object has its name": (NAMED.format("incoming"),),
    "before the row is written": (WRITTEN,),
    "before the row is synced": (SYNCED,),
    "before success is sent": (SENT.format(4),),
}

# What was written to the log and not synced is lost in a power cut, and not by a kill of the only one who had it open.
COMMITTED = {"before the row is synced", "before success is sent", "before the release is answered"}


@dataclass(frozen=True)
class Working:
    """A point of one acquisition in the worker; what its kill leaves: results without a row, half written ones."""

    point: Point
    state: str
    unowned: int = 0
    unfinished: int = 0


ASKED = (SYNCED, r"write\(\d+<(socket|UNIX)")
FIRST = (SHELVED.format("results"),)
WORKING = {
    "before the claim is written": Working((WRITTEN,), "queued"),
    "before the claim is synced": Working((SYNCED,), "queued"),
    "before an object is compared with its digest": Working((SYNCED, r"openat\(.*/objects/"), "analysing"),
    "before the child is asked": Working(ASKED, "analysing"),
    "while the child analyses": Working((*ASKED, r"poll\("), "analysing"),
    "before the report is opened": Working((OPENED.format("rendering"),), "analysing"),
    "before the report's bytes are written": Working((FILLED.format("rendering"),), "analysing", unfinished=1),
    "before the report is synced": Working((FLUSHED.format("rendering"),), "analysing", unfinished=1),
    "before the report has its name": Working((NAMED.format("rendering"),), "analysing", unfinished=1),
    "before the report's folder is synced": Working(FIRST, "analysing", unowned=1),
    "before the picture is opened": Working((*FIRST, OPENED.format("rendering")), "analysing", unowned=1),
    "before the picture's folder is synced": Working((*FIRST, *FIRST), "analysing", unowned=2),
    "before results and deliveries are written": Working((*FIRST, *FIRST, r"close\("), "analysing", unowned=2),
    "before results and deliveries are synced": Working((*FIRST, *FIRST, SYNCED), "analysing", unowned=2),
    "before the sender's bell is rung": Working((r"write\(\d+<[^>]*sender\.bell",), "sending"),
}


@dataclass(frozen=True)
class Sending:
    """A point of one scan's delivery in the sender; how many copies of report and picture the archive has then."""

    point: Point
    arrived: tuple[int, int] = (0, 0)
    resent: tuple[int, int] = (0, 0)
    state: str = "sending"


COMMAND = r'send(to|msg)\(.*"\\4\\0.*\\3\\0\\0\\0\\0"'  # the last of a command, and the beginning of its length
TAKEN, REPORTED = (SYNCED,), (SYNCED, SYNCED)
SENDING = {
    "before the deliveries are taken": Sending((WRITTEN,)),
    "before their taking is synced": Sending((SYNCED,)),
    "while the archive's address is looked up": Sending((r"connect\(.*AF_INET",)),
    "before the association is requested": Sending((r"connect\(.*EINPROGRESS", r"poll\(")),
    "before the report's command goes out": Sending((COMMAND,)),
    "before the report's bytes go out": Sending((COMMAND, SENT.format(4))),
    "before the report's row is written": Sending((*TAKEN, WRITTEN), (1, 0), (1, 0)),
    "before the report's row is synced": Sending((*TAKEN, SYNCED), (1, 0), (1, 0)),
    "amid the picture's bytes": Sending((COMMAND, COMMAND, *[SENT.format(4)] * 9), (1, 0)),
    "before the picture's row is written": Sending((*REPORTED, WRITTEN), (1, 1), (0, 1)),
    "before the picture's row is synced": Sending((*REPORTED, SYNCED), (1, 1), (0, 1)),
    "before the release": Sending((SENT.format(5),), (1, 1), state="delivered"),
}

kill_points = pytest.mark.skipif("KILL_POINTS" not in os.environ, reason="takes minutes: part of `make soak`")


@kill_points
@pytest.mark.parametrize("points", [RECEIVING, RECEIVING_A_BURST], ids=["alone", "of a burst"])
def test_a_receiver_killed_at_any_point_of_a_c_store_keeps_what_it_acknowledged_and_takes_the_rest_again(
    points: dict[str, Point],
    make_node: Callable[..., Any],
    camera: Callable[..., None],
    wait: Callable[..., Any],
    peer: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    storescu = peer("/usr/bin/storescu")
    burst = points is RECEIVING_A_BURST
    node = make_node(storage="" if burst else "journal = false\n").start("receive")
    seeds = _seeds(610)
    sent: list[Dataset] = []

    def send() -> bool:
        """Send one more object; return whether its sender was told Success."""
        (ds,) = _scan(next(seeds))
        sent.append(ds)
        path = tmp_path / f"{ds.SOPInstanceUID}.dcm"
        ds.save_as(path, enforce_file_format=True)
        done = subprocess.run(
            [storescu, "-v", "-R", "-aet", "OPTIMA1", "-aec", "REMNANT", "127.0.0.1", str(node.port), path],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = done.stdout + done.stderr
        return "(Success)" in said or "Status: Success" in said

    def send_again() -> None:
        camera(node.port, sent[-1:])  # what a camera does that had no answer
        _into_the_journal(node, burst, lambda: camera(node.port, sent[-1:] * 12))

    killer = Killer(peer("strace"), wait, tmp_path, node, "receive", points, send, send_again)
    for point in points:
        told = killer.kill(point)
        assert told is (point == "before the release is answered"), point
        known = [row["study_instance_uid"] for row in node.rows()].count(str(sent[-1].StudyInstanceUID))
        assert known == (point in COMMITTED), point
        node.start("receive")
        send_again()
        _hold_together(node)
    rows = node.rows()
    assert sorted(row["study_instance_uid"] for row in rows) == sorted(str(ds.StudyInstanceUID) for ds in sent)
    assert {row["state"] for row in rows} == {"queued"}


@kill_points
def test_a_worker_killed_at_any_point_makes_each_result_once_with_the_same_bytes(
    make_node: Callable[..., Any],
    make_archive: Callable[..., Any],
    camera: Callable[..., None],
    wait: Callable[..., Any],
    peer: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    node, archive, scan, settle = _whole_node(make_node, make_archive, camera, 810)
    points = {name: one.point for name, one in WORKING.items()}
    killer = Killer(peer("strace"), wait, tmp_path, node, "work", points, scan, settle)
    for name, expected in WORKING.items():
        study = killer.kill(name)
        row = _row_of(node, study)
        shelf, rendering = _shelved(node, "results"), _inside(node, "results/rendering")
        unowned = shelf.keys() - {file for (file,) in node.query("select file_name from result")}
        # A sender also looks without being rung.
        assert row["state"] == expected.state or (expected.state, row["state"]) == ("sending", "delivered"), name
        assert (len(unowned), len(rendering)) == (expected.unowned, expected.unfinished), name
        node.start("work")
        settle()
        # Losing a worker is no failed attempt of the analysis; it is claimed again where it was claimed.
        claims = 2 if expected.state == "analysing" else 1
        assert (row["id"], claims, 0) in node.query("select id, claims, attempts from scan"), name
        _hold_together(node, archive, sent={study: (1, 1)})
        after = _shelved(node, "results")
        assert shelf.items() <= after.items(), f"rendered other bytes: {name}"


@kill_points
def test_a_sender_killed_at_any_point_sends_again_only_what_may_not_have_arrived_and_the_same_bytes(
    make_node: Callable[..., Any],
    make_archive: Callable[..., Any],
    camera: Callable[..., None],
    wait: Callable[..., Any],
    peer: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    node, archive, scan, settle = _whole_node(make_node, make_archive, camera, 910)
    points = {name: one.point for name, one in SENDING.items()}
    killer = Killer(peer("strace"), wait, tmp_path, node, "send", points, scan, settle)
    for name, expected in SENDING.items():
        study = killer.kill(name)
        assert _row_of(node, study)["state"] == expected.state, name
        assert _copies(node, archive, study) == expected.arrived, name
        node.start("send")
        settle()
        _hold_together(node, archive, sent={study: (1 + expected.resent[0], 1 + expected.resent[1])})


def _whole_node(
    make_node: Callable[..., Any], make_archive: Callable[..., Any], camera: Callable[..., None], first_seed: int
) -> tuple[Any, Any, Callable[[], str], Callable[[], None]]:
    """A node with its archive, what sends it one more scan (and returns the study), and what waits until all is
    delivered."""
    archive = make_archive()
    archive.storage_commitment = False
    node = make_node(archive).start("receive").start("work").start("send")
    seeds = _seeds(first_seed)

    def scan() -> str:
        ds = _scan(next(seeds))
        camera(node.port, ds)
        return str(ds[0].StudyInstanceUID)

    def settle() -> None:
        node.wait_for_rows(len(node.rows()), ("delivered",))

    return node, archive, scan, settle


def _row_of(node: Any, study: str) -> dict[str, Any]:
    (row,) = (row for row in node.rows() if row["study_instance_uid"] == study)
    return dict(row)


def _copies(node: Any, archive: Any, study: str) -> tuple[int, int]:
    """How often an archive got report and picture of a scan."""
    arrived = Counter(uid for uid, _ in archive.stored)
    uids = {one["kind"]: one["sop_instance_uid"] for one in json.loads(_row_of(node, study)["results"])}
    return arrived[uids["sr"]], arrived[uids["sc"]]


def _inside(node: Any, folder: str) -> list[Path]:
    return list((node.directory / "var" / folder).iterdir())


def _shelved(node: Any, shelf: str) -> dict[str, bytes]:
    folder = node.directory / "var" / shelf
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("??/*")}


def _hold_together(node: Any, archive: Any = None, sent: dict[str, tuple[int, int]] | None = None) -> None:
    """Bytes and facts fit each other, nothing is there twice, nobody holds anything, and the history is whole."""
    assert _inside(node, "spool/incoming") == _inside(node, "results/rendering") == []
    rows = node.rows()
    assert len({row["study_instance_uid"] for row in rows}) == len(rows), "a scan has two rows"
    assert set(_shelved(node, "spool/objects")) == {one for (one,) in node.query("select spool_name from instance")}
    assert node.query("select count(*) from instance") == [(len(rows),)]
    results = node.query("select scan_id, sop_instance_uid, file_name, sha256 from result")
    shelf = _shelved(node, "results")
    assert set(shelf) == {file for _, _, file, _ in results}, "a result without a row, or a row without a file"
    assert all(hashlib.sha256(shelf[file]).hexdigest() == digest for _, _, file, digest in results)
    assert not node.query("select id from scan where lease_owner is not null or lease_boot is not null")
    assert not node.query("select id from delivery where claimed_by is not null")
    if archive is not None:
        assert Counter(scan for scan, *_ in results) == {row["id"]: 2 for row in rows}
        assert node.query("select state, count(*) from delivery group by state") == [("acknowledged", len(results))]
        whole = {uid: shelf[file] for _, uid, file, _ in results}
        assert {uid for uid, _ in archive.stored} == set(whole)
        assert all(whole[uid].endswith(copy) for uid, copy in archive.stored), "a copy has other bytes"
        finished = node.query("select scan_id, count(*) from event where event = 'finished' group by scan_id")
        assert sorted(finished) == [(row["id"], 1) for row in rows]
    for study, copies in (sent or {}).items():
        assert _copies(node, archive, study) == copies
    engine = worklist.open_worklist(f"sqlite:///{node.database}")
    assert worklist.verify_history(engine) == ()
    engine.dispose()
