"""Figures of an evaluation: nobody is left out, both conventions are named, and scores are the node's own answers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from sklearn import metrics as reference

from models import metrics
from pipeline.analyse import analyse, load_model
from pipeline.camera import simulate
from pipeline.evaluation import (
    Rate,
    Scored,
    by_stratum,
    figures,
    labels_of,
    ranking_scores,
    roc_points,
    score,
    strata_of,
    view_areas,
)
from pipeline.hospital_cohort import read_cohort


def _scan(number: int, *, residual: bool, outcome: str, probability: float | None, **more: object) -> Scored:
    return Scored(f"1.2.{number}", f"patient {number}", residual, outcome, probability, **more)  # type: ignore[arg-type]


SCANS = (
    _scan(1, residual=True, outcome="present", probability=0.9, strata=("star",)),
    _scan(2, residual=True, outcome="present", probability=0.8),
    _scan(3, residual=True, outcome="absent", probability=0.1, strata=("star",)),
    _scan(4, residual=True, outcome="undetermined", probability=0.48),
    _scan(5, residual=True, outcome="declined", probability=None, reason="low_counts", strata=("star",)),
    _scan(6, residual=False, outcome="absent", probability=0.2, strata=("star",)),
    _scan(7, residual=False, outcome="present", probability=0.7, strata=("thymus",)),
    _scan(8, residual=False, outcome="declined", probability=None, reason="flood", strata=("thymus",)),
)


def test_whoever_got_no_answer_counts_as_an_error_on_either_side() -> None:
    found = figures(SCANS)
    assert (found.scans, found.residual, found.patients) == (8, 5, 8)
    assert found.accuracy == Rate(3, 8)
    assert found.sensitivity == Rate(2, 5)
    assert found.specificity == Rate(1, 3)
    assert found.precision == Rate(2, 3)
    assert found.f1 == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))
    assert (found.undetermined, found.declined) == (Rate(1, 8), Rate(2, 8))
    assert found.sensitivity_as_in_paper == Rate(1, 3)
    assert found.specificity_as_in_paper == Rate(2, 5)


def test_whoever_got_no_answer_counts_as_one_half_in_the_area_and_the_other_area_stands_beside() -> None:
    found = figures(SCANS)
    scores = [0.9, 0.8, 0.1, 0.5, 0.5, 0.2, 0.7, 0.5]
    assert ranking_scores(SCANS).tolist() == scores
    assert found.auc.value == pytest.approx(reference.roc_auc_score(labels_of(SCANS), scores))
    assert (found.auc.low, found.auc.high) == metrics.roc_auc_interval(labels_of(SCANS), scores)
    assert found.auc_answered.value == pytest.approx(
        reference.roc_auc_score([1, 1, 1, 1, 0, 0], [0.9, 0.8, 0.1, 0.48, 0.2, 0.7])
    )


def test_a_figure_that_the_scans_do_not_define_is_none_and_not_zero() -> None:
    clean = figures([one for one in SCANS if not one.residual and one.outcome != "present"])
    assert (clean.auc, clean.sensitivity.share, clean.precision.share, clean.f1) == (None, None, None, None)
    assert clean.sensitivity.interval is None
    one_each = figures([SCANS[0], SCANS[5]])
    assert (one_each.auc.value, one_each.auc.low) == (1.0, None)
    assert figures([SCANS[4]]).calibration_error is None


def test_a_stratum_shows_its_own_hits_alarms_and_silences() -> None:
    rows = {row.name: row for row in by_stratum(SCANS)}
    assert list(rows) == ["star", "thymus"]
    star, thymus = rows["star"], rows["thymus"]
    assert (star.scans, star.sensitivity, star.false_alarms, star.declined) == (4, Rate(1, 3), Rate(0, 1), 1)
    assert (thymus.sensitivity, thymus.false_alarms) == (Rate(0, 0), Rate(2, 2))


@pytest.mark.parametrize(
    ("residual", "uptake", "spacing", "expected"),
    [
        (True, 0.05, 2.20903, ("tilted", "uptake_0.03_0.1", "zoom_1.0")),
        (True, 0.1, 2.20903 / 1.5, ("tilted", "uptake_0.1_0.3", "zoom_1.5")),
        (True, 12.0, 1.9, ("tilted", "uptake_1_up")),
        (False, 0.0, None, ("tilted",)),
    ],
)
def test_uptake_and_zoom_make_strata_of_their_own(
    residual: bool, uptake: float, spacing: float | None, expected: tuple[str, ...]
) -> None:
    one = _scan(1, residual=residual, outcome="absent", probability=0.1, strata=("tilted",))
    assert strata_of(dataclasses.replace(one, uptake_percent=uptake, spacing_mm=spacing)) == expected


def test_the_curve_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 60).astype(np.uint8)
    scores = np.round(labels + rng.normal(0, 1, 60), 1)
    x, y, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    assert np.array(roc_points(labels, scores)) == pytest.approx(np.stack([x, y], axis=1))


def test_scores_are_what_the_node_would_answer(tmp_path: Path) -> None:
    simulate(tmp_path, 3, 983_000)
    cohort = read_cohort(tmp_path, tmp_path / "truth.csv")
    assert cohort.scans
    assert all(scan.synthetic for scan in cohort.scans)
    model = load_model("remnant-resnet18-phantom")
    told: list[tuple[int, int]] = []
    scored = score(
        cohort.scans, model, preprocessing=model.record.preprocessing, progress=lambda *done: told.append(done)
    )
    assert told[-1] == (len(cohort.scans), len(cohort.scans))
    for scan, one in zip(cohort.scans, scored, strict=True):
        answer = analyse([dcmread(path) for path in scan.files], model, preprocessing=model.record.preprocessing)
        assert (one.outcome, one.probability) == (answer.finding, answer.probability)
        assert (one.residual, one.group) == (scan.residual, scan.patient)
        assert one.spacing_mm == answer.views[0].image.spacing_mm[0]
        assert set(one.views) == {view.image.view for view in answer.views}
    assert set(view_areas(scored)) == {"anterior", "posterior"}


def test_a_scan_that_the_node_declines_is_scored_as_declined_with_its_reason(tmp_path: Path) -> None:
    simulate(tmp_path, 1, 983_100)
    scan = read_cohort(tmp_path, tmp_path / "truth.csv").scans[0]
    for path in scan.files:
        ds = dcmread(path)
        ds.PixelData = bytes(len(ds.PixelData))
        ds.save_as(path)
    model = load_model("remnant-resnet18-phantom")
    (one,) = score([scan], model, preprocessing=model.record.preprocessing)
    assert (one.outcome, one.probability, one.reason) == ("declined", None, "empty_frame")
