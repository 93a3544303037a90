"""From an outcome to complete files: `render` is a pure function, the same input gives the same bytes.

Nothing is drawn at random and no clock is read; a result that is rendered again after a crash is the same object. What
cannot be rendered truthfully (sources that disagree on the patient, a name its character set cannot carry) raises
`RenderError`, and nothing is written.
"""

import warnings
from collections.abc import Mapping, Sequence

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_node.report import equipment, identity, secondary_capture, segmentation, structured_report, uids
from dicom_node.report.context import Kind, RenderedResult, RenderError, ReportContext
from dicom_node.report.identity import text_of
from pipeline import wording
from pipeline.finding import Declined, Finding
from pipeline.reasons import REASONS

SOP_CLASSES: Mapping[Kind, str] = {
    "sr": structured_report.SOP_CLASS_UID,
    "sc": secondary_capture.SOP_CLASS_UID,
    "seg": segmentation.SOP_CLASS_UID,
}
MODALITIES: Mapping[Kind, str] = {"sr": "SR", "sc": "OT", "seg": "SEG"}


def render(
    outcome: Finding | Declined,
    sources: Sequence[Dataset],
    context: ReportContext,
    kinds: Sequence[str] = ("sr", "sc"),
) -> tuple[RenderedResult, ...]:
    """Return one object for each of `kinds` ("sr", "sc", "seg"), in that order.

    A Segmentation is left out where no tissue was outlined in its view (`segmentation.outlined_view`): the other kinds
    carry the answer, and an empty mask would say it in no words.

    `sources` are the received objects of the acquisition, whole or without pixels.

    Raises
    ------
    RenderError: the outcome, the sources or the context cannot give a truthful object.
    """
    with warnings.catch_warnings():
        # pydicom's warnings on odd values quote them, and standard error is a log that must not name a patient.
        warnings.simplefilter("ignore")
        ordered = identity.in_one_order(sources)
        _check_input(outcome, ordered, context)
        made = (_render_one(outcome, ordered, context, kind) for kind in kinds)
        return tuple(result for result in made if result is not None)


def result_uids(
    outcome: Finding | Declined, sources: Sequence[Dataset], context: ReportContext, kind: Kind
) -> tuple[str, str, str]:
    """Return (variant, SOPInstanceUID, SeriesInstanceUID) of a result.

    The series is named without class and variant, but with the modality: a series holds one modality only (PS3.3
    A.1.2.3), so documents and pictures cannot share one.
    """
    naming = result_naming(outcome, sources, context)
    variant = {"sr": "", "sc": context.sc, "seg": context.seg}[kind]
    # A note and a finding on the same scan (analysed offline a second time, after a time-out) are two objects.
    content = "note" if isinstance(outcome, Declined) else "finding"
    sop = uids.derived_uid(context.uid_namespace, "instance", naming, SOP_CLASSES[kind], variant, content)
    # A series holds one frame of reference as well, and views that are two objects have two.
    holds = f"SEG {variant}" if kind == "seg" else MODALITIES[kind]
    return variant, sop, uids.derived_uid(context.uid_namespace, "series", naming, holds)


def result_naming(
    outcome: Finding | Declined, sources: Sequence[Dataset], context: ReportContext
) -> tuple[object, ...]:
    """Return what names a result and its tracking UIDs apart from its kind."""
    model = equipment.model_of(outcome, context)
    return uids.result_parts(
        context.source_digests,
        [text_of(ds, "SOPInstanceUID") for ds in sources],
        revision=context.revision,
        software_version=context.software_version,
        weights_sha256=model.sha256 if model else "",
        preprocessing_version=outcome.preprocessing_version if isinstance(outcome, Finding) else "",
        settings_fingerprint=context.settings_fingerprint,
    )


def _render_one(
    outcome: Finding | Declined, sources: Sequence[Dataset], context: ReportContext, kind: str
) -> RenderedResult | None:
    which = next((known for known in SOP_CLASSES if known == kind), None)
    if which is None:
        raise RenderError(f'"{kind}" is not a kind of result; kinds are {", ".join(SOP_CLASSES)}.')
    first = sources[0]
    variant, sop_instance_uid, series_instance_uid = result_uids(outcome, sources, context, which)
    patient = Dataset()
    notes = identity.copy_identity(first, patient)
    if which == "sr":
        ds = structured_report.build(
            outcome,
            sources,
            context,
            sop_instance_uid=sop_instance_uid,
            series_instance_uid=series_instance_uid,
            naming=result_naming(outcome, sources, context),
            notes=notes,
        )
    elif which == "seg":
        view = segmentation.outlined_view(outcome, context.seg)
        if view is None or isinstance(outcome, Declined):
            return None
        ds = segmentation.build(
            outcome,
            view,
            sources,
            context,
            sop_instance_uid=sop_instance_uid,
            series_instance_uid=series_instance_uid,
            naming=result_naming(outcome, sources, context),
            notes=notes,
        )
    else:
        ds = secondary_capture.build(
            outcome,
            sources,
            context,
            sop_instance_uid=sop_instance_uid,
            series_instance_uid=series_instance_uid,
            notes=notes,
        )
    identity.copy_identity(first, ds)
    if context.accepted is not None:
        ds.OriginalAttributesSequence = [first.OriginalAttributesSequence[-1]]
    identity.set_times(first, ds, context)
    equipment.add_equipment(ds, outcome, context, identity.local_time(first, context))
    ds.file_meta = _file_meta(ds, context)
    return RenderedResult(
        which, variant, SOP_CLASSES[which], sop_instance_uid, series_instance_uid, identity.encoded(ds, first)
    )


def _file_meta(ds: Dataset, context: ReportContext) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(uids.IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = wording.ascii_text(f"REMNANT_{context.software_version}")[:16]
    return meta


def _check_input(outcome: Finding | Declined, sources: Sequence[Dataset], context: ReportContext) -> None:
    """Refuse what could only give an untrue object."""
    study = text_of(sources[0], "StudyInstanceUID")
    known = {text_of(ds, "SOPInstanceUID") for ds in sources}
    missing = [uid for uid in sorted(known) if uid not in context.source_digests]
    if missing:
        raise RenderError(f"no digest was given for source {missing[0]}.", study=study)
    if context.analysed_at.tzinfo is None:
        raise RenderError("analysed_at has no time zone.", study=study)
    model = equipment.model_of(outcome, context)
    if model is not None and (model.release not in wording.RELEASES or len(model.sha256) != 64):
        raise RenderError("the weights record has no known release or no SHA-256 digest.", study=study)
    if isinstance(outcome, Declined):
        if outcome.reason not in REASONS:
            raise RenderError(f'"{outcome.reason}" is not a reason of the closed list.', study=study)
        return
    if not outcome.views:
        raise RenderError("a finding without a view cannot be reported.", study=study)
    if not 0 <= outcome.probability <= 1:
        raise RenderError("the probability is not within 0 to 1.", study=study)
    if any(view.image.source.sop_instance_uid not in known for view in outcome.views):
        raise RenderError("a finding's view is not among the sources.", study=study)
