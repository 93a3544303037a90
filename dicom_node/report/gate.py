"""Our own checks on the bytes of a result before it may leave: right patient, right verdict, nothing unsaid.

Public validators check structure and pass a wrong patient, a probability of 870 % or a missing disclaimer. So every
object is read back here from its bytes and compared with the outcome and the sources it claims to come from. A fault is
a sentence for the log: it names the element, never a value that could identify somebody. Each check is a function of
one `_Case`; a check that is missing here is a fault that nobody finds.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.report import codes, equipment, identity, secondary_capture, segmentation, structured_report
from dicom_node.report.context import Predecessor, RenderedResult, ReportContext
from dicom_node.report.identity import text_of
from dicom_node.report.rendering import MODALITIES, SOP_CLASSES, result_naming, result_uids
from dicom_node.uids import valid_uid
from pipeline import wording
from pipeline.finding import Declined, Finding, ViewFinding
from pipeline.reasons import REASONS


@dataclass(frozen=True, slots=True)
class _Case:
    """One object under scrutiny: what was read back, and what it has to agree with."""

    ds: Dataset
    result: RenderedResult
    sources: tuple[Dataset, ...]
    outcome: Finding | Declined
    context: ReportContext


_Check = Callable[[_Case], Iterator[str]]
_Key = tuple[str, str]


def check(
    result: RenderedResult, sources: Sequence[Dataset], outcome: Finding | Declined, context: ReportContext
) -> tuple[str, ...]:
    """Return the faults of a result, empty where it may leave.

    Raises
    ------
    RenderError: the sources themselves disagree on whose they are.
    """
    with warnings.catch_warnings():
        # As in `render`: a warning would quote the value it warns of.
        warnings.simplefilter("ignore")
        ordered = identity.in_one_order(sources)
        try:
            ds = pydicom.dcmread(BytesIO(result.data))
            for part in (ds.file_meta, ds):
                part.walk(lambda _, element: None)  # decodes every element, so that a damaged one shows here
        except Exception as error:  # noqa: BLE001 - a parser fails in many ways on damaged bytes; each is a fault
            return (f"the object cannot be read back ({type(error).__name__})",)
        case = _Case(ds, result, ordered, outcome, context)
        return tuple(fault for one in (*_COMMON, *_BY_KIND[result.kind]) for fault in one(case))


# --- Any object ------------------------------------------------------------------------------------------------------


def _patient_is_the_sources(case: _Case) -> Iterator[str]:
    source = case.sources[0]
    for keyword in identity.IDENTIFYING:
        if text_of(case.ds, keyword) != text_of(source, keyword):
            yield f"{keyword} is not the source's"
    for keyword in ("PatientBirthDate", "PatientSex"):
        known = text_of(source, keyword) if identity.usable(keyword, source.get(keyword)) else ""
        if text_of(case.ds, keyword) != known:
            yield f"{keyword} is not the source's"
    terms = identity.defined_terms(case.ds)
    if terms is None:
        yield "SpecificCharacterSet is not known to the standard"
    elif terms != (identity.defined_terms(source) or ()):
        yield "SpecificCharacterSet is not the source's"


def _identity_is_the_accepted(case: _Case) -> Iterator[str]:
    """Where a person accepted an identity, the result has it whatever the sources say, and tells what it replaced."""
    accepted = case.context.accepted
    modified = [
        item.get("ModifiedAttributesSequence") or [Dataset()]
        for item in case.ds.get("OriginalAttributesSequence") or ()
    ]
    if accepted is None:
        if modified:
            yield "OriginalAttributesSequence is there, and nobody accepted another identity"
        return
    whose = accepted.identity
    expected = {
        "PatientID": whose.patient_id,
        "PatientName": whose.patient_name,
        "AccessionNumber": whose.accession_number,
        "StudyInstanceUID": whose.study_instance_uid,
    }
    for keyword, value in expected.items():
        if text_of(case.ds, keyword) != value:
            yield f"{keyword} is not the accepted one"
    if whose.issuer_of_patient_id and text_of(case.ds, "IssuerOfPatientID") != whose.issuer_of_patient_id:
        yield "IssuerOfPatientID is not the accepted one"
    if len(modified) != 1 or len(modified[0]) != 1 or not len(modified[0][0]):
        yield "OriginalAttributesSequence does not keep what was received"
        return
    for element in modified[0][0]:
        if text_of(case.ds, element.keyword) == text_of(modified[0][0], element.keyword):
            yield f"OriginalAttributesSequence keeps {element.keyword}, which was not replaced"


def _uids_are_ours(case: _Case) -> Iterator[str]:
    variant, sop_instance_uid, series_instance_uid = result_uids(
        case.outcome, case.sources, case.context, case.result.kind
    )
    own = {"SOPInstanceUID": sop_instance_uid, "SeriesInstanceUID": series_instance_uid}
    taken = {text_of(ds, keyword) for ds in case.sources for keyword in (*own, "StudyInstanceUID")}
    for keyword, expected in own.items():
        uid = text_of(case.ds, keyword)
        if not valid_uid(uid):
            yield f"{keyword} is not a UID"
        elif uid in taken:
            yield f"{keyword} is a UID of the sources"
        elif uid != expected:
            yield f"{keyword} is not the one that this result has"
    recorded = (case.result.variant, case.result.sop_instance_uid, case.result.series_instance_uid)
    if recorded != (variant, sop_instance_uid, series_instance_uid):
        yield "the record of the result names another object"


def _file_agrees_with_dataset(case: _Case) -> Iterator[str]:
    meta = case.ds.file_meta
    expected = SOP_CLASSES[case.result.kind]
    if not text_of(case.ds, "SOPClassUID") == text_of(meta, "MediaStorageSOPClassUID") == expected:
        yield "SOPClassUID is not that of its kind"
    if case.result.sop_class_uid != expected:
        yield "the record of the result names another SOP class"
    if text_of(meta, "MediaStorageSOPInstanceUID") != text_of(case.ds, "SOPInstanceUID"):
        yield "MediaStorageSOPInstanceUID is not SOPInstanceUID"
    if text_of(meta, "TransferSyntaxUID") != ExplicitVRLittleEndian:
        yield "the transfer syntax is not Explicit VR Little Endian"
    if text_of(case.ds, "Modality") != MODALITIES[case.result.kind]:
        yield "Modality is not that of its kind"


def _no_private_elements(case: _Case) -> Iterator[str]:
    if any(element.tag.is_private for item in _every_item(case.ds) for element in item):
        yield "a private element is there"


def _references_resolve(case: _Case) -> Iterator[str]:
    """Every reference names a source, by its class, and a frame that it has; predecessors stand apart."""
    frames = {text_of(ds, "SOPInstanceUID"): (text_of(ds, "SOPClassUID"), _number_of_frames(ds)) for ds in case.sources}
    named = set()
    for item in _every_item(case.ds, but=("PredecessorDocumentsSequence",)):
        uid = text_of(item, "ReferencedSOPInstanceUID")
        if not uid:
            continue
        if uid not in frames:
            yield "a reference is not one of the sources"
            continue
        named.add(uid)
        sop_class_uid, count = frames[uid]
        if text_of(item, "ReferencedSOPClassUID") != sop_class_uid:
            yield "a reference names another SOP class than the source has"
        numbers = item.get("ReferencedFrameNumber")
        if not all(text.isdecimal() and 1 <= int(text) <= count for text in map(str, _as_list(numbers))):
            yield "a referenced frame does not exist"
    # A segmentation shows one view, the other kinds answer for all of them; _mask_is_on_its_frame says which.
    if named != set(frames) and case.result.kind != "seg":
        yield "a source is not referenced"


def _predecessors_are_named(case: _Case) -> Iterator[str]:
    found = {
        (text_of(sop, "ReferencedSOPClassUID"), text_of(sop, "ReferencedSOPInstanceUID"))
        for study in case.ds.get("PredecessorDocumentsSequence") or ()
        for series in study.get("ReferencedSeriesSequence") or ()
        for sop in series.get("ReferencedSOPSequence") or ()
    }
    before = {Predecessor(*one)[:2] for one in case.context.predecessors} if case.result.kind == "sr" else set()
    if found != before:
        yield "PredecessorDocumentsSequence does not name the earlier results"


def _times_agree(case: _Case) -> Iterator[str]:
    made_at = identity.local_time(case.sources[0], case.context)
    if text_of(case.ds, "ContentDate") != made_at.strftime("%Y%m%d"):
        yield "ContentDate is not the day of the analysis"
    if text_of(case.ds, "ContentTime") != made_at.strftime("%H%M%S.%f"):
        yield "ContentTime is not the time of the analysis"
    offset = text_of(case.ds, "TimezoneOffsetFromUTC")
    if offset and offset != text_of(case.sources[0], "TimezoneOffsetFromUTC"):
        yield "TimezoneOffsetFromUTC is not the source's"
    if offset and made_at.utcoffset() != _span(offset):
        yield "ContentTime is not in the object's own TimezoneOffsetFromUTC"


def _dates_exist(case: _Case) -> Iterator[str]:
    for item in _every_item(case.ds):
        for element in item:
            if element.VR == "DA" and str(element.value or "") and not identity.usable("StudyDate", element.value):
                yield f"{element.keyword} is not a date"


def _names_model(case: _Case) -> Iterator[str]:
    model = equipment.model_of(case.outcome, case.context)
    if model is None:
        return
    items = case.ds.get("ContributingEquipmentSequence") or ()
    versions = [_as_list(item.get("SoftwareVersions")) for item in items if text_of(item, "DeviceUID")]
    if [wording.ascii_text(model.version)[:64], model.sha256] not in versions:
        yield "ContributingEquipmentSequence does not name the model's version and digest"


def _says_what_a_reader_must_know(case: _Case) -> Iterator[str]:
    said = _text(case)
    if wording.REVIEW not in said:
        yield "the disclaimer is missing"
    model = equipment.model_of(case.outcome, case.context)
    if model is None:
        return
    if model.sha256 not in said or wording.ascii_text(model.version) not in said:
        yield "the text does not name the model's version and digest"
    if wording.ascii_text(model.trained_on.rstrip(".")) not in said:
        yield "what the model was trained on is missing"
    if wording.RELEASES[model.release] not in said:
        yield "what the release allows is missing"
    description = text_of(case.ds, "SeriesDescription")
    for release in ("demonstration", "research"):
        if (release.upper() in description) != (model.release == release):
            yield f"SeriesDescription and release disagree on {release}"


def _series_says_not_analysed(case: _Case) -> Iterator[str]:
    refused = "NOT ANALYSED" in text_of(case.ds, "SeriesDescription")
    if refused != isinstance(case.outcome, Declined):
        yield "SeriesDescription and outcome disagree on whether the scan was analysed"


def _codes_mean_what_they_say(case: _Case) -> Iterator[str]:
    """A code of ours or of the standard has its own meaning beside it: readers see only the meaning."""
    meanings = dict(_MEANINGS)
    for code in codes.OURS:
        mapped = codes.chosen(code, case.context.codes)
        meanings[mapped.value, mapped.scheme_designator] = wording.ascii_text(mapped.meaning)
    for item in _every_item(case.ds):
        value, scheme = text_of(item, "CodeValue"), text_of(item, "CodingSchemeDesignator")
        if value and (value, scheme) in meanings and text_of(item, "CodeMeaning") != meanings[value, scheme]:
            yield f"code ({value}, {scheme}) has another meaning"
        if value and scheme == codes.PRIVATE_SCHEME and (value, scheme) not in meanings:
            yield f"code ({value}, {scheme}) does not exist"


def _private_scheme_is_identified(case: _Case) -> Iterator[str]:
    schemes = {
        text_of(item, "CodingSchemeDesignator"): text_of(item, "CodingSchemeUID")
        for item in case.ds.get("CodingSchemeIdentificationSequence") or ()
    }
    if schemes.get(codes.PRIVATE_SCHEME) != codes.PRIVATE_SCHEME_UID:
        yield f"scheme {codes.PRIVATE_SCHEME} is not identified"


# --- Structured Report -----------------------------------------------------------------------------------------------


def _is_a_measurement_report(case: _Case) -> Iterator[str]:
    template = case.ds.get("ContentTemplateSequence") or [Dataset()]
    if text_of(template[0], "TemplateIdentifier") != "1500":
        yield "the document does not name TID 1500"
    called = structured_report.title(case.outcome, case.context)
    if _name(case.ds) != (called.value, called.scheme_designator):
        yield "the document's title is not that of a finding, or of a scan not analysed"
    flags = ("CompletionFlag", "COMPLETE"), ("VerificationFlag", "UNVERIFIED"), ("PreliminaryFlag", "PRELIMINARY")
    for keyword, value in flags:
        if text_of(case.ds, keyword) != value:
            yield f"{keyword} is not {value}"
    reported = [_value(item) for item in _tree(case.ds) if _name(item) == _key(codes.PROCEDURE_REPORTED)]
    if reported != [_key(codes.PROCEDURE)]:
        yield "the procedure reported is missing or another"


def _verdict_stands_once(case: _Case) -> Iterator[str]:
    verdicts = {_key(code): word for word, code in codes.VERDICTS.items()}
    said = [(_name(item), verdicts[key]) for item in _tree(case.ds) if (key := _value(item)) in verdicts and key]
    if isinstance(case.outcome, Declined):
        if said:
            yield "a scan that was not analysed carries a verdict"
        return
    question = _key(codes.chosen(codes.RESIDUAL_TISSUE, case.context.codes))
    if said != [(question, case.outcome.finding)]:
        yield "the verdict is not that of the finding, said once"


def _verdict_fits_probability(case: _Case) -> Iterator[str]:
    if isinstance(case.outcome, Declined):
        return
    p, threshold, band = case.outcome.probability, case.outcome.threshold, case.outcome.undetermined_band
    fits = {
        "present": p >= threshold,
        "absent": p < threshold,
        "undetermined": band is not None and band[0] <= p <= band[1],
    }
    if not fits.get(case.outcome.finding, False):
        yield "verdict, probability and threshold contradict one another"


def _probability_is_the_findings(case: _Case) -> Iterator[str]:
    question = _key(codes.chosen(codes.PROBABILITY, case.context.codes))
    # A site that maps the code, and one that does not: neither may appear for a scan that was not analysed.
    items = [item for item in _tree(case.ds) if _name(item) in (question, _key(codes.PROBABILITY))]
    if isinstance(case.outcome, Declined):
        if items:
            yield "a scan that was not analysed carries a probability"
        return
    if len(items) != 1 or _name(items[0]) != question:
        yield "the probability does not stand exactly once"
        return
    measured = items[0].get("MeasuredValueSequence") or [Dataset()]
    unit = measured[0].get("MeasurementUnitsCodeSequence") or [Dataset()]
    if _key_of(unit[0]) != _key(codes.PER_CENT):
        yield "the unit of the probability is not (%, UCUM)"
    number = _decimal(text_of(measured[0], "NumericValue"))
    if number is None or not 0 <= number <= 100:
        yield "the probability is not within 0 to 100"
    elif abs(number - 100 * case.outcome.probability) > 0.0151:  # two decimals, on its side of the limits
        yield "the probability is not that of the finding"
    elif (number in (0, 100)) != (case.outcome.probability in (0, 1)):
        yield "the probability reads as certainty"


def _algorithm_is_identified(case: _Case) -> Iterator[str]:
    if isinstance(case.outcome, Declined):
        return
    model = case.outcome.model
    expected = {
        codes.ALGORITHM_NAME: wording.ascii_text(model.name),
        codes.ALGORITHM_VERSION: equipment.algorithm_version(model),
    }
    for code, text in expected.items():
        if [text_of(item, "TextValue") for item in _tree(case.ds) if _name(item) == _key(code)] != [text]:
            yield f"{code.meaning} is missing or another"


def _refusal_says_so(case: _Case) -> Iterator[str]:
    values = [_value(item) for item in _tree(case.ds)]
    if any(scheme == "DCM" and value in codes.SUCCEEDED for value, scheme in filter(None, values)):
        yield "a code says that an algorithm succeeded"
    refused = values.count(_key(codes.NONE_SUCCEEDED))
    if isinstance(case.outcome, Finding):
        if refused:
            yield "a finding says that no algorithm succeeded"
        return
    if refused != 1:
        yield "the note does not say that no algorithm succeeded"
    if ("DCM", REASONS[case.outcome.reason].code_value) not in {(key[1], key[0]) for key in values if key}:
        yield "the note does not carry the code of its reason"
    if wording.reason_line(case.outcome) not in _text(case):
        yield "the note does not say its reason in words"


def _groups_match_views(case: _Case) -> Iterator[str]:
    groups = [item for item in _tree(case.ds) if _name(item) == _key(codes.MEASUREMENT_GROUP)]
    views = case.outcome.views if isinstance(case.outcome, Finding) else ()
    if len(groups) != len(views):
        yield "there is not one measurement group for each view"
        return
    for group, view in zip(groups, views, strict=True):
        children = list(group.get("ContentSequence") or ())
        naming = result_naming(case.outcome, case.sources, case.context)
        expected = structured_report.tracking_uid(case.context, naming, view.image.view)
        if [text_of(item, "UID") for item in children if _name(item) == _key(codes.TRACKING_UID)] != [expected]:
            yield f"the {view.image.view} group has no tracking UID, or another one"
        named = [text_of(item, "TextValue") for item in children if _name(item) == _key(codes.TRACKING_IDENTIFIER)]
        if len(named) != 1 or not named[0].endswith(f", {view.image.view} view"):
            yield f"the {view.image.view} group is not called so"
        outlines = [item for item in children if _name(item) == _key(codes.IMAGE_REGION)]
        if len(outlines) != 1 or text_of(outlines[0], "GraphicType") != "POLYLINE":
            yield f"the {view.image.view} group has no outline of its own"
            continue
        yield from _outline_faults(outlines[0], case, groups.index(group))


def _outline_faults(outline: Dataset, case: _Case, index: int) -> Iterator[str]:
    if not isinstance(case.outcome, Finding):
        return
    image = case.outcome.views[index].image
    rows, columns = image.counts.shape
    points = [float(number) for number in _as_list(outline.get("GraphicData"))]
    x, y = points[0::2], points[1::2]
    if len(points) < 8 or len(points) % 2 or (x[0], y[0]) != (x[-1], y[-1]):
        yield f"the {image.view} outline is not closed"
    if not all(0 <= one <= columns for one in x) or not all(0 <= one <= rows for one in y):
        yield f"the {image.view} outline leaves the image"
    # GraphicData is of single precision; SCOORD counts from the corner of the first pixel, ours from its centre.
    drawn = np.clip(np.asarray(case.outcome.views[index].outline, dtype=np.float64) + 0.5, 0, (columns, rows))
    if len(points) != drawn.size or not np.allclose(points, drawn.ravel(), rtol=0, atol=1e-2):
        yield f"the {image.view} outline is not the one that was drawn"
    sops = [sop for item in outline.get("ContentSequence") or () for sop in item.get("ReferencedSOPSequence") or ()]
    frame = str(image.source.frame_number) if image.source.number_of_frames > 1 else ""
    named = [(text_of(sop, "ReferencedSOPInstanceUID"), text_of(sop, "ReferencedFrameNumber")) for sop in sops]
    if named != [(image.source.sop_instance_uid, frame)]:
        yield f"the {image.view} outline is not on the frame it was seen in"


def _figures_are_the_views(case: _Case) -> Iterator[str]:
    """Every figure is its own view's, and the decision stands in the group of the view that carries it."""
    groups = [item for item in _tree(case.ds) if _name(item) == _key(codes.MEASUREMENT_GROUP)]
    if not isinstance(case.outcome, Finding) or len(groups) != len(case.outcome.views):
        return
    verdicts = {_key(code) for code in codes.VERDICTS.values()}
    probability = _key(codes.chosen(codes.PROBABILITY, case.context.codes))
    ratio = _key(codes.chosen(codes.RATIO, case.context.codes))
    for group, view in zip(groups, case.outcome.views, strict=True):
        name, found = view.image.view, case.outcome.finding == "present"
        decides = view is structured_report.deciding_view(case.outcome)
        children = list(group.get("ContentSequence") or ())
        figures = [item for item in children if text_of(item, "ValueType") == "NUM"]
        if (
            any(_value(item) in verdicts for item in children) != decides
            or any(_name(item) == probability for item in figures) != decides
        ):
            yield f"the {name} group carries the decision of another view, or lacks its own"
        has_ratio = found and view.remnant_to_background is not None and np.isfinite(view.remnant_to_background)
        # In the report's order: name, value, half of the last digit shown, unit, and whose focus it is.
        meant: list[tuple[_Key, float, float, Code, tuple[str, _Key] | None]] = []
        if found:
            meant.append((_key(codes.AREA), view.outline_area_mm2, 0.05, codes.SQUARE_MILLIMETRE, None))
        meant.append((_key(codes.MAXIMUM), float(view.maximum_counts), 0.0, codes.COUNTS, None))
        if has_ratio:
            meant.append((ratio, float(view.remnant_to_background or 0), 0.005, codes.NO_UNITS, None))
        meant += _figures_of_foci(case.outcome, view, case.context, decides=decides)
        others = [item for item in figures if _name(item) != probability]
        if [_name(item) for item in others] != [one[0] for one in meant]:
            yield f"the {name} group has not the figures of its view"
            continue
        for item, (_, value, half, unit, focus) in zip(others, meant, strict=True):
            measured = (item.get("MeasuredValueSequence") or [Dataset()])[0]
            number = _number(measured.get("NumericValue"))
            if not abs(number - value) <= half + 1e-6 * max(1.0, abs(value)):
                yield f"a figure of the {name} group is not that of its view"
            if [_key_of(one) for one in measured.get("MeasurementUnitsCodeSequence") or ()] != [_key(unit)]:
                yield f"a unit in the {name} group is not the UCUM unit of its figure"
            if _focus_of(item, case.context) != focus:
                yield f"a figure of the {name} group is not under its own focus and site"


