"""The sender over TLS: what an archive's certificate must be; whatever is wrong means later, and never in clear."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from pynetdicom import build_context

from dicom_node import commitment, tls, transport
from dicom_node.contexts import commitment_context
from dicom_node.delivery import peer_of
from dicom_node.doctor import Check, ask_destination
from dicom_node.errors import SettingsError
from dicom_node.sender import Outcome, Parcel, Peer, echo, report_commitment, send
from dicom_node.settings import TLS, Settings
from dicom_node.tls import encryption_to_source
from dicom_node.transport import C_STORE_RQ, N_EVENT_REPORT_RQ, Door, Limits, Request, Service
from dicom_node.worklist import DueRelay, RelayedObject

HOST = "127.0.0.1"
WAIT = {"connect_timeout_s": 1.0, "acse_timeout_s": 2.0, "dimse_timeout_s": 5.0}


def files(pair: Any) -> TLS:
    return TLS(port=0, certificate=str(pair.certificate), key=str(pair.key), authorities=str(pair.authority))


@contextmanager
def archive(context: ssl.SSLContext | None) -> Iterator[tuple[int, list[Request]]]:
    """The port of an archive that shakes hands with a context, and what it took."""
    took: list[Request] = []

    def store(request: Request) -> int:
        took.append(request)
        return 0

    service = Service(
        contexts=[
            build_context("1.2.840.10008.1.1"),
            build_context(SecondaryCaptureImageStorage),
            commitment_context(requests=False, reports=True),
        ],
        implementation_class_uid="1.2.3",
        implementation_version_name="TEST",
        limits=Limits(idle_s=30, associations=10, associations_per_peer=10, close_s=0.5),
        admit=lambda _: None,
        handlers={C_STORE_RQ: store, N_EVENT_REPORT_RQ: store},
    )
    server = transport.listen([Door((HOST, 0), context)], service)
    try:
        yield server.address[1], took
    finally:
        server.stop(1)


@pytest.fixture
def parcel(tmp_path: Path) -> Parcel:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = UID(generate_uid(prefix=None))
    ds.EncapsulatedDocument = bytes(range(250)) * 1000
    ds.save_as(tmp_path / "object.dcm", enforce_file_format=True)
    return Parcel(1, tmp_path / "object.dcm", str(SecondaryCaptureImageStorage), str(ds.SOPInstanceUID))


@pytest.fixture(scope="session")
def own(authority: Any) -> TLS:
    return files(authority.sign("REMNANT"))


def configured(own: TLS, port: int, **changed: str) -> Settings:
    return Settings.model_validate(
        {
            "tls": own.model_dump(),
            "destinations": [
                {"name": "pacs", "ae_title": "ARCHIVE", "host": HOST, "port": port, "tls": True, **changed}
            ],
        }
    )


def calling(own: TLS, port: int, **changed: str) -> Peer:
    settings = configured(own, port, **changed)
    return peer_of(settings, settings.destinations[0])


def sent(peer: Peer, parcel: Parcel) -> Outcome:
    ((_, outcome),) = send(peer, [parcel], calling_ae_title="REMNANT", **WAIT)
    return outcome


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_archive_with_a_good_certificate_gets_the_object(
    own: TLS, authority: Any, parcel: Parcel, version: ssl.TLSVersion
) -> None:
    context = tls.server_context(files(authority.sign("ARCHIVE")))
    context.maximum_version = version
    with archive(context) as (port, took):
        assert sent(calling(own, port), parcel).kind == "acknowledged"
        assert [one.sop_instance_uid for one in took] == [parcel.sop_instance_uid]
        certificate = took[0].peer.certificate
        assert certificate is not None
        assert "remnant" in certificate.names


def test_an_archive_may_have_an_authority_and_a_name_of_its_own(
    own: TLS, authority: Any, stranger: Any, parcel: Parcel
) -> None:
    theirs = files(stranger.sign("ARCHIVE", hosts=("pacs.hospital.example",)))
    context = tls.server_context(theirs.model_copy(update={"authorities": str(authority.file)}))
    with archive(context) as (port, _):
        peer = calling(own, port, authorities=str(stranger.file), server_name="pacs.hospital.example")
        assert sent(peer, parcel).kind == "acknowledged"
        assert echo(peer, calling_ae_title="REMNANT", **WAIT).kind == "acknowledged"


def served(authority: Any, known: Any, **how: Any) -> ssl.SSLContext:
    pair = authority.sign("ARCHIVE", **how)
    return tls.server_context(files(pair).model_copy(update={"authorities": str(known.file)}))


def old(authority: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = authority.sign("ARCHIVE")
    context.load_cert_chain(pair.certificate, pair.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


# By name: what the archive shakes hands with, and what the delivery says.
ARCHIVES: dict[str, tuple[Callable[[Any, Any], ssl.SSLContext | None], str]] = {
    "unknown authority": (
        lambda known, stranger: served(stranger, known),
        "its certificate is refused: none of the authorities we know has signed it",
    ),
    "expired": (
        lambda known, _: served(known, known, days=(-20, -1)),
        "its certificate is refused: it has expired",
    ),
    "another name": (
        lambda known, _: served(known, known, hosts=("203.0.113.1",)),
        "its certificate is refused: ip address mismatch, certificate is not valid for '127.0.0.1'",
    ),
    "a client's": (
        lambda known, _: served(known, known, uses=("CLIENT_AUTH",)),
        "its certificate is refused: it is not meant for this side of a connection (extended key usage)",
    ),
    "does not know our authority": (
        lambda known, stranger: served(known, stranger),
        "it refuses our certificate: it does not know our authority",
    ),
    "TLS 1.1": (lambda known, _: old(known), "it speaks no TLS 1.2 or newer"),
    "plain": (lambda *_: None, "it does not speak TLS on this port"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_fault_of_tls_means_later_with_its_reason_and_an_alarm_and_nothing_goes_in_clear(
    own: TLS, authority: Any, stranger: Any, parcel: Parcel, name: str
) -> None:
    make, said = ARCHIVES[name]
    with archive(make(authority, stranger)) as (port, took):
        outcome = sent(calling(own, port), parcel)
        assert (outcome.kind, outcome.status, outcome.alarm) == ("later", None, True)
        assert outcome.text == f"no TLS with {HOST}:{port}: {said}"
        assert took == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [(False, "its TLS handshake did not end in time"), (True, "it closed the connection during the TLS handshake")],
    ids=["silent", "closes"],
)
def test_an_archive_that_goes_silent_or_away_in_the_handshake_is_tried_later(
    own: TLS, parcel: Parcel, answers: bool, said: str
) -> None:
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            stream, _ = listener.accept()
            with stream, suppress(OSError):
                stream.recv(1 << 16)
                if not answers:
                    stream.recv(1)  # until the sender gives up

        serving = threading.Thread(target=serve)
        serving.start()
        outcome = sent(calling(own, listener.getsockname()[1]), parcel)
        serving.join(20)
    assert (outcome.kind, outcome.alarm) == ("later", False)
    assert outcome.text.endswith(said)


def test_a_certificate_that_vanished_is_a_reason_that_names_it(own: TLS, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"the authorities of destination pacs: .*gone\.pem cannot be read"):
        calling(own, 104, authorities=str(tmp_path / "gone.pem"))


def test_the_doctor_calls_an_archive_over_tls_and_says_why_it_cannot(
    own: TLS, authority: Any, stranger: Any, tmp_path: Path
) -> None:
    def seen(port: int, **changed: str) -> Check:
        settings = configured(own, port, **changed)
        return next(iter(ask_destination(settings, settings.destinations[0])))

    with archive(tls.server_context(files(authority.sign("ARCHIVE")))) as (port, _):
        assert seen(port) == Check("destination pacs", True, "answers C-ECHO")
        wrong = seen(port, authorities=str(stranger.file))
        assert not wrong.ok
        assert wrong.detail.endswith("its certificate is refused: none of the authorities we know has signed it")
        gone = seen(port, authorities=str(tmp_path / "gone.pem"))
        assert not gone.ok
        assert gone.detail.endswith("gone.pem cannot be read: No such file or directory.")


@pytest.mark.parametrize(
    ("certificates", "shown", "why"),
    [
        ([], "OPTIMA1", ""),
        (["camera1.hospital.example"], "camera1.hospital.example", ""),
        ([], "OPTIMA2", "its certificate is not one of this source's: 127.0.0.1, localhost, optima2"),
        (
            ["camera1.hospital.example"],
            "OPTIMA1",
            "its certificate is not one of this source's: 127.0.0.1, localhost, optima1",
        ),
    ],
)
def test_a_report_to_a_camera_over_tls_goes_to_the_one_whose_certificate_is_named(
    own: TLS, authority: Any, certificates: list[str], shown: str, why: str
) -> None:
    with archive(tls.server_context(files(authority.sign(shown)))) as (port, took):
        settings = Settings.model_validate(
            {
                "tls": own.model_dump(),
                "sources": [{"ae_title": "OPTIMA1", "port": port, "tls": True, "certificates": certificates}],
            }
        )
        (source,) = settings.sources
        peer = Peer("OPTIMA1", "OPTIMA1", HOST, port, encryption_to_source(settings, source))
        kept = RelayedObject(1, SecondaryCaptureImageStorage, "2.25.10", "PACS", nowhere=False)
        relay = DueRelay(1, "OPTIMA1", HOST, "2.25.1", 0, 0.0, 0.0, (kept,))
        outcome = report_commitment(peer, *commitment.answer(relay), calling_ae_title="REMNANT", **WAIT)
        if why:
            assert (outcome.kind, outcome.alarm, took) == ("later", True, [])
            assert why in outcome.text
        else:
            assert (outcome.kind, outcome.text) == ("acknowledged", "reported")
            assert commitment.read_report(took[0].data, took[0].transfer_syntax_uid).committed == {"2.25.10"}
