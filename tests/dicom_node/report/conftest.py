"""Scans of the simulated camera, outcomes built by hand on them, and the context a result needs."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from dicom_node.report import NODE_NAMESPACE, RenderedResult, ReportContext, render
from pipeline.camera import Examination, examination, expose
from pipeline.finding import (
    Box,
    Declined,
    Finding,
    Focus,
    FocusView,
    ModelFacts,
    SourceFrame,
    Uptake,
    ViewFinding,
    ViewImage,
)
from pipeline.phantom import phantom

DIGEST = hashlib.sha256(b"weights of a test").hexdigest()


def model(release: str = "demonstration") -> ModelFacts:
    return ModelFacts(
        name="remnant-resnet18-phantom",
        version="0.1.0",
        architecture="resnet18",
        sha256=DIGEST,
        release=release,
        trained_on="simulated scans only",
        intended_use="demonstration of the node",
    )


def as_received(ds: Dataset) -> Dataset:
    """The dataset as a receiver has it: written to bytes and read back."""
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return pydicom.dcmread(BytesIO(buffer.getvalue()))


def views_of(sources: Sequence[Dataset], *, outlined: bool) -> tuple[ViewFinding, ...]:
    """The photopeak views of a scan, with an outline around the hottest spot or around the analysed region."""
    found = []
    for ds in sources:
        frames = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
        detectors = ds.DetectorInformationSequence
        for number, (window, detector) in enumerate(
            zip(np.atleast_1d(ds.EnergyWindowVector), np.atleast_1d(ds.DetectorVector), strict=True), start=1
        ):
            if int(window) == 1:
                angle = float(detectors[int(detector) - 1].StartAngle)
                name = "anterior" if abs(angle - 180) < 45 else "posterior"
                found.append(_view(ds, name, frames[number - 1], number, len(frames), outlined))
    return tuple(sorted(found, key=lambda view: view.image.view))


def _foci(views: tuple[ViewFinding, ...]) -> tuple[Focus, ...]:
    """Two invented foci, the second one seen from the front alone."""
    names = [view.image.view for view in views]
    return tuple(
        Focus(
            number,
            site,
            depth,
            9.5 - number,
            0.42 / number,
            tuple(
                FocusView(
                    name,
                    (100.25 + 20 * number, 120.5),
                    name == "anterior" or number == 1,
                    8.1,
                    212.4 if name == "anterior" or number == 1 else 0.0,
                    1234.4 / number,
                    45.6,
                )
                for name in names
            ),
        )
        for number, site, depth in ((1, "bed_left", "neck"), (2, "lateral_right", "surface"))
    )


def _view(ds: Dataset, name: Any, counts: np.ndarray, number: int, frames: int, outlined: bool) -> ViewFinding:
    source = SourceFrame(ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID, number, frames)
    spacing = tuple(float(mm) for mm in ds.PixelSpacing)
    crop = Box(top=96, left=104, height=44, width=48)
    y, x = np.unravel_index(int(counts[96:140, 104:152].argmax()), (44, 48))
    turns = np.linspace(0, 2 * np.pi, 25)
    ring = [(104 + x + 7 * np.cos(t), 96 + y + 5 * np.sin(t)) for t in turns[:-1]]
    box = [(104.0, 96.0), (151.0, 96.0), (151.0, 139.0), (104.0, 139.0)]
    outline = tuple((float(a), float(b)) for a, b in (ring if outlined else box))
    rows, columns = np.mgrid[: ds.Rows, : ds.Columns]
    mask = ((columns - 104 - x) / 7) ** 2 + ((rows - 96 - y) / 5) ** 2 <= 1
    return ViewFinding(
        image=ViewImage(name, counts.astype(np.float32), spacing, source),
        crop=crop,
        mask=mask if outlined else np.zeros_like(mask),
        mask_rule="grabcut",
        mask_area_mm2=536.6 if outlined else 0.0,
        outline=(*outline, outline[0]),
        outline_area_mm2=536.62,
        probability=0.5,
        total_counts=int(counts.sum()),
        maximum_counts=int(counts.max()),
        remnant_to_background=12.345 if outlined else None,
        activation=mask.astype(np.float32),
    )


@dataclass(frozen=True)
class Case:
    """A scan, its outcome and the context: what `render` takes."""

    sources: tuple[Dataset, ...]
    outcome: Finding | Declined
    context: ReportContext

    def render(self, kind: str = "sr") -> RenderedResult:
        return render(self.outcome, self.sources, self.context, (kind,))[0]

    def read(self, kind: str = "sr") -> Dataset:
        return pydicom.dcmread(BytesIO(self.render(kind).data))


PROBABILITIES = {"present": 0.873, "absent": 0.021, "undetermined": 0.47}


def make_case(
    outcome: str = "present",
    *,
    shape: Any = "two_frames",
    release: str = "demonstration",
    seed: int = 3,
    who: Examination | None = None,
    change: Callable[[Dataset], object] = lambda ds: None,
    **context: Any,
) -> Case:
    """`outcome` is a verdict or a reason; `change` alters each source before it is sent."""
    sent = expose(phantom(seed), who or examination(0), shape)
    for ds in sent:
        change(ds)
    sources = tuple(as_received(ds) for ds in sent)
    views = views_of(sources, outlined=outcome == "present")
    answer: Finding | Declined
    if outcome in PROBABILITIES:
        answer = Finding(
            finding=outcome,
            probability=PROBABILITIES[outcome],
            threshold=0.5,
            undetermined_band=(0.4, 0.6) if outcome == "undetermined" else None,
            views=views,
            model=model(release),
            preprocessing="native",
            preprocessing_version="1",
            seed=0,
            flags=("star_artefact",),
            foci=_foci(views),
            uptake=Uptake(1.2345, 0.2468, "Uptake by an invented method.") if outcome == "present" else None,
        )
    else:
        answer = Declined(outcome, "counts 12 of 1000", True, tuple(view.image for view in views))
    base = ReportContext(
        revision=1,
        source_digests={ds.SOPInstanceUID: hashlib.sha256(ds.PixelData).hexdigest() for ds in sources},
        analysed_at=datetime(2026, 3, 4, 23, 30, 15, 250000, tzinfo=UTC),
        timezone=ZoneInfo("Europe/Berlin"),
        settings_fingerprint="0" * 16,
        uid_namespace=NODE_NAMESPACE,
        ae_title="REMNANT",
        software_version="0.1.0",
        model=model(release),
    )
    return Case(sources, answer, replace(base, **context))


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    """Make a case; see `make_case`."""
    return make_case
