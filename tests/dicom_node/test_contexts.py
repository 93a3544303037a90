"""What is negotiated is what the tuples say, and settings that nobody knows are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID
from pynetdicom import AE
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import uid_to_service_class

from dicom_node import contexts
from dicom_node.errors import SettingsError
from dicom_node.uids import valid_uid

PET = "1.2.840.10008.5.1.4.1.1.128"
PRIVATE = "1.2.840.113619.4.26"


def test_every_accepted_class_is_a_storage_class_of_the_standard() -> None:
    for accepted in contexts.ACCEPTED_CLASSES:
        assert uid_to_service_class(accepted.uid) is StorageServiceClass
        assert not UID(accepted.uid).is_retired, f"{accepted.name} is retired"
    assert len({accepted.uid for accepted in contexts.ACCEPTED_CLASSES}) == len(contexts.ACCEPTED_CLASSES)


def test_only_nuclear_medicine_images_are_analysed() -> None:
    assert [a.keyword for a in contexts.ACCEPTED_CLASSES if a.purpose == "analysed"] == ["NuclearMedicineImageStorage"]


def test_accepted_contexts_are_verification_and_each_class_in_both_default_syntaxes() -> None:
    built = contexts.accepted_contexts([])
    assert [str(cx.abstract_syntax) for cx in built] == [
        contexts.VERIFICATION,
        *(a.uid for a in contexts.ACCEPTED_CLASSES),
    ]
    for cx in built:
        assert [uid.keyword for uid in cx.transfer_syntax] == ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian"]
    AE().supported_contexts = built  # pynetdicom itself agrees


def test_an_extra_class_is_named_by_keyword_or_uid_and_never_twice() -> None:
    by_keyword = contexts.resolve_classes(["PositronEmissionTomographyImageStorage", PET, "CTImageStorage"])
    assert [a.uid for a in by_keyword[len(contexts.ACCEPTED_CLASSES) :]] == [PET]
    assert by_keyword[-1].purpose == "kept"


def test_a_manufacturers_private_class_is_served_as_storage() -> None:
    contexts.accepted_contexts([PRIVATE])
    assert uid_to_service_class(PRIVATE) is StorageServiceClass


@pytest.mark.parametrize(
    "entry", ["PetImage", "", "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.2.2.1", "1..2", "ExplicitVRLittleEndian"]
)
def test_an_extra_class_that_cannot_be_stored_is_named(entry: str) -> None:
    with pytest.raises(SettingsError) as caught:
        contexts.accepted_contexts([entry])
    assert repr(entry) in str(caught.value)


def test_optional_syntaxes_come_only_by_setting_and_unknown_ones_are_named() -> None:
    built = contexts.accepted_contexts([], ["RLELossless", "1.2.840.10008.1.2.4.70"])
    assert [uid.keyword for uid in built[1].transfer_syntax][2:] == ["RLELossless", "JPEGLosslessSV1"]
    with pytest.raises(SettingsError, match="JPEGBaseline8Bit"):
        contexts.accepted_contexts([], ["JPEGBaseline8Bit"])


def test_a_sender_proposes_the_stored_syntax_and_the_default_one_in_contexts_of_their_own() -> None:
    proposed = contexts.proposed_contexts([PET, PET])
    assert [uid.keyword for cx in proposed for uid in cx.transfer_syntax] == [
        "ExplicitVRLittleEndian",
        "ImplicitVRLittleEndian",
    ]
    with pytest.raises(ValueError, match="130 presentation contexts"):
        contexts.proposed_contexts(f"1.2.3.{i}" for i in range(65))


def test_the_implementation_is_named_within_the_limits_of_the_standard() -> None:
    assert valid_uid(contexts.IMPLEMENTATION_CLASS_UID)
    assert 1 <= len(contexts.IMPLEMENTATION_VERSION_NAME) <= 16


@pytest.mark.parametrize(
    "text",
    ["", ".", "1", "1.", ".1", "1..2", "01.2", "1.02", "1.2 ", "1.2\0", "1.2\n", "a.b", "1.٢", "../1.2", "1." * 33],
)
def test_text_that_is_not_a_uid_is_not_taken_for_one(text: str) -> None:
    assert not valid_uid(text)


@given(st.lists(st.integers(min_value=0, max_value=10**6), min_size=2, max_size=9))
def test_numbers_joined_by_dots_are_a_uid(components: list[int]) -> None:
    assert valid_uid(".".join(str(component) for component in components))
