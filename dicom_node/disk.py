"""What the disk is told: to begin with writing, and that it has to be done."""

import os
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Return when a file's bytes, or the names in a folder, are durable. A rename is durable when its folder is.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writing(path: Path) -> None:
    """Have the disk begin with what was written to a file, and do not wait. Raises OSError where there is no file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        begin_with(descriptor)
    finally:
        os.close(descriptor)


def begin_with(descriptor: int, start: int = 0, length: int = 0) -> None:
    """The same for a part of an open file; `length` 0: to its end.

    That is what this advice does to pages that are not on the disk yet; those that are, it takes from memory.
    """
    with suppress(OSError):  # it is advice: a file system that knows none writes when the barrier comes
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
