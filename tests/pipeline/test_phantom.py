"""The simulator keeps its promises: repeatable, honest about its truth, and not betrayed by its total counts."""

import numpy as np
import pytest

from pipeline.phantom import (
    NEGATIVE_STRATA,
    PIXEL_MM,
    RESIDUAL_STRATA,
    STRATA,
    THYROID_SITES,
    Phantom,
    phantom,
    scatter_windows,
)


def test_equal_seeds_give_equal_pixels_and_other_seeds_others() -> None:
    one, again, other = phantom(11), phantom(11), phantom(12)
    assert np.array_equal(one.anterior, again.anterior)
    assert np.array_equal(one.posterior, again.posterior)
    assert one.truth == again.truth
    assert not np.array_equal(one.anterior, other.anterior)


@pytest.mark.parametrize("stratum", STRATA)
def test_every_stratum_is_what_its_name_says(stratum: str) -> None:
    scan = phantom(5, stratum=stratum)
    truth = scan.truth
    sites = {focus.site.removesuffix("_left").removesuffix("_right") for focus in truth.foci}
    assert truth.stratum == stratum
    assert scan.anterior.shape == scan.posterior.shape == (256, 256)
    assert scan.anterior.dtype == scan.posterior.dtype == np.uint16
    pixel_mm = 2.3976 if stratum == "other_camera" else PIXEL_MM
    assert scan.spacing_mm == pytest.approx((pixel_mm / truth.zoom, pixel_mm / truth.zoom))
    assert truth.physics == ("other" if stratum == "other_camera" else "varied")
    assert truth.residual == any(focus.site in THYROID_SITES for focus in truth.foci)
    assert truth.uptake_percent == pytest.approx(sum(f.uptake_percent for f in truth.foci if f.is_thyroid))
    if stratum in RESIDUAL_STRATA:
        assert truth.residual
    if stratum in NEGATIVE_STRATA:
        assert not truth.residual
    if stratum.startswith("uptake_"):
        low = float(stratum.split("_")[1])
        high = {"up": 15.0}.get(stratum.split("_")[2]) or float(stratum.split("_")[2])
        assert low <= truth.uptake_percent * (1 + 1e-9)
        assert truth.uptake_percent < high * (1 + 1e-9)
    if stratum == "star":
        assert truth.uptake_percent >= 5
    if stratum == "thyroglossal_only":
        assert {focus.site for focus in truth.foci if focus.is_thyroid} == {"thyroglossal"}
    if stratum == "salivary_only":
        assert sites & {"parotid", "submandibular"}
        assert not sites & {"oesophagus", "thymus", "contamination", "lateral_node"}
    if stratum in ("lateral_node", "oesophagus", "thymus", "contamination"):
        assert stratum in sites
    if stratum.startswith("zoom_"):
        assert truth.zoom == float(stratum.removeprefix("zoom_"))


def test_a_stratum_that_contradicts_the_class_is_refused() -> None:
    with pytest.raises(ValueError, match="only with residual"):
        phantom(1, residual=False, stratum="star")
    with pytest.raises(ValueError, match="only without residual"):
        phantom(1, residual=True, stratum="lateral_node")
    with pytest.raises(ValueError, match="unknown stratum"):
        phantom(1, stratum="faint")
    with pytest.raises(ValueError, match="seed"):
        phantom(-1)


def test_beyond_the_detector_stand_exact_zeros() -> None:
    scan = phantom(2, stratum="zoom_1.0", physics="this")
    for counts in (scan.anterior, scan.posterior):
        rows = np.flatnonzero(counts.sum(axis=1))
        assert 36 <= rows[0] <= 38
        assert 36 <= 255 - rows[-1] <= 38
    assert phantom(2, stratum="zoom_2.0").anterior[0].sum() > 0


def test_a_remnant_shines_where_the_truth_says_mirrored_and_fainter_from_behind() -> None:
    scan = phantom(21, stratum="star")
    brightest = max(scan.truth.foci, key=lambda focus: focus.uptake_percent)
    near = []
    for counts, mirrored in ((scan.anterior, False), (scan.posterior, True)):
        x, y = brightest.position
        column, row = round(255 - x if mirrored else x), round(y)
        peak_row, peak_column = np.unravel_index(int(counts.argmax()), counts.shape)
        assert abs(peak_row - row) <= 12
        assert abs(peak_column - column) <= 12
        near.append(int(counts[row - 8 : row + 9, column - 8 : column + 9].sum(dtype=np.int64)))
    assert 0.2 < near[1] / near[0] < 0.8


def test_contamination_on_the_skin_is_not_seen_from_behind() -> None:
    scan = next(p for p in (phantom(seed, residual=False, stratum="contamination") for seed in range(40)) if _clear(p))
    spot = next(focus for focus in scan.truth.foci if focus.site == "contamination")
    x, y = spot.position

    def contrast(counts: np.ndarray, column: float) -> float:
        ys, xs = np.mgrid[:256, :256]
        distance_mm = np.hypot(ys - y, xs - column) * scan.spacing_mm[0]
        return float(counts[distance_mm < 8].mean() / counts[(distance_mm > 20) & (distance_mm < 28)].mean())

    assert contrast(scan.anterior, x) > 1.8
    assert contrast(scan.posterior, 255 - x) < 1.5


def _clear(scan: Phantom) -> bool:
    """Whether the spot lies well within the neck and apart from every other focus."""
    truth, spacing_mm = scan.truth, scan.spacing_mm[0]
    spot = next(focus for focus in truth.foci if focus.site == "contamination")
    offset_mm = np.hypot(spot.position[0] - 127.5, spot.position[1] - 127.5) * spacing_mm
    apart_mm = min(
        (
            np.hypot(spot.position[0] - other.position[0], spot.position[1] - other.position[1]) * spacing_mm
            for other in truth.foci
            if other is not spot
        ),
        default=999.0,
    )
    return bool(offset_mm < 45 and apart_mm > 50 and spot.uptake_percent > 0.05)


def test_total_counts_alone_do_not_tell_the_classes() -> None:
    scans = [phantom(seed) for seed in range(3000, 3110)]
    totals = np.array([int(s.anterior.sum(dtype=np.int64) + s.posterior.sum(dtype=np.int64)) for s in scans])
    residual = np.array([s.truth.residual for s in scans])
    wins = (totals[residual][:, None] > totals[~residual][None, :]).mean()
    # The standard error of an AUC of .5 with 2 x 55 cases is .055; a careless simulator is at .68.
    assert 0.38 < wins < 0.62
    assert 0.35 < residual.mean() < 0.65


def test_scatter_windows_hold_fewer_and_smoother_counts_than_the_photopeak() -> None:
    scan = phantom(8, stratum="star")
    (lower_front, lower_back), (upper_front, upper_back) = scatter_windows(scan)
    assert lower_front.dtype == np.uint16
    for photopeak, lower, upper in (
        (scan.anterior, lower_front, upper_front),
        (scan.posterior, lower_back, upper_back),
    ):
        assert upper.sum() < lower.sum() < photopeak.sum(dtype=np.int64) * 0.2
        assert lower.max() / lower.sum() < photopeak.max() / photopeak.sum(dtype=np.int64)
        assert not lower[photopeak.sum(axis=1) == 0].any()
    again = scatter_windows(scan)
    assert np.array_equal(again[0][0], lower_front)
