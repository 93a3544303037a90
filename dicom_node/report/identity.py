"""Whose result it is: patient, study, order and character set, taken from the sources as they were received.

Implements the Patient, General Study and Patient Study modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2). What identifies
(name, ID, issuer, accession, study UID) is copied as it stands, valid or not, because a corrected identity is another
identity; what merely describes is copied only where valid. Private elements are never copied. Messages name no patient.
"""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from io import BytesIO

import pydicom
from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import validate_value

from dicom_node.report.context import RenderError, ReportContext
from dicom_node.whose import AcceptedIdentity
from pipeline import wording

# Copied as they are.
IDENTIFYING = ("PatientName", "PatientID", "IssuerOfPatientID", "AccessionNumber", "StudyInstanceUID")

_MISSPELT = re.compile(r"ISO[ _-]?IR[ _-]?(\d+)")
_MISSPELT_2022 = re.compile(r"ISO[ _-]2022[ _-]IR[ _-](\d+)")

# Type 2 in every object we write: present, empty where the source has nothing usable.
_TYPE_2 = (
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
)

_DESCRIBING = (
    "TypeOfPatientID",
    "PatientBirthTime",
    "OtherPatientNames",
    "EthnicGroup",
    "PatientComments",
    "QualityControlSubject",
    "PatientIdentityRemoved",
    "StudyDescription",
    "ConsultingPhysicianName",
    "PhysiciansOfRecord",
    "NameOfPhysiciansReadingStudy",
    "AdmittingDiagnosesDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "AdmissionID",
    "Occupation",
    "AdditionalPatientHistory",
    "MedicalAlerts",
    "Allergies",
)

# Say who issued an ID: part of the identity, sequences of plain elements.
_ISSUERS = ("IssuerOfPatientIDQualifiersSequence", "IssuerOfAccessionNumberSequence")

# Say something of the person or the order that was received, and nothing of the ones that were accepted instead.
_OF_THE_PERSON = (
    "TypeOfPatientID",
    "PatientBirthTime",
    "OtherPatientNames",
    "EthnicGroup",
    "PatientComments",
    "PatientAge",
    "AdmissionID",
    "Occupation",
    "AdditionalPatientHistory",
    "MedicalAlerts",
    "Allergies",
    "IssuerOfPatientIDQualifiersSequence",
)
_OF_THE_ORDER = ("IssuerOfAccessionNumberSequence",)

_OFFSET = re.compile(r"([+-])(\d\d)([0-5]\d)")


def text_of(ds: Dataset, keyword: str) -> str:
    """Return an element's value as decoded text without padding, "" where it is absent or empty."""
    value = ds.get(keyword)
    if isinstance(value, MultiValue):
        value = "\\".join(str(one) for one in value)
    return "" if value is None else str(value).strip(" \0")


def in_one_order(sources: Sequence[Dataset]) -> tuple[Dataset, ...]:
    """Return the sources by SOPInstanceUID, because the same set has to give the same result in whatever order it came.

    Raises
    ------
    RenderError: there are none, or they disagree on patient, study or order.
    """
    if not sources:
        raise RenderError("a result was asked for without any source object")
    for keyword in (*IDENTIFYING, "PatientBirthDate"):
        if len({text_of(ds, keyword) for ds in sources}) > 1:
            raise RenderError(
                f"the views of one acquisition disagree on {keyword}; no result was made.",
                hint="Correct the study on the camera or in the archive and send it again.",
                study=text_of(sources[0], "StudyInstanceUID"),
            )
    if not text_of(sources[0], "StudyInstanceUID"):
        raise RenderError("the source has no StudyInstanceUID; a result cannot be filed.")
    return tuple(sorted(sources, key=lambda ds: text_of(ds, "SOPInstanceUID")))


def usable(keyword: str, value: object) -> bool:
    """Say whether a value may be copied: valid for its VR (PS3.5 6.2), dates existing, codes among the defined ones."""
    vr = dictionary_VR(keyword)
    text = str(value).strip(" \0")
    if vr == "DA":
        return _is_date(text)
    if keyword == "PatientSex":
        return text in ("M", "F", "O")
    try:
        for one in value if isinstance(value, (list, MultiValue)) else [value]:
            validate_value(vr, str(one), pydicom.config.RAISE)
    except ValueError:
        return False
    return True


