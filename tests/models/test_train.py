"""Training on arrays: it learns, it repeats itself, it goes on after an interruption."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import metrics
from models import train as train_module
from models.architectures import build, head
from models.train import EpochReport, TrainingError, TrainingSettings, logits, single_view, standardized, train

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


def _roots(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of two views and their share (N, 3, 64, 64): roots of counts, where the field ends 8 pixels below."""
    counts = np.random.default_rng(9).poisson(4.0, (count, 2, 64, 64)).astype(np.float32)
    counts[:, :, 32, 32] = 400
    counts[:, :, 56:] = 0
    seen = np.ones((count, 1, 64, 64), np.float32)
    seen[:, :, 56:] = 0
    return np.concatenate([np.sqrt(counts), seen], axis=1), counts


def test_another_cameras_haze_spreads_counts_and_neither_makes_nor_loses_many() -> None:
    planes, counts = _roots(40)
    settings = TrainingSettings(scale=1.0, haze=0.4)
    changed = train_module._before_another_camera(planes, settings, torch.Generator().manual_seed(5))
    found = changed[:, :2] ** 2
    assert np.array_equal(changed[:, 2], planes[:, 2])
    assert not found[:, :, 56:].any(), "counts beyond the field"
    kept = found.sum(axis=(2, 3)) / counts.sum(axis=(2, 3))
    assert (kept > 0.9).all()
    assert (kept < 1.01).all()
    focus = found[:, :, 32, 32] / 400
    assert focus.min() < 0.7 < 0.9 < focus.max(), "each picture has a share of its own"
    assert (focus > 0.59).all()


def test_brightness_multiplies_the_counts_of_both_views_alike() -> None:
    planes, counts = _roots(40)
    settings = TrainingSettings(scale=1.0, brightness=1.5)
    changed = train_module._before_another_camera(planes, settings, torch.Generator().manual_seed(5))
    factors = (changed[:, :2] ** 2).sum(axis=(2, 3)) / counts.sum(axis=(2, 3))
    assert np.allclose(factors[:, 0], factors[:, 1], rtol=1e-4)
    assert factors.min() < 0.8 < 1.25 < factors.max()
    assert (factors > 0.66).all()
    assert (factors < 1.51).all()


