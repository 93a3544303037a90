"""Many cameras send at the same moment: each is told Success, or to come again; what was told Success is there."""

import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from copy import deepcopy
from typing import Any

from pydicom import Dataset
from pydicom.uid import generate_uid

from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from tests.hospital.end_to_end.conftest import association_request, store_request

SENDERS, PLACES = 40, 30


def _objects(count: int) -> list[Dataset]:
    (one,) = expose(phantom(1), examination(1), "two_frames")
    objects = [deepcopy(one) for _ in range(count)]
    for ds in objects:
        ds.SOPInstanceUID, ds.StudyInstanceUID = generate_uid(), generate_uid()
    return objects


def test_of_forty_senders_at_once_each_is_stored_or_told_to_come_again(
    make_node: Callable[..., Any], all_at_once: Callable[..., Any]
) -> None:
    node = make_node(timing=f"[receiver]\nmax_associations = {PLACES}\n").start("receive")
    outcomes = Counter(call.outcome for call in all_at_once(node.port, _objects(SENDERS)))
    assert set(outcomes) <= {"status 0000", "transient rejection"}
    assert outcomes["status 0000"] >= PLACES
    assert len(node.rows()) == outcomes["status 0000"]


def test_a_receiver_told_to_stop_under_two_hundred_associations_keeps_its_word_and_ends_in_time(
    make_node: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    """120 say nothing, 40 have sent half an object, 40 send one after the other until they are cut off."""
    places = "[receiver]\nmax_associations = 300\nmax_associations_per_peer = 300\n"
    node = make_node(timing=places).start("receive")
    acknowledged: list[str] = []
    under_way = threading.Barrier(41)

    def connected() -> socket.socket:
        stream = socket.create_connection(("127.0.0.1", node.port), timeout=60)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.sendall(association_request(str(ds.SOPClassUID)))
        assert stream.recv(4096)[:1] == b"\x02"
        return stream

    def send(stream: socket.socket, objects: list[Dataset]) -> None:
        under_way.wait()
        with suppress(OSError):
            for one in objects:
                stream.sendall(store_request(one))
                said = stream.recv(4096)
                at = said.find(struct.pack("<HHI", 0, 0x0900, 2))
                if said[:1] != b"\x04" or at < 0:
                    return  # an abort, or the end
                assert said[at + 8 : at + 10] == b"\0\0"
                acknowledged.append(str(one.SOPInstanceUID))

    (ds,) = _objects(1)
    with ExitStack() as lines:
        silent = [lines.enter_context(connected()) for _ in range(120)]
        halfway = [lines.enter_context(connected()) for _ in range(40)]
        for stream in halfway:
            stream.sendall(store_request(ds)[:100_000])
        senders = [
            threading.Thread(target=send, args=(lines.enter_context(connected()), _objects(20))) for _ in range(40)
        ]
        for sender in senders:
            sender.start()
        under_way.wait()
        wait(lambda: len(acknowledged) >= 40, "they are being served")
        process = node.processes["receive"]
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        took_s = time.monotonic() - began
        for sender in senders:
            sender.join()
        for stream in (*silent, *halfway):
            with suppress(ConnectionError):
                while stream.recv(4096):
                    pass
    assert took_s < 15
    known = {uid for (uid,) in node.query("select sop_instance_uid from instance")}
    assert len(acknowledged) < 800, "all were through before the signal came"
    assert set(acknowledged) <= known
    assert str(ds.SOPInstanceUID) not in known, "half an object was taken for one"
    kept = {path.stem for path in (node.directory / "var" / "spool" / "objects").rglob("*.dcm")}
    assert {digest for (digest,) in node.query("select sha256 from instance")} <= kept
    assert not list((node.directory / "var" / "spool" / "incoming").iterdir())
