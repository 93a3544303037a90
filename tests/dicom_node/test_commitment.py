"""Reports on Storage Commitment: what is read of them, and from whom."""

from collections.abc import Callable
from typing import Any

import pytest
from pydicom import DataElement, Dataset, config
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
    [b"", b"\x00", b"\xff" * 4000, b"\0" * (commitment.MESSAGE_LIMIT + 1)],
    ids=["empty", "one byte", "noise", "too long"],
)
@pytest.mark.parametrize("read", [commitment.read_report, commitment.read_request])
def test_what_is_no_report_or_request_is_refused_and_not_quoted(
    read: Callable[[bytes, str], object], data: bytes
) -> None:
    with pytest.raises(commitment.Unreadable) as raised:
        read(data, ExplicitVRLittleEndian)
    assert "2.25" not in str(raised.value)


@pytest.mark.parametrize(
    ("references", "why"),
    [
        ([], "names no object"),
        ([("1.2.840.10008.5.1.4.1.1.20", "../../etc")], r"no UID|UserWarning"),
        ([("", "2.25.10")], "no UID"),
        ([("1.2.840.10008.5.1.4.1.1.20", "2.25.10"), ("1.2.840.10008.5.1.4.1.1.7", "2.25.10")], "two SOP classes"),
    ],
)
def test_a_request_that_names_nothing_or_nonsense_is_refused(references: list[tuple[str, str]], why: str) -> None:
    ds = Dataset()
    ds.TransactionUID = "2.25.1"
    ds.ReferencedSOPSequence = []
    for sop_class, sop_instance in references:
        item = Dataset()
        item.add_new("ReferencedSOPClassUID", "UI", sop_class)
        item[0x00081155] = DataElement(0x00081155, "UI", sop_instance, validation_mode=config.IGNORE)
        ds.ReferencedSOPSequence.append(item)
    data = encode(ds, is_implicit_vr=False, is_little_endian=True)
    assert data is not None
    with pytest.raises(commitment.Unreadable, match=why):
        commitment.read_request(data, ExplicitVRLittleEndian)


def test_an_object_that_a_camera_names_twice_is_one() -> None:
    one = ("1.2.840.10008.5.1.4.1.1.20", "2.25.10")
    data = encode(commitment.request("2.25.1", [one, one]), is_implicit_vr=False, is_little_endian=True)
    assert data is not None
    assert commitment.read_request(data, ExplicitVRLittleEndian) == commitment.Asked("2.25.1", (one,))


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
