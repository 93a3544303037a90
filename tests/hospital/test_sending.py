"""The sender against archives that are not ours: DCMTK's storescp and Orthanc."""

import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom.dsutils import split_dataset

from dicom_node.sender import Outcome, Parcel, Peer, accepted_classes, echo, send
from dicom_node.settings import TLS
from dicom_node.tls import client_context
from dicom_node.transport.secure import Encryption

SC = "1.2.840.10008.5.1.4.1.1.7"
# Orthanc is started once for each process of a parallel run: keep its tests together.
pytestmark = pytest.mark.xdist_group("orthanc")

COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
NO_STORAGE_CLASS = "1.2.840.10008.5.1.4.34.6.1"  # Unified Procedure Step: not taken for storage by anybody

NETWORK: dict[str, Any] = {
    "calling_ae_title": "REMNANT",
    "connect_timeout_s": 10,
    "acse_timeout_s": 10,
    "dimse_timeout_s": 20,
}


class Archive(Protocol):
    ae_title: str
    dicom_port: int

    def stop(self) -> None: ...
    def start(self) -> None: ...
    def find(self, study_uid: str) -> list[str]: ...
    def file(self, identifier: str) -> bytes: ...


def _object(folder: Path, *, sop_class_uid: str = SC, study_uid: str | None = None, key: int = 0) -> Parcel:
    """A small object of an invented patient, stored as our results are: Part 10, Explicit VR Little Endian."""
    uid = UID(generate_uid(prefix=None))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UID(sop_class_uid)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.StudyInstanceUID = study_uid or generate_uid(prefix=None)
    ds.SeriesInstanceUID = generate_uid(prefix=None)
    ds.PatientName = "Erfunden^Änne=江^發明"
    ds.PatientID = "INVENTED-1"
    ds.Modality = "OT"
    if sop_class_uid == SC:
        ds.Rows = ds.Columns = 300
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = bytes(range(250)) * (300 * 300 * 2 // 250)
    block = ds.private_block(0x0099, "REMNANT TEST", create=True)
    block.add_new(0x01, "LO", "private elements survive too")
    path = folder / f"{uid}.dcm"
    ds.save_as(path, enforce_file_format=True)
    return Parcel(key, path, sop_class_uid, uid, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _dataset_bytes(path: Path) -> bytes:
    _, offset = split_dataset(path)
    return path.read_bytes()[offset:]


def _kinds(outcomes: list[tuple[Parcel, Outcome]]) -> list[str]:
    return [outcome.kind for _, outcome in outcomes]


def test_storescp_receives_the_stored_bytes_unchanged(start_storescp: Callable[..., Any], tmp_path: Path) -> None:
    scp = start_storescp()
    parcels = [_object(tmp_path, key=1), _object(tmp_path, key=2, sop_class_uid=COMPREHENSIVE_3D_SR)]
    outcomes = list(send(Peer("dcmtk", scp.ae_title, scp.host, scp.port), parcels, **NETWORK))
    assert [(parcel.key, outcome.kind, outcome.status) for parcel, outcome in outcomes] == [
        (1, "acknowledged", 0),
        (2, "acknowledged", 0),
    ]
    received = {dcmread(path).SOPInstanceUID: path for path in scp.files()}
    for parcel in parcels:
        assert _dataset_bytes(received[parcel.sop_instance_uid]) == _dataset_bytes(parcel.path)


def test_storescp_receives_over_tls_and_shows_a_certificate_of_an_authority_we_know(
    start_storescp: Callable[..., Any], tmp_path: Path, authority: Any, stranger: Any
) -> None:
    theirs, ours = authority.sign("STORESCP", kind="rsa"), authority.sign("REMNANT", kind="rsa")
    scp = start_storescp("+tls", str(theirs.key), str(theirs.certificate), "+cf", str(theirs.authority))
    files = TLS(certificate=str(ours.certificate), key=str(ours.key), authorities=str(ours.authority))
    parcel = _object(tmp_path)
    for authorities, kind in ((str(stranger.file), "later"), ("", "acknowledged")):
        encryption = Encryption(client_context(files, authorities), scp.host)
        ((_, outcome),) = send(Peer("dcmtk", scp.ae_title, scp.host, scp.port, encryption), [parcel], **NETWORK)
        assert outcome.kind == kind, outcome.text
    assert _dataset_bytes(scp.files()[0]) == _dataset_bytes(parcel.path)


def test_an_archive_that_takes_implicit_vr_alone_gets_the_same_content_re_encoded(
    start_storescp: Callable[..., Any], tmp_path: Path
) -> None:
    scp = start_storescp("--implicit")
    parcel = _object(tmp_path)
    assert _kinds(list(send(Peer("dcmtk", scp.ae_title, scp.host, scp.port), [parcel], **NETWORK))) == ["acknowledged"]
    received = dcmread(scp.files()[0])
    assert received.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    assert received.PatientName == dcmread(parcel.path).PatientName
    assert received.PixelData == dcmread(parcel.path).PixelData


def test_storescp_that_refuses_every_association_is_an_alarm_and_tried_later(
    start_storescp: Callable[..., Any], tmp_path: Path
) -> None:
    scp = start_storescp("--refuse")
    peer = Peer("dcmtk", scp.ae_title, scp.host, scp.port)
    parcel = _object(tmp_path)
    for _ in range(20):  # storescp closes at once behind its rejection: a race that must never cost the alarm
        ((_, outcome),) = send(peer, [parcel], **NETWORK)
        assert (outcome.kind, outcome.status, outcome.alarm) == ("later", None, True)


@pytest.mark.parametrize("when", ["--abort-after", "--abort-during"])
def test_storescp_that_aborts_leaves_every_object_for_later(
    start_storescp: Callable[..., Any], tmp_path: Path, when: str
) -> None:
    scp = start_storescp(when)
    parcels = [_object(tmp_path, key=key) for key in (1, 2)]
    outcomes = list(send(Peer("dcmtk", scp.ae_title, scp.host, scp.port), parcels, **NETWORK))
    assert _kinds(outcomes) == ["later", "later"]


def test_orthanc_stores_structured_report_and_capture_in_their_study(orthanc: Archive, tmp_path: Path) -> None:
    study = generate_uid(prefix=None)
    parcels = [
        _object(tmp_path, study_uid=study, key=1, sop_class_uid=COMPREHENSIVE_3D_SR),
        _object(tmp_path, study_uid=study, key=2),
    ]
    outcomes = list(send(Peer("pacs", orthanc.ae_title, "127.0.0.1", orthanc.dicom_port), parcels, **NETWORK))
    assert _kinds(outcomes) == ["acknowledged", "acknowledged"]
    stored = {}
    for identifier in orthanc.find(study):
        ds = dcmread(BytesIO(orthanc.file(identifier)))
        stored[ds.SOPInstanceUID] = ds
    assert set(stored) == {parcel.sop_instance_uid for parcel in parcels}
    for parcel in parcels:
        assert stored[parcel.sop_instance_uid] == dcmread(parcel.path)


def test_sending_the_same_object_twice_leaves_one_in_orthanc(orthanc: Archive, tmp_path: Path) -> None:
    study = generate_uid(prefix=None)
    parcel = _object(tmp_path, study_uid=study)
    peer = Peer("pacs", orthanc.ae_title, "127.0.0.1", orthanc.dicom_port)
    for _ in range(2):
        assert _kinds(list(send(peer, [parcel], **NETWORK))) == ["acknowledged"]
    assert len(orthanc.find(study)) == 1


def test_orthanc_that_does_not_know_the_called_name_is_an_alarm(orthanc: Archive, tmp_path: Path) -> None:
    ((_, outcome),) = send(Peer("pacs", "WRONG", "127.0.0.1", orthanc.dicom_port), [_object(tmp_path)], **NETWORK)
    assert (outcome.kind, outcome.alarm) == ("later", True)
    assert "WRONG" in outcome.text


def test_a_class_orthanc_does_not_take_is_named_and_the_other_object_still_goes(
    orthanc: Archive, tmp_path: Path
) -> None:
    peer = Peer("pacs", orthanc.ae_title, "127.0.0.1", orthanc.dicom_port)
    parcels = [_object(tmp_path, sop_class_uid=NO_STORAGE_CLASS), _object(tmp_path)]
    assert _kinds(list(send(peer, parcels, **NETWORK))) == ["rejected_context", "acknowledged"]
    assert accepted_classes(peer, [SC, NO_STORAGE_CLASS], **NETWORK) == {SC: True, NO_STORAGE_CLASS: False}
    assert echo(peer, **NETWORK).kind == "acknowledged"


# pynetdicom drops the socket of a refused connection without closing it; Python's reference count does.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_result_reaches_an_archive_that_was_away(orthanc: Archive, tmp_path: Path) -> None:
    peer = Peer("pacs", orthanc.ae_title, "127.0.0.1", orthanc.dicom_port)
    study = generate_uid(prefix=None)
    parcel = _object(tmp_path, study_uid=study)
    orthanc.stop()
    try:
        assert _kinds(list(send(peer, [parcel], **NETWORK))) == ["later"]
    finally:
        orthanc.start()
    assert _kinds(list(send(peer, [parcel], **NETWORK))) == ["acknowledged"]
    assert len(orthanc.find(study)) == 1
