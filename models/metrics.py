"""Figures that say how well a classifier separates scans with residual tissue from scans without.

Residual tissue is the positive class throughout. The paper's text (section 2.4) names the share of correctly called
NON-residual images "sensitivity" and the other "specificity": the same two numbers under exchanged names, see
`sensitivity_as_in_paper` and `specificity_as_in_paper`. numpy only.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


class MetricsError(ValueError):
    """The figure is not defined for these labels and scores."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of decisions at one threshold; a score at the threshold counts as positive."""

    true_positive: int
    false_negative: int
    true_negative: int
    false_positive: int

    @property
    def accuracy(self) -> float:
        right = self.true_positive + self.true_negative
        return right / (right + self.false_negative + self.false_positive)

    @property
    def sensitivity(self) -> float:
        """Share of residual scans called residual."""
        return _share(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> float:
        """Share of scans without residual tissue called so."""
        return _share(self.true_negative, self.true_negative + self.false_positive)

    @property
    def precision(self) -> float:
        return _share(self.true_positive, self.true_positive + self.false_positive)

    @property
    def sensitivity_as_in_paper(self) -> float:
        return self.specificity

    @property
    def specificity_as_in_paper(self) -> float:
        return self.sensitivity


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, values = np.asarray(labels), np.asarray(scores, np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise MetricsError(f"labels {truth.shape} and scores {values.shape} must be flat and of one length")
    if not np.isin(truth, (0, 1)).all():
        raise MetricsError("labels must be 0 (no residual tissue) or 1 (residual tissue)")
    if not np.isfinite(values).all():
        raise MetricsError("a score is not a finite number")
    return truth.astype(bool), values


def confusion(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Confusion:
    """Decisions `score >= threshold` against labels (N,) in {0, 1}."""
    truth, values = _checked(labels, scores)
    called = values >= threshold
    return Confusion(
        int((called & truth).sum()),
        int((~called & truth).sum()),
        int((~called & ~truth).sum()),
        int((called & ~truth).sum()),
    )


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a residual scan scores above one without; ties count one half.

    Mann-Whitney by mid-ranks. Raises `MetricsError` where a class is missing.
    """
    truth, values = _checked(labels, scores)
    positives = int(truth.sum())
    negatives = truth.size - positives
    if not positives or not negatives:
        raise MetricsError("the area under the curve needs scans of both classes")
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    mid_ranks = np.cumsum(sizes) - (sizes - 1) / 2
    rank_sum = mid_ranks[places][truth].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def roc_auc_interval(labels: ArrayLike, scores: ArrayLike, *, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of the area by DeLong's variance (Biometrics 1988;44:837), cut to 0..1."""
    truth, values = _checked(labels, scores)
    area = roc_auc(labels, scores)
    positive, negative = values[truth], values[~truth]
    wins = (positive[:, None] > negative[None, :]) + 0.5 * (positive[:, None] == negative[None, :])
    if positive.size < 2 or negative.size < 2:
        raise MetricsError("an interval needs at least two scans of each class")
    variance = wins.mean(axis=1).var(ddof=1) / positive.size + wins.mean(axis=0).var(ddof=1) / negative.size
    half = z * math.sqrt(variance)
    return max(0.0, area - half), min(1.0, area + half)


def share_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score (JASA 1927;22:209)."""
    if trials <= 0 or not 0 <= successes <= trials:
        raise MetricsError(f"{successes} of {trials} is not a share")
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (middle - half) / scale, (middle + half) / scale


def youden_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold with the greatest sensitivity + specificity, midway to the next lower score, so that it does not
    stand upon a scan of the set it was chosen on."""
    truth, values = _checked(labels, scores)
    if truth.all() or not truth.any():
        raise MetricsError("a threshold needs scans of both classes")
    order = np.argsort(values, kind="stable")
    ranked, hits = values[order], truth[order]
    above_positive = hits.sum() - np.concatenate(([0], np.cumsum(hits)[:-1]))
    below_negative = np.concatenate(([0], np.cumsum(~hits)[:-1]))
    gain = above_positive / hits.sum() + below_negative / (~hits).sum()
    starts = np.concatenate(([True], ranked[1:] > ranked[:-1]))
    best = int(np.argmax(np.where(starts, gain, -np.inf)))
    return float(ranked[0] if best == 0 else (ranked[best - 1] + ranked[best]) / 2)


def temperature(labels: ArrayLike, logits: ArrayLike) -> float:
    """The one number that a logit is divided by so that probabilities are calibrated (Guo et al., ICML 2017).

    Minimises the mean negative log-likelihood over 1/20 .. 20 by golden-section search on its logarithm.
    """
    truth, values = _checked(labels, logits)
    signed = np.where(truth, values, -values)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, -signed / math.exp(log_temperature)).mean())

    low, high, golden = math.log(1 / 20), math.log(20), (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def calibration_error(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error over `bins` equal bins of probability 0..1 (Guo et al., ICML 2017)."""
    truth, values = _checked(labels, probabilities)
    place = np.minimum((values * bins).astype(int), bins - 1)
    gaps = (abs(values[place == b].mean() - truth[place == b].mean()) * (place == b).mean() for b in np.unique(place))
    return float(sum(gaps))
