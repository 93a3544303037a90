"""What a TLS connection says of the other end, and why there is none, in words for an admin (PS3.15 B.12, RFC 9325).

Nothing here knows files or settings (`dicom_node/tls.py` does): contexts come ready, and a handshake that failed
becomes one phrase that names what the peer did, so that an admin need not read OpenSSL's.
"""

import hashlib
import ssl
from dataclasses import dataclass
from typing import Any

HANDSHAKE = 0x16
"""First byte of every TLS connection (RFC 8446 5.1); none of DICOM's PDU types."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Whose certificate a peer has shown, after it was verified.

    names: its common names and alternative names (DNS, address, URI), in lower case. sha256: of its DER form, 64
    hexadecimal digits.
    """

    names: frozenset[str]
    sha256: str

    def is_called(self, entry: str) -> bool:
        """Say whether an entry names it: one of its names, or its SHA-256 with or without colons."""
        entry = entry.lower()
        return entry in self.names or entry.replace(":", "") == self.sha256

    def __str__(self) -> str:
        return f"{', '.join(sorted(self.names)) or 'without a name'} (SHA-256 {self.sha256[:16]}...)"


class WrongName(ssl.SSLError):
    """A peer's certificate is sound, and somebody else's."""

    def __init__(self, shown: Certificate) -> None:
        super().__init__(f"its certificate is not one of this source's: {shown}")


class Caller(ssl.SSLSocket):
    """Our end of a connection to a peer; keeps why it broke, which pynetdicom does not hand on.

    `names`: as in `Encryption`.
    """

    fault: OSError | None = None
    names: tuple[str, ...] = ()

    def do_handshake(self, block: bool = False) -> None:
        """As `ssl.SSLSocket` does."""
        try:
            super().do_handshake(block)
            if self.names and not any((shown := certificate_of(self)).is_called(name) for name in self.names):
                raise WrongName(shown)
        except OSError as error:
            self.fault = error
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """As `ssl.SSLSocket` does. In TLS 1.3 the first read says what the other end thought of our certificate."""
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as error:
            self.fault = error
            raise


class Encryption:
    """How a peer is called: what we shake hands with, and the name that its certificate must bear.

    `names`: of these one, by the rule for callers (`Certificate.is_called`), in the place of `server_name`: a camera's
    certificate bears its AE title and not where it stands.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str, names: tuple[str, ...] = ()) -> None:
        context.sslsocket_class = Caller
        if names:
            context.check_hostname = False
        self.context = context
        self.server_name = server_name
        self.names = names


def certificate_of(stream: ssl.SSLSocket | ssl.SSLObject) -> Certificate:
    """Return the verified certificate of the other end. Raises ssl.SSLError where it has shown none."""
    der, read = stream.getpeercert(binary_form=True), verified(stream)
    if not der or not read:
        raise ssl.SSLError("the peer has shown no certificate")
    names = [
        value
        for key, value in (*subject_of(read), *read.get("subjectAltName", ()))
        if key in ("commonName", "DNS", "IP Address", "URI")
    ]
    return Certificate(frozenset(str(name).lower() for name in names), hashlib.sha256(der).hexdigest())


def verified(stream: ssl.SSLSocket | ssl.SSLObject) -> dict[str, Any]:
    """Return the other end's certificate as Python reads it; empty where there is none."""
    return dict(stream.getpeercert() or {})


def subject_of(read: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the attributes of a certificate's subject, in their order."""
    return tuple(pair for group in read.get("subject", ()) for pair in group)


def why(error: OSError) -> str:
    """Say why there is no TLS connection: one phrase about "it", the peer."""
    match error:
        case ssl.SSLCertVerificationError():
            return "its certificate is refused: " + _VERIFICATION.get(
                error.verify_code, error.verify_message.rstrip(".").lower()
            )
        case WrongName():
            return str(error.args[-1])
        case TimeoutError():
            return "its TLS handshake did not end in time"
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError() | ConnectionError():
            return "it closed the connection during the TLS handshake"
        case ssl.SSLError():
            reason = error.reason or ""
            if reason in _REASONS:
                return _REASONS[reason]
            _, alert, said = reason.partition("_ALERT_")
            said = (said if alert else reason).replace("_", " ").lower()
            return f"it ended TLS with the alert: {said}" if alert else f"no TLS: {said or error.args[-1]}"
    return f"the connection broke: {error.strerror or error}"


# Error codes of X509_verify_cert.
_NO_AUTHORITY = "none of the authorities we know has signed it"
_VERIFICATION = {
    2: _NO_AUTHORITY,
    18: _NO_AUTHORITY,
    19: _NO_AUTHORITY,
    20: _NO_AUTHORITY,
    21: _NO_AUTHORITY,
    9: "it is not valid yet",
    10: "it has expired",
    26: "it is not meant for this side of a connection (extended key usage)",
    66: "its key is too short",
    67: "the key of its authority is too short",
    68: "its signature uses a hash that is no longer safe",
}
_TOO_OLD = "it speaks no TLS 1.2 or newer"
_NOT_TLS = "it does not speak TLS on this port"
_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "UNSUPPORTED_PROTOCOL": _TOO_OLD,
    "VERSION_TOO_LOW": _TOO_OLD,
    "TLSV1_ALERT_PROTOCOL_VERSION": _TOO_OLD,
    "NO_SHARED_CIPHER": "it offers none of our cipher suites",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "it offers no signature algorithm that fits our certificate",
    "WRONG_VERSION_NUMBER": _NOT_TLS,
    "UNKNOWN_PROTOCOL": _NOT_TLS,
    "HTTP_REQUEST": _NOT_TLS,
    "TLSV1_ALERT_UNKNOWN_CA": "it refuses our certificate: it does not know our authority",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it asks for a certificate of ours",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it refuses our certificate: it says that it has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it refuses our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it refuses our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it refuses our certificate: not meant for this side of a connection",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it finds no cipher suite in common, or asks for another certificate of ours",
}
