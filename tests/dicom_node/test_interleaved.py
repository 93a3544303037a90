"""Two hundred acquisitions at once whose patients, studies and names collide: every result belongs to its own scan."""

import copy
import hashlib
import random
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

from pydicom import dcmread
from sqlalchemy import Engine

from dicom_node import worklist
from dicom_node.answer import answer
from dicom_node.messages import Provenance, Task, Wanted
from pipeline.analyse import load_model
from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from pipeline.views import facts_of

COUNT = 200
RULES = worklist.IntakeRules(("anterior", "posterior"), pair_window_s=3600, views_timeout_s=3600, timezone=UTC)
IDENTITY = ("PatientID", "IssuerOfPatientID", "PatientName", "AccessionNumber", "StudyInstanceUID")
NAMES = ("Erfunden^Anna", "Erfunden^Anna=王^小东", "Erfunden^Anna^B", "王^小东")


def _scans() -> list[list]:
    """Datasets by acquisition: some in one object, some in two; 12 PatientIDs of 2 issuers, 9 studies, 4 names."""
    shapes = [expose(phantom(1, residual=True), examination(1), shape) for shape in ("two_frames", "two_objects")]
    scans = []
    for number in range(COUNT):
        taken_at = datetime(2026, 1, 1, 8) + timedelta(hours=2 * number)  # noqa: DTZ001 - as a header has it
        members = []
        for index, shown in enumerate(shapes[number % 2]):
            ds = copy.deepcopy(shown)
            ds.SpecificCharacterSet = "GB18030"
            ds.PatientID = f"RMN-{number % 12}"
            ds.IssuerOfPatientID = "EAST" if number % 24 < 12 else "WEST"
            ds.PatientName = NAMES[number % 24 % 4]
            ds.AccessionNumber = f"A-{number % 7}"
            ds.StudyInstanceUID = f"2.25.40{number % 9}"
            ds.SeriesInstanceUID = f"2.25.41{number}"
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"2.25.42{number:03}{index}"
            for group in ("Acquisition", "Content", "Series"):
                setattr(ds, f"{group}Date", taken_at.strftime("%Y%m%d"))
                setattr(ds, f"{group}Time", taken_at.strftime("%H%M%S"))
            members.append(ds)
        scans.append(members)
    return scans


def test_of_two_hundred_colliding_acquisitions_no_result_is_anothers(sqlite_engine: Engine) -> None:
    engine = sqlite_engine
    scans = _scans()
    owner = {str(ds.SOPInstanceUID): number for number, members in enumerate(scans) for ds in members}
    objects = {str(ds.SOPInstanceUID): ds for members in scans for ds in members}
    arriving = list(objects.values())
    random.Random(7).shuffle(arriving)  # noqa: S311 - an order, no secret
    for ds in arriving:
        digest = hashlib.sha256(str(ds.SOPInstanceUID).encode()).hexdigest()
        stored = worklist.Stored(f"{digest}.dcm", digest, 1, "1.2.840.10008.1.2.1")
        worklist.receive(engine, facts_of(ds), stored, source_aet="OPTIMA1", rules=RULES)

    model = load_model("remnant-resnet18-phantom")
    answered: set[int] = set()
    uids: set[str] = set()
    while (claim := worklist.claim(engine, "host:work", "boot")) is not None:
        numbers = {owner[one.sop_instance_uid] for one in claim.instances}
        assert len(numbers) == 1, "views of two acquisitions were put together"
        (number,) = numbers
        assert {one.sop_instance_uid for one in claim.instances} == {str(ds.SOPInstanceUID) for ds in scans[number]}
        provenance = Provenance(
            revision=claim.revision,
            source_digests={one.sop_instance_uid: one.sha256 for one in claim.instances},
            analysed_at=datetime.fromisoformat(claim.analysed_at),
            timezone="UTC",
            ae_title="REMNANT",
            codes={},
            settings_fingerprint="0",
        )
        # The note, not the finding: whose a result is does not depend on what the model says, and it takes no seconds.
        task = Task((Path("unused"),), "analysis_failed", provenance, (Wanted("sr"),))
        told = answer(
            [objects[one.sop_instance_uid] for one in claim.instances],
            model,
            task,
            preprocessing="native",
            require_views=("anterior", "posterior"),
        )
        (made,) = told.results
        result = dcmread(BytesIO(made.data))
        source = scans[number][0]
        for keyword in IDENTITY:
            assert str(result.get(keyword, "")) == str(source.get(keyword, "")), keyword
        referenced = {
            str(sop.ReferencedSOPInstanceUID)
            for study in result.CurrentRequestedProcedureEvidenceSequence
            for series in study.ReferencedSeriesSequence
            for sop in series.ReferencedSOPSequence
        }
        assert {owner[uid] for uid in referenced} == {number}
        assert number not in answered
        answered.add(number)
        uids.add(str(result.SOPInstanceUID))
        row = worklist.NewResult(
            "sr", "", made.sop_class_uid, made.sop_instance_uid, made.series_instance_uid, "0" * 64, "x"
        )
        worklist.finish(
            engine,
            claim,
            outcome="failed",
            reason="analysis_failed",
            results=[row],
            deliveries=[(made.sop_instance_uid, "pacs")],
        )
        for due in worklist.due_deliveries(engine, "pacs", owner="s", limit=9, hold_s=60):
            assert (due.whose.patient_id, due.whose.patient_name) == (source.PatientID, str(source.PatientName))
            assert due.whose.study_instance_uid == source.StudyInstanceUID
            worklist.record_delivery(engine, due.id, state="acknowledged", status=0)
    assert answered == set(range(COUNT))
    assert len(uids) == COUNT
