"""The receiver's TLS port: who is let in by certificate, what is said of the others, and that the slow delay nobody."""

import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, NuclearMedicineImageStorage
from pynetdicom import AE
from pynetdicom.association import Association
from sqlalchemy import Engine
from structlog.testing import capture_logs

from dicom_node import spool, tls, worklist
from dicom_node.doctor import check_tls
from dicom_node.errors import SettingsError
from dicom_node.receiver import Receiver
from dicom_node.service import warn_of_certificate
from dicom_node.settings import TLS, Settings
from dicom_node.wake import Bell
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

VERIFICATION = "1.2.840.10008.1.1"
HOST = "127.0.0.1"
IDLE_S = 4.0

# pynetdicom drops the socket of a rejected association without closing it; Python's reference count does.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")


def until(look: Callable[[], Any], limit_s: float = 20.0) -> Any:
    deadline = time.monotonic() + limit_s
    pause = threading.Event()
    while not (seen := look()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        pause.wait(0.01)
    return seen


def files(pair: Any) -> TLS:
    return TLS(port=0, certificate=str(pair.certificate), key=str(pair.key), authorities=str(pair.authority))


@dataclass
class Node:
    """A receiver with both ports."""

    receiver: Receiver
    engine: Engine
    port: int
    tls_port: int

    @property
    def connections(self) -> int:
        server = self.receiver._server
        assert server is not None
        return server.connections

    def associate(self, caller: ssl.SSLContext | None, calling: str = "CAMERA") -> Association:
        ae = AE(ae_title=calling)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
        for uid in (VERIFICATION, NuclearMedicineImageStorage):
            ae.add_requested_context(uid, ExplicitVRLittleEndian)
        port, encrypted = (self.tls_port, (caller, HOST)) if caller else (self.port, None)
        return ae.associate(HOST, port, ae_title="REMNANT", tls_args=encrypted)

    def echo(self, caller: ssl.SSLContext | None, calling: str = "CAMERA") -> bool:
        assoc = self.associate(caller, calling)
        if not assoc.is_established:
            return False
        status = assoc.send_c_echo().Status
        assoc.release()
        return bool(status == 0)

    def call(self) -> socket.socket:
        return socket.create_connection((HOST, self.tls_port), timeout=30)


@contextmanager
def listening(directory: Path, pair: Any, sources: list[dict[str, Any]], **changed: Any) -> Iterator[Node]:
    settings = Settings.model_validate(
        {
            "node": {"host": HOST, "port": 0},
            "receiver": {"idle_timeout_s": IDLE_S},
            "storage": {"directory": str(directory), "min_free": 0},
            "sources": sources,
            "tls": files(pair).model_dump() | changed,
        }
    )
    store = spool.open_spool(directory, 0)
    engine = worklist.open_worklist(settings.database_url)
    worklist.upgrade(engine)
    bell = Bell(store.run / "worker.bell")
    receiver = Receiver(settings, engine, store, bell)
    _, port = receiver.start()
    assert receiver.tls_port is not None
    try:
        yield Node(receiver, engine, port, receiver.tls_port)
    finally:
        receiver.stop()
        engine.dispose()
        bell.close()


@pytest.fixture(scope="session")
def own(authority: Any) -> Any:
    return authority.sign("REMNANT")


@pytest.fixture
def node(tmp_path: Path, own: Any) -> Iterator[Node]:
    with listening(tmp_path / "var", own, [{"ae_title": "CAMERA"}, {"ae_title": "OTHER"}]) as started:
        yield started


@pytest.fixture(scope="session")
def camera(authority: Any) -> ssl.SSLContext:
    return tls.client_context(files(authority.sign("CAMERA")))


def scan() -> Dataset:
    (ds,) = expose(phantom(1), examination(1), "two_frames")
    return ds


# --- honest callers ---------------------------------------------------------------------------------------------------


def test_plain_and_tls_stand_side_by_side(node: Node, camera: ssl.SSLContext) -> None:
    assert node.port != node.tls_port
    assert (node.echo(None), node.echo(camera)) == (True, True)


@pytest.mark.parametrize("kind", ["ec", "rsa"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_object_sent_over_tls_is_received_and_its_source_known(
    tmp_path: Path, authority: Any, kind: str, version: ssl.TLSVersion
) -> None:
    caller = tls.client_context(files(authority.sign("CAMERA", kind=kind)))
    caller.minimum_version = caller.maximum_version = version
    with listening(tmp_path, authority.sign("REMNANT", kind=kind), [{"ae_title": "CAMERA"}]) as node:
        assoc = node.associate(caller)
        assert assoc.send_c_store(scan()).Status == 0
        assoc.release()
        (row,) = worklist.rows(node.engine)
        assert row["source_aet"] == "CAMERA"


def test_certificates_between_ours_and_its_authority_stand_behind_ours(tmp_path: Path, authority: Any) -> None:
    between = type(authority)(tmp_path / "between", "Between", above=authority)

    def chained(name: str) -> Any:
        pair = between.sign(name)
        pair.certificate.write_bytes(pair.certificate.read_bytes() + between.file.read_bytes())
        return replace(pair, authority=authority.file)

    ours = chained("REMNANT")
    assert tls.own_certificate(files(ours)).subject == "CN=REMNANT"
    with listening(tmp_path / "var", ours, []) as node:
        assert node.echo(tls.client_context(files(chained("CAMERA"))))


def test_dcmtk_sends_over_tls(node: Node, authority: Any, peer: Callable[[str], Path], tmp_path: Path) -> None:
    pair, path = authority.sign("CAMERA", kind="rsa"), tmp_path / "scan.dcm"
    scan().save_as(path, enforce_file_format=True)
    command = [str(peer("/usr/bin/storescu")), "-v", "-R", "-aet", "CAMERA", "-aec", "REMNANT"]
    command += ["+tls", str(pair.key), str(pair.certificate), "+cf", str(pair.authority), HOST, str(node.tls_port)]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Received Store Response (Success)" in done.stderr + done.stdout
    assert len(list(worklist.rows(node.engine))) == 1


def test_without_a_plain_port_there_is_only_tls(tmp_path: Path, own: Any, camera: ssl.SSLContext) -> None:
    with listening(tmp_path, own, [{"ae_title": "CAMERA"}], plain=False) as node:
        assert node.port == node.tls_port
        assert node.echo(camera)
        assert not node.echo(None)


# --- whose certificate ------------------------------------------------------------------------------------------------


def refused(node: Node, caller: ssl.SSLContext | None, calling: str) -> str:
    """What the log says of an association that is rejected as one of an unknown calling AE title."""
    for _ in range(3):  # pynetdicom, as a caller, takes a rejection for a failed connection now and then
        with capture_logs() as lines:
            assoc = node.associate(caller, calling)
        if assoc.is_rejected:
            break
    assert assoc.is_rejected
    answer = assoc.acceptor.primitive
    assert answer is not None
    assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, 3)
    (line,) = [line for line in lines if line["event"] == "association_refused"]
    return str(line["why"])


def test_a_certificate_lets_in_only_the_ae_title_it_bears(node: Node, camera: ssl.SSLContext) -> None:
    assert node.echo(camera, "CAMERA")
    said = refused(node, camera, "OTHER")
    assert said.startswith("the certificate is not one of this source's: 127.0.0.1, camera, localhost (SHA-256 ")


@pytest.mark.parametrize("form", ["common name", "alternative name", "fingerprint", "with colons"])
def test_a_source_may_name_its_certificate(tmp_path: Path, own: Any, authority: Any, form: str) -> None:
    pair = authority.sign("gamma-7.hospital.example", hosts=("scanner.hospital.example",))
    sha256 = tls.own_certificate(files(pair)).certificate.sha256
    entry = {
        "common name": "Gamma-7.hospital.example",
        "alternative name": "scanner.hospital.example",
        "fingerprint": sha256,
        "with colons": ":".join(sha256[at : at + 2] for at in range(0, 64, 2)).upper(),
    }[form]
    sources = [{"ae_title": "CAMERA", "certificates": ["somebody.else", entry]}]
    with listening(tmp_path, own, sources) as node:
        assert node.echo(tls.client_context(files(pair)))
        assert refused(node, tls.client_context(files(authority.sign("CAMERA"))), "CAMERA")


def test_a_source_that_must_use_tls_is_refused_on_the_plain_port(
    tmp_path: Path, own: Any, camera: ssl.SSLContext
) -> None:
    with listening(tmp_path, own, [{"ae_title": "CAMERA", "tls": True}, {"ae_title": "OTHER"}]) as node:
        assert refused(node, None, "CAMERA") == "this source may call over TLS only"
        assert (node.echo(camera, "CAMERA"), node.echo(None, "OTHER")) == (True, True)


# --- refused before a word of DICOM -----------------------------------------------------------------------------------


def anonymous(authority: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=str(authority.file))
    return context


def old(authority: Any) -> ssl.SSLContext:
    context = anonymous(authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def weak(authority: Any) -> ssl.SSLContext:
    context = anonymous(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE-ECDSA-AES128-SHA:ECDHE-RSA-AES128-SHA")
    return context


def signed_by(authority: Any, known: Any, **how: Any) -> ssl.SSLContext:
    """A caller that shows a certificate of `authority`, and itself knows `known`."""
    return tls.client_context(files(authority.sign("CAMERA", **how)), str(known.file))


# By name: the caller, what we log, what the caller is told.
CALLERS: dict[str, tuple[Callable[[Any, Any], ssl.SSLContext], str, str]] = {
    "unknown authority": (
        lambda known, stranger: signed_by(stranger, known),
        "its certificate is refused: none of the authorities we know has signed it",
        "UNKNOWN_CA",
    ),
    "expired": (
        lambda known, _: signed_by(known, known, days=(-20, -1)),
        "its certificate is refused: it has expired",
        "CERTIFICATE_EXPIRED",
    ),
    "not valid yet": (
        lambda known, _: signed_by(known, known, days=(1, 20)),
        "its certificate is refused: it is not valid yet",
        "BAD_CERTIFICATE",
    ),
    "a server's": (
        lambda known, _: signed_by(known, known, uses=("SERVER_AUTH",)),
        "its certificate is refused: it is not meant for this side of a connection (extended key usage)",
        "UNSUPPORTED_CERTIFICATE",
    ),
    "no certificate": (lambda known, _: anonymous(known), "it shows no certificate", "CERTIFICATE_REQUIRED"),
    "TLS 1.1": (lambda known, _: old(known), "it speaks no TLS 1.2 or newer", "PROTOCOL_VERSION"),
    "weak suites": (lambda known, _: weak(known), "it offers none of our cipher suites", "HANDSHAKE_FAILURE"),
}


def shake_hands_and_read(encrypted: ssl.SSLSocket) -> None:
    """In TLS 1.3 a caller has done its part before its certificate is looked at: it hears of it when it reads."""
    encrypted.do_handshake()
    encrypted.recv(1)


def only_line(lines: list[Any]) -> dict[str, Any]:
    (line,) = [line for line in lines if line["log_level"] != "info"]
    return dict(line)


@pytest.mark.parametrize("name", CALLERS)
def test_each_refusal_is_logged_once_with_its_reason_and_told_to_the_caller(
    node: Node, authority: Any, stranger: Any, camera: ssl.SSLContext, name: str
) -> None:
    make, said, alert = CALLERS[name]
    context = make(authority, stranger)
    with capture_logs() as lines:
        encrypted = context.wrap_socket(node.call(), server_hostname=HOST, do_handshake_on_connect=False)
        with encrypted, pytest.raises(ssl.SSLError) as heard:
            shake_hands_and_read(encrypted)
        until(lambda: not node.connections)
    line = only_line(lines)
    assert (line["event"], line["address"], line["why"]) == ("tls_refused", HOST, said)
    assert alert in str(heard.value.reason)
    assert node.echo(camera)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"\x01\x00\x00\x00\x00\xd0", "it speaks plain DICOM on the TLS port"),
        (b"GET / HTTP/1.1\r\n\r\n", "what it says is not TLS"),
        (b"\x16\x16\x16\x16\x16\x16\x16", "it does not speak TLS on this port"),
    ],
)
def test_what_is_not_tls_is_closed_at_once_and_logged(node: Node, sent: bytes, said: str) -> None:
    with capture_logs() as lines:
        with node.call() as stream:
            stream.sendall(sent)
            with suppress(ConnectionResetError):
                while stream.recv(100):
                    pass
        until(lambda: not node.connections)
    assert only_line(lines)["why"] == said


def test_a_flood_of_refusals_is_a_few_lines_and_a_count(node: Node) -> None:
    with capture_logs() as lines:
        for _ in range(100):
            with node.call() as stream:
                stream.sendall(b"rubbish")
        until(lambda: not node.connections)
    assert len(lines) < 60


def test_tls_on_the_plain_port_is_logged_as_what_it_is(node: Node, camera: ssl.SSLContext) -> None:
    with capture_logs() as lines:
        with socket.create_connection((HOST, node.port), timeout=30) as stream, pytest.raises(ssl.SSLError):
            camera.wrap_socket(stream, server_hostname=HOST)
        until(lambda: not node.connections)
    line = only_line(lines)
    assert (line["event"], line["why"]) == ("association_cut", "it speaks TLS on the plain port")


def test_nothing_is_renegotiated_or_compressed(node: Node, authority: Any, peer: Callable[[str], Path]) -> None:
    pair = authority.sign("CAMERA")
    command = [str(peer("openssl")), "s_client", "-tls1_2", "-connect", f"{HOST}:{node.tls_port}", "-cert"]
    command += [str(pair.certificate), "-key", str(pair.key), "-CAfile", str(pair.authority)]
    done = subprocess.run(command, input="R\n", capture_output=True, text=True, timeout=60, check=False)
    assert "Compression: NONE" in done.stdout
    assert "no renegotiation" in done.stderr


def test_every_suite_has_forward_secrecy_and_authenticated_encryption(own: Any) -> None:
    for context in (tls.server_context(files(own)), tls.client_context(files(own))):
        suites = [suite["name"] for suite in context.get_ciphers()]
        assert len(suites) > 6
        assert all(re.fullmatch(r"(TLS|ECDHE-(EC|R)S?D?S?A)[-_].*(GCM|POLY1305).*", name) for name in suites), suites
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


# --- the slow and the silent ------------------------------------------------------------------------------------------


def greeting(context: ssl.SSLContext) -> bytes:
    """The first flight of a handshake."""
    out = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=HOST).do_handshake()
    return out.read()


