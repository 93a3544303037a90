"""What an analysis hands on: a `Finding`, or `Declined`. Plain frozen data; imports neither torch nor cv2.

Pixel coordinates are native: (x, y) = (column, row) of the frame as it was received, 0-based, pixel centres at whole
numbers. The posterior view is kept as received, that is mirrored left-right against the anterior one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ViewName = Literal["anterior", "posterior"]
Verdict = Literal["present", "absent", "undetermined"]


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


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """The answer for one acquisition.

    `probability` is the fused probability of residual thyroid tissue, 0 to 1; "present" from `threshold` up, "absent"
    below, "undetermined" within `undetermined_band` (low, high) where the weights record has one.
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
