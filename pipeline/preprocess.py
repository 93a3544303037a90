"""The paper's image processing (section 2.2) as small pure functions, and the two orders they are composed in.

An `Order` is data: names of steps that are executed as they stand. `native` shows the network the square root of the
counts at the camera's own resolution, both views as channels of one picture; GrabCut's mask outlines tissue for the
report and is not shown to the network: whether it is empty nearly is the label (`pipeline/README.md`).
`paper` follows the paper's text on an enlarged picture, view by view, and is slow. `pipeline/README.md` says where the
paper is silent. Equal counts and seed give equal output, bit for bit. No image raises here: one without contrast or
without a usable mask is handled by a named rule, and the name is in the result.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.finding import Box

PREPROCESSING_VERSION: Final = "2"
"""Changes whenever a step changes its output; weights trained on another version are refused."""

SEED: Final = 131
SIZE: Final = 224
"""Edge of the paper's network input."""
GRID: Final = 112
GRID_MM: Final = 2.20903
"""Edge and pixel of the native network input: the camera's own pixels at zoom 1.0, to which other zooms are summed."""
CROP_MM: Final = (GRID * GRID_MM, GRID * GRID_MM)
"""Height and width of the native box around the thyroid bed. A bed 30 mm off lies in it with 60 mm to spare."""
PAPER_CROP_MM: Final = (225.0, 240.0)
"""The paper's box, as 750 : 800."""
MIDLINE_LIMIT_MM: Final = 40.0
PAPER_CROP: Final = (750, 800)
FINEST_SPACING_MM: Final = 1.1
"""A finer matrix (512 pixels, say) is binned down towards it: GrabCut's cost and its result depend on pixel size."""
GRABCUT_SMOOTHING_MM: Final = 1.5
"""Sigma before GrabCut. On raw counts it outlines specks of noise and misses foci; from 3 mm on it takes in halos."""

GRABCUT_ITERATIONS: Final = 5
GRABCUT_INSET: Final = 0.08
"""Share of the crop's sides that is background by decree: the paper's rectangle, placed without a person."""
SMALLEST_MASK_MM2: Final = 50.0
"""Less than half of what a point source fills at the collimator's resolution (FWHM 11.6 mm): noise, not tissue."""
LARGEST_MASK_SHARE: Final = 0.5
"""A mask over more than half of the crop has taken the neck itself for tissue."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One view, ready for the network.

    Attributes
    ----------
    planes: shape (C, edge, edge), float32: what the order makes of this view, before it is standardized.
    field: shape (edge, edge), float32, 0 to 1: how much of each pixel the detector saw.
    crop: the box, native pixels.
    mask: shape (H, W) of the view, bool: GrabCut's tissue after the rule; all False where the rule fell back.
    mask_rule: "grabcut", or the fall-back by which the network saw the unmasked crop: "unmasked_empty",
        "unmasked_tiny", "unmasked_huge", "unmasked_flat".
    mask_area_mm2: area of `mask`.
    seed: of OpenCV's random generator.
    spacing_mm: (row, column) that the steps worked at: the view's own, or coarser where `resampled`.
    resampled: whether the matrix was too fine and was binned before anything else.
    """

    planes: NDArray[np.float32]
    field: NDArray[np.float32]
    crop: Box
    mask: NDArray[np.bool_]
    mask_rule: str
    mask_area_mm2: float
    seed: int
    spacing_mm: tuple[float, float]
    resampled: bool


