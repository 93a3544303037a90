"""The embedded archive: a Storage SCP for `remnant demo` and tests; it keeps what the node sends (PS3.4 annex B).

It stands in for a PACS on a machine that has none, listens on loopback by default, and is no product for keeping
patients' images: no query, no retrieval, no retention. Its one promise is the node's own: 0x0000 is said only when the
object is durable, and nothing that was acknowledged is overwritten. File names are digests, never text from the wire.
"""

import hashlib
import os
import threading
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicom_node import disk, log
from dicom_node.contexts import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, accepted_contexts
from dicom_node.errors import RemnantError
from dicom_node.part10 import part_10_header
from dicom_node.transport import C_STORE_RQ, Door, Limits, Peer, Refusal, Request, Server, Service, listen
from dicom_node.uids import valid_uid

_SUCCESS = 0x0000
_DUPLICATE = 0x0111
_OUT_OF_RESOURCES = 0xA700
_DOES_NOT_MATCH = 0xA900
_CANNOT_UNDERSTAND = 0xC000
_UNKNOWN_CALLED = Refusal(1, 1, 7, "unknown called AE title")  # PS3.8 table 9-21

_log = log.get("archive")


@dataclass(frozen=True, slots=True)
class Held:
    """An object the archive has: its UIDs, and its complete Part 10 file."""

    study_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    path: Path


class Archive:
    """An archive in a folder; what it holds survives stop and a new start on the same folder."""

    def __init__(self, directory: Path, ae_title: str = "ARCHIVE", host: str = "127.0.0.1", port: int = 0) -> None:
        """Port 0 lets the system choose; `port` tells which after start()."""
        self.ae_title = ae_title
        self.host = host
        self.port = port
        self._directory = directory
        self._held: dict[str, Held] = {}
        self._writing = threading.Lock()
        self._server: Server | None = None

    def start(self) -> None:
        """Read what the folder holds and listen.

        Raises
        ------
        RemnantError: the folder cannot be used, or the port is taken.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._read_folder()
            self._server = listen([Door((self.host, self.port))], self._service())
        except OSError as error:
            raise RemnantError(
                f"The embedded archive cannot start in {self._directory}, {self.host} port {self.port}: "
                f"{error.strerror or error}.",
                hint="Give it a folder that this user may write, and a free port.",
            ) from error
        self.port = self._server.address[1]

    def stop(self) -> None:
        """Stop listening and abort what is still connected; whatever was acknowledged is on the disk."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def objects(self) -> tuple[Held, ...]:
        """List what the archive holds, by study and then by instance."""
        with self._writing:
            return tuple(sorted(self._held.values(), key=lambda held: (held.study_instance_uid, held.sop_instance_uid)))

    def _service(self) -> Service:
        return Service(
            contexts=accepted_contexts([]),
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
            limits=Limits(idle_s=60, associations=100, associations_per_peer=100),
            admit=self._admit,
            handlers={C_STORE_RQ: self._on_store},
        )

    def _admit(self, peer: Peer) -> Refusal | None:
        return None if peer.called_ae_title == self.ae_title else _UNKNOWN_CALLED

    def _on_store(self, request: Request) -> int:
        try:
            status = self._take(request)
        except OSError as error:
            _log.error("store_failed", error=error.strerror or str(error))
            return _OUT_OF_RESOURCES
        if status != _SUCCESS:
            _log.warning("store_refused", status=f"{status:04X}")
        return status

    def _take(self, request: Request) -> int:
        if not (valid_uid(request.sop_class_uid) and valid_uid(request.sop_instance_uid)):
            return _CANNOT_UNDERSTAND
        if request.excess:
            return _OUT_OF_RESOURCES
        data = (
            part_10_header(request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax_uid) + request.data
        )
        held = self._describe(data)
        if held is None:
            return _CANNOT_UNDERSTAND
        if (held.sop_class_uid, held.sop_instance_uid) != (request.sop_class_uid, request.sop_instance_uid):
            return _DOES_NOT_MATCH
        with self._writing:
            known = self._held.get(held.sop_instance_uid)
            if known is not None:
                return _SUCCESS if known.path.read_bytes() == data else _DUPLICATE
            _write(held.path, data)
            self._held[held.sop_instance_uid] = held
        return _SUCCESS

    def _describe(self, data: bytes) -> Held | None:
        """Read class and UIDs of a Part 10 file; None where one is missing or no UID."""
        try:
            ds = dcmread(
                BytesIO(data),
                stop_before_pixels=True,
                specific_tags=["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"],
            )
            study, instance, class_ = (
                str(ds.get(keyword, "")) for keyword in ("StudyInstanceUID", "SOPInstanceUID", "SOPClassUID")
            )
        except (InvalidDicomError, ValueError, LookupError, EOFError, NotImplementedError):
            return None
        if not (valid_uid(study) and valid_uid(instance) and valid_uid(class_)):
            return None
        path = self._directory / _digest(study) / f"{_digest(instance)}.dcm"
        return Held(study_instance_uid=study, sop_instance_uid=instance, sop_class_uid=class_, path=path)

    def _read_folder(self) -> None:
        for unfinished in self._directory.glob("*/*.part"):
            unfinished.unlink()  # never acknowledged: the name comes before the response
        for path in self._directory.glob("*/*.dcm"):
            held = self._describe(path.read_bytes())
            if held is not None and held.path == path:
                self._held[held.sop_instance_uid] = held
            else:
                _log.warning("not_ours", path=str(path), why="not a file that this archive wrote; left alone")


def _digest(uid: str) -> str:
    return hashlib.sha256(uid.encode("ascii")).hexdigest()[:32]


def _write(path: Path, data: bytes) -> None:
    """Make a file durable under its final name: temporary file, fsync, rename, fsync of the folders."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    for folder in (path.parent, path.parent.parent):
        disk.sync(folder)
