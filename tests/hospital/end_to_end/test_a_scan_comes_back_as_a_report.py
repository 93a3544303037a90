"""The main job with real programs: DCMTK's storescu is the camera, Orthanc is the PACS."""

import json
import subprocess
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import Comprehensive3DSRStorage, SecondaryCaptureImageStorage, SegmentationStorage

from pipeline.camera import SHAPES, examination, expose
from pipeline.phantom import phantom

RESULT_CLASSES = {Comprehensive3DSRStorage, SecondaryCaptureImageStorage}


def _clear(seed: int) -> Any:
    return phantom(seed, residual=True, stratum="uptake_1_up")


def _in_pacs(orthanc: Any, ds: Dataset) -> list[Dataset]:
    return [dcmread(BytesIO(orthanc.file(one))) for one in orthanc.find(str(ds.StudyInstanceUID))]


@pytest.mark.alone
def test_sr_and_sc_reach_the_pacs_in_the_cameras_study_within_a_second_of_the_last_success(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None]
) -> None:
    node = make_node(orthanc).start()
    took = []
    for seed in range(8):
        views = expose(_clear(seed), examination(1000 + seed), "two_objects")
        camera(node.port, views[:1])
        camera(node.port, views[1:])
        success = time.monotonic()
        while len(orthanc.find(str(views[0].StudyInstanceUID))) < 2:
            assert time.monotonic() - success < 60, node.log[-4000:]
        took.append(time.monotonic() - success)
        sent = _in_pacs(orthanc, views[0])
        assert {ds.SOPClassUID for ds in sent} == RESULT_CLASSES
        for ds in sent:
            for keyword in ("StudyInstanceUID", "PatientID", "AccessionNumber", "PatientBirthDate", "PatientSex"):
                assert ds.get(keyword) == views[0].get(keyword), keyword
            assert str(ds.PatientName) == str(views[0].PatientName)
    # The machine is shared and noisy: what it can do is the fastest of several, not the unluckiest.
    assert min(took) < 1.0, took
    rows = node.wait_for_rows(8)
    assert [row["state"] for row in rows] == ["delivered"] * 8
    assert all(row["finding"] in ("present", "absent", "undetermined") for row in rows)
    assert node.database.stat().st_mode & 0o077 == 0
    for line in node.log.splitlines():
        for row in rows:
            assert row["patient_id"] not in line
            assert row["accession_number"] not in line


@pytest.mark.parametrize("characters", ["GB18030", "ISO_IR 192", "ISO_IR 100"])
def test_a_name_comes_back_as_it_was_sent(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None], characters: str
) -> None:
    seed = next(n for n in range(40, 80) if examination(n).specific_character_set == (characters,))
    objects = expose(_clear(seed), examination(seed), "two_frames")
    node = make_node(orthanc).start()
    camera(node.port, objects)
    node.wait_for_rows(1, ("delivered",))
    sent = [ds for ds in _in_pacs(orthanc, objects[0]) if ds.SOPClassUID in RESULT_CLASSES]
    assert len(sent) == 2
    for ds in sent:
        assert str(ds.PatientName) == str(objects[0].PatientName)
        assert ds.SpecificCharacterSet == characters


