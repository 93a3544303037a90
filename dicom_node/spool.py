"""Bytes on disk: received objects and rendered results.

`put_*` returns only when the bytes and the name are durable: temporary file, write, fsync, rename, fsync of the folder.
A received object of a burst is durable in the journal instead, and its file is synced behind the answer: see `journal`.
A file under its final name is therefore whole, or `open_spool` makes it whole from the journal before it returns; what
lies in `incoming` or `rendering` is not, and goes at the next start.
Names are SHA-256 digests of the content and never come from the wire, so a name cannot lead outside the spool, and the
same bytes sent twice are one file. A file an object: an admin can look at it with any DICOM tool.

Files are DICOM Part 10 (PS3.10 7.1). The digest of a received object is that of its dataset exactly as it was sent,
without our file meta information, so that it does not change with our version.
`quarantine` holds files that no row owns and that cannot be entered again; see `reconcile` and `quarantine`.
"""

import hashlib
import os
import re
import shutil
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dicom_node import disk, log
from dicom_node.errors import StorageError
from dicom_node.journal import Entry, Journal, Record, abandoned


@dataclass(frozen=True, slots=True)
class Spool:
    """The folders of one node; made by `open_spool`."""

    incoming: Path
    journal: Path
    rendering: Path
    objects: Path
    quarantine: Path
    results: Path
    run: Path
    min_free: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file on a shelf: its name as the worklist knows it, its size, and when it came (seconds since 1970)."""

    name: str
    size_bytes: int
    modified_s: float


_log = log.get("spool")

_NAME = re.compile(r"[0-9a-f]{64}\.dcm")

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_TOGETHER = 8
"""Files that are synced together behind the answer."""
_WRITE_AT_LEAST = 64 * 1024
"""Bytes of an object that are worth a call before its end; what comes in smaller pieces is collected first."""

# Preamble 128, prefix "DICM", then (0002,0000) UL of 4 bytes: the length of the rest of the group (PS3.10 7.1).
_META_START = 128
_META = struct.Struct("<4sHH2sHI")


def open_spool(directory: Path, min_free: int) -> Spool:
    """Make the folders (mode 0700: the bytes are patients'), put what a dead receiver's journal holds on the shelf, and
    return the spool. Raises StorageError."""
    spool = Spool(
        incoming=directory / "spool" / "incoming",
        journal=directory / "spool" / "journal",
        rendering=directory / "results" / "rendering",
        objects=directory / "spool" / "objects",
        quarantine=directory / "spool" / "quarantine",
        results=directory / "results",
        run=directory / "run",
        min_free=min_free,
    )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Each by itself: `parents` would give what lies between the umask's mode.
        for folder in (directory, spool.objects.parent, spool.results, spool.run):
            folder.mkdir(mode=0o700, exist_ok=True)
        for folder in (spool.incoming, spool.journal, spool.rendering, spool.objects, spool.quarantine):
            folder.mkdir(mode=0o700, exist_ok=True)
        for shelf in (spool.objects, spool.results):
            # All shelves now, so that storing an object never has to make one durable.
            for number in range(256):
                (shelf / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
            disk.sync(shelf)
            disk.sync(shelf.parent)
        disk.sync(directory)
    except OSError as error:
        raise StorageError(
            f"The storage folder {directory} cannot be used: {error.strerror or error}.",
            hint="Give [storage] directory a folder that this user may write.",
        ) from error
    restore(spool)
    return spool


def restore(spool: Spool) -> int:
    """Put every object that a dead receiver's journal holds on its shelf again, durable; return how many.

    Most of them lie there: it died, and the machine did not. They are written all the same, because whether their bytes
    reached the disk nobody can say. Raises StorageError (try later); the journal stays then.
    """
    count = 0
    try:
        for path, records in abandoned(spool.journal):
            owner = path.stat()
            names = []
            for number, record in enumerate(records):
                # Not in `incoming`, which a receiver that starts beside us clears.
                names.append(_shelve(spool, path.with_suffix(f".{number}.part"), record, owner))
            _sync_files(spool, names)
            count += len(names)
    except OSError as error:
        raise StorageError(
            f"Objects in {spool.journal} cannot be put on their shelf: {error.strerror or error}.",
            hint="Make room on the disk of [storage] directory, or make its folders writable; nothing is lost.",
            retry=True,
        ) from error
    if count:
        _log.warning("restored_from_journal", objects=count)
    return count


def _shelve(spool: Spool, temporary: Path, record: Record, owner: os.stat_result) -> str:
    """Put an object on its shelf, not yet durable; return its name."""
    name = f"{record.sha256[:2]}/{record.sha256}.dcm"
    temporary.unlink(missing_ok=True)  # a restoring that was killed
    try:
        with _new_file(temporary, record.preamble, record.dataset):
            pass
        if os.geteuid() == 0:  # an admin's command; the node must be able to read what it finds
            os.chown(temporary, owner.st_uid, owner.st_gid)
        temporary.rename(spool.objects / name)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return name


def open_journal(spool: Spool) -> Journal:
    """A journal for the objects of this spool, not started."""
    return Journal(
        spool.journal, room=lambda coming: check_room(spool, coming), sync_files=lambda names: _sync_files(spool, names)
    )


def _sync_files(spool: Spool, names: Collection[str]) -> None:
    """Make objects and their names durable. Raises OSError; one that is gone was removed as it may be."""
    # Some at a time are set to be written, which gives them their places on the disk: the first barrier then makes the
    # file system's own books durable for all of them. All at once would keep the disk from those who wait for it.
    ordered = sorted(names)
    for first in range(0, len(ordered), _TOGETHER):
        for step in (disk.start_writing, disk.sync):
            for name in ordered[first : first + _TOGETHER]:
                with suppress(FileNotFoundError):
                    step(spool.objects / name)
    for folder in {name.partition("/")[0] for name in names}:
        disk.sync(spool.objects / folder)


def clear_unfinished(folder: Path) -> int:
    """Remove what an ended process left half written in `incoming` or `rendering`; return how many.

    Only the process that writes there may call this, at its start: the receiver for `incoming`, the worker for
    `rendering`. A sender that is storing a simpler report just then fails to, says so, and tries again.
    """
    leftovers = list(folder.iterdir())
    for leftover in leftovers:
        leftover.unlink()
    return len(leftovers)


def check_room(spool: Spool, coming: int) -> None:
    """Raise StorageError (try later) where `coming` bytes would reach into the reserve."""
    free = shutil.disk_usage(spool.objects).free
    if free - coming < spool.min_free:
        raise StorageError(
            f"Only {free // 2**20} MiB are free, below the reserve of {spool.min_free // 2**20} MiB.",
            hint="Make room on the disk of [storage] directory; sending is tried again by the camera.",
            retry=True,
        )


class Begun:
    """A received object of which a part is written already: `add` its bytes as they come, then hand it to `placing`,
    or `drop` it. It has no name yet, so that whatever ends it half written leaves nothing that counts. For one thread.
    """

    def __init__(self, spool: Spool, preamble: bytes) -> None:
        self._spool = spool
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._unwritten = bytearray(preamble)
        self._temporary = _temporary(spool.incoming)
        self._descriptor = -1
        self._lies_there = False
        self._broken = False

    def add(self, piece: bytes | memoryview) -> None:
        """Take the next bytes of the dataset, and write what is there if it is much.

        Raises nothing: where there is no room or the disk refuses, all of it is given up without a word, and
        `placing`, which then writes the object from its start, tells the error.
        """
        if self._broken:
            return
        self._count(piece)
        if len(self._unwritten) + len(piece) < _WRITE_AT_LEAST:
            self._unwritten += piece  # a copy, because a piece holds on to the whole PDU that it came in
            return
        try:
            self._write(piece)
        except (StorageError, OSError):
            self.drop()

    def holds(self, dataset: bytes) -> bool:
        """Say whether all of a dataset was added."""
        return not self._broken and self._size_bytes == len(dataset)

    def end(self, rest: bytes = b"") -> str:
        """Write the rest; return the SHA-256 of all. Nothing is durable yet. Raises StorageError (no room), OSError."""
        self._count(rest)
        self._write(rest)
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Make the bytes durable. Raises OSError."""
        os.fsync(self._descriptor)

    def shelve(self, name: str) -> None:
        """Give it its name; that is not durable yet. Raises OSError."""
        self._close()
        self._temporary.rename(self._spool.objects / name)
        self._lies_there = False

    def drop(self) -> None:
        """Leave nothing behind. After `shelve`, or once more, it does nothing."""
        self._broken, self._unwritten = True, bytearray()
        self._close()
        if self._lies_there:
            self._lies_there = False
            self._temporary.unlink(missing_ok=True)

    def _count(self, piece: bytes | memoryview) -> None:
        self._hash.update(piece)
        self._size_bytes += len(piece)

    def _write(self, piece: bytes | memoryview) -> None:
        """Write what waits and then a piece, where there is room for both."""
        check_room(self._spool, len(self._unwritten) + len(piece))
        if self._descriptor < 0:
            self._descriptor = os.open(self._temporary, _NEW_FILE, 0o600)
            self._lies_there = True
        for part in (self._unwritten, piece):
            _write_all(self._descriptor, part)
        self._unwritten = bytearray()

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


@dataclass(slots=True)
class Placed:
    """A received object whose bytes are written, and that is durable under its name once `settle` has returned."""

    name: str
    sha256: str
    _spool: Spool
    _begun: Begun
    _entry: Entry | None
    _settled: bool = False

    def settle(self) -> None:
        """Make it durable under its name; once more, nothing. Raises StorageError (try later)."""
        if self._settled:
            return
        try:
            self._settle()
        except OSError as error:
            raise _refused(error) from error
        self._settled = True

    def _settle(self) -> None:
        # Named only when it is durable, in the journal or by itself: what has its name is whole after a power cut.
        if self._entry is not None and self._entry.sync():
            self._begun.shelve(self.name)
            self._part_with(self.name)
            return
        self._begun.sync()
        self._begun.shelve(self.name)
        disk.sync(self._spool.objects / self.sha256[:2])

    def _part_with(self, name: str | None) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.named(name)

    def drop(self) -> None:
        """Leave nothing behind, where it was not settled."""
        self._begun.drop()
        self._part_with(None)


@contextmanager
def placing(
    spool: Spool, preamble: bytes, dataset: bytes, begun: Begun | None = None, journal: Journal | None = None
) -> Iterator[Placed]:
    """Write a received object whole, for the block to `settle`. It is settled already unless it is in the journal: then
    the disk works on it, and the block may do meanwhile what does not depend on it.

    Parameters
    ----------
    preamble: preamble, prefix and file meta information (PS3.10 7.1).
    dataset: the encoded dataset exactly as sent.
    begun: what is written of it already, behind the same preamble.
    journal: where it may be made durable instead, so that its file can be synced later.

    Raises
    ------
    StorageError: no room, or the disk refuses; nothing is left under the final name.
    """
    rest = b""
    if begun is None or not begun.holds(dataset):
        begun, rest = Begun(spool, preamble), dataset
    try:
        digest = begun.end(rest)
        entry = journal.append(preamble, dataset, digest) if journal is not None else None
        placed = Placed(f"{digest[:2]}/{digest}.dcm", digest, spool, begun, entry)
        if entry is None:
            placed.settle()
    except OSError as error:
        begun.drop()
        raise _refused(error) from error
    except BaseException:
        begun.drop()
        raise
    try:
        yield placed
    finally:
        placed.drop()


def put_object(spool: Spool, preamble: bytes, dataset: bytes, begun: Begun | None = None) -> tuple[str, str]:
    """Make a received object durable; return (name, SHA-256 of the dataset). See `placing`."""
    with placing(spool, preamble, dataset, begun) as placed:
        placed.settle()
        return placed.name, placed.sha256


def put_result(spool: Spool, data: bytes) -> tuple[str, str]:
    """Make a rendered result durable; return (name, SHA-256). The reserve is not applied: a result must get out."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest[:2]}/{digest}.dcm"
    temporary = _temporary(spool.rendering)
    try:
        with _new_file(temporary, data) as descriptor:
            os.fsync(descriptor)
        temporary.rename(spool.results / name)
        disk.sync(spool.results / digest[:2])
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _refused(error) from error
    return name, digest


def _temporary(folder: Path) -> Path:
    return folder / f"{os.getpid()}.{os.urandom(8).hex()}.part"


@contextmanager
def _new_file(path: Path, *parts: bytes) -> Iterator[int]:
    """Write a new file; the block has its descriptor, to make its bytes durable. Raises OSError."""
    descriptor = os.open(path, _NEW_FILE, 0o600)
    try:
        for part in parts:
            _write_all(descriptor, part)
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _refused(error: OSError) -> StorageError:
    return StorageError(
        f"An object could not be made durable: {error.strerror or error}.",
        hint="Check the disk of [storage] directory.",
        retry=True,
    )


def shelved(shelf: Path) -> Iterator[StoredFile]:
    """Every file under a name of ours on `objects` or `results`; what else lies there is not ours and is left alone."""
    for number in range(256):
        with os.scandir(shelf / f"{number:02x}") as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.name.startswith(f"{number:02x}"):
                    facts = entry.stat(follow_symlinks=False)
                    yield StoredFile(f"{number:02x}/{entry.name}", facts.st_size, facts.st_mtime)


def dataset_digest(path: Path) -> str | None:
    """SHA-256 of the dataset of a received object as it lies on the disk; None where the file is gone, cannot be read,
    or is no Part 10 file. Reads in pieces: a multi-frame object need not fit into memory."""
    try:
        with path.open("rb") as file:
            start = _dataset_start(file.read(_META_START + _META.size))
            if start is None:
                return None
            file.seek(start)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def file_digest(path: Path) -> str | None:
    """SHA-256 of a whole file, as results are named; None where it is gone or cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def dataset_header(path: Path, limit: int) -> tuple[bytes, int]:
    """The first `limit` bytes of the dataset of a received object, and the size of the whole dataset in bytes.

    Raises
    ------
    StorageError: the file is gone, cannot be read, or is no Part 10 file.
    """
    try:
        with path.open("rb") as file:
            start = _dataset_start(file.read(_META_START + _META.size))
            if start is not None:
                file.seek(start)
                return file.read(limit), os.fstat(file.fileno()).st_size - start
    except OSError as error:
        raise StorageError(f"The object {path.stem} cannot be read: {error.strerror or error}.") from error
    raise StorageError(f"The object {path.stem} is no DICOM file of ours any more.")


def _dataset_start(head: bytes) -> int | None:
    """Where the dataset begins in a Part 10 file of which these are the first 144 bytes; None for another."""
    if len(head) < _META_START + _META.size:
        return None
    prefix, group, element, vr, length, rest = _META.unpack_from(head, _META_START)
    if (prefix, group, element, vr, length) != (b"DICM", 2, 0, b"UL", 4):
        return None
    return _META_START + _META.size + int(rest)


def set_apart(spool: Spool, name: str) -> Path:
    """Move an object that cannot be entered into the worklist from its shelf to the quarantine; return where it is."""
    return _move(spool.objects / name, spool.quarantine / name.rpartition("/")[2])


def bring_back(spool: Spool, file_name: str) -> str:
    """Move a file of the quarantine back to its shelf; return its name there."""
    name = f"{file_name[:2]}/{file_name}"
    _move(spool.quarantine / file_name, spool.objects / name)
    return name


def _move(source: Path, target: Path) -> Path:
    try:
        source.rename(target)
        disk.sync(target.parent)
        disk.sync(source.parent)
    except OSError as error:
        raise StorageError(
            f"A file could not be moved to {target.parent}: {error.strerror or error}.",
            hint="Check the disk of [storage] directory.",
            retry=True,
        ) from error
    return target


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    path.unlink(missing_ok=True)
