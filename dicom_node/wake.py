"""Waking another process of this node at once, without a poll in between.

A named pipe each role in `run/`. A ring is one byte and carries no information: whoever wakes looks into the worklist.
A ring that nobody hears costs nothing, because every role also looks when it starts and from time to time.
"""

import contextlib
import os
import select
from pathlib import Path


class Bell:
    """Rings, or waits for a ring. Opened for reading and writing, which on Linux neither blocks nor fails."""

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):  # the other side was first
            os.mkfifo(path, 0o600)
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def ring(self) -> None:
        """Wake the role that waits. A full pipe holds 64 Ki unheard rings, so one more says nothing new."""
        try:
            os.write(self._descriptor, b"!")
        except BlockingIOError:
            return

    def wait(self, timeout_s: float) -> bool:
        """Wait for a ring; take all that came; return whether one did."""
        ready, _, _ = select.select([self._descriptor], [], [], max(0.0, timeout_s))
        if ready:
            try:
                os.read(self._descriptor, 65536)
            except BlockingIOError:
                return False  # another process of the same role took it
        return bool(ready)

    def close(self) -> None:
        """Give the descriptor back; once more does nothing, since whoever stops us may do so twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
