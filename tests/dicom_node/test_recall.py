"""Withdrawing results: only what was sent, everywhere it was sent, once, and told to the archive although at rest."""

import hashlib
import subprocess
from datetime import UTC, datetime
from io import BytesIO
from zoneinfo import ZoneInfo

import pydicom
import pytest

from dicom_node import spool, worklist
from dicom_node.errors import RemnantError
from dicom_node.recall import recall
from dicom_node.report import RenderError, key_object
from dicom_node.settings import Settings
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

NETWORK_CLASS = {"sr": "1.2.840.10008.5.1.4.1.1.88.34", "sc": "1.2.840.10008.5.1.4.1.1.7"}
AT = datetime(2026, 11, 23, 18, 0, tzinfo=UTC)


def sent_object(kind, number, *, patient_id="RMN-1", name="Wang^XiaoDong=王^小东"):
    """Something like a result: identity, class and modality are what a withdrawal looks at."""
    (ds,) = expose(phantom(1, residual=False), examination(1), "two_frames")
    ds.SpecificCharacterSet, ds.PatientName, ds.PatientID = "GB18030", name, patient_id
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = NETWORK_CLASS[kind]
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"2.25.77{number}"
    ds.SeriesInstanceUID = f"2.25.88{number}"
    ds.Modality = "SR" if kind == "sr" else "OT"
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return pydicom.dcmread(BytesIO(buffer.getvalue())), buffer.getvalue()


def render(*objects, why="safety", reason="wrong patient positioned"):
    return key_object.render(
        objects, why=why, reason=reason, at=AT, timezone=ZoneInfo("Europe/Berlin"), ae_title="REMNANT", version="0.1.0"
    )


@pytest.fixture
def store(tmp_path):
    return spool.open_spool(tmp_path / "var", 1)


@pytest.fixture
def sent(camera, worker, store):
    """A delivered row whose results lie in the storage."""
    scan_id = camera.send("scan").scan_id
    held = worker.claim()
    results = []
    for number, kind in enumerate(("sr", "sc"), start=1):
        ds, data = sent_object(kind, number)
        name, digest = spool.put_result(store, data)
        results.append(
            worklist.NewResult(kind, "", NETWORK_CLASS[kind], str(ds.SOPInstanceUID), "2.25.88", digest, name)
        )
    pairs = [(one.sop_instance_uid, name) for one in results for name in ("pacs", "ris")]
    worklist.finish(
        camera.engine, held, outcome="analysed", finding="present", probability=0.9, results=results, deliveries=pairs
    )
    worker.deliver("pacs")
    worker.deliver("ris")
    return scan_id


@pytest.mark.parametrize(("why", "code"), [("safety", "113037"), ("quality", "113001")])
def test_a_withdrawal_names_what_was_sent_and_passes_the_judges(peer, tmp_path, why, code):
    (report, _), (picture, _) = sent_object("sr", 1), sent_object("sc", 2)
    made = render(picture, report, why=why, reason="左侧位置错误")
    assert made == render(report, picture, why=why, reason="左侧位置错误"), "the same bytes in any order"
    ds = pydicom.dcmread(BytesIO(made.data))
    assert (ds.ConceptNameCodeSequence[0].CodeValue, ds.Modality) == (code, "KO")
    assert (ds.PatientID, str(ds.PatientName)) == ("RMN-1", "Wang^XiaoDong=王^小东")
    assert [item.ValueType for item in ds.ContentSequence] == ["CODE", "UIDREF", "TEXT", "COMPOSITE", "IMAGE"]
    path = tmp_path / "kos.dcm"
    path.write_bytes(made.data)
    judged = subprocess.run([peer("dciodvfy"), path], capture_output=True, text=True, check=False)
    assert [line for line in judged.stderr.splitlines() if line.startswith("Error")] == []
    dumped = subprocess.run(
        [peer("/usr/bin/dsrdump"), path], capture_output=True, text=True, errors="replace", check=True
    )
    # It says of itself that it knows neither this character set nor templates of key objects; nothing else may be said.
    said = [line for line in dumped.stderr.splitlines() if line.startswith(("E:", "W:", "F:"))]
    assert [line for line in said if "not support" not in line and "not yet supported" not in line] == []


