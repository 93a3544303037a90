"""A real archive that knows the study as somebody else's: nothing is sent, a person decides, then it is right."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from dicom_node.sender import Parcel, Peer, send
from pipeline.camera import examination, expose
from pipeline.phantom import phantom


@dataclass(frozen=True)
class Asked:
    """A destination that is asked before anything is sent to it."""

    ae_title: str
    port: int


def _remnant(node: Any, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", *arguments, "--config", str(node.config)],
        cwd=node.directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _results(archive: Any, study_instance_uid: str) -> list[Dataset]:
    found = [dcmread(BytesIO(archive.file(one))) for one in archive.find(study_instance_uid)]
    return [ds for ds in found if ds.Modality != "NM"]


@pytest.fixture(scope="module")
def archive(start_orthanc: Callable[..., Any]) -> Any:
    """An Orthanc that answers queries, in UTF-8."""
    return start_orthanc(DicomAlwaysAllowFind=True, DefaultEncoding="Utf8")


def test_a_scan_that_the_archive_knows_as_somebody_elses_waits_for_a_person(
    make_node: Callable[..., Any], archive: Any, camera: Callable[..., None], tmp_path: Any, wait: Callable[..., Any]
) -> None:
    node = make_node(Asked(archive.ae_title, archive.dicom_port))
    node.config.write_text(node.config.read_text() + "query = true\n")
    (ds,) = expose(phantom(1, residual=True, stratum="uptake_1_up"), examination(5101), "two_frames")
    ds.SpecificCharacterSet, ds.PatientName = "GB18030", "Wang^XiaoDong=王^小东"
    study, received_id = str(ds.StudyInstanceUID), str(ds.PatientID)

    # The archive merged the patient: another ID, another spelling in the ideographic group.
    (known,) = expose(phantom(1, residual=True, stratum="uptake_1_up"), examination(5101), "two_frames")
    known.SpecificCharacterSet, known.PatientName = "GB18030", "Wang^XiaoDong=王^晓东"
    known.PatientID = "SIM-MERGED"
    path = tmp_path / "known.dcm"
    known.save_as(path, enforce_file_format=True)
    peer = Peer("pacs", archive.ae_title, archive.host, archive.dicom_port)
    limits = {"connect_timeout_s": 5, "acse_timeout_s": 5, "dimse_timeout_s": 10}
    parcel = Parcel(0, path, str(known.SOPClassUID), str(known.SOPInstanceUID))
    ((_, stored),) = send(peer, [parcel], calling_ae_title="CAMERA", **limits)
    assert stored.kind == "acknowledged"

    node.start()
    camera(node.port, (ds,))
    (row,) = node.wait_for_rows(1, ("failed",))
    assert (row["reason"], row["finding"]) == ("identity_changed", None)
    assert row["last_error"] == "pacs0 knows this study with another PatientID, PatientName"
    assert _results(archive, study) == []
    for secret in ("SIM-MERGED", received_id, "XiaoDong"):
        assert secret not in node.log
    shown = _remnant(node, "worklist", "show", "1")
    assert "SIM-MERGED" in shown.stdout

    accepted = _remnant(node, "worklist", "accept-identity", "1")
    assert accepted.returncode == 0, accepted.stderr
    (row,) = node.wait_for_rows(1, ("delivered",))
    assert (row["revision"], row["finding"]) == (2, "present")
    results = _results(archive, study)
    assert {one.Modality for one in results} == {"SR", "OT"}
    for one in results:
        assert (one.PatientID, str(one.PatientName)) == ("SIM-MERGED", "Wang^XiaoDong=王^晓东")
        (before,) = one.OriginalAttributesSequence[0].ModifiedAttributesSequence
        assert (before.PatientID, str(before.PatientName)) == (received_id, "Wang^XiaoDong=王^小东")
    assert {one["kind"] for one in json.loads(row["results"])} == {"sr", "sc"}
    assert "SIM-MERGED" not in node.log

    recalled = _remnant(node, "worklist", "recall", "1", "--reason", "wrong side marked")
    assert recalled.returncode == 0, recalled.stderr
    wait(lambda: [one for one in _results(archive, study) if one.Modality == "KO"], "the withdrawal at the archive")
    (withdrawal,) = (one for one in _results(archive, study) if one.Modality == "KO")
    assert withdrawal.ConceptNameCodeSequence[0].CodeValue == "113037"
    assert (withdrawal.PatientID, str(withdrawal.PatientName)) == ("SIM-MERGED", "Wang^XiaoDong=王^晓东")
    named = {
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for item in withdrawal.ContentSequence
        if "ReferencedSOPSequence" in item
    }
    assert named == {one.SOPInstanceUID for one in results}
    assert node.rows()[0]["state"] == "recalled"

    # A study that the archive does not know yet is sent, and an archive that forwards all of it to us starts nothing.
    (fresh,) = expose(phantom(2, residual=True, stratum="uptake_1_up"), examination(5102), "two_frames")
    camera(node.port, (fresh,))
    node.wait_for_rows(2, ("delivered", "recalled"))
    returned = [dcmread(BytesIO(data)) for data in node.results().values()]
    camera(node.port, returned)
    wait(
        lambda: node.query("select count(*) from event where event = 'returned'") == [(len(returned),)], "all came back"
    )
    assert [row["state"] for row in node.rows()] == ["recalled", "delivered"]
    assert node.query("select sum(claims) from scan") == [(2,)], "a revision each, analysed once"
