"""Bytes on disk: received objects and rendered results.

`put_*` returns only when the bytes and the name are durable: temporary file, write, fsync, rename, fsync of the folder.
A file under its final name is therefore whole; what lies in `incoming` or `rendering` is not, and goes at
the next start.
Names are SHA-256 digests of the content and never come from the wire, so a name cannot lead outside the spool, and the
same bytes sent twice are one file. A file an object (not a segment): an admin can look at it with any DICOM tool.

Files are DICOM Part 10 (PS3.10 7.1). The digest of a received object is that of its dataset exactly as it was sent,
without our file meta information, so that it does not change with our version.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dicom_node.errors import StorageError


@dataclass(frozen=True, slots=True)
class Spool:
    """The folders of one node; made by `open_spool`."""

    incoming: Path
    rendering: Path
    objects: Path
    results: Path
    run: Path
    min_free: int


def open_spool(directory: Path, min_free: int) -> Spool:
    """Make the folders (mode 0700: the bytes are patients') and return the spool. Raises StorageError."""
    spool = Spool(
        incoming=directory / "spool" / "incoming",
        rendering=directory / "results" / "rendering",
        objects=directory / "spool" / "objects",
        results=directory / "results",
        run=directory / "run",
        min_free=min_free,
    )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Each by itself: `parents` would give what lies between the umask's mode.
        for folder in (directory, spool.objects.parent, spool.results, spool.run):
            folder.mkdir(mode=0o700, exist_ok=True)
        for folder in (spool.incoming, spool.rendering, spool.objects):
            folder.mkdir(mode=0o700, exist_ok=True)
        for shelf in (spool.objects, spool.results):
            # All shelves now, so that storing an object never has to make one durable.
            for number in range(256):
                (shelf / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
            _sync_folder(shelf)
            _sync_folder(shelf.parent)
        _sync_folder(directory)
    except OSError as error:
        raise StorageError(
            f"The storage folder {directory} cannot be used: {error.strerror or error}.",
            hint="Give [storage] directory a folder that this user may write.",
        ) from error
    return spool


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


def put_object(spool: Spool, preamble: bytes, dataset: bytes) -> tuple[str, str]:
    """Make a received object durable; return (name, SHA-256 of the dataset).

    Parameters
    ----------
    preamble: preamble, prefix and file meta information (PS3.10 7.1).
    dataset: the encoded dataset exactly as sent.

    Raises
    ------
    StorageError: no room, or the disk refuses; nothing is left under the final name.
    """
    check_room(spool, len(preamble) + len(dataset))
    digest = hashlib.sha256(dataset).hexdigest()
    name = f"{digest[:2]}/{digest}.dcm"
    _put(spool.incoming, spool.objects / name, preamble, dataset)
    return name, digest


def put_result(spool: Spool, data: bytes) -> tuple[str, str]:
    """Make a rendered result durable; return (name, SHA-256). The reserve is not applied: a result must get out."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest[:2]}/{digest}.dcm"
    _put(spool.rendering, spool.results / name, data)
    return name, digest


def _put(folder: Path, path: Path, *parts: bytes) -> None:
    temporary = folder / f"{path.stem}.{os.getpid()}.{os.urandom(4).hex()}.part"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"An object could not be made durable: {error.strerror or error}.",
            hint="Check the disk of [storage] directory.",
            retry=True,
        ) from error


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A rename is durable only when the folder that holds the name is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
