"""The receiver on a real socket, with a real worklist and a real spool: Success is true, everything else is refused."""

import hashlib
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    NuclearMedicineImageStorage,
    PositronEmissionTomographyImageStorage,
)
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode
from sqlalchemy import Engine

from dicom_node import journal, receiver, spool, worklist
from dicom_node.errors import RemnantError
from dicom_node.receiver import Receiver, refusal
from dicom_node.settings import Settings, Source
from dicom_node.spool import Spool
from dicom_node.transport import C_STORE_RQ, Peer, Request
from dicom_node.transport.connection import _plain
from dicom_node.wake import Bell
from pipeline.camera import examination, expose, foreign
from pipeline.phantom import phantom
from pipeline.views import HeaderFacts, early_facts, header_facts

VERIFICATION = "1.2.840.10008.1.1"
CAMERA = {"ae_title": "OPTIMA1", "hosts": ["127.0.0.1"]}

# pynetdicom drops the socket of a rejected association without closing it; Python's reference count does.
rejected = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def until(look: Callable[[], bool], limit_s: float = 20.0) -> bool:
    deadline = time.monotonic() + limit_s
    pause = threading.Event()
    while not look():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.01)
    return True


@dataclass
class House:
    """A receiver that listens, and everything it writes to."""

    directory: Path
    engine: Engine
    store: Spool
    bell: Bell
    receiver: Receiver
    port: int = 0
    open: list[Association] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        return sorted(worklist.rows(self.engine), key=lambda row: row["id"])

    def kept(self) -> list[Path]:
        """Every file of an object in the spool, whole or half written."""
        files = (path for path in (self.directory / "spool").rglob("*") if path.is_file())
        return sorted(path for path in files if path.parent != self.store.journal)

    def instances(self) -> list[dict[str, Any]]:
        return [one for row in self.rows() for one in worklist.details(self.engine, row["id"])["instances"]]

    def associate(self, *classes: str, calling: str = "OPTIMA1", called: str = "REMNANT") -> Association:
        ae = AE(ae_title=calling)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
        for uid in classes or (NuclearMedicineImageStorage, CTImageStorage, VERIFICATION):
            ae.add_requested_context(uid, ExplicitVRLittleEndian)
        assoc = ae.associate("127.0.0.1", self.port, ae_title=called)
        self.open.append(assoc)
        return assoc

    def put(self, sop_class_uid: str, sop_instance_uid: str, data: bytes, context: str = "") -> int:
        """Send bytes under any command, as no sensible camera would; return the status."""
        assoc = self.associate()
        assert assoc.is_established
        (cx,) = [one for one in assoc.accepted_contexts if one.abstract_syntax == (context or sop_class_uid)]
        request = C_STORE()
        request.MessageID = 1
        request.AffectedSOPClassUID = sop_class_uid
        request.AffectedSOPInstanceUID = sop_instance_uid
        request.Priority = 2
        request.DataSet = BytesIO(data)
        # The library's own thread would take the response for a request of the peer: it has to rest meanwhile.
        assoc._reactor_checkpoint.clear()
        assert until(lambda: assoc._is_paused)
        assoc.dimse.send_msg(request, cast(int, cx.context_id))
        _, response = assoc.dimse.get_msg(block=True)
        assoc._reactor_checkpoint.set()
        assoc.release()
        assert response is not None
        return int(response.Status)

    def store_object(self, ds: Dataset) -> int:
        return self.put(str(ds.SOPClassUID), str(ds.SOPInstanceUID), encoded(ds))


def encoded(ds: Dataset) -> bytes:
    """The dataset as a camera puts it on the wire."""
    data = encode(ds, is_implicit_vr=False, is_little_endian=True)
    assert data is not None
    return data


@contextmanager
def listening(directory: Path, **changed: dict[str, Any]) -> Iterator[House]:
    sections: dict[str, Any] = {
        "node": {"host": "127.0.0.1", "port": 0},
        "storage": {"directory": str(directory), "min_free": 0},
        "sources": [CAMERA],
    }
    settings = Settings.model_validate(sections | changed)
    store = spool.open_spool(directory, int(settings.storage.min_free))
    engine = worklist.open_worklist(settings.database_url, busy_timeout_s=settings.database.busy_timeout_s)
    worklist.upgrade(engine)
    bell = Bell(store.run / "worker.bell")
    house = House(directory, engine, store, bell, Receiver(settings, engine, store, bell))
    _, house.port = house.receiver.start()
    try:
        yield house
    finally:
        for assoc in house.open:
            if assoc.is_established:
                assoc.abort()
        house.receiver.stop()
        engine.dispose()
        bell.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with listening(tmp_path / "var") as opened:
        yield opened


