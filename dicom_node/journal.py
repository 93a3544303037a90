"""A journal before the shelf, so that one barrier makes an object durable while many come.

A file of its own costs an object two barriers, its bytes' and its name's, and each makes the file system write about
itself too. Writing over the bytes of a file that is there already, and keeps its length, costs one that writes nothing
else. So while objects come in a burst, each is appended to a segment of this journal and synced there; its ordinary
file is written too, and named, but synced later, many together, by a thread of ours. When the power goes in between,
`spool.open_spool` writes the files anew from the segments, before anything looks at the shelf.

A record is written whole pages long and the disk set to work on it at once; the barrier comes when nothing is left to
do meanwhile. Two segments take turns: one is written, while the files of the other are synced. Where neither has room,
or anything goes wrong, the object pays for a file of its own. Once nothing comes, the files are synced and
the segments forgotten, then removed: a node at rest has everything in ordinary files and nothing twice.

A segment is locked (flock) by the process that writes it. One that nobody holds was left by a process that died.
"""

import fcntl
import hashlib
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dicom_node import disk, log
from dicom_node.errors import StorageError

SEGMENT_BYTES = 32 << 20
"""Room of a segment: 120 scans of 262 kB."""
SEGMENTS = 2

BURST_OBJECTS, BURST_S = 8, 2.0
"""So many objects, none later than this behind the one before, are a burst; a neck alone is none."""
QUIET_S = 1.0
"""Seconds without an object after which the files are synced and the segments forgotten."""
REST_S = 60.0
"""Seconds without an object after which the segments are removed; written over, they cost less than new ones."""

_LOOK_S = 0.25
_AGAIN_S = 60.0  # after there was no room for segments

# Magic, generation of the segment, length of preamble and of dataset, SHA-256 of the dataset; then CRC-32 of all this.
_HEAD = struct.Struct("<8s16sIQ32s")
_CHECK = struct.Struct("<I")
_MAGIC = b"REMNANTJ"
_HEAD_BYTES = _HEAD.size + _CHECK.size
_PAGE = 4096
"""A record ends with a page: a page that two records share would have to be read again before it is written."""
_ZEROS = bytes(_PAGE)
_SUFFIX = ".journal"

_log = log.get("journal")


@dataclass(frozen=True, slots=True)
class Record:
    """An object as it stands in a segment: what goes before the dataset in its file, and the dataset."""

    preamble: bytes
    dataset: bytes
    sha256: str


@dataclass(slots=True, eq=False)
class Segment:
    """A file of the journal that this process writes. `syncing` guards `synced`, and `Journal` all else."""

    path: Path
    descriptor: int
    generation: bytes = field(default_factory=lambda: os.urandom(16))
    end: int = 0
    names: set[str] = field(default_factory=set)
    unnamed: int = 0
    """Objects that are in here and have no file under their name yet."""
    broken: bool = False
    synced: int = 0
    syncing: threading.Lock = field(default_factory=threading.Lock)

    def write(self, preamble: bytes, dataset: bytes, digest: str) -> int:
        """Append a record behind the others, not yet durable; return where it ends. Raises OSError."""
        head = _HEAD.pack(_MAGIC, self.generation, len(preamble), len(dataset), bytes.fromhex(digest))
        length = _whole_pages(len(preamble) + len(dataset))
        parts = [head, _CHECK.pack(zlib.crc32(head)), preamble, dataset]
        parts.append(_ZEROS[: length - sum(map(len, parts))])
        if os.pwritev(self.descriptor, parts, self.end) != length:
            raise OSError("a record was written in part")
        disk.begin_with(self.descriptor, self.end, length)
        self.end += length
        return self.end

    def sync(self, end: int) -> None:
        """Return when everything up to `end` is durable. Raises OSError.

        Records are written one behind the other, so that a barrier for one makes all before it durable as well: of
        several that wait at once, the first pays and the others find it done.
        """
        with self.syncing:
            if self.synced >= end:
                return
            if self.broken:
                raise OSError(
                    "a barrier before this one failed"
                )  # the kernel would tell it once, and then that all is well
            reached = self.end
            try:
                os.fdatasync(self.descriptor)
            except OSError:
                self.broken = True
                raise
            self.synced = reached

    def forget(self) -> None:
        """Begin again from the start. What stands there counts no more; should the zeros never reach the disk, what it
        says is restored once more, over files that say the same."""
        os.pwrite(self.descriptor, bytes(_HEAD_BYTES), 0)
        self.generation, self.end, self.synced = os.urandom(16), 0, 0
        self.names.clear()


