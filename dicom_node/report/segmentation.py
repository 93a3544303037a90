"""The outlined tissue of one view as Segmentation (PS3.3 A.51): a destination gets it only where it asks for it.

There is one only where a finding is "present" and tissue was outlined in that view: an empty segmentation would look
like an object that failed to load, and the other results say "absent" in words. The pixels are those whose edge the
Structured Report's outline follows, under the same Tracking UID. Patient coordinates are those that the detector gives,
in a frame of reference of our own where the camera names none: it joins mask and scan, and promises nothing about
other images. The posterior view keeps its detector's orientation, so that a viewer which turns images by it shows it
mirrored; the pixels themselves are never mirrored here.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage

from dicom_node.report import codes, equipment
from dicom_node.report.context import RenderError, ReportContext
from dicom_node.report.identity import text_of
from dicom_node.report.structured_report import tracking_uid
from dicom_node.report.uids import derived_uid
from pipeline import wording
from pipeline.finding import Declined, Finding, SourceFrame, ViewFinding, ViewName
from pipeline.quantify import main_component

SOP_CLASS_UID = str(SegmentationStorage)

# How a camera in front of or behind a patient who lies on the back, head first, sees rows and columns (PS3.3
# C.7.6.2.1.1): used where the detector does not say it itself.
_NOMINAL: dict[str, tuple[float, ...]] = {"anterior": (1, 0, 0, 0, 0, -1), "posterior": (-1, 0, 0, 0, 0, -1)}

_THICKNESS_MM = 10.0
"""A planar image has no depth; viewers need a number here, and this one claims nothing that was measured."""


def outlined_view(outcome: Finding | Declined, view: ViewName) -> ViewFinding | None:
    """Return the view that a segmentation of `view` would show, None where there is nothing to show."""
    if isinstance(outcome, Declined) or outcome.finding != "present":
        return None
    seen = next((one for one in outcome.views if one.image.view == view), None)
    return seen if seen is not None and pixels(seen).any() else None


def pixels(view: ViewFinding) -> NDArray[np.bool_]:
    """Return the outlined tissue, shape (H, W), bool, native pixels: what the Structured Report's outline encloses."""
    return main_component(view.mask, view.image.counts, view.activation)


