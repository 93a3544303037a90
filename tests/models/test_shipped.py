"""The weights that are shipped: complete, what their card says, and better than chance on scans they have not seen."""

import json

import numpy as np
import pytest
import torch

from models import metrics, weights
from pipeline.analyse import analyse, load_model
from pipeline.camera import examination, expose
from pipeline.finding import Finding
from pipeline.phantom import phantom
from pipeline.preprocess import PREPROCESSING_VERSION

NAMES = weights.available()


def test_the_default_weights_are_shipped() -> None:
    assert "remnant-resnet18-phantom" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_record_has_its_tensors_and_a_card_that_names_them(name: str) -> None:
    place = weights.verify(name)
    record = place.record
    assert record.name == name
    assert record.preprocessing_version == PREPROCESSING_VERSION
    card = place.record_path.with_suffix(".md").read_text()
    assert record.sha256 in card
    assert record.trained_on in card.lower()
    assert str(record.threshold) in card
    for name in ("stress_auc", "stress_baseline_auc", "population_auc", "other_camera_auc"):
        assert f"{record.metrics[name]:.4f}" in card
    assert json.loads(place.record_path.read_text())["release"] == record.release


def test_phantom_weights_are_for_demonstration_only() -> None:
    for name in NAMES:
        record = weights.find(name).record
        if "simulated" in record.trained_on:
            assert record.release == "demonstration"


def test_the_shipped_network_tells_unseen_phantoms_apart() -> None:
    """Twenty-four pairs of seeds in no cohort; the card's interval on 1,000 pairs allows this bound with ease."""
    model = load_model("remnant-resnet18-phantom")
    assert next(model.network.parameters()).dtype == torch.float32
    truth, scores = [], []
    for seed in range(980_000, 980_024):
        simulated = phantom(seed, residual=seed % 2 == 0)
        outcome = analyse(expose(simulated, examination(seed), "two_frames"), model)
        assert isinstance(outcome, Finding)
        truth.append(simulated.truth.residual)
        scores.append(outcome.probability)
    assert np.sum(truth) == 12
    assert metrics.roc_auc(truth, scores) > 0.9
