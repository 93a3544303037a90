"""Reasons not to answer: each on an image made for it, and none on simulated scans of any stratum."""

import cv2
import numpy as np
import pytest

from models.weights import TrainingRange
from pipeline.finding import SourceFrame, ViewImage
from pipeline.phantom import STRATA, phantom
from pipeline.quality import another_body, problem_of
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


# Pictures of other bodies and of sources, made here and nowhere else: 256 x 256 pixels of 2.2 mm.

_DOWN, _ACROSS = np.mgrid[:256, :256]


def _counted(shape: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Counts of a warm shape as a camera blurs it, nothing in the rows that a detector leaves dark."""
    seen = cv2.GaussianBlur(np.asarray(shape, np.float32), (0, 0), 4)
    seen[:37] = seen[-37:] = 0
    return np.random.default_rng(seed).poisson(seen / seen.sum() * total).astype(float)


def _chest() -> np.ndarray:
    lung = np.exp(-(((_ACROSS - 128) / 70) ** 2))
    heart = np.exp(-((_ACROSS - 140) ** 2 + (_DOWN - 125) ** 2) / 1600)
    return np.where(abs(_ACROSS - 128) < 78 + _DOWN / 30, 0.6 + 0.3 * lung + heart, 0.02)


def _legs(apart: int, thick: int) -> np.ndarray:
    leg = [abs(_ACROSS - 128 - side * apart) < thick - abs(_DOWN - 128) / 20 for side in (-1, 1)]
    return np.where(leg[0] | leg[1], 1.0, 0.03)


def _spine_and_ribs() -> np.ndarray:
    ribs = sum((abs(_DOWN - down - abs(_ACROSS - 128) * 0.25) < 3) * 1.4 for down in range(45, 225, 18))
    return np.where(abs(_ACROSS - 128) < 58, 0.4 + ribs, 0.02) + 3.0 * (abs(_ACROSS - 128) < 6)


def _line(degrees: float, length: int) -> np.ndarray:
    drawn = np.zeros((256, 256), np.float32)
    across, down = np.cos(np.deg2rad(degrees)) * length / 2, np.sin(np.deg2rad(degrees)) * length / 2
    ends = [(round(128 - across), round(128 - down)), (round(128 + across), round(128 + down))]
    cv2.line(drawn, ends[0], ends[1], 1.0, 3)
    return drawn


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (_chest(), "neck_outside_field"),
        (_legs(38, 24), "neck_outside_field"),
        (_legs(60, 30), "neck_outside_field"),
        (_spine_and_ribs(), "out_of_training_range"),
        (_line(0, 140), "out_of_training_range"),
        (_line(70, 160), "out_of_training_range"),
        (_line(90, 120), "out_of_training_range"),
    ],
    ids=["chest", "legs", "legs apart", "spine and ribs", "line across", "line aslant", "line along"],
)
@pytest.mark.parametrize("total", [40_000, 120_000])
def test_another_body_or_a_line_in_both_views_is_declined(shape: np.ndarray, reason: str, total: int) -> None:
    views = [_view(_counted(shape, total // (1 + seed), seed)) for seed in (0, 1)]
    problem = problem_of(views, RANGE)
    assert problem is not None
    assert problem.reason == reason
    assert REASONS[reason].ours, "it may be a patient's: whoever sent it has to get a note"


@pytest.mark.parametrize("off_mm", [160, 190])
def test_a_neck_that_is_half_outside_of_the_field_is_declined(off_mm: int) -> None:
    for seed in range(930_020, 930_024):
        scan = phantom(seed, stratum="zoom_1.5")
        off = round(off_mm / scan.spacing_mm[1])
        anterior, posterior = np.zeros(scan.anterior.shape), np.zeros(scan.anterior.shape)
        anterior[:, off:], posterior[:, :-off] = scan.anterior[:, :-off], scan.posterior[:, off:]
        problem = problem_of([_view(one, scan.spacing_mm[0]) for one in (anterior, posterior)], RANGE)
        assert problem is not None
        assert problem.reason == "neck_outside_field"


def test_a_body_is_another_one_only_where_every_view_says_so() -> None:
    chest, neck = _view(_counted(_chest(), 80_000, 3)), _view(_neck())
    assert another_body([chest]) is not None
    assert another_body([chest, neck]) is None


def test_few_counts_and_a_focus_that_outshines_the_body_tell_nothing_of_its_shape() -> None:
    assert another_body([_view(_counted(_chest(), 3_000, 4))]) is None
    hot = _counted(_chest(), 20_000, 5)
    hot[120:126, 120:126] += 5_000
    assert another_body([_view(hot)]) is None
