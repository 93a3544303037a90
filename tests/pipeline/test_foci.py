"""Foci, their sites and the flags, on drawn pictures whose truth is known and on simulated scans."""

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.finding import SourceFrame, ViewImage, ViewName
from pipeline.foci import find_foci, flags_of, has_star, site_of
from pipeline.phantom import phantom

MM = 2.2
SIDE = 256
FRAME = SourceFrame("1.2", "1.2.3", "1.2.4", 1, 2)
Spot = tuple[float, float, float, float]  # mm to the patient's left, mm towards the feet, counts before, counts behind


def _picture(spots: Sequence[Spot], view: ViewName, *, seed: int = 1, matrix: int = SIDE) -> ViewImage:
    """A neck of even counts between two bands of air, and spots as wide as the camera's blur."""
    mm = MM * SIDE / matrix
    rng = np.random.default_rng([seed, view == "anterior"])
    axis = (np.arange(matrix) - (matrix - 1) / 2) * mm
    neck = 0.6 + 2.4 / (1 + np.exp((np.abs(axis) - 65) / 4.0))  # as soft an edge as the camera shows
    mean = np.tile(neck * mm**2 / MM**2, (matrix, 1))
    for left_mm, below_mm, before, behind in spots:
        counts = before if view == "anterior" else behind
        across = np.exp(-0.5 * ((axis - (left_mm if view == "anterior" else -left_mm)) / 6.0) ** 2)
        mean += counts * mm**2 / (2 * np.pi * 36) * np.outer(np.exp(-0.5 * ((axis - below_mm) / 6.0) ** 2), across)
    return ViewImage(view, rng.poisson(mean).astype(np.float32), (mm, mm), FRAME)


def _both(spots: Sequence[Spot], **how: int) -> list[ViewImage]:
    return [_picture(spots, "anterior", **how), _picture(spots, "posterior", **how)]


def test_an_even_neck_has_no_focus() -> None:
    assert sum(len(find_foci(_both([], seed=seed))) for seed in range(12)) <= 1
    assert find_foci([]) == ()
    assert find_foci([ViewImage("anterior", np.zeros((256, 256), np.float32), (2.2, 2.2), FRAME)]) == ()


def test_foci_are_found_where_they_are_numbered_alike_in_both_views_and_named_by_the_patients_side() -> None:
    foci = find_foci(_both([(14, 4, 2400, 1000), (-44, -10, 900, 400)]))
    assert [(focus.number, focus.site) for focus in foci] == [(1, "bed_left"), (2, "lateral_right")]
    for focus, (left_mm, below_mm) in zip(foci, [(14, 4), (-44, -10)], strict=True):
        front, back = focus.views
        assert (front.view, back.view) == ("anterior", "posterior")
        centre = (SIDE - 1) / 2
        assert front.position == pytest.approx((centre + left_mm / MM, centre + below_mm / MM), abs=1.0)
        assert back.position == pytest.approx((centre - left_mm / MM, centre + below_mm / MM), abs=1.5)


def test_the_counts_of_a_focus_are_what_was_drawn_within_their_own_error() -> None:
    # A circle of 12 mm holds 1 - exp(-2) of a spot of sigma 6 mm; the ring takes 1 % of it for surroundings.
    truth = 2000 * (1 - np.exp(-2))
    misses = []
    for seed in range(12):
        front = find_foci(_both([(0, 0, 2000, 900)], seed=seed))[0].views[0]
        assert front.counts_sd == pytest.approx(np.sqrt(truth + 3 * np.pi * (12 / MM) ** 2), rel=0.15)
        misses.append((front.counts - truth) / front.counts_sd)
    assert abs(float(np.mean(misses))) < 1.2
    assert 0.4 < float(np.std(misses)) < 1.7


def test_a_focus_of_twelve_millimetres_has_the_area_that_its_blur_gives_it() -> None:
    front = find_foci(_both([(0, 0, 8000, 4000)]))[0].views[0]
    assert front.area_mm2 == pytest.approx(2 * np.pi * np.log(2) * 36, rel=0.25)


def test_a_drop_on_the_skin_is_absent_behind_and_deep_uptake_is_as_bright_there() -> None:
    hints = {focus.site: focus.depth for focus in find_foci(_both([(20, 10, 3000, 0), (0, 60, 2500, 2600)]))}
    assert hints == {"bed_left": "surface", "below_bed": "deep"}
    (tissue,) = find_foci(_both([(0, 0, 3000, 1200)]))
    assert tissue.depth == "neck"
    assert tissue.posterior_to_anterior == pytest.approx(0.4, abs=0.08)


def test_a_single_view_is_searched_alone_and_a_posterior_one_keeps_the_patients_sides() -> None:
    spots = [(14.0, 4.0, 2400.0, 2000.0)]
    for view in ("anterior", "posterior"):
        (focus,) = find_foci([_picture(spots, view)])
        assert (focus.site, focus.depth, focus.posterior_to_anterior) == ("bed_left", "", None)


