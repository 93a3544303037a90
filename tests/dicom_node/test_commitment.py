"""Reports on Storage Commitment: what is read of them, and from whom."""

from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.dsutils import encode

from dicom_node import commitment
from dicom_node.receiver import reporting
from dicom_node.settings import Destination
from dicom_node.transport import Certificate, Peer


def _information(uid: str = "2.25.1", kept: tuple[str, ...] = (), failed: dict[str, int] | None = None) -> Dataset:
    def item(instance: str, **more: int) -> Dataset:
        one = Dataset()
        one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", instance
        for keyword, value in more.items():
            setattr(one, keyword, value)
        return one

    ds = Dataset()
    ds.TransactionUID = uid
    ds.ReferencedSOPSequence = [item(one) for one in kept]
    if failed:
        ds.FailedSOPSequence = [item(one, FailureReason=reason) for one, reason in failed.items()]
    return ds


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_report_is_read_in_both_syntaxes(syntax: Any) -> None:
    ds = _information(kept=("2.25.10", "2.25.11"), failed={"2.25.12": 0x0112})
    data = encode(ds, syntax.is_implicit_VR, syntax.is_little_endian)
    assert data is not None
    report = commitment.read_report(data, syntax)
    assert report.transaction_uid == "2.25.1"
    assert report.committed == {"2.25.10", "2.25.11"}
    assert report.failed == {"2.25.12": 0x0112}


def test_an_object_named_both_as_kept_and_as_failed_is_not_kept() -> None:
    report = commitment.report_of(_information(kept=("2.25.10",), failed={"2.25.10": 0x0110}))
    assert report.committed == frozenset()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"\xff" * 4000, b"\0" * (commitment.REPORT_LIMIT + 1)],
    ids=["empty", "one byte", "noise", "too long"],
)
def test_what_is_no_report_is_refused_and_not_quoted(data: bytes) -> None:
    with pytest.raises(commitment.UnreadableReport) as raised:
        commitment.read_report(data, ExplicitVRLittleEndian)
    assert "2.25" not in str(raised.value)


def test_a_request_names_each_object_by_class_and_instance() -> None:
    ds = commitment.request("2.25.1", [("1.2.840.10008.5.1.4.1.1.7", "2.25.10")])
    assert ds.TransactionUID == "2.25.1"
    assert [
        (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in ds.ReferencedSOPSequence
    ] == [("1.2.840.10008.5.1.4.1.1.7", "2.25.10")]


_KEEPER = Destination(name="pacs", ae_title="KEEPER", host="127.0.0.1", storage_commitment=True)
_SECRET = _KEEPER.model_copy(update={"tls": True, "server_name": "pacs.hospital.example"})


def _shown(*names: str) -> Certificate:
    return Certificate(frozenset(name.lower() for name in names), "00" * 32)


@pytest.mark.parametrize(
    ("destination", "peer", "may"),
    [
        (_KEEPER, Peer("127.0.0.1", "KEEPER", "REMNANT"), True),
        (_KEEPER, Peer("127.0.0.2", "KEEPER", "REMNANT"), False),
        (_KEEPER, Peer("127.0.0.1", "KEEPER2", "REMNANT"), False),
        (_KEEPER.model_copy(update={"storage_commitment": False}), Peer("127.0.0.1", "KEEPER", "REMNANT"), False),
        (_KEEPER, Peer("127.0.0.1", "KEEPER", "REMNANT", _shown("KEEPER")), True),
        (_KEEPER, Peer("127.0.0.1", "KEEPER", "REMNANT", _shown("CAMERA")), False),
        (_SECRET, Peer("127.0.0.1", "KEEPER", "REMNANT"), False),
        (_SECRET, Peer("127.0.0.1", "KEEPER", "REMNANT", _shown("pacs.hospital.example")), True),
        (_SECRET, Peer("127.0.0.1", "KEEPER", "REMNANT", _shown("camera.hospital.example")), False),
    ],
)
def test_an_archive_reports_by_its_ae_title_address_and_certificate(
    destination: Destination, peer: Peer, may: bool
) -> None:
    assert reporting((destination,), peer) == (("pacs",) if may else ())
