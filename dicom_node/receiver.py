"""C-ECHO, C-STORE and Storage Commitment as SCP, and archives' reports on the last (PS3.4 annexes A, B and J).

The order that makes "Success" true: the association is admitted by AE title and address; the dataset's bytes, exactly
as sent, are durable in the spool; one transaction holds the instance row and the transition; only then 0x0000. Killing
this process at any instruction loses no acknowledged object.

It runs in a process of its own and imports neither torch nor cv2, so that a crash in inference cannot stop reception.
Everything that goes wrong becomes a status for the peer: what may pass is A700 (try later), what cannot is Cxxx.
"""

import socket
import time
from collections.abc import Callable
from ipaddress import ip_address

from sqlalchemy import Engine

from dicom_node import commitment, log, spool, worklist
from dicom_node.audit import Recorder
from dicom_node.contexts import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    STORAGE_COMMITMENT,
    STORAGE_COMMITMENT_INSTANCE,
    accepted_contexts,
    commitment_context,
)
from dicom_node.errors import RemnantError
from dicom_node.part10 import part_10_header
from dicom_node.settings import Destination, Settings, Source
from dicom_node.spool import Begun, Spool
from dicom_node.tls import server_context
from dicom_node.transport import (
    C_STORE_RQ,
    N_ACTION_RQ,
    N_EVENT_REPORT_RQ,
    Answer,
    Certificate,
    Door,
    Limits,
    Peer,
    Refusal,
    Request,
    Server,
    Service,
    listen,
)
from dicom_node.uids import valid_uid
from dicom_node.wake import Bell
from dicom_node.whose import Identity
from pipeline.views import HeaderFacts, UnreadableHeader, early_facts, header_facts

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_CLASS = 0x0118
UNRECOGNISED_OPERATION = 0x0211
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

HEADER_LIMIT = 256 * 1024
"""Bytes of a dataset that are read for its header; a camera's header with private groups has about 20 KiB."""

# PS3.8 table 9-21: rejected for good, by the service user.
_UNKNOWN_CALLING = Refusal(1, 1, 3, "calling AE title and address are not those of a source")
_TLS_ONLY = Refusal(1, 1, 3, "this source may call over TLS only")
_UNKNOWN_CALLED = Refusal(1, 1, 7, "unknown called AE title")

_STOP_S = 9.0  # below the time after which `serve` kills a role

_log = log.get("receiver")