@pytest.fixture(scope="module")
def scan() -> Dataset:
    """A simulated examination as one object with both views."""
    (ds,) = expose(phantom(1, residual=True), examination(1), "two_frames")
    return ds


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_an_echo_is_answered(house: House) -> None:
    assoc = house.associate(VERIFICATION)
    assert assoc.send_c_echo().Status == 0x0000
    assoc.release()


def test_success_means_the_very_bytes_are_kept_and_the_worker_is_called(house: House, scan: Dataset) -> None:
    sent = encoded(scan)
    assert house.store_object(scan) == 0x0000
    (row,), (instance,), (file,) = house.rows(), house.instances(), house.kept()
    assert (row["state"], row["views"], row["revision"]) == ("queued", "anterior,posterior", 1)
    assert (row["patient_id"], row["accession_number"]) == (scan.PatientID, scan.AccessionNumber)
    assert (row["study_instance_uid"], row["source_aet"]) == (scan.StudyInstanceUID, "OPTIMA1")
    assert instance["sha256"] == hashlib.sha256(sent).hexdigest()
    assert file == house.store.objects / instance["spool_name"]
    assert file.read_bytes().endswith(sent)
    assert house.bell.wait(0)


def test_what_is_kept_is_a_file_that_any_dicom_tool_reads(house: House, scan: Dataset) -> None:
    assert house.store_object(scan) == 0x0000
    kept = dcmread(house.kept()[0])
    assert kept.file_meta.MediaStorageSOPInstanceUID == scan.SOPInstanceUID
    assert kept.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert kept.PixelData == scan.PixelData


def test_a_view_alone_waits_and_does_not_call_the_worker(house: House) -> None:
    anterior, posterior = expose(phantom(2), examination(2), "two_objects")
    assert house.store_object(anterior) == 0x0000
    assert [row["state"] for row in house.rows()] == ["receiving"]
    assert not house.bell.wait(0)
    assert house.store_object(posterior) == 0x0000
    assert [row["state"] for row in house.rows()] == ["queued"]
    assert house.bell.wait(0)


def test_the_same_object_twice_is_one_row_and_one_instance(house: House, scan: Dataset) -> None:
    assert house.store_object(scan) == house.store_object(scan) == 0x0000
    assert (len(house.rows()), len(house.instances()), len(house.kept())) == (1, 1, 1)


