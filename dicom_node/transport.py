"""What we bend in pynetdicom's upper layer (PS3.8), in one place, because it reaches for private parts.

pynetdicom 3.0 believes any PDU length up to 4 GiB, waits for ever for the rest of a PDU, listens with a backlog of 5,
and deep-copies every presentation context for every connection. `listen` starts a server that does none of this.
`tests/dicom_node/test_transport.py` fails when the parts we hold on to have moved.
"""

import socket
import threading
import time
from typing import Any, cast

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

MAXIMUM_PDU_SIZE = 131072
"""What we negotiate, bytes: measured 17 % faster than the usual 16 KiB, and still a bound."""

_PDU_LIMIT = MAXIMUM_PDU_SIZE + 65536
"""Longest PDU we read, bytes: association requests are not bound by the negotiated size but have to end somewhere."""

_PDU_DEADLINE_S = 15.0
"""Seconds for one whole PDU once it began; a camera's 128 KiB need milliseconds."""


class _BoundedSocket(AssociationSocket):
    """An AssociationSocket whose `recv` has a bound and a deadline."""

    def recv(self, nr_bytes: int) -> bytearray:
        if nr_bytes > _PDU_LIMIT:
            raise OSError(f"a PDU of {nr_bytes} bytes exceeds {_PDU_LIMIT}")
        stream = cast(socket.socket, self.socket)
        buffer = bytearray(nr_bytes)
        view = memoryview(buffer)
        filled = 0
        deadline = time.monotonic() + _PDU_DEADLINE_S
        before = stream.gettimeout()
        try:
            while filled < nr_bytes:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError("a PDU did not arrive in time")
                stream.settimeout(remaining)
                count = stream.recv_into(view[filled:])
                if not count:
                    break  # the peer closed; the caller sees that less came than it asked for
                filled += count
        finally:
            if stream.fileno() >= 0:
                stream.settimeout(before)
        view.release()
        del buffer[filled:]
        return buffer


class _Handler(RequestHandler):
    server: "_Server"

    def _create_association(self) -> Association:
        assoc = super()._create_association()
        assoc.acceptor.supported_contexts = self.server.shared_contexts
        # The socket object announced the connection to the state machine when it was made: make no second one.
        assoc.dul.socket.__class__ = _BoundedSocket
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return assoc


class _Server(ThreadedAssociationServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(
        self, ae: AE, address: tuple[str, int], contexts: list[PresentationContext], handlers: list[Any]
    ) -> None:
        # Negotiation only reads them, so all associations share one list; the parent would deep-copy its own.
        self.shared_contexts = contexts
        super().__init__(ae, address, ae.ae_title, [], evt_handlers=handlers, request_handler=_Handler)


def listen(
    ae: AE, address: tuple[str, int], contexts: list[PresentationContext], handlers: list[Any]
) -> ThreadedAssociationServer:
    """Start accepting associations in a thread; return the server, whose `server_address` holds the real port.

    Raises OSError where the address cannot be bound.
    """
    ae.maximum_pdu_size = MAXIMUM_PDU_SIZE
    server = _Server(ae, address, contexts, handlers)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="Acceptor", daemon=True).start()
    ae._servers.append(server)  # AE.active_associations looks there
    return server
