"""An outcome as Secondary Capture Image (PS3.3 A.8.1): for many workstations the picture is the result.

The pixels come from `pipeline.overlay`, which knows no identity. What the picture says stands once more as text in
ImageComments, so that it can be searched and checked.
"""

from collections.abc import Sequence

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from dicom_node.report import codes, equipment
from dicom_node.report.context import ReportContext
from dicom_node.report.equipment import code_item
from dicom_node.report.identity import text_of
from pipeline import overlay, wording
from pipeline.finding import Declined, Finding

SOP_CLASS_UID = str(SecondaryCaptureImageStorage)


def build(
    outcome: Finding | Declined,
    sources: Sequence[Dataset],
    context: ReportContext,
    *,
    sop_instance_uid: str,
    series_instance_uid: str,
    notes: tuple[str, ...],
) -> Dataset:
    """Return the image without identity and times, which the caller adds."""
    ds = Dataset()
    ds.SOPClassUID = SOP_CLASS_UID
    ds.SOPInstanceUID = sop_instance_uid
    ds.SeriesInstanceUID = series_instance_uid
    # A secondary capture is not an acquisition of the camera's modality (PS3.3 C.7.3.1.1.1).
    ds.Modality = "OT"
    ds.SeriesNumber = equipment.SERIES_NUMBERS["sc"]
    ds.InstanceNumber = 1
    ds.BodyPartExamined = "NECK"
    ds.PatientOrientation = None
    ds.ConversionType = "WSD"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    # The flag asks whether the pixels identify the patient (PS3.3 C.7.6.1); they cannot.
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "00"
    ds.DerivationDescription = "Views enlarged, outlined and labelled with the result of the analysis"
    ds.DerivationCodeSequence = [code_item(codes.SPATIAL_RESAMPLING)]
    ds.SourceImageSequence = _source_images(outcome, sources)
    ds.ReferencedSeriesSequence = _referenced_series(sources)
    ds.ImageComments = "\r\n".join((*wording.summary(outcome, equipment.model_of(outcome, context)), *notes))
    _set_pixels(ds, pixels(outcome, context))
    return ds


def pixels(outcome: Finding | Declined, context: ReportContext) -> np.ndarray:
    """Return the picture of an outcome, uint8, (rows, columns, 3) or (rows, columns)."""
    return overlay.draw(outcome, equipment.model_of(outcome, context), colour=context.sc == "colour")


def _set_pixels(ds: Dataset, picture: np.ndarray) -> None:
    """Fill the Image Pixel module (PS3.3 C.7.6.3)."""
    ds.SamplesPerPixel = 3 if picture.ndim == 3 else 1
    ds.PhotometricInterpretation = "RGB" if picture.ndim == 3 else "MONOCHROME2"
    if picture.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.Rows, ds.Columns = picture.shape[:2]
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelRepresentation = 0
    data = np.ascontiguousarray(picture, dtype=np.uint8).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"


def _source_images(outcome: Finding | Declined, sources: Sequence[Dataset]) -> list[Dataset]:
    """Return the objects behind the picture, with the frames that were used where not all were."""
    used: dict[str, set[int]] = {}
    images = [view.image for view in outcome.views] if isinstance(outcome, Finding) else outcome.images
    for image in images:
        if image.source.number_of_frames > 1:
            used.setdefault(image.source.sop_instance_uid, set()).add(image.source.frame_number)
    items = []
    for source in sources:
        item = _reference(source)
        frames = sorted(used.get(text_of(source, "SOPInstanceUID"), ()))
        if frames:
            item.ReferencedFrameNumber = frames
        item.PurposeOfReferenceCodeSequence = [code_item(codes.SOURCE_IMAGE)]
        items.append(item)
    return items


def _referenced_series(sources: Sequence[Dataset]) -> list[Dataset]:
    """Return the Common Instance Reference module's series of this study (PS3.3 C.12.2)."""
    by_series: dict[str, list[Dataset]] = {}
    for source in sources:
        by_series.setdefault(text_of(source, "SeriesInstanceUID"), []).append(_reference(source))
    items = []
    for series_instance_uid, references in by_series.items():
        item = Dataset()
        item.SeriesInstanceUID = series_instance_uid
        item.ReferencedInstanceSequence = references
        items.append(item)
    return items


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = text_of(source, "SOPClassUID")
    item.ReferencedSOPInstanceUID = text_of(source, "SOPInstanceUID")
    return item
