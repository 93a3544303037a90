"""What receiving costs: durable C-STORE beside DCMTK's storescp, an association, idle associations, memory.

Run by `make bench`. DCMTK's storescp (TCP_NODELAY=1) writes without fsync and keeps no index; all take turns, so that
whatever else the machine does meets each. How long a disk takes to make something durable decides most of the ratio,
and on a shared one changes by a factor of ten: so the barriers of an object are timed by themselves, which shows what
the node adds to them, and other nodes write to memory, where they cost nothing. Two of the nodes keep an audit trail.
"""

import os
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import generate_uid

from pipeline.camera import examination, expose
from pipeline.phantom import phantom

ROUNDS, OBJECTS = 7, 100
LONG_ROUNDS, LONG = 3, 1000
STARTS = 3
ECHOES = 200
IDLE, IDLE_S = 10, 10.0
AUDIT = '[audit]\nhost = "127.0.0.1"\nport = 9\ntransport = "tcp"\n'  # no `send` runs, which would take them there
VERIFICATION, IMPLICIT = b"1.2.840.10008.1.1", b"1.2.840.10008.1.2"


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder on a file system in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_receiving(
    make_node: Callable[..., Any],
    start_storescp: Callable[..., Any],
    peer: Callable[[str], Path],
    tmp_path: Path,
    memory: Path,
) -> None:
    node = make_node().start("receive")
    pid = node.pid("receive")
    others = {
        "remnant with audit": make_node(source=AUDIT),
        "remnant in memory": make_node(),
        "remnant in memory with audit": make_node(source=AUDIT),
    }
    for name, one in others.items():
        if "memory" in name:
            (memory / name).mkdir()
            (one.directory / "var").symlink_to(memory / name)
        one.start("receive")
    other = start_storescp()
    receivers = {
        "remnant": (node.port, "REMNANT"),
        **{name: (one.port, "REMNANT") for name, one in others.items()},
        "storescp": (other.port, other.ae_title),
    }
    (ds,) = expose(phantom(1), examination(1), "two_frames")
    print(f"\n{OBJECTS} objects of {len(ds.PixelData) / 1000:.0f} kB a round, one sender, {ROUNDS} rounds")
    used_before = {name: cpu_s(one.pid("receive")) for name, one in {"remnant": node, **others}.items()}
    rates: dict[str, list[float]] = {name: [] for name in (*receivers, "barriers alone")}
    for number in range(ROUNDS + 1):
        for name, (port, called) in receivers.items():
            folder = tmp_path / f"{name}-{number}"
            write(ds, folder)
            took_s = send(peer("/usr/bin/storescu"), folder, port, called)
            if number:  # the first round warms up
                rates[name].append(OBJECTS / took_s)
        took_s = barriers(tmp_path / f"barriers-{number}", bytes(ds.PixelData))
        if number:
            rates["barriers alone"].append(OBJECTS / took_s)
    _tell(rates)
    assert len(node.rows()) == OBJECTS * (ROUNDS + 1), "an acknowledged object is not in the worklist"
    for one in (others["remnant with audit"], others["remnant in memory with audit"]):
        told = sum(
            path.read_bytes().count(b'"110104"') for path in (one.directory / "var" / "audit").glob("*.messages")
        )
        assert told >= OBJECTS * (ROUNDS + 1), "an acknowledged object has no audit message"
    # What else the machine does changes a rate by more than a message costs; the time of the CPU it hardly changes.
    for name, one in {"remnant": node, **others}.items():
        used_ms = 1000 * (cpu_s(one.pid("receive")) - used_before[name])
        print(f"{name}: {used_ms / (OBJECTS + STARTS) / (ROUNDS + 1):.2f} ms of CPU an object")
    set_up = [associate(node.port)[0] for _ in range(ECHOES)]
    print(f"set-up of an association, ms: median {1000 * statistics.median(set_up):.2f}, best {1000 * min(set_up):.2f}")
    before = cpu_s(pid)
    with ExitStack() as lines:
        for _ in range(IDLE):
            lines.enter_context(closing(associate(node.port, keep=True)[1]))
        before = cpu_s(pid)
        threading.Event().wait(IDLE_S)
        print(f"{IDLE} idle associations: {100 * (cpu_s(pid) - before) / IDLE_S:.1f} % of a core")
    print(f"peak memory of the receiver, which made the tables too: {memory_mib(pid, 'VmHWM'):.0f} MiB")
    huge(node.port)
    print(f"the same after 100 PDUs that claim 512 MiB: {memory_mib(pid, 'VmHWM'):.0f} MiB")
    node.stop()
    pid = node.start("receive").pid("receive")
    took_s = send(peer("/usr/bin/storescu"), tmp_path / f"remnant-{ROUNDS}", node.port, "REMNANT")
    print(f"known objects again: {OBJECTS / took_s:.0f} objects/s")
    print(f"memory of the receiver when it is started again, after that: {memory_mib(pid, 'VmRSS'):.0f} MiB RSS,"
          f" {memory_mib(pid, 'Pss', 'smaps_rollup'):.0f} MiB PSS")  # fmt: skip


