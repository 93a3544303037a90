"""Training on arrays: it learns, it repeats itself, it goes on after an interruption."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import metrics
from models.train import EpochReport, TrainingError, TrainingSettings, logits, train

SETTINGS = TrainingSettings(
    architecture="squeezenet1_1", stages=((1, 48), (2, 64)), batch_size=8, learning_rate=1e-3, shift=2
)


@pytest.fixture(scope="module")
def discs() -> tuple[np.ndarray, np.ndarray]:
    """Noise, (48, 3, 64, 64) uint8, with a bright disc in every second picture."""
    rng = np.random.default_rng(8)
    images = rng.integers(0, 90, (48, 3, 64, 64), dtype=np.uint8)
    labels = np.arange(48, dtype=np.uint8) % 2
    rows, columns = np.mgrid[:64, :64]
    for index in np.flatnonzero(labels):
        y, x = rng.integers(20, 44, 2)
        images[index][:, (rows - y) ** 2 + (columns - x) ** 2 < 80] = 230
    return images, labels


def _state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_a_network_learns_to_tell_discs_from_noise(discs: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = discs
    settings = dataclasses.replace(SETTINGS, architecture="resnet18", stages=((4, 64),))
    losses: list[float] = []
    network = train(images, labels, settings, after_epoch=lambda report, _: losses.append(report.loss))
    assert losses[-1] < losses[0] / 2
    assert metrics.roc_auc(labels, logits(network, images, settings)) > 0.95


class _InterruptionError(Exception):
    pass


def test_an_interrupted_training_goes_on_to_the_very_same_weights(
    discs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    images, labels = discs
    whole = _state(train(images, labels, SETTINGS))

    def stop(report: EpochReport, _: nn.Module) -> None:
        if report.epoch == 2:
            raise _InterruptionError

    with pytest.raises(_InterruptionError):
        train(images, labels, SETTINGS, checkpoint=tmp_path / "checkpoint.pt", after_epoch=stop)
    epochs: list[int] = []
    resumed = train(
        images,
        labels,
        SETTINGS,
        checkpoint=tmp_path / "checkpoint.pt",
        after_epoch=lambda report, _: epochs.append(report.epoch),
    )
    assert epochs == [3]
    assert _same(whole, _state(resumed))


def test_a_checkpoint_of_other_settings_is_refused_not_continued(
    discs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    images, labels = discs
    short = dataclasses.replace(SETTINGS, stages=((1, 48),))
    train(images, labels, short, checkpoint=tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="other settings or data"):
        train(images, labels, dataclasses.replace(short, seed=1), checkpoint=tmp_path / "checkpoint.pt")


def test_fine_tuning_starts_from_the_given_weights(discs: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = discs
    short = dataclasses.replace(SETTINGS, stages=((1, 48),))
    first = _state(train(images, labels, short))
    gentle = dataclasses.replace(short, learning_rate=1e-9)
    tuned = _state(train(images, labels, gentle, initial=first))
    assert all(torch.allclose(first[key], tuned[key], atol=1e-5) for key in first)
    assert not _same(first, _state(train(images, labels, gentle)))


def test_one_grey_plane_trains_as_well_as_three(discs: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = discs
    grey = np.ascontiguousarray(images[:, :1])
    short = dataclasses.replace(SETTINGS, stages=((1, 48),))
    assert logits(train(grey, labels, short), grey, short).shape == (48,)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((4, 2, 8, 8), np.uint8), np.array([0, 1, 0, 1], np.uint8)),
        (np.zeros((4, 3, 8, 8), np.float32), np.array([0, 1, 0, 1], np.uint8)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 0], np.uint8)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.ones(4, np.uint8)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 2, 1], np.uint8)),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(images: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(TrainingError):
        train(images, labels, SETTINGS)
