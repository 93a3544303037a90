"""`remnant train`, `evaluate` and `models accept` on a small simulated cohort, from folder and CSV to the report."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from numpy.typing import NDArray
from pydicom import dcmread
from typer.testing import CliRunner

from dicom_node import cli
from dicom_node.errors import RemnantError, WrongUse
from models import weights
from models.architectures import build
from pipeline.acceptance import Acceptance, Criterion, to_json
from pipeline.analyse import analyse, judge
from pipeline.camera import examination, expose
from pipeline.finding import Finding
from pipeline.hospital_cohort import read_cohort
from pipeline.phantom import phantom
from pipeline.preprocess import PREPROCESSING_VERSION, prepare_scan

RESIDUAL, CLEAN = 12, 12
SHIPPED = "remnant-resnet18-phantom"


def _run(*words: object) -> Result:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(cli.app, [str(word) for word in words])
    finally:
        torch.set_num_threads(before)


def _lines(done: Result, kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, done.stdout.splitlines()) if line["kind"] == kind]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of views of 24 invented patients, half of them residual, a file that is no DICOM, and labels.csv beside."""
    home = tmp_path_factory.mktemp("cohort")
    (home / "scans").mkdir()
    wanted, rows, seed = {True: RESIDUAL, False: CLEAN}, [], 984_000
    while any(wanted.values()):
        seed += 1
        scan = phantom(seed)
        if not wanted[scan.truth.residual]:
            continue
        wanted[scan.truth.residual] -= 1
        (ds,) = expose(scan, examination(seed), "two_frames")
        ds.save_as(home / "scans" / f"{seed}.dcm", enforce_file_format=True)
        label = "residual" if scan.truth.residual else "clean"
        rows.append((ds.StudyInstanceUID, label, scan.truth.stratum, scan.truth.uptake_percent))
    (home / "scans" / "notes.txt").write_text("no image")
    with (home / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("StudyInstanceUID", "label", "stratum", "uptake_percent"), *rows])
    return home


def _train(cohort: Path, out: Path, *words: object) -> Result:
    named = ("train", "--cohort", cohort / "scans", "--labels", cohort / "labels.csv", "--out", out)
    return _run(*named, "--epochs", 1, "--network", "squeezenet1_1", *words)


