"""The physics of the simulated camera, held to the figures that it is meant to have and not to its own code."""

import dataclasses

import numpy as np
import pytest

from pipeline import phantom as simulator
from pipeline.phantom import PIXEL_MM, Phantom, Physics, phantom, resolution_mm

PIXEL = PIXEL_MM / 2
STRAIGHT = simulator._Pose(0.0, 0.0, 0.0)
HALF_LIFE_D = 8.02


def _camera(seed: int = 1, **changes: object) -> Physics:
    """The paper's camera, as it was measured on one day."""
    drawn = simulator._draw_physics(np.random.default_rng(seed), "this", moves=False)
    return dataclasses.replace(drawn, **changes)


def _point(depth_mm: float, *, x_mm: float = 0.0) -> simulator._Source:
    return simulator._Source("isthmus", 1.0, x_mm, 0.0, depth_mm, (0.05, 0.05))


def _seen(
    source: simulator._Source, camera: Physics, gap_mm: float, *, thickness_mm: float = 120.0, posterior: bool = False
) -> np.ndarray:
    return simulator._render([source], STRAIGHT, camera, PIXEL, thickness_mm, gap_mm, posterior=posterior)


def _width_at_half(profile: np.ndarray) -> float:
    """Full width at half maximum in samples, between samples linearly."""
    top = int(profile.argmax())
    half = profile[top] / 2
    right = top + int(np.flatnonzero(profile[top:] < half)[0])
    left = top - int(np.flatnonzero(profile[top::-1] < half)[0])
    beyond = (profile[right - 1] - half) / (profile[right - 1] - profile[right])
    before = (profile[left + 1] - half) / (profile[left + 1] - profile[left])
    return float(right - 1 + beyond - (left + 1 - before))


