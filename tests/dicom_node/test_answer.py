"""Answering without a node: comparing versions of an object, and what the doctor looks at."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from dicom_node.answer import compare
from dicom_node.doctor import check_packages
from dicom_node.messages import Rendered, Wanted
from dicom_node.settings import Destination
from dicom_node.worker import deliveries, wanted_by
from pipeline.camera import examination, expose
from pipeline.phantom import phantom


def _scan() -> Dataset:
    (ds,) = expose(phantom(11, residual=True), examination(11), "two_frames")
    return ds


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Dataset], Path]:
    def save(ds: Dataset) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.dcm"
        ds.save_as(path, enforce_file_format=True)
        return path

    return save


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_the_same_scan_encoded_otherwise_is_the_same_content(write: Callable[[Dataset], Path], syntax: str) -> None:
    first, second = _scan(), _scan()
    second.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        words = bytearray(second.PixelData)
        words[0::2], words[1::2] = words[1::2], words[0::2]
        second.PixelData = bytes(words)
    assert compare(write(first), write(second)) == "same_content"


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("StudyDescription", "routed"),
        # Registrations complete and correct these two for one patient; the ID, the issuer and the name say whose it is.
        ("PatientBirthDate", "19010101"),
        ("PatientSex", "O"),
    ],
)
def test_what_a_router_adds_or_a_registration_corrects_is_the_same_content(
    write: Callable[[Dataset], Path], keyword: str, value: str
) -> None:
    second = _scan()
    assert second.get(keyword) != value
    setattr(second, keyword, value)
    assert compare(write(_scan()), write(second)) == "same_content"


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientID", "SIM-OTHER"),
        ("IssuerOfPatientID", "ELSEWHERE"),
        ("PatientName", "Other^Name"),
        ("AccessionNumber", "OTHER"),
        ("StudyInstanceUID", "2.25.1"),
    ],
)
def test_the_same_image_of_somebody_else_is_a_changed_identity(
    write: Callable[[Dataset], Path], keyword: str, value: str
) -> None:
    second = _scan()
    setattr(second, keyword, value)
    assert compare(write(_scan()), write(second)) == "identity_changed"


@pytest.mark.parametrize("change", ["pixels", "spacing", "views"])
def test_another_image_or_another_geometry_is_quarantined(write: Callable[[Dataset], Path], change: str) -> None:
    second = _scan()
    if change == "pixels":
        second.PixelData = second.PixelData[::-1]
    elif change == "spacing":
        second.PixelSpacing = [1.0, 1.0]
    else:
        for item in second.DetectorInformationSequence:
            item.ViewCodeSequence[0].CodeValue, item.StartAngle = (
                ("399001007", 0) if item.StartAngle == 180 else ("399321004", 180)
            )
    assert compare(write(_scan()), write(second)) == "other_pixels"


def test_a_foreign_owner_of_our_package_names_is_found() -> None:
    assert check_packages({"models": ["remnant-node"], "pipeline": ["remnant-node"], "dicom_node": ["remnant-node"]})[0]
    good, said = check_packages({"models": ["remnant-node", "other-models"]})
    assert not good
    assert "models belongs also to other-models" in said


def test_each_destination_gets_the_kinds_and_the_colour_it_asked_for() -> None:
    grey = Destination(name="gm", ae_title="GM", host="localhost", results=("sc",), sc="grey")
    both = Destination(name="pacs", ae_title="PACS", host="localhost")
    masks = Destination(name="viewer", ae_title="VIEWER", host="localhost", results=("sr", "seg", "seg-posterior"))
    assert set(wanted_by((grey, both))) == {Wanted("sr"), Wanted("sc", "grey"), Wanted("sc", "colour")}
    assert set(wanted_by((masks,))) == {Wanted("sr"), Wanted("seg", "anterior"), Wanted("seg", "posterior")}
    made = tuple(
        Rendered(kind, variant, "1.2", f"2.25.{index}", "2.25.9", b"")  # type: ignore[arg-type] # literals from a table
        for index, (kind, variant) in enumerate((("sr", ""), ("sc", "grey"), ("sc", "colour")))
    )
    assert deliveries(made, (grey, both)) == [("2.25.1", "gm"), ("2.25.0", "pacs"), ("2.25.2", "pacs")]
    mask = Rendered("seg", "posterior", "1.2", "2.25.3", "2.25.9", b"")
    assert deliveries((made[0], mask), (both, masks)) == [
        ("2.25.0", "pacs"),
        ("2.25.0", "viewer"),
        ("2.25.3", "viewer"),
    ]
