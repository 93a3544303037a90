"""The listening sockets, and the one account of who is connected.

A thread for each door accepts and does nothing else; each connection runs in its own, its TLS handshake included. Three
counts bound them: associations, those of one address or one AE title, and connections that are no association yet. The
last are not refused but replaced, oldest first and from the address that has most of them, so that silent connections
cannot keep an honest one out.
"""

import errno
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from dicom_node import log
from dicom_node.transport.connection import TOO_MANY, TOO_MANY_OF_ONE, Connection, Peer, Refusal, Service
from dicom_node.transport.dimse import Memory

_BACKLOG = 1024
"""Connections the kernel holds until we accept; beyond, it lets a camera wait a second, and 128 come in a moment."""
_RECEIVE_BUFFER = 256 * 1024
"""Bytes the kernel keeps for a connection that we do not read: otherwise it grows to megabytes each."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BREATH_S = 0.05

_log = log.get("transport")


@dataclass(frozen=True, slots=True)
class Door:
    """An address to listen on; with a context, for TLS alone."""

    address: tuple[str, int]
    tls: ssl.SSLContext | None = None


class Server:
    """Accepts connections from `listen` until `stop`."""

    def __init__(self, listeners: Sequence[tuple[socket.socket, ssl.SSLContext | None]], service: Service) -> None:
        self.service = service
        self.memory = Memory(service.limits.memory_bytes)
        self.stopping = False
        self._listeners = tuple(listener for listener, _ in listeners)
        self._lock = threading.Lock()
        self._waiting: dict[Connection, None] = {}
        self._associations: dict[Connection, Peer] = {}
        self._parting: set[Connection] = set()
        self._by_address: Counter[str] = Counter()
        self._by_title: Counter[str] = Counter()
        self._pace = log.Pace()
        self._breath = threading.Event()
        self._acceptors = [
            threading.Thread(target=self._accept, args=door, name="acceptor", daemon=True) for door in listeners
        ]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port really bound, of the first door."""
        return self.addresses[0]

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Host and port really bound, of every door."""
        names = [listener.getsockname() for listener in self._listeners]
        return tuple((str(name[0]), int(name[1])) for name in names)

    @property
    def associations(self) -> int:
        """How many associations there are."""
        return len(self._associations)

    @property
    def connections(self) -> int:
        """How many connections there are, associations or not."""
        with self._lock:
            return len(self._waiting) + len(self._associations) + len(self._parting)

    def start(self) -> None:
        """Begin to accept."""
        for acceptor in self._acceptors:
            acceptor.start()

    def stop(self, limit_s: float = 10.0) -> None:
        """Accept no more; abort what waits, let a message under way come to its status, and cut what takes longer.

        All connections at once: returns within about `limit_s` and a second.
        """
        with self._lock:
            self.stopping = True
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which closing would not
        self._breath.set()
        for acceptor, listener in zip(self._acceptors, self._listeners, strict=True):
            acceptor.join()
            listener.close()
        with self._lock:
            open_ones = [*self._waiting, *self._associations, *self._parting]
        for connection in open_ones:
            connection.hush()
        if not _joined(open_ones, limit_s):
            for connection in open_ones:
                connection.cut()
            _joined(open_ones, 1.0)
        unsaid = self._pace.rest()
        if unsaid:
            _log.warning("lines_left_out", count=unsaid)

    # --- what connections call ----------------------------------------------------------------------------------------

    def enter(self, connection: Connection, peer: Peer) -> Refusal | None:
        """Count a connection as an association, or say why not."""
        limits = self.service.limits
        with self._lock:
            if len(self._associations) >= limits.associations:
                return TOO_MANY
            most = limits.associations_per_peer
            if self._by_address[peer.address] >= most or self._by_title[peer.calling_ae_title] >= most:
                return TOO_MANY_OF_ONE
            self._waiting.pop(connection, None)
            self._associations[connection] = peer
            self._by_address[peer.address] += 1
            self._by_title[peer.calling_ae_title] += 1
        return None

    def part(self, connection: Connection) -> bool:
        """Free an association's place; whether its connection may wait for the peer to close."""
        with self._lock:
            self._release(connection)
            self._parting.add(connection)
            return len(self._parting) <= self.service.limits.waiting

    def leave(self, connection: Connection) -> None:
        """Forget a connection."""
        with self._lock:
            self._release(connection)
            self._parting.discard(connection)

    def report(self, event: str, **fields: object) -> None:
        """Write a warning, unless there were too many; the next one says how many were left out."""
        self.service.heed(event, fields)
        unsaid = self._pace.admit()
        if unsaid is not None:
            _log.warning(event, **fields, **({"lines_left_out": unsaid} if unsaid else {}))

    # --- the accepting threads ----------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        while True:
            try:
                stream, address = listener.accept()
            except OSError as error:
                if self.stopping:
                    return
                if error.errno in _EXHAUSTED:
                    self.report("connections_exhausted", error=error.strerror or str(error))
                    self._make_room()
                    self._breath.wait(_BREATH_S)
                continue
            self._begin(stream, str(address[0]), tls)

    def _begin(self, stream: socket.socket, address: str, tls: ssl.SSLContext | None) -> None:
        with suppress(OSError):  # it may be gone already
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(stream, address, self, tls)
        connection.thread = threading.Thread(target=self._serve, args=(connection,), name="connection", daemon=True)
        with self._lock:
            full = len(self._waiting) >= self.service.limits.waiting
            self._waiting[connection] = None
        if full:
            self._make_room()
        try:
            connection.thread.start()
        except RuntimeError as error:  # the system has no thread left
            self.leave(connection)
            stream.close()
            self.report("connections_exhausted", error=str(error))

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        except Exception:  # noqa: BLE001 - an error of ours ends this connection and is traced; the node goes on
            _log.exception("connection_failed", address=connection.address)

    def _make_room(self) -> None:
        """Cut the oldest connection that is no association, of the address that has most of them."""
        with self._lock:
            busiest = Counter(connection.address for connection in self._waiting).most_common(1)
            oldest = next((one for one in self._waiting if busiest and one.address == busiest[0][0]), None)
            if oldest is not None:
                del self._waiting[oldest]
                self._parting.add(oldest)
        if oldest is not None:
            oldest.cut()

    def _release(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)
        peer = self._associations.pop(connection, None)
        if peer is not None:
            for counter, key in ((self._by_address, peer.address), (self._by_title, peer.calling_ae_title)):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]


def listen(doors: Sequence[Door], service: Service) -> Server:
    """Start to accept associations; return the server. Raises OSError where an address cannot be bound."""
    listeners: list[tuple[socket.socket, ssl.SSLContext | None]] = []
    try:
        for door in doors:
            listeners.append((_bound(door.address), door.tls))
    except OSError:
        for listener, _ in listeners:
            listener.close()
        raise
    server = Server(listeners, service)
    server.start()
    return server


def _bound(address: tuple[str, int]) -> socket.socket:
    family, kind, protocol, _, bound = socket.getaddrinfo(
        address[0], address[1], type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Before `listen`, because the window of a connection is agreed on in its first packets.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        listener.bind(bound)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _joined(connections: list[Connection], limit_s: float) -> bool:
    """Wait for the threads of connections; whether all have ended."""
    deadline = time.monotonic() + limit_s
    for connection in connections:
        if connection.thread is not None and connection.thread.ident is not None:
            connection.thread.join(max(0.0, deadline - time.monotonic()))
    return not any(connection.thread is not None and connection.thread.is_alive() for connection in connections)
