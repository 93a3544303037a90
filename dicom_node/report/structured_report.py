"""An outcome as Comprehensive 3D Structured Report: TID 1500 "Measurement Report" (PS3.16), IOD PS3.3 A.35.13.

One measurement group (TID 1410) for each view, each with its own outline in image coordinates; the decision and its
probability stand once, in the anterior group (in the only group where there is one view). A scan that was not analysed
has no group at all, only the statement that no algorithm succeeded and why. The tree is built with highdicom's
templates; everything that they would draw at random or take from the clock is passed or replaced.
"""

from collections.abc import Sequence

import highdicom as hd
import numpy as np
from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    CodedConcept,
    Comprehensive3DSR,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    ImageContentItem,
    ImageRegion,
    LanguageOfContentItemAndDescendants,
    Measurement,
    NumContentItem,
    ObservationContext,
    ObserverContext,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    QualitativeEvaluation,
    SourceImageForRegion,
    TextContentItem,
    TrackingIdentifier,
)
from highdicom.sr.enum import GraphicTypeValues, RelationshipTypeValues
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import Comprehensive3DSRStorage, ExplicitVRLittleEndian, NuclearMedicineImageStorage

from dicom_node.report import codes, equipment
from dicom_node.report.context import Predecessor, RenderError, ReportContext
from dicom_node.report.identity import text_of
from dicom_node.report.uids import derived_uid
from pipeline import foci_wording, wording
from pipeline.finding import Declined, Finding, FocusView, SourceFrame, ViewFinding
from pipeline.reasons import REASONS

SOP_CLASS_UID = str(Comprehensive3DSRStorage)

_CONTAINS = RelationshipTypeValues.CONTAINS
_ACQUISITION = RelationshipTypeValues.HAS_ACQ_CONTEXT