def test_broken_handshakes_leave_the_node_as_it_was(node: Node, camera: ssl.SSLContext) -> None:
    hello, chance = greeting(camera), random.Random(1)  # noqa: S311 - the same rubbish each time
    threads = threading.active_count()
    with capture_logs() as lines:
        for _ in range(300):
            broken = bytearray(hello)
            for _ in range(chance.randrange(1, 8)):
                broken[chance.randrange(1, len(broken))] = chance.randrange(256)
            with suppress(OSError), node.call() as stream:
                stream.sendall(broken[: chance.randrange(1, len(broken) + 1)])
                stream.shutdown(socket.SHUT_WR)
        until(lambda: not node.connections)
    assert node.echo(camera)
    until(lambda: threading.active_count() <= threads)
    assert {line["event"] for line in lines} == {"tls_refused"}
    assert len(lines) < 150


REQUEST = b"\x01\x00\x00\x00\x00\xd0\x00\x01"  # the beginning of an association request of 208 bytes


@pytest.mark.alone
def test_slow_connections_of_five_kinds_on_both_ports_delay_no_honest_echo_and_are_all_cut_in_time(
    node: Node, camera: ssl.SSLContext
) -> None:
    """20 of each kind on each port, with the deadlines of an installation.

    Silent; three bytes; a byte a second; on the TLS port the first flight of a handshake and never the second; half of
    an association request, there within the encryption.
    """
    hello, ended = greeting(camera), threading.Event()
    with ExitStack() as lines:

        def call(port: int, count: int, first: bytes) -> list[socket.socket]:
            streams = [socket.create_connection((HOST, port), timeout=30) for _ in range(count)]
            for stream in streams:
                lines.enter_context(closing(stream))
                stream.sendall(first)
            return streams

        began = time.monotonic()
        call(node.port, 40, b"")
        call(node.port, 20, REQUEST[:3])
        call(node.port, 20, REQUEST)
        call(node.tls_port, 20, b"")
        call(node.tls_port, 20, hello[:3])
        call(node.tls_port, 20, hello)
        for stream in call(node.tls_port, 20, b""):
            lines.enter_context(closing(camera.wrap_socket(stream, server_hostname=HOST))).sendall(REQUEST)
        slow = [*((stream, REQUEST) for stream in call(node.port, 20, b""))]
        slow += [(stream, hello) for stream in call(node.tls_port, 20, b"")]

        def drip() -> None:
            for number in range(60):
                for stream, said in slow:
                    with suppress(OSError):
                        stream.sendall(said[number : number + 1])
                if ended.wait(1):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        took = []
        while node.connections and time.monotonic() - began < 20:
            for caller in (camera, None):
                before = time.monotonic()
                assert node.echo(caller)
                took.append(time.monotonic() - before)
            ended.wait(0.2)
        cut_after_s = time.monotonic() - began
        ended.set()
        dripping.join()
    assert len(took) > 20
    assert max(took) < 1
    assert 9 < cut_after_s < 15


