"""Two identities of one study: what counts as the same, and that a difference is told without its values."""

from dataclasses import replace

import pytest

from dicom_node.whose import Identity, differences, same_name

HERS = Identity("2.25.1", "RMN-1", "HOSPITAL", "Invented^Iris", "A-1", "19700101", "F")


def test_an_identity_agrees_with_itself_and_with_what_an_archive_adds() -> None:
    assert differences(HERS, HERS) == ()
    assert differences(HERS, replace(HERS, patient_birth_date="", patient_sex="")) == ()
    assert differences(HERS, replace(HERS, issuer_of_patient_id="")) == ()
    assert differences(HERS, replace(HERS, patient_id=" RMN-1 ", accession_number="A-1 ")) == ()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"patient_id": "RMN-2"}, ("PatientID",)),
        ({"patient_id": ""}, ("PatientID",)),
        ({"patient_id": "rmn-1"}, ("PatientID",)),
        ({"issuer_of_patient_id": "ELSEWHERE"}, ("IssuerOfPatientID",)),
        ({"patient_name": "Invented^Ida"}, ("PatientName",)),
        ({"patient_name": ""}, ("PatientName",)),
        ({"accession_number": "A-2"}, ("AccessionNumber",)),
        ({"accession_number": ""}, ("AccessionNumber",)),
        ({"patient_id": "2", "accession_number": "2"}, ("PatientID", "AccessionNumber")),
    ],
)
def test_what_differs_is_named_and_not_shown(changed: dict[str, str], told: tuple[str, ...]) -> None:
    assert differences(HERS, replace(HERS, **changed)) == told  # type: ignore[arg-type] # names of text fields
    assert "Iris" not in repr(HERS)
    assert "RMN-1" not in repr(HERS)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Invented^Iris", "INVENTED^IRIS", True),
        ("Invented^Iris", " Invented ^ Iris ^^^", True),
        ("Invented^Iris  Ann", "Invented^Iris Ann", True),
        ("Invented^Iris", "Iris^Invented", False),
        ("Wang^XiaoDong=王^小东", "Wang^XiaoDong", True),
        ("Wang^XiaoDong=王^小东", "=王^小东", True),
        ("Wang^XiaoDong=王^小东", "Wang^XiaoDong=王^小冬", False),
        ("Wang^XiaoDong=王^小东", "Wang^XiaoDong=??^????", True),
        ("王^小东", "??^????", False),
        ("Wang^XiaoDong", "=王^小东", False),
        ("", "", True),
        ("", "^^", True),
        ("Invented^Iris", "", False),
    ],
)
def test_names_are_compared_by_group(first: str, second: str, same: bool) -> None:
    assert same_name(first, second) is same
    assert same_name(second, first) is same