class Receiver:
    """The listening side of the node; lives from `start` to `stop`."""

    def __init__(
        self, settings: Settings, engine: Engine, store: Spool, worker_bell: Bell, recorder: Recorder | None = None
    ) -> None:
        self._settings = settings
        self._recorder = recorder or Recorder(settings, "remnant receive")
        self._engine = engine
        self._spool = store
        self._worker_bell = worker_bell
        self._sender_bell = Bell(store.run / "sender.bell")
        analysis = settings.analysis
        self._rules = worklist.IntakeRules(
            require_views=analysis.require_views,
            pair_window_s=analysis.pair_window_s,
            views_timeout_s=analysis.views_timeout_s,
            timezone=settings.zone,
        )
        self._server: Server | None = None
        self._journal = spool.open_journal(store) if settings.storage.journal else None
        self._refusals = log.Pace()

    def start(self) -> tuple[str, int]:
        """Listen; return the address really bound, of the plain port if there is one. Raises RemnantError."""
        tls, host = self._settings.tls, self._settings.listen_host
        doors = [Door((host, self._settings.node.port))] if tls.plain else []
        if tls.on:
            doors.append(Door((host, tls.port), server_context(tls)))
        if host != self._settings.node.host:
            _log.warning("listening_on_loopback_only", why="no [[sources]] is configured")
        receiver = self._settings.receiver
        contexts = accepted_contexts(receiver.extra_classes, receiver.extra_syntaxes)
        reports = any(destination.storage_commitment for destination in self._settings.destinations)
        requests = any(source.commitment == "proxy" for source in self._settings.sources)
        if reports or requests:
            contexts.append(commitment_context(requests=requests, reports=reports))
        service = Service(
            contexts=contexts,
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
            limits=Limits(
                idle_s=receiver.idle_timeout_s,
                associations=receiver.max_associations,
                associations_per_peer=receiver.max_associations_per_peer,
                object_bytes=int(receiver.max_object),
            ),
            admit=self._admit,
            handlers={
                C_STORE_RQ: self._on_store,
                N_EVENT_REPORT_RQ: self._on_report,
                N_ACTION_RQ: self._on_request,
            },
            drafts={C_STORE_RQ: lambda request: _Arriving(self._spool, request)},
            may_use=self._may_use,
            heed=self._recorder.heed,
        )
        try:
            self._server = server = listen(doors, service)
        except OSError as error:
            ports = " and ".join(str(door.address[1]) for door in doors)
            raise RemnantError(
                f"The receiver cannot listen on {host} port {ports}: {error.strerror or error}.",
                hint=f"Is another node running? Choose another [node] port{' or [tls] port' if tls.on else ''}.",
            ) from error
        if self._journal is not None:
            self._journal.start()
        for door, (bound, port) in zip(doors, server.addresses, strict=True):
            _log.info(
                "listening", host=bound, port=port, tls=door.tls is not None, ae_title=self._settings.node.ae_title
            )
        return server.address

    @property
    def tls_port(self) -> int | None:
        """The port really bound for TLS, while there is one."""
        return self._server.addresses[-1][1] if self._server is not None and self._settings.tls.on else None

    def stop(self) -> None:
        """Stop accepting, let a C-STORE under way come to its status, abort what remains: within about 10 s."""
        if self._server is not None:
            self._server.stop(_STOP_S)
            if self._journal is not None:
                self._journal.stop()
        unsaid = self._refusals.rest()
        if unsaid:
            _log.warning("store_refused", lines_left_out=unsaid)
        self._sender_bell.close()

    def _admit(self, peer: Peer) -> Refusal | None:
        if peer.called_ae_title != self._settings.node.ae_title:
            return _UNKNOWN_CALLED
        refused = refusal(self._settings.sources, peer)
        return None if refused is None or reporting(self._settings.destinations, peer) else refused

    def _may_use(self, peer: Peer, abstract_syntax_uid: str) -> bool:
        """An archive calls to report on Storage Commitment and for nothing else, a camera to ask for it where that is
        set, and for everything else."""
        if abstract_syntax_uid == STORAGE_COMMITMENT:
            settings = self._settings
            return bool(reporting(settings.destinations, peer)) or asking(settings.sources, peer) is not None
        return refusal(self._settings.sources, peer) is None

    def _on_report(self, request: Request) -> int:
        """Take an archive's report on Storage Commitment (PS3.4 J.3.3); return the status."""

        def take() -> int:
            names = reporting(self._settings.destinations, request.peer)
            if not names:
                return UNRECOGNISED_OPERATION
            report = commitment.read_report(request.data, request.transfer_syntax_uid)
            return commitment.take_report(self._engine, self._settings.delivery, names, report, request.type_id)

        return self._on_commitment(request, take, "commitment_report_refused")

    def _on_request(self, request: Request) -> int:
        """Take a camera's request for Storage Commitment (PS3.4 J.3.2); return the status."""

        def take() -> int:
            source = asking(self._settings.sources, request.peer)
            if source is None:
                return UNRECOGNISED_OPERATION
            asked = commitment.read_request(request.data, request.transfer_syntax_uid)
            return commitment.take_request(self._engine, source, request.peer.address, asked, request.type_id)

        return self._on_commitment(request, take, "commitment_request_refused")

    def _on_commitment(self, request: Request, take: Callable[[], int], refused: str) -> int:
        """Answer a message of Storage Commitment by `take`; `refused` names it in the log."""
        if request.sop_class_uid != STORAGE_COMMITMENT or request.abstract_syntax_uid != STORAGE_COMMITMENT:
            return NO_SUCH_CLASS
        if request.sop_instance_uid != STORAGE_COMMITMENT_INSTANCE:
            return NO_SUCH_INSTANCE
        status = PROCESSING_FAILURE
        try:
            status = take()
        except commitment.Unreadable as error:
            status, why = commitment.INVALID_ARGUMENT, str(error)
        except RemnantError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the peer gets a status and tries again
            why = log.place(error)
        else:
            if status == SUCCESS:
                self._sender_bell.ring()
            return status
        if self._refusals.admit() is not None:
            _log.warning(refused, source_aet=request.peer.calling_ae_title, status=f"{status:04X}", why=why)
        return status

    def _on_store(self, request: Request) -> int | Answer:
        """Take one object (PS3.4 B.2.3); return the status. The line about what was stored is written behind it."""
        started = time.monotonic()
        try:
            status, fields = self._take(request)
        except RemnantError as error:
            status = OUT_OF_RESOURCES if error.retry else PROCESSING_FAILURE
            fields = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever it was, the peer gets a status, its queue goes on
            status, fields = PROCESSING_FAILURE, {"exc_info": error}
        said = {
            "sop_instance_uid": request.sop_instance_uid,
            "source_aet": request.peer.calling_ae_title,
            "status": f"{status:04X}",
            "took_ms": round(1000 * (time.monotonic() - started), 1),
            **fields,
        }
        if status == SUCCESS:
            return Answer(status, lambda: _log.info("stored", **said))
        # One association can be refused as often as it likes: it must not fill the disk of the log.
        unsaid = self._refusals.admit()
        if unsaid is not None:
            said |= {"lines_left_out": unsaid} if unsaid else {}
            (_log.error if "exc_info" in fields else _log.warning)(
                "store_failed" if "exc_info" in fields else "store_refused", **said
            )
        return status

    def _take(self, request: Request) -> tuple[int, dict[str, object]]:
        class_uid, instance_uid = request.sop_class_uid, request.sop_instance_uid
        if not (valid_uid(class_uid) and valid_uid(instance_uid)):
            return CANNOT_UNDERSTAND, {"why": "the command's UIDs are not UIDs"}
        if class_uid != request.abstract_syntax_uid:
            return DOES_NOT_MATCH, {"why": "command and presentation context disagree on the class"}
        if request.excess == "object":
            return CANNOT_UNDERSTAND, {"why": "the object is longer than receiver.max_object"}
        if request.excess:
            return OUT_OF_RESOURCES, {"why": "too many objects are being received at once"}
        transfer_syntax_uid, dataset = request.transfer_syntax_uid, request.data
        arriving = request.draft if isinstance(request.draft, _Arriving) else None
        try:
            facts = (arriving and arriving.facts) or header_facts(dataset[:HEADER_LIMIT], transfer_syntax_uid)
        except UnreadableHeader as error:
            return CANNOT_UNDERSTAND, {"why": str(error)}
        if not _is_of(request, facts):
            return DOES_NOT_MATCH, {"why": "command and dataset disagree on class or instance"}
        begun = arriving.begun if arriving else None
        with spool.placing(self._spool, _preamble(request), dataset, begun, self._journal) as placed:
            stored = worklist.Stored(placed.name, placed.sha256, len(dataset), transfer_syntax_uid)
            receipt = worklist.receive(
                self._engine,
                facts,
                stored,
                source_aet=request.peer.calling_ae_title,
                rules=self._rules,
                settle=placed.settle,
            )
        if receipt.queued:
            self._worker_bell.ring()
        whose = Identity(
            facts.study_instance_uid,
            facts.patient_id,
            facts.issuer_of_patient_id,
            facts.patient_name,
            facts.accession_number,
        )
        self._recorder.received(whose, class_uid, request.peer, new=receipt.new)
        for alarm in receipt.alarms:
            if alarm == "patient_differs_in_study":
                text = "another patient's object carries this StudyInstanceUID"
                self._recorder.identity_changed(text, whose, request.peer.calling_ae_title)
            _log.warning("alarm", what=alarm, scan=receipt.scan_id, study=facts.study_instance_uid)
        return SUCCESS, {"scan": receipt.scan_id, "state": receipt.state, "new": receipt.new}


