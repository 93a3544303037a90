"""Cohorts of phantoms on disk, and the whole making of weights in small."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import weights
from models.train import TrainingSettings
from pipeline.analyse import analyse, load_model
from pipeline.camera import examination, expose
from pipeline.cohort import CohortPlan, phantom_cohort
from pipeline.finding import Finding
from pipeline.phantom import STRATA, phantom
from pipeline.preprocess import prepare
from pipeline.train_demonstration import PLANS, make


def test_a_cohort_holds_what_the_pipeline_makes_of_each_phantom(tmp_path: Path) -> None:
    plan = CohortPlan(960_000, 3)
    cohort = phantom_cohort(tmp_path, plan)
    assert cohort.planes.shape == (3, 2, 3, 224, 224)
    for index in range(3):
        simulated = phantom(960_000 + index)
        assert cohort.labels[index] == simulated.truth.residual
        posterior = prepare(simulated.posterior.astype(np.float32), simulated.spacing_mm)
        assert np.array_equal(cohort.planes[index, 1], posterior.planes)
        assert cohort.total_counts[index, 1] == simulated.posterior.sum()
    assert np.array_equal(cohort.images[3], cohort.planes[1, 1])
    assert cohort.image_labels.tolist() == np.repeat(cohort.labels, 2).tolist()


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
    plan = CohortPlan(0, 50, stratum_period=5, stratum_run=2)
    drawn = [plan.stratum(index) for index in range(50)]
    assert [name for name in drawn if name is not None] == list(STRATA)
    assert drawn[:5] == [None, None, None, STRATA[0], STRATA[1]]
    assert all(CohortPlan(0, 9).stratum(index) is None for index in range(9))


def test_no_seed_is_in_two_cohorts_of_the_shipped_weights() -> None:
    seeds = [range(plan.first_seed, plan.first_seed + plan.pairs) for plan in PLANS.values()]
    assert len(set().union(*seeds)) == sum(len(one) for one in seeds)
    assert PLANS["test"].pairs >= 400


def test_weights_are_made_measured_and_judge_a_scan_from_one_command(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plans = {name: dataclasses.replace(plan, pairs=16 if name == "training" else 14) for name, plan in PLANS.items()}
    settings = TrainingSettings(architecture="squeezenet1_1", stages=((1, 64), (1, 224)), batch_size=8)
    said: list[str] = []
    path = make(tmp_path, 1, said.append, plans=plans, settings=settings)
    torch.set_num_threads(threads)
    record = weights.verify(str(path)).record
    assert record.release == "demonstration"
    assert record.trained_on == "simulated scans only"
    assert "16 simulated pairs" in record.data
    assert record.metrics["test_pairs"] == 14
    assert json.loads((path.parent / "figures.json").read_text())["figures"] == record.metrics
    assert any("epoch 2/2" in line for line in said)
    outcome = analyse(
        expose(phantom(PLANS["training"].first_seed), examination(1), "two_frames"), load_model(str(path))
    )
    assert isinstance(outcome, Finding)
    assert outcome.threshold == record.threshold