@pytest.mark.parametrize("wrong", [{"haze": 1.0}, {"haze": -0.1}, {"brightness": 0.5}])
def test_haze_and_brightness_that_no_camera_has_are_refused(wrong: dict[str, float]) -> None:
    planes, _ = _roots(4)
    with pytest.raises(TrainingError, match="haze"):
        train(planes, np.array([0, 1, 0, 1], np.uint8), TrainingSettings(scale=1.0, **wrong))


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
        (np.zeros((4, 3, 8, 8), np.float64), np.array([0, 1, 0, 1], np.uint8)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 0], np.uint8)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.ones(4, np.uint8)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 2, 1], np.uint8)),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(images: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(TrainingError):
        train(images, labels, SETTINGS)


def test_settings_that_mean_nothing_are_refused(discs: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = discs
    for wrong in ({"schedule": "linear"}, {"frozen": "half"}):
        with pytest.raises(TrainingError, match="known are"):
            train(images, labels, dataclasses.replace(SETTINGS, **wrong))
    with pytest.raises(TrainingError, match="view_dropout"):
        train(images[:, :1], labels, dataclasses.replace(SETTINGS, view_dropout=0.2))


def test_a_frozen_backbone_keeps_every_number_its_running_means_too(discs: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = discs
    torch.manual_seed(6)
    start = build("resnet18").state_dict()
    settings = dataclasses.replace(SETTINGS, architecture="resnet18", stages=((1, 32),), epoch_images=16)
    only_head = _state(train(images, labels, dataclasses.replace(settings, frozen="backbone"), initial=start))
    moved = {key for key in start if not torch.equal(start[key], only_head[key])}
    assert moved == {"fc.weight", "fc.bias"}
    whole = _state(train(images, labels, settings, initial=start))
    assert {"conv1.weight", "bn1.running_mean", "fc.weight"} <= {
        key for key in start if not torch.equal(start[key], whole[key])
    }


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1", "shufflenet_v2_x1_0"])
def test_features_of_a_frozen_backbone_are_made_once_and_give_the_same_head(
    discs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    images, labels = discs
    settings = dataclasses.replace(
        SETTINGS, architecture=architecture, stages=((3, 64),), frozen="backbone", flip=False, shift=0
    )
    torch.manual_seed(6)
    start = build(architecture).state_dict()
    asked: list[int] = []
    real = train_module.features
    monkeypatch.setattr(train_module, "features", lambda *given: (asked.append(len(given[2])), real(*given))[1])
    once = train(images, labels, settings, initial=start)
    assert sum(asked) == len(images)
    monkeypatch.setattr(train_module, "_KEPT_FEATURES", 0)
    each_time = train(images, labels, settings, initial=start)
    found, expected = (logits(network, images, settings) for network in (once, each_time))
    assert np.abs(expected - logits_of(start, architecture, images, settings)).max() > 1e-3, "nothing was learnt"
    assert found == pytest.approx(expected, abs=1e-4)


def logits_of(
    state: dict[str, torch.Tensor], architecture: str, images: np.ndarray, settings: TrainingSettings
) -> np.ndarray:
    network = build(architecture)
    network.load_state_dict(state)
    return logits(network.eval(), images, settings)


def test_a_constant_schedule_keeps_the_rate_and_a_cosine_ends_near_nothing(
    discs: tuple[np.ndarray, np.ndarray],
) -> None:
    images, labels = discs
    short = dataclasses.replace(SETTINGS, stages=((2, 32),), epoch_images=16)
    rates: dict[str, list[float]] = {"constant": [], "cosine": []}
    for schedule, seen in rates.items():
        settings = dataclasses.replace(short, schedule=schedule)
        train(images, labels, settings, after_epoch=lambda report, _, seen=seen: seen.append(report.learning_rate))
    assert rates["constant"] == [1e-3, 1e-3]
    # At the start of the last of the four steps: three quarters along half a cosine.
    assert rates["cosine"][-1] == pytest.approx(1e-3 * (0.01 + 0.99 * (1 + np.cos(np.pi * 3 / 4)) / 2))


def test_stopping_early_leaves_what_the_whole_schedule_had_by_then(discs: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = discs
    whole = dataclasses.replace(SETTINGS, stages=((2, 32),), epoch_images=16)
    first: list[dict[str, torch.Tensor]] = []
    train(images, labels, whole, after_epoch=lambda _, network: first.append(_state(network)))
    stopped = _state(train(images, labels, dataclasses.replace(whole, stop_after=1)))
    assert _same(stopped, first[0])
    assert not _same(stopped, first[1])


def test_half_precision_passes_train_float32_weights_close_to_those_of_full_precision(
    discs: tuple[np.ndarray, np.ndarray],
) -> None:
    images, labels = discs
    settings = dataclasses.replace(SETTINGS, stages=((1, 32),), epoch_images=8, learning_rate=1e-4)
    full, half = (train(images, labels, dataclasses.replace(settings, bfloat16=how)) for how in (False, True))
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float32}
    assert not _same(_state(full), _state(half))  # the setting does something
    for one, other in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.allclose(one, other, atol=5e-4)


def test_a_dropped_view_is_gone_and_the_share_of_views_says_so() -> None:
    planes = np.random.default_rng(2).uniform(0.5, 3, (4, 3, 8, 8)).astype(np.float16)
    planes[:, 2] = 1
    for view in (0, 1):
        alone = single_view(planes, view)
        assert np.array_equal(alone[:, view], planes[:, view])
        assert not alone[:, 1 - view].any()
        assert (alone[:, 2] == 0.5).all()
    assert (planes[:, 2] == 1).all()


def test_view_dropout_drops_each_view_as_often_as_it_is_told_and_repeats_itself() -> None:
    planes = np.ones((4000, 3, 2, 2), np.float16)
    settings = dataclasses.replace(SETTINGS, view_dropout=0.3)
    one, again = (train_module._dropped(planes, settings, torch.Generator().manual_seed(1)) for _ in range(2))
    assert np.array_equal(one, again)
    lost = [(one[:, view] == 0).all(axis=(1, 2)) for view in (0, 1)]
    assert [float(view.mean()) for view in lost] == pytest.approx([0.15, 0.15], abs=0.03)
    assert not (lost[0] & lost[1]).any()
    assert np.array_equal(one[:, 2, 0, 0] == 0.5, lost[0] | lost[1])
    assert np.array_equal(train_module._dropped(planes, SETTINGS, torch.Generator()), planes)


def test_pictures_are_standardized_by_the_settings_scale() -> None:
    planes = np.random.default_rng(3).uniform(0, 9, (2, 3, 4, 4)).astype(np.float16)
    settings = dataclasses.replace(SETTINGS, scale=1.0, mean=(1.5, 1.5, 0.5), std=(2.0, 2.0, 0.5))
    expected = (planes.astype(np.float32) - np.array([1.5, 1.5, 0.5])[:, None, None]) / np.array([2, 2, 0.5])[
        :, None, None
    ]
    assert np.allclose(standardized(planes, settings).numpy(), expected, atol=1e-6)
    assert standardized(planes, settings).dtype == torch.float32


def test_the_head_is_the_last_layer_and_nothing_before_it() -> None:
    for architecture, names in (
        ("resnet18", {"fc"}),
        ("shufflenet_v2_x1_0", {"fc"}),
        ("squeezenet1_1", {"classifier"}),
    ):
        network = build(architecture)
        inside = {id(parameter) for parameter in head(architecture, network).parameters()}
        assert {
            name.split(".")[0] for name, parameter in network.named_parameters() if id(parameter) in inside
        } == names
