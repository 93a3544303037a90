"""A real node: `remnant` processes in a folder of their own, and a camera that is DCMTK's storescu."""

import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pynetdicom.dsutils import encode

from tests.hospital.end_to_end.committing import Archive

START_S = 120.0
WAIT_S = 180.0  # far above what a quiet machine needs: a slow one is not a fault of the node
REST = ("delivered", "declined", "failed")
# Of the people whom the simulated camera invents: no log of any node in any of these tests may name one.
_NAMES_SOMEBODY = re.compile(r"\bSIMA?\d{7}\b|Lindqvist|Yulan|Minghe|Morino|Haneul|Берегова|Quellmalz")


def wait_for(look: Callable[[], Any], what: str, limit_s: float = WAIT_S) -> Any:
    """Return the first truthy value of `look`; fail with `what` after a bounded time."""
    deadline = time.monotonic() + limit_s
    pause = threading.Event()
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {limit_s:.0f} s")
        pause.wait(0.02)


@dataclass
class Node:
    """The node's processes and what a person can see of them from outside."""

    directory: Path
    config: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return (self.directory / "node.log").read_text(encoding="utf-8", errors="replace")

    @property
    def database(self) -> Path:
        return self.directory / "var" / "worklist.db"

    def start(self, role: str = "serve") -> "Node":
        """Start `remnant ROLE` and wait until what it runs is ready."""
        with (self.directory / "node.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(
                [sys.executable, "-m", "dicom_node.cli", role, "--config", str(self.config)],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for one in ("receive", "work", "send") if role == "serve" else (role,):
            self.wait_until_ready(one)
        return self

    def wait_until_ready(self, role: str) -> None:
        def ready() -> bool:
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not ended, f"{ended} ended: {self.log[-3000:]}"
            return self.pid(role) is not None

        wait_for(ready, f"{role} ready", START_S)

    def announced(self, role: str) -> dict[str, Any]:
        path = self.directory / "var" / "run" / f"{role}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def pid(self, role: str) -> int | None:
        """The process that runs a role now; None while there is none."""
        pid = self.announced(role).get("pid")
        if pid is None or not Path(f"/proc/{pid}/cmdline").exists():
            return None
        return pid if role.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") else None

    @property
    def port(self) -> int:
        return int(self.announced("receive")["port"])

    def kill(self, role: str) -> None:
        """kill -9 of the process that runs a role."""
        pid = self.pid(role)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        process = self.processes.pop(role, None)
        if process is not None:
            process.wait()
        wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in _status(pid), f"{role} dead")

    def stop(self) -> None:
        """SIGTERM to whatever was started here; all of it must end in order."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            process.wait(30)
        self.processes.clear()

    def rows(self) -> list[dict[str, Any]]:
        """The view `worklist`, read as an admin would: a plain SQLite connection beside the running node."""
        if not self.database.exists():
            return []
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("select * from worklist order by id")]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchall()

    def wait_for_rows(self, count: int, states: Sequence[str] = REST) -> list[dict[str, Any]]:
        """Wait until there are `count` rows and all are in one of `states`."""

        def settled() -> list[dict[str, Any]]:
            rows = self.rows()
            return rows if len(rows) == count and all(row["state"] in states for row in rows) else []

        try:
            return list(wait_for(settled, f"{count} rows in {states}"))
        except BaseException:
            sys.stderr.write(json.dumps(self.rows(), indent=1, ensure_ascii=True) + self.log[-4000:])
            raise

    def results(self) -> dict[str, bytes]:
        """SOP Instance UID -> bytes of every result object the node rendered."""
        return {
            uid: (self.directory / "var" / "results" / name).read_bytes()
            for uid, name in self.query("select sop_instance_uid, file_name from result")
        }


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Make a node that sends to `destinations` (anything with ae_title and a port, and `storage_commitment` where it is
    to be asked for that); it is not started yet. `source`, `storage`: more lines about the camera OPTIMA1 and the
    storage."""
    made: list[Node] = []

    def make(*destinations: Any, timing: str = "", source: str = "", storage: str = "", **analysis: Any) -> Node:
        directory = tmp_path / f"node{len(made)}"
        directory.mkdir()
        parts = [
            '[node]\nhost = "127.0.0.1"\nport = 0\n[storage]\nmin_free = "1 MiB"\n' + storage,
            "[delivery]\nfirst_retry_s = 0.2\nmax_retry_s = 1\ntimeout_s = 10\n" + timing,
            "[analysis]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in analysis.items()),
            '[[sources]]\nae_title = "OPTIMA1"\nhosts = ["127.0.0.1"]\n' + source,
        ]
        for index, destination in enumerate(destinations):
            port = getattr(destination, "dicom_port", None) or destination.port
            parts.append(
                f'[[destinations]]\nname = "pacs{index}"\nae_title = "{destination.ae_title}"\n'
                f'host = "127.0.0.1"\nport = {port}\ntest = true\n'
                f"storage_commitment = {json.dumps(getattr(destination, 'storage_commitment', False))}\n"
            )
        config = directory / "node.toml"
        config.write_text("".join(parts))
        node = Node(directory, config)
        made.append(node)
        return node

    yield make
    for node in made:
        node.stop()
        log = node.directory / "node.log"
        assert not log.exists() or not _NAMES_SOMEBODY.search(log.read_text(encoding="utf-8", errors="replace"))


