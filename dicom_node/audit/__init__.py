"""The audit trail (PS3.15 A.5): what happened to patients' data, told to the hospital's audit record repository.

`Recorder` is what the rest of the node knows: one method an event. It writes behind what it tells of, never raises and
never waits longer than half a second: a scan is stored, sent or refused whether it can be recorded or not. `spool`
keeps the messages, `repository` takes them away (in the role `send`), `messages` knows their form.

Without `audit.host` nothing is recorded. Patients' identity stands in these messages, and so never in a log.
"""

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from dicom_node import log
from dicom_node.audit import messages
from dicom_node.audit.messages import Code, Event, Outcome, Participant, Thing
from dicom_node.audit.spool import AuditSpool, LeftOut
from dicom_node.settings import Destination, Settings
from dicom_node.transport import Peer
from dicom_node.whose import Identity

__all__ = ["AuditSpool", "LeftOut", "Recorder", "spool_of"]

_log = log.get("audit")


def spool_of(settings: Settings) -> AuditSpool:
    """Return the spool of a storage folder; it is made when the first message comes."""
    source = _sender(settings)
    return AuditSpool(
        settings.storage.directory / "audit",
        int(settings.audit.max_spool),
        lambda left: _resumed(settings, source, left),
    )


@dataclass(frozen=True, slots=True)
class Query:
    """A C-FIND: its identifier as it is encoded in the transfer syntax."""

    sop_class_uid: str
    transfer_syntax_uid: str
    identifier: bytes


class Recorder:
    """Records events for the repository; does nothing where none is configured. `what`: the role or command."""

    def __init__(self, settings: Settings, what: str) -> None:
        self._settings = settings
        self._sender = _sender(settings)
        self._what = what
        self._spool = spool_of(settings) if settings.audit.on else None
        self._pace = log.Pace()

    def started(self) -> None:
        """Application Activity: the role begins to work."""
        self._activity(messages.STARTED)

    def stopped(self) -> None:
        """Application Activity: the role ends in order. One that was killed has no such message."""
        self._activity(messages.STOPPED)

    def received(self, whose: Identity, sop_class_uid: str, peer: Peer, *, new: bool) -> None:
        """DICOM Instances Transferred: an object is durable. `new` is False for one that was here before."""
        if self._spool is None:
            return  # before anything is put together: a camera waits
        node = self._settings.node.ae_title
        self._record(
            Event(
                messages.INSTANCES_TRANSFERRED,
                "C" if new else "R",
                (
                    _entity(peer.calling_ae_title, messages.SOURCE, requestor=True, address=peer.address),
                    self._us(messages.DESTINATION, ae_title=node),
                ),
                _study_and_patient(whose, sop_class_uid),
            )
        )

    def sent(self, whose: Identity, sop_class_uid: str, destination: Destination, failure: str = "") -> None:
        """DICOM Instances Transferred: a result came to rest at a destination; `failure` says why it is not there."""
        self._record(
            Event(
                messages.INSTANCES_TRANSFERRED,
                "C",
                (
                    self._us(messages.SOURCE, requestor=True),
                    _entity(destination.ae_title, messages.DESTINATION, address=destination.host),
                ),
                _study_and_patient(whose, sop_class_uid),
                outcome=8 if failure else 0,
                why=failure,
            )
        )

    def queried(self, destination: Destination, query: Query, failure: str = "") -> None:
        """Query: an archive was asked whose a study is."""
        self._record(
            Event(
                messages.QUERY,
                "E",
                (
                    self._us(messages.SOURCE, requestor=True),
                    _entity(destination.ae_title, messages.DESTINATION, address=destination.host),
                ),
                (messages.query(query.sop_class_uid, query.identifier, query.transfer_syntax_uid),),
                outcome=4 if failure else 0,
                why=failure,
            )
        )

    def not_authenticated(self, why: str, *, address: str, ae_title: str = "") -> None:
        """Security Alert, Node Authentication: a peer could not prove who it is, or did not believe us.

        At most 30 at once and then one a second, the next one with the number left out: whoever calls the wrong name
        all day does not fill the spool.
        """
        unsaid = self._pace.admit()
        if unsaid is not None:
            text = f"{why}; {unsaid} more were left out before" if unsaid else why
            self._alert(messages.NODE_AUTHENTICATION, text, node=address or ae_title, ae_title=ae_title)

    def identity_changed(self, why: str, whose: Identity, node: str) -> None:
        """Security Alert: a scan is held back, because it may belong to somebody else than its header says."""
        self._alert(messages.IDENTITY_CHANGED, why, node=node, things=_study_and_patient(whose))

    def acted(self, action: Literal["C", "R", "U", "D"], why: str, whose: Identity) -> None:
        """DICOM Instances Accessed: a person decided on a scan by a command."""
        self._record(
            Event(
                messages.INSTANCES_ACCESSED,
                action,
                (_person(requestor=True), self._us(messages.APPLICATION)),
                _study_and_patient(whose),
                why=why,
            )
        )

    def heed(self, event: str, fields: Mapping[str, object]) -> None:
        """Take up what the transport reports, as far as it is an alert."""
        if event == "tls_refused" or (event == "association_refused" and fields.get("for_good")):
            self.not_authenticated(
                str(fields["why"]), address=str(fields["address"]), ae_title=str(fields.get("calling", ""))
            )

    # ------------------------------------------------------------------------------------------------------------------

    def _activity(self, kind: Code) -> None:
        who = (self._us(messages.APPLICATION), _person(messages.LAUNCHER, requestor=True))
        self._record(Event(messages.APPLICATION_ACTIVITY, "E", who, types=(kind,)))

    def _alert(self, kind: Code, why: str, *, node: str, ae_title: str = "", things: Sequence[Thing] = ()) -> None:
        if self._spool is None:
            return
        performed = [_entity(ae_title, None, address=node)] if ae_title else []
        self._record(
            Event(
                messages.SECURITY_ALERT,
                "E",
                (self._us(None, requestor=True), *performed),
                (messages.alert_subject(node, why), *things),
                types=(kind,),
                outcome=4,
                why=why,
            )
        )

    def _us(self, role: Code | None, *, requestor: bool = False, ae_title: str = "") -> Participant:
        return _process(self._settings, self._sender, self._what, role, requestor=requestor, ae_title=ae_title)

    def _record(self, event: Event) -> None:
        if self._spool is None:
            return
        try:
            self._spool.append(messages.syslog(event, self._sender, datetime.now(UTC)))
        except Exception as error:  # noqa: BLE001 - clinical work goes on, and the log has where it failed
            _log.error("alarm", what="an audit message could not be written", error=log.place(error))