def build(
    outcome: Finding | Declined,
    sources: Sequence[Dataset],
    context: ReportContext,
    *,
    sop_instance_uid: str,
    series_instance_uid: str,
    naming: tuple[object, ...],
    notes: tuple[str, ...],
) -> Dataset:
    """Return the document without identity and times, which the caller adds.

    `naming` names the result (`uids.result_parts`): tracking UIDs are derived from it, so that a segmentation of the
    same result can carry the same ones. `notes` are sentences for the reader on what the source lacked.
    """
    evidence = [_bare(ds) for ds in sources]
    document = Comprehensive3DSR(
        evidence=evidence,
        content=_root(outcome, sources, context, naming, notes),
        series_instance_uid=series_instance_uid,
        series_number=equipment.SERIES_NUMBERS["sr"],
        sop_instance_uid=sop_instance_uid,
        instance_number=1,
        manufacturer=equipment.MANUFACTURER,
        manufacturer_model_name=equipment.MODEL_NAME,
        software_versions=context.software_version,
        device_serial_number=equipment.serial_number(context),
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=[_as_reference(one, sources[0]) for one in context.predecessors] or None,
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    # A plain dataset without what highdicom added on its own: its clock, its own name, its file meta information.
    ds = Dataset()
    for element in document:
        if element.keyword not in ("ContributingEquipmentSequence", "SpecificCharacterSet"):
            ds[element.tag] = element
    return ds


def _root(
    outcome: Finding | Declined,
    sources: Sequence[Dataset],
    context: ReportContext,
    naming: tuple[object, ...],
    notes: tuple[str, ...],
) -> Dataset:
    """Return the root container of TID 1500."""
    # Separate, not continuous: each statement on a line of its own, or a viewer runs all sentences into one.
    root = ContainerContentItem(name=title(outcome, context), template_id="1500", is_content_continuous=False)
    content = ContentSequence()
    content.extend(LanguageOfContentItemAndDescendants(CodedConcept("en-US", "RFC5646", "English (United States)")))
    content.extend(_observer(context))
    content.append(
        CodeContentItem(
            name=codes.PROCEDURE_REPORTED,
            value=codes.PROCEDURE,
            relationship_type=RelationshipTypeValues.HAS_CONCEPT_MOD,
        )
    )
    content.append(_image_library(sources))
    if isinstance(outcome, Finding):
        groups = [group for view in outcome.views for group in _group(outcome, view, context, naming)]
        content.append(_container(codes.IMAGING_MEASUREMENTS, groups))
    content.append(_container(codes.QUALITATIVE_EVALUATIONS, _statements(outcome, context, notes)))
    root.ContentSequence = content
    return root


def title(outcome: Finding | Declined, context: ReportContext) -> CodedConcept:
    """Return the document's title: of a scan that was not analysed one that says so.

    Under (126000, DCM) viewers look for measurements and show nothing, or fail, where there are none (OHIF 3.13.2);
    under another title they show the document's text. CID 7021 may be extended (PS3.16).
    """
    return _chosen(codes.NO_RESULT if isinstance(outcome, Declined) else codes.TITLE, context)


def _observer(context: ReportContext) -> ObservationContext:
    """Return the device that observed (TID 1001, 1002, 1004): this node."""
    attributes = DeviceObserverIdentifyingAttributes(
        uid=derived_uid(context.uid_namespace, "observer", context.ae_title, equipment.serial_number(context)),
        name=wording.ascii_text(context.ae_title),
        manufacturer_name=equipment.MANUFACTURER,
        model_name=equipment.MODEL_NAME,
        serial_number=equipment.serial_number(context),
    )
    return ObservationContext(
        observer_device_context=ObserverContext(
            observer_type=CodedConcept(*codes.DEVICE[:3]), observer_identifying_attributes=attributes
        )
    )


def _image_library(sources: Sequence[Dataset]) -> ContainerContentItem:
    """Return the images the report rests on (TID 1600, 1601, 1602); what a header lacks is left out."""
    entries: list[ContentItem] = []
    for ds in sources:
        entry = ImageContentItem(
            name=codes.SOURCE,
            referenced_sop_class_uid=text_of(ds, "SOPClassUID"),
            referenced_sop_instance_uid=text_of(ds, "SOPInstanceUID"),
            relationship_type=_CONTAINS,
        )
        described: list[ContentItem] = []
        if text_of(ds, "SOPClassUID") == NuclearMedicineImageStorage:
            described.append(
                CodeContentItem(name=codes.MODALITY, value=codes.NUCLEAR_MEDICINE, relationship_type=_ACQUISITION)
            )
        for name, keyword in ((codes.PIXEL_ROWS, "Rows"), (codes.PIXEL_COLUMNS, "Columns")):
            size = ds.get(keyword)
            if isinstance(size, int) and size > 0:
                described.append(
                    NumContentItem(name=name, value=size, unit=codes.PIXELS, relationship_type=_ACQUISITION)
                )
        entry.ContentSequence = ContentSequence(described)
        entries.append(entry)
    return _container(codes.IMAGE_LIBRARY, [_container(codes.IMAGE_LIBRARY_GROUP, entries)])


def _group(
    finding: Finding, view: ViewFinding, context: ReportContext, naming: tuple[object, ...]
) -> PlanarROIMeasurementsAndQualitativeEvaluations:
    """Return one view's measurement group (TID 1410)."""
    name = view.image.view
    decides = view is deciding_view(finding)
    outlined = finding.finding == "present"
    # Without an evaluation of its own, a group that names residual tissue as its finding would read as "found".
    found = codes.RESIDUAL_TISSUE if decides or outlined else codes.ANALYSED_REGION
    label = "Residual thyroid tissue" if outlined else "Analysed region"
    evaluations = []
    if decides:
        concept = _chosen(codes.RESIDUAL_TISSUE, context)
        evaluations.append(QualitativeEvaluation(name=concept, value=codes.VERDICTS[finding.finding]))
    return PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=tracking_uid(context, naming, name), identifier=f"{label}, {name} view"
        ),
        referenced_region=_region(view),
        finding_type=_chosen(found, context),
        finding_sites=[FindingSite(anatomic_location=codes.THYROID)],
        measurements=[
            *_measurements(finding, view, context, decides=decides, outlined=outlined),
            *_foci(finding, view, context, decides=decides),
        ],
        qualitative_evaluations=evaluations or None,
    )


