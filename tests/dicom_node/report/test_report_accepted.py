"""Results for an identity that a person accepted in place of the received one: theirs throughout, and it says so."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom import Dataset

from dicom_node.report import adopted, check
from dicom_node.report.identity import text_of
from dicom_node.whose import AcceptedIdentity, Identity


def _accepted(source: Dataset, origin: str = "archive", **changed: Any) -> AcceptedIdentity:
    asked = Identity(
        study_instance_uid=str(source.StudyInstanceUID),
        patient_id="MERGED-7",
        issuer_of_patient_id="",
        patient_name="Erfunden^Ida",
        accession_number=str(source.AccessionNumber),
    )
    whose = replace(asked, **changed)
    return AcceptedIdentity(whose, origin, "pacs", "OPTIMA1", "2026-11-23T17:51:23.123Z")


def _under(case: Any, accepted: AcceptedIdentity) -> Any:
    sources = tuple(adopted(ds, accepted, "REMNANT") for ds in case.sources)
    return replace(case, sources=sources, context=replace(case.context, revision=2, accepted=accepted))


@pytest.mark.parametrize("outcome", ["present", "low_counts"])
@pytest.mark.parametrize("shape", ["two_frames", "two_objects"])
def test_a_result_has_the_accepted_identity_and_keeps_the_received_one(
    case: Callable[..., Any], peer: Callable[[str], Path], tmp_path: Path, outcome: str, shape: str
) -> None:
    received = case(outcome, shape=shape, change=lambda ds: ds.__setattr__("PatientComments", "of the other"))
    source = received.sources[0]
    accepted = _accepted(source, patient_birth_date="19610203", patient_sex="F")
    merged = _under(received, accepted)
    for kind in ("sr", "sc"):
        made = merged.render(kind)
        assert check(made, merged.sources, merged.outcome, merged.context) == ()
        ds = pydicom.dcmread(BytesIO(made.data))
        assert (ds.PatientID, str(ds.PatientName), ds.PatientBirthDate) == ("MERGED-7", "Erfunden^Ida", "19610203")
        assert "PatientComments" not in ds
        (item,) = ds.OriginalAttributesSequence
        (before,) = item.ModifiedAttributesSequence
        assert before.PatientID == source.PatientID
        assert str(before.PatientName) == str(source.PatientName)
        assert "AccessionNumber" not in before, "it was not replaced"
        assert (item.SourceOfPreviousValues, item.ModifyingSystem) == ("OPTIMA1", "REMNANT")
        assert item.ReasonForTheAttributeModification == "COERCE"
        assert item.AttributeModificationDateTime == "20261123175123.123000+0000"
        path = tmp_path / f"{kind}.dcm"
        path.write_bytes(made.data)
        judged = subprocess.run([str(peer("dciodvfy")), str(path)], capture_output=True, text=True, check=False)
        assert [line for line in judged.stderr.splitlines() if line.startswith("Error")] == []
    assert merged.sources[0].SOPInstanceUID == source.SOPInstanceUID
    assert "OriginalAttributesSequence" not in source, "what was received stays as it was"
    assert source.PatientID != "MERGED-7"


def test_a_name_that_the_cameras_character_set_cannot_carry_is_written_in_unicode(case: Callable[..., Any]) -> None:
    received = case("absent", change=lambda ds: ds.__setattr__("SpecificCharacterSet", "ISO_IR 100"))
    received.sources[0].ReferringPhysicianName = "Jürgens^Max"
    merged = _under(received, _accepted(received.sources[0], patient_name="Wang^XiaoDong=王^小东"))
    for kind in ("sr", "sc"):
        made = merged.render(kind)
        assert check(made, merged.sources, merged.outcome, merged.context) == ()
        ds = pydicom.dcmread(BytesIO(made.data))
        assert ds.SpecificCharacterSet == "ISO_IR 192"
        assert str(ds.PatientName) == "Wang^XiaoDong=王^小东"
        assert str(ds.ReferringPhysicianName) == "Jürgens^Max"


def test_a_name_that_it_can_carry_leaves_the_character_set_alone(case: Callable[..., Any]) -> None:
    received = case("absent", change=lambda ds: ds.__setattr__("SpecificCharacterSet", "GB18030"))
    merged = _under(received, _accepted(received.sources[0], patient_name="Wang^XiaoDong=王^小东"))
    ds = merged.read()
    assert (ds.SpecificCharacterSet, str(ds.PatientName)) == ("GB18030", "Wang^XiaoDong=王^小东")


def test_another_study_and_series_of_a_second_sending_are_those_of_the_references(case: Callable[..., Any]) -> None:
    received = case("present")
    (source,) = received.sources
    accepted = replace(
        _accepted(source, "resend", study_instance_uid="2.25.9901"),
        series=((str(source.SOPInstanceUID), "2.25.9902"),),
    )
    merged = _under(received, accepted)
    made = merged.render("sr")
    assert check(made, merged.sources, merged.outcome, merged.context) == ()
    ds = pydicom.dcmread(BytesIO(made.data))
    (study,) = ds.CurrentRequestedProcedureEvidenceSequence
    assert (ds.StudyInstanceUID, study.StudyInstanceUID) == ("2.25.9901", "2.25.9901")
    assert study.ReferencedSeriesSequence[0].SeriesInstanceUID == "2.25.9902"
    assert ds.OriginalAttributesSequence[0].ReasonForTheAttributeModification == "CORRECT"
    assert text_of(ds.OriginalAttributesSequence[0].ModifiedAttributesSequence[0], "StudyInstanceUID") == text_of(
        source, "StudyInstanceUID"
    )


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda ds: setattr(ds, "PatientID", "SOMEBODY"), "PatientID is not the accepted one"),
        (lambda ds: setattr(ds, "AccessionNumber", "OTHER"), "AccessionNumber is not the accepted one"),
        (lambda ds: delattr(ds, "OriginalAttributesSequence"), "does not keep what was received"),
        (
            lambda ds: setattr(
                ds.OriginalAttributesSequence[0].ModifiedAttributesSequence[0], "PatientID", ds.PatientID
            ),
            "which was not replaced",
        ),
    ],
)
def test_the_gate_stops_a_result_that_is_not_the_accepted_persons(
    case: Callable[..., Any], fault: Callable[[Dataset], None], says: str
) -> None:
    received = case("present")
    merged = _under(received, _accepted(received.sources[0]))
    made = merged.render("sr")
    ds = pydicom.dcmread(BytesIO(made.data))
    fault(ds)
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    faults = check(replace(made, data=buffer.getvalue()), merged.sources, merged.outcome, merged.context)
    assert any(says in one for one in faults), faults


def test_the_gate_stops_sources_that_were_not_adopted(case: Callable[..., Any]) -> None:
    received = case("present")
    wrong = replace(received, context=replace(received.context, accepted=_accepted(received.sources[0])))
    plain = received.render("sr")
    assert any(
        "PatientID is not the accepted" in one for one in check(plain, wrong.sources, wrong.outcome, wrong.context)
    )
