"""Archives that are away, slow, or refuse a class; and what the row says then."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage
from pynetdicom import AE, evt

from dicom_node import contexts
from dicom_node.archive import Archive
from pipeline.camera import examination, expose
from pipeline.phantom import phantom


def _scan(seed: int) -> tuple[Dataset, ...]:
    return expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), "two_frames")


class Choosy:
    """An archive that takes only Secondary Captures."""

    ae_title = "CHOOSY"

    def __init__(self) -> None:
        self.classes: list[str] = []
        ae = AE(ae_title=self.ae_title)
        ae.add_supported_context(SecondaryCaptureImageStorage)
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])
        self.port = self._server.server_address[1]

    def _store(self, event: evt.Event) -> int:
        self.classes.append(str(event.request.AffectedSOPClassUID))
        return 0x0000

    def stop(self) -> None:
        self._server.shutdown()


@pytest.fixture
def choosy() -> Iterator[Choosy]:
    archive = Choosy()
    yield archive
    archive.stop()


@pytest.fixture
def silent() -> Iterator[Any]:
    """A host that accepts connections and never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))

    class Silent:
        ae_title = "SILENT"
        port = listener.getsockname()[1]

    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield Silent
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    for connection in held:
        connection.close()


def test_a_pacs_that_was_away_gets_the_results_when_it_is_back_without_anyones_help(
    make_node: Callable[..., Any],
    start_orthanc: Callable[..., Any],
    camera: Callable[..., None],
    wait: Callable[..., Any],
) -> None:
    orthanc = start_orthanc(ae_title="AWAY")
    node = make_node(orthanc).start()
    orthanc.stop()
    scan = _scan(800)
    camera(node.port, scan)
    wait(lambda: node.query("select 1 from delivery where attempts >= 2"), "two tries")
    (row,) = node.rows()
    assert row["state"] == "sending"
    assert json.loads(row["delivered_to"]) == {"pacs0": "pending"}
    assert "no connection" in row["last_error"]
    orthanc.start()
    node.wait_for_rows(1, ("delivered",))
    assert len(orthanc.find(str(scan[0].StudyInstanceUID))) == 2


def test_a_pacs_that_refuses_every_report_has_the_result_in_the_picture_and_the_row_says_so(
    make_node: Callable[..., Any], choosy: Choosy, camera: Callable[..., None]
) -> None:
    node = make_node(choosy).start()
    camera(node.port, _scan(801))
    (row,) = node.wait_for_rows(1, ("delivered",))
    assert choosy.classes == [SecondaryCaptureImageStorage]
    assert row["outcome"] == "analysed"
    assert row["finding"] == "present"
    assert json.loads(row["delivered_to"]) == {"pacs0": "acknowledged"}
    assert "Secondary Capture Image Storage goes instead" in row["last_error"]
    refused = node.query(
        "select r.sop_class_uid from delivery d join result r on r.id = d.result_id where d.state = 'cancelled'"
        " order by d.id"
    )
    assert [uid for (uid,) in refused] == [one.uid for one in contexts.REPORT_CHAIN]
    assert node.log.count("goes_instead") == len(contexts.REPORT_CHAIN)


def test_a_silent_destination_delays_no_other(
    make_node: Callable[..., Any], silent: Any, camera: Callable[..., None], wait: Callable[..., Any], tmp_path: Any
) -> None:
    archive = Archive(tmp_path / "archive")
    archive.start()
    try:
        node = make_node(silent, archive).start()
        for seed in range(810, 813):
            camera(node.port, _scan(seed))
            wait(lambda: len(archive.objects()) % 2 == 0 and len(archive.objects()) > 0, "two more objects")
        wait(lambda: len(archive.objects()) == 6, "all results in the good archive")

        def delivered_to() -> list[dict[str, str]]:
            return [json.loads(row["delivered_to"]) for row in node.wait_for_rows(3, ("sending",))]

        wait(lambda: delivered_to() == [{"pacs0": "pending", "pacs1": "acknowledged"}] * 3, "one has all, one nothing")
    finally:
        archive.stop()


def test_a_delivery_that_failed_for_too_long_is_given_up_and_asks_for_a_person(
    make_node: Callable[..., Any], camera: Callable[..., None]
) -> None:
    class Nobody:
        ae_title = "NOBODY"
        port = 9

    node = make_node(Nobody, timing="give_up_after_days = 0.00001\n").start()
    camera(node.port, _scan(820))
    (row,) = node.wait_for_rows(1, ("failed",))
    assert row["outcome"] == "analysed"
    assert json.loads(row["delivered_to"]) == {"pacs0": "given_up"}
