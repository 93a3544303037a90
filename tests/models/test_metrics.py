"""Figures of merit against scikit-learn and against hand-made cases."""

import numpy as np
import pytest
from sklearn import metrics as reference

from models import metrics


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
