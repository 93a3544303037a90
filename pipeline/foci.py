"""Foci of uptake: where they lie, how many counts they hold, and what the camera can and cannot tell apart.

A focus is a spot that is brighter than its surroundings in both directions by more than counting noise allows. Counts
vary by their square root (Poisson), the camera blurs a point to 8.5-15 mm (FWHM), and a neck is bright in itself: so a
view is curved against its own surroundings at the camera's scale, and the curvature is weighed against what noise alone
would give. An edge, a vessel or an arm of septal penetration is curved in one direction only and is no focus. Nothing
here knows the network, and the network knows nothing of it: the list stands beside the decision and changes nothing.

The posterior view shows the same neck mirrored, so a focus is searched in the anterior view, in the posterior one, and
in the sum of both, and gets one number in both. Views that do not lie over each other are searched apart: only the
anterior one then. `pipeline/README.md` has what was measured on simulated scans. No input raises.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.finding import Focus, FocusDepth, FocusSite, FocusView, Verdict, ViewImage, ViewName
from pipeline.preprocess import binned_spacing_mm, field_of_view, thyroid_box

SCALE_MM: Final = 5.0
"""Sigma of the search: that of a small focus at the camera's resolution (FWHM 11.6 mm at 10 cm)."""
SIGNIFICANCE: Final = 5.0
"""Curvature over its counting noise. A view holds a few hundred places that could be a focus by chance."""
WEAK_SIGNIFICANCE: Final = 2.5
ROUNDNESS: Final = 0.25
"""The weaker of the two curvatures against the stronger: 1 for a round spot, 0 for a ridge."""
EDGE_MM: Final = 10.0
"""Nearer to the end of the detector the surroundings are not seen."""
APART_MM: Final = 14.0
"""Two spots nearer than the camera's resolution are one focus: nothing tells them apart."""
PAIR_MM: Final = 8.0
REGION_MM: Final = 12.0
"""Radius that a focus's counts are summed in; a small focus has nine tenths of its unscattered counts there."""
SURROUNDINGS_MM: Final = (18.0, 27.0)
MOST_FOCI: Final = 12
BED_SITES: Final[frozenset[FocusSite]] = frozenset({"bed_left", "bed_right", "bed_midline", "above_bed"})
"""Where residual thyroid tissue lies: the bed, the pyramidal lobe, the thyroglossal tract."""
OTHER_SITES: Final[frozenset[FocusSite]] = frozenset({"lateral_left", "lateral_right", "below_bed", "elsewhere"})
"""Neither the bed nor where glands, mouth and nose take up iodine in everybody."""

_DETECTED_AGAIN = 3.5  # in the other view, at a known place: one try, not hundreds
_NOISE_FLOOR = 0.02  # counts a pixel; where nothing was counted, noise is not zero
_NO_NEIGHBOUR_MM = 15.0


@dataclass(frozen=True, slots=True, eq=False)
class _Curvature:
    """A plane at `SCALE_MM`, each (H, W): smoothed counts; weaker and summed curvature; both over their noise."""

    smoothed: NDArray[np.float64]
    weak: NDArray[np.float64]
    both: NDArray[np.float64]
    significance: NDArray[np.float64]
    weak_significance: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Spot:
    significance: float
    x: float
    y: float


@dataclass(frozen=True, slots=True, eq=False)
class _Plane:
    """Counts in the anterior view's orientation, binned where the matrix is finer than the camera."""

    view: ViewName
    counts: NDArray[np.float32]
    field: NDArray[np.bool_]
    curvature: _Curvature
    mirrored: bool