def _figures_of_foci(
    finding: Finding, view: ViewFinding, context: ReportContext, *, decides: bool
) -> Iterator[tuple[_Key, float, float, Code, tuple[str, _Key] | None]]:
    def key(code: Code) -> _Key:
        return _key(codes.chosen(code, context.codes))

    if decides and finding.uptake is not None:
        yield key(codes.UPTAKE), finding.uptake.percent, 0.005, codes.PER_CENT, None
    if decides and finding.foci is not None:
        yield key(codes.FOCI), float(len(finding.foci)), 0.0, codes.NO_UNITS, None
    for focus in finding.foci or ():
        whose = str(focus.number), key(codes.SITES[focus.site])
        for seen in focus.views:
            if seen.view == view.image.view:
                yield key(codes.FOCUS_COUNTS), seen.counts, 0.5, codes.COUNTS, whose
                if seen.seen:
                    yield key(codes.FOCUS_AREA), seen.area_mm2, 0.5, codes.SQUARE_MILLIMETRE, whose


def _focus_of(figure: Dataset, context: ReportContext) -> tuple[str, _Key] | None:
    """Return the focus's number and its site that a figure names, None where it names neither."""
    concept = _key(codes.chosen(codes.FOCUS, context.codes))
    children = list(figure.get("ContentSequence") or ())
    named = [text_of(item, "TextValue") for item in children if _name(item) == concept]
    sites = [_value(item) for item in children if _name(item) == _key(codes.FINDING_SITE)]
    return None if not named and not sites else ("".join(named), (sites or [None])[0] or ("", ""))


