"""Cohorts of phantoms on disk, and the whole making of weights in small."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import weights
from pipeline.analyse import analyse, load_model
from pipeline.camera import examination, expose
from pipeline.cohort import STRATA_CYCLE, CohortPlan, phantom_cohort
from pipeline.finding import Finding
from pipeline.phantom import NEGATIVE_STRATA, RESIDUAL_STRATA, STRATA, phantom
from pipeline.preprocess import ORDERS, prepare_scan
from pipeline.train_demonstration import COARSE, FINAL, PLANS, TRAINING, make


def test_a_cohort_holds_what_the_pipeline_makes_of_each_phantom(tmp_path: Path) -> None:
    plan = CohortPlan(960_000, 3)
    cohort = phantom_cohort(tmp_path, plan)
    assert cohort.planes.shape == (3, 1, 3, 112, 112)
    assert cohort.planes.dtype == np.float16
    for index in range(3):
        simulated = phantom(960_000 + index)
        assert cohort.labels[index] == simulated.truth.residual
        views = {"anterior": simulated.anterior, "posterior": simulated.posterior}
        scan = prepare_scan({name: (view.astype(np.float32), simulated.spacing_mm) for name, view in views.items()})
        assert np.array_equal(cohort.planes[index], scan.planes.astype(np.float16))
        assert cohort.total_counts[index].tolist() == [view.sum() for view in views.values()]
        assert cohort.uptake_percent[index] == pytest.approx(simulated.truth.uptake_percent)
        assert cohort.spacing_mm[index] == pytest.approx(simulated.spacing_mm[0])
        assert cohort.strata[index] == simulated.truth.stratum
    assert np.array_equal(cohort.images[2], cohort.planes[2, 0])
    assert cohort.image_labels.tolist() == cohort.labels.tolist()
    assert not cohort.masked.any()  # GrabCut takes longer than all else, and the network does not need it
    outlined = phantom_cohort(tmp_path, dataclasses.replace(plan, pairs=1), outlined=True)
    assert np.array_equal(outlined.planes[0], cohort.planes[0])


def test_another_order_or_plan_is_another_cohort(tmp_path: Path) -> None:
    plan = CohortPlan(965_000, 1)
    plain = phantom_cohort(tmp_path, plan)
    flat = dataclasses.replace(ORDERS["native"], steps=("bin", "field_of_view", "root_plane"))
    other_order = phantom_cohort(tmp_path, plan, order=flat)
    other_camera = phantom_cohort(tmp_path, dataclasses.replace(plan, physics="other"))
    other_class = phantom_cohort(tmp_path, dataclasses.replace(plan, prevalence=1.0))
    assert len(list(tmp_path.iterdir())) == 4
    assert not np.array_equal(plain.planes, other_order.planes)
    assert other_camera.spacing_mm[0] != plain.spacing_mm[0]
    assert other_class.labels.tolist() == [1]


def test_a_cohort_is_built_once_and_an_interrupted_one_anew(tmp_path: Path) -> None:
    plan = CohortPlan(970_000, 3)

    class InterruptionError(Exception):
        pass

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        phantom_cohort(tmp_path, plan, progress=interrupt)
    built: list[int] = []
    for _ in range(2):
        cohort = phantom_cohort(tmp_path, plan, progress=lambda done, _: built.append(done))
    assert built == [1, 2, 3]
    assert cohort.seeds.tolist() == [970_000, 970_001, 970_002]
    assert not list(tmp_path.glob(".*.part"))


def test_named_strata_come_in_turn_at_the_end_of_each_period() -> None:
    plan = CohortPlan(0, 300, stratum_period=5, stratum_run=2)
    drawn = [plan.draw(index) for index in range(300)]
    named = [pair for pair in drawn if pair != (None, None)]
    assert named[: len(STRATA_CYCLE)] == list(STRATA_CYCLE)
    assert drawn[:5] == [(None, None)] * 3 + list(STRATA_CYCLE[:2])
    assert all(CohortPlan(0, 9).draw(index) == (None, None) for index in range(9))
    left_out = dataclasses.replace(plan, without=("other_camera", "motion"))
    names = {left_out.draw(index)[0] for index in range(300)}
    assert names == {None, *STRATA} - {"other_camera", "motion", "view_missing"}


def test_the_cycle_holds_every_stratum_with_each_class_it_can_have_and_half_of_it_is_residual() -> None:
    assert sum(residual for _, residual in STRATA_CYCLE) * 2 == len(STRATA_CYCLE)
    for stratum in set(STRATA) - {"view_missing"}:
        classes = {residual for name, residual in STRATA_CYCLE if name == stratum}
        expected = {True} if stratum in RESIDUAL_STRATA else {False} if stratum in NEGATIVE_STRATA else {True, False}
        assert classes == expected - ({True} if stratum == "plain" else set()), stratum
        for residual in classes:
            phantom(1, stratum=stratum, residual=residual)  # the simulator does not refuse any of them


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_prevalence_of_the_natural_part_is_spread_evenly(share: float) -> None:
    plan = CohortPlan(0, 400, prevalence=share, stratum_period=4, stratum_run=1)
    natural = [residual for index in range(400) for name, residual in (plan.draw(index),) if name is None]
    assert len(natural) == 300
    assert sum(map(bool, natural)) == pytest.approx(300 * share, abs=1)
    for start in range(0, 300, 60):
        assert sum(map(bool, natural[start : start + 60])) == pytest.approx(60 * share, abs=1)


def test_no_seed_is_in_two_cohorts_of_the_shipped_weights() -> None:
    seeds = [range(plan.first_seed, plan.first_seed + plan.pairs) for plan in PLANS.values()]
    assert len(set().union(*seeds)) == sum(len(one) for one in seeds)
    assert PLANS["stress"].pairs >= 2000
    stress = PLANS["stress"]
    drawn = [stress.draw(index) for index in range(stress.pairs)]
    assert {stratum for stratum, _ in drawn} == set(STRATA) - {"view_missing"}
    assert sum(bool(residual) for _, residual in drawn) == pytest.approx(stress.pairs / 2, abs=2)
    # What carries over to a camera that was never seen is measured, so it must not have been seen.
    for name in TRAINING:
        assert "other_camera" not in [PLANS[name].draw(index)[0] for index in range(500)]
        assert PLANS[name].physics == "varied"
    assert PLANS["other_camera"].physics == "other"


def test_weights_are_made_measured_and_judge_a_scan_from_one_command(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plans = {name: dataclasses.replace(plan, pairs=16 if name in TRAINING else 10) for name, plan in PLANS.items()}
    coarse = dataclasses.replace(COARSE, architecture="squeezenet1_1", stages=((1, 56), (1, 112)), stop_after=1)
    coarse = dataclasses.replace(coarse, batch_size=8)
    last = dataclasses.replace(FINAL, architecture="squeezenet1_1", stages=((1, 112),), batch_size=8, epoch_images=16)
    said: list[str] = []
    path = make(tmp_path, 1, said.append, plans=plans, phases=((coarse, TRAINING[:1]), (last, TRAINING)))
    torch.set_num_threads(threads)
    record = weights.verify(str(path)).record
    assert record.release == "demonstration"
    assert record.trained_on == "simulated scans only"
    assert record.fusion == "views_as_channels"
    assert "32 simulated pairs" in record.data
    report = json.loads((path.parent / "figures.json").read_text())
    for name in ("stress", "population", "other_camera"):
        assert record.metrics[f"{name}_pairs"] == 10
        figures = report[name]["figures"]
        assert record.metrics[f"{name}_sensitivity"] == pytest.approx(figures["sensitivity"], abs=1e-4)
        rows = {row["stratum"]: row for row in report[name]["strata"]}
        for row in rows.values():
            assert row["called_present_of_residual"][1] + row["not_absent_of_clean"][1] == row["scans"] <= 10
        drawn = [plans[name].draw(index)[0] for index in range(10)]
        for stratum in set(drawn) - {None}:  # a scan also stands in the row of its uptake
            assert rows[stratum]["scans"] >= drawn.count(stratum)
        assert 0 <= report[name]["baseline_auc"] <= 1
    assert record.undetermined_band is None  # the share of ten scans that may be undetermined is less than one
    assert any("phase 2 of 2, epoch 1/1" in line for line in said)
    model = load_model(str(path))
    assert model.embedding is not None
    stratum, residual = plans["training"].draw(0)
    simulated = phantom(plans["training"].first_seed, stratum=stratum, residual=residual, confusers=3.0)
    outcome = analyse(expose(simulated, examination(1), "two_frames"), model)
    assert isinstance(outcome, Finding)
    assert outcome.threshold == record.threshold