def find_foci(images: Sequence[ViewImage]) -> tuple[Focus, ...]:
    """The foci of one neck, the most significant first, at most `MOST_FOCI`; empty where none stands out.

    `images`: the views of one acquisition. Positions are native pixels of each view, the posterior one as received.
    """
    one_neck = _overlaid(images)
    if not one_neck:
        return ()
    first = one_neck[0]
    factor = _binning(first.spacing_mm)
    row_mm, column_mm = first.spacing_mm[0] * factor, first.spacing_mm[1] * factor
    spacing_mm = (row_mm, column_mm)
    planes = tuple(_plane(image, factor, spacing_mm) for image in one_neck)
    if min(planes[0].counts.shape) < 16:
        return ()
    spots = [spot for plane in planes for spot in _spots(plane.curvature, plane.field, spacing_mm)]
    together = planes[0].counts
    field = planes[0].field
    if len(planes) > 1:
        together = together + planes[1].counts
        field = field & planes[1].field
        spots += _spots(_curvature(together, spacing_mm), field, spacing_mm)
    box = thyroid_box(together, field, spacing_mm)
    bed = (box.left + (box.width - 1) / 2, box.top + (box.height - 1) / 2)
    kept = _apart(spots, spacing_mm)
    found = []
    for number, spot in enumerate(kept, start=1):
        others = [other for other in kept if other is not spot]
        views = tuple(_measured(plane, spot, others, spacing_mm, factor) for plane in planes)
        ratio, depth = _behind_and_before(views)
        site = site_of((spot.x - bed[0]) * column_mm, (spot.y - bed[1]) * row_mm)
        found.append(Focus(number, site, depth, spot.significance, ratio, views))
    return tuple(found)


def site_of(left_mm: float, below_mm: float) -> FocusSite:
    """Where a focus lies against the middle of the thyroid bed: mm to the patient's left, and towards the feet.

    The bed's height is where the neck was positioned, within some 20 mm: its upper and lower limits are no sharper.
    """
    aside_mm, left = abs(left_mm), left_mm > 0
    if aside_mm > 90 or below_mm > 130:
        return "elsewhere"
    if below_mm < -54 and aside_mm > 18:
        return "salivary_left" if left else "salivary_right"
    if below_mm < -66:
        return "mouth_or_nose"
    if aside_mm > 29:
        return "lateral_left" if left else "lateral_right"
    if below_mm < -34:
        return "above_bed"
    if below_mm > 30:
        return "below_bed"
    if aside_mm < 6:
        return "bed_midline"
    return "bed_left" if left else "bed_right"


def region(
    shape: tuple[int, int], centre: tuple[float, float], spacing_mm: tuple[float, float], radius_mm: float
) -> NDArray[np.bool_]:
    """Pixels of (H, W) whose centres lie within a circle, in mm, around (x, y)."""
    return distance_mm(shape, centre, spacing_mm) <= radius_mm


def distance_mm(
    shape: tuple[int, int], centre: tuple[float, float], spacing_mm: tuple[float, float]
) -> NDArray[np.float64]:
    """How far each pixel's centre lies from (x, y), in mm, shape (H, W)."""
    rows = (np.arange(shape[0]) - centre[1]) * spacing_mm[0]
    columns = (np.arange(shape[1]) - centre[0]) * spacing_mm[1]
    return np.asarray(np.hypot(rows[:, None], columns[None, :]))


def _overlaid(images: Sequence[ViewImage]) -> list[ViewImage]:
    """The views that lie over each other, the anterior one first."""
    ordered = sorted(images, key=lambda image: image.view != "anterior")
    first = ordered[:1]
    return first + [
        image
        for image in ordered[1:2]
        if image.view != first[0].view
        and image.counts.shape == first[0].counts.shape
        and np.allclose(image.spacing_mm, first[0].spacing_mm, rtol=1e-3)
    ]


def _binning(spacing_mm: tuple[float, float]) -> int:
    return max(1, round(binned_spacing_mm(spacing_mm)[0] / spacing_mm[0]))


