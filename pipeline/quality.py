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
NEAR_MM: Final = 60.0
"""Where the field of view ends, from the middle of its matrix. A detector fills its matrix evenly: at zoom 2.0 its
edges lie 141 mm off. Near on both sides says nothing: so ends a bare neck where air holds no counts at all."""
FAR_MM: Final = 130.0
FIELD_COUNTS: Final = 3_000
"""With fewer counts whole columns of air hold none, and the field looks smaller than it is."""
END_MM: Final = 80.0
"""A body that ends lower than this above the middle is a head: from its top to the bed it is 200 mm and more, so that
the bed lies near the lower edge of the analysed box or below it."""
END_SHARE: Final = 0.2
LOWER_SHARE: Final = 0.4
SHOULDER_MM: Final = 230.0
"""Wider than any head, narrower than any shoulders. Heads of the phantoms are up to 176 mm wide."""
SHOULDERS_ABOVE_MM: Final = 40.0
"""Shoulders lie below the bed; the highest of the phantoms', moved up by 30 mm, begin 10 mm below the middle."""
OUTSHONE: Final = 8.0
"""Hottest place over the body's level. Above it penetration fills the field, and bands may be as wide as its halo."""
BAND_MM: Final = 30.0
BAND_COUNTS: Final = 20.0
WARM: Final = 0.35
FOCUS_SHARE: Final = 0.5
FEWEST_BANDS: Final = 4
CUT_MM: Final = 8.0
UNCUT_MM: Final = 30.0
"""Air on the other side. Without it the field is as wide as the body: zoomed, or air holds no counts at all."""
WIDEST_NECK_MM: Final = 250.0
APART_MM: Final = 30.0
APART_SHARE: Final = 0.5
RIDGE_MM: Final = 50.0
RIDGE_COUNTS: Final = 5.0
RIDGE_BANDS: Final = 7
"""210 mm. Foci one above the other, and arms of a star, make ridges of up to five bands, and uneven ones."""
RIDGE_SLANT: Final = 0.3
RIDGE_EVEN: Final = 2.0
RIDGE_CONTRAST: Final = 1.6
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
    """Too little of the field is left, or nothing is warm where a neck is positioned."""
    if (cut := cut_field(image)) is not None:
        return cut
    off_mm = midline_mm(image.counts, field_of_view(image.counts), image.spacing_mm)
    if off_mm is not None and abs(off_mm) > MIDLINE_MM:
        return f"the warm body lies {abs(off_mm):.0f} mm off the middle"
    share = middle_share(image)
    if share < NECK_SHARE:
        return f"{100 * share:.0f} % of the counts lie around the middle"
    return None


def cut_field(image: ViewImage) -> str | None:
    """A field of view that something covers from one side: it ends about the middle of its matrix there."""
    if _total(image) < FIELD_COUNTS:
        return None
    field = field_of_view(image.counts)
    for axis, sides in ((1, ("above", "below")), (0, ("left of", "right of"))):
        places, spacing = np.flatnonzero(field.any(axis=axis)), image.spacing_mm[1 - axis]
        middle = (field.shape[1 - axis] - 1) / 2
        ends_mm = ((middle - places[0]) * spacing, (places[-1] - middle) * spacing)
        if min(ends_mm) < NEAR_MM and max(ends_mm) > FAR_MM:
            near_mm, side = min(zip(ends_mm, sides, strict=True))
            where = f"{near_mm:.0f} mm {side}" if near_mm > 0 else "short of"
            return f"the field of view ends {where} the middle of its matrix: the rest is dark"
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
    """A strip across the body, `BAND_MM` high: how far below the field's middle it lies, how wide it is warm, how near
    that comes to either edge of the field, and how wide the greatest cold place between two warm ones is; all in mm."""

    down_mm: float
    width_mm: float
    edges_mm: tuple[float, float]
    gap_mm: float


def another_body(images: Sequence[ViewImage]) -> Problem | None:
    """A body that is no whole neck, or a skeleton: only where every view says so.

    A neck is the narrowest part of what lies before the camera, in one piece, with air on both sides. Where the bands
    cannot tell, in a view of few counts or under one focus that outshines the body, these rules say nothing.
    """
    for reason, rule in _BODIES:
        if (problem := _agreed(images, reason, rule)) is not None:
            return problem
    return None


def _agreed(images: Sequence[ViewImage], reason: str, rule: Callable[[ViewImage], str | None]) -> Problem | None:
    first = None
    for image in images:
        # The first view that shows nothing ends it: a neck is asked once, not once a view.
        if (detail := rule(image)) is None:
            return None
        first = first or Problem(reason, f"{image.view} view: {detail}")
    return first


