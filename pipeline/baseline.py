"""What a doctor's eye could measure, given to a gradient boosting: the floor that a network has to beat.

Eighteen numbers of the two views (hottest spot, its place, width and ratio between the views, second spot, sides,
counts), and scikit-learn's boosted trees on them. A simulated set on which this does nearly as well as a network is too
kind to show anything.
"""

from collections.abc import Mapping
from typing import Final

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import GradientBoostingClassifier

from pipeline.preprocess import GRID_MM

FEATURES: Final = (
    "peak_anterior",
    "peak_posterior",
    "peak_over_median",
    "peak_x_mm",
    "peak_y_mm",
    "posterior_to_anterior",
    "width_mm",
    "second_peak",
    "second_distance_mm",
    "bed_peak",
    "bed_peak_over_ring",
    "bed_posterior_to_anterior",
    "bed_share",
    "sides_ratio",
    "above_ratio",
    "below_ratio",
    "counts",
    "significance",
)
_SIGMA_MM = 4.9


def features(planes: ArrayLike) -> NDArray[np.float64]:
    """The `FEATURES` of one pair, from its joint planes (3, 112, 112): roots of counts, share of the views."""
    anterior, posterior, _ = np.asarray(planes, np.float64) ** 2
    smooth_a, smooth_p = (cv2.GaussianBlur(view, (0, 0), _SIGMA_MM / GRID_MM) for view in (anterior, posterior))
    size = anterior.shape[0]
    y_mm, x_mm = ((np.indices(anterior.shape) - (size - 1) / 2) * GRID_MM).astype(np.float64)
    middle = (np.abs(x_mm) < 75) & (np.abs(y_mm) < 85)
    bed = (np.abs(x_mm) < 32) & (np.abs(y_mm) < 38)
    level = float(np.median(smooth_a[middle])) + 1e-6

    def hottest(image: NDArray[np.float64], where: NDArray[np.bool_]) -> tuple[int, int]:
        row, column = np.unravel_index(int(np.where(where, image, -1.0).argmax()), image.shape)
        return int(row), int(column)

    def ratio(at: tuple[int, int]) -> float:
        near = slice(max(0, at[0] - 2), at[0] + 3), slice(max(0, at[1] - 2), at[1] + 3)
        return (float(smooth_p[near].max()) + 0.05) / (float(smooth_a[at]) + 0.05)

    peak = hottest(smooth_a, middle)
    away_mm = np.hypot(x_mm - x_mm[peak], y_mm - y_mm[peak])
    near = away_mm < 22
    weight = np.maximum(anterior - level, 0) * near
    width = float(np.sqrt((weight * away_mm**2).sum() / (weight.sum() + 1e-6)))
    second = hottest(smooth_a, middle & ~near)
    in_bed = hottest(smooth_a, bed)
    bed_away_mm = np.hypot(x_mm - x_mm[in_bed], y_mm - y_mm[in_bed])
    ring = float(smooth_a[(bed_away_mm > 18) & (bed_away_mm < 30)].mean()) + 1e-6
    core = bed_away_mm < 8
    left, right = (float(anterior[bed & side].sum()) + 1 for side in (x_mm > 0, x_mm < 0))
    return np.array(
        [
            smooth_a[peak],
            smooth_p[hottest(smooth_p, middle)],
            smooth_a[peak] / level,
            x_mm[peak],
            y_mm[peak],
            ratio(peak),
            width,
            smooth_a[second] / level,
            float(np.hypot(x_mm[second] - x_mm[peak], y_mm[second] - y_mm[peak])),
            smooth_a[in_bed],
            smooth_a[in_bed] / ring,
            ratio(in_bed),
            anterior[bed].sum() / (anterior[middle].sum() + 1),
            max(left, right) / min(left, right),
            float(smooth_a[middle & (y_mm < -45)].max()) / level,
            float(smooth_a[middle & (y_mm > 45)].max()) / level,
            anterior.sum() + posterior.sum(),
            (anterior[core].sum() - ring * core.sum()) / np.sqrt(ring * core.sum() + 1),
        ]
    )


def fit(table: NDArray[np.float64], labels: ArrayLike, *, seed: int = 131) -> GradientBoostingClassifier:
    """Boosted trees on the features (N, 18) of a training set."""
    model = GradientBoostingClassifier(
        n_estimators=300, max_depth=4, learning_rate=0.05, subsample=0.7, random_state=seed
    )
    return model.fit(table, np.asarray(labels))


def scores(model: GradientBoostingClassifier, table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability of residual tissue for each row of features."""
    return np.asarray(model.predict_proba(table)[:, 1], np.float64)


def as_mapping(row: NDArray[np.float64]) -> Mapping[str, float]:
    """The features of one pair by name."""
    return dict(zip(FEATURES, row.tolist(), strict=True))
