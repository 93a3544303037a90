"""The bounds on pynetdicom's upper layer hold, and the private parts that they rest on are where we think they are."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from dicom_node import transport

VERIFICATION = "1.2.840.10008.1.1"
A_ASSOCIATE_RQ, P_DATA_TF = 0x01, 0x04
TOO_LONG = [transport._PDU_LIMIT + 1, 0xFFFF_FFFF]
THREE_BYTES = b"\x01\x00\x00"
A_QUARTER = struct.pack(">BBL", A_ASSOCIATE_RQ, 0, 200) + b"\0" * 50


class Server:
    """A node's listening side that answers C-ECHO, and what it saw."""

    def __init__(self, acse_timeout_s: float = 30) -> None:
        self.contexts = [build_context(VERIFICATION)]
        self.opened: list[Association] = []
        self.ae = AE(ae_title="REMNANT")
        self.ae.network_timeout = self.ae.dimse_timeout = 30
        self.ae.acse_timeout = acse_timeout_s
        handlers = [(evt.EVT_CONN_OPEN, lambda event: self.opened.append(event.assoc)), (evt.EVT_C_ECHO, lambda _: 0)]
        self.server = transport.listen(self.ae, ("127.0.0.1", 0), self.contexts, handlers)
        self.port = int(self.server.server_address[1])

    def stop(self) -> None:
        self.server.shutdown()
        for assoc in self.opened:
            assoc.kill()


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


@pytest.fixture
def hasty_server() -> Iterator[Server]:
    """One that gives a connection a second to become an association; the receiver gives it 15."""
    started = Server(acse_timeout_s=1)
    yield started
    started.stop()


def until(look: Callable[[], bool], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    pause = threading.Event()
    while not look():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.01)
    return True


def echo(port: int) -> int:
    ae = AE(ae_title="CAMERA")
    ae.add_requested_context(VERIFICATION)
    assoc = ae.associate("127.0.0.1", port, ae_title="REMNANT")
    assert assoc.is_established
    status = int(assoc.send_c_echo().Status)
    assoc.release()
    return status


def what_comes_before_the_line_is_cut(stream: socket.socket) -> bytes:
    came = b""
    with suppress(ConnectionResetError):
        while data := stream.recv(4096):
            came += data
    return came


def test_the_parts_of_pynetdicom_that_we_hold_on_to_are_there(server: Server) -> None:
    """`transport` replaces three private parts; a new version that moved one must fail here, not in a hospital."""
    assert issubclass(transport._BoundedSocket, AssociationSocket)
    assert AssociationSocket.recv is not transport._BoundedSocket.recv
    assert callable(RequestHandler._create_association)
    assert isinstance(server.server, ThreadedAssociationServer)
    assert server.ae._servers == [server.server]
    assert echo(server.port) == 0
    (assoc,) = server.opened
    assert type(assoc.dul.socket) is transport._BoundedSocket
    assert [cx.abstract_syntax for cx in assoc.acceptor.supported_contexts] == [VERIFICATION]
    assert assoc.acceptor.maximum_length == transport.MAXIMUM_PDU_SIZE


def test_the_presentation_contexts_are_not_copied_for_each_connection(server: Server) -> None:
    assert echo(server.port) == echo(server.port) == 0
    first, second = server.opened
    assert first.acceptor.supported_contexts[0] is second.acceptor.supported_contexts[0] is server.contexts[0]


def test_answers_are_not_held_back_to_be_sent_with_more(server: Server) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port))):
        assert until(lambda: bool(server.opened))
        assert server.opened[0].dul.socket.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("length", TOO_LONG)
def test_a_pdu_that_says_it_is_too_long_is_cut_without_reading_it(server: Server, length: int) -> None:
    """The length is believed by nobody: no memory is taken for it, and the rest is not waited for."""
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as peer:
        peer.sendall(struct.pack(">BBL", A_ASSOCIATE_RQ, 0, length))
        assert what_comes_before_the_line_is_cut(peer) == b""
    assert echo(server.port) == 0


@pytest.mark.parametrize("sent", [THREE_BYTES, A_QUARTER], ids=["three bytes", "a header and a quarter"])
def test_a_peer_that_sends_part_of_a_pdu_and_waits_is_cut(
    server: Server, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_PDU_DEADLINE_S", 0.3)
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as peer:
        peer.sendall(sent)
        assert what_comes_before_the_line_is_cut(peer) == b""


@pytest.mark.parametrize(
    "sent",
    [b"", THREE_BYTES, A_QUARTER, struct.pack(">BBL", A_ASSOCIATE_RQ, 0, TOO_LONG[0])],
    ids=["nothing", "three bytes", "a header and a quarter", "too long"],
)
def test_no_slot_is_held_by_who_never_asks_for_an_association(
    hasty_server: Server, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_PDU_DEADLINE_S", 0.3)
    with closing(socket.create_connection(("127.0.0.1", hasty_server.port), timeout=10)) as peer:
        peer.sendall(sent)
        assert what_comes_before_the_line_is_cut(peer) == b""
        assert until(lambda: bool(hasty_server.opened) and not hasty_server.ae.active_associations)


def test_a_peer_that_drips_bytes_is_cut_at_the_same_deadline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for the whole PDU: a byte now and then does not move it."""
    monkeypatch.setattr(transport, "_PDU_DEADLINE_S", 0.5)
    stop = threading.Event()
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as peer:

        def drip() -> None:
            with suppress(OSError):
                peer.sendall(struct.pack(">BBL", A_ASSOCIATE_RQ, 0, 10_000))
                while not stop.wait(0.05):
                    peer.sendall(b"\0")

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert what_comes_before_the_line_is_cut(peer) == b""
        stop.set()
        dripping.join()


def test_a_peer_that_closes_within_a_pdu_costs_nothing(server: Server) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port))) as peer:
        peer.sendall(struct.pack(">BBL", P_DATA_TF, 0, 100) + b"\0" * 10)
    assert until(lambda: bool(server.opened))
    assert echo(server.port) == 0


def test_the_socket_has_its_own_timeout_back_after_each_read(server: Server) -> None:
    here, there = socket.socketpair()
    with closing(here), closing(there):
        here.settimeout(7)
        bounded = object.__new__(transport._BoundedSocket)
        bounded.socket = here
        there.sendall(b"abcdef")
        assert bytes(bounded.recv(6)) == b"abcdef"
        assert here.gettimeout() == 7
        there.sendall(b"xy")
        there.shutdown(socket.SHUT_WR)
        assert bytes(bounded.recv(6)) == b"xy"


def test_the_listening_queue_takes_a_burst_of_cameras(server: Server) -> None:
    info = server.server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    # Linux gives a listening socket's backlog in tcpi_sacked, which follows 8 single bytes and 5 numbers.
    assert struct.unpack_from("@I", info, 8 + 5 * 4) == (128,)


def test_an_address_that_is_taken_is_an_error_at_once(server: Server) -> None:
    with pytest.raises(OSError, match="in use"):
        transport.listen(AE(), ("127.0.0.1", server.port), [], [])