def cut_or_wide(image: ViewImage) -> str | None:
    """The narrowest band leaves the field at one side, is as wide as a chest, or most bands are of two columns."""
    bands = silhouette(image)
    if bands is None:
        return None
    narrowest = min(bands, key=lambda band: band.width_mm)
    if min(narrowest.edges_mm) < CUT_MM and max(narrowest.edges_mm) > UNCUT_MM:
        return "the body's narrowest part is cut by the edge of the field"
    # The second: the lowest band may be cut off, and few counts then leave little of it.
    wide_mm = sorted(band.width_mm for band in bands)[1]
    if wide_mm > WIDEST_NECK_MM and not outshone(image):
        return f"no part of the body is narrower than {wide_mm:.0f} mm, as in a chest"
    apart = sum(band.gap_mm > APART_MM for band in bands)
    if apart >= APART_SHARE * len(bands):
        return f"the body is in two pieces side by side in {apart} of {len(bands)} bands, as two legs are"
    return None


def shoulders_too_high(image: ViewImage) -> str | None:
    """From well above the middle down to the lower edge all is as wide as shoulders: the bed lies above the field."""
    bands = silhouette(image)
    if bands is None or outshone(image):
        return None
    first = 0.0
    for band in reversed(bands):
        if band.width_mm < SHOULDER_MM:
            break
        first = band.down_mm
    if first < -SHOULDERS_ABOVE_MM:
        return f"the shoulders begin {-first:.0f} mm above the middle of the field"
    return None


def upside_down(image: ViewImage) -> str | None:
    """As wide as shoulders at the upper edge, and nowhere below the middle: no focus has such a halo."""
    bands = silhouette(image)
    if bands is None:
        return None
    wide = [band.width_mm >= SHOULDER_MM for band in bands]
    if all(wide[:2]) and not any(is_wide for is_wide, band in zip(wide, bands, strict=True) if band.down_mm > 0):
        return "the body is widest at the upper edge of the field, as one that lies upside down"
    return None


def head_alone(image: ViewImage) -> str | None:
    """The body ends above the middle and leaves the field downwards, without shoulders: they are missing, and the bed.

    Asked along a strip of 100 mm around the midline, row by row, so that a hot focus counts as one place of many.
    """
    rows, columns = (np.flatnonzero(field_of_view(image.counts).any(axis=axis)) for axis in (1, 0))
    off_mm = midline_mm(image.counts, field_of_view(image.counts), image.spacing_mm)
    if not rows.size or off_mm is None:
        return None
    down_mm, across_mm = image.spacing_mm
    seen = image.counts[rows[0] : rows[-1] + 1].astype(np.float32)
    smoothed = cv2.GaussianBlur(seen, (0, 0), 8 / across_mm, sigmaY=8 / down_mm, borderType=cv2.BORDER_REPLICATE)
    middle, half = (columns[0] + columns[-1]) / 2 + off_mm / across_mm, 50 / across_mm
    strip = smoothed[:, max(0, round(middle - half)) : round(middle + half) + 1]
    along = np.median(strip, axis=1) if strip.size else np.zeros(len(seen), np.float32)
    place_mm = (np.arange(len(along)) - (len(along) - 1) / 2) * down_mm
    below = along[place_mm > 0]
    level = float(np.median(below)) if below.size else 0.0
    # A middle of the strip 10 mm high: with fewer counts air and body are not told apart.
    if level * 10 * 100 / (down_mm * across_mm) < BAND_COUNTS or float(below.min()) < LOWER_SHARE * level:
        return None
    warm = np.flatnonzero(along >= END_SHARE * level)
    end_mm = float(place_mm[warm[0]])
    lowest = np.median(smoothed[place_mm > place_mm[-1] - 2 * BAND_MM], axis=0)
    width_mm = int((lowest > WARM * level).sum()) * across_mm
    if warm[0] > 0 and end_mm > -END_MM and width_mm < SHOULDER_MM:
        return f"the body ends {abs(end_mm):.0f} mm {'above' if end_mm < 0 else 'below'} the middle: a head alone"
    return None


def outshone(image: ViewImage) -> bool:
    """Whether one place is so much hotter than the body that its halo, and not the body, may be what is warm."""
    warmth = _warmth(image)
    return warmth is not None and float(warmth.smoothed.max()) > OUTSHONE * warmth.level


@dataclass(frozen=True, slots=True, eq=False)
class _Warmth:
    """A view within its field of view: its counts, the same under a Gaussian of 8 mm, and the body's level."""

    seen: NDArray[np.float32]
    smoothed: NDArray[np.float32]
    level: float