def test_a_long_burst(
    make_node: Callable[..., Any], start_storescp: Callable[..., Any], peer: Callable[[str], Path], tmp_path: Path
) -> None:
    """Long enough that files have to be synced while others come; beside a node without a journal."""
    nodes = {"remnant": make_node(), "without journal": make_node(storage="journal = false\n")}
    other = start_storescp()
    receivers = {name: (node.start("receive").port, "REMNANT") for name, node in nodes.items()}
    receivers["storescp"] = (other.port, other.ae_title)
    (ds,) = expose(phantom(1), examination(1), "two_frames")
    rates: dict[str, list[float]] = {name: [] for name in receivers}
    for number in range(LONG_ROUNDS):
        for name, (port, called) in receivers.items():
            folder = tmp_path / f"{name}-{number}"
            write(ds, folder, LONG)
            rates[name].append(LONG / send(peer("/usr/bin/storescu"), folder, port, called))
    print(f"\n{LONG} objects a round, one sender, {LONG_ROUNDS} rounds")
    _tell(rates)
    assert all(len(node.rows()) == LONG * LONG_ROUNDS for node in nodes.values())


def _tell(rates: dict[str, list[float]]) -> None:
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(values, rates["storescp"], strict=True)]
        print(f"{name}: {statistics.median(values):.0f} objects/s (best {max(values):.0f}); to storescp: median"
              f" {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")  # fmt: skip


@pytest.mark.parametrize("senders", [100, 200])
def test_many_senders_at_once(make_node: Callable[..., Any], all_at_once: Callable[..., Any], senders: int) -> None:
    node = make_node().start("receive")
    objects = []
    for _ in range(senders):
        (ds,) = expose(phantom(1), examination(1), "two_frames")
        ds.SOPInstanceUID, ds.StudyInstanceUID = generate_uid(), generate_uid()
        objects.append(ds)
    calls = all_at_once(node.port, objects)
    outcomes = Counter(call.outcome for call in calls)
    took = sorted(call.took_s for call in calls if call.outcome == "status 0000")
    print(f"\n{senders} senders at once: {dict(outcomes)}; seconds from call to Success: median"
          f" {statistics.median(took):.2f}, p95 {took[int(0.95 * len(took))]:.2f}, longest {took[-1]:.2f}")  # fmt: skip
    assert set(outcomes) <= {"status 0000", "transient rejection"}
    assert len(node.rows()) == outcomes["status 0000"]


def write(ds: Dataset, folder: Path, count: int = OBJECTS) -> None:
    folder.mkdir()
    for number in range(count):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.StudyInstanceUID = generate_uid()
        ds.save_as(folder / f"{number:04}.dcm", enforce_file_format=True)


def send(storescu: Path, folder: Path, port: int, called: str) -> float:
    """Send a folder in one association; return the seconds it took, without the program's start."""
    command = [str(storescu), "-aet", "OPTIMA1", "-aec", called, "--max-send-pdu", "131072", "127.0.0.1", str(port)]
    environment = {**os.environ, "TCP_NODELAY": "1"}
    first = str(next(folder.iterdir()))
    one_s = []
    for _ in range(STARTS):  # the shortest: a start that something else delayed would make the rest look too fast
        started = time.monotonic()
        subprocess.run([*command, first], check=True, env=environment, capture_output=True)
        one_s.append(time.monotonic() - started)
    started = time.monotonic()
    subprocess.run([*command, *sorted(map(str, folder.iterdir()))], check=True, env=environment, capture_output=True)
    return max(time.monotonic() - started - min(one_s), 0.001)


def barriers(folder: Path, data: bytes) -> float:
    """Make objects durable as a file each and a row each, and nothing else; return the seconds."""
    folder.mkdir()
    shelf = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT)
    os.write(log, bytes(OBJECTS * 32768))
    os.fsync(log)
    started = time.monotonic()
    for number in range(OBJECTS):
        part = folder / f"{number}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)
        part.rename(folder / f"{number}.dcm")
        os.fsync(shelf)
        os.pwrite(log, data[:32768], number * 32768)
        os.fdatasync(log)
    took_s = time.monotonic() - started
    os.close(shelf)
    os.close(log)
    return took_s


def associate(port: int, *, keep: bool = False) -> tuple[float, socket.socket]:
    """Ask for Verification; return the seconds until the answer and the connection, released unless it is kept."""

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(content)) + content

    context = item(0x20, b"\1\0\0\0" + item(0x30, VERIFICATION) + item(0x40, IMPLICIT))
    user = item(0x50, item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4"))
    content = b"\0\1\0\0" + b"REMNANT".ljust(16) + b"OPTIMA1".ljust(16) + bytes(32)
    content += item(0x10, b"1.2.840.10008.3.1.1.1") + context + user
    started = time.monotonic()
    stream = socket.create_connection(("127.0.0.1", port), timeout=30)
    stream.sendall(struct.pack(">BBI", 1, 0, len(content)) + content)
    assert stream.recv(4096)[0] == 2
    took_s = time.monotonic() - started
    if not keep:
        stream.sendall(struct.pack(">BBII", 5, 0, 4, 0))
        assert stream.recv(16)[0] == 6
        stream.close()
    return took_s, stream


def huge(port: int) -> None:
    for _ in range(100):
        with closing(associate(port, keep=True)[1]) as stream:
            stream.sendall(struct.pack(">BBI", 4, 0, 512 * 1024**2))
            assert stream.recv(16)[:1] in (b"\x07", b"")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, figure: str, table: str = "status") -> float:
    return int(Path(f"/proc/{pid}/{table}").read_text().split(f"{figure}:")[1].split()[0]) / 1024