# --- Secondary Capture -----------------------------------------------------------------------------------------------


def _picture_is_the_outcomes(case: _Case) -> Iterator[str]:
    """The pixels are those of this outcome: drawn again, because a picture cannot be read."""
    expected = secondary_capture.pixels(case.outcome, case.context)
    shape = (case.ds.get("Rows"), case.ds.get("Columns"), case.ds.get("SamplesPerPixel"))
    if shape != (*expected.shape[:2], 3 if expected.ndim == 3 else 1):
        yield "the picture has another size"
    elif case.ds.get("PixelData") != expected.tobytes() + b"\0" * (expected.size % 2):
        yield "the picture is not that of the outcome"
    photometric = "RGB" if expected.ndim == 3 else "MONOCHROME2"
    if text_of(case.ds, "PhotometricInterpretation") != photometric:
        yield f"PhotometricInterpretation is not {photometric}"


def _picture_is_marked_as_derived(case: _Case) -> Iterator[str]:
    if text_of(case.ds, "ImageType") != "DERIVED\\SECONDARY":
        yield "ImageType is not DERIVED, SECONDARY"
    if text_of(case.ds, "BurnedInAnnotation") != "NO":
        yield "BurnedInAnnotation is not NO"


def _comments_say_the_outcome(case: _Case) -> Iterator[str]:
    lines = text_of(case.ds, "ImageComments").splitlines()
    for line in wording.summary(case.outcome, equipment.model_of(case.outcome, case.context)):
        if line not in lines:
            yield "ImageComments do not say what the picture says"
            return
    words = {wording.VERDICTS[word] for word in codes.VERDICTS}
    if isinstance(case.outcome, Declined) and words & set(re.findall(r"[A-Z]+", text_of(case.ds, "ImageComments"))):
        yield "a scan that was not analysed carries a verdict"


