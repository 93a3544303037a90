"""A disk that runs full under a receiver, for real: a small tmpfs. A700 and nothing left behind; with room, Success."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, NuclearMedicineImageStorage
from pynetdicom import AE

from dicom_node import service, spool, worklist
from dicom_node.receiver import Receiver
from dicom_node.service import House
from dicom_node.settings import Settings
from dicom_node.wake import Bell
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

VERIFICATION = "1.2.840.10008.1.1"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB; needs root, as CI has it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        if os.environ.get("CI"):
            pytest.fail(f"tmpfs cannot be mounted: {mounted.stderr}")
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def listening(directory: Path, min_free: str | int) -> Iterator[tuple[House, int]]:
    settings = Settings(
        node={"host": "127.0.0.1", "port": 0},
        storage={"directory": directory, "min_free": min_free},
        sources=[{"ae_title": "OPTIMA1", "hosts": ["127.0.0.1"]}],
    )
    house = service.open_house(settings)
    bell = Bell(house.spool.run / "worker.bell")
    receiver = Receiver(settings, house.engine, house.spool, bell)
    _, port = receiver.start()
    try:
        yield house, port
    finally:
        receiver.stop()
        house.engine.dispose()
        bell.close()


def send(port: int, ds: Dataset | None = None) -> int:
    """C-STORE of an object, or C-ECHO; the status."""
    ae = AE(ae_title="OPTIMA1")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
    ae.add_requested_context(NuclearMedicineImageStorage, ExplicitVRLittleEndian)
    ae.add_requested_context(VERIFICATION, ExplicitVRLittleEndian)
    assoc = ae.associate("127.0.0.1", port, ae_title="REMNANT")
    assert assoc.is_established
    status = assoc.send_c_echo() if ds is None else assoc.send_c_store(ds)
    assoc.release()
    return int(status.Status)


def scan(seed: int) -> Dataset:
    (ds,) = expose(phantom(seed), examination(seed), "two_frames")
    return ds


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk but for so many bytes."""
    filler = disk / "somebody-elses"
    facts = os.statvfs(disk)
    with filler.open("wb") as file:
        for _ in range((facts.f_bavail * facts.f_frsize - leave) // 4096):
            file.write(bytes(4096))
    return filler


@pytest.mark.parametrize(("min_free", "leave"), [("4 MiB", 3 * 2**20), (0, 0)], ids=["below the reserve", "full"])
def test_a_full_disk_costs_a_try_again_and_the_first_object_after_it_is_taken(
    small_disk: Path, min_free: str | int, leave: int
) -> None:
    with listening(small_disk / "var", min_free) as (house, port):
        assert send(port, scan(1)) == 0x0000
        before = [file.name for file in spool.shelved(house.spool.objects)]
        filler = fill(small_disk, leave)

        for _ in range(3):
            assert send(port, scan(2)) == 0xA700
        assert send(port) == 0x0000, "an echo is answered"

        assert [file.name for file in spool.shelved(house.spool.objects)] == before
        assert list(house.spool.incoming.iterdir()) == []
        assert len(worklist.rows(house.engine)) == 1

        filler.unlink()
        assert send(port, scan(2)) == 0x0000, "the very first one after there is room"
        assert [row["state"] for row in worklist.rows(house.engine)] == ["queued", "queued"]
        assert worklist.check(house.engine) == worklist.verify_history(house.engine) == ()
