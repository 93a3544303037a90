"""Outlines, areas, ratios and the map of the evidence, on shapes whose figures are known."""

import numpy as np
import pytest

from pipeline.explain import native_activation
from pipeline.finding import Box
from pipeline.quantify import area_mm2, box_outline, main_component, outline, remnant_to_background

SPACING = (2.0, 3.0)


def _disc(y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:64, :96]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)


def test_the_outline_of_a_disc_is_closed_lies_on_its_edge_and_holds_its_area() -> None:
    line = outline(_disc(30, 40, 10))
    assert line[0] == line[-1]
    assert len(line) > 8
    distances = [np.hypot(x - 40, y - 30) for x, y in line]
    assert 9.2 < min(distances) <= max(distances) < 11.2
    assert area_mm2(line, SPACING) == pytest.approx(np.pi * 100 * 6, rel=0.06)


def test_a_disc_at_the_edge_of_the_matrix_is_outlined_within_it() -> None:
    xs, ys = zip(*outline(_disc(0, 0, 6)), strict=True)
    assert min(xs) >= -0.5
    assert min(ys) >= -0.5
    assert outline(np.zeros((8, 8), bool)) == ()


def test_the_box_outline_runs_around_whole_pixels() -> None:
    line = box_outline(Box(10, 20, 5, 7))
    assert line == ((19.5, 9.5), (26.5, 9.5), (26.5, 14.5), (19.5, 14.5), (19.5, 9.5))
    assert area_mm2(line, SPACING) == pytest.approx(5 * 7 * 6)
    assert area_mm2((), SPACING) == 0


def test_the_main_component_has_the_most_counts_unless_the_evidence_lies_elsewhere() -> None:
    bed, gland = _disc(30, 30, 4), _disc(30, 70, 6)
    counts = np.where(gland, 20, 1).astype(np.float32) + 9 * bed
    assert np.array_equal(main_component(bed | gland, counts), gland)
    evidence = _disc(30, 30, 12).astype(np.float32)
    assert np.array_equal(main_component(bed | gland, counts, evidence), bed)
    assert np.array_equal(main_component(bed | gland, counts, np.zeros_like(evidence)), gland)
    assert not main_component(np.zeros((64, 96), bool), counts).any()


def test_remnant_to_background_leaves_out_the_other_uptake_and_what_no_detector_saw() -> None:
    bed, gland = _disc(30, 30, 4), _disc(30, 70, 6)
    counts = np.full((64, 96), 2, np.float32)
    counts[bed], counts[gland] = 10, 50
    counts[:5] = 0
    crop = Box(0, 0, 64, 96)
    assert remnant_to_background(counts, bed, bed | gland, crop) == pytest.approx(5.0)
    assert remnant_to_background(counts, np.zeros_like(bed), bed, crop) is None
    counts[~(bed | gland)] = 0
    assert remnant_to_background(counts, bed, bed | gland, crop) is None


def test_the_evidence_lands_at_its_place_in_native_pixels() -> None:
    evidence = np.full((7, 7), -1, np.float32)
    evidence[1, 5] = 3
    shown = native_activation(evidence, Box(20, 10, 35, 70), (64, 96))
    assert shown.shape == (64, 96)
    assert shown.dtype == np.float32
    assert shown.max() == pytest.approx(1)
    y, x = np.unravel_index(int(shown.argmax()), shown.shape)
    assert (y, x) == (pytest.approx(20 + 7.5, abs=3), pytest.approx(10 + 55, abs=5))
    assert not shown[:20].any()
    assert not native_activation(-np.ones((7, 7), np.float32), Box(0, 0, 9, 9), (9, 9)).any()