def deciding_view(finding: Finding) -> ViewFinding:
    """Return the view whose group carries the decision: the anterior one, else the only one."""
    return next((view for view in finding.views if view.image.view == "anterior"), finding.views[0])


def tracking_uid(context: ReportContext, naming: tuple[object, ...], view: str) -> str:
    """Return the Tracking Unique Identifier of a view's outline."""
    return derived_uid(context.uid_namespace, "tracking", naming, view)


def _measurements(
    finding: Finding, view: ViewFinding, context: ReportContext, *, decides: bool, outlined: bool
) -> list[Measurement]:
    """Return the figures of a group. Area and ratio only where tissue was outlined: the area of a box is no finding."""
    figures = []
    if decides:
        text = wording.percent(finding.probability, *wording.decision_limits(finding))
        name = _chosen(codes.PROBABILITY, context)
        figures.append(_figure(name, text, codes.PER_CENT, _algorithm(finding)))
    if outlined:
        figures.append(_figure(codes.AREA, f"{view.outline_area_mm2:.1f}", codes.SQUARE_MILLIMETRE))
    figures.append(_figure(codes.MAXIMUM, str(view.maximum_counts), codes.COUNTS))
    if outlined and view.remnant_to_background is not None and np.isfinite(view.remnant_to_background):
        name = _chosen(codes.RATIO, context)
        figures.append(_figure(name, f"{view.remnant_to_background:.2f}", codes.NO_UNITS))
    return figures


def _foci(finding: Finding, view: ViewFinding, context: ReportContext, *, decides: bool) -> list[Measurement]:
    """Return the foci as the view shows them: each figure with its focus's number and site.

    How many there are, and the uptake of those in the bed, stand once, in the group that decides.
    """
    figures = []
    if decides and finding.uptake is not None:
        figures.append(
            _figure(_chosen(codes.UPTAKE, context), foci_wording.uptake_figure(finding.uptake), codes.PER_CENT)
        )
    if decides and finding.foci is not None:
        figures.append(_figure(_chosen(codes.FOCI, context), str(len(finding.foci)), codes.NO_UNITS))
    for focus, seen in foci_wording.foci_in(finding, view.image.view):
        site = FindingSite(anatomic_location=_chosen(codes.SITES[focus.site], context))
        for name, text, unit in focus_figures(seen):
            figure = _figure(_chosen(name, context), text, unit, site=site)
            # Not TID 300's Tracking Identifier: as observation context of a number, Enhanced SR does not allow it.
            whose = TextContentItem(
                name=_chosen(codes.FOCUS, context),
                value=str(focus.number),
                relationship_type=RelationshipTypeValues.HAS_CONCEPT_MOD,
            )
            figure[0].ContentSequence.append(whose)
            figures.append(figure)
    return figures


def focus_figures(seen: FocusView) -> tuple[tuple[Code, str, Code], ...]:
    """Return (name, digits, unit) of what is measured of a focus in one view; no area where it does not stand out."""
    counts = codes.FOCUS_COUNTS, f"{seen.counts:.0f}", codes.COUNTS
    area = codes.FOCUS_AREA, f"{seen.area_mm2:.0f}", codes.SQUARE_MILLIMETRE
    return (counts, area) if seen.seen else (counts,)


def _figure(
    name: Code | CodedConcept,
    text: str,
    unit: Code,
    algorithm: AlgorithmIdentification | None = None,
    *,
    site: FindingSite | None = None,
) -> Measurement:
    """Return one NUM with the digits of `text`: "2.10" as on the picture, where a number would become "2.1"."""
    figure = Measurement(
        name=name,
        value=float(text),
        unit=unit,
        algorithm_id=algorithm,
        finding_sites=[site] if site else None,
    )
    figure[0].MeasuredValueSequence[0].NumericValue = text
    return figure


