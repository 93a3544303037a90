"""The features that an eye could measure, and the trees on them that a network has to beat."""

import numpy as np
import pytest

from pipeline import baseline
from pipeline.baseline import FEATURES, as_mapping, features
from pipeline.preprocess import GRID, GRID_MM


def _planes(*foci: tuple[float, float, float], behind: float = 0.4, seed: int = 1) -> np.ndarray:
    """Joint planes (3, 112, 112) of a neck in noise with foci (peak counts, x mm, y mm) that are `behind` as hot."""
    y_mm, x_mm = (np.indices((GRID, GRID)) - (GRID - 1) / 2) * GRID_MM
    rng = np.random.default_rng(seed)
    views = []
    for share in (1.0, behind):
        expected = np.where(abs(x_mm) < 60, 3.0, 0.1)
        for peak, x, y in foci:
            expected = expected + share * peak * np.exp(-((x_mm - x) ** 2 + (y_mm - y) ** 2) / (2 * 6.0**2))
        views.append(np.sqrt(rng.poisson(expected)))
    return np.stack([*views, np.ones((GRID, GRID))]).astype(np.float16)


def test_a_focus_is_measured_where_and_as_hot_as_it_is() -> None:
    found = as_mapping(features(_planes((80.0, 18.0, -20.0), (30.0, -30.0, 50.0))))
    assert tuple(found) == FEATURES
    assert len(FEATURES) == 18
    assert found["peak_x_mm"] == pytest.approx(18, abs=3)
    assert found["peak_y_mm"] == pytest.approx(-20, abs=3)
    assert found["posterior_to_anterior"] == pytest.approx(0.43, abs=0.1)
    assert found["second_distance_mm"] == pytest.approx(np.hypot(48, 70), abs=6)
    assert found["peak_over_median"] > found["second_peak"] > 3
    assert found["significance"] > 20
    assert found["width_mm"] < 15


def test_a_neck_without_a_focus_stands_out_nowhere() -> None:
    plain = as_mapping(features(_planes()))
    hot = as_mapping(features(_planes((40.0, 10.0, 0.0))))
    assert plain["peak_over_median"] < 2 < hot["peak_over_median"]
    assert abs(plain["significance"]) < 6 < hot["significance"]
    assert plain["bed_peak_over_ring"] < 1.7 < hot["bed_peak_over_ring"]
    assert hot["counts"] > plain["counts"]


@pytest.mark.parametrize("missing", [(), (0,), (1,), (0, 1)])
def test_features_are_finite_even_of_nothing(missing: tuple[int, ...]) -> None:
    planes = _planes((40.0, 10.0, 0.0))
    planes[list(missing)] = 0
    assert features(planes).shape == (18,)
    assert np.isfinite(features(planes)).all()


def test_the_trees_learn_a_focus_and_repeat_themselves() -> None:
    labels = np.arange(60) % 2
    rng = np.random.default_rng(7)
    table = np.array(
        [
            features(_planes(*([(30.0, rng.uniform(-20, 20), rng.uniform(-20, 20))] if label else []), seed=index))
            for index, label in enumerate(labels)
        ]
    )
    one, again = (baseline.scores(baseline.fit(table[:40], labels[:40]), table[40:]) for _ in range(2))
    assert np.array_equal(one, again)
    assert one[labels[40:] == 1].min() > one[labels[40:] == 0].max()
    assert ((one >= 0) & (one <= 1)).all()
