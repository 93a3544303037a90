"""Figures that say how well a classifier separates scans with residual tissue from scans without.

Residual tissue is the positive class throughout. The paper's text (section 2.4) names the share of correctly called
NON-residual images "sensitivity" and the other "specificity": the same two numbers under exchanged names, see
`sensitivity_as_in_paper` and `specificity_as_in_paper`. A figure that is not defined for the scans given raises
`MetricsError`; none is made up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


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
    def f1(self) -> float:
        """Harmonic mean of precision and sensitivity, residual tissue being positive."""
        return _share(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)

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
    area = roc_auc(labels, scores)
    half = z * math.sqrt(roc_auc_variance(labels, scores))
    return max(0.0, area - half), min(1.0, area + half)


def roc_auc_variance(labels: ArrayLike, scores: ArrayLike) -> float:
    """DeLong's variance of the area under the curve (Biometrics 1988;44:837)."""
    positive, negative = _components(*_checked(labels, scores))
    return float(positive.var(ddof=1) / positive.size + negative.var(ddof=1) / negative.size)


def _components(
    truth: NDArray[np.bool_], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """DeLong's structural components: of each positive the share of negatives it beats, of each negative the share of
    positives that beat it."""
    positive, negative = values[truth], values[~truth]
    if positive.size < 2 or negative.size < 2:
        raise MetricsError("a variance of the area needs at least two scans of each class")
    wins = (positive[:, None] > negative[None, :]) + 0.5 * (positive[:, None] == negative[None, :])
    return wins.mean(axis=1), wins.mean(axis=0)


@dataclass(frozen=True, slots=True)
class AreaComparison:
    """Two classifiers on the same scans.

    `first` and `second` are areas under the curve, `difference` first minus second with its 95 % interval, `z` its
    ratio to its standard error, `p_value` two-sided.
    """

    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    z: float
    p_value: float


def compare_areas(
    labels: ArrayLike, first_scores: ArrayLike, second_scores: ArrayLike, *, z: float = 1.959964
) -> AreaComparison:
    """DeLong's test between two correlated ROC curves: both classifiers scored the same scans, in the same order.

    DeLong, DeLong and Clarke-Pearson, Biometrics 1988;44:837. It takes the scans as independent: several views or
    scans of one patient must be made one score first. Where the difference has no variance (the same ranking twice, or
    both perfect) equal areas give z = 0 and p = 1; unequal ones raise `MetricsError`.
    """
    truth, one = _checked(labels, first_scores)
    _, other = _checked(labels, second_scores)
    first, second = roc_auc(truth, one), roc_auc(truth, other)
    gaps = [a - b for a, b in zip(_components(truth, one), _components(truth, other), strict=True)]
    error = math.sqrt(sum(float(gap.var(ddof=1)) / gap.size for gap in gaps))
    difference = first - second
    if error == 0.0:
        if not math.isclose(first, second, abs_tol=1e-12):
            raise MetricsError("the difference of the areas has no variance in these scans; there are too few of them")
        return AreaComparison(first, second, 0.0, (0.0, 0.0), 0.0, 1.0)
    ratio = difference / error
    return AreaComparison(
        first,
        second,
        difference,
        (difference - z * error, difference + z * error),
        ratio,
        math.erfc(abs(ratio) / math.sqrt(2)),
    )


@dataclass(frozen=True, slots=True)
class RankComparison:
    """`u`: pairs in which the first set lies above the second, ties one half; `p_value`: two-sided.

    `exact`: whether p is exact, or from the normal approximation.
    """

    u: float
    p_value: float
    exact: bool


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> RankComparison:
    """Mann-Whitney U between two networks' figures, one figure a random grouping (paper section 2.4).

    Exact without ties, else the normal approximation with correction for ties and continuity. Groupings of one cohort
    share scans, so that their figures are not independent and p is too small: it tells how steady the order of two
    networks is, not how it would be at another hospital. `compare_areas` is the test for that.
    """
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.ndim != 1 or other.ndim != 1 or not one.size or not other.size:
        raise MetricsError("each set needs at least one figure")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise MetricsError("a figure is not a finite number")
    together = np.concatenate([one, other])
    if (together == together[0]).all():
        return RankComparison(one.size * other.size / 2, 1.0, exact=False)
    exact = np.unique(together).size == together.size
    found = stats.mannwhitneyu(one, other, alternative="two-sided", method="exact" if exact else "asymptotic")
    return RankComparison(float(found.statistic), float(found.pvalue), exact)


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


def sensitivity_threshold(labels: ArrayLike, scores: ArrayLike, sensitivity: float) -> float:
    """The greatest threshold that still calls at least this share of the residual scans, put midway to the next lower
    score of any scan, so that it does not stand upon a scan of the set it was chosen on.

    `sensitivity` in (0, 1]. Raises `MetricsError` where a class is missing.
    """
    truth, values = _checked(labels, scores)
    if truth.all() or not truth.any():
        raise MetricsError("a threshold needs scans of both classes")
    if not 0 < sensitivity <= 1:
        raise MetricsError("a sensitivity to be kept must lie above 0 and not above 1")
    positive = np.sort(values[truth])
    # A hair more than the product, for 0.95 x 20 is 18.999... in binary.
    missed = positive.size - math.ceil(sensitivity * positive.size - 1e-9)
    kept = positive[missed]
    lower = values[values < kept]
    return float((kept + lower.max()) / 2 if lower.size else kept)


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


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The scans whose probability lies in [low, high): how many, their mean probability, their share of residuals."""

    low: float
    high: float
    count: int
    mean_probability: float
    residual_share: float


def reliability_curve(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 10) -> tuple[ReliabilityBin, ...]:
    """The bins of a reliability diagram that hold scans, by rising probability; the last one includes 1."""
    truth, values = _checked(labels, probabilities)
    if not values.size or bins < 1:
        raise MetricsError("a reliability curve needs scans and at least one bin")
    if values.min() < 0 or values.max() > 1:
        raise MetricsError("probabilities must lie between 0 and 1")
    place = np.minimum((values * bins).astype(int), bins - 1)
    return tuple(
        ReliabilityBin(
            int(b) / bins,
            (int(b) + 1) / bins,
            int((place == b).sum()),
            float(values[place == b].mean()),
            float(truth[place == b].mean()),
        )
        for b in np.unique(place)
    )


def calibration_error(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error over `bins` equal bins of probability 0..1 (Guo et al., ICML 2017)."""
    curve = reliability_curve(labels, probabilities, bins=bins)
    whole = sum(part.count for part in curve)
    return float(sum(abs(part.mean_probability - part.residual_share) * part.count for part in curve) / whole)


@dataclass(frozen=True, slots=True)
class NetBenefit:
    """At one threshold probability: the net benefit of acting on the classifier, and of acting on every scan.

    Acting on none has 0. In true positives a scan: 0.1 is as good as finding ten residuals in 100 scans for nothing.
    """

    threshold: float
    classifier: float
    act_on_all: float


def decision_curve(labels: ArrayLike, probabilities: ArrayLike, thresholds: Sequence[float]) -> tuple[NetBenefit, ...]:
    """Net benefit over threshold probabilities in (0, 1) (Vickers and Elkin, Med Decis Making 2006;26:565).

    A threshold t says that a missed residual weighs (1 - t) / t times a needless action.
    """
    truth, _ = _checked(labels, probabilities)
    if not truth.size:
        raise MetricsError("a decision curve needs scans")
    prevalence, curve = float(truth.mean()), []
    for threshold in thresholds:
        if not 0 < threshold < 1:
            raise MetricsError("a threshold probability must lie between 0 and 1")
        called, price = confusion(labels, probabilities, threshold), threshold / (1 - threshold)
        benefit = (called.true_positive - price * called.false_positive) / truth.size
        curve.append(NetBenefit(threshold, benefit, prevalence - price * (1 - prevalence)))
    return tuple(curve)
