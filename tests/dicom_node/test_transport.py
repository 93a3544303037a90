"""The called side on real sockets: who is slow, silent, wrong or hostile is cut, and others are served meanwhile.

What takes the fixtures `server` and `hasty` holds on a plain port and, within the encryption, on one for TLS.
"""

import random
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from pynetdicom import AE, build_context
from structlog.testing import capture_logs

from dicom_node import tls, transport
from dicom_node.settings import TLS
from dicom_node.transport import C_STORE_RQ, Answer, Door, Limits, Peer, Refusal, Request, Server, Service

VERIFICATION = "1.2.840.10008.1.1"
NM = "1.2.840.10008.5.1.4.1.1.20"
IMPLICIT = "1.2.840.10008.1.2"
REFUSED = Refusal(1, 1, 3, "not one of ours")

# Shortened, so that a test takes less than a second; what they are in earnest stands in `Limits` and the settings.
HASTY = Limits(idle_s=0.8, associations=300, associations_per_peer=300, association_s=0.4, pdu_s=0.4, close_s=0.3)
PATIENT = Limits(idle_s=60, associations=300, associations_per_peer=300, association_s=60, pdu_s=60, close_s=5)


class Desk:
    """What the server under test calls: remembers what it was given, and can be made to take its time."""

    def __init__(self) -> None:
        self.taken: list[Request] = []
        self.drafts: list[Draft] = []
        self.behind: list[str] = []
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def store(self, request: Request) -> Answer:
        self.reached.set()
        assert self.go_on.wait(20)
        self.taken.append(request)
        return Answer(0, lambda: self.behind.append(request.sop_instance_uid))

    def begin(self, request: Request) -> "Draft":
        self.drafts.append(Draft(request))
        return self.drafts[-1]


class Draft:
    """What the server under test lets work on a data set while it comes."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pieces: list[bytes] = []
        self.dropped = 0

    def add(self, piece: memoryview) -> None:
        self.pieces.append(bytes(piece))

    def drop(self) -> None:
        self.dropped += 1


CALLERS: WeakKeyDictionary[Server, ssl.SSLContext] = WeakKeyDictionary()
"""What a peer of a server encrypts with, where that server speaks TLS."""


@pytest.fixture(scope="session", params=["plain", "tls"])
def secured(request: pytest.FixtureRequest) -> TLS | None:
    """Settings of both ends' encryption; they share a certificate here."""
    if request.param == "plain":
        return None
    pair = request.getfixturevalue("authority").sign("BOTH")
    return TLS(certificate=str(pair.certificate), key=str(pair.key), authorities=str(pair.authority))


@contextmanager
def serving(limits: Limits, desk: Desk | None = None, secured: TLS | None = None) -> Iterator[Server]:
    desk = desk or Desk()

    def admit(peer: Peer) -> Refusal | None:
        return REFUSED if peer.calling_ae_title == "STRANGER" else None

    service = Service(
        contexts=[build_context(VERIFICATION), build_context(NM)],
        implementation_class_uid="1.2.3",
        implementation_version_name="TEST",
        limits=limits,
        admit=admit,
        handlers={C_STORE_RQ: desk.store},
        drafts={C_STORE_RQ: desk.begin},
    )
    server = transport.listen([Door(("127.0.0.1", 0), tls.server_context(secured) if secured else None)], service)
    if secured:
        CALLERS[server] = tls.client_context(secured)
    try:
        yield server
    finally:
        server.stop(2)


@pytest.fixture
def server(secured: TLS | None) -> Iterator[Server]:
    with serving(PATIENT, secured=secured) as started:
        yield started


@pytest.fixture
def hasty(secured: TLS | None) -> Iterator[Server]:
    with serving(HASTY, secured=secured) as started:
        yield started


@pytest.fixture
def plain() -> Iterator[Server]:
    with serving(PATIENT) as started:
        yield started


def until(look: Callable[[], bool], limit_s: float = 20.0) -> bool:
    deadline = time.monotonic() + limit_s
    pause = threading.Event()
    while not look():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.01)
    return True


