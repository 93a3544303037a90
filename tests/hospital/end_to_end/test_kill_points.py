"""The order that makes Success true, as the kernel sees it: what is synced before the answer; a kill at every point.

strace watches the real process and kills it at the entry of the call named: nothing in the product knows of it.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from pipeline.camera import examination, expose
from pipeline.phantom import phantom

CALLS = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg"


def _scan(seed: int) -> tuple[Dataset, ...]:
    return expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), "two_frames")


@contextmanager
def _watched(strace: Path, pid: int, wait: Callable[..., Any], log: Path, *options: str) -> Iterator[None]:
    """A process under strace, which is attached when this begins and let go when it ends."""
    watcher = subprocess.Popen(
        [str(strace), "-f", "-y", "-s", "16", "-o", str(log), *options, "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
    )

    def attached() -> bool:
        if watcher.poll() is not None:
            said = watcher.stderr.read() if watcher.stderr else ""
            if "ptrace" in said and os.geteuid() != 0:
                pytest.skip("watching a process needs root or ptrace_scope 0")
            pytest.fail(f"strace: {said}")
        status = Path(f"/proc/{pid}/status")
        return f"TracerPid:\t{watcher.pid}" in status.read_text()

    try:
        wait(attached, "strace attached")
        yield
    finally:
        if watcher.poll() is None:
            watcher.send_signal(signal.SIGINT)
        watcher.wait(20)
        if watcher.stderr:
            watcher.stderr.close()


def test_object_folder_and_worklist_are_synced_before_success_is_written(
    make_node: Callable[..., Any],
    camera: Callable[..., None],
    wait: Callable[..., Any],
    peer: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    strace = peer("strace")
    node = make_node().start("receive")
    camera(node.port, _scan(600))  # once unseen, so that nothing is opened for the first time
    log = tmp_path / "calls"
    with _watched(strace, node.pid("receive"), wait, log, "-e", f"trace={CALLS}"):
        camera(node.port, _scan(601))
    lines = log.read_text(errors="replace").splitlines()

    def first(pattern: str, after: int = 0) -> int:
        for number in range(after, len(lines)):
            if re.search(pattern, lines[number]):
                return number
        raise AssertionError(f"no {pattern} after line {after}:\n" + "\n".join(lines[-60:]))

    # Written whole, synced, named; then the folder that holds the name; then the row's transaction; then the answer.
    opened = first(r"openat\(.*spool.*O_CREAT")
    written = first(r"write\(\d+<[^>]*spool", opened)
    synced = first(r"f(data)?sync\(\d+<[^>]*spool", written)
    named = first(r"rename", synced)
    folder = first(r"f(data)?sync\(\d+<[^>]*spool[^>]*>", named)
    row = first(r"pwrite64\(\d+<[^>]*worklist\.db-wal", folder)
    committed = first(r"f(data)?sync\(\d+<[^>]*worklist\.db-wal", row)
    # A C-STORE response is the first P-DATA PDU (type 04) that goes out.
    answers = [number for number, line in enumerate(lines) if re.search(r'send(to|msg)\(.*"\\4\\0', line)]
    assert len(answers) == 1, "\n".join(lines[-60:])
    assert opened < written < synced < named < folder < row < committed < answers[0]
    late = [line for line in lines[committed + 1 : answers[0]] if "pwrite64" in line and "worklist.db-wal" in line]
    assert late == [], "written to the worklist behind its last barrier and before the answer"


RECEIVING = {
    "before the object is opened": "openat:when=1",
    "before its bytes are written": "write:when=1",
    "before the object is synced": "fsync:when=1",
    "before the object has its name": "rename,renameat,renameat2:when=1",
    "before its folder is synced": "fsync:when=2",
    "before the row is written": "pwrite64:when=1",
    "before the row is synced": "fdatasync:when=1",
    "before the association is answered": "sendto,sendmsg:when=1",
    "before success is sent": "sendto,sendmsg:when=2",
    "before the release is answered": "sendto,sendmsg:when=3",
}
"""Points of a C-STORE -> strace's word for them. Each thread counts for itself, and a connection is a thread."""


@pytest.mark.skipif("KILL_POINTS" not in os.environ, reason="part of `make soak`: strace itself hangs now and then")
def test_a_receiver_killed_at_any_point_of_a_c_store_keeps_what_it_acknowledged_and_takes_the_rest_again(
    make_node: Callable[..., Any],
    camera: Callable[..., None],
    wait: Callable[..., Any],
    peer: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    strace, storescu = peer("strace"), peer("/usr/bin/storescu")
    node = make_node()
    sent: list[str] = []
    acknowledged = 0
    for number, (point, how) in enumerate(RECEIVING.items()):
        node.start("receive")
        pid = node.pid("receive")
        (ds,) = _scan(610 + number)
        path = tmp_path / f"{number}.dcm"
        ds.save_as(path, enforce_file_format=True)
        calls, when = how.split(":")
        injected = f"inject={calls}:signal=KILL:{when}"
        with _watched(strace, pid, wait, tmp_path / f"{number}.calls", "-e", f"trace={CALLS}", "-e", injected):
            done = subprocess.run(
                [storescu, "-v", "-R", "-aet", "OPTIMA1", "-aec", "REMNANT", "127.0.0.1", str(node.port), path],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            wait(lambda pid=pid: not _alive(pid), f"killed {point}")
        node.processes.pop("receive").wait()
        told = "(Success)" in done.stdout + done.stderr or "Status: Success" in done.stdout + done.stderr
        assert told is (point == "before the release is answered"), point
        known = {row["study_instance_uid"] for row in node.rows()}
        if told:
            acknowledged += 1
            assert str(ds.StudyInstanceUID) in known, f"acknowledged and lost: {point}"
        sent.append(str(ds.StudyInstanceUID))
        node.start("receive")
        camera(node.port, (ds,))  # what a camera does that had no answer
        node.kill("receive")
    assert acknowledged == 1
    node.start("receive")
    rows = node.rows()
    assert sorted(row["study_instance_uid"] for row in rows) == sorted(sent), "each scan once, none missing"
    assert {row["state"] for row in rows} == {"queued"}
    left = [one.name for one in (node.directory / "var" / "spool").rglob("*") if one.is_file() and one.suffix != ".dcm"]
    assert left == []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
