"""Who made a result: this node in General Equipment, the algorithm in Contributing Equipment (PS3.3 C.7.5.1, C.12.1).

IHE AI Results wants one Contributing Equipment item for each algorithm, equal to what the content tree says of it.
"""

from datetime import datetime

from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from dicom_node.report import codes
from dicom_node.report.context import ReportContext
from dicom_node.report.uids import NODE_NAMESPACE, derived_uid
from pipeline import wording
from pipeline.finding import Declined, Finding, ModelFacts

MANUFACTURER = "Remnant"
MODEL_NAME = "Remnant"
SERIES_NUMBERS = {"sr": 9131, "sc": 9132, "seg": 9133}
"""High, so that a workstation lists results behind the camera's own series."""

_RELEASE_PREFIX = {"demonstration": "DEMONSTRATION ", "research": "RESEARCH ", "local": ""}


def model_of(outcome: Finding | Declined, context: ReportContext) -> ModelFacts | None:
    """Return the weights that a result names: those that judged, or for a note those the node runs."""
    return outcome.model if isinstance(outcome, Finding) else context.model


def serial_number(context: ReportContext) -> str:
    """Return DeviceSerialNumber, at most 64 characters (LO)."""
    return wording.ascii_text(context.device_serial_number or context.ae_title)[:64]


def algorithm_version(model: ModelFacts) -> str:
    """Return the version as the content tree gives it: retrained weights are another version."""
    return wording.ascii_text(f"{model.version} sha256:{model.sha256}")


def series_description(outcome: Finding | Declined, context: ReportContext) -> str:
    """Return what a list of series shows: the release, and that a scan was not analysed; never the verdict."""
    model = model_of(outcome, context)
    prefix = _RELEASE_PREFIX[model.release] if model else ""
    return prefix + "Remnant I-131 neck" + (" NOT ANALYSED" if isinstance(outcome, Declined) else " AI result")


def add_equipment(ds: Dataset, outcome: Finding | Declined, context: ReportContext, made_at: datetime) -> None:
    """Write the equipment, the coding schemes and the description of the series."""
    ds.Manufacturer = MANUFACTURER
    ds.ManufacturerModelName = MODEL_NAME
    ds.DeviceSerialNumber = serial_number(context)
    ds.SoftwareVersions = wording.ascii_text(context.software_version)[:64]
    ds.StationName = wording.ascii_text(context.ae_title)[:16]
    ds.SeriesDescription = series_description(outcome, context)
    ds.SeriesDescriptionCodeSequence = [code_item(codes.chosen(codes.ANALYSIS, context.codes))]
    scheme = Dataset()
    scheme.CodingSchemeDesignator = codes.PRIVATE_SCHEME
    scheme.CodingSchemeUID = codes.PRIVATE_SCHEME_UID
    scheme.CodingSchemeName = "Remnant"
    scheme.CodingSchemeResponsibleOrganization = MANUFACTURER
    ds.CodingSchemeIdentificationSequence = [scheme]
    model = model_of(outcome, context)
    if model is not None:
        ds.ContributingEquipmentSequence = [_algorithm(model, made_at, ran=isinstance(outcome, Finding))]


def code_item(code: Code) -> Dataset:
    """Return a coded concept as an item of a code sequence (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue = wording.ascii_text(code.value)
    item.CodingSchemeDesignator = wording.ascii_text(code.scheme_designator)
    item.CodeMeaning = wording.ascii_text(code.meaning)
    return item


def _algorithm(model: ModelFacts, made_at: datetime, *, ran: bool) -> Dataset:
    """Return the algorithm's item; DeviceUID comes from the digest, so that retraining changes it."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code_item(codes.PROCESSING_EQUIPMENT)]
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = wording.ascii_text(model.name)[:64]
    # The digest has exactly the 64 characters that an LO value may have.
    item.SoftwareVersions = [wording.ascii_text(model.version)[:64], model.sha256]
    item.DeviceUID = derived_uid(NODE_NAMESPACE, "algorithm", model.sha256)
    item.ContributionDateTime = made_at.strftime("%Y%m%d%H%M%S.%f%z")
    judged = "Judged the views." if ran else "Configured, gave no result for this scan."
    item.ContributionDescription = " ".join([judged, wording.REVIEW, *wording.model_lines(model)])[:1024]
    return item
