"""A hospital's peers, for real: Orthanc and DCMTK's storescp, on loopback, in folders of their own."""

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_START_S = 60.0
_CASES = Path(__file__).parents[1] / "dicom_node" / "report" / "conftest.py"
_WIRE = Path(__file__).parents[1] / "dicom_node" / "test_transport.py"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + _START_S
    pause = threading.Event()
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended with {process.returncode} instead of starting")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start within {_START_S:.0f} s")
        pause.wait(0.05)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass
class Orthanc:
    """A running Orthanc with its index and storage under `directory`; what it stored survives stop() and start()."""

    program: Path
    directory: Path
    overrides: dict[str, Any] = field(default_factory=dict)
    ae_title: str = "ORTHANC"
    host: str = "127.0.0.1"
    dicom_port: int = field(default_factory=_free_port)
    http_port: int = field(default_factory=_free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration = {
            "Name": "test",
            "StorageDirectory": str(self.directory / "storage"),
            "IndexDirectory": str(self.directory / "index"),
            "DicomAet": self.ae_title,
            "DicomPort": self.dicom_port,
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowEcho": True,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "Plugins": [],
            **self.overrides,
        }
        path = self.directory / "orthanc.json"
        path.write_text(json.dumps(configuration))
        with (self.directory / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen([str(self.program), str(path)], stdout=log, stderr=log)
        _wait_until(lambda: self._answers() and _listens(self.dicom_port), self._process, "Orthanc")

    def stop(self) -> None:
        """The PACS is away: connections are refused until start()."""
        _end(self._process)
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def instances(self) -> list[str]:
        """Orthanc's own identifiers of everything it holds."""
        return list(self._get_json("/instances"))

    def find(self, study_uid: str) -> list[str]:
        """Identifiers of the instances of one study."""
        query = {"Level": "Instance", "Query": {"StudyInstanceUID": study_uid}}
        return list(json.loads(self._request("POST", "/tools/find", json.dumps(query).encode())))

    def store(self, file: bytes) -> None:
        """Put a Part 10 file into the archive, by HTTP."""
        self._request("POST", "/instances", file)

    def know(self, ae_title: str, port: int) -> None:
        """Let Orthanc call an AE title, as it does to report on Storage Commitment."""
        who = json.dumps({"AET": ae_title, "Host": self.host, "Port": port}).encode()
        self._request("PUT", f"/modalities/{ae_title.lower()}", who)

    def file(self, identifier: str) -> bytes:
        """The Part 10 file of an instance, as Orthanc stored it."""
        return self._request("GET", f"/instances/{identifier}/file")

    def _get_json(self, path: str) -> Any:
        return json.loads(self._request("GET", path))

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection(self.host, self.http_port, timeout=30)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            content = response.read()
            if response.status != http.HTTPStatus.OK:
                raise RuntimeError(f"Orthanc answered {response.status} to {method} {path}")
            return content
        finally:
            connection.close()

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self._get_json("/system"))
        return False


@contextmanager
def _loaded(path: Path, name: str) -> Iterator[ModuleType]:
    """A file of other tests as a module, for what it builds."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="session")
def cases() -> Iterator[ModuleType]:
    """The cases of the report's own tests: scans of the simulated camera and outcomes built by hand on them."""
    with _loaded(_CASES, "cases_of_the_report_tests") as module:
        yield module


@pytest.fixture(scope="session")
def wire() -> Iterator[ModuleType]:
    """What the transport's own tests say on the wire: honest PDUs, broken ones, rubbish."""
    with _loaded(_WIRE, "wire_of_the_transport_tests") as module:
        yield module


@pytest.fixture(scope="session")
def start_orthanc(
    peer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Orthanc]]:
    """Start an Orthanc of one's own: `start_orthanc(ae_title="PACS", DicomCheckCalledAet=False, ...)`."""
    program = peer("/usr/sbin/Orthanc")
    started: list[Orthanc] = []

    def start(ae_title: str = "ORTHANC", **overrides: Any) -> Orthanc:
        archive = Orthanc(program, tmp_path_factory.mktemp("orthanc"), overrides, ae_title)
        started.append(archive)
        archive.start()
        return archive

    yield start
    for archive in started:
        archive.stop()


@pytest.fixture(scope="session")
def orthanc(start_orthanc: Callable[..., Orthanc]) -> Orthanc:
    """One Orthanc for the whole session, because it takes seconds to start: give each test a study UID of its own."""
    return start_orthanc()


@dataclass(frozen=True)
class StoreScp:
    """A running DCMTK storescp; it writes each dataset into `directory` exactly as it came."""

    ae_title: str
    host: str
    port: int
    directory: Path

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.is_file())


@pytest.fixture
def start_storescp(peer: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., StoreScp]]:
    """Start a DCMTK storescp with more options of its own: `start_storescp("--implicit")`."""
    program = peer("/usr/bin/storescp")
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str, ae_title: str = "STORESCP") -> StoreScp:
        port = _free_port()
        directory = tmp_path / f"storescp-{port}"
        directory.mkdir()
        command = [str(program), "--aetitle", ae_title, "--output-directory", str(directory), "--bit-preserving"]
        with (tmp_path / f"storescp-{port}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *options, str(port)], stdout=log, stderr=log, env={**os.environ, "TCP_NODELAY": "1"}
            )
        running.append(process)
        _wait_until(lambda: _listens(port), process, "storescp")
        return StoreScp(ae_title, "127.0.0.1", port, directory)

    yield start
    for process in running:
        _end(process)


@dataclass(frozen=True)
class QrScp:
    """A running DCMTK dcmqrscp with one archive; `stored()` reads what lies in it."""

    ae_title: str
    host: str
    port: int
    directory: Path

    def stored(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.name != "index.dat")


@pytest.fixture(scope="session")
def dcmqrscp(peer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[QrScp]:
    """One DCMTK archive for the whole session: give each test a study UID of its own."""
    program = peer("/usr/bin/dcmqrscp")
    root = tmp_path_factory.mktemp("dcmqrscp")
    archive = QrScp("QRSCP", "127.0.0.1", _free_port(), root / "archive")
    archive.directory.mkdir()
    configuration = root / "dcmqrscp.cfg"
    configuration.write_text(
        f"NetworkTCPPort = {archive.port}\nMaxPDUSize = 16384\nMaxAssociations = 16\n"
        "HostTable BEGIN\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\n{archive.ae_title} {archive.directory} RW (2000, 1024mb) ANY\nAETable END\n"
    )
    with (root / "dcmqrscp.log").open("wb") as log:
        process = subprocess.Popen([str(program), "--config", str(configuration)], stdout=log, stderr=log)
    try:
        _wait_until(lambda: _listens(archive.port), process, "dcmqrscp")
        yield archive
    finally:
        _end(process)
