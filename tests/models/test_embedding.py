"""The distance from the scans trained on: small within their cloud, large beside it, and lost without its tensors."""

import numpy as np
import pytest

from models.embedding import DIRECTIONS, distance, fit


@pytest.fixture(scope="module")
def cloud() -> np.ndarray:
    """Features of 400 scans, (400, 64) float32: eight directions of differing spread, and a little of everything."""
    rng = np.random.default_rng(3)
    main = rng.normal(0, 1, (400, 8)) * np.linspace(4, 1, 8)
    return (5 + main @ rng.normal(0, 1, (8, 64)) + rng.normal(0, 0.3, (400, 64))).astype(np.float32)


def test_scans_of_the_cloud_lie_about_one_from_it_and_others_beyond_all_of_them(cloud: np.ndarray) -> None:
    known = fit(cloud[:300])
    inside = [distance(row, known) for row in cloud[300:]]
    assert 0.7 < np.median(inside) < 1.4
    rng = np.random.default_rng(4)
    for row in cloud[300:310]:
        beside = row + rng.normal(0, 3, 64).astype(np.float32)  # a way that no scan trained on went
        further = known.mean + 6 * (row - known.mean)  # a usual way, gone much too far
        assert distance(beside, known) > max(inside)
        assert distance(further, known) > 4 * distance(row, known)


def test_the_distance_grows_without_bound_and_is_least_at_the_mean(cloud: np.ndarray) -> None:
    known = fit(cloud)
    assert distance(known.mean, known) == pytest.approx(0, abs=1e-6)
    along = [distance(known.mean + step * np.ones(64, np.float32), known) for step in (1, 10, 100)]
    assert along[1] == pytest.approx(10 * along[0], rel=1e-3)
    assert along[2] == pytest.approx(100 * along[0], rel=1e-3)


def test_the_directions_are_orthonormal_and_no_more_than_the_scans_can_tell(cloud: np.ndarray) -> None:
    for count in (3, 400):
        known = fit(cloud[:count])
        assert known.basis.shape == (min(DIRECTIONS, count - 1), 64)
        assert np.allclose(known.basis @ known.basis.T, np.eye(len(known.basis)), atol=1e-4)
        assert (known.spread > 0).all()
        assert known.rest[0] > 0
    same = fit(np.ones((5, 8), np.float32))  # features without any spread divide by nothing
    assert np.isfinite(distance(np.full(8, 2.0, np.float32), same))


@pytest.mark.parametrize("shape", [(1, 8), (8,), (0, 8)])
def test_fewer_than_two_scans_have_no_range(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        fit(np.zeros(shape, np.float32))