@pytest.fixture
def make_archive() -> Iterator[Callable[..., Archive]]:
    """Make an archive that does Storage Commitment as it is told."""
    made: list[Archive] = []

    def make(reports: str = "new", ae_title: str = "KEEPER") -> Archive:
        archive = Archive(reports=reports, ae_title=ae_title)
        archive.start()
        made.append(archive)
        return archive

    yield make
    for archive in made:
        archive.stop()


@pytest.fixture
def camera(peer: Callable[[str], Path], tmp_path: Path) -> Callable[..., None]:
    """Send objects as a camera does, with DCMTK's storescu; fail unless every one got Success."""
    storescu = peer("/usr/bin/storescu")

    def send(
        port: int, objects: Sequence[Dataset], *options: str, calling: str = "OPTIMA1", called: str = "REMNANT"
    ) -> str:
        folder = tmp_path / "camera"
        folder.mkdir(exist_ok=True)
        files = []
        for ds in objects:
            path = folder / f"{ds.SOPInstanceUID}.dcm"
            ds.save_as(path, enforce_file_format=True)
            files.append(str(path))
        done = subprocess.run(
            [str(storescu), "-v", "-R", "-aet", calling, "-aec", called, *options, "127.0.0.1", str(port), *files],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "TCP_NODELAY": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Status: Success") + done.stderr.count("(Success)") >= len(files), done.stderr
        return done.stdout + done.stderr

    return send


@pytest.fixture(scope="session")
def wait() -> Callable[..., Any]:
    """`wait(look, what)`: the first truthy value of `look`, within a bounded time."""
    return wait_for


@dataclass(frozen=True)
class Call:
    """One sender's association: what became of it, and the seconds from the call to the answer to its object."""

    outcome: str
    took_s: float


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def association_request(sop_class_uid: str) -> bytes:
    """An A-ASSOCIATE-RQ for a class in Explicit VR Little Endian (PS3.8 9.3.2)."""
    syntaxes = _item(0x30, sop_class_uid.encode()) + _item(0x40, b"1.2.840.10008.1.2.1")
    user = _item(0x50, _item(0x51, struct.pack(">I", 131072)) + _item(0x52, b"1.2.3.4"))
    content = b"\0\1\0\0" + b"REMNANT".ljust(16) + b"OPTIMA1".ljust(16) + bytes(32)
    content += _item(0x10, b"1.2.840.10008.3.1.1.1") + _item(0x20, b"\1\0\0\0" + syntaxes) + user
    return struct.pack(">BBI", 1, 0, len(content)) + content


def store_request(ds: Dataset) -> bytes:
    """A C-STORE-RQ with its data set as P-DATA-TF PDUs (PS3.7 9.3.1.1, PS3.8 9.3.5)."""

    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHI", 0, number, len(value)) + value

    def uid(text: str) -> bytes:
        return text.encode() + b"\0" * (len(text) % 2)

    command = element(0x0002, uid(ds.SOPClassUID)) + element(0x0100, b"\1\0") + element(0x0110, b"\1\0")
    command += element(0x0700, b"\0\0") + element(0x0800, b"\0\0") + element(0x1000, uid(ds.SOPInstanceUID))
    command = element(0x0000, struct.pack("<I", len(command))) + command
    data = encode(ds, is_implicit_vr=False, is_little_endian=True)
    assert data is not None
    pieces = [(0x03, command)]
    pieces += [(0x02 if at + 65536 >= len(data) else 0, data[at : at + 65536]) for at in range(0, len(data), 65536)]
    values = [struct.pack(">IBB", len(piece) + 2, 1, control) + piece for control, piece in pieces]
    return b"".join(struct.pack(">BBI", 4, 0, len(value)) + value for value in values)


@pytest.fixture(scope="session")
def all_at_once() -> Callable[[int, Sequence[Dataset]], list[Call]]:
    """Send each object in an association of its own, all at the same moment, on plain sockets: hundreds of a library's
    callers would keep this machine busy with themselves."""

    def call(port: int, request: bytes, message: bytes, start: threading.Barrier, calls: list[Call]) -> None:
        start.wait()
        began = time.monotonic()
        outcome = "broken"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=120) as stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.sendall(request)
            answer = stream.recv(4096)
            if answer[:1] == b"\x03":
                outcome = "transient rejection" if answer[7] == 2 else "rejected for good"
            elif answer[:1] == b"\x02":
                stream.sendall(message)
                # The status is the element (0000,0900) of the response.
                said = stream.recv(4096)
                at = said.find(struct.pack("<HHI", 0, 0x0900, 2))
                outcome = f"status {int.from_bytes(said[at + 8 : at + 10], 'little'):04X}" if at > 0 else "no status"
                took_s = time.monotonic() - began
                stream.sendall(struct.pack(">BBII", 5, 0, 4, 0))
                stream.recv(16)
                calls.append(Call(outcome, took_s))
                return
        calls.append(Call(outcome, time.monotonic() - began))

    def send(port: int, objects: Sequence[Dataset]) -> list[Call]:
        start = threading.Barrier(len(objects))
        calls: list[Call] = []
        senders = [
            threading.Thread(
                target=call, args=(port, association_request(str(ds.SOPClassUID)), store_request(ds), start, calls)
            )
            for ds in objects
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        return calls

    return send