def _warmth(image: ViewImage) -> _Warmth | None:
    rows, columns = (np.flatnonzero(field_of_view(image.counts).any(axis=axis)) for axis in (1, 0))
    if rows.size < 2 or columns.size < 2:
        return None
    down_mm, across_mm = image.spacing_mm
    seen = image.counts[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    smoothed = cv2.GaussianBlur(seen, (0, 0), 8 / across_mm, sigmaY=8 / down_mm, borderType=cv2.BORDER_REPLICATE)
    warm = smoothed[smoothed > np.median(smoothed)]
    return _Warmth(seen, np.asarray(smoothed, np.float32), float(np.median(warm)) if warm.size else 0.0)


def silhouette(image: ViewImage) -> tuple[Band, ...] | None:
    """The warm bands from top to bottom; None where counts are too few to see them, or where one focus holds the most.

    Warm is `WARM` of the body's level, the median of the warmer half of the view under a Gaussian of 8 mm; each
    pixel is capped at twice that level, so that a focus is no wider than it is.
    """
    warmth = _warmth(image)
    if warmth is None:
        return None
    seen, smoothed, level = warmth.seen, warmth.smoothed, warmth.level
    down_mm, across_mm = image.spacing_mm
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
    bands = []
    for top in range(0, len(capped) - height // 2, height):
        strip = capped[top : top + height]
        middle_mm = (top + len(strip) / 2 - len(capped) / 2) * down_mm
        bands.append(_band(np.median(strip, axis=0) > WARM * level, middle_mm, across_mm))
    found = tuple(band for band in bands if band is not None)
    return found if len(found) >= FEWEST_BANDS else None


def _band(warm: NDArray[np.bool_], down_mm: float, across_mm: float) -> Band | None:
    places = np.flatnonzero(warm)
    if not places.size:
        return None
    edges = float(places[0] * across_mm), float((len(warm) - 1 - places[-1]) * across_mm)
    gap = int(np.diff(places).max(initial=1)) - 1
    return Band(down_mm, float(places.size * across_mm), edges, gap * across_mm)


@dataclass(frozen=True, slots=True)
class _Ridge:
    """The brightest place of a band: where, how wide above half of it, its counts, and over those 40 mm beside it."""

    place_mm: float
    width_mm: float
    height: float
    contrast: float


def ridge_along(image: ViewImage) -> str | None:
    """A long, narrow and even ridge, as a spine is in a bone scan; foci and arms of a star are shorter and uneven."""
    rows = np.flatnonzero(field_of_view(image.counts).any(axis=1))
    if rows.size < 2:
        return None
    down_mm, across_mm = image.spacing_mm
    seen = image.counts[rows[0] : rows[-1] + 1].astype(np.float32)
    height = max(1, round(BAND_MM / down_mm))
    ridges = [
        _ridge(cv2.GaussianBlur(seen[top : top + height].sum(axis=0)[None], (0, 0), 5 / across_mm)[0], across_mm)
        for top in range(0, len(seen) - height // 2, height)
    ]
    if any(_is_spine(ridges[first : first + RIDGE_BANDS]) for first in range(len(ridges) - RIDGE_BANDS + 1)):
        return f"an even ridge narrower than {RIDGE_MM:.0f} mm runs {RIDGE_BANDS * BAND_MM:.0f} mm along, as a spine"
    return None


def _ridge(profile: NDArray[np.float32], across_mm: float) -> _Ridge:
    peak = int(profile.argmax())
    cold = np.flatnonzero(profile <= profile[peak] / 2)
    width = np.diff(cold, prepend=-1, append=len(profile))[np.searchsorted(cold, peak)] - 1
    beside = [profile[place] for place in (peak - round(40 / across_mm), peak + round(40 / across_mm))
              if 0 <= place < len(profile)]  # fmt: skip
    top = float(profile[peak])
    return _Ridge(peak * across_mm, float(width * across_mm), top, top / max(1e-6, float(max(beside, default=np.inf))))


def _is_spine(ridges: Sequence[_Ridge]) -> bool:
    heights = sorted(ridge.height for ridge in ridges)
    places = [ridge.place_mm for ridge in ridges]
    middle = heights[len(heights) // 2]
    return (
        heights[0] >= max(RIDGE_COUNTS, middle / RIDGE_EVEN)
        and heights[-1] <= middle * RIDGE_EVEN
        and max(places) - min(places) <= RIDGE_SLANT * BAND_MM * len(ridges)
        and all(ridge.width_mm < RIDGE_MM and ridge.contrast > RIDGE_CONTRAST for ridge in ridges)
    )


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
_BODIES: Final[tuple[tuple[str, Callable[[ViewImage], str | None]], ...]] = (
    ("out_of_training_range", ridge_along),
    ("neck_outside_field", cut_or_wide),
    ("neck_outside_field", shoulders_too_high),
    ("neck_outside_field", head_alone),
    ("out_of_training_range", upside_down),
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