class _Arriving:
    """An object whose fragments still come: its header is read as soon as it is there, and what follows is hashed and
    written meanwhile, which the camera would otherwise wait for. Nothing of an object that will be refused is written,
    and nothing is decided here: `Receiver._take` does, and does without this where it came to nothing."""

    def __init__(self, store: Spool, request: Request) -> None:
        self.facts: HeaderFacts | None = None
        self.begun: Begun | None = None
        self._store = store
        self._request = request
        self._head = bytearray()
        self._look_at = 0
        self._over = not (valid_uid(request.sop_class_uid) and valid_uid(request.sop_instance_uid))

    def add(self, piece: memoryview) -> None:
        if self._over:
            return
        try:
            if self.begun is not None:
                self.begun.add(piece)
            elif len(self._head) + len(piece) > HEADER_LIMIT:
                self.drop()
            else:
                self._head += piece
                # Not for each fragment: of single bytes, each would cost a look at all before it.
                if len(self._head) >= self._look_at:
                    self._look_at = 2 * len(self._head)
                    self._begin()
        except UnreadableHeader:
            self.drop()
        except Exception as error:  # noqa: BLE001 - `_take` meets it again, where it becomes a status
            self.drop()
            _log.warning("not_begun", error=log.place(error))

    def drop(self) -> None:
        self._over, self._head = True, bytearray()
        if self.begun is not None:
            self.begun.drop()

    def _begin(self) -> None:
        request, head = self._request, bytes(self._head)
        facts = early_facts(head, request.transfer_syntax_uid)
        if facts is None:
            return
        if not _is_of(request, facts) or request.sop_class_uid != request.abstract_syntax_uid:
            self.drop()
            return
        self.facts = facts
        self.begun = Begun(self._store, _preamble(request))
        self.begun.add(head)
        self._head = bytearray()


