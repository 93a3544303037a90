"""Acceptance: criteria are hard to get wrong, every refusal is a refusal, and only a signed record becomes local."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from models import weights
from models.architectures import build
from pipeline import acceptance as accepting
from pipeline.acceptance import Acceptance, AcceptanceError, accept, judge, read_acceptance, read_criteria
from pipeline.evaluation import Scored

GOOD = """
min_auc = 0.9
min_sensitivity = 0.5
min_specificity = 0.5
max_declined = 0.2
min_scans = 8
[strata.star]
min_sensitivity = 0.5
max_false_alarms = 0.5
"""


def _criteria(folder: Path, text: str = GOOD) -> Path:
    path = folder / "criteria.toml"
    path.write_text(text)
    return path


def _scored(*, wrong: int = 0) -> list[Scored]:
    """Eight scans, half of them residual; of the residual ones `wrong` are called absent."""
    return [
        Scored(
            f"1.{number}",
            f"p{number}",
            number < 4,
            "present" if wrong <= number < 4 else "absent",
            0.9 - number / 100 if wrong <= number < 4 else 0.1 + number / 1000,
            strata=("star",),
        )
        for number in range(8)
    ]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    torch.manual_seed(6)
    made = dataclasses.replace(
        weights.find("remnant-resnet18-phantom").record,
        name="ward-8",
        file="ward-8.safetensors",
        architecture="squeezenet1_1",
        release="research",
        trained_on="nothing; random numbers for a test",
    )
    anywhere = dataclasses.replace(made.training_range, embedding_distance=None)
    made = dataclasses.replace(made, training_range=anywhere)
    return weights.save(tmp_path / "made", made, build("squeezenet1_1"))


def _judged(record: Path, folder: Path, *, wrong: int = 0, synthetic: bool = False) -> Acceptance:
    return judge(
        _scored(wrong=wrong),
        read_criteria(_criteria(folder)),
        weights.find(str(record)).record,
        on="2026-11-23",
        version="0",
        cohort="8 scans of 8 patients",
        synthetic=synthetic,
    )


def _accept(record: Path, acceptance: Acceptance, **changed: object) -> Path:
    told = {
        "signed_by": "R. Example",
        "signed_on": "2026-11-23",
        "camera": "camera 3",
        "name": "ward-8-local",
        "out": record.parent / "accepted",
    }
    return accept(record, acceptance, **(told | changed))  # type: ignore[arg-type]  # words and a path by keyword


def test_weights_that_meet_every_criterion_become_local_and_can_be_installed(record: Path, tmp_path: Path) -> None:
    acceptance = _judged(record, tmp_path)
    assert acceptance.passed
    path = _accept(record, acceptance)
    made = weights.load(str(path)).record
    assert (made.release, made.name, made.sha256) == ("local", "ward-8-local", weights.find(str(record)).record.sha256)
    assert made.acceptance.signed_by == "R. Example"
    assert made.acceptance.camera == "camera 3"
    assert "min_sensitivity 1 (at least 0.5)" in made.acceptance.summary
    assert weights.install(path, tmp_path / "installed").record == made


def test_a_criterion_that_fails_is_named_and_nothing_is_written(record: Path, tmp_path: Path) -> None:
    acceptance = _judged(record, tmp_path, wrong=3)
    assert {one.name for one in acceptance.criteria if not one.passed} == {
        "min_auc",
        "min_sensitivity",
        "strata.star.min_sensitivity",
    }
    with pytest.raises(AcceptanceError, match=r"not all criteria hold: .*min_sensitivity"):
        _accept(record, acceptance)
    assert not (record.parent / "accepted").exists()


def test_figures_of_simulated_scans_release_nothing(record: Path, tmp_path: Path) -> None:
    with pytest.raises(AcceptanceError, match="simulated"):
        _accept(record, _judged(record, tmp_path, synthetic=True))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sha256": "0" * 64}, "other weights"),
        ({"preprocessing_version": "another"}, "other preprocessing"),
        ({"preprocessing": "paper"}, "other preprocessing"),
        ({"criteria": ()}, "does not judge min_sensitivity"),
    ],
)
def test_a_report_of_something_else_is_refused(
    record: Path, tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    with pytest.raises(AcceptanceError, match=told):
        _accept(record, dataclasses.replace(_judged(record, tmp_path), **changed))  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"signed_by": "  "}, "name of who signs"),
        ({"camera": ""}, "of the camera"),
        ({"name": "ward-8"}, "of their own"),
    ],
)
def test_an_acceptance_without_signer_camera_or_own_name_is_refused(
    record: Path, tmp_path: Path, words: dict[str, str], told: str
) -> None:
    with pytest.raises(AcceptanceError, match=told):
        _accept(record, _judged(record, tmp_path), **words)


def test_changed_tensors_are_refused_and_an_accepted_record_is_not_replaced(record: Path, tmp_path: Path) -> None:
    acceptance = _judged(record, tmp_path)
    _accept(record, acceptance)
    with pytest.raises(AcceptanceError, match="exists already"):
        _accept(record, acceptance)
    tensors = record.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(weights.WeightsError, match="digest differs"):
        _accept(record, acceptance, name="another")


def test_a_report_comes_back_as_it_was_written(record: Path, tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    for wrong in (0, 3):
        acceptance = _judged(record, tmp_path, wrong=wrong)
        path.write_text(accepting.to_json(acceptance))
        assert read_acceptance(path) == acceptance
        assert json.loads(path.read_text())["passed"] is (wrong == 0)


def test_a_report_whose_words_were_changed_contradicts_its_numbers_and_is_refused(record: Path, tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    data = json.loads(accepting.to_json(_judged(record, tmp_path, wrong=3)))
    for one in data["criteria"]:
        one["passed"] = True
    path.write_text(json.dumps(data | {"passed": True}))
    with pytest.raises(AcceptanceError, match="contradicts itself"):
        read_acceptance(path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "passed": true, "criteria": [{"name": "min_auc"}]}'],
)
def test_a_report_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(content)
    with pytest.raises(AcceptanceError):
        read_acceptance(path)
    with pytest.raises(AcceptanceError, match="cannot be read"):
        read_acceptance(tmp_path / "none.json")


def test_a_figure_that_the_scans_do_not_define_does_not_pass(record: Path, tmp_path: Path) -> None:
    limits = {"min_sensitivity": 0.0, "min_specificity": 0.0, "strata.thymus.min_scans": 0.0}
    judged = judge(
        [one for one in _scored() if one.residual],
        limits,
        weights.find(str(record)).record,
        on="2026-11-23",
        version="0",
        cohort="",
        synthetic=False,
    )
    assert [(one.found, one.passed) for one in judged.criteria] == [(1.0, True), (None, False), (None, False)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("min_auk = 0.9", "min_auk is no criterion; known: min_auc"),
        (GOOD + "min_auc = 0.9", r"strata\.star\.min_auc is no criterion"),
        ("min_sensitivity = 95\nmin_specificity = 0.9", "min_sensitivity must be a number from 0 to 1"),
        ("min_sensitivity = true\nmin_specificity = 0.9", "must be a number"),
        ("min_auc = 0.9\nmin_sensitivity = 0.9", "must state min_specificity"),
        ("strata = 3", "into a table"),
        ("min_auc = ", "not TOML"),
    ],
)
def test_criteria_that_cannot_be_meant_are_refused_by_their_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(AcceptanceError, match=told):
        read_criteria(_criteria(tmp_path, text))
    with pytest.raises(AcceptanceError, match="cannot be read"):
        read_criteria(tmp_path / "none.toml")