def copy_identity(source: Dataset, target: Dataset) -> tuple[str, ...]:
    """Give `target` the patient, study and order of `source`; return sentences on what had to be left out.

    SpecificCharacterSet comes along, so that names are encoded as the source's archive knows them; but a term that the
    standard does not know is left out, which changes nothing of values in plain ASCII.

    Raises
    ------
    RenderError: the term is not known and a value is not ASCII, so that nobody can say whose result it would be.
    """
    notes: list[str] = []
    terms = defined_terms(source)
    if terms:
        target.SpecificCharacterSet = list(terms)
    for keyword in IDENTIFYING:
        if text_of(source, keyword) or keyword != "IssuerOfPatientID":
            _set(target, keyword, text_of(source, keyword))
    for keyword in _TYPE_2:
        value = source.get(keyword)
        empty = not text_of(source, keyword)
        good = not empty and usable(keyword, value)
        _set(target, keyword, _plain(value) if good else "")
        if not empty and not good:
            notes.append(f"{keyword} of the source is not valid and was left empty.")
    for keyword in _DESCRIBING:
        value = source.get(keyword)
        if text_of(source, keyword) and usable(keyword, value):
            _set(target, keyword, _plain(value))
    for keyword in _ISSUERS:
        items = source.get(keyword)
        if items and all(_is_plain(item) for item in items):
            copied = []
            for item in items:
                fresh = Dataset()
                for element in item:
                    _set(fresh, element.keyword, _plain(element.value))
                copied.append(fresh)
            setattr(target, keyword, copied)
    if terms is None and not all(str(element.value or "").isascii() for element in target.iterall()):
        raise RenderError(
            "the source names a character set that DICOM does not know; nothing was sent.",
            hint="Check SpecificCharacterSet on the camera.",
            study=text_of(source, "StudyInstanceUID"),
        )
    return tuple(notes)


def defined_terms(ds: Dataset) -> tuple[str, ...] | None:
    """Return SpecificCharacterSet in the Defined Terms of PS3.3 C.12.1.1.2; () where it is absent, None if unknown.

    Cameras misspell them ("ISO-IR 100"); what can only mean one term is that term.
    """
    value = ds.get("SpecificCharacterSet")
    given = (
        [str(one).strip() for one in value] if isinstance(value, MultiValue) else [text_of(ds, "SpecificCharacterSet")]
    )
    if not any(given):
        return ()
    terms = tuple(_MISSPELT.sub(r"ISO_IR \1", _MISSPELT_2022.sub(r"ISO 2022 IR \1", term)) for term in given)
    return terms if all(not term or term in python_encoding for term in terms) else None


def adopted(source: Dataset, accepted: AcceptedIdentity, ae_title: str) -> Dataset:
    """Return a copy of a received object under the identity that a person accepted for it.

    What it replaces is kept as the last item of OriginalAttributesSequence (PS3.3 C.12.1.1.9). What described the other
    person or order is left out. A character set that cannot carry the accepted name gives way to ISO_IR 192.
    """
    with warnings.catch_warnings():
        # pydicom's warnings on odd values quote them, and standard error is a log that must not name a patient.
        warnings.simplefilter("ignore")
        return _adopted(source, accepted, ae_title)


def _adopted(source: Dataset, accepted: AcceptedIdentity, ae_title: str) -> Dataset:
    received = {keyword: text_of(source, keyword) for keyword in (*IDENTIFYING, "PatientBirthDate", "PatientSex")}
    identity = accepted.identity
    same_patient = received["PatientID"] == identity.patient_id
    # An archive need not say who issued an ID; for the ID that was received, what was received holds.
    values = {
        "PatientName": identity.patient_name,
        "PatientID": identity.patient_id,
        "IssuerOfPatientID": identity.issuer_of_patient_id or (received["IssuerOfPatientID"] if same_patient else ""),
        "AccessionNumber": identity.accession_number,
        "StudyInstanceUID": identity.study_instance_uid,
        "PatientBirthDate": identity.patient_birth_date or (received["PatientBirthDate"] if same_patient else ""),
        "PatientSex": identity.patient_sex or (received["PatientSex"] if same_patient else ""),
    }
    changed = [keyword for keyword, value in values.items() if value != received[keyword]]
    for _ in source.iterall():  # decodes every value by the set it came in, before that may change
        pass
    ds = copy.deepcopy(source)  # a shallow copy shares the elements
    for keyword, value in values.items():
        _set(ds, keyword, value)
    outdated = _OF_THE_PERSON if {"PatientID", "IssuerOfPatientID", "PatientName"} & set(changed) else ()
    for keyword in (*outdated, *(_OF_THE_ORDER if "AccessionNumber" in changed else ())):
        if keyword in ds:
            delattr(ds, keyword)
    series = dict(accepted.series).get(text_of(source, "SOPInstanceUID"))
    if series is not None:
        _set(ds, "SeriesInstanceUID", series)
    if not _carries(ds, values):
        ds.SpecificCharacterSet = "ISO_IR 192"
    before = Dataset()
    for keyword in changed:
        _set(before, keyword, received[keyword])
    item = Dataset()
    item.ModifiedAttributesSequence = [before]
    at = datetime.fromisoformat(accepted.accepted_at)
    item.AttributeModificationDateTime = at.strftime("%Y%m%d%H%M%S.%f%z")
    item.ModifyingSystem = wording.ascii_text(ae_title)[:64]
    item.SourceOfPreviousValues = wording.ascii_text(accepted.received_from)[:64]
    # COERCE: reconciled with a master index, as the archive's is; CORRECT: the sender replaced wrong values.
    item.ReasonForTheAttributeModification = "COERCE" if accepted.origin == "archive" else "CORRECT"
    ds.OriginalAttributesSequence = [*(source.get("OriginalAttributesSequence") or ()), item]
    return ds


