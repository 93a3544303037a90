"""Keys, certificates and the rules of our TLS: PS3.15 B.12 (BCP 195: RFC 8996, RFC 9325).

TLS 1.2 or newer, both ends show a certificate, forward secrecy and authenticated encryption only; no compression, no
renegotiation, no tickets. What is wrong with our own files is one sentence that names the setting (`SettingsError`),
found before anything listens or calls, and not the riddle of a handshake in the night.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dicom_node.errors import SettingsError
from dicom_node.settings import TLS, Destination, Settings, Source
from dicom_node.transport.secure import Certificate, Encryption, certificate_of, subject_of, verified, why

# The suites of TLS 1.2; those of 1.3 are all of this kind. Level 2: keys of 112 bits and more (RSA 2048), no SHA-1.
_SUITES = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"

# X509_V_FLAG_NO_CHECK_TIME, which ssl has no name for: to read a certificate that has expired.
_WHENEVER = 0x200000


RENEW = timedelta(days=30)
"""Time left of our certificate below which it is to be renewed; of a short-lived one, a third of its life."""


@dataclass(frozen=True, slots=True)
class Own:
    """Our own certificate: whose it says it is, and when it is valid (UTC)."""

    certificate: Certificate
    subject: str
    valid_from: datetime
    valid_until: datetime

    def ends_soon(self, now: datetime) -> bool:
        """Say whether it is time to renew it."""
        return self.valid_until - now < min(RENEW, (self.valid_until - self.valid_from) / 3)


def server_context(tls: TLS) -> ssl.SSLContext:
    """Return what a receiver shakes hands with. Raises SettingsError."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, tls)
    _know(context, tls.authorities, "tls.authorities")
    # A connection that ends without TLS's own farewell has ended: what is whole, DICOM says by itself. As an error it
    # would end our sending too, and a stopping node could not abort its associations.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_IGNORE_UNEXPECTED_EOF
    context.num_tickets = 0
    return context


