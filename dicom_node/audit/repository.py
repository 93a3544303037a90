"""The way to the audit record repository: syslog over TLS (RFC 5425), TCP (RFC 6587, octet counting) or UDP (RFC 5426).

At least once and in order: a batch goes over a connection of its own, and is forgotten only when the repository has
closed that connection in answer to our end of it. Syslog has no acknowledgement; this is the only word of a repository
that says that it has read everything. One that keeps the connection open is believed when its system has acknowledged
every byte. A batch that broke off is sent again as a whole. UDP promises nothing; the messages are sent once.
"""

import fcntl
import socket
import ssl
import struct
import termios
import threading
import time
from contextlib import suppress

from dicom_node import log, tls
from dicom_node.audit.spool import AuditSpool, Batch
from dicom_node.errors import SettingsError
from dicom_node.settings import Settings
from dicom_node.transport.secure import why

LOOK_S = 1.0
"""Seconds between two looks into the spool, and between two times that it is made durable."""

_TIMEOUT_S = 5.0
_MOST_S = 60.0
_BATCH_BYTES = 256 * 1024

_log = log.get("audit")


class Repository:
    """Sends what the spool holds until it is stopped."""

    def __init__(self, settings: Settings, spool: AuditSpool) -> None:
        self._settings = settings
        self._spool = spool
        self._away_since: float | None = None
        self._pace = log.Pace(at_once=1, per_s=1 / 600)

    def run(self, stop: threading.Event) -> None:
        """Send until `stop` is set; then once more, unless the repository is away."""
        pause_s = LOOK_S
        while True:
            stopping = stop.wait(pause_s)
            if stopping and self._away_since is not None:
                return
            pause_s = LOOK_S if self.send_all() else min(_MOST_S, 2 * pause_s)
            if stopping:
                return

    def send_all(self) -> bool:
        """Send all that waits; False where that could not be done, which the log says."""
        try:
            self._spool.sync()
            while (batch := self._spool.waiting(_BATCH_BYTES)) is not None:
                if batch.messages:
                    send(self._settings, batch)
                self._spool.sent(batch.end)
                self._note_back()
        except (OSError, SettingsError) as error:
            self._note_away(_told(error))
            return False
        return True

    def _note_away(self, reason: str) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
        if self._pace.admit() is not None:
            _log.error("audit_repository_away", why=reason, bytes_waiting=self._spool.bytes_waiting())

    def _note_back(self) -> None:
        if self._away_since is not None:
            _log.info("audit_repository_back", away_s=round(time.monotonic() - self._away_since))
            self._away_since = None
            self._pace = log.Pace(at_once=1, per_s=1 / 600)


def _told(error: OSError | SettingsError) -> str:
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    return why(error) if isinstance(error, OSError) else str(error)


def send(settings: Settings, batch: Batch) -> None:
    """Send a batch; returns when the repository has it, as far as its transport can tell.

    Raises
    ------
    OSError: it has to be sent again. SettingsError: a file for its encryption is missing or wrong.
    """
    if settings.audit.transport == "udp":
        _send_datagrams(settings, batch)
        return
    with _connected(settings) as stream:
        stream.sendall(b"".join(b"%d %b" % (len(message), message) for message in batch.messages))
        _wait_until_read(stream)


def reach(settings: Settings) -> None:
    """Connect, shake hands, and close again without a message. Raises OSError, SettingsError."""
    if settings.audit.transport == "udp":
        return
    with _connected(settings) as stream:
        _wait_until_read(stream)


def _connected(settings: Settings) -> socket.socket:
    audit = settings.audit
    encryption = tls.encryption_to_repository(settings) if audit.transport == "tls" else None
    stream = socket.create_connection((audit.host, audit.port), timeout=_TIMEOUT_S)
    if encryption is None:
        return stream
    try:
        return encryption.context.wrap_socket(stream, server_hostname=encryption.server_name)
    except OSError:
        stream.close()
        raise


def _wait_until_read(stream: socket.socket) -> None:
    """End our side, and wait for the other end to end its own. Raises OSError where it broke off."""
    try:
        if isinstance(stream, ssl.SSLSocket):
            with suppress(ssl.SSLEOFError):  # closed, without TLS's own farewell, as rsyslog does
                stream.unwrap()
            return
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)  # a repository has nothing to say
    except TimeoutError:
        (unread,) = struct.unpack("i", fcntl.ioctl(stream.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        if unread:
            raise OSError(f"the repository has not taken {unread} bytes in {_TIMEOUT_S:g} s") from None


def _send_datagrams(settings: Settings, batch: Batch) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.audit.host, settings.audit.port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as one:
        one.connect(address)
        for message in batch.messages:
            one.send(message)
        one.settimeout(0.1)
        with suppress(TimeoutError):
            one.recv(1)  # nobody answers; where nobody listens the system says so here