# --- Segmentation ----------------------------------------------------------------------------------------------------


def _mask_is_the_outlined_tissue(case: _Case) -> Iterator[str]:
    """One frame, as large as the view, with the pixels within the report's outline; neither moved nor mirrored."""
    view = segmentation.outlined_view(case.outcome, case.context.seg)
    if view is None:
        yield "there is a segmentation of a view without outlined tissue"
        return
    expected = segmentation.pixels(view)
    size = (_number_of_frames(case.ds), case.ds.get("Rows"), case.ds.get("Columns"), case.ds.get("BitsAllocated"))
    if size != (1, *expected.shape, 1) or text_of(case.ds, "SegmentationType") != "BINARY":
        yield "the mask has another size than its view"
        return
    bits = np.unpackbits(np.frombuffer(case.ds.get("PixelData") or b"", np.uint8), bitorder="little")
    if bits.size < expected.size or not np.array_equal(bits[: expected.size], expected.ravel()):
        yield "the mask is not the tissue that was outlined"


def _mask_is_on_its_frame(case: _Case) -> Iterator[str]:
    view = segmentation.outlined_view(case.outcome, case.context.seg)
    if view is None:
        return
    source = view.image.source
    wanted = (source.sop_class_uid, source.sop_instance_uid, source.frame_number if source.number_of_frames > 1 else "")
    groups = case.ds.get("PerFrameFunctionalGroupsSequence") or ()
    derived = [
        reference
        for group in groups
        for derivation in group.get("DerivationImageSequence") or ()
        for reference in derivation.get("SourceImageSequence") or ()
    ]
    for references in (derived, list(case.ds.get("SourceImageSequence") or ())):
        if [_reference(one) for one in references] != [tuple(map(str, wanted))]:
            yield "the mask is not on the frame it was seen in"
            return
    series = [
        (text_of(one, "SeriesInstanceUID"), text_of(sop, "ReferencedSOPInstanceUID"))
        for one in case.ds.get("ReferencedSeriesSequence") or ()
        for sop in one.get("ReferencedInstanceSequence") or ()
    ]
    received = next(ds for ds in case.sources if text_of(ds, "SOPInstanceUID") == source.sop_instance_uid)
    if series != [(text_of(received, "SeriesInstanceUID"), source.sop_instance_uid)]:
        yield "ReferencedSeriesSequence does not name the series of the view"