def test_results_of_two_people_are_not_withdrawn_in_one_document():
    with pytest.raises(RenderError, match="one patient and study"):
        render(sent_object("sr", 1)[0], sent_object("sc", 2, patient_id="RMN-2")[0])
    with pytest.raises(RenderError):
        render()


def test_a_document_that_names_something_else_is_found():
    (report, _), (other, _) = sent_object("sr", 1), sent_object("sc", 2)
    made = render(report)
    assert key_object.check(made, [report], why="safety", reason="wrong patient positioned") == ()
    assert "the title is not that of the reason" in key_object.check(
        made, [report], why="quality", reason="wrong patient positioned"
    )
    assert "the references are not the results that were sent" in key_object.check(
        made, [report, other], why="safety", reason="wrong patient positioned"
    )
    assert "the reason does not survive the character set of the results" in key_object.check(
        made, [report], why="safety", reason="?"
    )


def test_a_recalled_row_tells_every_destination_although_it_is_at_rest(camera, worker, store, sent):
    assert recall(camera.engine, store, Settings(), sent, why="safety", reason="wrong side") == ("pacs", "ris")
    row = worklist.row(camera.engine, sent)
    assert row["state"] == "recalled"
    assert row["delivered_to"] == {"pacs": "pending", "ris": "pending"}
    (due,) = worklist.due_deliveries(camera.engine, "pacs", owner="s", limit=9, hold_s=60)
    assert due.kind == "kos"
    assert hashlib.sha256((store.results / due.file_name).read_bytes()).hexdigest() == due.sha256
    worklist.record_delivery(camera.engine, due.id, state="pending", error="away", delay_s=0)
    assert worker.deliver("pacs") == 1, "tried again"
    assert worklist.row(camera.engine, sent)["state"] == "recalled"
    (line,) = [one for one in worklist.events(camera.engine, sent) if one.event == "recalled"]
    assert line.detail == "Rejected for Patient Safety Reasons: wrong side"
    with pytest.raises(worklist.TransitionRefused, match="recalled"):
        recall(camera.engine, store, Settings(), sent, why="safety", reason="again")
    # A retry replaces what was withdrawn; the other destination is still told.
    worklist.retry(camera.engine, sent)
    held = worker.claim()
    assert {one.kind for one in held.predecessors} >= {"sr"}
    assert worker.deliver("ris") == 1
    worker.finish(held, "pacs")
    worker.deliver()
    assert worklist.row(camera.engine, sent)["state"] == "delivered"
    assert len(worklist.sent_results(camera.engine, sent)) == 2, "only what came after the recall"


def test_what_was_sent_of_a_failed_row_can_be_withdrawn_too(camera, worker, store, sent):
    camera.send("scan", data="2", patient_id="RMN-2")
    (version,) = worklist.pending_versions(camera.engine)
    worklist.judge_version(camera.engine, version.instance_id, "identity_changed")
    recall(camera.engine, store, Settings(), sent, why="safety", reason="wrong patient")
    assert worklist.row(camera.engine, sent)["state"] == "recalled"


def test_what_was_not_sent_or_is_gone_is_not_withdrawn(camera, worker, store, sent):
    waiting = camera.send("new", study_instance_uid="2.25.5").scan_id
    for scan_id, says in ((waiting, "queued"), (4711, "there is no scan")):
        with pytest.raises(worklist.TransitionRefused, match=says):
            recall(camera.engine, store, Settings(), scan_id, why="safety", reason="x")
    worker.finish(worker.claim(), "pacs")
    with pytest.raises(worklist.TransitionRefused, match="nothing was sent"):
        recall(camera.engine, store, Settings(), waiting, why="safety", reason="x")
    for path in store.results.rglob("*.dcm"):
        path.unlink()
    with pytest.raises(RemnantError, match="no longer in the storage"):
        recall(camera.engine, store, Settings(), sent, why="safety", reason="x")
    assert worklist.row(camera.engine, sent)["state"] == "delivered"
