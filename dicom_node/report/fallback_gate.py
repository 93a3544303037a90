"""Our own checks on a simpler report before it may leave: it says what its original says, of the same patient.

The sender, which makes it, has neither outcome nor sources at hand; but the original was compared with both by `gate`.
So what has to be the same is compared with the original, element by element, and what the short document says anew is
read. A fault is a sentence for the log: it names the element, never a value.
"""

import re
import warnings
from collections.abc import Iterator
from io import BytesIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, Comprehensive3DSRStorage, ExplicitVRLittleEndian

from dicom_node.report import codes, fallback
from dicom_node.report.fallback import content_items, name_of, value_of
from dicom_node.report.identity import text_of
from dicom_node.report.uids import fallback_uid
from dicom_node.uids import valid_uid
from pipeline import wording
from pipeline.reasons import REASONS

_REASON_CODES = frozenset(reason.code_value for reason in REASONS.values())


def check_fallback(data: bytes, original: bytes) -> tuple[str, ...]:
    """Return the faults of a simpler report, made of the checked report `original`; empty where it may leave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds, before = (pydicom.dcmread(BytesIO(one)) for one in (data, original))
            for part in (ds.file_meta, ds, before):
                part.walk(lambda _, element: None)
        except Exception as error:  # noqa: BLE001 - a parser fails in many ways on damaged bytes; each is a fault
            return (f"the object cannot be read back ({type(error).__name__})",)
        plain = text_of(ds, "SOPClassUID") == BasicTextSRStorage
        faults = [*_fallback_names_itself(ds, before), *_fallback_keeps(ds, before, plain=plain)]
        return tuple(faults + (list(_short_document_says_all(ds, before)) if plain else []))


def _fallback_names_itself(ds: Dataset, before: Dataset) -> Iterator[str]:
    sop_class_uid, uid = text_of(ds, "SOPClassUID"), text_of(ds, "SOPInstanceUID")
    if sop_class_uid not in fallback.VARIANTS:
        yield "SOPClassUID is none that a report falls back to"
    if text_of(before, "SOPClassUID") != Comprehensive3DSRStorage:
        yield "the original is not a Comprehensive 3D SR"
    if not valid_uid(uid) or uid != fallback_uid(text_of(before, "SOPInstanceUID"), sop_class_uid):
        yield "SOPInstanceUID is not the one that this result has"
    if text_of(ds.file_meta, "MediaStorageSOPClassUID") != sop_class_uid:
        yield "MediaStorageSOPClassUID is not SOPClassUID"
    if text_of(ds.file_meta, "MediaStorageSOPInstanceUID") != uid:
        yield "MediaStorageSOPInstanceUID is not SOPInstanceUID"
    if text_of(ds.file_meta, "TransferSyntaxUID") != ExplicitVRLittleEndian:
        yield "the transfer syntax is not Explicit VR Little Endian"


def _fallback_keeps(ds: Dataset, before: Dataset, *, plain: bool) -> Iterator[str]:
    """Patient, study, order, evidence, predecessors, equipment, times: all but what makes it another object."""
    differs = {"SOPClassUID", "SOPInstanceUID", "InstanceNumber"}
    if plain:
        differs |= {"ConceptNameCodeSequence", "ContentTemplateSequence", "ContentSequence"}
    for tag in sorted(set(ds.keys()) | set(before.keys())):
        keyword = pydicom.datadict.keyword_for_tag(tag)
        if keyword not in differs and (tag not in ds or tag not in before or ds[tag] != before[tag]):
            yield f"{keyword or 'a private element'} is not the original's"


def _short_document_says_all(ds: Dataset, before: Dataset) -> Iterator[str]:
    if "ContentTemplateSequence" in ds:
        yield "a document of text claims a template"
    items = list(content_items(ds))
    if any(text_of(item, "ValueType") not in ("TEXT", "CODE") for item in items):
        yield "a document of text holds another value type"
    verdicts = [word for item in content_items(before) if (word := fallback.verdict_of(item))]
    if ds.get("ConceptNameCodeSequence") != before.get(
        "SeriesDescriptionCodeSequence" if verdicts else "ConceptNameCodeSequence"
    ):
        yield "the title is not the description of the series, or of a note not its own"
    if [word for item in items if (word := fallback.verdict_of(item))] != verdicts:
        yield "the coded verdict is not the original's"
    said = [text_of(item, "TextValue") for item in items]
    sentences = [text_of(item, "TextValue") for item in content_items(before) if name_of(item) == codes.COMMENT.value]
    anew = [(name_of(item), text) for item, text in zip(items, said, strict=True) if text not in sentences]
    words = [word for _, text in anew for word in re.findall(r"[A-Z]+", text) if word in wording.VERDICTS.values()]
    if words != [wording.VERDICTS[word] for word in verdicts]:
        yield "the verdict in words is not the original's"
    numbers = [item for item in content_items(before) if fallback.parameters_of(item)]
    expected = [
        (
            name_of(item),
            f"Probability {text_of(item.MeasuredValueSequence[0], 'NumericValue')} %"
            f" ({'; '.join(fallback.parameters_of(item))})",
        )
        for item in numbers
    ]
    if [(name, text) for name, text in anew if "Probability " in text] != expected:
        yield "the probability against its threshold is not the original's"
    if any(name_of(item) == codes.PROBABILITY.value for item in items) and not numbers:
        yield "a scan that was not analysed carries a probability"
    if not set(sentences) <= set(said):
        yield "a sentence of the original is missing"
    if wording.REVIEW not in said:
        yield "the disclaimer is missing"
    if not all(any(view in text for text in said) for view in fallback.views_of(before)):
        yield "a view that was judged is not named"
    refused = [
        (name_of(item), value_of(item))
        for item in content_items(before)
        if value_of(item) == codes.NONE_SUCCEEDED.value
    ]
    if [(name_of(item), value_of(item)) for item in items if value_of(item) == codes.NONE_SUCCEEDED.value] != refused:
        yield "whether an algorithm succeeded is not as in the original"
    if len(verdicts) + len(refused) != 1:
        yield "there is not either a verdict or the statement that there is none"
    reasons = {value_of(item) for item in content_items(before) if value_of(item) in _REASON_CODES}
    if refused and {value_of(item) for item in items} & reasons != reasons:
        yield "the note does not carry the code of its reason"
