"""C-ECHO and C-STORE as SCP (PS3.4 annex A and B, PS3.7 9.1.1 and 9.1.5).

The order that makes "Success" true: the association is admitted by AE title and address; the dataset's bytes, exactly
as sent, are durable in the spool; one transaction holds the instance row and the transition; only then 0x0000. Killing
this process at any instruction loses no acknowledged object.

It runs in a process of its own and imports neither torch nor cv2, so that a crash in inference cannot stop reception.
Everything that goes wrong becomes a status for the peer: what may pass is A700 (try later), what cannot is Cxxx.
"""

import time
from ipaddress import ip_address, ip_network
from typing import cast

from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.transport import ThreadedAssociationServer
from sqlalchemy import Engine

from dicom_node import log, spool, worklist
from dicom_node.contexts import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, accepted_contexts
from dicom_node.errors import RemnantError
from dicom_node.settings import Settings, Source
from dicom_node.spool import Spool
from dicom_node.transport import listen
from dicom_node.uids import valid_uid
from dicom_node.wake import Bell
from pipeline.views import UnreadableHeader, header_facts

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

HEADER_LIMIT = 256 * 1024
"""Bytes of a dataset that are read for its header; a camera's header with private groups has about 20 KiB."""

# Result, source, diagnostic of an A-ASSOCIATE-RJ: PS3.8 table 9-21.
_UNKNOWN_CALLING = (0x01, 0x01, 0x03)
_UNKNOWN_CALLED = (0x01, 0x01, 0x07)
_TOO_MANY = (0x02, 0x03, 0x02)

_log = log.get("receiver")