def test_a_stop_does_not_wait_for_handshakes_that_never_end(node: Node, camera: ssl.SSLContext) -> None:
    with ExitStack() as lines:
        for _ in range(20):
            lines.enter_context(node.call()).sendall(greeting(camera))
        until(lambda: node.connections == 20)
        began = time.monotonic()
        node.receiver.stop()
        assert time.monotonic() - began < 8
        assert node.connections == 0


def test_an_idle_association_is_aborted_within_the_encryption(node: Node, camera: ssl.SSLContext) -> None:
    assoc = node.associate(camera)
    began = time.monotonic()
    until(lambda: assoc.is_aborted)
    assert time.monotonic() - began < IDLE_S + 6


# --- our own files ----------------------------------------------------------------------------------------------------


def test_a_certificate_that_works_is_read(authority: Any) -> None:
    own = tls.own_certificate(files(authority.sign("REMNANT", hosts=("node.hospital.example",), days=(-1, 20))))
    assert own.subject == "CN=REMNANT"
    assert own.certificate.names == {"remnant", "node.hospital.example"}
    assert timedelta(days=19) < own.valid_until - datetime.now(UTC) < timedelta(days=20)


def encrypted(pair: Any) -> dict[str, str]:
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key(pair.key.read_bytes(), None)
    how = form.BestAvailableEncryption(b"secret")
    pair.key.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, how))
    return {}


