"""The paper's experiment on tiny arrays: same groupings for all, resumed and never mixed, and its tables."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from models import metrics
from models.initial import InitialWeights, initial_weights
from pipeline import protocol as protocol_module
from pipeline.protocol import (
    MEASURES,
    Protocol,
    ProtocolData,
    ProtocolError,
    ProtocolSettings,
    areas,
    measures,
    performance,
    pooled,
    ranks,
    read_protocol,
    run_protocol,
)

NETWORKS = ("squeezenet1_1", "shufflenet_v2_x1_0")
SETTINGS = ProtocolSettings(architectures=NETWORKS, groupings=2, epochs=2, batch_size=8, seed=7)
STARTS = {name: initial_weights(name, "none") for name in NETWORKS}


@pytest.fixture(scope="module")
def data() -> ProtocolData:
    """24 scans of 12 patients, two inputs of 64 pixels each; a residual scan has a bright disc."""
    rng = np.random.default_rng(3)
    planes = rng.integers(0, 90, (24, 2, 3, 64, 64), dtype=np.uint8)
    labels = (np.arange(24) // 2 % 2).astype(np.uint8)
    rows, columns = np.mgrid[:64, :64]
    for scan in np.flatnonzero(labels):
        y, x = rng.integers(20, 44, 2)
        planes[scan][:, :, (rows - y) ** 2 + (columns - x) ** 2 < 90] = 240
    return ProtocolData(planes, labels, tuple(f"p{scan // 2}" for scan in range(24)), "discs in noise", True)


@pytest.fixture(scope="module")
def folder(data: ProtocolData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("protocol")
    run_protocol(data, SETTINGS, STARTS, out)
    return out


def test_every_network_is_tested_on_the_same_patients_who_were_not_trained_on(folder: Path, data: ProtocolData) -> None:
    found = read_protocol(folder)
    assert [(run.architecture, run.grouping) for run in found.runs] == [(name, n) for name in NETWORKS for n in (0, 1)]
    assert found.missing == ()
    assert (found.scans, found.residual, found.patients, found.synthetic) == (24, 12, 12, True)
    for one, other in zip(found.of(NETWORKS[0]), found.of(NETWORKS[1]), strict=True):
        assert (one.training, one.testing) == (other.training, other.testing)
        assert not {data.patients[i] for i in one.training} & {data.patients[i] for i in one.testing}
        assert one.labels == tuple(data.labels[list(one.testing)])
        assert len(one.logits) == len(one.testing)
        assert {len(row) for row in one.logits} == {2}
    assert found.runs[0].testing != found.runs[1].testing


def test_curves_hold_loss_and_accuracy_of_both_sides_after_each_epoch(folder: Path) -> None:
    for run in read_protocol(folder).runs:
        assert [point.epoch for point in run.curve] == [1, 2]
        for point in run.curve:
            assert point.training_loss > 0
            assert point.test_loss > 0
            assert 0 <= point.training_accuracy <= 1
            assert 0 <= point.test_accuracy <= 1


def test_an_interrupted_experiment_goes_on_and_repeats_nothing(
    folder: Path, data: ProtocolData, tmp_path: Path
) -> None:
    whole = {path.name: path.read_bytes() for path in (folder / "runs").iterdir()}
    (tmp_path / "runs").mkdir()
    for name in list(whole)[1:]:
        (tmp_path / "runs" / name).write_bytes(whole[name])
    told: list[tuple[str, int, int]] = []
    run_protocol(data, SETTINGS, STARTS, tmp_path, progress=lambda *what: told.append(what))
    assert told[-1][1:] == (8, 8)
    lost = next(iter(whole))
    assert sum(name.startswith(lost[:-8]) for name, *_ in told)
    for name, before in whole.items():
        was, now = json.loads(before), json.loads((tmp_path / "runs" / name).read_text())
        assert {key: was[key] for key in was if key != "seconds"} == {key: now[key] for key in now if key != "seconds"}


def test_more_groupings_may_be_asked_for_later(folder: Path, data: ProtocolData, tmp_path: Path) -> None:
    one = dataclasses.replace(SETTINGS, groupings=1, architectures=NETWORKS[:1])
    run_protocol(data, one, STARTS, tmp_path)
    kept = (tmp_path / "runs" / "squeezenet1_1-01.json").read_bytes()
    both = run_protocol(data, dataclasses.replace(one, groupings=2), STARTS, tmp_path)
    assert len(both.runs) == 2
    assert (tmp_path / "runs" / "squeezenet1_1-01.json").read_bytes() == kept
    assert both.runs[0].logits == read_protocol(folder).runs[0].logits


def test_runs_of_other_settings_scans_or_starts_are_never_mixed(folder: Path, data: ProtocolData) -> None:
    turned = dataclasses.replace(data, planes=data.planes[:, :, :, ::-1])
    other = {
        name: InitialWeights("another", "", True, protocol_module.train.__globals__["build"](name).state_dict())
        for name in NETWORKS
    }
    cases = (
        (data, dataclasses.replace(SETTINGS, learning_rate=1e-4), STARTS),
        (turned, SETTINGS, STARTS),
        (data, dataclasses.replace(SETTINGS, learning_rate=1e-3), other),
    )
    before = {path: path.read_bytes() for path in (folder / "runs").iterdir()}
    for scans, settings, starts in cases:
        with pytest.raises(ProtocolError, match="another folder"):
            run_protocol(scans, settings, starts, folder)
    assert {path: path.read_bytes() for path in (folder / "runs").iterdir()} == before


def test_a_start_from_random_numbers_gets_another_learning_rate_than_the_papers(folder: Path) -> None:
    settings = ProtocolSettings()
    trained = InitialWeights("earlier", "", True, None)
    assert settings.rate_for(trained) == 1e-5
    assert settings.rate_for(STARTS[NETWORKS[0]]) == 1e-3
    assert dataclasses.replace(settings, learning_rate=3e-4).rate_for(trained) == 3e-4
    assert {run.learning_rate for run in read_protocol(folder).runs} == {1e-3}


def test_figures_are_those_of_the_metrics_on_the_fused_logits(folder: Path) -> None:
    found = read_protocol(folder)
    run = found.runs[0]
    fused = np.array(run.logits).mean(axis=1)
    table = metrics.confusion(run.labels, fused, 0.0)
    assert measures(run)["sensitivity"] == table.sensitivity
    assert measures(run)["auc"] == metrics.roc_auc(run.labels, fused)
    spread = performance(found, run.architecture)["accuracy"]
    values = [measures(one)["accuracy"] for one in found.of(run.architecture)]
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.deviation == pytest.approx(np.std(values, ddof=1))


def _made(scores: dict[str, list[list[float]]], labels: list[int], testing: list[tuple[int, ...]]) -> Protocol:
    """Runs with given scores: network -> groupings -> scans."""
    run = protocol_module.Run("", 0, "", "", False, 1e-3, (0,), (0,), 1, (0,), ((0.0,),), (), 1.0, "CPU")
    runs = tuple(
        dataclasses.replace(
            run,
            architecture=name,
            grouping=number,
            testing=testing[number],
            labels=tuple(labels[place] for place in testing[number]),
            logits=tuple((score,) for score in each),
        )
        for name, groupings in scores.items()
        for number, each in enumerate(groupings)
    )
    head = {"architectures": list(scores), "groupings": len(testing)}
    return Protocol(head, "made", True, len(labels), sum(labels), len(labels), runs)


def test_the_tests_between_networks_see_each_scan_once() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    testing = [(0, 1, 3, 4), (1, 2, 4, 5)]
    good = [[-1.0, -0.5, 0.4, 2.0], [-1.5, 0.2, 1.0, 3.0]]
    poor = [[-1.0, 0.9, 0.4, 0.8], [1.5, -0.2, -1.0, 3.0]]
    found = _made({"good": good, "poor": poor}, labels, testing)
    truth, scores = pooled(found.of("good"))
    assert truth.tolist() == labels
    assert scores.tolist() == pytest.approx([-1.0, -1.0, 0.2, 0.4, 1.5, 3.0])
    compared = areas(found, "good", "poor")
    assert compared.together == metrics.compare_areas(labels, scores, pooled(found.of("poor"))[1])
    assert compared.each[1] == metrics.compare_areas([0, 0, 1, 1], good[1], poor[1])
    found_ranks = ranks(found, "good", "poor")
    assert set(found_ranks) == set(MEASURES)
    assert found_ranks["auc"] == metrics.mann_whitney([1.0, 1.0], [0.5, 0.5])


def test_a_figure_that_is_not_defined_in_a_grouping_is_left_out_and_not_made_up() -> None:
    found = _made({"none": [[-1.0, -1.0, -2.0, -1.5]] * 2}, [0, 0, 1, 1], [(0, 1, 2, 3)] * 2)
    spread = performance(found, "none")
    assert math.isnan(spread["precision"].mean)
    assert spread["sensitivity"].mean == 0
    assert ranks(found, "none", "none")["precision"] is None


def test_what_cannot_be_run_or_read_is_told(folder: Path, data: ProtocolData, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="starts from"):
        run_protocol(data, SETTINGS, {}, tmp_path)
    with pytest.raises(ProtocolError, match="needed are"):
        run_protocol(dataclasses.replace(data, planes=data.planes[:, 0]), SETTINGS, STARTS, tmp_path)
    with pytest.raises(ProtocolError, match="no run to be read"):
        read_protocol(tmp_path / "nowhere")
    (tmp_path / "runs").mkdir()
    for name in ("protocol.json", "runs/squeezenet1_1-01.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "runs" / "squeezenet1_1-01.json").write_text('{"schema": 1')
    with pytest.raises(ProtocolError, match="not whole"):
        read_protocol(tmp_path)