class Receiver:
    """The listening side of the node; lives from `start` to `stop`."""

    def __init__(self, settings: Settings, engine: Engine, store: Spool, worker_bell: Bell) -> None:
        self._settings = settings
        self._engine = engine
        self._spool = store
        self._worker_bell = worker_bell
        analysis = settings.analysis
        self._rules = worklist.IntakeRules(
            require_views=analysis.require_views,
            pair_window_s=analysis.pair_window_s,
            views_timeout_s=analysis.views_timeout_s,
            timezone=settings.zone,
        )
        self._ae = AE(ae_title=settings.node.ae_title)
        self._ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        self._ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        # The bound is checked in `_on_requested`, where a refusal can be logged; the library's own stands above it.
        self._ae.maximum_associations = settings.receiver.max_associations + 128
        self._ae.acse_timeout = 15
        self._ae.dimse_timeout = settings.receiver.idle_timeout_s
        self._ae.network_timeout = settings.receiver.idle_timeout_s
        self._contexts = accepted_contexts(settings.receiver.extra_classes, settings.receiver.extra_syntaxes)
        self._server: ThreadedAssociationServer | None = None

    def start(self) -> tuple[str, int]:
        """Listen; return the address really bound. Raises RemnantError where it cannot be."""
        address = (self._settings.listen_host, self._settings.node.port)
        if address[0] != self._settings.node.host:
            _log.warning("listening_on_loopback_only", why="no [[sources]] is configured")
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_C_STORE, self._on_store),
        ]
        try:
            self._server = server = listen(self._ae, address, self._contexts, handlers)
        except OSError as error:
            raise RemnantError(
                f"The receiver cannot listen on {address[0]} port {address[1]}: {error.strerror or error}.",
                hint="Is another node running? Choose another [node] port.",
            ) from error
        host, port = server.server_address[:2]
        _log.info("listening", host=host, port=port, ae_title=self._settings.node.ae_title)
        return str(host), int(port)

    def stop(self) -> None:
        """Stop accepting, let the C-STORE on each association end, abort what remains."""
        if self._server is not None:
            self._server.shutdown()
        for assoc in self._ae.active_associations:
            assoc.abort()

    def _on_requested(self, event: evt.Event) -> None:
        """Admit or reject an association, and say why in the log (PS3.8 9.3.4)."""
        assoc = event.assoc
        request = cast(A_ASSOCIATE, assoc.requestor.primitive)
        calling, called = str(request.calling_ae_title).strip(), str(request.called_ae_title).strip()
        address = assoc.requestor.address
        refusal: tuple[tuple[int, int, int], str] | None = None
        if called != self._settings.node.ae_title:
            refusal = _UNKNOWN_CALLED, "unknown called AE title"
        elif not admitted(self._settings.sources, calling, address):
            refusal = _UNKNOWN_CALLING, "calling AE title and address are not those of a source"
        elif len(self._ae.active_associations) > self._settings.receiver.max_associations:
            refusal = _TOO_MANY, "too many associations"
        if refusal is None:
            return
        _log.warning("association_refused", calling=calling, called=called, address=address, why=refusal[1])
        assoc.acse.send_reject(*refusal[0])
        # Only queued so far, and the library closes the socket as soon as we return. `kill` waits until the peer has
        # closed its end, or the ACSE timeout has passed: a camera that sees "closed" cannot tell its admin why.
        assoc.kill()

    def _on_echo(self, event: evt.Event) -> int:
        return SUCCESS

    def _on_store(self, event: evt.Event) -> int:
        """Take one object (PS3.4 B.2.3); return the status."""
        started = time.monotonic()
        request = cast(C_STORE, event.request)
        uid = str(request.AffectedSOPInstanceUID)
        source_aet = event.assoc.requestor.ae_title.strip()
        try:
            status, fields = self._take(event, request, source_aet)
        except RemnantError as error:
            status = OUT_OF_RESOURCES if error.retry else PROCESSING_FAILURE
            fields = {"error": str(error)}
        except Exception:  # noqa: BLE001 - whatever it was, the peer gets a status, its queue goes on, and we get a trace
            _log.exception("store_failed", sop_instance_uid=uid)
            return PROCESSING_FAILURE
        speak = _log.info if status == SUCCESS else _log.warning
        speak(
            "stored" if status == SUCCESS else "store_refused",
            sop_instance_uid=uid,
            source_aet=source_aet,
            status=f"{status:04X}",
            took_ms=round(1000 * (time.monotonic() - started), 1),
            **fields,
        )
        return status

    def _take(self, event: evt.Event, request: C_STORE, source_aet: str) -> tuple[int, dict[str, object]]:
        class_uid, instance_uid = str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)
        if not (valid_uid(class_uid) and valid_uid(instance_uid)):
            return CANNOT_UNDERSTAND, {"why": "the command's UIDs are not UIDs"}
        transfer_syntax_uid = str(event.context.transfer_syntax)
        dataset = event.encoded_dataset(include_meta=False)
        try:
            facts = header_facts(dataset[:HEADER_LIMIT], transfer_syntax_uid)
        except UnreadableHeader as error:
            return CANNOT_UNDERSTAND, {"why": str(error)}
        if (facts.sop_class_uid, facts.sop_instance_uid) != (class_uid, instance_uid):
            return DOES_NOT_MATCH, {"why": "command and dataset disagree on class or instance"}
        preamble = _preamble(class_uid, instance_uid, transfer_syntax_uid)
        name, digest = spool.put_object(self._spool, preamble, dataset)
        stored = worklist.Stored(
            spool_name=name, sha256=digest, size_bytes=len(dataset), transfer_syntax_uid=transfer_syntax_uid
        )
        receipt = worklist.receive(self._engine, facts, stored, source_aet=source_aet, rules=self._rules)
        if receipt.queued:
            self._worker_bell.ring()
        for alarm in receipt.alarms:
            _log.warning("alarm", what=alarm, scan=receipt.scan_id, study=facts.study_instance_uid)
        return SUCCESS, {"scan": receipt.scan_id, "state": receipt.state, "new": receipt.new}


def admitted(sources: tuple[Source, ...], calling: str, address: str) -> bool:
    """Say whether a peer may send: one of the sources by AE title and address; without any source, loopback only."""
    peer = ip_address(address.split("%", 1)[0])
    if peer.version == 6 and peer.ipv4_mapped:
        peer = peer.ipv4_mapped
    if not sources:
        return peer.is_loopback
    return any(
        source.ae_title == calling
        and (not source.hosts or any(peer in ip_network(host, strict=False) for host in source.hosts))
        for source in sources
    )


def _preamble(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Return preamble, prefix and file meta information of a Part 10 file (PS3.10 7.1)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    buffer = DicomBytesIO()
    write_file_meta_info(buffer, meta)
    return b"\0" * 128 + b"DICM" + buffer.getvalue()
