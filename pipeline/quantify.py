"""What can be counted in a view without knowing the dose: outline, area, counts, remnant-to-background ratio.

Neck uptake in percent needs dose, time and a calibrated camera, which the header rarely holds; it is not guessed here.
Coordinates are native pixels, (x, y), pixel centres at whole numbers.
"""

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.finding import Box
from pipeline.preprocess import field_of_view

Polyline = tuple[tuple[float, float], ...]
_FINE: Final = 4
"""Outlines are traced on a grid four times as fine, so that they run along the mask's edge, not through its pixels."""


def main_component(
    mask: NDArray[np.bool_], counts: NDArray[np.float32], weight: NDArray[np.float32] | None = None
) -> NDArray[np.bool_]:
    """The component (8-connected) of the mask with the most counts; empty for an empty mask.

    With `weight` (H, W), 0..1, counts weigh by it: of a remnant and a salivary gland, that one is outlined which the
    network's evidence comes from. Where that weight is zero on all of the mask, the counts decide alone.
    """
    number, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    if number < 2:
        return np.zeros(mask.shape, bool)
    values = counts.astype(np.float64)
    if weight is not None and (weighted := values * weight)[mask].any():
        values = weighted
    sums = np.bincount(labels.ravel(), values.ravel(), minlength=number)
    sums[0] = -1
    return np.asarray(labels == int(sums.argmax()))


def outline(component: NDArray[np.bool_]) -> Polyline:
    """Closed polyline (first point repeated) around one component. Empty for an empty mask."""
    if not component.any():
        return ()
    padded = np.pad(component.astype(np.float32), 1)
    height, width = padded.shape
    fine = cv2.resize(padded, (width * _FINE, height * _FINE), interpolation=cv2.INTER_LINEAR) >= 0.5
    contours, _ = cv2.findContours(fine.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    longest = max(contours, key=cv2.contourArea).reshape(-1, 2)
    points = [(float((x + 0.5) / _FINE - 1.5), float((y + 0.5) / _FINE - 1.5)) for x, y in longest]
    return (*points, points[0])


def box_outline(box: Box) -> Polyline:
    """Closed polyline along the outer edge of the box's pixels."""
    left, top = box.left - 0.5, box.top - 0.5
    right, bottom = left + box.width, top + box.height
    return ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))


def area_mm2(polyline: Polyline, spacing_mm: tuple[float, float]) -> float:
    """Area within a closed polyline (shoelace formula), spacing as (row, column)."""
    if len(polyline) < 4:
        return 0.0
    x, y = np.array(polyline, np.float64).T
    doubled = np.abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
    return float(doubled / 2 * spacing_mm[0] * spacing_mm[1])


def remnant_to_background(
    counts: NDArray[np.float32], component: NDArray[np.bool_], mask: NDArray[np.bool_], crop: Box
) -> float | None:
    """Mean counts in `component` over mean counts in the crop outside of `mask`, within the field of view.

    None without tissue, and where the background holds no counts.
    """
    if not component.any():
        return None
    inside = np.zeros(counts.shape, bool)
    inside[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width] = True
    rest = counts[inside & ~mask & field_of_view(counts)]
    if not rest.size or rest.mean(dtype=np.float64) <= 0:
        return None
    return float(counts[component].mean(dtype=np.float64) / rest.mean(dtype=np.float64))
