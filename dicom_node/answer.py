"""From the objects of one acquisition to what leaves the house: analyse, render, check.

The one road for the node's worker and for `remnant analyse`, so that a physicist sees offline what the node would send.
Everything here reads what came from the wire: in the node it runs only inside the bounded child of `analyst.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
from pydicom import Dataset, dcmread

from dicom_node import __version__, report
from dicom_node.messages import Answer, Provenance, Rendered, Setup, Task, Version, Wanted
from models.weights import LoadedModel
from pipeline.analyse import analyse, model_facts
from pipeline.beside import with_details
from pipeline.camera import examination, expose
from pipeline.finding import Declined, Finding, ModelFacts, ViewName
from pipeline.phantom import phantom
from pipeline.views import HeaderFacts, UnusableScan, facts_of, view_images

KNOWN_BEFORE = frozenset({"ambiguous_views", "analysis_failed"})
"""Reasons that only the worklist can know; every other one the analysis finds by itself, from the content."""


def answer_files(task: Task, model: LoadedModel, *, preprocessing: str, require_views: Sequence[ViewName]) -> Answer:
    """Read the objects of one acquisition and answer it; an object that cannot be read is `unreadable`, without a note.

    Nobody can say whose scan an unreadable object is, so no result may be sent for it: the row tells the admin.
    """
    try:
        datasets = [dcmread(path) for path in task.paths]
        for dataset in datasets:
            for _ in dataset.iterall():  # pydicom decodes an element on first use: let the faults come now
                pass
    except Exception as error:  # noqa: BLE001 - parsers fail in many ways on bytes from the wire; the row says which
        return _told(Declined(reason="unreadable", detail=type(error).__name__, ours=False), ())
    return answer(datasets, model, task, preprocessing=preprocessing, require_views=require_views)


def answer(
    datasets: Sequence[Dataset],
    model: LoadedModel,
    task: Task,
    *,
    preprocessing: str,
    require_views: Sequence[ViewName],
) -> Answer:
    """Answer one acquisition whose objects are read.

    Raises nothing for a fault of the input. A fault of ours that the gate finds becomes `gate_failed`, and the faulty
    objects are dropped here, never sent.
    """
    if task.reason in KNOWN_BEFORE:
        outcome: Finding | Declined = Declined(reason=str(task.reason), detail="", ours=True)
    else:
        outcome = analyse(datasets, model, preprocessing=preprocessing, require_views=require_views)
        if task.reason is not None and isinstance(outcome, Finding):
            # The worklist gave this row up: it gets its note, never a finding (design, section 4).
            outcome = Declined(task.reason, "", ours=True, images=tuple(view.image for view in outcome.views))
        if isinstance(outcome, Finding):
            outcome = with_details(outcome, datasets, task.provenance.sensitivity_cps_per_mbq)
    facts = model_facts(model.record)
    made = _render_and_check(outcome, datasets, task, facts)
    if isinstance(made, str):
        note = Declined(reason="gate_failed", detail=made, ours=True)
        again = _render_and_check(note, datasets, task, facts)
        return _told(note, () if isinstance(again, str) else again)
    return _told(outcome, made)


def rehearse(model: LoadedModel, setup: Setup) -> str:
    """Answer one simulated scan and throw the answer away; return what went wrong, "" if nothing did.

    The first answer of a process costs seconds (libraries load code and make plans on first use), which no patient's
    scan should wait for; and a node whose road is broken should say so at its start, not at the first scan.
    """
    datasets = expose(phantom(1, residual=True, stratum="uptake_1_up"), examination(1), "two_frames")
    provenance = Provenance(
        revision=1,
        source_digests={str(ds.SOPInstanceUID): "0" * 64 for ds in datasets},
        analysed_at=datetime(2000, 1, 1, tzinfo=UTC),
        timezone="UTC",
        ae_title="REHEARSAL",
        codes={},
        settings_fingerprint="rehearsal",
        offline=True,
    )
    task = Task(paths=(), reason=None, provenance=provenance, wanted=(Wanted("sr"), Wanted("sc", "colour")))
    told = answer(datasets, model, task, preprocessing=setup.preprocessing, require_views=setup.require_views)
    if told.outcome == "failed":
        return f"a simulated scan came back as {told.reason}: {told.detail}"
    return ""


def _told(outcome: Finding | Declined, results: tuple[Rendered, ...]) -> Answer:
    if isinstance(outcome, Finding):
        facts = outcome.model
        return Answer(
            outcome="analysed",
            reason=None,
            detail="",
            finding=outcome.finding,
            probability=outcome.probability,
            views=tuple(view.image.view for view in outcome.views),
            model=f"{facts.name} {facts.version}",
            model_sha256=facts.sha256,
            results=results,
            timings_ms=dict(outcome.timings_ms),
        )
    return Answer(
        outcome="failed" if outcome.reason in ("analysis_failed", "gate_failed") else "declined",
        reason=outcome.reason,
        detail=outcome.detail,
        finding=None,
        probability=None,
        views=tuple(image.view for image in outcome.images),
        model=None,
        model_sha256=None,
        results=results,
        timings_ms=dict(outcome.timings_ms),
    )


def _render_and_check(
    outcome: Finding | Declined, datasets: Sequence[Dataset], task: Task, facts: ModelFacts
) -> tuple[Rendered, ...] | str:
    """Return the checked results, or the faults as one line; none where a scan is not ours and silence is right."""
    if isinstance(outcome, Declined) and not outcome.ours:
        return ()
    results: list[Rendered] = []
    faults: list[str] = []
    accepted = task.provenance.accepted
    try:
        if accepted is not None:
            datasets = [report.adopted(ds, accepted, task.provenance.ae_title) for ds in datasets]
        for want in task.wanted:
            context = _context(task.provenance, want, facts)
            for made in report.render(outcome, datasets, context, (want.kind,)):
                faults += [f"{made.kind}: {fault}" for fault in report.check(made, datasets, outcome, context)]
                results.append(
                    Rendered(
                        kind=made.kind,
                        variant=made.variant,
                        sop_class_uid=made.sop_class_uid,
                        sop_instance_uid=made.sop_instance_uid,
                        series_instance_uid=made.series_instance_uid,
                        data=made.data,
                    )
                )
    except report.RenderError as error:
        return str(error)
    return "; ".join(faults) if faults else tuple(results)


def _context(provenance: Provenance, want: Wanted, model: ModelFacts) -> report.ReportContext:
    return report.ReportContext(
        revision=provenance.revision,
        source_digests=provenance.source_digests,
        analysed_at=provenance.analysed_at,
        timezone=ZoneInfo(provenance.timezone),
        settings_fingerprint=provenance.settings_fingerprint,
        uid_namespace=report.OFFLINE_NAMESPACE if provenance.offline else report.NODE_NAMESPACE,
        ae_title=provenance.ae_title,
        software_version=__version__,
        sc="grey" if want.variant == "grey" else "colour",
        seg="posterior" if want.variant == "posterior" else "anterior",
        codes=provenance.codes,
        predecessors=provenance.predecessors,
        accepted=provenance.accepted,
        model=model,
    )


def compare(first: Path, second: Path) -> Version:
    """Compare two objects that came under one SOP Instance UID by their decoded content.

    "same_content": equal but for encoding, or for elements that neither identify nor place the scan.
    "identity_changed": the same image of somebody else, or of another study. Anything else is "other_pixels".
    """
    old, new = dcmread(first), dcmread(second)
    old_facts, new_facts = facts_of(old), facts_of(new)
    if _anonymous(old_facts) != _anonymous(new_facts) or not _same_pixels(old, new):
        return "other_pixels"
    return "same_content" if old_facts == new_facts else "identity_changed"


def _anonymous(facts: HeaderFacts) -> HeaderFacts:
    return replace(
        facts,
        study_instance_uid="",
        series_instance_uid="",
        patient_id="",
        issuer_of_patient_id="",
        patient_name="",
        accession_number="",
    )


def _same_pixels(old: Dataset, new: Dataset) -> bool:
    if old.get("PixelData") == new.get("PixelData"):
        return True
    try:
        pairs = list(zip(view_images([old]), view_images([new]), strict=True))
    except (UnusableScan, ValueError):
        return False
    return bool(pairs) and all(np.array_equal(a.counts, b.counts) for a, b in pairs)
