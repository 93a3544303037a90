"""The embedded archive keeps what it acknowledged, and takes nothing from the wire into a file name."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE

from dicom_node.archive import Archive
from dicom_node.contexts import proposed_contexts
from dicom_node.errors import RemnantError
from dicom_node.sender import Parcel, Peer, echo, send

SC = "1.2.840.10008.5.1.4.1.1.7"
NETWORK: dict[str, Any] = {
    "calling_ae_title": "REMNANT",
    "connect_timeout_s": 5,
    "acse_timeout_s": 5,
    "dimse_timeout_s": 10,
}


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    archive = Archive(tmp_path / "archive")
    archive.start()
    yield archive
    archive.stop()


def _dataset(**elements: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = UID(SC), generate_uid(prefix=None)
    ds.StudyInstanceUID = generate_uid(prefix=None)
    ds.PatientName = "Erfunden^Otto"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def _parcel(folder: Path, ds: Dataset) -> Parcel:
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    path = folder / "parcel.dcm"
    ds.save_as(path, enforce_file_format=True)
    return Parcel(1, path, ds.SOPClassUID, ds.SOPInstanceUID)


def _peer(archive: Archive) -> Peer:
    return Peer("archive", archive.ae_title, archive.host, archive.port)


def _store(archive: Archive, ds: Dataset) -> int:
    """Send a dataset as it is, without the sender's own checks."""
    assoc = AE(ae_title="TEST").associate(
        archive.host, archive.port, contexts=proposed_contexts([SC]), ae_title=archive.ae_title
    )
    try:
        return int(assoc.send_c_store(ds).Status)
    finally:
        assoc.release()


def test_what_the_node_sends_is_listed_and_on_the_disk(archive: Archive, tmp_path: Path) -> None:
    ds = _dataset()
    assert [outcome.kind for _, outcome in send(_peer(archive), [_parcel(tmp_path, ds)], **NETWORK)] == ["acknowledged"]
    (held,) = archive.objects()
    assert (held.study_instance_uid, held.sop_instance_uid, held.sop_class_uid) == (
        ds.StudyInstanceUID,
        ds.SOPInstanceUID,
        SC,
    )
    assert dcmread(held.path) == ds
    assert echo(_peer(archive), **NETWORK).kind == "acknowledged"


def test_what_it_holds_survives_a_new_start(archive: Archive, tmp_path: Path) -> None:
    assert _store(archive, _dataset()) == 0x0000
    before = archive.objects()
    archive.stop()
    unfinished = before[0].path.with_suffix(".part")
    unfinished.write_bytes(b"half")
    again = Archive(tmp_path / "archive")
    again.start()
    try:
        assert again.objects() == before
        assert not unfinished.exists()
    finally:
        again.stop()


def test_a_resend_is_acknowledged_and_other_bytes_under_a_known_uid_overwrite_nothing(archive: Archive) -> None:
    ds = _dataset()
    assert _store(archive, ds) == 0x0000
    assert _store(archive, ds) == 0x0000
    (held,) = archive.objects()
    first = held.path.read_bytes()
    ds.PatientName = "Anders^Otto"
    assert _store(archive, ds) == 0x0111
    assert held.path.read_bytes() == first
    assert archive.objects() == (held,)


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SOPInstanceUID"])
@pytest.mark.parametrize("value", ["../../escaped", "/etc/passwd", "1..2"])
# pydicom says aloud what we do here on purpose: the value is no UID.
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI:UserWarning", "ignore:The .* is non-conformant:UserWarning")
def test_a_uid_that_is_none_is_refused_and_names_no_file(
    archive: Archive, tmp_path: Path, keyword: str, value: str
) -> None:
    before = set(tmp_path.rglob("*"))
    assert _store(archive, _dataset(**{keyword: value})) == 0xC000
    assert archive.objects() == ()
    assert set(tmp_path.rglob("*")) == before


def test_it_goes_by_its_own_name_only(archive: Archive, tmp_path: Path) -> None:
    wrong = Peer("archive", "SOMEBODY", archive.host, archive.port)
    ((_, outcome),) = send(wrong, [_parcel(tmp_path, _dataset())], **NETWORK)
    assert outcome.alarm
    assert archive.objects() == ()


def test_a_taken_port_is_one_sentence(archive: Archive, tmp_path: Path) -> None:
    second = Archive(tmp_path / "second", port=archive.port)
    with pytest.raises(RemnantError, match=f"port {archive.port}"):
        second.start()


def test_dcmtk_can_store_and_echo(archive: Archive, tmp_path: Path, peer: Callable[[str], Path]) -> None:
    parcel = _parcel(tmp_path, _dataset())
    address = ["-aec", archive.ae_title, archive.host, str(archive.port)]
    subprocess.run([peer("/usr/bin/echoscu"), *address], check=True, timeout=30)
    subprocess.run([peer("/usr/bin/storescu"), *address, str(parcel.path)], check=True, timeout=30)
    assert [held.sop_instance_uid for held in archive.objects()] == [parcel.sop_instance_uid]