def _reference(item: Dataset) -> tuple[str, str, str]:
    return (
        text_of(item, "ReferencedSOPClassUID"),
        text_of(item, "ReferencedSOPInstanceUID"),
        text_of(item, "ReferencedFrameNumber"),
    )


def _mask_has_the_geometry_of_its_view(case: _Case) -> Iterator[str]:
    """Without frame of reference and pixel measures a viewer breaks; with other ones it shows another place."""
    view = segmentation.outlined_view(case.outcome, case.context.seg)
    if view is None:
        return
    received = next(ds for ds in case.sources if text_of(ds, "SOPInstanceUID") == view.image.source.sop_instance_uid)
    if text_of(case.ds, "FrameOfReferenceUID") != segmentation.frame_of_reference_uid(received, case.context):
        yield "FrameOfReferenceUID is not the one that this view has"
    shared = case.ds.get("SharedFunctionalGroupsSequence") or [Dataset()]
    measures = shared[0].get("PixelMeasuresSequence") or [Dataset()]
    spacing = [_number(one) for one in _as_list(measures[0].get("PixelSpacing"))]
    if len(spacing) != 2 or not np.allclose(spacing, view.image.spacing_mm, rtol=1e-6, atol=0):
        yield "PixelSpacing is not that of the view"
    orientation = (shared[0].get("PlaneOrientationSequence") or [Dataset()])[0]
    frame = (case.ds.get("PerFrameFunctionalGroupsSequence") or [Dataset()])[0]
    position = (frame.get("PlanePositionSequence") or [Dataset()])[0]
    axes, corner = segmentation.geometry(received, view)
    for keyword, item, numbers in (
        ("ImageOrientationPatient", orientation, axes),
        ("ImagePositionPatient", position, corner),
    ):
        found = [_number(one) for one in _as_list(item.get(keyword))]
        if len(found) != len(numbers) or not np.allclose(found, numbers, rtol=0, atol=1e-3):
            yield f"{keyword} is not that of the view's detector"


