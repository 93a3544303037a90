"""The power goes right behind Success: what the disk was told until then is all that a node finds at its next start.

The storage lies on an ext4 of its own in a file. A copy of that file, taken while it is mounted, holds what the file
system has written to its device and nothing that only lies in memory, as a disk does after a power cut.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from pipeline.camera import examination, expose
from pipeline.phantom import phantom

ROUNDS = int(os.environ.get("POWER_CUTS", "3"))
"""20 in `make soak`."""


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.geteuid() == 0 and os.environ.get("CI"):
            pytest.fail(f"an image cannot be mounted: {done.stderr}")
        pytest.skip(f"an image cannot be mounted (root and loop devices are needed): {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def disk(tmp_path: Path, peer: Callable[[str], Path]) -> Path:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(96 << 20)
    mkfs = peer("/usr/sbin/mkfs.ext4")
    subprocess.run([str(mkfs), "-q", "-F", str(image)], check=True)
    return image


def cut(image: Path, copy: Path) -> Path:
    """The disk as it is at this instant."""
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
    return copy


def test_the_harness_sees_a_write_that_was_not_synced_as_lost(disk: Path, tmp_path: Path) -> None:
    with mounted(disk, tmp_path / "before"):
        with (tmp_path / "before" / "synced").open("wb") as file:
            file.write(b"kept")
            file.flush()
            os.fsync(file.fileno())
        (tmp_path / "before" / "not-synced").write_bytes(b"lost")
        after = cut(disk, tmp_path / "after.img")
    with mounted(after, tmp_path / "after"):
        assert (tmp_path / "after" / "synced").read_bytes() == b"kept"
        lost = tmp_path / "after" / "not-synced"
        assert not lost.exists() or lost.read_bytes() != b"lost"


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("scans", [2, 24], ids=["alone", "burst"])
def test_a_scan_acknowledged_right_before_a_power_cut_is_there_after_it(
    make_node: Callable[..., Any], camera: Callable[..., None], disk: Path, tmp_path: Path, scans: int, round_: int
) -> None:
    node = make_node()
    place = node.directory / "var"
    shapes = [phantom(700), phantom(701)]
    sent = [
        expose(shapes[number % 2], examination(700 + 100 * round_ + number), "two_frames") for number in range(scans)
    ]
    with mounted(disk, place):
        node.start("receive")
        if scans == 2:
            for scan in sent:
                camera(node.port, scan)
        else:
            camera(node.port, [ds for scan in sent for ds in scan])  # one association: most go into the journal
        after = cut(disk, tmp_path / "after.img")
        node.kill("receive")
    with mounted(after, place):
        node.start("receive")  # without repair by hand
        print("restored:", [line for line in node.log.splitlines() if "restored_from_journal" in line])
        rows = {row["study_instance_uid"]: row for row in node.rows()}
        names = dict(node.query("select sop_instance_uid, spool_name from instance"))
        for (ds,) in sent:
            assert rows[str(ds.StudyInstanceUID)]["state"] == "queued"
            stored = dcmread(place / "spool" / "objects" / names[str(ds.SOPInstanceUID)])
            assert stored.PixelData == ds.PixelData
        assert not list((place / "spool" / "journal").iterdir())
        assert not list((place / "spool" / "quarantine").iterdir())
        camera(node.port, sent[0])  # it takes scans as before
        node.kill("receive")