def _is_of(request: Request, facts: HeaderFacts) -> bool:
    """Say whether a command and its dataset agree on class and instance."""
    return (facts.sop_class_uid, facts.sop_instance_uid) == (request.sop_class_uid, request.sop_instance_uid)


def _preamble(request: Request) -> bytes:
    return part_10_header(
        request.sop_class_uid,
        request.sop_instance_uid,
        request.transfer_syntax_uid,
        request.peer.calling_ae_title,
    )


def refusal(sources: tuple[Source, ...], peer: Peer) -> Refusal | None:
    """Say why a peer may not send; None for one of the sources, by AE title, address and, over TLS, certificate.

    Without any source: loopback only.
    """
    if not sources:
        return None if ip_address(peer.address).is_loopback else _UNKNOWN_CALLING
    called_so = [
        source for source in sources if source.ae_title == peer.calling_ae_title and source.is_at(peer.address)
    ]
    if not called_so:
        return _UNKNOWN_CALLING
    if peer.certificate is None:
        return _TLS_ONLY if all(source.tls for source in called_so) else None
    names = {name for source in called_so for name in source.certificates or (source.ae_title,)}
    if not any(peer.certificate.is_called(name) for name in names):
        return Refusal(1, 1, 3, f"the certificate is not one of this source's: {peer.certificate}")
    return None


def asking(sources: tuple[Source, ...], peer: Peer) -> Source | None:
    """Return the source that a peer is, where it may ask for Storage Commitment; None where it may not."""
    return next(
        (
            one
            for one in sources
            if one.commitment == "proxy" and one.ae_title == peer.calling_ae_title and refusal((one,), peer) is None
        ),
        None,
    )


def reporting(destinations: tuple[Destination, ...], peer: Peer) -> tuple[str, ...]:
    """Names of the archives that a peer may report for on Storage Commitment: by AE title, address and certificate.

    An archive that we call over TLS reports over TLS, under the name by which we know it.
    """
    return tuple(
        one.name
        for one in destinations
        if one.storage_commitment
        and one.ae_title == peer.calling_ae_title
        and peer.address in _addresses(one.host)
        and (not one.tls if peer.certificate is None else _is_called(one, peer.certificate))
    )


def _is_called(destination: Destination, certificate: Certificate) -> bool:
    return any(
        certificate.is_called(name) for name in (destination.server_name or destination.host, destination.ae_title)
    )


def _addresses(host: str) -> frozenset[str]:
    """Addresses of a host, asked anew each time: an archive that moves must not be locked out."""
    try:
        found = {str(info[4][0]).split("%", 1)[0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return frozenset()
    return frozenset(str(ip_address(one)) for one in found)
