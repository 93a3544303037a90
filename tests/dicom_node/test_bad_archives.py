"""Eighteen kinds of bad archive beside a good one: each delivery ends as promised, and the good one waits for nobody.

The archives are sockets that speak just as much DICOM as their kind needs. What is to be tried later is tried again
with pauses until the archive is well, and then it has the same UID and the same bytes.
"""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, SecondaryCaptureImageStorage, generate_uid
from pynetdicom import build_context
from pynetdicom.dsutils import split_dataset
from sqlalchemy import Engine

from dicom_node import spool, worklist
from dicom_node.delivery import Sender
from dicom_node.sender import Parcel, Peer, send
from dicom_node.settings import TLS, Settings
from dicom_node.transport.dimse import Command, read_command, response
from dicom_node.transport.negotiation import accept, read_request
from dicom_node.transport.secure import Encryption

# pynetdicom drops the socket of a failed connection without closing it; Python's reference count does.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

FIRST_RETRY_S, TIMEOUT_S = 0.3, 0.7
OBJECT_BYTES = 40_000
ABORT = struct.pack(">BBIBBBB", 7, 0, 4, 0, 0, 0, 0)
STORABLE = [build_context(SecondaryCaptureImageStorage, ExplicitVRLittleEndian)]


def until(look: Callable[[], Any], limit_s: float = 30.0) -> Any:
    deadline = time.monotonic() + limit_s
    pause = threading.Event()
    while not (seen := look()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        pause.wait(0.02)
    return seen


class Gone(Exception):  # noqa: N818 - an event
    """The sender closed the connection."""


class Line:
    """One connection at an archive."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream

    def pdu(self) -> tuple[int, bytes]:
        header = self._read(6)
        return header[0], self._read(int.from_bytes(header[2:], "big"))

    def associate(self, contexts: list[Any] = STORABLE) -> "Line":
        kind, content = self.pdu()
        assert kind == 1
        self.stream.sendall(accept(read_request(content), contexts, "1.2.3.4", "BAD")[0])
        return self

    def reject(self, *why: int) -> None:
        assert self.pdu()[0] == 1
        self.stream.sendall(struct.pack(">BBIBBBB", 3, 0, 4, 0, *why))
        self.gone()

    def message(self) -> tuple[int, Command, bytes]:
        """The next C-STORE: context, command, data set."""
        command, data = b"", b""
        while True:
            kind, content = self.pdu()
            if kind == 5:
                self.stream.sendall(struct.pack(">BBII", 6, 0, 4, 0))
                raise Gone
            if kind != 4:
                raise Gone
            while content:
                length = int.from_bytes(content[:4], "big")
                context_id, control, piece = content[4], content[5], content[6 : 4 + length]
                content = content[4 + length :]
                if control & 1:
                    command += piece
                else:
                    data += piece
                    if control & 2:
                        return context_id, read_command(command), data

    def answer(self, context_id: int, command: Command, status: int) -> bytes:
        said = response(command, status)
        value = struct.pack(">IBB", len(said) + 2, context_id, 3) + said
        return struct.pack(">BBI", 4, 0, len(value)) + value

    def gone(self) -> None:
        """Wait until the other end closes."""
        with suppress(Gone):
            while True:
                self._read(1)

    def _read(self, count: int) -> bytes:
        came = b""
        while len(came) < count:
            try:
                piece = self.stream.recv(count - len(came))
            except OSError as error:
                raise Gone from error
            if not piece:
                raise Gone
            came += piece
        return came


@dataclass
class Archive:
    """Treats each connection as its kind does, until it is well; keeps what it took and when it was called."""

    kind: Callable[["Archive", Line], None]
    well: bool = False
    listening: bool = True
    took: list[tuple[str, bytes]] = field(default_factory=list)
    called_at: list[float] = field(default_factory=list)
    port: int = 0
    _listener: socket.socket | None = None
    _threads: list[threading.Thread] = field(default_factory=list)
    _streams: list[socket.socket] = field(default_factory=list)

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        if not self.listening:
            self._listener.close()
            return
        self._threads.append(threading.Thread(target=self._accept, args=(self._listener,)))
        self._threads[-1].start()

    def heal(self) -> None:
        self.well = True
        if not self.listening:
            self.listening = True
            self.start()

    def stop(self) -> None:
        for one in (self._listener, *self._streams):
            if one is not None:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                stream, _ = listener.accept()
            except OSError:
                return
            self._streams.append(stream)
            self.called_at.append(time.monotonic())
            self._threads.append(threading.Thread(target=self._serve, args=(stream,)))
            self._threads[-1].start()

    def _serve(self, stream: socket.socket) -> None:
        with suppress(Gone, OSError):
            (good if self.well else self.kind)(self, Line(stream))
        stream.close()

    def take(self, line: Line) -> tuple[int, Command]:
        context_id, command, data = line.message()
        self.took.append((command.sop_instance_uid, data))
        return context_id, command


def good(archive: Archive, line: Line) -> None:
    answering(0x0000)(archive, line)


def answering(status: int) -> Callable[[Archive, Line], None]:
    def kind(archive: Archive, line: Line) -> None:
        line.associate()
        while True:
            context_id, command = archive.take(line)
            line.stream.sendall(line.answer(context_id, command, status))

    return kind


def reset(archive: Archive, line: Line) -> None:
    line.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent(archive: Archive, line: Line) -> None:
    line.gone()


def rejects(archive: Archive, line: Line) -> None:
    line.reject(1, 1, 3)


def busy(archive: Archive, line: Line) -> None:
    line.reject(2, 3, 2)


def wrong_ae_title(archive: Archive, line: Line) -> None:
    line.reject(1, 1, 7)


def takes_no_class(archive: Archive, line: Line) -> None:
    line.associate([build_context("1.2.840.10008.1.1")])
    line.gone()


def takes_no_syntax(archive: Archive, line: Line) -> None:
    line.associate([build_context(SecondaryCaptureImageStorage, JPEGBaseline8Bit)])
    line.gone()


def aborts_in_the_command(archive: Archive, line: Line) -> None:
    line.associate().pdu()
    line.stream.sendall(ABORT)
    line.gone()


def aborts_in_the_data(archive: Archive, line: Line) -> None:
    line.associate().pdu()
    line._read(OBJECT_BYTES // 2)
    line.stream.sendall(ABORT)
    line.gone()


def loses_the_acknowledgement(archive: Archive, line: Line) -> None:
    archive.take(line.associate())


def trickles(archive: Archive, line: Line) -> None:
    context_id, command = archive.take(line.associate())
    for byte in line.answer(context_id, command, 0x0000)[:-2]:
        line.stream.sendall(bytes((byte,)))
        threading.Event().wait(0.2)


def flaps(archive: Archive, line: Line) -> None:
    [reset, aborts_in_the_data, loses_the_acknowledgement][len(archive.called_at) % 3](archive, line)


def vanishes(archive: Archive, line: Line) -> None:
    """A half-open link: the connection stands, and nothing moves on it any more."""
    line.associate()
    until(lambda: archive.well)


def speaks_tls_only(archive: Archive, line: Line) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    line.stream.settimeout(5)
    context.wrap_socket(line.stream, server_side=True).close()


def down(archive: Archive, line: Line) -> None:
    raise AssertionError("nobody listens")


# What is promised for each kind, by design.md's table: the delivery's state, and what the row says meanwhile.
TABLE: list[tuple[str, Callable[[Archive, Line], None], str, str]] = [
    ("down", down, "pending", "no connection"),
    ("reset", reset, "pending", ""),
    ("silent", silent, "pending", "no answer to our association request"),
    ("reject", rejects, "pending", "rejected for good"),
    ("reject for now", busy, "pending", "rejected for now"),
    ("no context", takes_no_class, "refused", "none of the SOP classes"),
    ("no syntax", takes_no_syntax, "refused", "none of the SOP classes"),
    ("A700", answering(0xA700), "pending", "A700"),
    ("A900", answering(0xA900), "refused", "A900"),
    ("C000", answering(0xC000), "refused", "C000"),
    ("B000", answering(0xB000), "acknowledged", "B000"),
    ("abort in command", aborts_in_the_command, "pending", "ended"),
    ("abort in data", aborts_in_the_data, "pending", "ended"),
    ("lost acknowledgement", loses_the_acknowledgement, "pending", "ended"),
    ("slow", trickles, "pending", "no response within"),
    ("flapping", flaps, "pending", ""),
    ("wrong AE", wrong_ae_title, "pending", "rejected for good"),
    ("half-open link", vanishes, "pending", "no response within"),
    ("TLS error", speaks_tls_only, "pending", ""),
]


@dataclass
class Hospital:
    """A scan whose picture is due at a bad and at a good archive, and the bytes it has."""

    engine: Engine
    settings: Settings
    store: spool.Spool
    scan_id: int
    uid: str
    data: bytes

    def delivery(self, name: str) -> dict[str, Any]:
        (found,) = [
            one for one in worklist.details(self.engine, self.scan_id)["deliveries"] if one["destination"] == name
        ]
        return dict(found)

    def row(self) -> dict[str, Any]:
        return dict(worklist.row(self.engine, self.scan_id))

    @contextmanager
    def sending(self) -> Iterator[None]:
        stop = threading.Event()
        sender = Sender(self.settings, self.engine, self.store, owner="sender")
        thread = threading.Thread(target=sender.run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            sender.wake()
            thread.join(30)
            assert not thread.is_alive(), "the sender does not stop"


def picture() -> tuple[str, bytes]:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = UID(generate_uid(prefix=None))
    ds.PatientID = "INVENTED-1"
    ds.EncapsulatedDocument = bytes(range(250)) * (OBJECT_BYTES // 250)
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return str(ds.SOPInstanceUID), file.getvalue()


def due(camera: Any, directory: Path, ports: dict[str, int]) -> Hospital:
    settings = Settings.model_validate(
        {
            "storage": {"directory": str(directory)},
            "delivery": {"first_retry_s": FIRST_RETRY_S, "max_retry_s": 2 * FIRST_RETRY_S, "timeout_s": TIMEOUT_S},
            "destinations": [
                {"name": name, "ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port, "test": True}
                for name, port in ports.items()
            ],
        }
    )
    store = spool.open_spool(directory, 0)
    scan_id = camera.send("scan").scan_id
    held = worklist.claim(camera.engine, "work", "boot")
    assert held is not None
    uid, data = picture()
    name, digest = spool.put_result(store, data)
    result = worklist.NewResult("sc", "colour", str(SecondaryCaptureImageStorage), uid, "1.2.3", digest, name)
    worklist.finish(
        camera.engine,
        held,
        outcome="analysed",
        finding="present",
        probability=0.9,
        model="net 1",
        results=[result],
        deliveries=[(uid, name) for name in ports],
    )
    return Hospital(camera.engine, settings, store, scan_id, uid, data)


@pytest.mark.parametrize(("kind", "state", "said"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_bad_archive_ends_as_promised_and_delays_no_other(
    kind: Callable[[Archive, Line], None], state: str, said: str, sqlite_camera: Any, tmp_path: Path
) -> None:
    bad, healthy = Archive(kind, listening=kind is not down), Archive(good)
    bad.start()
    healthy.start()
    try:
        hospital = due(sqlite_camera, tmp_path / "var", {"bad": bad.port, "good": healthy.port})
        dataset = hospital.data[split_dataset(hospital.store.results / _only_file(hospital))[1] :]
        with hospital.sending():
            until(lambda: hospital.delivery("good")["state"] == "acknowledged", 10)
            if state == "pending":
                until(lambda: hospital.delivery("bad")["attempts"] >= 2)
                assert hospital.delivery("bad")["state"] == "pending"
                assert hospital.row()["state"] == "sending"
                assert said in hospital.row()["last_error"]
                bad.heal()
                until(lambda: hospital.row()["state"] == "delivered")
            else:
                until(lambda: hospital.row()["state"] != "sending")
                assert hospital.delivery("bad")["attempts"] == 1, "what is refused or stored is not sent again"
        ended = hospital.delivery("bad")
        assert ended["state"] == ("acknowledged" if state == "pending" else state)
        assert hospital.row()["state"] == ("failed" if state == "refused" else "delivered")
        if state != "pending":
            assert said in hospital.row()["last_error"]
        # The same UID and the same bytes, however often; and never without a pause in between.
        assert set(bad.took) <= {(hospital.uid, dataset)}
        assert len(bad.took) >= (3 if kind is loses_the_acknowledgement else 0)
        assert healthy.took == [(hospital.uid, dataset)]
        gaps = [later - before for before, later in zip(bad.called_at, bad.called_at[1:], strict=False)]
        assert all(gap > 0.7 * FIRST_RETRY_S for gap in gaps), gaps
        assert len(bad.called_at) <= ended["attempts"]
    finally:
        bad.stop()
        healthy.stop()


def _only_file(hospital: Hospital) -> str:
    (path,) = (path for path in hospital.store.results.glob("[0-9a-f][0-9a-f]/*"))
    return f"{path.parent.name}/{path.name}"


def test_a_sender_that_wants_tls_sends_nothing_to_an_archive_that_speaks_plain(tmp_path: Path) -> None:
    plain = Archive(good)
    plain.start()
    uid, data = picture()
    path = tmp_path / "object.dcm"
    path.write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        ((_, outcome),) = send(
            Peer("plain", "ARCHIVE", "127.0.0.1", plain.port, Encryption(context, "127.0.0.1")),
            [Parcel(1, path, str(SecondaryCaptureImageStorage), uid)],
            calling_ae_title="REMNANT",
            connect_timeout_s=1,
            acse_timeout_s=1,
            dimse_timeout_s=1,
        )
    finally:
        plain.stop()
    assert (outcome.kind, outcome.status) == ("later", None)
    assert outcome.text.endswith(": its TLS handshake did not end in time")
    assert not plain.took


def test_a_destination_whose_certificates_cannot_be_read_waits_and_delays_no_other(
    sqlite_camera: Any, tmp_path: Path
) -> None:
    plain, healthy = Archive(good), Archive(good)
    plain.start()
    healthy.start()
    try:
        hospital = due(sqlite_camera, tmp_path / "var", {"bad": plain.port, "good": healthy.port})
        bad, fine = hospital.settings.destinations
        gone = str(tmp_path / "gone.pem")
        changed = {
            "destinations": (bad.model_copy(update={"tls": True}), fine),
            "tls": TLS(certificate=gone, key=gone, authorities=gone),
        }
        hospital.settings = hospital.settings.model_copy(update=changed)
        with hospital.sending():
            until(lambda: hospital.delivery("good")["state"] == "acknowledged", 10)
            until(lambda: hospital.delivery("bad")["attempts"] >= 2)
        assert hospital.delivery("bad")["state"] == "pending"
        assert f"tls.key: {gone} cannot be read: No such file or directory" in hospital.row()["last_error"]
        assert plain.called_at == []
    finally:
        plain.stop()
        healthy.stop()