@pytest.mark.parametrize(("distance_mm", "fwhm_mm"), [(50, 8.5), (100, 11.6), (150, 14.8)])
def test_a_point_source_is_as_wide_as_the_collimator_makes_it_at_its_distance(
    distance_mm: float, fwhm_mm: float
) -> None:
    for seed in range(4):
        camera = _camera(seed)
        assert resolution_mm(camera, distance_mm) == pytest.approx(fwhm_mm, abs=0.3)
        # Through the holes alone, and the whole response: septa and scatter lie under the peak and hardly widen it.
        image = _seen(_point(30), camera, distance_mm - 30)
        assert _width_at_half(image.sum(axis=0)) * PIXEL == pytest.approx(fwhm_mm, abs=0.35)
        whole = simulator._spread(image, simulator._penetration(camera, PIXEL))
        middle = whole[simulator.MATRIX // 2 - 1 : simulator.MATRIX // 2 + 1].sum(axis=0)
        width = _width_at_half(middle) * PIXEL
        assert fwhm_mm - 0.3 < width < 1.1 * fwhm_mm + 0.3


def test_deeper_in_the_neck_is_wider_in_front_and_narrower_from_behind() -> None:
    camera = _camera()
    widths = [
        [_width_at_half(_seen(_point(depth), camera, 40, posterior=behind).sum(axis=0)) for depth in (15, 60, 105)]
        for behind in (False, True)
    ]
    assert widths[0] == sorted(widths[0])
    assert widths[1] == sorted(widths[1], reverse=True)


def test_tissue_takes_away_what_it_does_in_water() -> None:
    """Narrow beam, 364 keV: .110 per cm."""
    camera = _camera()
    assert camera.attenuation_per_mm == pytest.approx(0.0110)
    counts = [_seen(_point(depth), camera, 40).sum() for depth in (0, 20, 50)]
    assert counts[0] == pytest.approx(0.01, rel=1e-3)  # one per cent of the administered activity, nothing before it
    assert counts[1] / counts[0] == pytest.approx(np.exp(-0.22), rel=1e-3)
    assert counts[2] / counts[0] == pytest.approx(np.exp(-0.55), rel=1e-3)


def test_a_thyroid_remnant_is_seen_from_behind_with_a_third_to_a_half_of_its_counts() -> None:
    rng = np.random.default_rng(2)
    camera = _camera()
    ratios = []
    for _ in range(40):
        for source in simulator._draw_thyroid(rng, None):
            thickness_mm = rng.uniform(105, 140)
            front, back = (
                _seen(source, camera, 40, thickness_mm=thickness_mm, posterior=behind).sum() for behind in (False, True)
            )
            ratios.append(back / front)
    assert 0.35 < np.median(ratios) < 0.48
    assert np.mean([0.28 < ratio < 0.57 for ratio in ratios]) > 0.9


def test_the_posterior_image_is_the_mirror_of_the_anterior_one() -> None:
    camera = _camera()
    source = _point(60, x_mm=25)  # in the middle of the neck, so that both see it alike
    front, back = (_seen(source, camera, 40, posterior=behind) for behind in (False, True))
    assert np.allclose(front[:, ::-1], back, rtol=1e-9, atol=0)
    assert front.sum(axis=0).argmax() > front.shape[1] / 2 > back.sum(axis=0).argmax()


def test_counts_halve_in_eight_days() -> None:
    now = simulator._counts_per_mbq(35.0, 24.0, 300.0)
    later = simulator._counts_per_mbq(35.0, np.array([24.0, 48.0, 24.0 + HALF_LIFE_D * 24]), 300.0)
    assert later / now == pytest.approx([1.0, 2 ** (-1 / HALF_LIFE_D), 0.5])
    assert float(now) == pytest.approx(35.0 * 300 * 2 ** (-1 / HALF_LIFE_D))


@pytest.mark.parametrize("seed", [2, 4, 5])
def test_a_scan_holds_the_counts_that_its_activity_delay_and_duration_give(seed: int) -> None:
    scan = phantom(seed, stratum="star", physics="this")
    camera = simulator._draw_physics(np.random.default_rng([133, seed]), "this", moves=False)
    truth = scan.truth
    decayed_mbq = truth.activity_mbq * 2 ** (-truth.delay_h / 24 / HALF_LIFE_D)
    seen = sum(f.uptake_percent / 100 * np.exp(-camera.attenuation_per_mm * f.depth_mm) for f in truth.foci)
    from_foci = seen * decayed_mbq * camera.sensitivity * truth.duration_s
    # A scan with so hot a remnant holds little else: scatter (a tenth to a fifth) and the body come on top, some of the
    # broad tail falls beside the detector, and the sensitivity of a day varies by 8 %.
    assert 1.0 < scan.anterior.sum(dtype=np.int64) / from_foci < 1.9


def test_typical_scans_hold_twenty_to_a_hundred_and_fifty_thousand_counts() -> None:
    totals = np.array([int(phantom(seed).anterior.sum(dtype=np.int64)) for seed in range(3000, 3016)])
    assert 30_000 < np.median(totals) < 110_000
    assert np.mean((totals > 20_000) & (totals < 150_000)) >= 0.75


def _star(counts: np.ndarray, spacing_mm: float, x: float, y: float) -> tuple[np.ndarray, float]:
    """Of a ring 35 to 60 mm around (x, y): strength of 1 to 9 arms, and the direction of the first of six (rad)."""
    rows, columns = np.indices(counts.shape)
    radius_mm = np.hypot(columns - x, rows - y) * spacing_mm
    ring = (radius_mm > 35) & (radius_mm < 60)
    angle, weight = np.arctan2(rows - y, columns - x)[ring], counts[ring].astype(float)
    arms = [complex((weight * np.exp(-1j * count * angle)).sum() / weight.sum()) for count in range(1, 10)]
    return np.abs(arms), float(np.mod(-np.angle(arms[5]), 2 * np.pi) / 6)


@pytest.mark.parametrize("seed", [2, 5])
def test_a_hot_remnant_has_a_star_of_six_arms_sixty_degrees_apart_as_the_septa_lie(seed: int) -> None:
    scan = phantom(seed, stratum="star", physics="this")
    hottest = max(scan.truth.foci, key=lambda focus: focus.uptake_percent)
    strength, direction = _star(scan.anterior, scan.spacing_mm[0], *hottest.position)
    assert strength[5] > 0.06
    assert strength[5] > 2 * np.delete(strength, [0, 5]).max()  # the first is the neck above and below it
    angle = simulator._draw_physics(np.random.default_rng([133, seed]), "this", moves=False).angle
    apart = (direction - angle + np.pi / 6) % (np.pi / 3) - np.pi / 6
    assert abs(np.rad2deg(apart)) < 3
    rest = phantom(seed, stratum="plain", physics="this")
    assert _star(rest.anterior, rest.spacing_mm[0], 127.5, 127.5)[0][5] < strength[5] / 2


def test_scatter_comes_on_top_of_what_came_through_holes_septa_and_tail() -> None:
    camera = _camera(scatter=0.15)
    image = _seen(_point(30), camera, 40)
    transfer = simulator._penetration(camera, PIXEL)
    assert float(transfer[0, 0].real) == pytest.approx(1.15)
    without = simulator._spread(image, simulator._penetration(dataclasses.replace(camera, scatter=0.0), PIXEL))
    extra = simulator._spread(image, transfer) - without
    assert extra.sum() / image.sum() == pytest.approx(0.15, rel=0.02)
    # Scatter is broad: a Gaussian of the stated sigma around the source.
    axis = (np.arange(simulator.MATRIX) - (simulator.MATRIX - 1) / 2) * PIXEL
    spread_mm = np.sqrt((extra.sum(axis=0) * axis**2).sum() / extra.sum())
    assert spread_mm == pytest.approx(camera.scatter_mm, rel=0.08)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_patient_who_slid_at_once_is_seen_twice_and_one_who_slid_steadily_is_smeared(mirrored: bool) -> None:
    image = _seen(_point(30), _camera(), 10)
    axis = (np.arange(simulator.MATRIX) - (simulator.MATRIX - 1) / 2) * PIXEL
    still = simulator._spread(image, np.ones(1, np.complex128)).sum(axis=0)
    for sudden, drift_mm in ((True, 40.0), (False, 12.0)):
        camera = _camera(drift_mm=(drift_mm, 0.0), sudden=sudden)
        moved = simulator._spread(image, simulator._motion(camera, PIXEL, mirrored=mirrored)).sum(axis=0)
        assert moved.sum() == pytest.approx(still.sum(), rel=0.01)
        variance = [(p * axis**2).sum() / p.sum() for p in (still, moved)]
        added = drift_mm**2 / 4 if sudden else drift_mm**2 / 12
        assert variance[1] - variance[0] == pytest.approx(added, rel=0.05)
        if sudden:
            peaks = axis[[int(np.where(side, moved, 0).argmax()) for side in (axis < 0, axis > 0)]]
            assert peaks == pytest.approx([-20, 20], abs=PIXEL)
            assert moved[np.abs(axis) < 3].max() < moved.max() / 3


def test_in_the_stratum_motion_everyone_slid_and_by_more_than_a_resolvable_step_of_the_others() -> None:
    for seed in range(20):
        moving, usual = (
            simulator._draw_physics(np.random.default_rng([133, seed]), "varied", moves=moves)
            for moves in (True, False)
        )
        assert 5 <= np.hypot(*moving.drift_mm) <= 14
        assert np.hypot(*usual.drift_mm) <= 8


def test_the_other_cameras_physics_lie_outside_of_everything_trained_on() -> None:
    varied, other = (
        [simulator._draw_physics(np.random.default_rng(seed), name, moves=False) for seed in range(60)]
        for name in ("varied", "other")
    )
    worse = ("pixel_mm", "sensitivity", "fwhm_mm", "fwhm_slope", "star", "star_mm", "arm_rad", "tail_mm", "scatter")
    for name in worse:
        assert max(getattr(one, name) for one in varied) < min(getattr(one, name) for one in other), name
    for name in ("attenuation_per_mm", "geometric"):
        assert min(getattr(one, name) for one in varied) > max(getattr(one, name) for one in other), name
    assert all(one.geometric + one.star < 1 for one in varied + other)


def _everything(scan: Phantom) -> tuple[bytes, bytes, object]:
    return scan.anterior.tobytes(), scan.posterior.tobytes(), scan.truth


@pytest.mark.parametrize("physics", ["this", "varied", "other"])
def test_each_camera_repeats_itself_by_seed_and_differs_from_the_others(physics: simulator.PhysicsName) -> None:
    assert _everything(phantom(31, physics=physics)) == _everything(phantom(31, physics=physics))
    others = {"this", "varied", "other"} - {physics}
    assert all(
        phantom(31, physics=other).anterior.tobytes() != phantom(31, physics=physics).anterior.tobytes()
        for other in others
    )


def test_more_confusers_come_with_and_without_residual_tissue_alike() -> None:
    """Foci drawn without rendering: what deceives must not tell the class by how often it is there."""
    shares = {}
    for confusers in (1.0, 4.0):
        rng = np.random.default_rng(5)
        with_node = [
            any(source.site.startswith("lateral_node") for source in simulator._draw_physiologic(rng, None, confusers))
            for _ in range(2000)
        ]
        shares[confusers] = np.mean(with_node)
    # Two sides of 3 % each, four times as often; the standard error of such a share is .007 at most.
    assert shares[1.0] == pytest.approx(1 - 0.97**2, abs=0.02)
    assert shares[4.0] == pytest.approx(1 - 0.88**2, abs=0.03)