def client_context(
    tls: TLS, authorities: str = "", key: str = "tls.authorities", section: str = "tls"
) -> ssl.SSLContext:
    """Return what a sender shakes hands with; `authorities`, else ours, must have signed the archive's certificate.

    `key` and `section` name the settings in an error. The archive's name is checked against its certificate. Raises
    SettingsError.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, tls, section)
    _know(context, authorities or tls.authorities, key)
    context.options |= ssl.OP_NO_TICKET
    return context


def encryption_to(settings: Settings, destination: Destination) -> Encryption | None:
    """Return how a destination is called: with this encryption, or in clear. Raises SettingsError."""
    if not destination.tls:
        return None
    key = f"the authorities of destination {destination.name}" if destination.authorities else "tls.authorities"
    context = client_context(settings.tls, destination.authorities, key)
    return Encryption(context, destination.server_name or destination.host)


def encryption_to_source(settings: Settings, source: Source) -> Encryption | None:
    """Return how a camera is called with a report: with this encryption, or in clear. Raises SettingsError."""
    if not source.tls:
        return None
    return Encryption(client_context(settings.tls), source.ae_title, source.certificates or (source.ae_title,))


def encryption_to_repository(settings: Settings) -> Encryption:
    """Return how the audit record repository is called. Raises SettingsError."""
    audit, tls = settings.audit, settings.tls
    section = "tls"
    if audit.certificate:
        section, tls = "audit", tls.model_copy(update={"certificate": audit.certificate, "key": audit.key})
    key = "audit.authorities" if audit.authorities else "tls.authorities"
    context = client_context(tls, audit.authorities, key, section)
    return Encryption(context, audit.server_name or audit.host)


def own_certificate(tls: TLS) -> Own:
    """Read our own certificate by shaking hands with ourselves, in memory and whatever the time is.

    That shows what a caller would meet: a key that is not its own, a use it is not made for. Raises SettingsError.
    """
    server, client = _context(ssl.PROTOCOL_TLS_SERVER, tls), _context(ssl.PROTOCOL_TLS_CLIENT, tls)
    server.verify_mode = ssl.CERT_NONE
    client.check_hostname = False
    _know(client, tls.certificate, "tls.certificate")
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_WHENEVER)
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    called = server.wrap_bio(here, there, server_side=True)
    caller = client.wrap_bio(there, here)
    try:
        steps = [caller.do_handshake, called.do_handshake]
        while steps:
            steps = [step for step in steps if not _done(step)]
    except ssl.SSLError as error:
        raise SettingsError(f"tls.certificate: {tls.certificate} cannot serve as ours: {why(error)}.") from error
    read = verified(caller)
    return Own(
        certificate=certificate_of(caller),
        subject=", ".join(f"{_SHORT.get(key, key)}={value}" for key, value in subject_of(read)),
        valid_from=_time(read["notBefore"]),
        valid_until=_time(read["notAfter"]),
    )


def refuse_unfit(settings: Settings, now: datetime | None = None) -> None:
    """Refuse a certificate that no peer would take, and files that cannot be read. Raises SettingsError."""
    tls = settings.tls
    if settings.audit.on and settings.audit.transport == "tls":
        encryption_to_repository(settings)
    if not tls.on:
        return
    server_context(tls)
    for destination in settings.destinations:
        encryption_to(settings, destination)
    own, now = own_certificate(tls), now or datetime.now(UTC)
    if now < own.valid_from:
        raise SettingsError(
            f"tls.certificate: {tls.certificate} is not valid before {own.valid_from:%Y-%m-%d %H:%M} UTC."
        )
    if now >= own.valid_until:
        raise SettingsError(f"tls.certificate: {tls.certificate} has expired on {own.valid_until:%Y-%m-%d %H:%M} UTC.")


def _context(side: int, tls: TLS, section: str = "tls") -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_SUITES)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.verify_mode = ssl.CERT_REQUIRED
    _refuse_open_key(tls.key, f"{section}.key")
    _opened(tls.certificate, f"{section}.certificate")
    try:
        # A key with a pass phrase would ask for it on a terminal that nobody sits at.
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except ssl.SSLError as error:
        raise SettingsError(_bad_pair(tls, section, error)) from error
    return context


def _know(context: ssl.SSLContext, path: str, key: str) -> None:
    """Trust the certificates of a file, and nobody else."""
    _opened(path, key)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise SettingsError(f"{key}: {path} holds no certificate in PEM form.") from error


def _opened(path: str, key: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise SettingsError(f"{key}: {path} cannot be read: {error.strerror or error}.") from error


def _refuse_open_key(path: str, key: str) -> None:
    _opened(path, key)
    mode = Path(path).stat().st_mode
    if mode & 0o007:
        raise SettingsError(
            f"{key}: every user of this machine may open {path} (mode {mode & 0o777:04o}): chmod 0600, and make a new"
            " key if it may have been read."
        )


def _bad_pair(tls: TLS, section: str, error: ssl.SSLError) -> str:
    certificate, key = f"{section}.certificate: {tls.certificate}", f"{section}.key: {tls.key}"
    match error.reason:
        case "KEY_VALUES_MISMATCH" | "KEY_TYPE_MISMATCH" | "NO_CERTIFICATE_ASSIGNED":
            return f"{key} is not the key of the certificate {tls.certificate}."
        case "EE_KEY_TOO_SMALL" | "CA_KEY_TOO_SMALL" | "CA_MD_TOO_WEAK":
            return f"{certificate} is too weak; take RSA of 2048 bits or an elliptic curve."
    if b"ENCRYPTED" in Path(tls.key).read_bytes():
        return f"{key} has a pass phrase, and nobody sits there to type it; take the key without one."
    return f"{certificate} or {key} is no PEM file ({error.reason or error})."


def _done(step: Callable[[], None]) -> bool:
    try:
        step()
    except ssl.SSLWantReadError:
        return False
    return True


def _time(text: object) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(text)), UTC)


_SHORT = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C"}
