"""Reasons not to answer: each on an image made for it, and none on simulated scans of any stratum."""

import numpy as np
import pytest

from models.weights import TrainingRange
from pipeline.finding import SourceFrame, ViewImage
from pipeline.phantom import STRATA, phantom
from pipeline.quality import problem_of
from pipeline.reasons import REASONS

RANGE = TrainingRange(spacing_mm=(1.0, 2.64), total_counts=(400.0, 5e6), embedding_distance=None)
SOURCE = SourceFrame("1.2.840.10008.5.1.4.1.1.20", "2.25.1", "2.25.2", 1, 2)


def _view(counts: np.ndarray, spacing_mm: float = 2.20903) -> ViewImage:
    return ViewImage("anterior", counts.astype(np.float32), (spacing_mm, spacing_mm), SOURCE)


def _neck() -> np.ndarray:
    return phantom(930_000).anterior.astype(np.float32)


def _reason(counts: np.ndarray, spacing_mm: float = 2.20903) -> str | None:
    problem = problem_of([_view(_neck()), _view(counts, spacing_mm)], RANGE)
    if problem is None:
        return None
    assert problem.reason in REASONS
    return problem.reason


@pytest.mark.parametrize("stratum", STRATA)
def test_no_stratum_of_simulated_scans_raises_a_false_alarm(stratum: str) -> None:
    for seed in (940_000, 940_001):
        simulated = phantom(seed, stratum=stratum)
        views = [_view(counts, simulated.spacing_mm[0]) for counts in (simulated.anterior, simulated.posterior)]
        assert problem_of(views, RANGE) is None


def test_a_view_without_counts_is_empty() -> None:
    assert _reason(np.zeros((256, 256))) == "empty_frame"


def test_a_view_with_hardly_any_counts_is_declined() -> None:
    thin = np.random.default_rng(1).binomial(_neck().astype(int), 300 / _neck().sum())
    assert _reason(thin) == "low_counts"


def test_a_hot_remnant_cut_off_at_a_level_is_clipped_and_an_uncut_one_is_not() -> None:
    hot = phantom(930_010, stratum="star").anterior.astype(np.float32)
    assert _reason(hot) is None
    assert _reason(np.minimum(hot, np.sort(hot.ravel())[-60])) == "clipped"


@pytest.mark.parametrize("counts_per_pixel", [0.2, 20.0])
def test_a_flood_is_recognised_from_many_counts_and_from_few(counts_per_pixel: float) -> None:
    flood = np.random.default_rng(2).poisson(counts_per_pixel, (256, 256)).astype(float)
    flood[:37] = flood[-37:] = 0
    assert _reason(flood) == "flood"


def test_a_neck_at_the_edge_of_the_field_is_declined() -> None:
    rows, columns = np.mgrid[:256, :256]
    beside = np.random.default_rng(3).poisson(np.where((columns < 50) & (rows > 0), 8.0, 0.2))
    assert _reason(beside) == "neck_outside_field"
    below = np.random.default_rng(4).poisson(np.where((rows > 215) & (abs(columns - 128) < 60), 9.0, 0.03))
    assert _reason(below) == "neck_outside_field"


def test_spacing_and_counts_beyond_the_training_are_declined_with_the_range() -> None:
    neck = _neck()
    assert _reason(neck, 4.418) == "out_of_training_range"
    assert _reason(neck[:32, :32]) in ("out_of_training_range", "neck_outside_field", "flood", "low_counts")
    problem = problem_of([_view(neck * 3000)], RANGE)
    assert problem is not None
    assert problem.reason == "out_of_training_range"
    assert "trained on" in problem.detail


def test_the_problem_names_the_view_and_no_one_else() -> None:
    problem = problem_of([_view(np.zeros((256, 256)))], RANGE)
    assert problem is not None
    assert problem.detail == "anterior view: every pixel is zero"
