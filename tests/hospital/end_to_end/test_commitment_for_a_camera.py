"""A camera that asks us for Storage Commitment is told what an archive has committed itself to, and nothing else."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import NuclearMedicineImageStorage, StorageCommitmentPushModel

from dicom_node.contexts import STORAGE_COMMITMENT_INSTANCE
from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from tests.hospital.end_to_end.committing import Archive

PROXY = 'commitment = "proxy"\ncommitment_wait_s = {wait}\nport = {port}\n'


@dataclass
class Report:
    """What the camera was told: Event Type ID, UID -> archive that keeps it, UID -> Failure Reason."""

    transaction_uid: str
    kind: int
    kept: dict[str, str]
    failed: dict[str, int]


@dataclass
class Camera:
    """A camera that asks for Storage Commitment, hangs up, and listens for reports."""

    ae_title: str = "OPTIMA1"
    answers: list[int] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    port: int = 0
    _server: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def listen(self, port: int = 0) -> None:
        ae = AE(ae_title=self.ae_title)
        ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        self._server = ae.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._report)]
        )
        self.port = self._server.server_address[1]

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _report(self, event: evt.Event) -> tuple[int, None]:
        ds = event.event_information
        # PS3.4 table J.3-2: each of the two only where there is something in it.
        assert all(len(ds[name].value) for name in ("ReferencedSOPSequence", "FailedSOPSequence") if name in ds)
        with self._lock:
            self.reports.append(
                Report(
                    str(ds.TransactionUID),
                    int(event.event_type),
                    {
                        str(one.ReferencedSOPInstanceUID): str(one.RetrieveAETitle)
                        for one in ds.get("ReferencedSOPSequence") or ()
                    },
                    {
                        str(one.ReferencedSOPInstanceUID): int(one.FailureReason)
                        for one in ds.get("FailedSOPSequence") or ()
                    },
                )
            )
            return (self.answers.pop(0) if self.answers else 0x0000), None

    def ask(
        self,
        node_port: int,
        uids: list[str],
        *,
        transaction_uid: str = "",
        roles: bool = False,
        action: int = 1,
        instance: str = STORAGE_COMMITMENT_INSTANCE,
    ) -> tuple[str, int | None]:
        """Send the N-ACTION; return the transaction and the status, None where the context was refused."""
        ds = Dataset()
        ds.TransactionUID = transaction_uid or generate_uid()
        ds.ReferencedSOPSequence = []
        for uid in uids:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = NuclearMedicineImageStorage, uid
            ds.ReferencedSOPSequence.append(item)
        ae = AE(ae_title=self.ae_title)
        ae.add_requested_context(StorageCommitmentPushModel)
        role = [build_role(StorageCommitmentPushModel, scu_role=True)] if roles else []
        assoc = ae.associate("127.0.0.1", node_port, ae_title="REMNANT", ext_neg=role)
        assert assoc.is_established or assoc.rejected_contexts
        if not assoc.accepted_contexts:
            assoc.abort()
            return str(ds.TransactionUID), None
        try:
            status, _ = assoc.send_n_action(ds, action, StorageCommitmentPushModel, instance)
            return str(ds.TransactionUID), int(status.Status)
        finally:
            assoc.release()


@pytest.fixture
def asker() -> Iterator[Camera]:
    camera = Camera()
    camera.listen()
    yield camera
    camera.stop()


def _node(make_node: Callable[..., Any], asker: Camera, *archives: Any, wait: float = 5) -> Any:
    node = make_node(*archives, source=PROXY.format(wait=wait, port=asker.port)).start()
    for archive in archives:
        archive.node_port = lambda: node.port
    return node


def _relays(node: Any) -> list[tuple[Any, ...]]:
    return list(node.query("select state, last_error from relay order by id"))


def test_a_camera_hears_committed_only_of_what_orthanc_has_and_which_archive_keeps_it(
    make_node: Callable[..., Any],
    start_orthanc: Callable[..., Any],
    camera: Callable[..., None],
    asker: Camera,
    wait: Any,
) -> None:
    orthanc = start_orthanc(ae_title="KEEPER")
    orthanc.storage_commitment = True
    node = make_node(orthanc, source=PROXY.format(wait=5, port=asker.port)).start()
    orthanc.know("REMNANT", node.port)
    (ds,) = expose(phantom(5200), examination(5200), "two_frames")
    camera(orthanc.dicom_port, [ds], called="KEEPER")
    nowhere = generate_uid()
    transaction, status = asker.ask(node.port, [str(ds.SOPInstanceUID), nowhere])
    assert status == 0x0000
    (report,) = wait(lambda: asker.reports, "the camera is told")
    assert report == Report(transaction, 2, {str(ds.SOPInstanceUID): "KEEPER"}, {nowhere: 0x0112})
    transaction, status = asker.ask(node.port, [str(ds.SOPInstanceUID)], roles=True)
    assert status == 0x0000
    wait(lambda: len(asker.reports) == 2, "the camera is told again")
    assert asker.reports[1] == Report(transaction, 1, {str(ds.SOPInstanceUID): "KEEPER"}, {})
    assert node.rows() == [], "what was asked about is no scan of ours"


def test_what_only_we_have_is_never_committed(
    make_node: Callable[..., Any],
    make_archive: Callable[..., Archive],
    camera: Callable[..., None],
    asker: Camera,
    wait: Any,
) -> None:
    archive = make_archive()
    node = _node(make_node, asker, archive, wait=1)
    (ds,) = expose(phantom(5201), examination(5201), "two_frames")
    camera(node.port, [ds])
    node.wait_for_rows(1, ("delivered",))
    uid = str(ds.SOPInstanceUID)
    archive.never = {uid}
    asker.ask(node.port, [uid])
    (report,) = wait(lambda: asker.reports, "the camera is told")
    assert (report.kind, report.kept, report.failed) == (2, {}, {uid: 0x0112})


def test_an_object_that_the_archive_gets_a_little_later_is_committed_all_the_same(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], asker: Camera, wait: Any
) -> None:
    archive = make_archive()
    uid = generate_uid()
    archive.missing = {uid}  # of the first asking only
    node = _node(make_node, asker, archive, wait=60)
    asker.ask(node.port, [uid])
    (report,) = wait(lambda: asker.reports, "the camera is told")
    assert report.kept == {uid: "KEEPER"}
    assert len(archive.asked) == 2


def test_one_archive_that_is_away_or_has_nothing_does_not_keep_another_from_committing_itself(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], asker: Camera, wait: Any
) -> None:
    gone, empty, keeper = make_archive(ae_title="GONE"), make_archive(ae_title="EMPTY"), make_archive(ae_title="KEEPER")
    uid = generate_uid()
    empty.never = {uid}
    node = _node(make_node, asker, gone, empty, keeper, wait=60)
    gone.stop()
    asker.ask(node.port, [uid])
    (report,) = wait(lambda: asker.reports, "the camera is told")
    assert (report.kind, report.kept) == (1, {uid: "KEEPER"})


@pytest.mark.parametrize("how", ["silent", "away"])
def test_an_archive_that_does_not_answer_is_a_failure_and_no_statement_that_it_has_nothing(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], asker: Camera, wait: Any, how: str
) -> None:
    archive, empty = make_archive("not"), make_archive(ae_title="EMPTY")
    uid = generate_uid()
    empty.never = {uid}
    node = _node(make_node, asker, archive, empty, wait=1)
    if how == "away":
        archive.stop()
    asker.ask(node.port, [uid])
    (report,) = wait(lambda: asker.reports, "the camera is told")
    assert (report.kind, report.failed) == (2, {uid: 0x0110})


def test_a_camera_that_is_switched_off_or_refuses_the_report_is_told_again_and_a_kill_costs_nothing(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], asker: Camera, wait: Any
) -> None:
    archive = make_archive()
    node = _node(make_node, asker, archive)
    port = asker.port
    asker.stop()
    uid = generate_uid()
    transaction, status = asker.ask(node.port, [uid])
    assert status == 0x0000
    wait(lambda: [said for state, said in _relays(node) if state == "reporting" and said], "it could not be told")
    node.kill("send")
    node.wait_until_ready("send")
    asker.answers = [0x0110]
    asker.listen(port)
    wait(lambda: len(asker.reports) == 2, "the camera is told until it takes it")
    assert asker.reports[0] == asker.reports[1] == Report(transaction, 1, {uid: "KEEPER"}, {})
    wait(lambda: _relays(node) == [("reported", None)], "and then no longer")
    # The same request once more is reported once more, under the same transaction: our answer may have been lost.
    assert asker.ask(node.port, [uid], transaction_uid=transaction) == (transaction, 0x0000)
    wait(lambda: len(asker.reports) == 3, "told again")
    assert asker.reports[2] == asker.reports[0]
    assert asker.ask(node.port, [generate_uid()], transaction_uid=transaction) == (transaction, 0x0115)
    told = [
        detail for event, detail in node.query("select event, detail from event order by id") if "reported" in event
    ]
    assert told == [f"OPTIMA1: {transaction}, 1 of 1 objects kept by an archive"] * 2


def test_a_request_that_is_none_has_a_status_and_leaves_nothing(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], asker: Camera
) -> None:
    node = _node(make_node, asker, make_archive())
    uid = generate_uid()
    assert asker.ask(node.port, [])[1] == 0x0115
    assert asker.ask(node.port, [uid], action=2)[1] == 0x0123
    assert asker.ask(node.port, [uid], instance="1.2.3")[1] == 0x0112
    assert _relays(node) == []
    stranger = Camera(ae_title="KEEPER")
    _, status = stranger.ask(node.port, [uid])
    assert status == 0x0211, "an archive reports and asks for nothing"
    assert _relays(node) == []


def test_without_the_setting_a_camera_is_offered_no_commitment(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], asker: Camera
) -> None:
    node = make_node(make_archive()).start()
    _, status = asker.ask(node.port, [generate_uid()])
    assert status is None
