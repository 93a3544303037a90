"""An archive of pynetdicom's that does Storage Commitment as a test tells it to."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import AE, AllStoragePresentationContexts, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

INSTANCE = UID("1.2.840.10008.1.20.1.1")
NO_SUCH_OBJECT = 0x0112


@dataclass
class Transaction:
    """What was asked: Transaction UID, and the objects, each (SOP class, SOP instance)."""

    uid: str
    references: list[tuple[str, str]]


@dataclass
class Archive:
    """An archive that stores everything and reports as it is told: on the same association, on a new one, or not."""

    reports: str = "new"
    missing: set[str] = field(default_factory=set)  # of the next report only
    never: set[str] = field(default_factory=set)
    stored: list[tuple[str, bytes]] = field(default_factory=list)
    asked: list[Transaction] = field(default_factory=list)
    node_port: Callable[[], int] = lambda: 0
    ae_title: str = "KEEPER"
    storage_commitment: bool = True
    port: int = 0
    _server: Any = None
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        ae = AE(ae_title=self.ae_title)
        ae.supported_contexts = AllStoragePresentationContexts
        ae.add_supported_context(Verification)
        ae.add_supported_context(StorageCommitmentPushModel)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_N_ACTION, self._action)]
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = self._server.server_address[1]

    def stop(self) -> None:
        for thread in self._threads:
            thread.join(30)
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _store(self, event: evt.Event) -> int:
        self.stored.append((str(event.request.AffectedSOPInstanceUID), event.request.DataSet.getvalue()))
        return 0x0000

    def _action(self, event: evt.Event) -> tuple[int, None]:
        information = event.action_information
        references = [
            (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
            for item in information.ReferencedSOPSequence
        ]
        transaction = Transaction(str(information.TransactionUID), references)
        self.asked.append(transaction)
        if self.reports != "not":
            missing, self.missing = self.missing | self.never, set()
            assoc = event.assoc if self.reports == "same" else None
            thread = threading.Thread(target=self.report, args=(transaction, missing, assoc))
            self._threads.append(thread)
            thread.start()
        return 0x0000, None

    def report(
        self,
        transaction: Transaction,
        missing: set[str] = frozenset(),  # type: ignore[assignment]
        assoc: Any = None,
        *,
        calling: str = "",
        event_type: int = 0,
    ) -> int | None:
        """Report on a transaction; return the status, None where the association or the context was refused."""
        ds = Dataset()
        ds.TransactionUID = transaction.uid
        sound, failed = [], []
        for sop_class, sop_instance in transaction.references:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
            if sop_instance in missing:
                item.FailureReason = NO_SUCH_OBJECT
                failed.append(item)
            else:
                sound.append(item)
        ds.ReferencedSOPSequence = sound
        if failed:
            ds.FailedSOPSequence = failed
        own = None
        if assoc is None:
            ae = AE(ae_title=calling or self.ae_title)
            ae.add_requested_context(StorageCommitmentPushModel)
            role = build_role(StorageCommitmentPushModel, scp_role=True)
            own = assoc = ae.associate("127.0.0.1", self.node_port(), ae_title="REMNANT", ext_neg=[role])
            if not assoc.is_established:
                return None
            assert assoc.accepted_contexts[0].as_scp, "the node did not give us the role of the SCP"
        try:
            kind = event_type or (2 if failed else 1)
            status, _ = assoc.send_n_event_report(ds, kind, StorageCommitmentPushModel, INSTANCE)
            return int(status.Status) if "Status" in status else None
        finally:
            if own is not None:
                own.release()
