"""Audit messages on disk until the repository has them: append files, one line a message, in their order.

Every process of the node appends, under one lock file; one (`send`) takes away what has been sent. An append is one
write: a process killed behind it loses nothing, a process killed within it leaves a line without an end, which the next
one ends and the reader leaves out. The reader makes what was written durable about once a second: a power cut can cost
that second of audit messages, whose scans stand in the worklist and its history all the same.

It never stops clinical work. Where it cannot take a message (`max_bytes` reached, disk full, lock held too long) the
message is left out and counted; the first message that fits again is preceded by two that say so.
Files have mode 0600 in a folder of 0700: names of patients stand here.
"""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dicom_node import disk, log

SEGMENT_BYTES = 1024**2
"""A file that has reached this is left for a new one: what was sent is removed file by file."""

_LOCK_LIMIT_S = 0.5
_LOCK_STEP_S = 0.002

_log = log.get("audit")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Messages that the spool could not take: how many, since when (UTC), and why the last of them."""

    count: int
    since: str
    why: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the spool: number of a file, offset in bytes."""

    number: int = 1
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages to send, and the place behind the last of them."""

    messages: tuple[bytes, ...]
    end: Place


class AuditSpool:
    """The audit messages of one storage folder.

    Parameters
    ----------
    resumed: what to write when a message fits again after some were left out.
    """

    def __init__(
        self, folder: Path, max_bytes: int, resumed: Callable[[LeftOut], Sequence[bytes]] = lambda _: ()
    ) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._resumed = resumed
        self._threads = threading.Lock()
        self._pace = log.Pace(at_once=1, per_s=1 / 60)
        self._synced = Place()

    def append(self, message: bytes) -> bool:
        """Add a message; False where it was left out, which is counted and said in the log. Never raises OSError."""
        try:
            with self._held():
                left = self.left_out()
                lines = [message] if left is None else [*self._resumed(left), message]
                data = b"".join(line + b"\n" for line in lines)
                if self.bytes_waiting() + len(data) > self._max_bytes:
                    self._leave_out("audit.max_spool is reached")
                    return False
                try:
                    self._write(data)
                except OSError as error:
                    self._leave_out(error.strerror or type(error).__name__)
                    return False
                if left is not None:
                    (self.folder / "left_out").unlink(missing_ok=True)
                    _log.warning("audit_recording_resumed", left_out=left.count, since=left.since)
                return True
        except OSError as error:  # not even the lock: the folder is gone, or its disk
            self._say("the audit spool cannot be used", error=error.strerror or type(error).__name__)
            return False

    def waiting(self, limit_bytes: int) -> Batch | None:
        """Return the oldest messages, about `limit_bytes` of them; None where all was sent. Raises OSError."""
        place = self._place()
        for number, path in self._files():
            if number < place.number:
                path.unlink(missing_ok=True)  # sent; we were killed before it was removed
                continue
            offset = place.offset if number == place.number else 0
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(max(limit_bytes, _LONGEST_LINE))
            whole = data[: data.rfind(b"\n") + 1]
            if whole:
                lines = [line for line in whole[:-1].split(b"\n") if line]
                good = tuple(line for line in lines if _is_message(line))
                if len(good) < len(lines):
                    _log.error("audit_messages_damaged", count=len(lines) - len(good), file=path.name)
                return Batch(good, Place(number, offset + len(whole)))
        return None

    def sent(self, end: Place) -> None:
        """Forget what lies before `end`. Raises OSError."""
        with self._held():
            path = self._path(end.number)
            size = path.stat().st_size if path.exists() else 0
            if end.offset >= size:  # nothing came behind it: no name of a patient stays longer than it must
                self._note(Place(end.number + 1))
                path.unlink(missing_ok=True)
            else:
                self._note(end)

    def sync(self) -> None:
        """Make durable what was appended since the last call. Raises OSError."""
        files = self._files()
        ends = [Place(number, path.stat().st_size) for number, path in files]
        for end, (_, path) in zip(ends, files, strict=True):
            if (end.number, end.offset) > (self._synced.number, self._synced.offset):
                with suppress(FileNotFoundError):  # sent and removed meanwhile
                    disk.sync(path)
        if ends and ends[-1] != self._synced:
            disk.sync(self.folder)
            self._synced = ends[-1]

    def bytes_waiting(self) -> int:
        """Bytes on the disk; 0 where all was sent."""
        return sum(path.stat().st_size for _, path in self._files())

    def left_out(self) -> LeftOut | None:
        """What could not be taken since the last message that fitted."""
        try:
            return LeftOut(**json.loads((self.folder / "left_out").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # cut off by a power cut
            return LeftOut(1, datetime.now(UTC).isoformat(timespec="seconds"), "unknown: the note of it is damaged")

    # --- under the lock -----------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        files = self._files()
        number = max([number for number, _ in files] + [self._place().number])
        if files and files[-1][0] == number and files[-1][1].stat().st_size >= SEGMENT_BYTES:
            number += 1
        descriptor = os.open(self._path(number), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data  # somebody was killed within his write
            try:
                _write_whole(descriptor, data)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    def _leave_out(self, why: str) -> None:
        before = self.left_out()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        left = LeftOut((before.count if before else 0) + 1, before.since if before else now, why)
        self._say("audit messages are left out", count=left.count, since=left.since, error=why)
        with suppress(OSError):  # the disk is full: the log has it
            self._put("left_out", json.dumps(asdict(left)))

    def _say(self, what: str, **fields: object) -> None:
        unsaid = self._pace.admit()
        if unsaid is not None:
            _log.error("alarm", what=what, **fields)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the spool, among threads and processes; OSError where another holds it for too long."""
        deadline = time.monotonic() + _LOCK_LIMIT_S
        if not self._threads.acquire(timeout=_LOCK_LIMIT_S):
            raise OSError(errno.EAGAIN, "another thread holds the audit spool")
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            with ExitStack() as held:
                # In turn: whoever waits for the lock holds the turn, and who has just let the lock go must get that
                # first. With the lock alone, a process that writes without a pause takes it again before any other
                # looks.
                with self._locked("turn", deadline):
                    held.enter_context(self._locked("lock", deadline))
                yield
        finally:
            self._threads.release()

    @contextmanager
    def _locked(self, name: str, deadline: float) -> Iterator[None]:
        """Hold a lock file among processes; OSError where it is not to be had by `deadline` (monotonic)."""
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OSError(errno.EAGAIN, "another process holds the audit spool") from None
                    time.sleep(_LOCK_STEP_S)
            yield
        finally:
            os.close(descriptor)

    # --- files --------------------------------------------------------------------------------------------------------

    def _files(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem), path) for path in self.folder.glob("*.messages") if path.stem.isdigit())

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:012d}.messages"

    def _place(self) -> Place:
        try:
            return Place(**json.loads((self.folder / "place").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):  # sent again rather than not at all
            return Place()

    def _note(self, place: Place) -> None:
        self._put("place", json.dumps(asdict(place)))

    def _put(self, name: str, text: str) -> None:
        fresh = self.folder / f"{name}.fresh"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        fresh.rename(self.folder / name)


_LONGEST_LINE = 64 * 1024


def _is_message(line: bytes) -> bool:
    return line.startswith(b"<") and line.endswith(b"</AuditMessage>")


def _write_whole(descriptor: int, data: bytes) -> None:
    if os.write(descriptor, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
