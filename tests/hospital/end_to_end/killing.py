"""A process of the node under strace, killed at the entry of a call that is named: nothing in the product knows of it.

A point is said in patterns that calls of one thread fit one after the other; the kill comes before the call that fits
the last. strace itself only counts calls by their name, each thread for itself. So the work is done once before and the
process lives: that says which call it is. Where a heartbeat of the worker or a checkpoint of the database came in
between, the count is wrong; what the process did last tells, and it is tried again with another scan.
"""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

CALLS = (
    "openat,write,pwrite64,pwritev,pwritev2,fsync,fdatasync,close,rename,renameat,renameat2,connect,poll,sendto,sendmsg"
)
TRIES = 8

Point = tuple[str, ...]
_T = TypeVar("_T")
_LINE = re.compile(r"(\d+) +((\w+)\(.*)")


@dataclass(frozen=True)
class Call:
    """A call of a thread: its name, and the how manyth of that name."""

    name: str
    number: int


def call_at(log: Path, point: Point) -> Call | None:
    """Find in strace's log the call that fits the last pattern of a point, behind others of its thread for the rest."""
    made: dict[str, Counter[str]] = {}
    passed: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if not (call := _LINE.match(line)):
            continue
        thread, text, name = call.groups()
        made.setdefault(thread, Counter())[name] += 1
        if re.search(point[passed[thread]], text):
            passed[thread] += 1
            if passed[thread] == len(point):
                return Call(name, made[thread][name])
    return None


@contextmanager
def watched(
    strace: Path, pid: int, wait: Callable[..., Any], log: Path, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """A process with all its threads under strace, which is attached when this begins and gone when it ends."""
    watcher = subprocess.Popen(
        [str(strace), "-f", "-y", "-s", "16", "-o", str(log), *options, "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
    )

    def attached() -> bool:
        if watcher.poll() is not None:
            said = watcher.stderr.read() if watcher.stderr else ""
            if "ptrace" in said and os.geteuid() != 0:
                pytest.skip("watching a process needs root or ptrace_scope 0")
            pytest.fail(f"strace: {said}")
        try:
            # Each thread: the first is attached before the others, and whatever one starts that is not yet, never is.
            return all(
                f"TracerPid:\t{watcher.pid}\n" in one.read_text() for one in Path(f"/proc/{pid}/task").glob("*/status")
            )
        except (FileNotFoundError, ProcessLookupError):  # a thread ended while we looked
            return False

    try:
        wait(attached, "strace attached")
        yield watcher
    finally:
        # Not SIGINT, on which it lets go of each thread and waits for it: of one that dies just then, for ever.
        # The kernel lets go by itself, and a line of the log is written when it is whole.
        watcher.kill()
        watcher.wait()
        if watcher.stderr:
            watcher.stderr.close()


@dataclass
class Killer(Generic[_T]):
    """Kills a role of a node at points. `provoke` gives it something new to do, and returns what; `settle` waits until
    everything is done that was."""

    strace: Path
    wait: Callable[..., Any]
    logs: Path
    node: Any
    role: str
    points: Mapping[str, Point]
    provoke: Callable[[], _T]
    settle: Callable[[], object]
    _calls: dict[str, Call] = field(default_factory=dict)

    def rehearse(self) -> None:
        """Let the role do its work once under strace and live; and once before, so that it loads nothing more."""
        self.provoke()
        self.settle()
        log = self.logs / "rehearsal"
        with self._watched(log):
            self.provoke()
            self.settle()
            for name, point in self.points.items():
                self._calls[name] = self.wait(lambda point=point: call_at(log, point), f"passed {name}; see {log}")

    def kill(self, name: str) -> _T:
        """kill -9 at a point; return what the role was doing. It is not started again."""
        for _ in range(TRIES):
            if not self._calls:
                self.rehearse()
            meant = self._calls[name]
            what, passed = self._try(name)
            killed = self.role not in self.node.processes
            print(f"{self.role}, {name}: {meant}, passed {passed}, {'killed' if killed else 'alive'}")
            if killed and passed == meant:
                return what
            if killed or passed is None:
                self._calls.clear()
            else:
                self._calls[name] = passed
            if killed:
                self.node.start(self.role)
            self.settle()
        pytest.fail(f"{name}: {self.role} was never killed just there in {TRIES} tries")

    def _try(self, name: str) -> tuple[_T, Call | None]:
        """Kill it at the call where the point was; return what it was doing, and where the point was this time."""
        point, meant = self.points[name], self._calls[name]
        log = self.logs / re.sub(r"\W+", "-", name)
        with self._watched(log, "-e", f"inject={meant.name}:signal=KILL:when={meant.number}") as watcher:
            what = self.provoke()
            # strace ends behind the process that it watches, and then its log is whole.
            self.wait(lambda: watcher.poll() is not None or call_at(log, point) not in (None, meant), f"killed {name}")
            if watcher.poll() is not None:
                self.node.processes.pop(self.role).wait()
        return what, call_at(log, point)

    def _watched(self, log: Path, *options: str) -> Any:
        pid = self.node.pid(self.role)
        return watched(self.strace, pid, self.wait, log, "-e", f"trace={CALLS}", *options)