def _algorithm(finding: Finding) -> AlgorithmIdentification:
    """Return which model judged, and with which parameters (TID 4019)."""
    model = finding.model
    parameters = [f"threshold {wording.percent(finding.threshold)} %"]
    if finding.undetermined_band:
        low, high = finding.undetermined_band
        parameters.append(f"undetermined from {wording.percent(low)} to {wording.percent(high)} %")
    parameters += [
        f"preprocessing {finding.preprocessing} {finding.preprocessing_version}",
        f"architecture {model.architecture}",
        f"seed {finding.seed}",
        f"release {model.release}",
        f"trained on {model.trained_on}",
    ]
    return AlgorithmIdentification(
        name=wording.ascii_text(model.name),
        version=equipment.algorithm_version(model),
        manufacturer=equipment.MANUFACTURER,
        parameters=[wording.ascii_text(parameter) for parameter in parameters],
        family=codes.FAMILY,
    )


def _region(view: ViewFinding) -> ImageRegion:
    """Return the outline as SCOORD.

    SCOORD counts from the outer corner of the first pixel, whose centre is (0.5, 0.5) (PS3.3 C.18.6.1.1); our
    outlines have pixel centres at whole numbers.
    """
    source: SourceFrame = view.image.source
    rows, columns = view.image.counts.shape
    points = np.asarray(view.outline, dtype=np.float64) + 0.5
    if len(points) < 4 or not np.isfinite(points).all() or (points[0] != points[-1]).any():
        raise RenderError("an outline is not a closed line of at least three points.")
    points = np.clip(points, 0, (columns, rows))
    # A reference to all frames of a one-frame image names none (PS3.3 10.3.1, ReferencedFrameNumber).
    frames = [source.frame_number] if source.number_of_frames > 1 else None
    return ImageRegion(
        graphic_type=GraphicTypeValues.POLYLINE,
        graphic_data=points,
        source_image=SourceImageForRegion(source.sop_class_uid, source.sop_instance_uid, frames),
    )


def _statements(outcome: Finding | Declined, context: ReportContext, notes: tuple[str, ...]) -> list[ContentItem]:
    """Return what the report says in words; for a scan not analysed first that no algorithm succeeded, and why."""
    items: list[ContentItem] = []
    if isinstance(outcome, Declined):
        reason = REASONS[outcome.reason]
        items += [
            _code(codes.SUMMARY, codes.NONE_SUCCEEDED),
            _code(_chosen(codes.NOT_ANALYSED_BECAUSE, context), Code(reason.code_value, "DCM", reason.code_meaning)),
        ]
        lines = wording.summary(outcome, context.model)
    else:
        # The verdict stands once, coded: not a second time in words.
        lines = wording.summary(outcome, outcome.model)[2:]
    items += [
        TextContentItem(name=codes.COMMENT, value=wording.ascii_text(line), relationship_type=_CONTAINS)
        for line in (*lines, *notes)
    ]
    return items


def _code(name: CodedConcept | Code, value: Code) -> CodeContentItem:
    return CodeContentItem(name=name, value=value, relationship_type=_CONTAINS)


def _container(name: Code, children: Sequence[ContentItem]) -> ContainerContentItem:
    item = ContainerContentItem(name=name, relationship_type=_CONTAINS, is_content_continuous=False)
    item.ContentSequence = ContentSequence(children)
    return item


def _chosen(code: Code, context: ReportContext) -> CodedConcept:
    value, scheme, meaning = codes.chosen(code, context.codes)[:3]
    return CodedConcept(wording.ascii_text(value), wording.ascii_text(scheme), wording.ascii_text(meaning))


def _bare(ds: Dataset) -> Dataset:
    """Return what highdicom needs of a source and no more: it never sees the patient, whom `identity` adds."""
    bare = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(bare, keyword, hd.UID(text_of(ds, keyword)))
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(bare, keyword, "")
    bare.StudyDate = bare.StudyTime = None
    return bare


def _as_reference(one: tuple[str, ...], source: Dataset) -> Dataset:
    predecessor = Predecessor(*one)
    ds = Dataset()
    ds.SOPClassUID = predecessor.sop_class_uid
    ds.SOPInstanceUID = predecessor.sop_instance_uid
    ds.StudyInstanceUID = predecessor.study_instance_uid or text_of(source, "StudyInstanceUID")
    ds.SeriesInstanceUID = predecessor.series_instance_uid
    return ds