def test_every_shape_is_one_row_with_two_results_and_analyse_agrees_with_the_node(
    make_node: Callable[..., Any],
    orthanc: Any,
    camera: Callable[..., None],
    peer: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    node = make_node(orthanc, views_timeout_s=2).start()
    sent: dict[str, tuple[Dataset, ...]] = {}
    for index, shape in enumerate(SHAPES):
        sent[shape] = expose(_clear(300 + index), examination(300 + index), shape)
        camera(node.port, sent[shape])
    rows = node.wait_for_rows(len(SHAPES))
    for row, shape in zip(rows, SHAPES, strict=True):
        if shape == "anterior_only":
            assert (row["state"], row["reason"], row["finding"]) == ("declined", "view_missing", None)
        else:
            assert (row["state"], row["reason"], row["views"]) == ("delivered", None, "anterior,posterior")
        assert len(_in_pacs(orthanc, sent[shape][0])) == 2
    done = subprocess.run(
        [
            str(Path(node_python()).parent / "remnant"),
            "analyse",
            str(tmp_path / "camera"),
            "--json",
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr  # one of the five lacks a view
    import json

    told = {line["study_instance_uid"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert len(told) == len(SHAPES)
    for row in rows:
        line = told[row["study_instance_uid"]]
        assert (line["finding"], line["probability"], line["reason"]) == (
            row["finding"],
            row["probability"],
            row["reason"],
        )
    dciodvfy = peer(str(Path(node_python()).parent / "dciodvfy"))
    files = sorted((tmp_path / "out").glob("*.dcm"))
    assert len(files) == 2 * len(SHAPES)
    for path in files:
        judged = subprocess.run([str(dciodvfy), "-new", str(path)], capture_output=True, text=True, check=False)
        assert "Error" not in judged.stderr, judged.stderr


def node_python() -> str:
    import sys

    return sys.executable


def test_two_acquisitions_of_one_study_sent_interleaved_are_two_rows_never_mixed(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None]
) -> None:
    from dataclasses import replace
    from datetime import timedelta

    node = make_node(orthanc).start()
    day = examination(77)
    water = replace(day, acquired_at=day.acquired_at + timedelta(minutes=20))
    first = expose(_clear(1), day, "two_objects")
    second = expose(phantom(2, residual=False, stratum="plain"), water, "two_objects")
    for ds in (second[1], first[0], second[0], first[1]):
        camera(node.port, (ds,))
    rows = node.wait_for_rows(2, ("delivered",))
    assert {row["study_instance_uid"] for row in rows} == {str(first[0].StudyInstanceUID)}
    by_row: dict[int, set[str]] = {}
    for scan_id, uid in node.query("select scan_id, sop_instance_uid from instance"):
        by_row.setdefault(scan_id, set()).add(uid)
    wanted = [{str(ds.SOPInstanceUID) for ds in acquisition} for acquisition in (first, second)]
    assert sorted(by_row.values(), key=sorted) == sorted(wanted, key=sorted)
    reports = [ds for ds in _in_pacs(orthanc, first[0]) if ds.SOPClassUID == Comprehensive3DSRStorage]
    current = {
        result["sop_instance_uid"]
        for row in rows
        for result in __import__("json").loads(row["results"])
        if result["kind"] == "sr"
    }
    for report in reports:
        if report.SOPInstanceUID not in current:
            continue
        sources = {
            item.ReferencedSOPInstanceUID
            for study in report.CurrentRequestedProcedureEvidenceSequence
            for series in study.ReferencedSeriesSequence
            for item in series.ReferencedSOPSequence
        }
        assert sources in wanted


def test_a_destination_that_asks_for_it_gets_the_outlined_tissue_and_nothing_of_the_kind_for_a_clean_neck(
    make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None]
) -> None:
    node = make_node(orthanc)
    with node.config.open("a") as config:
        config.write('results = ["sr", "sc", "seg"]\n')
    node.start()
    found = expose(_clear(31), examination(1031), "six_frames")
    clean = expose(phantom(32, residual=False, stratum="plain"), examination(1032), "six_frames")
    camera(node.port, [*found, *clean])
    rows = {row["study_instance_uid"]: row for row in node.wait_for_rows(2)}
    for (scan,), finding, classes in (
        (found, "present", RESULT_CLASSES | {SegmentationStorage}),
        (clean, "absent", RESULT_CLASSES),
    ):
        row = rows[str(scan.StudyInstanceUID)]
        assert (row["state"], row["finding"]) == ("delivered", finding)
        sent = {ds.SOPClassUID: ds for ds in _in_pacs(orthanc, scan)}
        assert set(sent) == classes
        assert {one["sop_class_uid"] for one in json.loads(row["results"])} == classes
        if finding == "present":
            mask = sent[SegmentationStorage]
            assert mask.PatientID == scan.PatientID
            assert mask.SourceImageSequence[0].ReferencedSOPInstanceUID == scan.SOPInstanceUID
            assert mask.SourceImageSequence[0].ReferencedFrameNumber == 1
            counts = scan.pixel_array[0]
            assert counts[mask.pixel_array.astype(bool)].mean() > 3 * counts.mean()
