"""The bell: a ring wakes another process at once, an unheard one is kept, and none ever blocks who rings."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dicom_node.wake import Bell

ANOTHER_PROCESS_RINGS = """
import sys
from pathlib import Path
from dicom_node.wake import Bell
sys.stdin.read(1)
Bell(Path(sys.argv[1])).ring()
"""


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[Bell]:
    with closing(Bell(tmp_path / "worker.bell")) as made:
        yield made


def test_without_a_ring_waiting_ends_after_its_time(bell: Bell) -> None:
    started = time.monotonic()
    assert not bell.wait(0.05)
    assert time.monotonic() - started >= 0.05


def test_another_process_wakes_who_waits(bell: Bell, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ANOTHER_PROCESS_RINGS, str(tmp_path / "worker.bell")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        assert not bell.wait(0)
        other.stdin.write(b"!")
        other.stdin.close()
        assert bell.wait(60)
    assert other.returncode == 0


def test_a_ring_before_anybody_waits_is_not_lost(bell: Bell, tmp_path: Path) -> None:
    with closing(Bell(tmp_path / "worker.bell")) as other:
        other.ring()
    assert bell.wait(0)


def test_one_wait_takes_all_rings(bell: Bell) -> None:
    for _ in range(1000):
        bell.ring()
    assert bell.wait(0)
    assert not bell.wait(0)


def test_a_ring_that_nobody_hears_never_blocks(bell: Bell) -> None:
    for _ in range(70_000):  # more than a pipe holds
        bell.ring()
    assert bell.wait(0)


def test_a_negative_time_is_no_time(bell: Bell) -> None:
    assert not bell.wait(-1.0)
