"""Figures of merit against scikit-learn and against hand-made cases."""

from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from sklearn import datasets
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from models import metrics
from models.metrics import MetricsError


def _case(seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    scores = labels + rng.normal(0, 1.2, 200)
    return labels, np.round(scores) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_area_under_the_curve_is_that_of_scikit_learn(seed: int, ties: bool) -> None:
    labels, scores = _case(seed, ties=ties)
    assert metrics.roc_auc(labels, scores) == pytest.approx(reference.roc_auc_score(labels, scores), abs=1e-12)


def test_decisions_agree_with_scikit_learn_and_both_conventions_are_named() -> None:
    labels, scores = _case(4, ties=False)
    table = metrics.confusion(labels, scores, 0.5)
    called = scores >= 0.5
    assert table.accuracy == pytest.approx(reference.accuracy_score(labels, called))
    assert table.sensitivity == pytest.approx(reference.recall_score(labels, called))
    assert table.specificity == pytest.approx(reference.recall_score(labels, called, pos_label=0))
    assert table.precision == pytest.approx(reference.precision_score(labels, called))
    assert table.f1 == pytest.approx(reference.f1_score(labels, called))
    assert (table.sensitivity_as_in_paper, table.specificity_as_in_paper) == (table.specificity, table.sensitivity)


def test_a_score_at_the_threshold_is_called_present() -> None:
    assert metrics.confusion([1, 0], [0.5, 0.4999], 0.5) == metrics.Confusion(1, 0, 1, 0)


def test_the_interval_holds_the_area_and_shrinks_with_more_scans() -> None:
    labels, scores = _case(5, ties=False)
    low, high = metrics.roc_auc_interval(labels, scores)
    assert low < metrics.roc_auc(labels, scores) < high
    more_low, more_high = metrics.roc_auc_interval(np.tile(labels, 4), np.tile(scores, 4))
    assert more_high - more_low == pytest.approx((high - low) / 2, rel=0.05)


def test_wilson_interval_of_a_perfect_score_does_not_claim_certainty() -> None:
    low, high = metrics.share_interval(20, 20)
    assert low == pytest.approx(0.8389, abs=1e-4)
    assert high == pytest.approx(1.0)


def test_the_chosen_threshold_has_the_greatest_sensitivity_plus_specificity() -> None:
    labels, scores = _case(6, ties=True)
    chosen = metrics.confusion(labels, scores, metrics.youden_threshold(labels, scores))
    false_positive, true_positive, _ = reference.roc_curve(labels, scores)
    assert chosen.sensitivity + chosen.specificity - 1 == pytest.approx((true_positive - false_positive).max())
    assert metrics.youden_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)


@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.95, 1.0])
def test_the_threshold_for_a_sensitivity_is_the_greatest_that_keeps_it(wanted: float) -> None:
    labels, scores = _case(8, ties=True)
    threshold = metrics.sensitivity_threshold(labels, scores, wanted)
    assert metrics.confusion(labels, scores, threshold).sensitivity >= wanted
    above = scores[scores >= threshold].min()
    assert metrics.confusion(labels, scores, np.nextafter(above, np.inf)).sensitivity < wanted
    assert threshold not in scores or threshold == scores.min()


def test_a_threshold_for_a_sensitivity_counts_scans_and_not_rounding_errors() -> None:
    labels, scores = [1] * 20 + [0], [*np.arange(1.0, 21.0), 0.5]
    assert metrics.sensitivity_threshold(labels, scores, 0.95) == pytest.approx(1.5)
    assert metrics.sensitivity_threshold([1, 0], [0.2, 0.9], 1.0) == pytest.approx(0.2)
    for labels, wanted in (([1, 1], 0.9), ([1, 0], 0.0), ([1, 0], 1.1)):
        with pytest.raises(MetricsError):
            metrics.sensitivity_threshold(labels, [0.1, 0.2], wanted)


def test_the_temperature_is_recovered_from_overconfident_logits() -> None:
    rng = np.random.default_rng(7)
    honest = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-honest))
    assert metrics.temperature(labels, honest * 3) == pytest.approx(3, rel=0.05)
    assert metrics.calibration_error(labels, 1 / (1 + np.exp(-honest))) < 0.02
    assert metrics.calibration_error(labels, 1 / (1 + np.exp(-honest * 3))) > 0.05


@pytest.mark.parametrize(
    ("labels", "scores"), [([1, 1], [0.1, 0.2]), ([0, 2], [0.1, 0.2]), ([0, 1], [0.1, np.nan]), ([0, 1, 1], [0.1, 0.2])]
)
def test_labels_and_scores_that_make_no_sense_are_refused(labels: list[int], scores: list[float]) -> None:
    with pytest.raises(metrics.MetricsError):
        metrics.roc_auc(labels, scores)