class Journal:
    """The journal of a receiver; lives from `start` to `stop`, with a thread of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        room: Callable[[int], None],
        sync_files: Callable[[Collection[str]], None],
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """`room` raises StorageError where so many bytes would reach into the disk's reserve; `sync_files` makes files
        of the shelf and their names durable, and raises OSError."""
        self._folder = folder
        self._room = room
        self._sync_files = sync_files
        self._segment_bytes = segment_bytes
        self._changed = threading.Condition()
        self._segments: list[Segment] = []
        self._active: Segment | None = None
        self._last_s = self._not_before_s = 0.0
        self._in_a_row = 0
        self._wanted = self._stopping = self._off = False
        self._thread = threading.Thread(target=self._keep, name="journal", daemon=True)

    def start(self) -> None:
        """Begin. Raises OSError where the folder cannot be used."""
        for fresh in self._folder.glob("*.fresh"):  # a process that had this role before us died over it
            fresh.unlink(missing_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """Sync what is not yet, and remove the segments. Nothing may be appended any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def append(self, preamble: bytes, dataset: bytes, digest: str) -> "Entry | None":
        """Write an object into a segment; None where it has to be made durable otherwise. Not durable before `sync`.

        Whoever gets an entry calls `named` once the file has its name, or will never have one.

        Parameters
        ----------
        preamble: what goes before the dataset in its file.
        dataset: the encoded dataset exactly as sent.
        digest: SHA-256 of the dataset, as hexadecimal digits.
        """
        with self._changed:
            now_s = time.monotonic()
            self._in_a_row = self._in_a_row + 1 if now_s - self._last_s < BURST_S else 1
            self._last_s = now_s
            if self._off or not self._segments:
                burst = self._in_a_row >= BURST_OBJECTS and now_s > self._not_before_s
                if burst and not (self._wanted or self._off or self._stopping):
                    self._wanted = True
                    self._changed.notify_all()
                return None
            segment = self._with_room(_whole_pages(len(preamble) + len(dataset)))
            if segment is None:
                return None
            try:
                end = segment.write(preamble, dataset, digest)
            except OSError as error:
                self._break(segment, error)
                return None
            segment.unnamed += 1
        return Entry(self, segment, end)

    def sync(self, segment: Segment, end: int) -> bool:
        """Make a segment durable up to `end`; False where the disk refuses, and nothing more is written to it then."""
        try:
            segment.sync(end)
        except OSError as error:
            with self._changed:
                self._break(segment, error)
            return False
        return True

    def named(self, segment: Segment, name: str | None) -> None:
        """Say under which name an object of a segment now lies on the shelf, unsynced; None: under none."""
        with self._changed:
            segment.unnamed -= 1
            if name is not None:
                segment.names.add(name)

    def _with_room(self, length: int) -> Segment | None:
        active = self._active
        if active is None or active.broken or active.end + length > self._segment_bytes:
            self._turn()
            active = self._active
        return active if active is not None and active.end + length <= self._segment_bytes else None

    def _turn(self) -> None:
        """Take an empty segment in turn, and have the files of the one before synced."""
        self._active = next((one for one in self._segments if not one.end and not one.broken), None)
        self._changed.notify_all()

    def _break(self, segment: Segment, error: OSError) -> None:
        # What it says already stays durable; nothing more is entrusted to it, or to another: the disk is in trouble.
        segment.broken = self._off = True
        _log.error("journal_given_up", error=error.strerror or str(error))

    def _keep(self) -> None:
        """Open segments when a burst begins, sync the files of those that are full, and remove them when it is over."""
        while True:
            with self._changed:
                if not self._stopping and not (self._wanted or self._full()):
                    self._changed.wait(_LOOK_S if self._segments else None)
                stopping = self._stopping
                quiet_s = time.monotonic() - self._last_s
                over = stopping or quiet_s > QUIET_S or self._off
                if over and self._active is not None and self._active.end:
                    self._turn()
                if stopping or self._off:
                    self._active = None
                full = self._full()
            for segment in full:
                self._settle(segment)
            if self._wanted and not stopping:
                self._begin()
            if stopping or self._off or quiet_s > REST_S:
                self._remove()
            if stopping:
                return

    def _full(self) -> list[Segment]:
        return [one for one in self._segments if one is not self._active and one.end and not one.unnamed]

    def _settle(self, segment: Segment) -> None:
        """Sync the files of a segment that is not written any more; then it is empty."""
        try:
            self._sync_files(segment.names)
            with self._changed:
                segment.forget()
                if self._active is None and not self._off:
                    self._turn()
        except OSError as error:
            # Kept, with its bytes, for the next start. Nobody waits for it: it is as if it were not there.
            _log.error("files_not_synced", objects=len(segment.names), error=error.strerror or str(error))
            with self._changed:
                self._off = True
                self._segments.remove(segment)

    def _begin(self) -> None:
        made: list[Segment] = []
        try:
            self._room(SEGMENTS * self._segment_bytes)
            for _ in range(SEGMENTS):
                made.append(_make(self._folder))
            disk.sync(self._folder)
        except (StorageError, OSError) as error:
            _log.warning("no_journal", error=str(error))
            for segment in made:
                _drop(segment)
            made = []
            self._not_before_s = time.monotonic() + _AGAIN_S
        with self._changed:
            self._wanted = False
            self._segments = made
            self._turn()

    def _remove(self) -> None:
        with self._changed:
            if self._active is not None and self._active.end:
                return  # an object came just now
            # One with an object that has no name yet stays for the next start, which finds out.
            gone = [one for one in self._segments if not one.end]
            self._segments = [one for one in self._segments if one.end]
            self._active = None
        for segment in gone:
            _drop(segment)


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a journal."""

    journal: Journal
    segment: Segment
    end: int

    def sync(self) -> bool:
        """Make it durable there; False where it has to be made durable otherwise."""
        return self.journal.sync(self.segment, self.end)

    def named(self, name: str | None) -> None:
        """See `Journal.named`. Once."""
        self.journal.named(self.segment, name)


def _whole_pages(content_bytes: int) -> int:
    """Length of a record with such a preamble and dataset."""
    return -(-(_HEAD_BYTES + content_bytes) // _PAGE) * _PAGE


def _make(folder: Path) -> Segment:
    # Under its name only when it is locked: what nobody holds is taken for a dead process's.
    name = os.urandom(8).hex()
    fresh, path = folder / f"{name}.fresh", folder / f"{name}{_SUFFIX}"
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fresh.rename(path)
    except OSError:
        os.close(descriptor)
        fresh.unlink(missing_ok=True)
        raise
    return Segment(path, descriptor)


def _drop(segment: Segment) -> None:
    segment.path.unlink(missing_ok=True)
    os.close(segment.descriptor)


def abandoned(folder: Path) -> Iterator[tuple[Path, Iterator[Record]]]:
    """Each segment that a process left behind when it died, with its records in order; removed when the next is asked
    for, so whoever takes it has to make the records durable before. Processes that ask at the same time wait for each
    other. Raises OSError."""
    if not any(path.suffix == _SUFFIX for path in folder.iterdir()):
        return
    turn = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its process lives
            else:
                yield path, _records(descriptor)
                path.unlink()
            finally:
                os.close(descriptor)
        os.fsync(turn)
    finally:
        os.close(turn)


def _records(descriptor: int) -> Iterator[Record]:
    """The records of a segment until the first that is not whole, or is of an earlier generation."""
    at, generation = 0, None
    while len(start := os.pread(descriptor, _HEAD_BYTES, at)) == _HEAD_BYTES:
        magic, of, preamble_bytes, dataset_bytes, digest = _HEAD.unpack_from(start)
        (check,) = _CHECK.unpack_from(start, _HEAD.size)
        length = preamble_bytes + dataset_bytes
        if magic != _MAGIC or check != zlib.crc32(start[: _HEAD.size]) or length > SEGMENT_BYTES:
            return
        if generation not in (None, of):
            return
        data = os.pread(descriptor, length, at + _HEAD_BYTES)
        dataset = data[preamble_bytes:]
        if len(data) != length or hashlib.sha256(dataset).digest() != digest:
            return
        yield Record(data[:preamble_bytes], dataset, digest.hex())
        generation, at = of, at + _whole_pages(length)
