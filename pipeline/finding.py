"""What an analysis hands on: a `Finding`, or `Declined`. Plain frozen data; imports neither torch nor cv2, nor numpy.

Pixel coordinates are native: (x, y) = (column, row) of the frame as it was received, 0-based, pixel centres at whole
numbers. The posterior view is kept as received, that is mirrored left-right against the anterior one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ViewName = Literal["anterior", "posterior"]
Verdict = Literal["present", "absent", "undetermined"]
FocusSite = Literal[
    "bed_left",
    "bed_right",
    "bed_midline",
    "above_bed",
    "below_bed",
    "lateral_left",
    "lateral_right",
    "salivary_left",
    "salivary_right",
    "mouth_or_nose",
    "elsewhere",
]
"""Where a focus lies against the thyroid bed; left and right are the patient's."""
FocusDepth = Literal["surface", "neck", "deep", ""]
""""surface": nothing of it behind, so it may be contamination of the skin; "" where the counts do not tell."""


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """Where a view stands: one frame of one received object.

    `frame_number` is 1-based, as in ReferencedFrameNumber (PS3.3 10.3.1.1.3).
    """

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    frame_number: int
    number_of_frames: int


@dataclass(frozen=True, slots=True, eq=False)
class ViewImage:
    """One view of the neck: counts, shape (H, W), float32, >= 0; spacing in mm as (row, column)."""

    view: ViewName
    counts: NDArray[np.float32]
    spacing_mm: tuple[float, float]
    source: SourceFrame


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of native pixels: rows top <= y < top + height, columns left <= x < left + width."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class ViewFinding:
    """What the analysis saw in one view.

    Attributes
    ----------
    image: the view itself.
    crop: the box around the thyroid bed that the network saw, native pixels.
    mask: shape (H, W), bool: where the method found thyroid tissue (after `mask_rule`), native pixels.
    mask_rule: which rule produced the mask: "grabcut" (kept as it came), or the name of the fall-back.
    mask_area_mm2: area of `mask`.
    outline: closed polyline in native pixels, (x, y), first point repeated at the end: the outlined tissue when the
        finding is "present", else the analysed region.
    outline_area_mm2: area within the outline.
    probability: this view's own score, 0 to 1. For people who debug; the decision is the Finding's.
    total_counts, maximum_counts: of the whole view.
    remnant_to_background: mean counts within the outline over mean counts in the rest of the crop; None without tissue.
    activation: class activation, shape (H, W), float32, 0 to 1, native pixels; None where the network has none.
    """

    image: ViewImage
    crop: Box
    mask: NDArray[np.bool_]
    mask_rule: str
    mask_area_mm2: float
    outline: tuple[tuple[float, float], ...]
    outline_area_mm2: float
    probability: float
    total_counts: int
    maximum_counts: int
    remnant_to_background: float | None = None
    activation: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Which weights judged, as every result has to say.

    `release` is "demonstration", "research" or "local"; `trained_on` is a sentence fragment such as
    "simulated scans only"; `sha256` the digest of the weights file.
    """

    name: str
    version: str
    architecture: str
    sha256: str
    release: str
    trained_on: str
    intended_use: str


@dataclass(frozen=True, slots=True)
class FocusView:
    """A focus of uptake as one view shows it.

    Attributes
    ----------
    position: (x, y) in native pixels of the view as received.
    seen: whether it stands out in this view by itself; else `position` is where the other view puts it.
    significance: curvature over its counting noise, in standard deviations.
    area_mm2: at half its height, as the camera shows it, the camera's blur included; 0.0 where it is not `seen`.
    counts, counts_sd: within 12 mm, above the surroundings, with one standard deviation of counting.
    """

    view: ViewName
    position: tuple[float, float]
    seen: bool
    significance: float
    area_mm2: float
    counts: float
    counts_sd: float


@dataclass(frozen=True, slots=True)
class Focus:
    """A focus of uptake, found from the counts alone: the network neither uses it nor is judged by it.

    `number` counts from 1, the most significant first, and is the same in both views. `posterior_to_anterior` is the
    ratio of its counts, None where a view is missing or the counts are too few.
    """

    number: int
    site: FocusSite
    depth: FocusDepth
    significance: float
    posterior_to_anterior: float | None
    views: tuple[FocusView, ...]


@dataclass(frozen=True, slots=True)
class Uptake:
    """Uptake of the thyroid bed in percent of the administered activity, corrected for decay.

    `percent_sd` is one standard deviation of counting and of the neck's thickness; that of the calibration, which a
    physicist made, is not in it. `method` is a sentence for the reader: geometry, calibration, limits.
    """

    percent: float
    percent_sd: float
    method: str


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """The answer for one acquisition.

    `probability` is the fused probability of residual thyroid tissue, 0 to 1; "present" from `threshold` up, "absent"
    below, "undetermined" within `undetermined_band` (low, high) where the weights record has one.
    `foci` are None where they were not searched; empty says that none stood out. `uptake` is None where dose, time or
    calibration are not known.
    """

    finding: Verdict
    probability: float
    threshold: float
    undetermined_band: tuple[float, float] | None
    views: tuple[ViewFinding, ...]
    model: ModelFacts
    preprocessing: str
    preprocessing_version: str
    seed: int
    flags: tuple[str, ...] = ()
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    foci: tuple[Focus, ...] | None = None
    uptake: Uptake | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Declined:
    """Why there is no answer. `reason` is a token of `pipeline.reasons.REASONS`.

    `ours` says whether this is an 131I neck scan that should have been judged, so that a note has to be sent: the
    reason's own flag, narrowed by what the header showed (an unreadable object may be anything). `images` holds the
    views that could be read, so that the note can show them.
    """

    reason: str
    detail: str
    ours: bool
    images: tuple[ViewImage, ...] = ()
    timings_ms: Mapping[str, float] = field(default_factory=dict)
