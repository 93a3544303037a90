"""Archives that take only some classes of reports: each gets the best it takes, and the row says which and why."""

import hashlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO

import pydicom
import pytest
from pydicom.uid import (
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind
from structlog.testing import capture_logs

from dicom_node import delivery, worklist
from dicom_node.chain import ChainError, next_object
from dicom_node.delivery import Sender
from dicom_node.errors import RemnantError
from dicom_node.report import render
from dicom_node.settings import Settings
from dicom_node.spool import open_spool, put_result

REPORTS = (Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage, BasicTextSRStorage)


class Choosy:
    """An archive that takes the classes it is told to, and answers 0122 for those it claims to take and does not.

    `answers_0111`: it says that it has everything already; `finds`: whether it finds that (None: it takes no queries).
    """

    def __init__(self, takes, answers_0122=(), *, answers_0111=False, finds=None):
        self.objects = []
        self.on_object = lambda: None
        self.query = finds is not None
        self._answers_0111, self._finds = answers_0111, finds
        self._refused = answers_0122
        ae = AE(ae_title="CHOOSY")
        for uid in (*takes, *answers_0122, "1.2.840.10008.1.1"):
            ae.add_supported_context(uid)
        if self.query:
            ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find)]
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = self._server.server_address[1]

    @property
    def classes(self):
        return [str(ds.SOPClassUID) for ds in self.objects]

    def _store(self, event):
        if event.request.AffectedSOPClassUID in self._refused:
            return 0x0122
        ds = event.dataset
        ds.file_meta = event.file_meta
        self.objects.append(ds)
        self.on_object()
        return 0x0111 if self._answers_0111 else 0x0000

    def _find(self, event):
        query = event.identifier
        if query.QueryRetrieveLevel == "IMAGE" and self._finds:
            yield 0xFF00, query

    def stop(self):
        self._server.shutdown()


@pytest.fixture
def choosy() -> Iterator[Callable[..., Choosy]]:
    made = []

    def make(*takes, **how):
        made.append(Choosy(takes, **how))
        return made[-1]

    yield make
    for archive in made:
        archive.stop()