def _segment_is_described(case: _Case) -> Iterator[str]:
    segments = list(case.ds.get("SegmentSequence") or ())
    if len(segments) != 1 or isinstance(case.outcome, Declined):
        yield "there is not exactly one segment"
        return
    segment = segments[0]
    described = {
        "SegmentedPropertyCategoryCodeSequence": codes.TISSUE,
        "SegmentedPropertyTypeCodeSequence": codes.chosen(codes.RESIDUAL_TISSUE, case.context.codes),
        "AnatomicRegionSequence": codes.THYROID,
    }
    for keyword, code in described.items():
        if [_key_of(item) for item in segment.get(keyword) or ()] != [_key(code)]:
            yield f"{keyword} of the segment is missing or another"
    naming = result_naming(case.outcome, case.sources, case.context)
    uid = structured_report.tracking_uid(case.context, naming, case.context.seg)
    if text_of(segment, "TrackingUID") != uid:
        yield "TrackingUID of the segment is not that of the report's outline"
    if text_of(segment, "SegmentAlgorithmType") != "AUTOMATIC":
        yield "SegmentAlgorithmType is not AUTOMATIC"


_COMMON: tuple[_Check, ...] = (
    _patient_is_the_sources,
    _identity_is_the_accepted,
    _uids_are_ours,
    _file_agrees_with_dataset,
    _no_private_elements,
    _references_resolve,
    _predecessors_are_named,
    _times_agree,
    _dates_exist,
    _names_model,
    _says_what_a_reader_must_know,
    _series_says_not_analysed,
    _codes_mean_what_they_say,
    _private_scheme_is_identified,
    _verdict_fits_probability,
)