# --- what a peer says -------------------------------------------------------------------------------------------------


def pdu(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBI", kind, 0, len(content)) + content


def item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def association(
    calling: str = "CAMERA", version: int = 1, application: bytes = b"1.2.840.10008.3.1.1.1", maximum: int = 16384
) -> bytes:
    """An A-ASSOCIATE-RQ for Verification (context 1) and NM (context 3): PS3.8 9.3.2."""
    contexts = b"".join(
        item(0x20, struct.pack(">I", number << 24) + item(0x30, uid.encode()) + item(0x40, IMPLICIT.encode()))
        for number, uid in ((1, VERIFICATION), (3, NM))
    )
    user = item(0x50, item(0x51, struct.pack(">I", maximum)) + item(0x52, b"1.2.3.4"))
    names = b"REMNANT".ljust(16) + calling.encode().ljust(16)
    return pdu(1, struct.pack(">HH", version, 0) + names + bytes(32) + item(0x10, application) + contexts + user)


def command(field: int, uid: str = VERIFICATION, *, data: bool = False, instance: str = "") -> bytes:
    values = [(0x0002, uid.encode() + b"\0" * (len(uid) % 2)), (0x0100, struct.pack("<H", field)), (0x0110, b"\7\0")]
    values += [(0x0800, b"\0\0" if data else b"\1\1")]
    values += [(0x1000, instance.encode() + b"\0" * (len(instance) % 2))] if instance else []
    return b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in values)


def values(*pieces: tuple[int, int, bytes]) -> bytes:
    """A P-DATA-TF of (context, control, bytes)."""
    return pdu(4, b"".join(struct.pack(">IBB", len(piece) + 2, cx, control) + piece for cx, control, piece in pieces))


ECHO = values((1, 3, command(0x0030)))
STORE_COMMAND = values((3, 3, command(0x0001, NM, data=True, instance="1.2.3")))
RELEASE = pdu(5, bytes(4))
RELEASED = pdu(6, bytes(4))
ABORT = pdu(7, bytes(4))


