"""Deliveries: what is due goes to its destination, and what became of it goes into the worklist.

A thread a destination, so that one which is away delays no other. At least once, with the same UID and the same bytes:
a delivery is marked acknowledged only after the archive's answer, so a sender killed in between sends again, and the
archive sees a duplicate of the identical object, never a second result.

Where an archive does not take the class of a report, the next object of `chain` goes instead. What an archive refused
is not remembered: archives get reconfigured, asking again costs an association, and a memory would keep the better
report from it until somebody restarts the node.
"""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Literal

from pydicom import Dataset
from pydicom.uid import UID, ImplicitVRLittleEndian
from sqlalchemy import Engine

from dicom_node import commitment, log, worklist
from dicom_node.audit import Query, Recorder
from dicom_node.chain import ChainError, next_object
from dicom_node.contexts import STUDY_ROOT_FIND
from dicom_node.errors import RemnantError, SettingsError, StorageError
from dicom_node.relay import Relay
from dicom_node.sender import (
    Outcome,
    Parcel,
    Peer,
    encoded_query,
    find_object,
    find_studies,
    object_query,
    request_commitment,
    send,
    study_query,
)
from dicom_node.settings import Destination, Settings
from dicom_node.spool import Spool
from dicom_node.tls import encryption_to
from dicom_node.wake import Bell
from dicom_node.whose import differences

BATCH = 100
"""Objects in one association: after a long outage no association should last for hours."""

HOLD_S = 3600.0
"""Seconds that a taken delivery is kept from other senders; one that died gives back its own at its next start."""

POLL_S = 2.0
"""Longest sleep between two looks into the worklist: another machine's worker cannot ring our bell."""

REPORT_WAIT_S = 1.0
"""Seconds for an archive to report on Storage Commitment while the association stands; most call us back instead."""

_log = log.get("sender")


def peer_of(settings: Settings, destination: Destination) -> Peer:
    """Return whom to call for a destination. Its certificates are read anew, so that new ones need no restart.

    Raises
    ------
    SettingsError: a file for its encryption is missing or wrong.
    """
    encryption = encryption_to(settings, destination)
    return Peer(destination.name, destination.ae_title, destination.host, destination.port, encryption)


