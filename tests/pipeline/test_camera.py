"""What the simulated camera writes is DICOM that a strict judge accepts, and truth that can be trusted."""

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from pipeline.camera import (
    FOREIGN,
    SHAPES,
    CohortExistsError,
    Examination,
    Foreign,
    Shape,
    examination,
    expose,
    foreign,
    simulate,
)
from pipeline.phantom import Phantom, phantom

_PEOPLE = range(7)  # examination() cycles through seven people, a character set each


@pytest.fixture(scope="module")
def scan() -> Phantom:
    return phantom(3)


@pytest.fixture
def dciodvfy(peer: Callable[[str], Path]) -> Path:
    beside = Path(sys.executable).with_name("dciodvfy")  # where pip puts it, on the PATH or not
    return peer(str(beside) if beside.exists() else "dciodvfy")


def _judge(dciodvfy: Path, ds: Dataset, folder: Path) -> str:
    file = folder / f"{ds.SOPInstanceUID}.dcm"
    ds.save_as(file, enforce_file_format=True)
    judged = subprocess.run([dciodvfy, "-new", file], capture_output=True, text=True, check=False, timeout=60)
    return judged.stdout + judged.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_valid_nm_image(dciodvfy: Path, scan: Phantom, tmp_path: Path, shape: Shape) -> None:
    for ds in expose(scan, examination(1), shape):
        verdict = _judge(dciodvfy, ds, tmp_path)
        assert "NMImage" in verdict
        assert "Error" not in verdict
        assert "Warning" not in verdict


@pytest.mark.parametrize("seed", _PEOPLE)
def test_names_in_every_character_set_are_valid_and_come_back(
    dciodvfy: Path, scan: Phantom, tmp_path: Path, seed: int
) -> None:
    person = examination(seed)
    (ds,) = expose(scan, person, "anterior_only")
    verdict = _judge(dciodvfy, ds, tmp_path)
    assert verdict.strip() == "NMImage"
    read = pydicom.dcmread(tmp_path / f"{ds.SOPInstanceUID}.dcm")
    assert str(read.PatientName) == person.patient_name


def test_the_invented_people_cover_the_character_sets_of_the_promise() -> None:
    sets = {person.specific_character_set for person in map(examination, _PEOPLE)}
    assert {("ISO_IR 192",), ("GB18030",), ("", "ISO 2022 IR 87"), ("", "ISO 2022 IR 149")} <= sets


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_valid_dicom_too(dciodvfy: Path, tmp_path: Path, kind: Foreign) -> None:
    ds = foreign(kind, examination(2))
    verdict = _judge(dciodvfy, ds, tmp_path)
    assert "Error" not in verdict
    assert "Warning" not in verdict
    read = pydicom.dcmread(tmp_path / f"{ds.SOPInstanceUID}.dcm")
    assert read.pixel_array.max() > read.pixel_array.min()
    assert read.StudyInstanceUID == examination(2).study_instance_uid


def test_equal_arguments_give_equal_objects_and_another_time_gives_other_uids(scan: Phantom) -> None:
    person = examination(4)
    one, again = expose(scan, person, "two_series"), expose(scan, person, "two_series")
    assert [ds.to_json() for ds in one] == [ds.to_json() for ds in again]
    assert len({ds.SeriesInstanceUID for ds in one}) == 2
    later = expose(scan, replace(person, acquired_at=person.acquired_at.replace(hour=20)), "two_series")
    uids = [ds.SOPInstanceUID for ds in (*one, *later)]
    assert len(set(uids)) == 4
    assert {ds.StudyInstanceUID for ds in (*one, *later)} == {person.study_instance_uid}


def test_six_frames_stand_in_the_order_of_their_vectors(scan: Phantom) -> None:
    (ds,) = expose(scan, examination(1), "six_frames")
    assert list(ds.EnergyWindowVector) == [1, 1, 2, 2, 3, 3]
    assert list(ds.DetectorVector) == [1, 2, 1, 2, 1, 2]
    frames = ds.pixel_array
    assert np.array_equal(frames[0], scan.anterior)
    assert np.array_equal(frames[1], scan.posterior)
    assert ds.CountsAccumulated == frames.sum(dtype=np.int64)


def test_a_single_head_takes_the_posterior_view_later(scan: Phantom) -> None:
    person = examination(1)
    front, back = expose(scan, person, "two_objects", posterior_delay_s=600)
    assert front.AcquisitionTime == f"{person.acquired_at:%H%M%S.%f}"
    assert float(back.AcquisitionTime) != float(front.AcquisitionTime)
    assert front.SeriesInstanceUID == back.SeriesInstanceUID


def test_a_cohort_is_written_with_its_truth_and_no_name_in_a_path(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = tmp_path / "cohort"
    rows = simulate(out, 6, 9, progress=lambda done, count: told.append((done, count)))
    assert told == [(done, 6) for done in range(1, 7)]
    with (out / "truth.csv").open(encoding="utf-8", newline="") as handle:
        written = list(csv.DictReader(handle))
    assert [row["file"] for row in written] == [row.file for row in rows]
    assert {row.file for row in rows} | {"truth.csv"} == {path.name for path in out.iterdir()}
    assert {row.shape for row in rows} == set(SHAPES)
    for row in rows:
        ds = pydicom.dcmread(out / row.file)
        assert (row.sop_instance_uid, row.study_instance_uid, row.patient_id) == (
            ds.SOPInstanceUID,
            ds.StudyInstanceUID,
            ds.PatientID,
        )
        assert row.patient_id not in row.file
        assert row.uptake_percent > 0 if row.residual else row.uptake_percent == 0


@pytest.mark.parametrize("shapes", [("two_frames",), ("two_frames", "two_objects"), ("two_frames", "six_frames")])
def test_the_shape_does_not_tell_the_class(tmp_path: Path, shapes: tuple[Shape, ...]) -> None:
    rows = simulate(tmp_path, 2 * len(shapes), 1, shapes)
    for shape in shapes:
        assert {row.residual for row in rows if row.shape == shape} == {0, 1}


def test_a_second_cohort_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    simulate(tmp_path, 1, 1, ("two_frames",))
    before = (tmp_path / "truth.csv").read_bytes()
    with pytest.raises(CohortExistsError, match="choose an empty folder"):
        simulate(tmp_path, 1, 2, ("two_frames",))
    assert (tmp_path / "truth.csv").read_bytes() == before
    with pytest.raises(ValueError, match="count of 1 or more"):
        simulate(tmp_path / "none", 0, 1)


def test_an_examination_can_be_anybodys(scan: Phantom) -> None:
    person: Examination = replace(
        examination(0), patient_name="Tester^Anna", specific_character_set=("",), timezone_offset_from_utc="+0100"
    )
    (ds,) = expose(scan, person, "two_frames")
    assert "SpecificCharacterSet" not in ds
    assert ds.TimezoneOffsetFromUTC == "+0100"