def test_views_of_another_matrix_are_not_laid_over_each_other() -> None:
    spots = [(14.0, 4.0, 2400.0, 1000.0)]
    (focus,) = find_foci([_picture(spots, "anterior"), _picture(spots, "posterior", matrix=128)])
    assert [one.view for one in focus.views] == ["anterior"]


def test_a_matrix_finer_than_the_camera_gives_the_same_foci_in_its_own_pixels() -> None:
    (focus,) = find_foci(_both([(14, 4, 2400, 1000)], matrix=1024))
    assert focus.site == "bed_left"
    assert focus.views[0].position == pytest.approx((511.5 + 14 / MM * 4, 511.5 + 4 / MM * 4), abs=4)


def test_a_vessel_and_the_edge_of_the_neck_are_no_foci() -> None:
    view = _picture([], "anterior")
    rng = np.random.default_rng(5)
    vessel = np.exp(-0.5 * ((np.arange(SIDE) - 138) / 3.0) ** 2)
    striped = view.counts + rng.poisson(np.tile(4.0 * vessel, (SIDE, 1)))
    assert find_foci([ViewImage("anterior", striped.astype(np.float32), view.spacing_mm, FRAME)]) == ()


def test_two_spots_nearer_than_the_resolution_are_one_focus() -> None:
    assert len(find_foci(_both([(-4, 0, 3000, 1200), (4, 0, 3000, 1200)]))) == 1
    assert len(find_foci(_both([(-14, 0, 3000, 1200), (14, 0, 3000, 1200)]))) == 2


@pytest.mark.parametrize(
    ("left_mm", "below_mm", "site"),
    [
        (0, 0, "bed_midline"),
        (15, -20, "bed_left"),
        (-15, 10, "bed_right"),
        (2, -42, "above_bed"),
        (45, -5, "lateral_left"),
        (-45, 30, "lateral_right"),
        (3, 60, "below_bed"),
        (30, -68, "salivary_left"),
        (-56, -92, "salivary_right"),
        (0, -100, "mouth_or_nose"),
        (140, 100, "elsewhere"),
    ],
)
def test_a_site_is_named_by_where_it_lies_against_the_bed(left_mm: float, below_mm: float, site: str) -> None:
    assert site_of(left_mm, below_mm) == site


def test_a_lateral_focus_alone_is_other_uptake_and_one_in_the_bed_asks_for_a_person() -> None:
    lateral = _both([(-44, -10, 900, 400)])
    assert flags_of(lateral, find_foci(lateral), "absent") == ("other_uptake",)
    assert flags_of(lateral, find_foci(lateral), "present") == ()
    bed = _both([(14, 4, 2400, 1000)])
    assert flags_of(bed, find_foci(bed), "absent") == ("focus_in_bed",)
    gland = _both([(30, -68, 2400, 1000)])
    assert flags_of(gland, find_foci(gland), "absent") == ()


def test_few_counts_are_said_of_a_scan_that_can_still_be_judged() -> None:
    poor = [ViewImage("anterior", np.full((128, 128), 1, np.float32), (2.2, 2.2), FRAME)]
    assert flags_of(poor, (), "absent") == ("low_counts",)
    assert flags_of(_both([]), (), "absent") == ()


def test_six_arms_around_a_hot_focus_are_a_star_and_a_hot_focus_without_them_is_none() -> None:
    hot = _both([(0, 0, 40000, 16000)])
    foci = find_foci(hot)
    assert not has_star(hot[0], foci)
    axis = (np.arange(SIDE) - (SIDE - 1) / 2) * MM
    radius, angle = np.hypot(axis[:, None], axis[None, :]), np.arctan2(axis[:, None], axis[None, :])
    arms = 60 * np.exp(-radius / 35) * (np.cos(6 * angle) > 0.6)
    starred = hot[0].counts + np.random.default_rng(3).poisson(arms)
    assert has_star(ViewImage("anterior", starred.astype(np.float32), hot[0].spacing_mm, FRAME), foci)


def test_simulated_remnants_are_found_and_simulated_necks_without_get_next_to_no_false_focus() -> None:
    found, there, false = 0, 0, 0
    for seed in range(40):
        neck = phantom(760_000 + seed, stratum="uptake_0.3_1" if seed % 2 else "plain")
        views: tuple[tuple[ViewName, np.ndarray], ...] = (("anterior", neck.anterior), ("posterior", neck.posterior))
        images = [ViewImage(name, counts.astype(np.float32), neck.spacing_mm, FRAME) for name, counts in views]
        at = [focus.views[0].position for focus in find_foci(images)]
        truth = [focus.position for focus in neck.truth.foci]

        def near(one: tuple[float, float], others: list[tuple[float, float]], mm: float = neck.spacing_mm[0]) -> bool:
            return any(np.hypot(one[0] - x, one[1] - y) * mm < 12 for x, y in others)

        tissue = [focus.position for focus in neck.truth.foci if focus.is_thyroid and focus.uptake_percent > 0.1]
        there += len(tissue)
        found += sum(near(one, at) for one in tissue)
        false += sum(not near(one, truth) for one in at)
    assert found >= 0.9 * there > 15
    assert false <= 6