@pytest.fixture(scope="module")
def made(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "here"
    done = _train(cohort, out, "--groupings", 1, "--name", "ward-9", "--sensitivity", "0.9", "--json")
    assert done.exit_code == cli.DONE, done.output
    (out / "said").write_text(done.stdout)
    (out / "told").write_text(done.stderr)
    return out


def test_a_training_makes_a_whole_research_record_that_says_it_is_synthetic(made: Path) -> None:
    record = weights.verify(str(made / "ward-9.json")).record
    assert record.release == "research"
    assert (record.architecture, record.preprocessing_version) == ("squeezenet1_1", PREPROCESSING_VERSION)
    for text in (record.trained_on, record.data):
        assert "simulated" in text
    assert "at least 90% of the residual scans" in record.operating_point
    assert record.temperature > 0
    assert record.acceptance is None
    counts = [record.metrics[name] for name in ("training_scans", "choosing_scans", "test_scans")]
    assert sum(counts) == RESIDUAL + CLEAN
    assert "test_auc" in record.metrics
    assert not (made / "training.pt").exists()


def test_weights_of_a_hospital_know_how_far_a_scan_may_lie_from_those_they_were_made_of(made: Path) -> None:
    model = weights.load(str(made / "ward-9.json"))
    limit = model.record.training_range.embedding_distance
    assert limit is not None
    assert 1 < limit < 100

    scan = phantom(985_000)

    def distance(change: Callable[[NDArray[np.uint16]], NDArray[np.uint16]]) -> float:
        views = {
            name: (change(counts).astype(np.float32), scan.spacing_mm)
            for name, counts in (("anterior", scan.anterior), ("posterior", scan.posterior))
        }
        (seen,) = prepare_scan(views).inputs
        found = judge(model, seen).distance
        assert found is not None
        return found

    def barred(counts: NDArray[np.uint16]) -> NDArray[np.uint16]:
        bars = counts.copy()
        bars[100:160:12] += 900
        return bars

    assert distance(lambda counts: counts) < limit < distance(barred)
    assert isinstance(analyse(expose(scan, examination(985_000), "two_frames"), model), Finding)


def test_what_the_training_started_from_and_its_learning_rate_are_told(made: Path) -> None:
    assert "squeezenet1_1 starts from random numbers" in (made / "told").read_text()
    assert "learning rate 0.001; not pre-trained, so not the paper's 1e-05" in (made / "told").read_text()


def test_a_file_that_is_left_out_is_printed_listed_and_reported(made: Path) -> None:
    said = [json.loads(line) for line in (made / "said").read_text().splitlines()]
    assert [(line["what"], line["reason"]) for line in said if line["kind"] == "excluded"] == [
        ("notes.txt", "unreadable")
    ]
    with (made / "excluded.csv").open() as file:
        assert [row["what"] for row in csv.DictReader(file)] == ["notes.txt"]
    assert "notes.txt" in (made / "report.html").read_text()


def test_the_report_holds_the_papers_tables_and_figures_and_calls_the_scans_synthetic(made: Path) -> None:
    page = (made / "report.html").read_text()
    for words in ("Table 3", "Table 4", "Figure 9", "Figure 10", "SYNTHETIC", "Not for diagnosis without review"):
        assert words in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert (made / "report.pdf").read_bytes().startswith(b"%PDF-")


def test_scores_name_no_patient_and_cover_the_test_scans(made: Path, cohort: Path) -> None:
    with (made / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    record = weights.find(str(made / "ward-9.json")).record
    assert len(rows) == record.metrics["test_scans"]
    named = {str(dcmread(path).PatientID) for path in (cohort / "scans").glob("*.dcm")}
    for path in made.rglob("*"):
        if path.suffix in (".csv", ".json", ".html"):
            assert not any(name in path.read_text() for name in named), path.name


def test_trained_weights_are_measured_only_on_patients_that_did_not_make_them(
    made: Path, cohort: Path, tmp_path: Path
) -> None:
    done = _run(
        "evaluate", "--cohort", cohort / "scans", "--labels", cohort / "labels.csv", "--out", tmp_path,
        "--weights", made / "ward-9.json", "--protocol", made / "protocol", "--json",
    )  # fmt: skip
    assert done.exit_code == cli.DONE, done.output
    used = [line for line in _lines(done, "excluded") if line["reason"] == "trained_on"]
    record = weights.find(str(made / "ward-9.json")).record
    assert len(used) == record.metrics["training_scans"] + record.metrics["choosing_scans"]
    (figures,) = _lines(done, "figures")
    assert figures["scans"] == record.metrics["test_scans"]
    assert round(figures["auc"], 4) == record.metrics["test_auc"]
    before = {row.split(",")[0]: row for row in (made / "scores.csv").read_text().splitlines()}
    after = {row.split(",")[0]: row for row in (tmp_path / "scores.csv").read_text().splitlines()}
    assert after == before
    assert "Table 4" in (tmp_path / "report.html").read_text()


def _small(cohort: Path, folder: Path, count: int = 6) -> tuple[Path, Path]:
    """The first scans of the cohort with their labels: enough for what does not train."""
    lines = (cohort / "labels.csv").read_text().splitlines()
    (folder / "few").mkdir()
    (folder / "labels.csv").write_text("\n".join(lines[: count + 1]) + "\n")
    for path in sorted((cohort / "scans").glob("*.dcm"))[:count]:
        (folder / "few" / path.name).write_bytes(path.read_bytes())
    return folder / "few", folder / "labels.csv"


def _evaluate(scans: Path, labels: Path, out: Path, *words: object) -> Result:
    return _run("evaluate", "--cohort", scans, "--labels", labels, "--out", out, *words)


def test_criteria_that_fail_give_exit_code_1_and_their_verdicts(cohort: Path, tmp_path: Path) -> None:
    scans, labels = _small(cohort, tmp_path)
    criteria = tmp_path / "criteria.toml"
    criteria.write_text("min_sensitivity = 0.0\nmin_specificity = 0.0\nmin_scans = 1000\n")
    done = _evaluate(scans, labels, tmp_path / "out", "--accept", criteria)
    assert done.exit_code == cli.ANSWER_IS_NO, done.output
    assert "FAIL  min_scans: 6.0000, at least 1000" in done.stdout
    assert "pass  min_sensitivity" in done.stdout
    report = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert (report["passed"], report["synthetic"]) == (False, True)
    assert report["sha256"] == weights.find(SHIPPED).record.sha256
    assert "cannot be accepted on this report" in (tmp_path / "out" / "report.html").read_text()


def test_an_evaluation_of_simulated_scans_cannot_be_signed(cohort: Path, tmp_path: Path) -> None:
    scans, labels = _small(cohort, tmp_path)
    criteria = tmp_path / "criteria.toml"
    criteria.write_text("min_sensitivity = 0.0\nmin_specificity = 0.0\n")
    assert _evaluate(scans, labels, tmp_path / "out", "--accept", criteria).exit_code == cli.DONE
    done = _run(
        "models", "accept", weights.find(SHIPPED).record_path, "--report", tmp_path / "out" / "acceptance.json",
        "--signed-by", "R. Example", "--camera", "camera 3", "--name", "ours", "--out", tmp_path / "accepted",
    )  # fmt: skip
    assert done.exit_code == cli.ANSWER_IS_NO
    assert "simulated scans" in done.output
    assert not (tmp_path / "accepted").exists()


def test_signed_weights_are_installed_as_local(cohort: Path, tmp_path: Path) -> None:
    """The scans lose the mark of the simulator here, as a hospital's own have none."""
    scans, labels = _small(cohort, tmp_path)
    for path in scans.iterdir():
        ds = dcmread(path)
        ds.IssuerOfPatientID = "HOSPITAL"
        ds.save_as(path)
    torch.manual_seed(2)
    shipped = weights.find(SHIPPED).record
    record = dataclasses.replace(
        shipped,
        training_range=dataclasses.replace(shipped.training_range, embedding_distance=None),
        name="own",
        file="own.safetensors",
        release="research",
        trained_on="nothing",
    )
    path = weights.save(tmp_path / "own", record, build("resnet18"))
    criteria = tmp_path / "criteria.toml"
    criteria.write_text("min_sensitivity = 0.0\nmin_specificity = 0.0\n")
    done = _evaluate(scans, labels, tmp_path / "out", "--accept", criteria, "--weights", path)
    assert done.exit_code == cli.DONE, done.output
    assert "SYNTHETIC" not in (tmp_path / "out" / "report.html").read_text()
    done = _run(
        "models", "accept", path, "--report", tmp_path / "out" / "acceptance.json",
        "--signed-by", "R. Example", "--camera", "camera 3", "--name", "own-local", "--out", tmp_path / "accepted",
    )  # fmt: skip
    assert done.exit_code == cli.DONE, done.output
    config = tmp_path / "node.toml"
    config.write_text(f'[storage]\ndirectory = "{tmp_path / "var"}"\n')
    done = _run("models", "install", tmp_path / "accepted" / "own-local.json", "--config", config)
    assert done.exit_code == cli.DONE, done.output
    assert "(local)" in done.stdout


def test_weights_that_are_not_there_cannot_be_accepted(tmp_path: Path) -> None:
    told = ("own", "0" * 64, "native", "1", "2026-11-23", "0", "8 scans")
    passed = tuple(Criterion(name, True, 0.5, 1.0) for name in ("min_sensitivity", "min_specificity"))
    (tmp_path / "acceptance.json").write_text(to_json(Acceptance(*told, synthetic=False, criteria=passed)))
    done = _run(
        "models", "accept", tmp_path / "own.json", "--report", tmp_path / "acceptance.json",
        "--signed-by", "R. Example", "--camera", "camera 3", "--name", "ours", "--out", tmp_path / "accepted",
    )  # fmt: skip
    assert done.exit_code == cli.ANSWER_IS_NO
    assert "cannot be read" in done.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--weights", "nowhere.pth"), "cannot be read"),
        (("--weights", "imagenet"), "not fetched"),
        (("--weights", "none", "--weights", "imagenet"), "one start for all"),
        (("--network", "vgg"), "no architecture named 'vgg'"),
    ],
)
def test_a_start_that_cannot_be_is_told_before_anything_is_read(
    cohort: Path, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    done = _train(cohort, tmp_path / "out", *words)
    assert isinstance(done.exception, WrongUse)
    assert told in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_cohort_or_a_folder_that_cannot_be_used_is_told(cohort: Path, tmp_path: Path) -> None:
    scans, labels = _small(cohort, tmp_path, 2)
    done = _evaluate(scans, labels, scans / "out")
    assert isinstance(done.exception, WrongUse)
    assert "outside the cohort's folder" in str(done.exception)
    done = _evaluate(scans, tmp_path / "none.csv", tmp_path / "out")
    assert isinstance(done.exception, WrongUse)
    (tmp_path / "file").write_text("")
    done = _evaluate(scans, labels, tmp_path / "file" / "out")
    assert isinstance(done.exception, RemnantError)
    assert not isinstance(done.exception, WrongUse)
    labels.write_text("StudyInstanceUID,label\n1.2.3,clean\n")
    done = _evaluate(scans, labels, tmp_path / "out")
    assert "no scan of this cohort" in str(done.exception)
    assert read_cohort(scans, labels).scans == ()