def build(
    outcome: Finding,
    view: ViewFinding,
    sources: Sequence[Dataset],
    context: ReportContext,
    *,
    sop_instance_uid: str,
    series_instance_uid: str,
    naming: tuple[object, ...],
    notes: tuple[str, ...],
) -> Dataset:
    """Return the segmentation of one view without identity and times, which the caller adds."""
    source = view.image.source
    received = next(ds for ds in sources if text_of(ds, "SOPInstanceUID") == source.sop_instance_uid)
    found = Segmentation(
        source_images=[_stand_in(received, view, context)],
        pixel_array=pixels(view).astype(np.uint8)[None],
        segmentation_type="BINARY",
        segment_descriptions=[_segment(outcome, view, context, naming)],
        series_instance_uid=series_instance_uid,
        series_number=equipment.SERIES_NUMBERS["seg"],
        sop_instance_uid=sop_instance_uid,
        instance_number=1 if view.image.view == "anterior" else 2,
        manufacturer=equipment.MANUFACTURER,
        manufacturer_model_name=equipment.MODEL_NAME,
        software_versions=context.software_version,
        device_serial_number=equipment.serial_number(context),
        content_label="RESIDUAL_TISSUE",
        content_description=f"Residual thyroid tissue, {view.image.view} view",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    # As with the report: without what highdicom added on its own.
    ds = Dataset()
    for element in found:
        if element.keyword not in ("ContributingEquipmentSequence", "SpecificCharacterSet"):
            ds[element.tag] = element
    ds.BodyPartExamined = "NECK"
    ds.ImageComments = "\r\n".join((*wording.summary(outcome, outcome.model), *notes))
    _name_dimensions(ds, derived_uid(context.uid_namespace, "dimensions", sop_instance_uid))
    _point_back(ds, source)
    return ds


def _stand_in(received: Dataset, view: ViewFinding, context: ReportContext) -> Dataset:
    """Return the view as an image of one frame and of a class that highdicom segments, without the patient.

    highdicom takes an NM image for one with functional groups. `_point_back` undoes the disguise.
    """
    source = view.image.source
    orientation, position = geometry(received, view)
    row_mm, column_mm = view.image.spacing_mm
    bare = Dataset()
    bare.SOPClassUID = CTImageStorage
    bare.SOPInstanceUID = hd.UID(source.sop_instance_uid)
    bare.StudyInstanceUID = hd.UID(text_of(received, "StudyInstanceUID"))
    # Of the object, not of the view: where a person accepted another identity, the series may be another, too.
    bare.SeriesInstanceUID = hd.UID(text_of(received, "SeriesInstanceUID"))
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(bare, keyword, "")
    bare.StudyDate = bare.StudyTime = None
    bare.Modality = "NM"
    bare.Rows, bare.Columns = view.image.counts.shape
    bare.FrameOfReferenceUID = frame_of_reference_uid(received, context)
    bare.ImageOrientationPatient = list(orientation)
    bare.ImagePositionPatient = list(position)
    bare.PixelSpacing = [float(f"{row_mm:.8g}"), float(f"{column_mm:.8g}")]
    bare.SliceThickness = _THICKNESS_MM
    return bare


def frame_of_reference_uid(received: Dataset, context: ReportContext) -> str:
    """Return the camera's frame of reference, or one of ours for this object alone."""
    known = text_of(received, "FrameOfReferenceUID")
    own = text_of(received, "SOPInstanceUID")
    return known or derived_uid(context.uid_namespace, "frame of reference", own)


def geometry(received: Dataset, view: ViewFinding) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (ImageOrientationPatient, ImagePositionPatient) of the view's detector (PS3.3 C.8.4.11), else nominal."""
    detectors = received.get("DetectorInformationSequence") or ()
    vector = received.get("DetectorVector")
    numbers = list(vector) if isinstance(vector, Sequence) and not isinstance(vector, str) else [vector]
    frame = view.image.source.frame_number
    number = numbers[frame - 1] if frame <= len(numbers) else None
    if isinstance(number, int) and 1 <= number <= len(detectors):
        item = detectors[number - 1]
        orientation = _numbers(item.get("ImageOrientationPatient"), 6)
        position = _numbers(item.get("ImagePositionPatient"), 3)
        if orientation is not None and position is not None and _is_orientation(orientation):
            return orientation, position
    return _NOMINAL[view.image.view], (0.0, 0.0, 0.0)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        return None
    try:
        numbers = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        return None
    return numbers if np.isfinite(numbers).all() else None


def _is_orientation(numbers: tuple[float, ...]) -> bool:
    row, column = np.array(numbers[:3]), np.array(numbers[3:])
    return bool(
        abs(np.linalg.norm(row) - 1) < 1e-3 and abs(np.linalg.norm(column) - 1) < 1e-3 and abs(row @ column) < 1e-3
    )


def _segment(
    outcome: Finding, view: ViewFinding, context: ReportContext, naming: tuple[object, ...]
) -> SegmentDescription:
    name = view.image.view
    value, scheme, meaning = (wording.ascii_text(part) for part in _residual_tissue(context))
    version = f"{context.software_version}, preprocessing {outcome.preprocessing} {outcome.preprocessing_version}"
    return SegmentDescription(
        segment_number=1,
        segment_label="Residual thyroid tissue",
        segmented_property_category=codes.TISSUE,
        segmented_property_type=hd.sr.CodedConcept(value, scheme, meaning),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=f"Remnant outline, rule {view.mask_rule}"[:64],
            family=codes.CLUSTERING,
            version=wording.ascii_text(version)[:64],
            source=equipment.MANUFACTURER,
        ),
        tracking_uid=tracking_uid(context, naming, name),
        tracking_id=f"Residual thyroid tissue, {name} view",
        anatomic_regions=[codes.THYROID],
    )


def _residual_tissue(context: ReportContext) -> tuple[str, str, str]:
    code = codes.chosen(codes.RESIDUAL_TISSUE, context.codes)
    return code.value, code.scheme_designator, code.meaning


def _name_dimensions(ds: Dataset, uid: str) -> None:
    """Put a derived UID in the place of the one that highdicom drew: the same result is the same bytes."""
    for sequence in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in ds[sequence].value:
            item.DimensionOrganizationUID = uid


def _point_back(ds: Dataset, source: SourceFrame) -> None:
    """Name the received object, with its class and the frame that was segmented; one of one frame as a whole."""
    frames = [
        reference
        for frame in ds.PerFrameFunctionalGroupsSequence
        for derivation in frame.DerivationImageSequence
        for reference in derivation.SourceImageSequence
    ]
    instances = [one for series in ds.ReferencedSeriesSequence for one in series.ReferencedInstanceSequence]
    if len(frames) != 1 or len(instances) != 1:
        raise RenderError("a segmentation does not reference exactly the view it was made from.")
    for reference in (*frames, *instances):
        reference.ReferencedSOPClassUID = source.sop_class_uid
    if source.number_of_frames > 1:
        frames[0].ReferencedFrameNumber = source.frame_number
    # The same once more where viewers without functional groups look; highdicom shares these items between sequences.
    ds.SourceImageSequence = deepcopy(frames)