def opened(pair: Any) -> dict[str, str]:
    pair.key.chmod(0o644)
    return {}


# By name: how the certificate is made, what is put in its place, what is said.
UNFIT: dict[str, tuple[dict[str, Any], Callable[[Any], dict[str, str]], str]] = {
    "expired": (
        {"days": (-20, -1)},
        lambda _: {},
        r"tls\.certificate: .* has expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC",
    ),
    "not valid yet": ({"days": (1, 20)}, lambda _: {}, r"tls\.certificate: .* is not valid before \d{4}"),
    "a client's": ({"uses": ("CLIENT_AUTH",)}, lambda _: {}, r"tls\.certificate: .* cannot serve as ours: .*usage"),
    "weak": ({"kind": "weak"}, lambda _: {}, r"tls\.certificate: .* is too weak"),
    "another's key": (
        {},
        lambda p: {"key": str(p.authority.with_name("other.key"))},
        "is not the key of the certificate",
    ),
    "a key with a pass phrase": ({}, encrypted, r"tls\.key: .* has a pass phrase"),
    "a key for everybody": ({}, opened, r"tls\.key: every user of this machine may open .* \(mode 0644\)"),
    "no key": ({}, lambda _: {"key": "/nowhere.key"}, r"tls\.key: /nowhere\.key cannot be read: No such file"),
    "no certificate": ({}, lambda p: {"certificate": str(p.key)}, r"tls\.certificate: .* is no PEM file"),
    "no authority": ({}, lambda p: {"authorities": str(p.key)}, r"tls\.authorities: .* holds no certificate"),
    "a folder": ({}, lambda p: {"authorities": str(p.key.parent)}, r"tls\.authorities: .* cannot be read: Is a dir"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_files_that_no_peer_would_take_are_refused_in_one_sentence(authority: Any, tmp_path: Path, name: str) -> None:
    how, spoil, said = UNFIT[name]
    pair = authority.sign("REMNANT", **how)
    other = authority.sign("OTHER")
    other.key.replace(other.authority.with_name("other.key"))
    settings = Settings.model_validate({"tls": files(pair).model_dump() | spoil(pair)})
    with pytest.raises(SettingsError, match=said) as refusal:
        tls.refuse_unfit(settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("role", ["serve", "receive", "send"])
def test_no_role_starts_with_a_certificate_that_has_expired(authority: Any, tmp_path: Path, role: str) -> None:
    ours = files(authority.sign("REMNANT", days=(-20, -1)))
    section = {key: getattr(ours, key) for key in ("certificate", "key", "authorities")}
    text = "[tls]\n" + "".join(f'{key} = "{path}"\n' for key, path in section.items())
    (tmp_path / "node.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", role],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "has expired on" in done.stderr


def test_without_tls_nothing_is_refused() -> None:
    tls.refuse_unfit(Settings())


@pytest.mark.parametrize(
    ("days", "ok", "said"),
    [
        ((-1, 90), True, "CN=REMNANT, valid until "),
        ((-300, 20), False, "in 19 days: renew it"),
        ((-5, 20), True, "in 19 days"),
    ],
    ids=["long", "soon over", "short-lived and fresh"],
)
def test_the_doctor_says_whose_our_certificate_is_and_when_it_ends_and_the_node_warns(
    authority: Any, days: tuple[int, int], ok: bool, said: str
) -> None:
    settings = Settings.model_validate({"tls": files(authority.sign("REMNANT", days=days)).model_dump()})
    well, detail = check_tls(settings)
    assert well is ok
    assert said in detail
    with capture_logs() as lines:
        warn_of_certificate(settings)
    assert [(line["event"], line["what"]) for line in lines] == ([] if ok else [("alarm", "certificate_ends")])