def _sender(settings: Settings) -> messages.Sender:
    audit = settings.audit
    return messages.Sender(
        socket.gethostname(), os.getpid(), audit.source_id or settings.node.ae_title, audit.site_id
    )  # fmt: skip


def _process(
    settings: Settings, sender: messages.Sender, what: str, role: Code | None, *, requestor: bool, ae_title: str = ""
) -> Participant:
    return Participant(
        user_id=str(sender.process_id),
        requestor=requestor,
        role=role,
        ae_title=ae_title or settings.node.ae_title,
        name=what,
        address=sender.host,
    )


def _entity(ae_title: str, role: Code | None, *, requestor: bool = False, address: str = "") -> Participant:
    return Participant(ae_title, requestor, role, ae_title=ae_title, address=address)


def _person(role: Code | None = None, *, requestor: bool) -> Participant:
    """Whoever the operating system says that it is."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        name = f"uid {os.getuid()}"
    return Participant(name, requestor, role, name=name, address=socket.gethostname())


def _study_and_patient(whose: Identity, sop_class_uid: str = "") -> tuple[Thing, ...]:
    return (
        messages.study(whose.study_instance_uid, sop_class_uid=sop_class_uid, instances=1 if sop_class_uid else 0),
        messages.patient(whose.patient_id, whose.patient_name),
    )


def _resumed(settings: Settings, sender: messages.Sender, left: LeftOut) -> tuple[bytes, bytes]:
    """Security Alerts that say of themselves that messages are missing here."""
    now = datetime.now(UTC)
    texts: tuple[tuple[Code, str, Outcome], ...] = (
        (messages.RECORDING_STOPPED, f"{left.count} messages were left out since {left.since}: {left.why}", 8),
        (messages.RECORDING_STARTED, "messages are recorded again", 0),
    )
    stopped, started = (
        messages.syslog(
            Event(
                messages.SECURITY_ALERT,
                "E",
                (_process(settings, sender, "audit spool", None, requestor=True),),
                (messages.alert_subject(sender.host, text),),
                types=(kind,),
                outcome=outcome,
                why=text,
            ),
            sender,
            now,
        )
        for kind, text, outcome in texts
    )
    return stopped, started