def _plane(image: ViewImage, factor: int, spacing_mm: tuple[float, float]) -> _Plane:
    height, width = (extent // factor * factor for extent in image.counts.shape)
    blocks = image.counts[:height, :width].reshape(height // factor, factor, width // factor, factor)
    counts = np.ascontiguousarray(blocks.sum(axis=(1, 3), dtype=np.float32))
    mirrored = image.view == "posterior"
    if mirrored:
        counts = np.ascontiguousarray(counts[:, ::-1])
    return _Plane(image.view, counts, field_of_view(counts), _curvature(counts, spacing_mm), mirrored)


def _curvature(counts: NDArray[np.float32], spacing_mm: tuple[float, float]) -> _Curvature:
    """Curvature at `SCALE_MM`, times its square, positive on a summit; noise as Poisson counts would give it."""
    (flat_y, slope_y, bend_y), (flat_x, slope_x, bend_x) = (_kernels(SCALE_MM / each) for each in spacing_mm)
    values = counts.astype(np.float32)

    def filtered(along_x: NDArray[np.float64], along_y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.sepFilter2D(values, -1, along_x, along_y, borderType=cv2.BORDER_REFLECT), np.float64)

    smoothed = filtered(flat_x, flat_y)
    across, along, mixed = filtered(bend_x, flat_y), filtered(flat_x, bend_y), filtered(slope_x, slope_y)
    both = -(across + along)
    weak = both / 2 - np.hypot((across - along) / 2, mixed)
    # The variance of a sum of Poisson counts is the same sum with squared weights: exact beside an edge as well.
    of_x, of_y = filtered(bend_x**2, flat_y**2), filtered(flat_x**2, bend_y**2)
    of_both = of_x + of_y + 2 * filtered(bend_x * flat_x, bend_y * flat_y)
    least = _NOISE_FLOOR * float(((np.outer(bend_y, flat_x) + np.outer(flat_y, bend_x)) ** 2).sum())
    noise = np.sqrt(np.maximum(of_both, least))
    weak_noise = np.sqrt(np.maximum(np.maximum(of_x, of_y), least / 2))
    return _Curvature(smoothed, weak, both, both / noise, weak / weak_noise)


def _kernels(sigma: float) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A Gaussian of `sigma` pixels, its first and its second derivative, each times sigma to that power."""
    reach = math.ceil(4 * sigma)
    at = np.arange(-reach, reach + 1) / sigma
    flat = np.exp(-0.5 * at**2)
    flat /= flat.sum()
    bend = flat * (at**2 - 1)
    return flat, -flat * at, bend - bend.sum() * flat


def _spots(curvature: _Curvature, field: NDArray[np.bool_], spacing_mm: tuple[float, float]) -> list[_Spot]:
    """Local summits of the significance that are no ridge, within the field of view."""
    margin = (2 * int(EDGE_MM / spacing_mm[0]) + 1, 2 * int(EDGE_MM / spacing_mm[1]) + 1)
    inner = cv2.erode(
        field.astype(np.uint8), np.ones(margin, np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0
    ).astype(bool)
    reach = tuple(2 * round(6.0 / spacing_mm[axis]) + 1 for axis in (1, 0))
    summit = cv2.dilate(curvature.significance, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, reach))
    strong = curvature.both - curvature.weak
    spots = (
        inner
        & (curvature.significance >= summit)
        & (curvature.significance > SIGNIFICANCE)
        & (curvature.weak_significance > WEAK_SIGNIFICANCE)
        & (curvature.weak > ROUNDNESS * strong)
    )
    return [
        _Spot(float(curvature.significance[y, x]), *_between_pixels(curvature.significance, int(x), int(y)))
        for y, x in zip(*np.nonzero(spots), strict=True)
    ]


def _between_pixels(values: NDArray[np.float64], x: int, y: int) -> tuple[float, float]:
    """The summit of a parabola through a pixel and its neighbours, along each axis."""
    placed = []
    for at, line in ((x, values[y]), (y, values[:, x])):
        before, here, after = line[max(at - 1, 0)], line[at], line[min(at + 1, line.size - 1)]
        bend = before - 2 * here + after
        placed.append(at + (float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5)) if bend < 0 else 0.0))
    return placed[0], placed[1]


def _apart(spots: Sequence[_Spot], spacing_mm: tuple[float, float]) -> list[_Spot]:
    kept: list[_Spot] = []
    for spot in sorted(spots, key=lambda one: (-one.significance, one.y, one.x)):
        if all(_apart_mm(spot, other, spacing_mm) >= APART_MM for other in kept):
            kept.append(spot)
    return kept[:MOST_FOCI]


def _apart_mm(one: _Spot, other: _Spot, spacing_mm: tuple[float, float]) -> float:
    return math.hypot((one.x - other.x) * spacing_mm[1], (one.y - other.y) * spacing_mm[0])


def _measured(
    plane: _Plane, spot: _Spot, others: Sequence[_Spot], spacing_mm: tuple[float, float], factor: int
) -> FocusView:
    """A focus in one view: its own summit where it has one nearby, else the place that the other view gave."""
    shape = (plane.counts.shape[0], plane.counts.shape[1])
    near = region(shape, (spot.x, spot.y), spacing_mm, PAIR_MM)
    y, x = np.unravel_index(int(np.where(near, plane.curvature.significance, -np.inf).argmax()), shape)
    significance = float(plane.curvature.significance[y, x])
    seen = significance > _DETECTED_AGAIN
    centre = _between_pixels(plane.curvature.significance, int(x), int(y)) if seen else (spot.x, spot.y)
    counts, counts_sd, surroundings = net_counts(
        plane.counts, plane.field, centre, [(other.x, other.y) for other in others], spacing_mm
    )
    area_mm2 = _area_mm2(plane.curvature.smoothed, centre, surroundings, spacing_mm) if seen else 0.0
    column = plane.counts.shape[1] - 1 - centre[0] if plane.mirrored else centre[0]
    native = tuple((at + 0.5) * factor - 0.5 for at in (column, centre[1]))
    return FocusView(plane.view, (native[0], native[1]), seen, significance, area_mm2, counts, counts_sd)


def net_counts(
    counts: NDArray[np.float32],
    field: NDArray[np.bool_],
    centre: tuple[float, float],
    others: Sequence[tuple[float, float]],
    spacing_mm: tuple[float, float],
) -> tuple[float, float, float]:
    """Counts within `REGION_MM` above the mean of a ring around it, their standard deviation, and that mean a pixel.

    Pixels near `others` (x, y) are left out of the ring, unless little of it would remain.
    """
    shape = (counts.shape[0], counts.shape[1])
    away_mm = distance_mm(shape, centre, spacing_mm)
    inside = (away_mm <= REGION_MM) & field
    whole = (away_mm >= SURROUNDINGS_MM[0]) & (away_mm <= SURROUNDINGS_MM[1]) & field
    ring = whole.copy()
    for other in others:
        ring &= ~region(shape, other, spacing_mm, _NO_NEIGHBOUR_MM)
    if ring.sum() < max(20, 0.3 * whole.sum()):
        ring = whole
    if not inside.any() or not ring.any():
        return 0.0, 0.0, 0.0
    gross, size = float(counts[inside].sum(dtype=np.float64)), int(inside.sum())
    mean = float(counts[ring].mean(dtype=np.float64))
    return gross - mean * size, math.sqrt(max(1.0, gross + mean * size**2 / int(ring.sum()))), mean


def _area_mm2(
    smoothed: NDArray[np.float64], centre: tuple[float, float], surroundings: float, spacing_mm: tuple[float, float]
) -> float:
    """Area at half the height above the surroundings, as the camera shows it; the smoothing's own share taken off."""
    x, y = round(centre[0]), round(centre[1])
    level = surroundings + (smoothed[y, x] - surroundings) / 2
    shape = (smoothed.shape[0], smoothed.shape[1])
    above = (smoothed >= level) & region(shape, centre, spacing_mm, 3 * REGION_MM)
    _, labels = cv2.connectedComponents(above.astype(np.uint8), connectivity=4)
    pixel_mm2 = spacing_mm[0] * spacing_mm[1]
    shown_mm2 = int((labels == labels[y, x]).sum()) * pixel_mm2 if labels[y, x] else 0.0
    return max(pixel_mm2, shown_mm2 - 2 * math.pi * math.log(2) * SCALE_MM**2)


def _behind_and_before(views: Sequence[FocusView]) -> tuple[float | None, FocusDepth]:
    """Posterior over anterior counts, and what it hints at; None without both, or where the anterior is mere noise.

    In water (0.11 /cm) a focus 15-32 mm under the skin of a neck 105-140 mm thick sends a third to a half as many
    counts to the back as to the front; one behind the windpipe as many; a drop of saliva on the skin next to none.
    """
    by_view = {one.view: one for one in views}
    if set(by_view) != {"anterior", "posterior"}:
        return None, ""
    front, back = by_view["anterior"], by_view["posterior"]
    if front.counts < 3 * front.counts_sd:
        return None, "deep" if back.seen and not front.seen else ""
    ratio = back.counts / front.counts
    spread = math.hypot(back.counts_sd, ratio * front.counts_sd) / front.counts
    if ratio + 2 * spread < 0.15:
        return ratio, "surface"
    if ratio - 2 * spread > 0.7:
        return ratio, "deep"
    return ratio, "neck" if ratio - 2 * spread > 0.1 else ""


# --- What a reader should be told beside the verdict ---

STAR_RING_MM: Final = (22.0, 60.0)
STAR_SIGNIFICANCE: Final = 7.0
STAR_BRIGHTNESS: Final = 0.5
"""Counts of a focus over those of the ring around it, from which on its arms can be told from the neck."""
FEW_COUNTS: Final = 20_000
"""Counts of a whole view; diagnostic ones hold 20,000 to 150,000."""


def flags_of(images: Sequence[ViewImage], foci: Sequence[Focus], verdict: Verdict) -> tuple[str, ...]:
    """What the pictures and the foci say beside the verdict, which none of it changes.

    "star_artefact": arms of septal penetration around a hot focus. "low_counts": judgeable, but poorer than a
    diagnostic scan. With the verdict "absent" only: "other_uptake" for a focus outside of the bed that is no gland and
    not mouth or nose (a lateral focus alone is other uptake, not residual tissue); "focus_in_bed" for one in the bed or
    above it, which a person has to look at, because the network took it for no thyroid tissue.
    """
    found = []
    if any(has_star(image, foci) for image in images):
        found.append("star_artefact")
    if any(float(image.counts.sum(dtype=np.float64)) < FEW_COUNTS for image in images):
        found.append("low_counts")
    if verdict == "absent":
        sites = {focus.site for focus in foci}
        found += ["other_uptake"] if sites & OTHER_SITES else []
        found += ["focus_in_bed"] if sites & BED_SITES else []
    return tuple(found)


def has_star(image: ViewImage, foci: Sequence[Focus]) -> bool:
    """Whether the counts around the view's hottest focus come in six arms, 60 degrees apart, beyond counting noise.

    The sixth harmonic of the ring's counts around the focus, each distance's mean taken off, over its Poisson noise.
    """
    seen = [one for focus in foci for one in focus.views if one.view == image.view and one.seen]
    if not seen:
        return False
    hottest = max(seen, key=lambda one: one.counts)
    shape = (image.counts.shape[0], image.counts.shape[1])
    away_mm = distance_mm(shape, hottest.position, image.spacing_mm)
    ring = (away_mm > STAR_RING_MM[0]) & (away_mm < STAR_RING_MM[1]) & field_of_view(image.counts)
    for one in seen:
        if one is not hottest:
            ring &= ~region(shape, one.position, image.spacing_mm, _NO_NEIGHBOUR_MM)
    counts, step = image.counts[ring].astype(np.float64), away_mm[ring].astype(int)
    total = float(counts.sum())
    if total <= 0 or hottest.counts < STAR_BRIGHTNESS * total:
        return False
    mean = np.bincount(step, counts) / np.maximum(1, np.bincount(step))
    rows, columns = np.nonzero(ring)
    angle = np.arctan2(
        (rows - hottest.position[1]) * image.spacing_mm[0], (columns - hottest.position[0]) * image.spacing_mm[1]
    )
    sixth = abs(complex(((counts - mean[step]) * np.exp(6j * angle)).sum()))
    return sixth > STAR_SIGNIFICANCE * math.sqrt(total / 2)