class Sender:
    """Sends results until it is stopped."""

    def __init__(
        self, settings: Settings, engine: Engine, store: Spool, *, owner: str, recorder: Recorder | None = None
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._spool = store
        self._owner = owner
        self._recorder = recorder or Recorder(settings, "remnant send")
        self._bell = Bell(store.run / "sender.bell")
        self._rung = {destination.name: threading.Event() for destination in settings.destinations}
        self._failed = threading.Event()
        self._relay = Relay(settings, engine, owner=owner, report_wait_s=REPORT_WAIT_S)

    def run(self, stop: threading.Event) -> None:
        """Deliver until `stop` is set; the object on the wire then comes to its outcome, and no other is begun.

        Raises
        ------
        RemnantError: a thread of ours ended by an error of ours, and all others were stopped: a destination that nobody
            serves any longer would be noticed days later. Whoever started us starts us again.
        """
        freed = worklist.release_deliveries(self._engine, self._owner)
        if freed:
            _log.warning("deliveries_released", count=freed, why="their sender ended before it knew the outcome")
        threads = [
            self._thread(f"to-{destination.name}", partial(self._serve, destination, stop))
            for destination in self._settings.destinations
        ]
        if any(source.commitment == "proxy" for source in self._settings.sources):
            threads += [self._thread(name, part) for name, part in self._relay.parts(stop).items()]
        for thread in threads:
            thread.start()
        while not (stop.is_set() or self._failed.is_set()):
            self._bell.wait(POLL_S)
            for rung in self._rung.values():
                rung.set()
            self._relay.wake()
        stop.set()
        for thread in threads:
            thread.join()
        try:
            worklist.release_deliveries(self._engine, self._owner)
        except worklist.DatabaseUnavailable as error:  # the next start does it
            _log.error("database_unavailable", error=str(error))
        if self._failed.is_set():
            raise RemnantError("A part of the sender ended by an error, which stands in the log.", retry=True)

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - whatever it was, the others must hear of it
                _log.critical("sending_failed", thread=name, exc_info=error)
                self._failed.set()
                self.wake()

        return threading.Thread(target=run, name=name)

    def wake(self) -> None:
        """End the sleep of `run`."""
        self._bell.ring()

    def _serve(self, destination: Destination, stop: threading.Event) -> None:
        rung = self._rung[destination.name]
        while not stop.is_set():
            rung.clear()
            try:
                if self._deliver(destination, stop):
                    continue
                due_s = worklist.next_delivery_in_s(self._engine, destination.name)
            except worklist.DatabaseUnavailable as error:
                _log.error("database_unavailable", destination=destination.name, error=str(error))
                due_s = None
            rung.wait(POLL_S if due_s is None else min(POLL_S, due_s))

    def _deliver(self, destination: Destination, stop: threading.Event) -> bool:
        """Send what is due; True where something was."""
        due = worklist.due_deliveries(self._engine, destination.name, owner=self._owner, limit=BATCH, hold_s=HOLD_S)
        if not due:
            return False
        try:
            peer = peer_of(self._settings, destination)
        except SettingsError as error:  # somebody changes its files just now; in clear nothing goes
            for delivery in due:
                self._record(destination, delivery, Outcome("later", None, str(error), alarm=True), time.monotonic())
            return True
        stored, due = tuple(one for one in due if one.stored_at), tuple(one for one in due if not one.stored_at)
        if stored:
            self._ask_commitment(destination, peer, stored)
        if destination.query and due:
            due = self._meant_for(destination, peer, due)
        by_key = {delivery.id: delivery for delivery in due}
        parcels = [
            Parcel(
                key=delivery.id,
                path=self._spool.results / delivery.file_name,
                sop_class_uid=delivery.sop_class_uid,
                sop_instance_uid=delivery.sop_instance_uid,
                sha256=delivery.sha256,
            )
            for delivery in due
        ]
        timeout_s = self._settings.delivery.timeout_s
        started = time.monotonic()
        outcomes = send(
            peer,
            parcels,
            calling_ae_title=self._settings.node.ae_title,
            connect_timeout_s=timeout_s,
            acse_timeout_s=timeout_s,
            dimse_timeout_s=timeout_s,
        )
        with closing(outcomes):  # at once, which releases the association: the rest is sent by our successor
            for parcel, outcome in outcomes:
                delivery = by_key[parcel.key]
                instead: Outcome | None = outcome
                if outcome.kind == "rejected_context" and delivery.kind == "sr":
                    instead = self._fall_back(destination, delivery, outcome)
                elif outcome.status == worklist.DUPLICATE and destination.query and not destination.storage_commitment:
                    instead = self._looked_for(destination, peer, delivery, outcome)
                if instead is not None:
                    self._record(destination, delivery, instead, started)
                if stop.is_set():
                    break
        return True

    def _meant_for(
        self, destination: Destination, peer: Peer, due: tuple[worklist.DueDelivery, ...]
    ) -> tuple[worklist.DueDelivery, ...]:
        """Return what may go: results whose study the archive does not know yet, or knows under the same identity.

        Another identity stops the row, and a person decides. An archive that cannot be asked now is asked later: a
        result that waits harms less than one in somebody else's record.
        """
        started = time.monotonic()
        timeout_s = self._settings.delivery.timeout_s
        answers = find_studies(
            peer,
            [delivery.whose.study_instance_uid for delivery in due],
            calling_ae_title=self._settings.node.ae_title,
            connect_timeout_s=timeout_s,
            acse_timeout_s=timeout_s,
            dimse_timeout_s=timeout_s,
        )
        for study, answer in answers.items():
            failure = answer if isinstance(answer, Outcome) else None
            self._record_query(destination, study_query(study), failure)
        may_go = []
        for delivery in due:
            if delivery.kind == "kos":
                # A withdrawal belongs beside the results it names, under the identity they were sent with.
                may_go.append(delivery)
                continue
            known = answers[delivery.whose.study_instance_uid]
            if isinstance(known, Outcome):
                self._record(destination, delivery, known, started)
                continue
            # An archive may know one study under two patients: one of them must be ours.
            differing = [differences(delivery.whose, one) for one in known]
            if known and all(differing):
                held = worklist.hold_identity(
                    self._engine,
                    delivery.scan_id,
                    delivery.revision,
                    destination=destination.name,
                    known=known,
                    differing=differing[0],
                )
                if held:
                    text = f"the archive knows the study with another {', '.join(differing[0])}"
                    self._recorder.identity_changed(text, delivery.whose, destination.ae_title)
                    _log.error(
                        "identity_changed",
                        scan=delivery.scan_id,
                        revision=delivery.revision,
                        destination=destination.name,
                        differing=", ".join(differing[0]),
                    )
                else:  # stopped with the delivery before, or of a revision that is over; then only this one ends
                    why = f"the archive knows the study with another {', '.join(differing[0])}"
                    worklist.record_delivery(self._engine, delivery.id, state="refused", error=why)
                continue
            may_go.append(delivery)
        return tuple(may_go)

    def _record(
        self, destination: Destination, delivery: worklist.DueDelivery, outcome: Outcome, started: float
    ) -> None:
        rules = self._settings.delivery
        if destination.storage_commitment and (outcome.kind == "acknowledged" or outcome.status == worklist.DUPLICATE):
            worklist.record_stored(self._engine, delivery.id, status=outcome.status, warning=outcome.warning)
            self._recorder.sent(delivery.whose, delivery.sop_class_uid, destination, "")
            _log.info(
                "stored_at_destination",
                scan=delivery.scan_id,
                revision=delivery.revision,
                kind=delivery.kind,
                destination=destination.name,
                outcome=outcome.text,
                took_ms=round(1000 * (time.monotonic() - started), 1),
            )
            return
        state: Literal["pending", "acknowledged", "refused", "given_up"] = "pending"
        delay_s = 0.0
        if outcome.kind == "acknowledged":
            state = "acknowledged"
        elif outcome.kind == "later":
            if delivery.tried_for_s > rules.give_up_after_days * 86_400:
                state = "given_up"
            else:
                delay_s = commitment.pause_s(rules, delivery.attempts + 1)
        else:
            state = "refused"
        worklist.record_delivery(
            self._engine,
            delivery.id,
            state=state,
            status=outcome.status,
            error=outcome.warning or (None if state == "acknowledged" else outcome.text),
            delay_s=delay_s,
        )
        if state != "pending":
            failure = "" if state == "acknowledged" else outcome.text
            self._recorder.sent(delivery.whose, delivery.sop_class_uid, destination, failure)
        if outcome.unauthenticated:
            self._recorder.not_authenticated(
                outcome.text, address=destination.host, ae_title=destination.ae_title
            )  # fmt: skip
        speak = _log.info if state == "acknowledged" and not outcome.warning else _log.warning
        if outcome.alarm or state in ("refused", "given_up"):
            speak = _log.error
        speak(
            "delivered" if state == "acknowledged" else "not_delivered",
            scan=delivery.scan_id,
            revision=delivery.revision,
            kind=delivery.kind,
            destination=destination.name,
            state=state,
            outcome=outcome.text,
            retry_in_s=round(delay_s, 1) if state == "pending" else None,
            took_ms=round(1000 * (time.monotonic() - started), 1),
        )

    def _ask_commitment(self, destination: Destination, peer: Peer, stored: tuple[worklist.DueDelivery, ...]) -> None:
        """Ask the archive to commit itself to what it stored; what it says comes here or to the receiver."""
        rules = self._settings.delivery
        asked = []
        for delivery in stored:
            if not destination.storage_commitment:  # the setting went, and nobody asks any longer
                worklist.stop_asking(self._engine, delivery.id)
            elif delivery.tried_for_s > rules.give_up_after_days * 86_400:
                why = "stored, but the archive never committed itself to keep it"
                worklist.record_delivery(self._engine, delivery.id, state="given_up", error=why)
                _log.error("not_committed", scan=delivery.scan_id, destination=destination.name, outcome=why)
            else:
                asked.append(delivery)
        if not asked:
            return
        transaction_uid = commitment.new_transaction_uid()
        ids = [delivery.id for delivery in asked]
        delay_s = commitment.pause_s(rules, max(delivery.attempts for delivery in asked))
        # Before the archive hears of it: its report may be faster than we are.
        worklist.ask_commitment(self._engine, ids, transaction_uid, delay_s=delay_s)
        outcome = request_commitment(
            peer,
            commitment.request(transaction_uid, [(one.sop_class_uid, one.sop_instance_uid) for one in asked]),
            heed=lambda ds, event_type_id: commitment.take_report(
                self._engine, rules, (destination.name,), commitment.report_of(ds), event_type_id
            ),
            report_wait_s=REPORT_WAIT_S,
            calling_ae_title=self._settings.node.ae_title,
            connect_timeout_s=rules.timeout_s,
            acse_timeout_s=rules.timeout_s,
            dimse_timeout_s=rules.timeout_s,
        )
        if outcome.kind != "acknowledged":
            worklist.record_unasked(self._engine, ids, outcome.text)
        speak = _log.error if outcome.alarm else _log.info if outcome.kind == "acknowledged" else _log.warning
        speak(
            "commitment_asked",
            destination=destination.name,
            objects=len(asked),
            outcome=outcome.text,
            asked_again_in_s=round(delay_s, 1),
        )

    def _record_query(self, destination: Destination, query: Dataset, failure: Outcome | None) -> None:
        if failure is None or failure.status is not None:  # it was asked
            said = Query(STUDY_ROOT_FIND, ImplicitVRLittleEndian, encoded_query(query))
            self._recorder.queried(destination, said, failure.text if failure else "")

    def _looked_for(
        self, destination: Destination, peer: Peer, delivery: worklist.DueDelivery, outcome: Outcome
    ) -> Outcome:
        """Return what became of an object that the archive says it has already (0111): there, if it finds it."""
        timeout_s = self._settings.delivery.timeout_s
        uids = delivery.whose.study_instance_uid, delivery.series_instance_uid, delivery.sop_instance_uid
        found = find_object(
            peer,
            *uids,
            calling_ae_title=self._settings.node.ae_title,
            connect_timeout_s=timeout_s,
            acse_timeout_s=timeout_s,
            dimse_timeout_s=timeout_s,
        )
        self._record_query(destination, object_query(*uids), found if isinstance(found, Outcome) else None)
        if found is True:
            return Outcome("acknowledged", outcome.status, "the archive had it already, and finds it")
        why = found.text if isinstance(found, Outcome) else "it does not find it"
        return Outcome("later", outcome.status, f"the archive says it has this object already, but {why}", alarm=True)

    def _fall_back(self, destination: Destination, delivery: worklist.DueDelivery, outcome: Outcome) -> Outcome | None:
        """Let the next object go in the place of a report whose class is not taken; None where one does, else what
        becomes of the report."""
        try:
            replacement = next_object(self._engine, self._spool, delivery, sc=destination.sc)
            if replacement is None:
                text = f"{outcome.text}, nor any simpler report, and the scan has no picture to send instead"
                return Outcome("refused", outcome.status, text, alarm=True)
            refused, taken = UID(delivery.sop_class_uid).name, UID(replacement.sop_class_uid).name
            worklist.substitute_delivery(
                self._engine,
                delivery.id,
                replacement,
                status=outcome.status,
                why=f"{refused}: {outcome.text}; {taken} goes instead",
            )
        except (OSError, StorageError) as error:  # the volume is away or full
            return Outcome("later", outcome.status, f"no simpler report could be stored: {error}", alarm=True)
        except worklist.TransitionRefused as error:
            _log.info("not_substituted", scan=delivery.scan_id, revision=delivery.revision, why=str(error))
            return None
        except ChainError as error:
            return Outcome("refused", outcome.status, f"{outcome.text}, and {error}", alarm=True)
        _log.warning(
            "substituted",
            scan=delivery.scan_id,
            revision=delivery.revision,
            destination=destination.name,
            refused=refused,
            goes_instead=taken,
            outcome=outcome.text,
        )
        return None
