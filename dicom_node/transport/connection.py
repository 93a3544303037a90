"""One connection of a peer, in a thread of its own, from its first byte to its last (PS3.8 9.1 to 9.3, PS3.7 9.3).

Blocking reads with deadlines and no polling: whoever is slow or silent holds a sleeping thread, for a bounded time, and
delays nobody. A length is compared with its bound before a byte of it is read or memory is taken. What a peer does
wrong ends its own association, by A-ABORT where the standard asks for one, and leaves at most one line in the log.
"""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Protocol

from pynetdicom.presentation import PresentationContext

from dicom_node.transport import dimse
from dicom_node.transport.dimse import Inbox, Memory, Message, Violation
from dicom_node.transport.negotiation import (
    APPLICATION_CONTEXT_NAME,
    MAXIMUM_PDU_SIZE,
    Agreed,
    AssociationRequest,
    Malformed,
    accept,
    read_request,
)
from dicom_node.transport.secure import HANDSHAKE, Certificate, certificate_of, why
from dicom_node.transport.states import Action, Event, State, step

_REQUEST_LIMIT = 256 * 1024
_DATA_LIMIT = MAXIMUM_PDU_SIZE + 16 * 1024  # some peers count headers otherwise than we do
_FAREWELL_LIMIT = 256 * 1024  # bytes dropped while the other end reads our last PDU
_FAREWELL_PIECE = 16 * 1024

# PDU types and the events they are: PS3.8 9.3.1. The fixed ones have 4 bytes behind the header.
_REQUEST, _DATA = 0x01, 0x04
_EVENTS = {
    _REQUEST: Event.REQUEST_PDU,
    0x02: Event.ACCEPT_PDU,
    0x03: Event.REJECT_PDU,
    _DATA: Event.DATA_PDU,
    0x05: Event.RELEASE_PDU,
    0x06: Event.RELEASED_PDU,
    0x07: Event.ABORT_PDU,
}
_LIMITS = {_REQUEST: _REQUEST_LIMIT, 0x02: _REQUEST_LIMIT, _DATA: _DATA_LIMIT}
_FIXED_LENGTH = 4

# Source and reason of an A-ABORT: PS3.8 table 9-26.
_BY_USER = (0, 0)
_UNRECOGNISED_PDU, _UNEXPECTED_PDU, _INVALID_VALUE = 1, 2, 6

_NOT_TLS = "what it says is not TLS"

_MESSAGE_GRACE_S = 60.0
_MESSAGE_BYTES_PER_S = 64 * 1024
"""A message has 60 s and as long as a line of 64 KiB/s needs: nobody holds an association with a byte now and then."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much; seconds and bytes."""

    idle_s: float
    associations: int
    associations_per_peer: int
    object_bytes: int = 256 * 1024**2
    memory_bytes: int = 512 * 1024**2
    association_s: float = 10.0
    """From the connection to the whole association request, a TLS handshake included."""
    pdu_s: float = 10.0
    """For the rest of a PDU once it began; a camera's 128 KiB need milliseconds."""
    send_s: float = 10.0
    close_s: float = 2.0
    """For the peer to close after the last PDU (the ARTIM timer of state 13)."""
    waiting: int = 256
    """Connections that are no association yet; the oldest of the busiest address makes room for a new one."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who called, and whom. AE titles without padding. certificate: verified, None on a plain connection."""

    address: str
    calling_ae_title: str
    called_ae_title: str
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 table 9-21), and for the log, why."""

    result: int
    source: int
    diagnostic: int
    why: str


TOO_MANY = Refusal(2, 3, 2, "too many associations")
TOO_MANY_OF_ONE = Refusal(2, 3, 2, "too many associations of this peer")
_WRONG_VERSION = Refusal(1, 2, 2, "protocol version not supported")
_WRONG_APPLICATION = Refusal(1, 1, 2, "application context name not supported")


class Draft(Protocol):
    """What is made of a data set while its fragments arrive; neither method raises."""

    def add(self, piece: memoryview) -> None:
        """Take the next bytes; they stay as they are."""

    def drop(self) -> None:
        """Leave nothing behind: the message was answered, grew beyond a limit, or does not come to its end."""


@dataclass(frozen=True, slots=True)
class Request:
    """A DIMSE request. `excess`: see `dimse.Message`; the data set is empty then. `type_id`: see `dimse`. `draft`: what
    `Service.drafts` has begun for it."""

    peer: Peer
    abstract_syntax_uid: str
    transfer_syntax_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    data: bytes
    excess: str
    type_id: int | None = None
    draft: Draft | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, and what is done once it is on its way, because the peer need not wait for it; also where it has gone
    and cannot be told. Nothing that the status promises."""

    status: int
    then: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Service:
    """What the called side offers.

    `admit` decides on a peer, `may_use` on each class that it asks for, `handlers` map a Command Field to what answers
    it with a status (C-ECHO is answered without one). `drafts` map one to what begins to work on its data set, with the
    request as far as it is known, when the first fragment is here. `heed` hears of everything that is reported to the
    log, also where the log leaves it out.
    """

    contexts: Sequence[PresentationContext]
    implementation_class_uid: str
    implementation_version_name: str
    limits: Limits
    admit: Callable[[Peer], Refusal | None]
    handlers: Mapping[int, Callable[[Request], int | Answer]]
    drafts: Mapping[int, Callable[[Request], Draft]] = field(default_factory=dict)
    may_use: Callable[[Peer, str], bool] = lambda _peer, _abstract_syntax_uid: True
    heed: Callable[[str, Mapping[str, object]], None] = lambda _event, _fields: None


