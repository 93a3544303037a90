"""Simpler reports, for an archive that does not take a Comprehensive 3D SR: made from that report's stored bytes.

Comprehensive SR and Enhanced SR (PS3.3 A.35.3, A.35.2) carry the same TID 1500 tree under another class: it uses no
value type or relationship that they lack. Basic Text SR (A.35.1) has neither NUM nor SCOORD, so it is a short document
of its own, TEXT and CODE only, that claims no template. Whatever the document does not have to change stays as it is
encoded: patient, study, evidence, predecessors, equipment, times, character set.

All of a scan's reports stand in one series: they are of one modality and one equipment (PS3.3 A.1.2.3), and an archive
gets only one of them. `derive` is a pure function, the same input gives the same bytes; what cannot be derived
truthfully raises `RenderError`.
"""

import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from io import BytesIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.sr.coding import Code
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
)

from dicom_node.report import codes
from dicom_node.report.context import RenderedResult, RenderError
from dicom_node.report.equipment import code_item
from dicom_node.report.identity import text_of
from dicom_node.report.uids import fallback_uid
from pipeline import wording

VARIANTS = {
    str(ComprehensiveSRStorage): "comprehensive",
    str(EnhancedSRStorage): "enhanced",
    str(BasicTextSRStorage): "basic_text",
}
"""SOP class -> what tells it apart among the results of kind "sr", in the order of the chain."""

_FINDING = Code("121071", "DCM", "Finding")
_HEADING = ("HAS CONCEPT MOD", "HAS OBS CONTEXT")
_PLAIN = ("TEXT", "CODE")


def derive(original: bytes, sop_class_uid: str) -> RenderedResult:
    """Return the report `original` (a Part 10 file, Comprehensive 3D SR of ours) as an object of another class.

    Raises
    ------
    RenderError: the class is none of the chain, or the original is not such a report.
    """
    if sop_class_uid not in VARIANTS:
        raise RenderError(f"{sop_class_uid} is not a class that a report can fall back to.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning would quote the value it warns of
        try:
            ds = pydicom.dcmread(BytesIO(original))
        except InvalidDicomError:
            raise RenderError("the stored report cannot be read; no simpler one was made from it.") from None
        if text_of(ds, "SOPClassUID") != Comprehensive3DSRStorage:
            raise RenderError("a simpler report is made only from a Comprehensive 3D SR.")
        if sop_class_uid == BasicTextSRStorage:
            _make_plain(ds)
        sop_instance_uid = fallback_uid(text_of(ds, "SOPInstanceUID"), sop_class_uid)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID(sop_class_uid)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
        # Tells the documents apart where an archive that got one and an archive that got another exchange them.
        ds.InstanceNumber = 2 + list(VARIANTS).index(sop_class_uid)
        buffer = BytesIO()
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return RenderedResult(
        kind="sr",
        variant=VARIANTS[sop_class_uid],
        sop_class_uid=sop_class_uid,
        sop_instance_uid=sop_instance_uid,
        series_instance_uid=text_of(ds, "SeriesInstanceUID"),
        data=buffer.getvalue(),
    )


def _make_plain(ds: Dataset) -> None:
    """Replace the measurement report by the short document.

    Its title is the description of the series, not (126000, DCM): under that title readers expect TID 1500, and find
    nothing to show. The title of a note says that there is no result, and stays.
    """
    heading = [deepcopy(item) for item in ds.ContentSequence if _is_plain(item)]
    said = [deepcopy(item) for item in content_items(ds) if name_of(item) == codes.COMMENT.value and _contained(item)]
    verdicts = [item for item in content_items(ds) if verdict_of(item)]
    if verdicts:
        answer = _finding(ds, verdicts)
    else:
        # A note has no group, so its coded statements are the summary and, under whatever code a site uses, the reason.
        answer = [deepcopy(item) for item in content_items(ds) if _contained(item) and item.ValueType == "CODE"]
        if len(answer) != 2 or value_of(answer[0]) != codes.NONE_SUCCEEDED.value:
            raise RenderError("the stored report holds neither a verdict nor a reason for having none.")
    if verdicts:
        ds.ConceptNameCodeSequence = deepcopy(ds.SeriesDescriptionCodeSequence)
    del ds.ContentTemplateSequence
    ds.ContentSequence = [*heading, *answer, *said]


def _finding(ds: Dataset, verdicts: Sequence[Dataset]) -> list[Dataset]:
    """Return verdict, probability and views: coded as in the original, and in words."""
    judged = [item for item in content_items(ds) if parameters_of(item)]
    if len(verdicts) != 1 or len(judged) != 1:
        raise RenderError("the stored report does not hold one verdict and one probability.")
    number = text_of(judged[0].MeasuredValueSequence[0], "NumericValue")
    verdict = wording.VERDICTS[verdict_of(verdicts[0])]
    named = deepcopy(judged[0].ConceptNameCodeSequence)
    views = " and ".join(views_of(ds))
    return [
        deepcopy(verdicts[0]),
        _text([code_item(_FINDING)], f"Residual thyroid tissue: {verdict}"),
        _text(named, f"Probability {number} % ({'; '.join(parameters_of(judged[0]))})"),
        _text([code_item(codes.COMMENT)], f"Judged from: {views}."),
    ]


# --- Reading a report of ours (the gate reads with the same functions) -----------------------------------------------


def content_items(ds: Dataset) -> Iterator[Dataset]:
    """Yield every content item below the root, in reading order."""
    for item in ds.get("ContentSequence") or ():
        yield item
        yield from content_items(item)


def name_of(item: Dataset) -> str:
    """Return the code value of an item's concept name, "" where it has none."""
    named = item.get("ConceptNameCodeSequence")
    return text_of(named[0], "CodeValue") if named else ""


def value_of(item: Dataset) -> str:
    """Return the code value that a CODE item gives, "" where it gives none."""
    coded = item.get("ConceptCodeSequence")
    return text_of(coded[0], "CodeValue") if coded else ""


def verdict_of(item: Dataset) -> str:
    """Return which verdict a CODE item gives, "" where it gives none."""
    said = value_of(item)
    return next((word for word, code in codes.VERDICTS.items() if code.value == said), "")


def parameters_of(item: Dataset) -> tuple[str, ...]:
    """Return the limits that a NUM was judged by (TID 4019, Algorithm Parameters): it is the probability, or there are
    none."""
    if text_of(item, "ValueType") != "NUM":
        return ()
    said = [text_of(child, "TextValue") for child in item.get("ContentSequence") or ()]
    return tuple(text for text in said if text.startswith(("threshold ", "undetermined from ")))


def views_of(ds: Dataset) -> tuple[str, ...]:
    """Return the views that were judged, by the tracking identifiers of their groups."""
    labels = [text_of(item, "TextValue") for item in content_items(ds) if name_of(item) == "112039"]
    return tuple(label.rpartition(", ")[2] for label in labels)


def _is_plain(item: Dataset) -> bool:
    return text_of(item, "RelationshipType") in _HEADING and text_of(item, "ValueType") in _PLAIN


def _contained(item: Dataset) -> bool:
    return text_of(item, "RelationshipType") == "CONTAINS" and text_of(item, "ValueType") in _PLAIN


def _text(named: Sequence[Dataset], text: str) -> Dataset:
    item = Dataset()
    item.RelationshipType = "CONTAINS"
    item.ValueType = "TEXT"
    item.ConceptNameCodeSequence = named
    item.TextValue = text
    return item