def test_delongs_variance_is_the_published_one_of_another_implementation() -> None:
    """0.0014569635512 stands in the tests of yandexdataschool/roc_comparison (the algorithm of Sun and Xu, IEEE Signal
    Processing Letters 2014;21:1389), for irises as scikit-learn held them before 0.20: two flowers read differently."""
    irises = datasets.load_iris()
    flowers = irises.data.copy()
    flowers[[34, 37]] = (4.9, 3.1, 1.5, 0.1)
    seen, unseen, seen_is, unseen_is = train_test_split(
        flowers, (irises.target == 1).astype(int), test_size=0.8, random_state=42
    )
    scores = LogisticRegression(solver="liblinear").fit(seen, seen_is).predict_proba(unseen)[:, 1]
    assert metrics.roc_auc_variance(unseen_is, scores) == pytest.approx(0.0014569635512, abs=1e-12)


def _covariance_by_definition(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> Fraction:
    """DeLong et al. 1988, equations 4 to 7, literally, in whole numbers and fractions."""

    def kernel(high: float, low: float) -> Fraction:
        return Fraction(1) if high > low else Fraction(1, 2) if high == low else Fraction(0)

    def parts(scores: np.ndarray) -> tuple[list[Fraction], list[Fraction]]:
        ill, well = scores[labels == 1], scores[labels == 0]
        return (
            [sum((kernel(x, y) for y in well), Fraction()) / len(well) for x in ill],
            [sum((kernel(x, y) for x in ill), Fraction()) / len(ill) for y in well],
        )

    def mean(values: list[Fraction]) -> Fraction:
        return sum(values, Fraction()) / len(values)

    total = Fraction()
    for first, second in zip(parts(one), parts(other), strict=True):
        moments = sum(((a - mean(first)) * (b - mean(second)) for a, b in zip(first, second, strict=True)), Fraction())
        total += moments / (len(first) - 1) / len(first)
    return total


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_delongs_test_is_that_of_the_paper_written_out_in_fractions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.array([0] * 14 + [1] * 11)
    one = np.round(labels * 1.5 + rng.normal(0, 1, 25))
    other = np.round(one + rng.normal(0, 1.5, 25))
    found = metrics.compare_areas(labels, one, other)
    variance = (
        _covariance_by_definition(labels, one, one)
        + _covariance_by_definition(labels, other, other)
        - 2 * _covariance_by_definition(labels, one, other)
    )
    difference = reference.roc_auc_score(labels, one) - reference.roc_auc_score(labels, other)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert found.z == pytest.approx(difference / float(variance) ** 0.5, abs=1e-10)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(found.z)), abs=1e-12)
    assert found.interval == pytest.approx(
        (difference - 1.959964 * float(variance) ** 0.5, difference + 1.959964 * float(variance) ** 0.5)
    )
    swapped = metrics.compare_areas(labels, other, one)
    assert (swapped.z, swapped.p_value) == pytest.approx((-found.z, found.p_value))


def test_delongs_test_calls_equal_classifiers_different_about_one_time_in_twenty() -> None:
    rng = np.random.default_rng(14)
    labels = np.repeat([0, 1], 60)
    called = 0
    for _ in range(400):
        shared = labels + rng.normal(0, 1, 120)
        called += (
            metrics.compare_areas(labels, shared + rng.normal(0, 1, 120), shared + rng.normal(0, 1, 120)).p_value < 0.05
        )
    assert 8 <= called <= 36


def test_a_comparison_without_variance_claims_nothing() -> None:
    labels, scores = [0, 0, 1, 1], [0.1, 0.4, 0.3, 0.9]
    same = metrics.compare_areas(labels, scores, [2 * score for score in scores])
    assert (same.difference, same.z, same.p_value) == (0.0, 0.0, 1.0)
    with pytest.raises(MetricsError, match="too few"):
        metrics.compare_areas(labels, [0, 0, 1, 1], [1, 1, 0, 0])
    with pytest.raises(MetricsError, match="two scans of each class"):
        metrics.compare_areas([0, 0, 1], [0, 0, 1], [0, 1, 1])


def test_ranks_of_two_networks_give_the_hand_counted_u_and_the_exact_p() -> None:
    """3 against 3 fully apart: one of 20 orders on either side, so that p is 2/20."""
    apart = metrics.mann_whitney([0.91, 0.92, 0.93], [0.81, 0.82, 0.83])
    assert (apart.u, apart.exact) == (9.0, True)
    assert apart.p_value == pytest.approx(0.1)
    mixed = metrics.mann_whitney([0.9, 0.8, 0.8], [0.8, 0.7])
    assert (mixed.u, mixed.exact) == (5.0, False)
    assert metrics.mann_whitney([0.9, 0.9], [0.9]) == metrics.RankComparison(1.0, 1.0, exact=False)
    for first, second in (([], [0.9]), ([np.nan], [0.9])):
        with pytest.raises(MetricsError):
            metrics.mann_whitney(first, second)


