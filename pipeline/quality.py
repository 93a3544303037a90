"""Reasons not to answer that only the pixels show: no counts, too few, clipped, a flood, no neck, another kind of scan.

Each rule is conservative: it declines what is certainly not a judgeable neck, and leaves doubt to the reader. The
limits were set far outside what simulated scans of every stratum show (`pipeline/README.md` has the distances), so that
a scan that could be read is not withheld. What these rules let through may still be a poor scan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from models.weights import TrainingRange
from pipeline.finding import ViewImage
from pipeline.preprocess import CROP_MM, binned_spacing_mm, field_of_view, midline_mm

LOW_COUNTS: Final = 500
"""Counts of a whole view. Diagnostic scans hold 20,000-150,000; with 500 a hundred pixels share one count."""
PLATEAU_PIXELS: Final = 8
"""Pixels that share the greatest value. Counts vary by their square root, so a peak has one or two."""
PLATEAU_LEAST: Final = 50
"""Below this a shared greatest value is what small counts do by chance."""
FLOOD_VARIATION: Final = 0.15
"""Standard deviation over mean of the blocks of a view. A neck has air beside it; a flood has none."""
MIDLINE_MM: Final = 90.0
"""Distance of the warm body's midline from the middle of the detector."""
NECK_SHARE: Final = 0.08
"""Share of a view's counts within a box as large as the crop, in the middle of the detector."""
SMALLEST_MATRIX: Final = 64
BAND_MM: Final = 30.0
BAND_COUNTS: Final = 20.0
WARM: Final = 0.35
FOCUS_SHARE: Final = 0.5
FEWEST_BANDS: Final = 4
CUT_MM: Final = 8.0
WIDEST_NECK_MM: Final = 250.0
APART_MM: Final = 30.0
APART_SHARE: Final = 0.5
RIDGE_MM: Final = 50.0
RIDGE_COUNTS: Final = 5.0
RIDGE_SHARE: Final = 0.8
LINE_LEVEL: Final = 0.3
LINE_MM: Final = 200.0
LINE_WIDTH_MM: Final = 45.0
LINE_SHARE: Final = 0.4


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a scan cannot be judged: a token of `pipeline.reasons.REASONS`, and what was measured in which view."""

    reason: str
    detail: str


def problem_of(images: Sequence[ViewImage], training_range: TrainingRange) -> Problem | None:
    """The first problem of the views, the gravest rule first; None where they can be judged."""
    # Before the flood: of a line along the field nothing is seen but the line, and that is even.
    if (line := _agreed(images, "out_of_training_range", line_source)) is not None:
        return line
    for reason, check in _CHECKS:
        for image in images:
            detail = check(image)
            if detail is not None:
                return Problem(reason, f"{image.view} view: {detail}")
    if (shape := another_body(images)) is not None:
        return shape
    for image in images:
        detail = out_of_training_range(image, training_range)
        if detail is not None:
            return Problem("out_of_training_range", f"{image.view} view: {detail}")
    return None


def empty_frame(image: ViewImage) -> str | None:
    return None if image.counts.any() else "every pixel is zero"


def low_counts(image: ViewImage) -> str | None:
    total = _total(image)
    return f"{total} counts, fewer than {LOW_COUNTS}" if total < LOW_COUNTS else None


def clipped(image: ViewImage) -> str | None:
    """A plateau of equal pixels at the top, where counts would scatter."""
    top = float(image.counts.max())
    sharing = int((image.counts == top).sum())
    if top >= PLATEAU_LEAST and sharing >= PLATEAU_PIXELS:
        return f"{sharing} pixels share the greatest value {top:g}"
    return None


def flood(image: ViewImage) -> str | None:
    """The same counts everywhere within the field of view."""
    blocks = _blocks(image.counts, field_of_view(image.counts))
    if blocks.size < 16:
        return None
    # Counting noise of the blocks themselves is taken off, else few counts would hide a flood.
    variance = max(0.0, float(blocks.var()) - float(blocks.mean()) / _BLOCK_PIXELS)
    variation = variance**0.5 / float(blocks.mean()) if blocks.mean() > 0 else 0.0
    return f"the field is uniform to {100 * variation:.0f} %" if variation < FLOOD_VARIATION else None


def neck_outside_field(image: ViewImage) -> str | None:
    """Nothing warm where a neck is positioned."""
    off_mm = midline_mm(image.counts, field_of_view(image.counts), image.spacing_mm)
    if off_mm is not None and abs(off_mm) > MIDLINE_MM:
        return f"the warm body lies {abs(off_mm):.0f} mm off the middle"
    share = middle_share(image)
    if share < NECK_SHARE:
        return f"{100 * share:.0f} % of the counts lie around the middle"
    return None


def middle_share(image: ViewImage) -> float:
    """Share of the counts within a box of the crop's size in the middle of the field of view."""
    rows, columns = (np.flatnonzero(field_of_view(image.counts).any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return 0.0
    window = []
    for extent, size_mm, spacing in zip((rows, columns), CROP_MM, image.spacing_mm, strict=True):
        middle, half = (extent[0] + extent[-1]) / 2, size_mm / spacing / 2
        window.append(slice(max(0, round(middle - half)), round(middle + half) + 1))
    return float(image.counts[window[0], window[1]].sum(dtype=np.float64)) / max(1.0, float(_total(image)))


@dataclass(frozen=True, slots=True)
class Band:
    """A strip across the body, `BAND_MM` high: how wide it is warm, how near that comes to an edge of the field, and
    how wide the greatest cold place between two warm ones is; all in mm."""

    width_mm: float
    edge_mm: float
    gap_mm: float


def another_body(images: Sequence[ViewImage]) -> Problem | None:
    """A body that is no whole neck, or a skeleton: only where every view says so.

    A neck is the narrowest part of what lies before the camera, in one piece, with air on both sides. Where the bands
    cannot tell, in a view of few counts or under one focus that outshines the body, these rules say nothing.
    """
    ridge = _agreed(images, "out_of_training_range", ridge_along)
    return ridge or _agreed(images, "neck_outside_field", cut_or_wide)


def _agreed(images: Sequence[ViewImage], reason: str, rule: Callable[[ViewImage], str | None]) -> Problem | None:
    details = [rule(image) for image in images]
    return Problem(reason, f"{images[0].view} view: {details[0]}") if images and all(details) else None


def cut_or_wide(image: ViewImage) -> str | None:
    """The narrowest band leaves the field at its side, is as wide as a chest, or most bands are of two columns."""
    bands = silhouette(image)
    if bands is None:
        return None
    narrowest = min(bands, key=lambda band: band.width_mm)
    if narrowest.edge_mm < CUT_MM:
        return "the body's narrowest part is cut by the edge of the field"
    # The second: the lowest band may be cut off, and few counts then leave little of it.
    wide_mm = sorted(band.width_mm for band in bands)[1]
    if wide_mm > WIDEST_NECK_MM:
        return f"no part of the body is narrower than {wide_mm:.0f} mm, as in a chest"
    apart = sum(band.gap_mm > APART_MM for band in bands)
    if apart >= APART_SHARE * len(bands):
        return f"the body is in two pieces side by side in {apart} of {len(bands)} bands, as two legs are"
    return None


def silhouette(image: ViewImage) -> tuple[Band, ...] | None:
    """The warm bands from top to bottom; None where counts are too few to see them, or where one focus holds the most.

    Warm is `WARM` of the body's level, the median of the warmer half of the view under a Gaussian of 8 mm; each
    pixel is capped at twice that level, so that a focus is no wider than it is.
    """
    rows, columns = (np.flatnonzero(field_of_view(image.counts).any(axis=axis)) for axis in (1, 0))
    if rows.size < 2 or columns.size < 2:
        return None
    down_mm, across_mm = image.spacing_mm
    seen = image.counts[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    smoothed = cv2.GaussianBlur(seen, (0, 0), 8 / across_mm, sigmaY=8 / down_mm, borderType=cv2.BORDER_REPLICATE)
    warm = smoothed[smoothed > np.median(smoothed)]
    level = float(np.median(warm)) if warm.size else 0.0
    # What a piece of a band 10 mm wide holds: with fewer counts its edge is chance.
    if level * 10 * BAND_MM / (down_mm * across_mm) < BAND_COUNTS:
        return None
    y, x = np.unravel_index(int(smoothed.argmax()), smoothed.shape)
    down, across = np.ogrid[: seen.shape[0], : seen.shape[1]]
    near = ((down - y) * down_mm) ** 2 + ((across - x) * across_mm) ** 2 < 50**2
    if float(seen[near].sum(dtype=np.float64)) > FOCUS_SHARE * float(seen.sum(dtype=np.float64)):
        return None
    height = max(1, round(BAND_MM / down_mm))
    capped = np.minimum(smoothed, 2 * level)
    tops = range(0, len(capped) - height // 2, height)
    found = [_band(np.median(capped[top : top + height], axis=0) > WARM * level, across_mm) for top in tops]
    bands = tuple(band for band in found if band is not None)
    return bands if len(bands) >= FEWEST_BANDS else None


def _band(warm: NDArray[np.bool_], across_mm: float) -> Band | None:
    places = np.flatnonzero(warm)
    if not places.size:
        return None
    edge = min(int(places[0]), len(warm) - 1 - int(places[-1]))
    gap = int(np.diff(places).max(initial=1)) - 1
    return Band(float(places.size * across_mm), edge * across_mm, gap * across_mm)


def ridge_along(image: ViewImage) -> str | None:
    """A narrow ridge from top to bottom, as a spine is in a bone scan; a focus is narrow in a few bands only."""
    rows = np.flatnonzero(field_of_view(image.counts).any(axis=1))
    if rows.size < 2:
        return None
    down_mm, across_mm = image.spacing_mm
    seen = image.counts[rows[0] : rows[-1] + 1].astype(np.float32)
    height = max(1, round(BAND_MM / down_mm))
    profiles = [
        cv2.GaussianBlur(seen[top : top + height].sum(axis=0)[None], (0, 0), 5 / across_mm)[0]
        for top in range(0, len(seen) - height // 2, height)
    ]
    if len(profiles) < FEWEST_BANDS or min(float(profile.max()) for profile in profiles) < RIDGE_COUNTS:
        return None
    found = []
    for profile in profiles:
        peak = int(profile.argmax())
        above = profile > profile[peak] / 2
        cold = np.flatnonzero(~above)
        width = np.diff(cold, prepend=-1, append=len(profile))[np.searchsorted(cold, peak)] - 1
        if width * across_mm < RIDGE_MM:
            found.append(peak * across_mm)
    if len(found) < RIDGE_SHARE * len(profiles):
        return None
    aligned = sum(abs(place - float(np.median(found))) < RIDGE_MM / 2 for place in found)
    if aligned < RIDGE_SHARE * len(profiles):
        return None
    return f"{aligned} of {len(profiles)} bands have a ridge narrower than {RIDGE_MM:.0f} mm, one above the other"


def line_source(image: ViewImage) -> str | None:
    """Most counts on one straight line, longer than a neck and thinner. Not `flood`: that reason sends no note."""
    across_mm = image.spacing_mm[1]
    smoothed = cv2.GaussianBlur(image.counts.astype(np.float32), (0, 0), 4 / across_mm)
    ridge = (smoothed > LINE_LEVEL * smoothed.max()).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(ridge, connectivity=8)
    if len(stats) < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    down, across = np.nonzero(labels == largest)
    points = np.stack([across * across_mm, down * image.spacing_mm[0]], axis=1).astype(np.float32)
    sides = sorted(cv2.minAreaRect(points)[1])
    held = float(image.counts[labels == largest].sum(dtype=np.float64)) / max(1, _total(image))
    if sides[1] > LINE_MM and sides[0] < LINE_WIDTH_MM and held > LINE_SHARE:
        return f"{100 * held:.0f} % of the counts lie on a line {sides[1]:.0f} mm long and {sides[0]:.0f} mm wide"
    return None


def out_of_training_range(image: ViewImage, training_range: TrainingRange) -> str | None:
    """Spacing (as the pipeline works with it) and counts against the extent of the scans trained on."""
    if min(image.counts.shape) < SMALLEST_MATRIX:
        return f"a matrix of {image.counts.shape[0]} x {image.counts.shape[1]} is too small"
    spacing = binned_spacing_mm(image.spacing_mm)
    low, high = training_range.spacing_mm
    if not all(low <= value <= high for value in spacing):
        return f"pixels of {spacing[0]:.2f} x {spacing[1]:.2f} mm; the model was trained on {low:g} to {high:g} mm"
    total = _total(image)
    low, high = training_range.total_counts
    if not low <= total <= high:
        return f"{total} counts; the model was trained on {low:g} to {high:g}"
    return None


_CHECKS: Final[tuple[tuple[str, Callable[[ViewImage], str | None]], ...]] = (
    ("empty_frame", empty_frame),
    ("clipped", clipped),
    ("flood", flood),
    ("low_counts", low_counts),
    ("neck_outside_field", neck_outside_field),
)
_BLOCK = 16
_BLOCK_PIXELS = _BLOCK * _BLOCK


def _total(image: ViewImage) -> int:
    return round(float(image.counts.sum(dtype=np.float64)))


def _blocks(counts: NDArray[np.float32], field: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean counts of the 16 x 16 blocks that lie wholly within the field of view, flat."""
    height, width = (extent // _BLOCK * _BLOCK for extent in counts.shape)
    if not height or not width:
        return np.zeros(0)
    shape = (width // _BLOCK, height // _BLOCK)
    means, inside = (
        cv2.resize(plane[:height, :width].astype(np.float64), shape, interpolation=cv2.INTER_AREA)
        for plane in (counts, field)
    )
    return np.asarray(means[inside > 0.999], np.float64)