def test_an_object_of_a_burst_that_cannot_get_its_name_has_no_row_and_is_taken_when_it_comes_again(
    house: House, scan: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is given within the row's transaction: a row without a file would be a scan that nobody can read."""
    monkeypatch.setattr(journal, "BURST_OBJECTS", 1)
    assert house.store_object(foreign("ct_slice", examination(3))) == 0x0000
    kept = house.receiver._journal
    assert until(lambda: kept is not None and kept._active is not None)
    before = house.kept()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(spool.Begun, "shelve", refuse)
        assert house.store_object(scan) == 0xA700
    assert (len(house.rows()), house.kept()) == (1, before)
    assert house.store_object(scan) == 0x0000
    assert (len(house.rows()), len(house.kept())) == (2, len(before) + 1)


def test_other_bytes_under_the_same_uid_are_kept_beside_the_first(house: House, scan: Dataset) -> None:
    assert house.store_object(scan) == 0x0000
    data = encoded(scan).replace(b"simulated", b"SIMULATED")
    assert house.put(str(scan.SOPClassUID), str(scan.SOPInstanceUID), data) == 0x0000
    (row,), instances = house.rows(), house.instances()
    assert [(one["version"], one["verdict"]) for one in instances] == [(1, None), (2, "pending")]
    assert row["revision"] == 1
    assert len(house.kept()) == 2
    for one in instances:
        assert (house.store.objects / one["spool_name"]).exists()


def test_a_ct_slice_is_kept_and_declined_so_that_the_cameras_queue_goes_on(house: House) -> None:
    assert house.store_object(foreign("ct_slice", examination(3))) == 0x0000
    (row,) = house.rows()
    assert (row["state"], row["outcome"], row["reason"]) == ("declined", "declined", "wrong_class")
    assert len(house.kept()) == 1
    assert not house.bell.wait(0)


def test_a_scan_whose_rest_cannot_be_read_is_kept_for_the_worker_to_decide(house: House, scan: Dataset) -> None:
    data = encoded(scan)
    assert house.put(str(scan.SOPClassUID), str(scan.SOPInstanceUID), data[: len(data) // 2]) == 0x0000
    assert len(house.rows()) == len(house.kept()) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("uid", ["../../x", "1.2.840/../../x", "1..2", "1.02.3", "1.2.3.", "1.2.3\n4", "/etc/passwd"])
def test_a_uid_that_is_none_is_refused_and_nothing_is_written_anywhere(
    house: House, scan: Dataset, uid: str, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if not path.name.startswith("worklist.db")}
    data = encoded(scan)
    assert house.put(str(scan.SOPClassUID), uid, data) == 0xC000
    assert {path for path in tmp_path.rglob("*") if not path.name.startswith("worklist.db")} == before
    assert house.rows() == house.kept() == []


def test_a_path_as_uid_within_the_dataset_is_refused_too(house: House, scan: Dataset) -> None:
    uid = str(scan.SOPInstanceUID)
    evil = ("../" * 40)[: len(uid)].encode()
    data = encoded(scan).replace(uid.encode(), evil)
    assert evil in data
    assert house.put(str(scan.SOPClassUID), uid, data) == 0xC000
    assert house.rows() == house.kept() == []


def test_command_and_dataset_that_disagree_on_the_instance_are_refused(house: House, scan: Dataset) -> None:
    assert house.put(str(scan.SOPClassUID), "1.2.3.4", encoded(scan)) == 0xA900
    assert house.rows() == house.kept() == []


def test_command_and_dataset_that_disagree_on_the_class_are_refused(house: House, scan: Dataset) -> None:
    assert house.put(CTImageStorage, str(scan.SOPInstanceUID), encoded(scan)) == 0xA900
    assert house.rows() == house.kept() == []


@pytest.mark.parametrize(
    "data",
    [b"not a dataset at all", b"\xff" * 5000, b"\x08\x00\x16\x00UI\xff\xff"],
    ids=["text", "bytes", "cut within an element"],
)
def test_what_is_no_dataset_is_refused(house: House, scan: Dataset, data: bytes) -> None:
    assert house.put(str(scan.SOPClassUID), str(scan.SOPInstanceUID), data) == 0xC000
    assert house.rows() == house.kept() == []


@contextmanager
def arriving(house: House, ds: Dataset, **named: str) -> Iterator[Any]:
    """What the receiver makes of an object while it comes, by itself."""
    named = {"sop_class_uid": str(ds.SOPClassUID), "sop_instance_uid": str(ds.SOPInstanceUID)} | named
    request = Request(
        peer=Peer("127.0.0.1", "OPTIMA1", "REMNANT"),
        abstract_syntax_uid=str(ds.SOPClassUID),
        transfer_syntax_uid=str(ExplicitVRLittleEndian),
        data=b"",
        excess="",
        **named,
    )
    begun = house.receiver._server.service.drafts[C_STORE_RQ](request)  # type: ignore[union-attr] # it was started
    yield begun
    begun.drop()


@pytest.mark.parametrize("size", [16_378, 131_072], ids=str)
def test_an_object_is_written_while_it_comes_and_nothing_stays_of_one_that_does_not_come_whole(
    house: House, scan: Dataset, size: int
) -> None:
    data = memoryview(encoded(scan))
    with arriving(house, scan) as half:
        for at in range(0, 200_000, size):
            half.add(data[at : at + size])
        (file,) = house.kept()
        assert 100_000 < file.stat().st_size < len(data)
    assert house.kept() == []


@pytest.mark.parametrize("wrong", [{"sop_instance_uid": "1.2.3"}, {"sop_class_uid": "1.2.3"}, {"sop_class_uid": "x"}])
def test_of_an_object_that_will_be_refused_nothing_is_written_early(
    house: House, scan: Dataset, wrong: dict[str, str]
) -> None:
    with arriving(house, scan, **wrong) as doubtful:
        doubtful.add(memoryview(encoded(scan))[:200_000])
        assert house.kept() == []


def test_a_header_in_single_bytes_is_not_read_for_each_of_them(
    house: House, scan: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look(beginning: bytes, syntax: str) -> HeaderFacts | None:
        looks.append(len(beginning))
        return early_facts(beginning, syntax)

    monkeypatch.setattr(receiver, "early_facts", look)
    data = memoryview(encoded(scan))
    with arriving(house, scan) as slow:
        for at in range(20_000):
            slow.add(data[at : at + 1])
        assert slow.facts == header_facts(bytes(data[: 256 * 1024]), str(ExplicitVRLittleEndian))
    assert len(looks) < 20


def test_a_fault_before_the_end_of_an_object_costs_nothing_but_time(
    house: House, scan: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "early_facts", lambda *_: 1 / 0)
    assert house.store_object(scan) == 0x0000
    assert len(house.kept()) == len(house.rows()) == 1


def test_below_the_reserve_nothing_is_written_and_the_camera_is_told_to_try_again(
    tmp_path: Path, scan: Dataset
) -> None:
    storage = {"directory": str(tmp_path / "var"), "min_free": "1000000 TiB"}
    with listening(tmp_path / "var", storage=storage) as full:
        assert full.store_object(scan) == 0xA700
        assert full.rows() == full.kept() == []


def test_a_locked_database_costs_a_try_again_and_nothing_is_lost(tmp_path: Path, scan: Dataset) -> None:
    with listening(tmp_path / "var", database={"busy_timeout_s": 0.2}) as house:
        with closing(sqlite3.connect(tmp_path / "var" / "worklist.db", isolation_level=None)) as admin:
            admin.execute("BEGIN IMMEDIATE")
            assert house.store_object(scan) == 0xA700
            assert house.rows() == []
            admin.execute("ROLLBACK")
        assert house.store_object(scan) == 0x0000
        assert [row["state"] for row in house.rows()] == ["queued"]
        assert len(house.kept()) == 1


def test_an_open_reader_costs_nothing(house: House, scan: Dataset) -> None:
    with closing(sqlite3.connect(house.directory / "worklist.db", isolation_level=None)) as admin:
        admin.execute("BEGIN")
        assert admin.execute("SELECT count(*) FROM worklist").fetchone() == (0,)
        assert house.store_object(scan) == 0x0000
        assert admin.execute("SELECT count(*) FROM worklist").fetchone() == (0,)
        admin.execute("COMMIT")
        assert admin.execute("SELECT count(*) FROM worklist").fetchone() == (1,)


def test_a_fault_of_ours_is_a_status_and_the_association_goes_on(
    house: House, scan: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(worklist, "receive", lambda *_, **__: 1 / 0)
        assert house.store_object(scan) == 0x0110
    assert house.store_object(scan) == 0x0000


# --- who is admitted --------------------------------------------------------------------------------------------------


@rejected
@pytest.mark.parametrize(
    ("names", "diagnostic"),
    [({"called": "SOMEBODY"}, 7), ({"calling": "STRANGER"}, 3), ({"calling": "optima1"}, 3)],
    ids=["another called AE title", "another calling AE title", "case matters"],
)
def test_who_calls_by_the_wrong_name_is_rejected_for_good(house: House, names: dict[str, str], diagnostic: int) -> None:
    assoc = house.associate(**names)
    assert assoc.is_rejected
    answer = assoc.acceptor.primitive
    assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, diagnostic)


@rejected
def test_who_calls_from_another_address_is_rejected(tmp_path: Path) -> None:
    with listening(tmp_path / "var", sources=[CAMERA | {"hosts": ["10.0.0.12"]}]) as house:
        assert house.associate().is_rejected


def test_without_a_source_this_machine_may_send_under_any_name(tmp_path: Path, scan: Dataset) -> None:
    with listening(tmp_path / "var", sources=[]) as house:
        assoc = house.associate(VERIFICATION, calling="ANYBODY")
        assert assoc.send_c_echo().Status == 0x0000


@rejected
def test_one_association_too_many_is_rejected_as_transient_and_fits_later(tmp_path: Path) -> None:
    with listening(tmp_path / "var", receiver={"max_associations": 2}) as house:
        first, second, third = house.associate(), house.associate(), house.associate()
        assert (first.is_established, second.is_established) == (True, True)
        assert third.is_rejected
        answer = third.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)
        first.release()
        assert until(lambda: house.associate().is_established)


def test_a_hundred_cameras_may_send_at_the_same_time(house: House) -> None:
    """Plain sockets: a hundred of the library's own callers would keep this machine busy with themselves."""
    with ExitStack() as lines:
        cameras = [
            lines.enter_context(closing(socket.create_connection(("127.0.0.1", house.port), timeout=60)))
            for _ in range(100)
        ]
        for camera in cameras:
            camera.sendall(association_request("OPTIMA1", "REMNANT"))
        assert {camera.recv(1) for camera in cameras} == {b"\x02"}  # A-ASSOCIATE-AC, PS3.8 9.3.3


def association_request(calling: str, called: str) -> bytes:
    """An A-ASSOCIATE-RQ for Verification (PS3.8 9.3.2)."""

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(content)) + content

    syntaxes = item(0x30, VERIFICATION.encode()) + item(0x40, ImplicitVRLittleEndian.encode())
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4")
    items = (
        item(0x10, b"1.2.840.10008.3.1.1.1")
        + item(0x20, struct.pack(">BBBB", 1, 0, 0, 0) + syntaxes)
        + item(0x50, user)
    )
    names = called.ljust(16).encode() + calling.ljust(16).encode()
    content = struct.pack(">HH", 1, 0) + names + bytes(32) + items
    return struct.pack(">BBI", 1, 0, len(content)) + content


def test_a_class_that_is_not_ours_is_rejected_and_the_others_of_the_association_are_not(house: House) -> None:
    assoc = house.associate(PositronEmissionTomographyImageStorage, NuclearMedicineImageStorage)
    assert [cx.abstract_syntax for cx in assoc.rejected_contexts] == [PositronEmissionTomographyImageStorage]
    assert [cx.abstract_syntax for cx in assoc.accepted_contexts] == [NuclearMedicineImageStorage]


def test_a_class_becomes_ours_by_setting(tmp_path: Path) -> None:
    extra = {"extra_classes": ["PositronEmissionTomographyImageStorage"]}
    with listening(tmp_path / "var", receiver=extra) as house:
        assert house.associate(PositronEmissionTomographyImageStorage).accepted_contexts


def test_who_says_nothing_for_too_long_is_cut(tmp_path: Path) -> None:
    with listening(tmp_path / "var", receiver={"idle_timeout_s": 0.5}) as house:
        assoc = house.associate()
        assert assoc.is_established
        assert until(lambda: assoc.is_aborted)


def test_a_port_that_is_taken_is_one_sentence(house: House, tmp_path: Path) -> None:
    settings = Settings.model_validate({"node": {"host": "127.0.0.1", "port": house.port}})
    again = Receiver(settings, house.engine, house.store, house.bell)
    with pytest.raises(RemnantError, match=rf"cannot listen on 127\.0\.0\.1 port {house.port}: .*\[node\] port"):
        again.start()


def sources(*hosts: str) -> tuple[Source, ...]:
    return (Source(ae_title="OPTIMA1", hosts=hosts),)


@pytest.mark.parametrize(
    ("configured", "calling", "address", "expected"),
    [
        (sources(), "OPTIMA1", "203.0.113.9", True),
        (sources(), "OTHER", "203.0.113.9", False),
        (sources("10.0.0.12"), "OPTIMA1", "10.0.0.12", True),
        (sources("10.0.0.12"), "OPTIMA1", "10.0.0.13", False),
        (sources("10.0.0.12"), "OTHER", "10.0.0.12", False),
        (sources("10.0.0.0/24"), "OPTIMA1", "10.0.0.200", True),
        (sources("10.0.0.0/24"), "OPTIMA1", "10.0.1.1", False),
        (sources("10.0.0.12/24"), "OPTIMA1", "10.0.0.200", True),
        (sources("10.0.0.0/24", "192.0.2.1"), "OPTIMA1", "192.0.2.1", True),
        (sources("10.0.0.12"), "OPTIMA1", "::ffff:10.0.0.12", True),
        (sources("10.0.0.12"), "OPTIMA1", "::ffff:10.0.0.13", False),
        (sources("2001:db8::/32"), "OPTIMA1", "2001:db8::7", True),
        (sources("2001:db8::/32"), "OPTIMA1", "10.0.0.12", False),
        (sources("fe80::/10"), "OPTIMA1", "fe80::1%eth0", True),
        ((*sources("10.0.0.12"), *sources("10.0.0.13")), "OPTIMA1", "10.0.0.13", True),
        ((), "ANYBODY", "127.0.0.1", True),
        ((), "ANYBODY", "::1", True),
        ((), "ANYBODY", "::ffff:127.0.0.1", True),
        ((), "ANYBODY", "10.0.0.12", False),
    ],
)
def test_a_peer_is_admitted_by_name_and_address(
    configured: tuple[Source, ...], calling: str, address: str, expected: bool
) -> None:
    assert (refusal(configured, Peer(_plain(address), calling, "REMNANT")) is None) is expected


# --- a process of its own ---------------------------------------------------------------------------------------------

WHAT_RECEIVE_LOADS = """
import sys
from dicom_node.role import spare
spare("receive")
import dicom_node.service, dicom_node.receiver, dicom_node.wake
heavy = {"torch", "torchvision", "cv2", "highdicom", "models", "numpy", "PIL", "typer", "rich", "alembic"}
print(sorted(heavy & {name.split(".")[0] for name, module in sys.modules.items() if module is not None}))
"""


def test_what_receive_loads_holds_neither_torch_nor_cv2_nor_highdicom() -> None:
    """A crash in inference cannot stop reception, and the receiver is there at once."""
    done = subprocess.run([sys.executable, "-c", WHAT_RECEIVE_LOADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