@dataclass(frozen=True, slots=True)
class Standard:
    """What makes planes a network's input: (value / scale - mean) / std for each channel."""

    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET: Final = Standard(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ROOT_COUNTS: Final = Standard(1.0, (1.5, 1.5, 0.5), (2.0, 2.0, 0.5))
"""A neck shows some counts in a pixel; the third channel is the field's share of the views."""


@dataclass(frozen=True, slots=True)
class Order:
    """A preprocessing, as data.

    Attributes
    ----------
    steps: names in `STEPS`, in the order in which they are executed on each view.
    joint: whether the views become channels of one input (anterior, posterior turned back to the anterior's sides,
        share of the views whose detector saw the pixel), or each view an input of its own.
    standard: of its inputs.
    size: edge of its inputs.
    """

    steps: tuple[str, ...]
    joint: bool
    standard: Standard
    size: int

    def without_outline(self) -> "Order":
        """The order as far as the network needs it: what only makes a mask for the report is left out, equal planes."""
        last = max(place for place, name in enumerate(self.steps) if name.endswith("_plane") or name == "resize_224")
        return dataclasses.replace(self, steps=self.steps[: last + 1])


@dataclass(frozen=True, slots=True, eq=False)
class PreparedScan:
    """The views of one acquisition, ready for the network.

    Attributes
    ----------
    inputs: shape (K, 3, edge, edge), float32, standardized; K = 1 for a joint order, else one for each view.
    planes: the same before they are standardized; what a cohort caches.
    views: in the order they were given.
    """

    inputs: NDArray[np.float32]
    planes: NDArray[np.float32]
    views: tuple[Prepared, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """A view on its way through the steps. `counts`, `field`, `picture` and `tissue` always have one common shape."""

    counts: NDArray[np.float32]
    spacing_mm: tuple[float, float]
    seed: int
    binning: int
    field: NDArray[np.bool_]
    box: Box  # what of the binned matrix `counts` shows
    picture: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    rule: str
    planes: tuple[NDArray[np.float32], ...]
    seen: NDArray[np.float32]  # the field at the planes' size


def prepare(
    counts: NDArray[np.float32], spacing_mm: tuple[float, float], order: Order | str = "native", *, seed: int = SEED
) -> Prepared:
    """Run an order (or a name in `ORDERS`) on one view: counts (H, W), spacing (row, column) in mm.

    Raises `KeyError` for a name that is not in `ORDERS`, `ValueError` for counts that are no image.
    """
    if counts.ndim != 2 or min(counts.shape) < 16:
        raise ValueError(f"counts of shape {counts.shape} are not an image of at least 16 x 16")
    if not np.isfinite(counts).all() or min(spacing_mm) <= 0:
        raise ValueError("counts must be finite and the spacing positive")
    height, width = counts.shape
    work = _Work(
        counts=np.ascontiguousarray(counts, np.float32),
        spacing_mm=spacing_mm,
        seed=seed,
        binning=1,
        field=np.ones(counts.shape, bool),
        box=Box(0, 0, height, width),
        picture=np.zeros(counts.shape, np.uint8),
        tissue=np.zeros(counts.shape, bool),
        rule="not_outlined",
        planes=(),
        seen=np.zeros((0, 0), np.float32),
    )
    for name in (ORDERS[order] if isinstance(order, str) else order).steps:
        work = STEPS[name](work)
    return _prepared(work, (height, width))


def prepare_scan(
    views: Mapping[str, tuple[NDArray[np.float32], tuple[float, float]]],
    order: Order | str = "native",
    *,
    standard: Standard | None = None,
    seed: int = SEED,
) -> PreparedScan:
    """Both views, or one: name ("anterior", "posterior") -> counts and spacing, as in `prepare`, which it calls.

    `standard`: other than the order's own, for weights that were trained so. A joint order leaves the channel of a view
    that is missing at no counts. Raises what `prepare` raises, and `ValueError` without a view.
    """
    chosen = ORDERS[order] if isinstance(order, str) else order
    if not views:
        raise ValueError("no view to prepare")
    # A thread a view: GrabCut is half of an analysis and leaves Python's lock alone, and it draws from a generator that
    # each thread has for itself, so that the same bits come out.
    threads = _threads(os.getpid())
    begun = [threads.submit(prepare, counts, spacing, chosen, seed=seed) for counts, spacing in views.values()]
    prepared = tuple(view.result() for view in begun)
    if chosen.joint:
        planes = _joined(dict(zip(views, prepared, strict=True)), chosen.size)[None]
    else:
        planes = np.stack([_three(view.planes) for view in prepared])
    return PreparedScan(inputs=standardize(planes, standard or chosen.standard), planes=planes, views=prepared)


@cache
def _threads(_process: int) -> ThreadPoolExecutor:
    """Two threads that stay: with two of its own for each scan a process grew by 2.4 MiB in 1,000 scans, with these by
    nothing. By process, because a forked one has none of its parent's."""
    return ThreadPoolExecutor(2, "view")


def without_view(planes: NDArray[np.float32], kept: str) -> NDArray[np.float32]:
    """Joint planes (3, edge, edge) as if only the view `kept` had come; the same as `models.train.single_view`."""
    alone = planes.copy()
    alone[1 if kept == "anterior" else 0] = 0
    alone[2] /= 2
    return alone


def _joined(views: Mapping[str, Prepared], size: int) -> NDArray[np.float32]:
    joined = np.zeros((3, size, size), np.float32)
    for channel, name in enumerate(("anterior", "posterior")):
        if name in views:
            sides = slice(None, None, -1) if name == "posterior" else slice(None)
            joined[channel] = views[name].planes[0][:, sides]
            joined[2] += views[name].field[:, sides] / 2
    return joined


def _three(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.repeat(planes, 3, axis=0) if len(planes) == 1 else planes


# --- the operations, each on plain arrays ---


def binned_spacing_mm(spacing_mm: tuple[float, float]) -> tuple[float, float]:
    """The spacing that the steps work at."""
    factor = _binning(spacing_mm)
    return spacing_mm[0] * factor, spacing_mm[1] * factor


def _binning(spacing_mm: tuple[float, float]) -> int:
    # A hundredth short of the limit is the limit: 256 pixels at zoom 2.0 and 512 at 1.0 stay as they are.
    return max(1, math.ceil(FINEST_SPACING_MM / max(spacing_mm) - 0.01))


def field_of_view(counts: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the detector is: False in the bands of rows and columns of exact zeros along the edges. Shape of `counts`.

    A matrix is often larger than the detector; its empty bands hold many of its pixels and would rule any histogram. A
    zero between counts is a measurement and stays.
    """
    field = np.zeros(counts.shape, bool)
    rows, columns = (np.flatnonzero((counts != 0).any(axis=axis)) for axis in (1, 0))
    if rows.size:
        field[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return field


def midline_mm(counts: NDArray[np.float32], field: NDArray[np.bool_], spacing_mm: tuple[float, float]) -> float | None:
    """How far right of the detector's middle the warm body's midline lies, found without looking at uptake.

    The centroid of the smoothed counts of the middle band, each pixel capped at the median of the band's warmer half,
    so that a hot focus weighs no more than a pixel of neck and cannot draw it (a box that follows uptake would tell the
    label). Half the cap is taken off first, which drops the air beside the neck: septal penetration fills it with a
    few counts. None without counts.
    """
    rows, columns = (np.flatnonzero(field.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    half = 60.0 / spacing_mm[0]
    middle_row, middle_column = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    band = slice(max(0, round(middle_row - half)), round(middle_row + half) + 1)
    smoothed = cv2.GaussianBlur(counts[band], (0, 0), 8.0 / spacing_mm[1], borderType=cv2.BORDER_REPLICATE)
    warm = smoothed[smoothed > np.median(smoothed)]
    if not warm.size:
        return None
    cap = float(np.median(warm))
    weight = np.clip(smoothed - cap / 2, 0, cap / 2).sum(axis=0, dtype=np.float64)
    if weight.sum() <= 0:
        return None
    centroid = float((weight * np.arange(weight.size)).sum() / weight.sum())
    return float((centroid - middle_column) * spacing_mm[1])


def thyroid_box(
    counts: NDArray[np.float32],
    field: NDArray[np.bool_],
    spacing_mm: tuple[float, float],
    size_mm: tuple[float, float] = CROP_MM,
) -> Box:
    """The box of `size_mm` (height, width) around the thyroid bed, inside the matrix.

    Across, it is centred on `midline_mm`, held to 40 mm. Along, on the middle of the detector, where the neck is
    positioned: nothing along a neck marks the bed but uptake itself, and the box leaves 50 mm around a bed 30 mm off.
    """
    height, width = counts.shape
    rows, columns = (np.flatnonzero(field.any(axis=axis)) for axis in (1, 0))
    middle_row = (rows[0] + rows[-1]) / 2 if rows.size else (height - 1) / 2
    middle_column = (columns[0] + columns[-1]) / 2 if columns.size else (width - 1) / 2
    off_mm = midline_mm(counts, field, spacing_mm)
    if off_mm is not None:
        middle_column += min(max(off_mm, -MIDLINE_LIMIT_MM), MIDLINE_LIMIT_MM) / spacing_mm[1]
    box_height = min(height, round(size_mm[0] / spacing_mm[0]))
    box_width = min(width, round(size_mm[1] / spacing_mm[1]))
    top = min(max(0, round(middle_row - (box_height - 1) / 2)), height - box_height)
    left = min(max(0, round(middle_column - (box_width - 1) / 2)), width - box_width)
    return Box(top, left, box_height, box_width)


def window(counts: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Counts to 8 bits, 0 to the maximum."""
    values = np.maximum(counts, 0)
    top = float(values.max(initial=0.0))
    return np.round(values * (255 / top)).astype(np.uint8) if top > 0 else np.zeros(counts.shape, np.uint8)


def equalize(grey: NDArray[np.uint8], field: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Histogram equalization over the field of view, 0 outside; `cv2.equalizeHist` where the field is everything."""
    inside = grey[field]
    result = np.zeros_like(grey)
    if inside.size:
        result[field] = cv2.equalizeHist(inside.reshape(1, -1)).ravel()
    return result


def grabcut(grey: NDArray[np.uint8], field: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """GrabCut's foreground, from a rectangle `GRABCUT_INSET` inside the picture. Shape of `grey`.

    OpenCV draws from one random generator for each thread; the seed is set right before the call, in the calling
    thread, without which masks differ from call to call. Outside the field of view all is background by decree.
    """
    height, width = grey.shape
    inset_y, inset_x = max(1, round(height * GRABCUT_INSET)), max(1, round(width * GRABCUT_INSET))
    labels = np.full(grey.shape, cv2.GC_BGD, np.uint8)
    labels[inset_y : height - inset_y, inset_x : width - inset_x] = cv2.GC_PR_FGD
    labels[~field] = cv2.GC_BGD
    if not (labels == cv2.GC_PR_FGD).any() or int(grey[field].min()) == int(grey[field].max()):
        return np.zeros(grey.shape, bool)
    colour = cv2.merge((grey, grey, grey))
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    unused = (0, 0, width, height)
    cv2.setRNGSeed(seed)
    cv2.grabCut(colour, labels, unused, background, foreground, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_MASK)
    return np.asarray((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))


def smooth(
    counts: NDArray[np.float32], field: NDArray[np.bool_], spacing_mm: tuple[float, float], sigma_mm: float
) -> NDArray[np.float32]:
    """Counts under a Gaussian of `sigma_mm`, averaged over the field of view only; 0 outside."""
    sigma_x, sigma_y = sigma_mm / spacing_mm[1], sigma_mm / spacing_mm[0]
    weight = field.astype(np.float32)
    total, share = (
        cv2.GaussianBlur(plane, (0, 0), sigma_x, sigmaY=sigma_y, borderType=cv2.BORDER_REPLICATE)
        for plane in (counts * weight, weight)
    )
    return np.asarray(np.where(field, total / np.maximum(share, np.float32(1e-6)), 0), np.float32)


def without_specks(tissue: NDArray[np.bool_], pixel_mm2: float) -> NDArray[np.bool_]:
    """The mask without components (8-connected) smaller than `SMALLEST_MASK_MM2`."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(tissue.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] * pixel_mm2 >= SMALLEST_MASK_MM2
    keep[0] = False
    return np.asarray(keep[labels])


def mask_rule(tissue: NDArray[np.bool_], pixel_mm2: float, *, flat: bool) -> str:
    """Whether the mask may be used: "grabcut", else the name of the fall-back to the unmasked crop."""
    if flat:
        return "unmasked_flat"
    if not tissue.any():
        return "unmasked_empty"
    if not without_specks(tissue, pixel_mm2).any():
        return "unmasked_tiny"
    if int(tissue.sum()) > LARGEST_MASK_SHARE * tissue.size:
        return "unmasked_huge"
    return "grabcut"


def resized(plane: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """To size x size; by area where that shrinks the picture, else bilinear."""
    shrinks = min(plane.shape) > size
    return np.asarray(
        cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), np.float32
    )


def on_grid(plane: NDArray[np.float32], spacing_mm: tuple[float, float]) -> NDArray[np.float32]:
    """A crop in the pixels of the native grid, `GRID` x `GRID`; values are means, not sums.

    A crop smaller than the grid's extent, because the matrix ends there, stands in its middle between zeros.
    """
    height, width = (max(1, round(GRID * GRID_MM / spacing)) for spacing in spacing_mm)
    down, right = max(0, height - plane.shape[0]), max(0, width - plane.shape[1])
    padded = np.pad(plane, ((down // 2, down - down // 2), (right // 2, right - right // 2)))
    return padded if padded.shape == (GRID, GRID) else resized(padded, GRID)


def root_counts(counts: NDArray[np.float32], spacing_mm: tuple[float, float]) -> NDArray[np.float32]:
    """The square root of the counts in each pixel of the native grid: Poisson noise has one size everywhere."""
    pixel = GRID_MM * GRID_MM / (spacing_mm[0] * spacing_mm[1])
    density = on_grid(np.maximum(counts, 0), spacing_mm)
    if pixel != 1.0 and not math.isclose(pixel, 1.0, abs_tol=1e-3):
        density = density * np.float32(pixel)
    return np.sqrt(density)


def standardize(planes: NDArray[np.float32], standard: Standard) -> NDArray[np.float32]:
    """(value / scale - mean) / std for each channel of (..., 3, H, W), float32."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (standard.mean, standard.std))
    return np.asarray((planes.astype(np.float32) / np.float32(standard.scale) - mean) / std)


# --- the steps: the operations applied to a view on its way ---


def _bin(work: _Work) -> _Work:
    factor = _binning(work.spacing_mm)
    if factor < 2:
        return work
    height, width = (extent // factor * factor for extent in work.counts.shape)
    blocks = work.counts[:height, :width].reshape(height // factor, factor, width // factor, factor)
    counts = np.ascontiguousarray(blocks.sum(axis=(1, 3), dtype=np.float32))
    return dataclasses.replace(
        work,
        counts=counts,
        spacing_mm=(work.spacing_mm[0] * factor, work.spacing_mm[1] * factor),
        binning=factor,
        box=Box(0, 0, counts.shape[0], counts.shape[1]),
    )


def _field_of_view(work: _Work) -> _Work:
    return dataclasses.replace(work, field=field_of_view(work.counts))


def _crop(work: _Work) -> _Work:
    return _cropped(work, CROP_MM)


def _crop_as_in_the_paper(work: _Work) -> _Work:
    return _cropped(work, PAPER_CROP_MM)


def _cropped(work: _Work, size_mm: tuple[float, float]) -> _Work:
    box = thyroid_box(work.counts, work.field, work.spacing_mm, size_mm)
    part = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    return dataclasses.replace(work, counts=work.counts[part], field=work.field[part], box=box)


def _smooth_for_grabcut(work: _Work) -> _Work:
    counts = smooth(work.counts, work.field, work.spacing_mm, GRABCUT_SMOOTHING_MM)
    return dataclasses.replace(work, counts=counts)


def _window(work: _Work) -> _Work:
    return dataclasses.replace(work, picture=window(work.counts))


def _enlarge(work: _Work) -> _Work:
    height, width = PAPER_CROP
    return dataclasses.replace(
        work,
        picture=np.asarray(cv2.resize(work.picture, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8),
        field=cv2.resize(work.field.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool),
    )


def _equalize(work: _Work) -> _Work:
    return dataclasses.replace(work, picture=equalize(work.picture, work.field))


def _grabcut(work: _Work) -> _Work:
    return dataclasses.replace(work, tissue=grabcut(work.picture, work.field, work.seed))


def _mask(work: _Work) -> _Work:
    pixel_mm2 = work.box.height * work.box.width * work.spacing_mm[0] * work.spacing_mm[1] / work.tissue.size
    inside = work.picture[work.field]
    rule = mask_rule(work.tissue, pixel_mm2, flat=inside.size == 0 or int(inside.min()) == int(inside.max()))
    return dataclasses.replace(work, rule=rule, tissue=without_specks(work.tissue, pixel_mm2) & (rule == "grabcut"))


def _root_plane(work: _Work) -> _Work:
    """Of the counts as they came: this step stands before any that smooths them."""
    return dataclasses.replace(
        work,
        planes=(*work.planes, root_counts(work.counts, work.spacing_mm)),
        seen=on_grid(work.field.astype(np.float32), work.spacing_mm),
    )


def _masked_plane(work: _Work) -> _Work:
    masked = np.where(work.tissue, work.picture, 0) if work.rule == "grabcut" else work.picture
    return dataclasses.replace(work, planes=(*work.planes, masked.astype(np.float32)))


def _resize_224(work: _Work) -> _Work:
    # Rounded, as a picture of 8 bits is: the paper's images were files.
    planes = tuple(np.round(resized(plane, SIZE)) for plane in work.planes)
    return dataclasses.replace(work, planes=planes, seen=resized(work.field.astype(np.float32), SIZE))


STEPS: MappingProxyType[str, Callable[[_Work], _Work]] = MappingProxyType(
    {
        "bin": _bin,
        "field_of_view": _field_of_view,
        "crop": _crop,
        "crop_as_in_the_paper": _crop_as_in_the_paper,
        "root_plane": _root_plane,
        "smooth_for_grabcut": _smooth_for_grabcut,
        "window": _window,
        "enlarge": _enlarge,
        "equalize": _equalize,
        "grabcut": _grabcut,
        "mask": _mask,
        "masked_plane": _masked_plane,
        "resize_224": _resize_224,
    }
)

ORDERS: MappingProxyType[str, Order] = MappingProxyType(
    {
        "native": Order(
            steps=("bin", "field_of_view", "crop", "root_plane", "smooth_for_grabcut", "window", "grabcut", "mask"),
            joint=True,
            standard=ROOT_COUNTS,
            size=GRID,
        ),
        # The paper's order; one grey plane, three times, under the mask.
        "paper": Order(
            steps=(
                "bin",
                "field_of_view",
                "crop_as_in_the_paper",
                "window",
                "enlarge",
                "equalize",
                "grabcut",
                "mask",
                "masked_plane",
                "resize_224",
            ),
            joint=False,
            standard=IMAGENET,
            size=SIZE,
        ),
    }
)
"""Name of a preprocessing -> what it does."""


def _prepared(work: _Work, native_shape: tuple[int, int]) -> Prepared:
    """Bring box and mask back to native pixels."""
    box, factor = work.box, work.binning
    tissue = work.tissue.view(np.uint8)
    if tissue.shape != (box.height, box.width):
        tissue = np.asarray(cv2.resize(tissue, (box.width, box.height), interpolation=cv2.INTER_NEAREST), np.uint8)
    mask = np.zeros(native_shape, bool)
    native = Box(box.top * factor, box.left * factor, box.height * factor, box.width * factor)
    mask[native.top : native.top + native.height, native.left : native.left + native.width] = np.kron(
        tissue, np.ones((factor, factor), np.uint8)
    ).astype(bool)
    pixel_mm2 = work.spacing_mm[0] * work.spacing_mm[1] / factor**2
    return Prepared(
        planes=np.stack(work.planes),
        field=work.seen,
        crop=native,
        mask=mask,
        mask_rule=work.rule,
        mask_area_mm2=int(mask.sum()) * pixel_mm2,
        seed=work.seed,
        spacing_mm=work.spacing_mm,
        resampled=factor > 1,
    )
