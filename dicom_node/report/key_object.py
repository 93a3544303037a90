"""The withdrawal of results that were sent: a Key Object Selection that rejects them (PS3.3 A.35.4, PS3.16 TID 2010).

Archives that follow IHE IOCM hide what such a document names; every other one shows it beside the results. It stands
in their study, under the identity they were sent with, because that is where a reader finds them. `render` is pure: the
same results, reason and moment give the same bytes. `check` reads them back before they may leave.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from types import MappingProxyType
from typing import Literal
from zoneinfo import ZoneInfo

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_node.report import equipment, identity, uids
from dicom_node.report.context import RenderError
from dicom_node.report.identity import text_of
from pipeline import wording

SOP_CLASS_UID = "1.2.840.10008.5.1.4.1.1.88.59"

Why = Literal["safety", "quality"]

TITLES: Mapping[Why, Code] = MappingProxyType(
    {
        "safety": Code("113037", "DCM", "Rejected for Patient Safety Reasons"),
        "quality": Code("113001", "DCM", "Rejected for Quality Reasons"),
    }
)
"""CID 7010."""

_DESCRIPTION = Code("113012", "DCM", "Key Object Description")
_OBSERVER_TYPE = Code("121005", "DCM", "Observer Type")
_DEVICE = Code("121007", "DCM", "Device")
_DEVICE_UID = Code("121012", "DCM", "Device Observer UID")


@dataclass(frozen=True, slots=True)
class KeyObject:
    """A complete Part 10 file, Explicit VR Little Endian."""

    sop_instance_uid: str
    series_instance_uid: str
    data: bytes


def render(
    results: Sequence[Dataset], *, why: Why, reason: str, at: datetime, timezone: ZoneInfo, ae_title: str, version: str
) -> KeyObject:
    """Return the document that rejects `results`, sent objects of one study and patient. `at` is aware.

    Raises
    ------
    RenderError: there are none, they are not of one study and patient, or their character set cannot carry `reason`.
    """
    ordered = sorted(results, key=lambda ds: text_of(ds, "SOPInstanceUID"))
    if len({_whose(ds) for ds in ordered}) != 1:
        raise RenderError("results of one patient and study are withdrawn together, and no others")
    first = ordered[0]
    naming = [[text_of(ds, "SOPInstanceUID") for ds in ordered], why, reason, at.isoformat()]
    ds = Dataset()
    identity.copy_identity(first, ds)
    ds.SOPClassUID = UID(SOP_CLASS_UID)
    ds.SOPInstanceUID = UID(uids.derived_uid(uids.NODE_NAMESPACE, "recall", naming))
    ds.SeriesInstanceUID = UID(uids.derived_uid(uids.NODE_NAMESPACE, "recall series", naming))
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "KO", 9139, 1
    ds.SeriesDescription = "Remnant results withdrawn"
    ds.ReferencedPerformedProcedureStepSequence = []
    ds.Manufacturer, ds.ManufacturerModelName = equipment.MANUFACTURER, equipment.MODEL_NAME
    ds.DeviceSerialNumber = wording.ascii_text(ae_title)[:64]
    ds.SoftwareVersions = wording.ascii_text(version)[:64]
    ds.StationName = wording.ascii_text(ae_title)[:16]
    made_at = at.astimezone(timezone)
    if text_of(first, "TimezoneOffsetFromUTC"):
        ds.TimezoneOffsetFromUTC = text_of(first, "TimezoneOffsetFromUTC")
        made_at = at.astimezone(datetime.strptime(ds.TimezoneOffsetFromUTC, "%z").tzinfo)
    for group in ("Content", "InstanceCreation", "Series"):
        setattr(ds, f"{group}Date", made_at.strftime("%Y%m%d"))
        setattr(ds, f"{group}Time", made_at.strftime("%H%M%S.%f"))
    ds.CurrentRequestedProcedureEvidenceSequence = [_evidence(ordered)]
    _content(ds, ordered, TITLES[why], reason, uids.derived_uid(uids.NODE_NAMESPACE, "device", ae_title))
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = UID(uids.IMPLEMENTATION_CLASS_UID)
    ds.file_meta.ImplementationVersionName = wording.ascii_text(f"REMNANT_{version}")[:16]
    made = KeyObject(str(ds.SOPInstanceUID), str(ds.SeriesInstanceUID), identity.encoded(ds, first))
    faults = check(made, ordered, why=why, reason=reason)
    if faults:
        raise RenderError(f"the withdrawal did not pass its own checks: {'; '.join(faults)}")
    return made


def check(made: KeyObject, results: Sequence[Dataset], *, why: Why, reason: str) -> tuple[str, ...]:
    """Return what is wrong with a withdrawal, read back from its bytes; empty where it may leave."""
    ds = pydicom.dcmread(BytesIO(made.data))
    faults = [
        f"{keyword} is not that of the results"
        for keyword in (*identity.IDENTIFYING, "PatientBirthDate", "PatientSex", "SpecificCharacterSet")
        if text_of(ds, keyword) != text_of(results[0], keyword)
    ]
    if (text_of(ds, "SOPClassUID"), text_of(ds, "SOPInstanceUID")) != (SOP_CLASS_UID, made.sop_instance_uid):
        faults.append("class or instance is not that of the record")
    title = ds.ConceptNameCodeSequence[0]
    if (title.CodeValue, title.CodeMeaning) != (TITLES[why].value, TITLES[why].meaning):
        faults.append("the title is not that of the reason")
    wanted = sorted((text_of(one, "SOPClassUID"), text_of(one, "SOPInstanceUID")) for one in results)
    named = [sop for item in ds.ContentSequence for sop in item.get("ReferencedSOPSequence") or ()]
    listed = [
        sop
        for study in ds.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for sop in series.ReferencedSOPSequence
    ]
    for references in (named, listed):
        if sorted((str(sop.ReferencedSOPClassUID), str(sop.ReferencedSOPInstanceUID)) for sop in references) != wanted:
            faults.append("the references are not the results that were sent")
    if [text_of(item, "TextValue") for item in ds.ContentSequence if item.ValueType == "TEXT"] != [reason]:
        faults.append("the reason does not survive the character set of the results")
    if any(element.tag.is_private for element in ds):
        faults.append("a private element is there")
    return tuple(faults)


def _whose(ds: Dataset) -> tuple[str, ...]:
    return tuple(text_of(ds, keyword) for keyword in identity.IDENTIFYING)


def _evidence(results: Sequence[Dataset]) -> Dataset:
    by_series: dict[str, list[Dataset]] = {}
    for ds in results:
        by_series.setdefault(text_of(ds, "SeriesInstanceUID"), []).append(_reference(ds))
    study = Dataset()
    study.StudyInstanceUID = results[0].StudyInstanceUID
    study.ReferencedSeriesSequence = []
    for uid, references in sorted(by_series.items()):
        series = Dataset()
        series.SeriesInstanceUID = UID(uid)
        series.ReferencedSOPSequence = references
        study.ReferencedSeriesSequence.append(series)
    return study


def _reference(ds: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = ds.SOPClassUID
    item.ReferencedSOPInstanceUID = ds.SOPInstanceUID
    return item


def _content(ds: Dataset, results: Sequence[Dataset], title: Code, reason: str, device_uid: str) -> None:
    ds.ValueType, ds.ContinuityOfContent = "CONTAINER", "SEPARATE"
    ds.ConceptNameCodeSequence = [equipment.code_item(title)]
    template = Dataset()
    template.MappingResource, template.TemplateIdentifier = "DCMR", "2010"
    ds.ContentTemplateSequence = [template]
    observer = _item("HAS OBS CONTEXT", "CODE", _OBSERVER_TYPE)
    observer.ConceptCodeSequence = [equipment.code_item(_DEVICE)]
    device = _item("HAS OBS CONTEXT", "UIDREF", _DEVICE_UID)
    device.UID = UID(device_uid)
    described = _item("CONTAINS", "TEXT", _DESCRIPTION)
    described.TextValue = reason
    ds.ContentSequence = [observer, device, described]
    for result in results:
        named = _item("CONTAINS", "COMPOSITE" if text_of(result, "Modality") == "SR" else "IMAGE", None)
        named.ReferencedSOPSequence = [_reference(result)]
        ds.ContentSequence.append(named)


def _item(relationship: str, value_type: str, name: Code | None) -> Dataset:
    item = Dataset()
    item.RelationshipType, item.ValueType = relationship, value_type
    if name is not None:
        item.ConceptNameCodeSequence = [equipment.code_item(name)]
    return item