class Line:
    """A peer's end of a connection."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream

    def say(self, data: bytes) -> None:
        self.stream.sendall(data)

    def hear(self) -> tuple[int, bytes]:
        """The next PDU: type and content; type 0 where the connection has ended."""
        header = self._read(6)
        if len(header) < 6:
            return 0, header
        return header[0], self._read(int.from_bytes(header[2:], "big"))

    def open(self, **asked: Any) -> "Line":
        self.say(association(**asked))
        assert self.hear()[0] == 2
        return self

    def cut(self) -> bool:
        """Whether the other end closes, with nothing more to say."""
        return self.hear()[0] == 0

    def _read(self, count: int) -> bytes:
        came = b""
        with suppress(ConnectionResetError):
            while len(came) < count and (piece := self.stream.recv(count - len(came))):
                came += piece
        return came


@contextmanager
def line(server: Server) -> Iterator[Line]:
    with closing(socket.create_connection(server.address, timeout=20)) as stream:
        if server not in CALLERS:
            yield Line(stream)
            return
        with closing(CALLERS[server].wrap_socket(stream, server_hostname="127.0.0.1")) as encrypted:
            yield Line(encrypted)


def echo(server: Server) -> bool:
    """Whether an honest peer gets an association, its answer, and its release."""
    with line(server) as honest:
        honest.open().say(ECHO)
        kind, content = honest.hear()
        honest.say(RELEASE)
        return (kind, content[-2:]) == (4, b"\0\0") and honest.hear()[0] == 6


# --- honest peers -----------------------------------------------------------------------------------------------------


def test_pynetdicom_echoes_and_releases(server: Server) -> None:
    ae = AE(ae_title="CAMERA")
    ae.add_requested_context(VERIFICATION)
    called = (CALLERS[server], "127.0.0.1") if server in CALLERS else None
    assoc = ae.associate(*server.address, ae_title="REMNANT", tls_args=called)
    assert [assoc.send_c_echo().Status for _ in range(3)] == [0, 0, 0]
    assoc.release()
    assert assoc.is_released
    assert until(lambda: not server.connections)


def test_dcmtk_echoes_with_every_context_it_has(
    server: Server, secured: TLS | None, peer: Callable[[str], Path]
) -> None:
    command = [str(peer("/usr/bin/echoscu")), "-v", "--propose-pc", "128", "--repeat", "3"]
    if secured:
        command += ["+tls", secured.key, secured.certificate, "+cf", secured.authorities]
    done = subprocess.run(
        [*command, "127.0.0.1", str(server.address[1])], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_data_set_in_many_fragments_comes_whole(secured: TLS | None) -> None:
    desk = Desk()
    data = bytes(range(256)) * 400
    with serving(PATIENT, desk, secured) as server, line(server) as camera:
        camera.open().say(STORE_COMMAND)
        for start in range(0, len(data), 1000):
            last = 2 if start + 1000 >= len(data) else 0
            camera.say(values((3, last, data[start : start + 1000])))
        assert camera.hear()[1][-2 - 8 - 6 : -8 - 6] == b"\0\0"  # Status, before the instance UID
        (request,) = desk.taken
        assert (request.data, request.abstract_syntax_uid, request.transfer_syntax_uid) == (data, NM, IMPLICIT)
        assert replace(request.peer, certificate=None) == Peer("127.0.0.1", "CAMERA", "REMNANT")
        assert (request.peer.certificate is not None) == (secured is not None)
        assert until(lambda: server.memory.taken_bytes == 0)


def test_a_resumed_session_still_says_whose_certificate_it_began_with(authority: Any) -> None:
    pair, desk, session = authority.sign("BOTH"), Desk(), None
    secured = TLS(certificate=str(pair.certificate), key=str(pair.key), authorities=str(pair.authority))
    with serving(PATIENT, desk, secured) as server:
        caller = CALLERS[server]
        caller.maximum_version = ssl.TLSVersion.TLSv1_2  # of 1.3 no session can be resumed: there are no tickets
        for _ in range(2):
            stream = socket.create_connection(server.address, timeout=20)
            with closing(caller.wrap_socket(stream, server_hostname="127.0.0.1", session=session)) as encrypted:
                resumed, session = encrypted.session_reused, encrypted.session
                camera = Line(encrypted).open()
                camera.say(STORE_COMMAND + values((3, 2, b"data")))
                assert camera.hear()[0] == 4
        assert resumed
    first, second = (one.peer.certificate for one in desk.taken)
    assert first == second
    assert first is not None
    assert "both" in first.names


def test_two_messages_in_one_pdu_are_both_answered(server: Server) -> None:
    with line(server) as peer:
        peer.open().say(values((1, 3, command(0x0030)), (1, 3, command(0x0030))))
        assert (peer.hear()[0], peer.hear()[0]) == (4, 4)


def test_a_cancel_has_no_answer_and_an_unknown_operation_has_one(server: Server) -> None:
    with line(server) as peer:
        peer.open().say(values((1, 3, command(0x0FFF))) + values((3, 3, command(0x0020, NM, data=True)), (3, 2, b"x")))
        _, content = peer.hear()
        assert content[-2:] == struct.pack("<H", 0x0211)


def test_answers_are_not_held_back_to_be_sent_with_more(server: Server) -> None:
    with line(server) as peer:
        peer.open()
        (connection,) = server._associations
        assert connection._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_listening_queue_takes_a_burst_of_cameras(server: Server) -> None:
    info = server._listeners[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    # Linux gives a listening socket's backlog in tcpi_sacked, which follows 8 single bytes and 5 numbers.
    assert struct.unpack_from("@I", info, 8 + 5 * 4) == (1024,)


def test_an_address_that_is_taken_is_an_error_at_once(server: Server) -> None:
    with pytest.raises(OSError, match="in use"):
        transport.listen([Door(server.address)], server.service)


# --- rejection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"calling": "STRANGER"}, (1, 1, 3)),
        ({"version": 2}, (1, 2, 2)),
        ({"application": b"1.2.840.10008.3.1.1.2"}, (1, 1, 2)),
    ],
    ids=["not admitted", "another version", "another application"],
)
def test_a_rejection_says_who_and_why(server: Server, asked: dict[str, Any], answer: tuple[int, int, int]) -> None:
    with line(server) as peer:
        peer.say(association(**asked))
        assert peer.hear() == (3, bytes((0, *answer)))
    assert until(lambda: not server.connections)


@pytest.mark.parametrize("bound", ["associations", "associations_per_peer"])
def test_beyond_a_bound_the_rejection_is_transient_and_a_place_is_free_again_after_a_release(bound: str) -> None:
    with serving(replace(PATIENT, **{bound: 2})) as server, line(server) as first, line(server) as second:
        first.open()
        second.open()
        with line(server) as third:
            third.say(association())
            assert third.hear() == (3, bytes((0, 2, 3, 2)))
        first.say(RELEASE)
        assert first.hear()[0] == 6
        assert echo(server)


# --- violations -------------------------------------------------------------------------------------------------------

BY_USER, UNRECOGNISED, UNEXPECTED, INVALID = (0, 0), (2, 1), (2, 2), (2, 6)
GOOD = association()

BEFORE = {
    "text": b"GET / HTTP/1.1\r\nHost: remnant\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
    "type 0": pdu(0, b""),
    "type 8": pdu(8, bytes(4)),
    "an accept": pdu(2, GOOD[6:]),
    "a reject": pdu(3, bytes(4)),
    "data": ECHO,
    "a release": RELEASE,
    "a release answered": RELEASED,
    "nothing in it": pdu(1, b""),
    "only fixed fields": pdu(1, GOOD[6:74]),
    "cut within an item": pdu(1, GOOD[6:-3]),
    "no user information": pdu(1, GOOD[6 : GOOD.index(b"\x50\0", 74)]),
    "512 MiB": struct.pack(">BBI", 1, 0, 512 * 1024**2),
    "4 GiB": struct.pack(">BBI", 1, 0, 0xFFFF_FFFF),
}
WITHIN = {
    "type 9": (pdu(9, bytes(4)), UNRECOGNISED),
    "a second request": (GOOD, UNEXPECTED),
    "an accept": (pdu(2, GOOD[6:]), UNEXPECTED),
    "a reject": (pdu(3, bytes(4)), UNEXPECTED),
    "a release answered": (RELEASED, UNEXPECTED),
    "a release of 5 bytes": (pdu(5, bytes(5)), INVALID),
    "512 MiB": (struct.pack(">BBI", 4, 0, 512 * 1024**2), INVALID),
    "4 GiB": (struct.pack(">BBI", 4, 0, 0xFFFF_FFFF), INVALID),
    "data without a value": (pdu(4, b""), INVALID),
    "a value of no length": (pdu(4, bytes(4)), INVALID),
    "a value of one byte": (pdu(4, struct.pack(">IB", 1, 1)), INVALID),
    "a value beyond its PDU": (pdu(4, struct.pack(">IBB", 100, 1, 3) + b"x"), INVALID),
    "a rest behind the value": (ECHO[:2] + struct.pack(">I", len(ECHO) - 6 + 3) + ECHO[6:] + b"abc", INVALID),
    "a context not agreed on": (values((9, 3, command(0x0030))), BY_USER),
    "data before a command": (values((3, 2, b"data")), BY_USER),
    "a command within data": (STORE_COMMAND + ECHO, BY_USER),
    "two commands": (STORE_COMMAND * 2, BY_USER),
    "a command that is none": (values((1, 3, b"\xff" * 40)), BY_USER),
    "a response to nothing": (values((1, 3, command(0x8030))), BY_USER),
}


def wait_to_read(server: Server, sent: bytes) -> tuple[int, bytes]:
    with line(server) as peer:
        peer.say(sent)
        return peer.hear()


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_no_association_request_is_aborted(server: Server, name: str) -> None:
    """In state 2 the abort names the service user (PS3.8 AA-1). No length is believed, and no rest waited for."""
    assert wait_to_read(server, BEFORE[name]) == (7, bytes((0, 0, *BY_USER)))
    assert echo(server)
    assert until(lambda: not server.connections)


@pytest.mark.parametrize("name", WITHIN)
def test_what_breaks_the_protocol_within_an_association_is_aborted_with_the_reason(server: Server, name: str) -> None:
    sent, reason = WITHIN[name]
    with line(server) as peer:
        peer.open().say(sent)
        assert peer.hear() == (7, bytes((0, 0, *reason)))
    assert echo(server)
    assert until(lambda: not server.connections)


@pytest.mark.parametrize("early", [ECHO, RELEASE, GOOD], ids=["data", "a release", "a second request"])
def test_who_does_not_wait_for_the_answer_is_aborted(plain: Server, early: bytes) -> None:
    """Behind TLS nobody can see that without reading: there the answer goes out, and the early PDU is read then."""
    assert wait_to_read(plain, GOOD + early) == (7, bytes((0, 0, *UNEXPECTED)))


def test_what_comes_behind_a_release_is_dropped(server: Server) -> None:
    with line(server) as peer:
        peer.open().say(RELEASE + RELEASE + ECHO)
        assert peer.hear() == (6, bytes(4))
    assert until(lambda: not server.connections)


@pytest.mark.parametrize("opened", [False, True])
def test_an_abort_is_not_answered(server: Server, opened: bool) -> None:
    with line(server) as peer:
        if opened:
            peer.open()
        peer.say(ABORT)
        assert peer.cut()


# --- the slow and the silent ------------------------------------------------------------------------------------------

PARTS = {"nothing": b"", "three bytes": GOOD[:3], "half a request": GOOD[: len(GOOD) // 2]}


@pytest.mark.parametrize("name", PARTS)
def test_who_never_asks_for_an_association_is_cut(hasty: Server, name: str) -> None:
    with line(hasty) as peer:
        peer.say(PARTS[name])
        assert peer.cut()
    assert until(lambda: not hasty.connections)


@pytest.mark.parametrize("sent", [ECHO[:3], ECHO[:20], STORE_COMMAND + ECHO[:7]])
def test_who_sends_part_of_a_pdu_and_waits_is_aborted(secured: TLS | None, sent: bytes) -> None:
    with serving(replace(HASTY, idle_s=60), secured=secured) as server, line(server) as peer:
        peer.open().say(sent)
        assert peer.hear() == (7, bytes(4))
        assert peer.cut()


@pytest.mark.parametrize("opened", [False, True], ids=["request", "data"])
def test_the_deadline_is_for_the_whole_pdu_and_a_byte_now_and_then_does_not_move_it(
    hasty: Server, opened: bool
) -> None:
    stop = threading.Event()
    with line(hasty) as peer:
        if opened:
            peer.open()

        def drip() -> None:
            with suppress(OSError):
                for byte in struct.pack(">BBI", 4 if opened else 1, 0, 10_000) + bytes(10_000):
                    if stop.wait(0.02):
                        return
                    peer.say(bytes((byte,)))

        dripping = threading.Thread(target=drip)
        dripping.start()
        while peer.hear()[0]:
            pass
        stop.set()
        dripping.join()
    assert until(lambda: not hasty.connections)


def test_an_association_that_says_nothing_is_aborted(hasty: Server) -> None:
    with line(hasty) as peer:
        peer.open()
        assert peer.hear() == (7, bytes(4))


def test_a_peer_that_never_reads_its_answers_is_cut(secured: TLS | None) -> None:
    with serving(replace(PATIENT, send_s=0.3), secured=secured) as server, line(server) as peer:
        peer.open()
        peer.stream.settimeout(0.2)
        with suppress(OSError):
            while True:
                peer.say(ECHO * 1000)
        assert until(lambda: not server.connections)


def test_a_hundred_silent_connections_of_five_kinds_keep_no_honest_one_waiting(server: Server) -> None:
    kinds = [b"", GOOD[:3], GOOD[:100], GOOD, GOOD]
    with ExitStack() as lines:
        for number in range(100):
            peer = lines.enter_context(line(server))
            peer.say(kinds[number % 5])
            if number % 5 > 2:
                assert peer.hear()[0] == 2
                peer.say(ECHO[:4] if number % 5 == 3 else STORE_COMMAND)
        for _ in range(5):
            assert echo(server)
        assert (server.associations, server.connections) == (40, 100) or until(lambda: server.connections == 100)
    assert until(lambda: not server.connections)


def test_more_silent_connections_than_may_wait_make_room_for_an_honest_one(secured: TLS | None) -> None:
    with serving(replace(PATIENT, waiting=20), secured=secured) as server, ExitStack() as lines:
        silent = [lines.enter_context(line(server)) for _ in range(60)]
        assert echo(server)
        assert silent[0].cut()
        assert server.connections <= 22


# --- crowds and rubbish -----------------------------------------------------------------------------------------------


def test_whoever_connects_and_closes_costs_nothing_and_leaves_no_line(server: Server) -> None:
    with capture_logs() as lines:
        for _ in range(1500):
            socket.create_connection(server.address, timeout=20).close()
        assert echo(server)
        assert until(lambda: not server.connections)
    assert lines == []


def rubbish(seed: int) -> bytes:
    """Random bytes, or an honest conversation with some bytes changed, cut somewhere."""
    chance = random.Random(seed)  # noqa: S311 - the same rubbish each time
    if chance.random() < 0.3:
        return chance.randbytes(chance.randrange(1, 400))
    data = bytearray(GOOD + ECHO + STORE_COMMAND + values((3, 2, b"data")) + RELEASE)
    for _ in range(chance.randrange(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.randrange(1, len(data) + 1)])


def test_random_bytes_and_changed_pdus_leave_the_server_as_it_was(hasty: Server) -> None:
    before = threading.active_count()
    with capture_logs() as lines:
        for seed in range(600):
            with suppress(OSError), line(hasty) as peer:
                peer.say(rubbish(seed))
                socket.socket.shutdown(peer.stream, socket.SHUT_WR)
        assert echo(hasty)
        assert until(lambda: not hasty.connections)
    assert until(lambda: threading.active_count() <= before)
    assert {entry["event"] for entry in lines} <= {"association_cut", "association_refused"}
    assert 0 < len(lines) < 300
    assert hasty.memory.taken_bytes == 0


def test_a_flood_of_refusals_is_a_few_lines_and_a_count(server: Server) -> None:
    with capture_logs() as lines:
        for _ in range(200):
            assert wait_to_read(server, association(calling="STRANGER"))[0] == 3
        server._pace._at -= 60  # a minute later
        assert wait_to_read(server, association(calling="STRANGER"))[0] == 3
    assert len(lines) < 120
    assert lines[0] == {
        "event": "association_refused",
        "part": "transport",
        "log_level": "warning",
        "calling": "STRANGER",
        "called": "REMNANT",
        "address": "127.0.0.1",
        "why": "not one of ours",
        "for_good": True,
    }
    assert sum(entry.get("lines_left_out", 0) for entry in lines) + len(lines) == 201


def test_an_object_beyond_the_bound_is_handed_over_as_too_long_and_the_next_one_is_taken() -> None:
    desk = Desk()
    with serving(replace(PATIENT, object_bytes=1000), desk) as server, line(server) as camera:
        camera.open()
        for size in (1001, 1000):
            camera.say(STORE_COMMAND + values((3, 0, bytes(size - 500)), (3, 2, bytes(500))))
            assert camera.hear()[0] == 4
        assert [(len(one.data), one.excess) for one in desk.taken] == [(0, "object"), (1000, "")]


def test_a_data_set_can_be_worked_on_while_it_comes_until_it_is_answered() -> None:
    desk = Desk()
    desk.go_on.clear()
    with serving(PATIENT, desk) as server, line(server) as camera:
        camera.open().say(STORE_COMMAND + values((3, 0, b"first"), (3, 0, b"second")))
        assert until(lambda: bool(desk.drafts) and desk.drafts[0].pieces == [b"first", b"second"])
        assert (desk.drafts[0].request.abstract_syntax_uid, desk.drafts[0].request.data) == (NM, b"")
        camera.say(values((3, 2, b"last")))
        assert desk.reached.wait(20)
        assert desk.drafts[0].dropped == 0
        desk.go_on.set()
        assert camera.hear()[0] == 4
        assert until(lambda: desk.drafts[0].dropped == 1)
        assert desk.taken[0].draft is desk.drafts[0]
        assert (desk.taken[0].data, desk.drafts[0].pieces[2:]) == (b"firstsecondlast", [b"last"])
        camera.say(STORE_COMMAND + values((3, 2, b"another")))
        assert camera.hear()[0] == 4
        assert [one.pieces for one in desk.drafts[1:]] == [[b"another"]]


def test_what_need_not_be_waited_for_is_done_behind_the_answer_also_where_nobody_hears_it() -> None:
    desk = Desk()
    with serving(PATIENT, desk) as server:
        with line(server) as camera:
            camera.open().say(STORE_COMMAND + values((3, 2, b"data")))
            assert camera.hear()[0] == 4
            assert until(lambda: desk.behind == ["1.2.3"])
        desk.go_on.clear()
        desk.reached.clear()
        with line(server) as camera:
            camera.open().say(STORE_COMMAND + values((3, 2, b"data")))
            assert desk.reached.wait(20)
            camera.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
        desk.go_on.set()
        assert until(lambda: len(desk.behind) == 2)


@pytest.mark.parametrize("rest", [b"", values((3, 3, b"a command where data should be"))], ids=["gone", "wrong"])
def test_work_on_a_data_set_that_does_not_come_to_its_end_is_dropped(rest: bytes) -> None:
    desk = Desk()
    with serving(PATIENT, desk) as server:
        with line(server) as camera:
            camera.open().say(STORE_COMMAND + values((3, 0, b"half of the da")) + rest)
            assert until(lambda: bool(desk.drafts))
        assert until(lambda: desk.drafts[0].dropped == 1)
    assert desk.taken == []


def test_work_on_a_data_set_that_grows_too_long_is_dropped_at_once() -> None:
    desk = Desk()
    with serving(replace(PATIENT, object_bytes=1000), desk) as server, line(server) as camera:
        camera.open().say(STORE_COMMAND + values((3, 0, bytes(900)), (3, 0, bytes(900))))
        assert until(lambda: bool(desk.drafts) and desk.drafts[0].dropped > 0)
        assert desk.drafts[0].pieces == [bytes(900)]


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_stopping_aborts_a_hundred_idle_associations_at_once(secured: TLS | None) -> None:
    with serving(PATIENT, secured=secured) as server, ExitStack() as lines:
        address = server.address
        peers = [lines.enter_context(line(server)).open() for _ in range(100)]
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert {peer.hear() for peer in peers} == {(7, bytes(4))}
        for peer in peers:
            peer.stream.close()
        stopping.join(20)
        assert not stopping.is_alive()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=20)


def test_stopping_lets_a_message_under_way_come_to_its_status_and_then_aborts(secured: TLS | None) -> None:
    desk = Desk()
    desk.go_on.clear()
    with serving(PATIENT, desk, secured) as server, line(server) as camera:
        camera.open().say(STORE_COMMAND + values((3, 2, b"data")))
        assert desk.reached.wait(20)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert until(lambda: server.stopping)
        desk.go_on.set()
        kind, _ = camera.hear()
        assert (kind, len(desk.taken)) == (4, 1)
        assert camera.hear() == (7, bytes(4))
        camera.stream.close()
        stopping.join(20)
        assert not stopping.is_alive()


def test_stopping_waits_for_half_a_message_only_so_long_and_never_says_success(secured: TLS | None) -> None:
    desk = Desk()
    with serving(PATIENT, desk, secured) as server, line(server) as camera:
        camera.open().say(STORE_COMMAND + values((3, 0, b"half of the da")))
        (connection,) = server._associations
        assert until(lambda: not connection._inbox.empty)
        server.stop(0.3)
        assert camera.hear()[0] in (0, 7)
        assert desk.taken == []
        assert not server.connections
