"""Asking a real archive whose a study is, before a result goes there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from dicom_node import sender
from dicom_node.sender import Outcome, Parcel, Peer, find_object, find_studies, send
from dicom_node.whose import Identity, differences
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

NETWORK: dict[str, Any] = {
    "calling_ae_title": "REMNANT",
    "connect_timeout_s": 5,
    "acse_timeout_s": 5,
    "dimse_timeout_s": 10,
}


@pytest.fixture(scope="module")
def archive(start_orthanc: Callable[..., Any]) -> Any:
    """An Orthanc that answers anybody's queries."""
    return start_orthanc(DicomAlwaysAllowFind=True, DefaultEncoding="Utf8")


def _store(ds: Dataset, peer: Peer, folder: Path) -> None:
    path = folder / f"{ds.SOPInstanceUID}.dcm"
    ds.save_as(path, enforce_file_format=True)
    ((_, outcome),) = send(peer, [Parcel(0, path, str(ds.SOPClassUID), str(ds.SOPInstanceUID))], **NETWORK)
    assert outcome.kind == "acknowledged", outcome


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 100", "Erfunden^Jürgen"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
    ],
)
def test_an_archive_says_whose_a_study_is_in_the_names_own_script(
    archive: Any, tmp_path: Path, character_set: str, name: str
) -> None:
    seed = 4000 + sum(map(ord, character_set))
    (ds,) = expose(phantom(seed, residual=False), examination(seed), "two_frames")
    ds.SpecificCharacterSet = character_set
    ds.PatientName = name
    ds.IssuerOfPatientID = "HOSPITAL"
    peer = Peer("pacs", archive.ae_title, archive.host, archive.dicom_port)
    _store(ds, peer, tmp_path)
    known = find_studies(peer, [str(ds.StudyInstanceUID), "2.25.4711"], **NETWORK)
    assert known["2.25.4711"] == ()
    found = known[str(ds.StudyInstanceUID)]
    assert isinstance(found, tuple)
    (found_identity,) = found
    expected = Identity(
        study_instance_uid=str(ds.StudyInstanceUID),
        patient_id=str(ds.PatientID),
        issuer_of_patient_id="HOSPITAL",
        patient_name=name,
        accession_number=str(ds.AccessionNumber),
        patient_birth_date=str(ds.PatientBirthDate),
        patient_sex=str(ds.PatientSex),
    )
    assert differences(expected, found_identity) == ()
    assert replace(found_identity, issuer_of_patient_id="HOSPITAL") == expected
    assert "Erfunden" not in repr(found_identity)


def test_an_archive_that_loses_characters_is_judged_by_what_it_kept(
    start_orthanc: Callable[..., Any], tmp_path: Path
) -> None:
    latin = start_orthanc(DicomAlwaysAllowFind=True, DefaultEncoding="Latin1")
    peer = Peer("pacs", latin.ae_title, latin.host, latin.dicom_port)
    for seed, name, agrees in ((4100, "Wang^XiaoDong=王^小东", True), (4101, "王^小东", False)):
        (ds,) = expose(phantom(seed, residual=False), examination(seed), "two_frames")
        ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 192", name
        _store(ds, peer, tmp_path)
        (found,) = find_studies(peer, [str(ds.StudyInstanceUID)], **NETWORK)[str(ds.StudyInstanceUID)]  # type: ignore[misc] # a tuple, or the test fails here
        assert differences(replace(found, patient_name=name), found) == (() if agrees else ("PatientName",))


def test_an_archive_that_ends_the_association_over_a_query_is_asked_again_later(orthanc: Any) -> None:
    peer = Peer("pacs", orthanc.ae_title, orthanc.host, orthanc.dicom_port)
    answers = find_studies(peer, ["2.25.1", "2.25.2"], **NETWORK)
    assert [one.kind for one in answers.values() if isinstance(one, Outcome)] == ["later", "later"]


def test_an_archive_that_takes_no_queries_is_asked_again_later_with_an_alarm(
    start_storescp: Callable[..., Any],
) -> None:
    scp = start_storescp()
    answer = find_studies(Peer("pacs", scp.ae_title, scp.host, scp.port), ["2.25.1"], **NETWORK)["2.25.1"]
    assert isinstance(answer, Outcome)
    assert (answer.kind, answer.alarm) == ("later", True)
    assert "queries" in answer.text


def test_an_archive_finds_the_object_it_has_and_no_other(archive: Any, orthanc: Any, tmp_path: Path) -> None:
    (ds,) = expose(phantom(4200, residual=False), examination(4200), "two_frames")
    peer = Peer("pacs", archive.ae_title, archive.host, archive.dicom_port)
    _store(ds, peer, tmp_path)
    study, series, uid = str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.SOPInstanceUID)
    assert find_object(peer, study, series, uid, **NETWORK) is True
    assert find_object(peer, study, series, "2.25.4711", **NETWORK) is False
    assert find_object(peer, "2.25.4711", series, uid, **NETWORK) is False, "it has it in another study"
    silent = Peer("pacs", orthanc.ae_title, orthanc.host, orthanc.dicom_port)
    answer = find_object(silent, study, series, uid, **NETWORK)
    assert isinstance(answer, Outcome)
    assert answer.kind == "later"


def test_an_answer_that_cannot_be_read_is_asked_for_again_later(
    archive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ds,) = expose(phantom(4300, residual=False), examination(4300), "two_frames")
    peer = Peer("pacs", archive.ae_title, archive.host, archive.dicom_port)
    _store(ds, peer, tmp_path)

    def damaged(_: Dataset) -> Identity:
        raise ValueError("as pydicom does where a value of the answer cannot be decoded")

    monkeypatch.setattr(sender, "_identity", damaged)
    answer = find_studies(peer, [str(ds.StudyInstanceUID)], **NETWORK)[str(ds.StudyInstanceUID)]
    assert isinstance(answer, Outcome)
    assert answer.kind == "later"
    assert answer.text.endswith("cannot be read (ValueError)")