class House(Protocol):
    """What a connection needs of the server that accepted it."""

    service: Service
    memory: Memory
    stopping: bool

    def enter(self, connection: "Connection", peer: Peer) -> Refusal | None:
        """Count a connection as an association, or say why not."""

    def part(self, connection: "Connection") -> bool:
        """Free an association's place; whether its connection may wait for the peer to close."""

    def leave(self, connection: "Connection") -> None:
        """Forget a connection."""

    def report(self, event: str, **fields: object) -> None:
        """Write a line to the log, unless there were too many."""


class _Closed(Exception):  # noqa: N818 - not an error: an event
    """The transport connection has ended."""


class _Invalid(Exception):  # noqa: N818 - an event of the table
    """An unrecognised or invalid PDU."""

    def __init__(self, reason: int, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class _Overdue(Exception):  # noqa: N818 - an event too
    """A deadline has passed; the message says which."""


class Connection:
    """A peer's connection; `run` serves it to its end, `hush` and `cut` end it from another thread."""

    def __init__(self, stream: socket.socket, address: str, house: House, tls: ssl.SSLContext | None = None) -> None:
        self.address = _plain(address)
        self.peer: Peer | None = None
        self.thread: threading.Thread | None = None
        self._stream = stream
        self._tls = tls
        self._certificate: Certificate | None = None
        self._house = house
        self._service = house.service
        self._limits = house.service.limits
        self._state = State.IDLE
        self._began = time.monotonic()
        self._message_began = 0.0
        self._inbox = Inbox(house.memory, self._limits.object_bytes, frozenset())
        self._draft: Draft | None = None
        self._agreed: Mapping[int, Agreed] = {}
        self._maximum_length = 0
        self._received = 0
        self._abort_reason = 0
        self._fault = ""
        self._lock = threading.Lock()
        self._busy = False
        self._open = True
        self._may_wait = True

    # --- from other threads -------------------------------------------------------------------------------------------

    def hush(self) -> None:
        """The node stops: wake the connection where it waits; a message under way goes on to its status."""
        with self._lock:
            if self._open and not self._busy:
                self._shut(socket.SHUT_RD)

    def cut(self) -> None:
        """End it now, whatever is under way."""
        with self._lock:
            if self._open:
                self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        with suppress(OSError):  # the peer was faster
            # Not the stream's own: SSLSocket.shutdown drops the encryption, and an A-ABORT would go out in clear.
            socket.socket.shutdown(self._stream, how)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve the connection; returns when it is closed. Raises nothing that a peer can cause."""
        try:
            if self._tls is None or self._shake_hands(self._tls):
                self._happen(Event.CONNECTED)
            while self._state is not State.IDLE:
                event, content = self._next()
                self._happen(event, content)
        except OSError as error:
            if self._received:
                self._fault = self._fault or f"the connection broke: {error.strerror or error}"
        finally:
            with self._lock:
                self._open = False
                self._close()
            self._clear()
            if self._fault and not self._house.stopping:
                calling = self.peer.calling_ae_title if self.peer else ""
                self._house.report("association_cut", address=self.address, calling=calling, why=self._fault)
            self._house.leave(self)

    def _happen(self, event: Event, content: memoryview | AssociationRequest | Refusal | None = None) -> None:
        before = self._state
        action, self._state = step(before, event)
        if self._state is State.AWAIT_CLOSE:
            # Before the last word is sent: whoever hears it may call again at once, and finds the place free.
            self._may_wait = self._house.part(self)
        match action, content:
            case Action.DECIDE, AssociationRequest() as request:
                self._decide(request)
            case Action.SEND_ACCEPT, AssociationRequest() as request:
                self._accept(request)
            case Action.SEND_REJECT, Refusal() as refusal:
                self._send(struct.pack(">BBIBBBB", 3, 0, 4, 0, refusal.result, refusal.source, refusal.diagnostic))
            case Action.TAKE_DATA, memoryview() as data:
                self._take_data(data)
            case Action.SEND_DATA, memoryview() as data:
                self._send(data)
            case Action.TAKE_RELEASE, _:
                self._happen(Event.RELEASE)
            case Action.SEND_RELEASED, _:
                self._send(struct.pack(">BBII", 6, 0, 4, 0))
            case Action.SEND_ABORT, _:
                self._fault = self._fault or f"{event.name} in {before.name}"
                self._abort(*_BY_USER)
            case Action.SEND_PROVIDER_ABORT, _:
                self._fault = self._fault or f"{event.name} in {before.name}"
                self._abort(2, self._abort_reason or _UNEXPECTED_PDU)
            case Action.TAKE_ABORT, _:
                self._fault = "the peer aborted"
            case Action.NOTE_LOST, _:
                self._fault = "the peer closed without a release"
            case Action.NOTE_GONE, _ if self._received:
                self._fault = "the peer closed before it asked for an association"
            case ((Action.AWAIT_REQUEST | Action.NOTE_GONE | Action.CLOSE | Action.NOTE_CLOSED), _):
                pass  # `run` reads on, or closes
            case _:
                raise TypeError(f"{action.name} with {type(content).__name__}")

    def _shake_hands(self, tls: ssl.SSLContext) -> bool:
        """Begin TLS (PS3.15 B.12), within the time that an association has; whether there is one now."""
        try:
            self._stream.settimeout(self._limits.association_s)
            first = self._stream.recv(1, socket.MSG_PEEK)
            if not first:
                return False
            if first[0] != HANDSHAKE:
                self._refuse_tls("it speaks plain DICOM on the TLS port" if first[0] == _REQUEST else _NOT_TLS)
                return False
            with self._lock:
                self._stream = secured = tls.wrap_socket(self._stream, server_side=True, do_handshake_on_connect=False)
            secured.settimeout(max(self._began + self._limits.association_s - time.monotonic(), 0.001))
            secured.do_handshake()
            self._certificate = certificate_of(secured)
            # The caller's last word of the handshake is acknowledged now: many hold their request back until it is, and
            # the kernel would wait 40 ms for something of ours to send it with.
            secured.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except OSError as error:
            self._refuse_tls(why(error))
            if isinstance(error, ssl.SSLError):
                self._let_the_alert_arrive()
            return False
        return True

    def _refuse_tls(self, why: str) -> None:
        if not self._house.stopping:
            self._house.report("tls_refused", address=self.address, why=why)

    def _let_the_alert_arrive(self) -> None:
        """Closing while something is unread resets the connection, and the peer would never learn what it did wrong."""
        self._may_wait = self._house.part(self)
        with self._lock, suppress(OSError):
            self._stream = socket.socket(fileno=self._stream.detach())
            self._stream.shutdown(socket.SHUT_WR)
        self._farewell()

    def _close(self) -> None:
        if isinstance(self._stream, ssl.SSLSocket):
            with suppress(OSError, ValueError):  # the peer has gone, or has nothing to close
                self._stream.settimeout(0)
                self._stream.unwrap()  # says that nothing follows, and does not wait for the peer to say so
        self._stream.close()

    def _decide(self, request: AssociationRequest) -> None:
        """AE-6: admit or reject, with the reason for the peer and for the log."""
        peer = Peer(self.address, request.calling_ae_title, request.called_ae_title, self._certificate)
        self.peer = peer
        if self._speaks_out_of_turn():
            return
        refusal: Refusal | None
        if not request.protocol_version & 1:
            refusal = _WRONG_VERSION
        elif request.application_context_name != APPLICATION_CONTEXT_NAME:
            refusal = _WRONG_APPLICATION
        else:
            refusal = self._service.admit(peer) or self._house.enter(self, peer)
        if refusal is None:
            self._happen(Event.ACCEPT, request)
            return
        self._house.report(
            "association_refused",
            calling=peer.calling_ae_title,
            called=peer.called_ae_title,
            address=peer.address,
            why=refusal.why,
            for_good=refusal.result == 1,
        )
        self._happen(Event.REJECT, refusal)

    def _speaks_out_of_turn(self) -> bool:
        """Whether the peer sent more before it had our answer, which nobody may (Sta3): then that decides."""
        if self._tls is not None:
            return False  # behind TLS nobody can look without reading
        self._stream.setblocking(False)
        try:
            waiting = self._stream.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        if not waiting:
            self._happen(Event.CLOSED)
        else:
            event, content = self._next()
            self._happen(event, content)
        return True

    def _accept(self, request: AssociationRequest) -> None:
        service, peer = self._service, self.peer
        offered = [cx for cx in service.contexts if peer and service.may_use(peer, str(cx.abstract_syntax))]
        answer, self._agreed = accept(
            request, offered, service.implementation_class_uid, service.implementation_version_name
        )
        self._inbox = Inbox(self._house.memory, self._limits.object_bytes, frozenset(self._agreed))
        self._maximum_length = request.maximum_length
        self._send(answer)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _next(self) -> tuple[Event, memoryview | AssociationRequest | None]:
        """Wait for what happens next, and say what it is."""
        if self._state is State.AWAIT_CLOSE:
            return self._farewell(), None
        try:
            kind, content = self._read_pdu()
            if kind == _REQUEST and self._state is State.AWAIT_REQUEST:
                try:
                    return Event.REQUEST_PDU, read_request(bytes(content))
                except Malformed as error:
                    raise _Invalid(_INVALID_VALUE, str(error)) from error
            if kind == _DATA and self._state is State.TRANSFER:
                _check_values(content)
            return _EVENTS[kind], content
        except _Invalid as error:
            self._fault, self._abort_reason = str(error), error.reason
            return Event.INVALID_PDU, None
        except _Overdue as error:
            self._fault = str(error)
            return (Event.TIMER if self._state is State.AWAIT_REQUEST else Event.ABORT), None
        except _Closed:
            leaving = self._house.stopping and self._state is State.TRANSFER
            return (Event.ABORT if leaving else Event.CLOSED), None

    def _read_pdu(self) -> tuple[int, memoryview]:
        """Read one PDU; return its type and what follows its header. Raises _Closed, _Invalid, _Overdue."""
        header = memoryview(bytearray(6))
        if self._state is State.TRANSFER:
            filled = self._first_bytes(header)
            deadline = time.monotonic() + self._limits.pdu_s
            if not self._inbox.empty:
                deadline = min(deadline, self._message_deadline())
        else:
            filled = 0
            deadline = self._began + self._limits.association_s
        self._fill(header[filled:], deadline)
        kind, length = header[0], int.from_bytes(header[2:6], "big")
        if kind == HANDSHAKE and self._tls is None and self._state is State.AWAIT_REQUEST:
            raise _Invalid(_UNRECOGNISED_PDU, "it speaks TLS on the plain port")
        if kind not in _EVENTS:
            raise _Invalid(_UNRECOGNISED_PDU, f"PDU type {kind:02X} is none")
        if length > _LIMITS.get(kind, _FIXED_LENGTH):
            raise _Invalid(_INVALID_VALUE, f"a PDU of type {kind:02X} says that it has {length} bytes")
        if kind not in _LIMITS and length != _FIXED_LENGTH:
            raise _Invalid(_INVALID_VALUE, f"a PDU of type {kind:02X} has {length} bytes and not {_FIXED_LENGTH}")
        if self._state is State.AWAIT_REQUEST and kind != _REQUEST:
            return kind, header[6:]  # a violation whatever follows: it is not waited for
        content = memoryview(bytearray(length))
        self._fill(content, deadline)
        return kind, content

    def _first_bytes(self, header: memoryview) -> int:
        """Wait for the beginning of the next PDU of an association; how long depends on whether a message is open."""
        between = self._inbox.empty
        if between:
            with self._lock:
                if self._house.stopping:
                    raise _Closed
                self._busy = False
            wait_s = self._limits.idle_s
        else:
            wait_s = min(self._limits.idle_s, self._message_deadline() - time.monotonic())
        try:
            self._stream.settimeout(max(wait_s, 0.001))
            count = self._stream.recv_into(header)
        except TimeoutError as error:
            raise _Overdue("nothing came for too long" if between else "a message did not arrive in time") from error
        if not count:
            raise _Closed
        if between:
            with self._lock:
                self._busy = True
            self._message_began = time.monotonic()
        self._received += count
        return count

    def _message_deadline(self) -> float:
        return self._message_began + _MESSAGE_GRACE_S + self._inbox.received_bytes / _MESSAGE_BYTES_PER_S

    def _fill(self, room: memoryview, deadline: float) -> None:
        while room:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise _Overdue("a PDU did not arrive in time")
            self._stream.settimeout(remaining_s)
            try:
                count = self._stream.recv_into(room)
            except TimeoutError as error:
                raise _Overdue("a PDU did not arrive in time") from error
            if not count:
                raise _Closed
            self._received += count
            room = room[count:]

    def _farewell(self) -> Event:
        """Wait until the peer has closed: closing before it has read our last PDU could take that away from it."""
        if not self._may_wait:
            return Event.TIMER
        with self._lock:
            self._busy = False
        deadline = time.monotonic() + self._limits.close_s
        dropped = 0
        while dropped < _FAREWELL_LIMIT:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                break
            self._stream.settimeout(remaining_s)
            try:
                count = len(self._stream.recv(_FAREWELL_PIECE))
            except TimeoutError:
                break
            except OSError:
                return Event.CLOSED
            if not count:
                return Event.CLOSED
            dropped += count
        return Event.TIMER

    # --- messages -----------------------------------------------------------------------------------------------------

    def _take_data(self, content: memoryview) -> None:
        """DT-2: hand the fragments to the inbox, and answer what they complete."""
        try:
            while content:
                length = int.from_bytes(content[:4], "big")
                context_id, control, piece = content[4], content[5], content[6 : 4 + length]
                message = self._inbox.take(context_id, control, piece)
                if not control & dimse.COMMAND:
                    self._draw_up(context_id, piece)
                if message is not None:
                    self._answer(message)
                    self._clear()
                content = content[4 + length :]
        except Violation as error:
            self._fault = str(error)
            self._happen(Event.ABORT)

    def _answer(self, message: Message) -> None:
        command = message.command
        if command.field == dimse.C_CANCEL_RQ:
            return  # of an operation that has already ended; it has no response (PS3.7 9.3.2.3)
        if command.field & dimse.RESPONSE:
            raise Violation("a response that nobody asked for")
        answer = self._status(message)
        status = answer.status if isinstance(answer, Answer) else answer
        try:
            for pdu in dimse.fragments(message.context_id, dimse.response(command, status), self._maximum_length):
                self._happen(Event.SEND, memoryview(pdu))
        finally:
            if isinstance(answer, Answer):
                answer.then()

    def _draw_up(self, context_id: int, piece: memoryview) -> None:
        """Let a data set be worked on while the rest of it is on its way."""
        command = self._inbox.command
        if self._draft is None and command is not None and command.field in self._service.drafts:
            request = self._request(Message(context_id, command, b"", ""))
            self._draft = self._service.drafts[command.field](request) if request is not None else None
        if self._draft is not None:
            if self._inbox.excess:
                self._draft.drop()
            else:
                self._draft.add(piece)

    def _status(self, message: Message) -> int | Answer:
        if message.command.field == dimse.C_ECHO_RQ:
            return 0x0000
        handler = self._service.handlers.get(message.command.field)
        request = None if handler is None else self._request(message)
        if handler is None or request is None:
            return dimse.UNRECOGNISED_OPERATION
        return handler(request)

    def _request(self, message: Message) -> Request | None:
        command, agreed = message.command, self._agreed[message.context_id]
        if self.peer is None:
            return None
        return Request(
            peer=self.peer,
            abstract_syntax_uid=agreed.abstract_syntax,
            transfer_syntax_uid=agreed.transfer_syntax,
            sop_class_uid=command.sop_class_uid,
            sop_instance_uid=command.sop_instance_uid,
            data=message.data,
            excess=message.excess,
            type_id=dimse.type_id(command),
            draft=self._draft,
        )

    def _clear(self) -> None:
        if self._draft is not None:
            self._draft.drop()
            self._draft = None
        self._inbox.clear()

    def _abort(self, source: int, reason: int) -> None:
        try:
            self._send(struct.pack(">BBIBBBB", 7, 0, 4, 0, 0, source, reason))
        except OSError:
            self._state = State.IDLE  # nobody is there to read it

    def _send(self, data: bytes | memoryview) -> None:
        self._stream.settimeout(self._limits.send_s)
        self._stream.sendall(data)


def _check_values(content: memoryview) -> None:
    """Check that presentation data values fill a P-DATA-TF exactly (PS3.8 9.3.5). Raises _Invalid."""
    offset = 0
    while offset < len(content) or not len(content):
        length = int.from_bytes(content[offset : offset + 4], "big")
        if length < 2 or length > len(content) - offset - 4:
            raise _Invalid(_INVALID_VALUE, "a presentation data value does not fit its PDU")
        offset += 4 + length


def _plain(address: str) -> str:
    """Return an address without zone, and an IPv4 address as such even where it came over IPv6."""
    plain = ip_address(address.split("%", 1)[0])
    mapped = plain.ipv4_mapped if plain.version == 6 else None
    return str(mapped or plain)