def test_the_reliability_curve_is_that_of_scikit_learn_and_sums_to_the_calibration_error() -> None:
    rng = np.random.default_rng(8)
    probabilities = rng.random(500)
    labels = (rng.random(500) < probabilities**2).astype(int)
    curve = metrics.reliability_curve(labels, probabilities)
    shares, means = calibration_curve(labels, probabilities, n_bins=10)
    assert [part.residual_share for part in curve] == pytest.approx(list(shares))
    assert [part.mean_probability for part in curve] == pytest.approx(list(means))
    assert sum(part.count for part in curve) == 500
    # Two bins: .2 for a clean scan and .6 (mean) for two, one of them residual: (.2 x 1 + .1 x 2) / 3.
    assert metrics.calibration_error([0, 1, 0], [0.2, 0.6, 0.6], bins=2) == pytest.approx(0.4 / 3)
    assert metrics.reliability_curve([1], [1.0])[0].high == 1.0
    with pytest.raises(MetricsError, match="between 0 and 1"):
        metrics.calibration_error([0, 1], [0.2, 1.2])


def test_net_benefit_weighs_needless_actions_by_the_odds_of_the_threshold() -> None:
    labels, probabilities = [1, 1, 0, 0, 0], [0.9, 0.3, 0.6, 0.1, 0.05]
    low, even = metrics.decision_curve(labels, probabilities, [0.2, 0.5])
    assert (low.classifier, low.act_on_all) == pytest.approx(((2 - 0.25) / 5, 0.4 - 0.25 * 0.6))
    assert (even.classifier, even.act_on_all) == pytest.approx(((1 - 1) / 5, 0.4 - 0.6))
    with pytest.raises(MetricsError, match="threshold probability"):
        metrics.decision_curve(labels, probabilities, [1.0])


def test_delong_is_that_of_proc() -> None:
    """Numbers of R 4.2.2 with pROC 1.18.0 (Debian's r-cran-proc), printed with options(digits = 15) by
    a <- roc(labels, one, levels = c(0, 1), direction = "<"); b <- roc(labels, other, levels = c(0, 1), direction = "<")
    auc(a); auc(b); var(a); var(b); cov(a, b); ci.auc(a); ci.auc(b); roc.test(a, b, method = "delong", paired = TRUE)
    """
    labels = [0] * 12 + [1] * 14
    one = [0.05, 0.12, 0.12, 0.20, 0.25, 0.31, 0.33, 0.40, 0.48, 0.55, 0.62, 0.74]
    one += [0.31, 0.38, 0.45, 0.52, 0.55, 0.60, 0.66, 0.70, 0.74, 0.81, 0.86, 0.90, 0.93, 0.97]
    other = [0.30, 0.08, 0.22, 0.45, 0.10, 0.51, 0.27, 0.60, 0.35, 0.49, 0.70, 0.66]
    other += [0.28, 0.52, 0.39, 0.61, 0.44, 0.58, 0.51, 0.80, 0.62, 0.77, 0.69, 0.90, 0.55, 0.85]
    assert metrics.roc_auc_variance(labels, one) == pytest.approx(0.00564775006739292, rel=1e-13)
    assert metrics.roc_auc_variance(labels, other) == pytest.approx(0.00880456349206349, rel=1e-13)
    # pROC's z of 95 % has more digits than ours.
    assert metrics.roc_auc_interval(labels, one) == pytest.approx((0.700920024748482, 0.995508546680090), abs=1e-7)
    assert metrics.roc_auc_interval(labels, other) == pytest.approx((0.592877128056173, 0.960694300515256), abs=1e-7)
    found = metrics.compare_areas(labels, one, other)
    assert (found.first, found.second) == pytest.approx((0.848214285714286, 0.776785714285714), rel=1e-13)
    assert found.z == pytest.approx(1.21933875670796, rel=1e-13)
    assert found.p_value == pytest.approx(0.222715644297427, rel=1e-12)
    assert found.interval == pytest.approx((-0.0433856479152965, 0.1862427907724393), abs=1e-7)
    # var(a) + var(b) - 2 cov(a, b), with pROC's covariance.
    error = 0.00564775006739292 + 0.00880456349206349 - 2 * 0.0055103626532198
    assert (found.difference / found.z) ** 2 == pytest.approx(error, rel=1e-11)