_BY_KIND: dict[str, tuple[_Check, ...]] = {
    "sr": (
        _is_a_measurement_report,
        _verdict_stands_once,
        _probability_is_the_findings,
        _algorithm_is_identified,
        _refusal_says_so,
        _groups_match_views,
        _figures_are_the_views,
    ),
    "sc": (_picture_is_the_outcomes, _picture_is_marked_as_derived, _comments_say_the_outcome),
    "seg": (
        _mask_is_the_outlined_tissue,
        _mask_is_on_its_frame,
        _mask_has_the_geometry_of_its_view,
        _segment_is_described,
        _comments_say_the_outcome,
    ),
}

_MEANINGS: dict[_Key, str] = {
    (code.value, code.scheme_designator): code.meaning
    for value in vars(codes).values()
    for code in ([value] if isinstance(value, Code) else [])
} | {(code.value, code.scheme_designator): code.meaning for code in (*codes.VERDICTS.values(), *codes.SITES.values())}


# --- Reading a dataset -----------------------------------------------------------------------------------------------


def _every_item(ds: Dataset, but: Sequence[str] = ()) -> Iterator[Dataset]:
    """Yield the dataset and every item of every sequence below it, but for the sequences named."""
    yield ds
    for element in ds:
        if element.VR == "SQ" and element.keyword not in but:
            for item in element.value:
                yield from _every_item(item, but)


