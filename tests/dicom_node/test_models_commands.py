"""`remnant models`: a site's own weights come in checked, are found by name, and nothing else gets in."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from dicom_node import cli
from dicom_node.errors import WrongUse
from dicom_node.service import load_record
from dicom_node.settings import load
from dicom_node.worker import setup_of
from models import weights
from models.architectures import build

SHIPPED = "remnant-resnet18-phantom"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(f'[storage]\ndirectory = "{tmp_path / "var"}"\n[model]\nweights = "ward-7"\n')
    return path


@pytest.fixture
def record_path(tmp_path: Path) -> Path:
    """Untrained numbers under the record of the shipped weights, called research: a record that could be a site's."""
    torch.manual_seed(5)
    shipped = weights.find(SHIPPED).record
    record = dataclasses.replace(
        shipped,
        # The range of another network's features would not fit these numbers.
        training_range=dataclasses.replace(shipped.training_range, embedding_distance=None),
        name="ward-7",
        file="ward-7.safetensors",
        architecture="squeezenet1_1",
        release="research",
        trained_on="nothing; random numbers for a test",
    )
    return weights.save(tmp_path / "delivered", record, build("squeezenet1_1"))


def _models(config: Path, *words: str) -> Result:
    return CliRunner().invoke(cli.app, ["models", *words, "--config", str(config)])


def _lines(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_installed_weights_are_listed_shown_verified_and_used_by_their_name(config: Path, record_path: Path) -> None:
    done = _models(config, "install", str(record_path))
    assert done.exit_code == cli.DONE, done.output
    assert 'weights = "ward-7"' in done.stdout
    listed = {one["name"]: one for one in _lines(_models(config, "list", "--json"))}
    assert {name: (one["origin"], one["in_use"]) for name, one in listed.items()} == {
        SHIPPED: ("shipped", False),
        "ward-7": ("installed", True),
    }
    assert [line[0] for line in _models(config, "list").stdout.splitlines()] == [" ", "*"]
    (shown,) = _lines(_models(config, "show", "ward-7", "--json"))
    assert shown["trained_on"] == "nothing; random numbers for a test"
    assert shown["sha256"] == listed["ward-7"]["sha256"]
    assert shown["sha256"] in _models(config, "show", "ward-7").stdout
    assert _models(config, "verify").exit_code == cli.DONE
    settings = load(config)
    assert load_record(settings).name == "ward-7"
    assert weights.verify(setup_of(settings).weights).record.name == "ward-7"


def test_a_changed_file_is_told_by_name_and_the_others_still_hold(config: Path, record_path: Path) -> None:
    _models(config, "install", str(record_path))
    tensors = load(config).installed_weights / "ward-7" / "ward-7.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    done = _models(config, "verify", "--json")
    assert done.exit_code == cli.ANSWER_IS_NO
    assert {one["name"]: one["ok"] for one in _lines(done)} == {SHIPPED: True, "ward-7": False}
    assert _models(config, "verify", SHIPPED).exit_code == cli.DONE
    (tensors.parent / "ward-7.json").write_text("{}")
    broken = next(one for one in _lines(_models(config, "list", "--json")) if one["name"] == "ward-7")
    assert "missing in record" in broken["error"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"release": "local"}, "without an acceptance report"),
        ({"preprocessing_version": "0"}, "version 0 of the preprocessing"),
        ({"sha256": "0" * 64}, "digest differs"),
        ({"name": SHIPPED}, "come with this version"),
    ],
)
def test_what_may_not_be_used_is_not_installed(
    config: Path, record_path: Path, changes: dict[str, str], told: str
) -> None:
    record_path.write_text(json.dumps(json.loads(record_path.read_text()) | changes))
    done = _models(config, "install", str(record_path))
    assert done.exit_code == cli.ANSWER_IS_NO
    assert told in done.stderr
    assert weights.installed(load(config).installed_weights) == ()


def test_a_name_that_nobody_knows_is_wrong_use(config: Path) -> None:
    done = _models(config, "show", "ward-9")
    assert isinstance(done.exception, WrongUse)
    assert "ward-9" in str(done.exception)