class Scan:
    """A scan analysed for real results, its deliveries due, and a sender for them."""

    def __init__(self, made, engine, camera, worker, directory, **archives):
        self.engine = engine
        self.spool = open_spool(directory, 0)
        results = archives.pop("results", {})
        self.settings = Settings.model_validate(
            {
                "storage": {"directory": str(directory)},
                "delivery": {"first_retry_s": 0.1, "max_retry_s": 0.2, "timeout_s": 5},
                "destinations": [
                    {
                        "name": name,
                        "ae_title": "CHOOSY",
                        "host": "127.0.0.1",
                        "port": archive.port,
                        "results": results.get(name, ["sr", "sc"]),
                        "query": archive.query,
                        "test": True,
                    }
                    for name, archive in archives.items()
                ],
            }
        )
        self.scan_id = camera.send("scan").scan_id
        held = worker.claim()
        kinds = sorted({kind for one in self.settings.destinations for kind in one.results}, reverse=True)
        stored = []
        for one in render(made.outcome, made.sources, made.context, kinds):
            name, digest = put_result(self.spool, one.data)
            uids = (one.sop_class_uid, one.sop_instance_uid, one.series_instance_uid)
            stored.append(worklist.NewResult(one.kind, one.variant, *uids, digest, name))
        analysed = made.outcome.__class__.__name__ == "Finding"
        worklist.finish(
            engine,
            held,
            outcome="analysed" if analysed else "declined",
            reason=None if analysed else made.outcome.reason,
            finding=made.outcome.finding if analysed else None,
            probability=made.outcome.probability if analysed else None,
            model="net 1" if analysed else None,
            results=stored,
            deliveries=[
                (result.sop_instance_uid, one.name)
                for one in self.settings.destinations
                for result in stored
                if result.kind in one.results
            ],
        )

    @property
    def row(self):
        return worklist.row(self.engine, self.scan_id)

    @property
    def history(self):
        return [one.detail for one in worklist.events(self.engine, self.scan_id) if one.event == "substituted"]

    @contextmanager
    def sender(self):
        stop = threading.Event()
        sender = Sender(self.settings, self.engine, self.spool, owner="sender")
        thread = threading.Thread(target=sender.run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            sender.wake()
            thread.join()

    def deliver(self):
        """Send until the row rests; return it."""
        pause = threading.Event()
        with self.sender():
            for _ in range(600):
                if self.row["state"] != "sending":
                    break
                pause.wait(0.05)
        assert self.row["state"] != "sending", worklist.details(self.engine, self.scan_id)["deliveries"]
        return self.row


@pytest.fixture
def scan(case, engine, camera, worker, tmp_path):
    """`scan(outcome, name=archive, ...)`: a scan with this outcome, to be delivered to these archives."""

    def make(outcome="present", **archives):
        return Scan(case(outcome), engine, camera, worker, tmp_path / "var", **archives)

    return make


@pytest.mark.parametrize("taken", REPORTS)
def test_an_archive_gets_the_best_report_that_it_takes(scan, choosy, taken):
    behind = REPORTS[REPORTS.index(taken) :]
    archive = choosy(SecondaryCaptureImageStorage, *behind)
    made = scan(pacs=archive)
    row = made.deliver()
    assert sorted(archive.classes) == sorted([taken, SecondaryCaptureImageStorage])
    assert (row["state"], row["delivered_to"]) == ("delivered", {"pacs": "acknowledged"})
    refused = REPORTS.index(taken)
    assert len(made.history) == refused
    assert len(row["results"]) == 2 + refused
    if refused:
        assert f"{taken.name} goes instead" in row["last_error"]
        assert f"{taken.name} goes instead" in made.history[-1]
        assert "does not take this SOP class" in made.history[0]
    else:
        assert row["last_error"] is None
    report = next(ds for ds in archive.objects if ds.SOPClassUID == taken)
    picture = next(ds for ds in archive.objects if ds.SOPClassUID == SecondaryCaptureImageStorage)
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber"):
        assert report[keyword] == picture[keyword]


def test_an_archive_that_takes_only_pictures_has_its_result_in_the_picture_it_gets_anyway(scan, choosy):
    archive = choosy(SecondaryCaptureImageStorage)
    row = scan(pacs=archive).deliver()
    assert archive.classes == [SecondaryCaptureImageStorage]
    assert (row["state"], row["delivered_to"]) == ("delivered", {"pacs": "acknowledged"})
    assert "Basic Text SR Storage" in row["last_error"]
    assert "Secondary Capture Image Storage goes instead" in row["last_error"]


def test_a_picture_made_for_another_archive_goes_to_one_that_takes_no_report(scan, choosy):
    pictures, everything = choosy(SecondaryCaptureImageStorage), choosy(SecondaryCaptureImageStorage, *REPORTS)
    row = scan(old=pictures, new=everything, results={"old": ["sr"]}).deliver()
    assert pictures.classes == [SecondaryCaptureImageStorage]
    assert pictures.objects[0].SOPInstanceUID in [ds.SOPInstanceUID for ds in everything.objects]
    assert (row["state"], row["delivered_to"]) == ("delivered", {"old": "acknowledged", "new": "acknowledged"})


@pytest.mark.parametrize("outcome", ["present", "low_counts"])
def test_where_nothing_is_left_to_send_the_row_asks_for_a_person(scan, choosy, outcome):
    archive = choosy(SecondaryCaptureImageStorage)
    row = scan(outcome, pacs=archive, results={"pacs": ["sr"]}).deliver()
    assert archive.objects == []
    assert (row["state"], row["delivered_to"]) == ("failed", {"pacs": "refused"})
    assert "nor any simpler report" in row["last_error"]


def test_a_status_0122_is_read_like_a_refused_class(scan, choosy):
    archive = choosy(
        SecondaryCaptureImageStorage, BasicTextSRStorage, answers_0122=(Comprehensive3DSRStorage, EnhancedSRStorage)
    )
    made = scan(pacs=archive)
    assert made.deliver()["state"] == "delivered"
    assert sorted(archive.classes) == sorted([BasicTextSRStorage, SecondaryCaptureImageStorage])
    assert "0122" in made.history[0]


def test_two_archives_share_a_simpler_report_and_the_note_is_one_for_both(scan, choosy):
    archives = [choosy(SecondaryCaptureImageStorage, EnhancedSRStorage) for _ in range(2)]
    made = scan("low_counts", one=archives[0], two=archives[1])
    row = made.deliver()
    assert row["state"] == "declined"
    sent = [next(ds for ds in one.objects if ds.SOPClassUID == EnhancedSRStorage) for one in archives]
    assert sent[0] == sent[1]
    assert len(row["results"]) == 4


def test_a_sender_that_dies_before_the_worklist_hears_of_it_makes_the_same_object_again(scan, choosy):
    archive = choosy(SecondaryCaptureImageStorage, ComprehensiveSRStorage)
    made = scan(pacs=archive)
    (one,) = [
        due
        for due in worklist.due_deliveries(made.engine, "pacs", owner="sender", limit=9, hold_s=60)
        if due.kind == "sr"
    ]
    before = next_object(made.engine, made.spool, one, sc="colour")  # durable, and then the process is gone
    assert made.deliver()["state"] == "delivered"
    stored = {result["sop_instance_uid"]: result for result in worklist.details(made.engine, made.scan_id)["results"]}
    assert stored[before.sop_instance_uid]["sha256"] == before.sha256
    sent = next(ds for ds in archive.objects if ds.SOPClassUID == ComprehensiveSRStorage)
    data = (made.spool.results / before.file_name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == before.sha256
    assert pydicom.dcmread(BytesIO(data)) == sent


_KILLED_WITH_THE_OBJECT_DURABLE = """
import os, signal, sys, threading
from dicom_node import delivery
from dicom_node.settings import Settings
from dicom_node.spool import open_spool
from dicom_node.worklist import open_worklist

settings = Settings.model_validate_json(sys.argv[1])
delivery.worklist.substitute_delivery = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
store, engine = open_spool(settings.storage.directory, 0), open_worklist(sys.argv[2])
delivery.Sender(settings, engine, store, owner="sender").run(threading.Event())
"""


def _files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_sender_killed_between_object_and_worklist_makes_the_same_object_again(scan, choosy):
    archive = choosy(SecondaryCaptureImageStorage, EnhancedSRStorage)
    made = scan(pacs=archive)
    before = _files(made.spool.results)
    url = made.engine.url.render_as_string(hide_password=False)
    program = [
        sys.executable,
        "-c",
        _KILLED_WITH_THE_OBJECT_DURABLE,
        made.settings.model_dump_json(exclude_unset=True),
        url,
    ]
    assert subprocess.run(program, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    (left,) = _files(made.spool.results) - before
    orphan = left.read_bytes()
    assert pydicom.dcmread(BytesIO(orphan)).SOPClassUID == ComprehensiveSRStorage
    assert len(made.row["results"]) == 2  # the worklist does not know it
    row = made.deliver()
    assert (row["state"], row["delivered_to"]) == ("delivered", {"pacs": "acknowledged"})
    assert left.read_bytes() == orphan
    assert sorted(archive.classes).count(str(EnhancedSRStorage)) == 1
    digests = [one["sha256"] for one in worklist.details(made.engine, made.scan_id)["results"]]
    assert digests.count(hashlib.sha256(orphan).hexdigest()) == 1


@pytest.mark.parametrize("answers_0122", [(), (SegmentationStorage,)])
def test_an_archive_that_takes_no_segmentation_refuses_that_alone_and_the_row_asks_for_a_person(
    scan, choosy, answers_0122
):
    words = (SecondaryCaptureImageStorage, Comprehensive3DSRStorage)
    without, everything = choosy(*words, answers_0122=answers_0122), choosy(*words, SegmentationStorage)
    asked = {name: ["sr", "sc", "seg"] for name in ("old", "new")}
    made = scan(old=without, new=everything, results=asked)
    row = made.deliver()
    assert sorted(without.classes) == sorted(words)
    assert sorted(everything.classes) == sorted([*words, SegmentationStorage])
    assert (row["state"], row["delivered_to"]) == ("failed", {"old": "refused", "new": "acknowledged"})
    told = worklist.details(made.engine, made.scan_id)
    (mask,) = [one["sop_instance_uid"] for one in told["results"] if one["kind"] == "seg"]
    ends = {
        (one["destination"], one["sop_instance_uid"]): (one["state"], one["last_error"]) for one in told["deliveries"]
    }
    state, why = ends.pop(("old", mask))
    assert state == "refused"
    assert "0122" in why if answers_0122 else "does not take this SOP class" in why
    assert {state for state, _ in ends.values()} == {"acknowledged"}
    assert made.history == []


def test_nothing_is_made_of_a_report_whose_bytes_changed(scan, choosy):
    archive = choosy(SecondaryCaptureImageStorage, ComprehensiveSRStorage)
    made = scan(pacs=archive)
    (report,) = [one for one in worklist.stored_results(made.engine, made.scan_id, 1) if one.kind == "sr"]
    (one,) = [
        due
        for due in worklist.due_deliveries(made.engine, "pacs", owner="sender", limit=9, hold_s=60)
        if due.kind == "sr"
    ]
    path = made.spool.results / report.file_name
    path.write_bytes(path.read_bytes().replace(b"Present", b"Absent "))
    with pytest.raises(ChainError, match="damaged"):
        next_object(made.engine, made.spool, one, sc="colour")


def test_a_disk_that_takes_no_simpler_report_just_now_delays_it_and_nothing_else(scan, choosy):
    archive = choosy(SecondaryCaptureImageStorage, ComprehensiveSRStorage)
    made = scan(pacs=archive)
    away = made.spool.rendering.rename(made.spool.rendering.with_name("away"))
    pause = threading.Event()
    with made.sender():
        for _ in range(600):
            if made.row["last_error"] and archive.classes:
                break
            pause.wait(0.05)
        assert archive.classes == [SecondaryCaptureImageStorage]
        assert "no simpler report could be stored" in made.row["last_error"]
        assert made.row["state"] == "sending"
        away.rename(made.spool.rendering)
    assert made.deliver()["state"] == "delivered"
    assert sorted(archive.classes) == sorted([SecondaryCaptureImageStorage, ComprehensiveSRStorage])


def test_a_sender_that_is_stopped_ends_with_the_object_on_the_wire_and_its_successor_sends_the_rest(scan, choosy):
    archive = choosy(*REPORTS, SecondaryCaptureImageStorage)
    one = scan(pacs=archive)
    stop = threading.Event()
    archive.on_object = stop.set
    sender = Sender(one.settings, one.engine, one.spool, owner="sender")
    thread = threading.Thread(target=sender.run, args=(stop,))
    thread.start()
    assert stop.wait(30)
    sender.wake()
    thread.join(30)
    assert not thread.is_alive()

    assert len(archive.objects) == 1
    told = [delivery["state"] for delivery in worklist.details(one.engine, one.scan_id)["deliveries"]]
    assert sorted(told) == ["acknowledged", "pending"]
    assert worklist.release_deliveries(one.engine, "sender") == 0, "what was not sent is held by nobody"
    assert one.deliver()["state"] == "delivered"
    assert len(archive.objects) == 2


def test_what_an_archive_says_it_has_already_is_delivered_when_it_finds_it(scan, choosy):
    archive = choosy(*REPORTS, SecondaryCaptureImageStorage, answers_0111=True, finds=True)
    row = scan(pacs=archive).deliver()
    assert (row["state"], row["delivered_to"], row["last_error"]) == ("delivered", {"pacs": "acknowledged"}, None)
    assert len(archive.objects) == 2


@pytest.mark.parametrize("finds", [False, None], ids=["finds nothing", "is not asked"])
def test_what_an_archive_says_it_has_and_does_not_find_stays_due_and_says_why(scan, choosy, finds):
    archive = choosy(*REPORTS, SecondaryCaptureImageStorage, answers_0111=True, finds=finds)
    one = scan(pacs=archive)
    pause = threading.Event()
    with one.sender():
        for _ in range(600):
            if len(archive.objects) > 2:
                break
            pause.wait(0.05)
    assert len(archive.objects) > 2, "it is sent again"
    assert one.row["state"] == "sending"
    why = "but it does not find it" if finds is False else "nothing confirms that yet"
    assert why in one.row["last_error"]


def test_a_sender_with_an_error_of_ours_in_one_thread_ends_as_a_whole_and_its_successor_delivers(
    scan, choosy, monkeypatch
):
    """A thread that is gone would leave its archive without results until somebody starts the node again."""
    archive = choosy(*REPORTS, SecondaryCaptureImageStorage)
    one = scan(pacs=archive)

    def broken(*_, **__):
        raise KeyError("a name that must not be told")

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "send", broken)
        with (
            capture_logs() as lines,
            pytest.raises(RemnantError, match="A part of the sender ended by an error") as raised,
        ):
            Sender(one.settings, one.engine, one.spool, owner="sender").run(threading.Event())
    assert "must not be told" not in str(raised.value)
    assert ("sending_failed", "to-pacs") in [(line["event"], line.get("thread")) for line in lines]
    assert one.deliver()["state"] == "delivered"
    assert len(archive.objects) == 2