def _tree(ds: Dataset) -> Iterator[Dataset]:
    """Yield the content items of a document, the root first."""
    yield ds
    for item in ds.get("ContentSequence") or ():
        yield from _tree(item)


def _key(code: Code) -> _Key:
    return wording.ascii_text(code.value), wording.ascii_text(code.scheme_designator)


def _key_of(item: Dataset) -> _Key:
    return text_of(item, "CodeValue"), text_of(item, "CodingSchemeDesignator")


def _name(item: Dataset) -> _Key | None:
    named = item.get("ConceptNameCodeSequence")
    return _key_of(named[0]) if named else None


def _value(item: Dataset) -> _Key | None:
    coded = item.get("ConceptCodeSequence")
    return _key_of(coded[0]) if coded else None


def _text(case: _Case) -> str:
    """Return all that an object says in free text to a reader."""
    if case.result.kind in ("sc", "seg"):
        return text_of(case.ds, "ImageComments")
    return "\n".join(text_of(item, "TextValue") for item in _tree(case.ds))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, MultiValue)) else [value]


def _number_of_frames(ds: Dataset) -> int:
    text = text_of(ds, "NumberOfFrames")
    return int(text) if text.isdigit() else 1


def _number(value: Any) -> float:
    """Return a number from the bytes of others; NaN, which equals nothing, for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _decimal(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None


def _span(offset: str) -> timedelta | None:
    match = re.fullmatch(r"([+-])(\d\d)(\d\d)", offset)
    if match is None:
        return None
    span = timedelta(hours=int(match[2]), minutes=int(match[3]))
    return -span if match[1] == "-" else span