def _carries(ds: Dataset, values: Mapping[str, str]) -> bool:
    """Say whether the character set of `ds` gives these values back as they are."""
    trial = Dataset()
    if text_of(ds, "SpecificCharacterSet"):
        trial.SpecificCharacterSet = ds.SpecificCharacterSet
    for keyword, value in values.items():
        _set(trial, keyword, value)
    buffer = BytesIO()
    try:
        pydicom.dcmwrite(buffer, trial, implicit_vr=False, little_endian=True)
        again = pydicom.dcmread(BytesIO(buffer.getvalue()), force=True)
        return all(text_of(again, keyword) == value for keyword, value in values.items())
    except (ValueError, LookupError):
        return False


def set_times(source: Dataset, target: Dataset, context: ReportContext) -> None:
    """Write when the result was made.

    In the node's time zone; but where the source brings TimezoneOffsetFromUTC, which then holds for all times of an
    object (PS3.3 C.12.1), it is kept and the times are converted to it, so that the object agrees with itself.
    """
    offset = _offset(text_of(source, "TimezoneOffsetFromUTC"))
    if offset is not None:
        target.TimezoneOffsetFromUTC = text_of(source, "TimezoneOffsetFromUTC")
    made_at = local_time(source, context)
    for group in ("Content", "InstanceCreation", "Series"):
        setattr(target, f"{group}Date", made_at.strftime("%Y%m%d"))
        setattr(target, f"{group}Time", made_at.strftime("%H%M%S.%f"))


def local_time(source: Dataset, context: ReportContext) -> datetime:
    """Return `context.analysed_at` in the offset of the source, else in the node's time zone."""
    offset = _offset(text_of(source, "TimezoneOffsetFromUTC"))
    return context.analysed_at.astimezone(context.timezone if offset is None else timezone(offset))


def encoded(ds: Dataset, source: Dataset) -> bytes:
    """Return `ds` as a complete file, after proving that the identity reads back as the source's.

    Raises
    ------
    RenderError: the source's character set cannot carry a value, so that a name would arrive changed.
    """
    buffer = BytesIO()
    try:
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    except (ValueError, LookupError) as error:
        # The exception quotes the value; only its kind may go further.
        raise RenderError(
            f"the result cannot be encoded in the source's character set ({type(error).__name__}); nothing was sent.",
            hint="Check SpecificCharacterSet on the camera.",
            study=text_of(source, "StudyInstanceUID"),
        ) from None
    data = buffer.getvalue()
    again = pydicom.dcmread(BytesIO(data))
    for keyword in (*IDENTIFYING, *_TYPE_2, *_DESCRIBING):
        wanted = source if keyword in IDENTIFYING else ds
        if text_of(again, keyword) != text_of(wanted, keyword):
            raise RenderError(
                f"{keyword} does not survive the source's character set; nothing was sent.",
                hint="Check SpecificCharacterSet on the camera.",
                study=text_of(source, "StudyInstanceUID"),
            )
    return data


def _plain(value: object) -> object:
    """Return a value as text or list of texts, free of the encoding it came in."""
    return [str(one) for one in value] if isinstance(value, MultiValue) else str(value)


def _set(target: Dataset, keyword: str, value: object) -> None:
    # Identity is copied as it stands: pydicom's check of the VR would refuse, or quote the value in a warning.
    tag = pydicom.datadict.tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    target[tag] = DataElement(tag, dictionary_VR(tag), value, validation_mode=pydicom.config.IGNORE)


def _is_plain(item: Dataset) -> bool:
    return all(
        not element.tag.is_private and element.VR != "SQ" and element.keyword and usable(element.keyword, element.value)
        for element in item
    )


def _is_date(text: str) -> bool:
    if re.fullmatch(r"[0-9]{8}", text) is None:
        return False
    try:
        date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return False
    return True


def _offset(text: str) -> timedelta | None:
    """Return "+0100" as a time difference, None for anything that is not an offset (PS3.3 C.12.1.1.8)."""
    match = _OFFSET.fullmatch(text)
    if match is None:
        return None
    sign, hours, minutes = match.groups()
    span = timedelta(hours=int(hours), minutes=int(minutes)) * (-1 if sign == "-" else 1)
    return span if timedelta(hours=-12) <= span <= timedelta(hours=14) and text != "-0000" else None
