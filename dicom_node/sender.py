"""C-STORE and Storage Commitment as SCU: the network part of a delivery, nothing of the worklist.

PS3.4 annexes B and J, PS3.7 sections 9.1.1 and 10.1.

What happened to an object is a value, an `Outcome`, never an exception: acknowledged, refused, to be tried later, or
not negotiable. "Acknowledged" is said only for a response that names this very message and this very object; a lost
response, a time-out, an abort, a peer that is away all mean "later", because the same UID and the same bytes may be
sent again without harm. No wait is without a limit: a peer that goes silent or trickles cannot hold the sender.
No text of an outcome holds patient data; `comment` is the peer's own wording, which may, and must not be logged.
"""

import hashlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar, cast

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.dsutils import encode
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.presentation import PresentationContext, build_context, build_role

from dicom_node import contexts
from dicom_node.errors import RemnantError
from dicom_node.transport.secure import Caller, Encryption, why
from dicom_node.whose import Identity

# pynetdicom then reads the encoded dataset from the file as it stands, instead of decoding and encoding it again: the
# archive gets the bytes whose digest stands in the worklist. Its documented switch; it has no other form than global.
_config.STORE_SEND_CHUNKED_DATASET = True
# What a query asks and what it is answered names patients, and pynetdicom would log both.
_config.LOG_REQUEST_IDENTIFIERS = False
_config.LOG_RESPONSE_IDENTIFIERS = False

_T = TypeVar("_T")

Kind = Literal["acknowledged", "refused", "later", "rejected_context"]

_MAX_PDU_BYTES = 131072  # what we offer to receive; responses are small, 0 (no limit) would let a peer fill our memory
_MIN_PEER_PDU_BYTES = 64  # below it there is no room for a fragment with its header; pynetdicom would divide by zero
_SLOWEST_BYTES_PER_S = 50_000  # a line slower than this counts as silent; an SC of 1 MB has 20 s more than the time-out
_GRACE_S = 2.0  # for pynetdicom to end an association by itself, before the connection is cut under it
_JITTER = 0.2


@dataclass(frozen=True, slots=True)
class Peer:
    """An archive: our short name for it, its AE title, host name or address, TCP port; `tls`: never in clear."""

    name: str
    ae_title: str
    host: str
    port: int
    tls: Encryption | None = None


@dataclass(frozen=True, slots=True)
class Parcel:
    """An object to deliver.

    key: the caller's own number, returned with the outcome. path: a complete Part 10 file. sha256: hex digest of the
    whole file; where it is given, bytes that do not match it are not sent.
    """

    key: int
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an object, or of a C-ECHO.

    kind: "acknowledged" the archive has it; "refused" for good, needs a person; "later" try again; "rejected_context"
    the archive does not take this class, try the next object of the fallback chain. status: the DIMSE status, None
    where there was no response. text: one phrase for a person, safe to log. alarm: a person should look now. warning:
    of an acknowledged object (Bxxx), safe to log. comment: Error Comment of the peer, may hold identity, never logged.
    unauthenticated: one end did not believe the other who it is, by its AE title or its certificate.
    """

    kind: Kind
    status: int | None
    text: str
    alarm: bool = False
    warning: str = ""
    comment: str = field(default="", repr=False)
    unauthenticated: bool = False


@dataclass(frozen=True, slots=True)
class StatusRow:
    """One row of the table by which a C-STORE response is read: statuses `first` to `last`, both included."""

    first: int
    last: int
    kind: Kind
    text: str
    alarm: bool = False


# PS3.4 table B.2-1, PS3.7 annex C. The first row that holds a status counts; a status in no row is tried later.
STATUS_TABLE: tuple[StatusRow, ...] = (
    StatusRow(0x0000, 0x0000, "acknowledged", "stored"),
    StatusRow(0xB000, 0xB000, "acknowledged", "stored, with data elements coerced"),
    StatusRow(0xB006, 0xB006, "acknowledged", "stored, with elements discarded"),
    StatusRow(0xB007, 0xB007, "acknowledged", "stored, though the data set does not match its SOP class"),
    StatusRow(0xB000, 0xBFFF, "acknowledged", "stored, with a warning"),
    StatusRow(0x0110, 0x0110, "later", "processing failure"),
    StatusRow(0x0111, 0x0111, "later", "the archive says it has this object already; nothing confirms that yet"),
    StatusRow(0x0210, 0x0210, "later", "duplicate invocation"),
    StatusRow(0x0213, 0x0213, "later", "resource limitation"),
    StatusRow(0xA700, 0xA7FF, "later", "out of resources"),
    StatusRow(0x0122, 0x0122, "rejected_context", "SOP class not supported"),
    StatusRow(0x0117, 0x0117, "refused", "invalid SOP instance", alarm=True),
    StatusRow(0x0124, 0x0124, "refused", "not authorised", alarm=True),
    StatusRow(0x0211, 0x0211, "refused", "unrecognised operation", alarm=True),
    StatusRow(0x0212, 0x0212, "refused", "mistyped argument", alarm=True),
    StatusRow(0xA900, 0xA9FF, "refused", "data set does not match its SOP class", alarm=True),
    StatusRow(0xC000, 0xCFFF, "refused", "the archive cannot understand the object", alarm=True),
)
# PS3.8 table 9-21, by (source, reason) of an A-ASSOCIATE-RJ.
REJECTION_REASONS: dict[tuple[int, int], str] = {
    (1, 1): "no reason given",
    (1, 2): "application context not supported",
    (1, 3): "it does not know our AE title",
    (1, 7): "it does not go by the AE title we called",
    (2, 1): "no reason given",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "too many associations",
}
_ANY_OTHER = "a status that the standard does not give for C-STORE"


def outcome_of_status(status: int) -> Outcome:
    """Read the status of a C-STORE response; total over 0x0000 to 0xFFFF.

    Raises
    ------
    ValueError: not a 16-bit number.
    """
    if not 0 <= status <= 0xFFFF:
        raise ValueError(f"a DIMSE status has 16 bits, not {status:#x}")
    for row in STATUS_TABLE:
        if row.first <= status <= row.last:
            text = f"{row.text} ({status:04X})"
            warning = text if row.kind == "acknowledged" and status else ""
            return Outcome(row.kind, status, text, alarm=row.alarm, warning=warning)
    return Outcome("later", status, f"{_ANY_OTHER} ({status:04X})")


def back_off_s(attempts: int, *, first_s: float, max_s: float, jitter: float) -> float:
    """Return the seconds to wait after the `attempts`-th failed try: doubled each time, +-20 %, never above `max_s`.

    `jitter` in [0, 1) is the caller's random number: many nodes that lost one archive must not come back in step.
    """
    if attempts < 1 or not 0 <= jitter < 1:
        raise ValueError("attempts count from 1, jitter lies in [0, 1)")
    doubled = first_s * 2.0 ** min(attempts - 1, 62)
    return min(max_s, doubled * (1 + _JITTER * (2 * jitter - 1)))


def send(
    peer: Peer,
    parcels: Iterable[Parcel],
    *,
    calling_ae_title: str,
    connect_timeout_s: float,
    acse_timeout_s: float,
    dimse_timeout_s: float,
) -> Generator[tuple[Parcel, Outcome], None, None]:
    """Send all parcels to one peer over one association; yield each outcome as soon as it is known.

    Every parcel gets exactly one outcome, unless the caller stops iterating: then the rest were not sent, and the
    association is released. A parcel whose file is damaged is refused before anything is sent. The bytes go as they are
    stored; only for a peer that takes a class in Implicit VR Little Endian alone are they re-encoded.

    dimse_timeout_s counts from the beginning of an object, with time added for its size.

    Raises
    ------
    ValueError: more than 64 classes at once. What the network or the peer does never raises.
    """
    ready: list[tuple[Parcel, str]] = []
    for parcel in parcels:
        syntax, fault = _inspect(parcel)
        if fault is not None:
            yield parcel, fault
        else:
            ready.append((parcel, syntax))
    if not ready:
        return
    line = _Line(
        peer,
        _proposals(ready),
        calling_ae_title=calling_ae_title,
        timeouts=_Timeouts(connect_timeout_s, acse_timeout_s, dimse_timeout_s),
    )
    try:
        for parcel, syntax in ready:
            yield parcel, line.store(parcel, syntax)
    finally:
        line.close()


def echo(
    peer: Peer,
    *,
    calling_ae_title: str,
    connect_timeout_s: float,
    acse_timeout_s: float,
    dimse_timeout_s: float,
) -> Outcome:
    """Ask the peer for a C-ECHO (PS3.7 section 9.1.5): "acknowledged", or why not. Never raises for the network."""
    line = _Line(
        peer,
        [build_context(contexts.VERIFICATION, [syntax.uid for syntax in contexts.DEFAULT_SYNTAXES])],
        calling_ae_title=calling_ae_title,
        timeouts=_Timeouts(connect_timeout_s, acse_timeout_s, dimse_timeout_s),
    )
    try:
        return line.echo()
    finally:
        line.close()


def accepted_classes(
    peer: Peer,
    sop_class_uids: Sequence[str],
    *,
    calling_ae_title: str,
    connect_timeout_s: float,
    acse_timeout_s: float,
    dimse_timeout_s: float,
) -> dict[str, bool]:
    """Ask which of the classes the peer would take, by negotiating them and sending nothing.

    Raises
    ------
    RemnantError: no association, so that nothing is known; its text says why. ValueError: more than 64 classes.
    """
    line = _Line(
        peer,
        contexts.proposed_contexts(sop_class_uids),
        calling_ae_title=calling_ae_title,
        timeouts=_Timeouts(connect_timeout_s, acse_timeout_s, dimse_timeout_s),
    )
    try:
        if line.fault is not None and line.fault.kind != "rejected_context":
            raise RemnantError(
                f"{peer.name} did not say which classes it takes: {line.fault.text}.",
                hint="Check its AE title, host and port here, and ours in its own settings.",
                retry=True,
            )
        taken = {uid for uid, _ in line.accepted}
        return {uid: uid in taken for uid in sop_class_uids}
    finally:
        line.close()


def find_studies(
    peer: Peer,
    study_instance_uids: Sequence[str],
    *,
    calling_ae_title: str,
    connect_timeout_s: float,
    acse_timeout_s: float,
    dimse_timeout_s: float,
) -> dict[str, tuple[Identity, ...] | Outcome]:
    """Ask an archive whose each study is (C-FIND, Study Root, STUDY level; PS3.4 C.4.1), over one association.

    A study is answered by every identity under which the archive knows it, none where it does not know it, or by the
    outcome ("later") that says why that could not be found out. What the network or the peer does never raises.
    """
    timeouts = _Timeouts(connect_timeout_s, acse_timeout_s, dimse_timeout_s)
    with _line_to(peer, contexts.STUDY_ROOT_FIND, calling_ae_title, timeouts) as line:
        return {uid: line.find(uid) for uid in dict.fromkeys(study_instance_uids)}


def find_object(
    peer: Peer,
    study_instance_uid: str,
    series_instance_uid: str,
    sop_instance_uid: str,
    *,
    calling_ae_title: str,
    connect_timeout_s: float,
    acse_timeout_s: float,
    dimse_timeout_s: float,
) -> bool | Outcome:
    """Ask an archive whether it has an object (C-FIND, Study Root, IMAGE level; PS3.4 C.4.1); the outcome ("later")
    that says why that could not be found out. What the network or the peer does never raises."""
    timeouts = _Timeouts(connect_timeout_s, acse_timeout_s, dimse_timeout_s)
    with _line_to(peer, contexts.STUDY_ROOT_FIND, calling_ae_title, timeouts) as line:
        return line.has(study_instance_uid, series_instance_uid, sop_instance_uid)


def request_commitment(
    peer: Peer,
    information: Dataset,
    *,
    heed: Callable[[Dataset, int], int],
    report_wait_s: float,
    calling_ae_title: str,
    connect_timeout_s: float,
    acse_timeout_s: float,
    dimse_timeout_s: float,
) -> Outcome:
    """Ask the peer to commit itself to the objects of `information` (N-ACTION, PS3.4 J.3.2): "acknowledged" means that
    it will report, "later" why it could not be asked.

    heed: takes the report (Event Information, Event Type ID) where it comes on this very association, within
    report_wait_s of the answer, and returns the status for it. What the network or the peer does never raises.
    """
    timeouts = _Timeouts(connect_timeout_s, acse_timeout_s, dimse_timeout_s)
    with _line_to(peer, contexts.STORAGE_COMMITMENT, calling_ae_title, timeouts, heed=heed) as line:
        return line.request_commitment(information, report_wait_s)


def report_commitment(
    peer: Peer,
    information: Dataset,
    event_type_id: int,
    *,
    calling_ae_title: str,
    connect_timeout_s: float,
    acse_timeout_s: float,
    dimse_timeout_s: float,
) -> Outcome:
    """Tell a camera what became of its request for Storage Commitment (N-EVENT-REPORT, PS3.4 J.3.3), as its SCP on an
    association of our own: "acknowledged" means that it has taken the report, "later" why it has not. What the network
    or the peer does never raises.
    """
    timeouts = _Timeouts(connect_timeout_s, acse_timeout_s, dimse_timeout_s)
    with _line_to(peer, contexts.STORAGE_COMMITMENT, calling_ae_title, timeouts, provides=True) as line:
        return line.report_commitment(information, event_type_id)


@dataclass(frozen=True, slots=True)
class _Timeouts:
    connect_s: float
    acse_s: float
    dimse_s: float


@contextmanager
def _line_to(
    peer: Peer,
    sop_class_uid: str,
    calling_ae_title: str,
    timeouts: _Timeouts,
    *,
    heed: Callable[[Dataset, int], int] | None = None,
    provides: bool = False,
) -> Iterator["_Line"]:
    """An association for one class, closed behind whatever is asked on it."""
    proposed = [build_context(sop_class_uid, [syntax.uid for syntax in contexts.DEFAULT_SYNTAXES])]
    line = _Line(peer, proposed, calling_ae_title=calling_ae_title, timeouts=timeouts, heed=heed, provides=provides)
    try:
        yield line
    finally:
        line.close()


@dataclass(frozen=True, slots=True)
class _Reply:
    """A DIMSE message from the peer, as far as it says what it answers."""

    message_type: str
    answers_message_id: int | None
    sop_instance_uid: str


class _Line:
    """One association with a peer, from the request to its end, and what pynetdicom's threads report of it."""

    def __init__(
        self,
        peer: Peer,
        proposed: list[PresentationContext],
        *,
        calling_ae_title: str,
        timeouts: _Timeouts,
        heed: Callable[[Dataset, int], int] | None = None,
        provides: bool = False,
    ) -> None:
        """Request the association. Where there is none afterwards, `fault` says why. `provides`: we are the SCP."""
        self.fault: Outcome | None = None
        self.accepted: frozenset[tuple[str, str]] = frozenset()  # (SOP class, transfer syntax)
        self._timeouts = timeouts
        self._connection: socket.socket | None = None
        self._replies: list[_Reply] = []
        self._rejection: A_ASSOCIATE_RJ | None = None
        self._sent = 0
        self._assoc: Association | None = None
        self._heed = heed
        self._who = "the camera" if provides else "the archive"
        self._reported = threading.Event()
        self._encrypting = _Encrypting(peer.tls) if peer.tls else None
        ae = AE(ae_title=calling_ae_title)
        ae.implementation_class_uid = contexts.IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = contexts.IMPLEMENTATION_VERSION_NAME
        ae.connection_timeout = timeouts.connect_s
        ae.acse_timeout = timeouts.acse_s
        ae.dimse_timeout = timeouts.dimse_s
        ae.network_timeout = None  # the caller may need its time between two objects; close() ends the association
        with self._at_most(timeouts.connect_s + timeouts.acse_s + _GRACE_S):
            try:
                assoc = ae.associate(
                    peer.host,
                    peer.port,
                    contexts=proposed,
                    ext_neg=[build_role(UID(str(cx.abstract_syntax)), scp_role=True) for cx in proposed if provides],
                    ae_title=peer.ae_title,
                    max_pdu=_MAX_PDU_BYTES,
                    tls_args=(cast(ssl.SSLContext, self._encrypting), peer.tls.server_name) if peer.tls else None,
                    evt_handlers=[
                        (evt.EVT_CONN_OPEN, self._opened),
                        (evt.EVT_PDU_RECV, self._pdu_received),
                        (evt.EVT_DIMSE_RECV, self._received),
                        (evt.EVT_N_EVENT_REPORT, self._report),
                    ],
                )
            except OSError as error:  # the name cannot be resolved
                self.fault = Outcome("later", None, f"no connection to {_where(peer)}: {error.strerror or error}")
                return
        self._assoc = assoc
        self.accepted = frozenset(
            (str(cx.abstract_syntax), str(cx.transfer_syntax[0])) for cx in assoc.accepted_contexts
        )
        self.fault = self._no_association(assoc, peer, calling_ae_title)

    def store(self, parcel: Parcel, syntax: str) -> Outcome:
        """Send one object, stored in `syntax`, if the association still stands."""
        if self.fault is not None:
            return self.fault
        convert = (parcel.sop_class_uid, syntax) not in self.accepted
        if convert and ((parcel.sop_class_uid, ImplicitVRLittleEndian) not in self.accepted or syntax not in _PLAIN):
            return Outcome("rejected_context", None, "the archive does not take this SOP class in a syntax we have")
        try:
            what = dcmread(parcel.path) if convert else parcel.path
            size_bytes = parcel.path.stat().st_size
        except _UNREADABLE as error:
            return _unreadable(error)
        message_id = self._next_message_id()
        limit_s = self._timeouts.dimse_s + size_bytes / _SLOWEST_BYTES_PER_S
        return self._ask(
            limit_s,
            "C_STORE_RSP",
            parcel.sop_instance_uid,
            message_id,
            lambda assoc: assoc.send_c_store(what, msg_id=message_id, priority=0),
        )

    def echo(self) -> Outcome:
        """Send a C-ECHO, if the association stands."""
        if self.fault is not None:
            return self.fault
        message_id = self._next_message_id()
        return self._ask(
            self._timeouts.dimse_s, "C_ECHO_RSP", "", message_id, lambda assoc: assoc.send_c_echo(msg_id=message_id)
        )

    def request_commitment(self, information: Dataset, report_wait_s: float) -> Outcome:
        """Send an N-ACTION, if the association stands, and wait a little for the report."""
        if self.fault is not None:
            if self.fault.kind == "rejected_context":
                return Outcome("later", None, "the archive does no Storage Commitment", alarm=True)
            return self.fault
        message_id = self._next_message_id()
        outcome = self._ask(
            self._timeouts.dimse_s,
            "N_ACTION_RSP",
            contexts.STORAGE_COMMITMENT_INSTANCE,
            message_id,
            lambda assoc: assoc.send_n_action(
                information,
                1,
                UID(contexts.STORAGE_COMMITMENT),
                UID(contexts.STORAGE_COMMITMENT_INSTANCE),
                msg_id=message_id,
            )[0],
        )
        if outcome.status is None:
            return outcome
        if outcome.status != 0x0000:
            # Whatever it says, what it stored stays stored. What will not pass by itself is for a person.
            for_good = outcome.status not in (0x0110, 0x0210, 0x0213)
            text = f"the archive takes no request for Storage Commitment ({outcome.status:04X})"
            return Outcome("later", outcome.status, text, alarm=for_good)
        self._reported.wait(report_wait_s)
        return Outcome("acknowledged", 0x0000, "asked")

    def report_commitment(self, information: Dataset, event_type_id: int) -> Outcome:
        """Send an N-EVENT-REPORT, if the association stands."""
        if self.fault is not None:
            if self.fault.kind == "rejected_context":
                return Outcome("later", None, "the camera takes no reports on Storage Commitment", alarm=True)
            return self.fault
        if self._assoc is None or not all(cx.as_scp for cx in self._assoc.accepted_contexts):
            text = "the camera does not take us for a provider of Storage Commitment (role selection)"
            return Outcome("later", None, text, alarm=True)
        message_id = self._next_message_id()
        outcome = self._ask(
            self._timeouts.dimse_s,
            "N_EVENT_REPORT_RSP",
            contexts.STORAGE_COMMITMENT_INSTANCE,
            message_id,
            lambda assoc: assoc.send_n_event_report(
                information,
                event_type_id,
                UID(contexts.STORAGE_COMMITMENT),
                UID(contexts.STORAGE_COMMITMENT_INSTANCE),
                msg_id=message_id,
            )[0],
        )
        if outcome.status is None:
            return outcome
        if outcome.status != 0x0000:
            text = f"the camera does not take our report on Storage Commitment ({outcome.status:04X})"
            return Outcome("later", outcome.status, text, alarm=True)
        return Outcome("acknowledged", 0x0000, "reported")

    def find(self, study_instance_uid: str) -> tuple[Identity, ...] | Outcome:
        """Ask whose one study is, if the association stands."""
        # An archive that does not match by the study's UID may answer with other studies.
        found = self._query(
            study_query(study_instance_uid),
            "our query for the study",
            lambda one: _identity(one) if _text(one, "StudyInstanceUID") == study_instance_uid else None,
        )
        return found if isinstance(found, Outcome) else tuple(dict.fromkeys(found))

    def has(self, study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str) -> bool | Outcome:
        """Ask whether the archive finds one object, if the association stands."""
        found = self._query(
            object_query(study_instance_uid, series_instance_uid, sop_instance_uid),
            "our query for the object",
            lambda one: _text(one, "SOPInstanceUID") == sop_instance_uid or None,
        )
        return found if isinstance(found, Outcome) else bool(found)

    def _query(self, query: Dataset, what: str, take: Callable[[Dataset], _T | None]) -> list[_T] | Outcome:
        """Send a C-FIND, if the association stands; return what `take` reads in the answers that fit, None in others.

        `what`: what it is, in a text.
        """
        if self.fault is not None:
            if self.fault.kind == "rejected_context":
                return Outcome(
                    "later", None, "the archive takes no queries for studies (Study Root C-FIND)", alarm=True
                )
            return self.fault
        assoc = self._assoc
        if assoc is None or not assoc.is_established:
            return self._ended("the archive ended the association")
        limit_s = assoc.dimse_timeout = self._timeouts.dimse_s
        found: list[_T] = []
        try:
            with self._at_most(limit_s + _GRACE_S):
                for response, identifier in assoc.send_c_find(
                    query, contexts.STUDY_ROOT_FIND, msg_id=self._next_message_id()
                ):
                    if "Status" not in response:
                        return self._ended(f"the archive did not answer {what}")
                    status = int(response.Status)
                    if status not in _PENDING:
                        break
                    read = None if identifier is None else take(identifier)
                    if read is None:
                        continue
                    found.append(read)
                    if len(found) > _MOST_ANSWERS:
                        assoc.abort()
                        return self._ended(f"the archive has more answers to {what} than a person can read")
                else:
                    return self._ended(f"the archive did not end its answer to {what}")
        except RuntimeError:  # pynetdicom: it ended between our look and its own
            return self._ended("the archive ended the association")
        except _UNREADABLE as error:
            assoc.abort()
            return self._ended(f"the archive's answer to {what} cannot be read ({type(error).__name__})")
        if status != 0x0000:
            return Outcome("later", status, f"the archive could not answer {what} ({status:04X})")
        return found

    def close(self) -> None:
        """End the association, if it stands, and the connection."""
        assoc = self._assoc
        if assoc is not None and assoc.is_established:
            with self._at_most(self._timeouts.acse_s + _GRACE_S):
                assoc.release()
        if self._connection is not None:
            self._connection.close()
        if self._encrypting is not None:
            self._encrypting.close()

    def _ask(
        self,
        limit_s: float,
        answer: str,
        sop_instance_uid: str,
        message_id: int,
        call: Callable[[Association], Dataset],
    ) -> Outcome:
        assoc = self._assoc
        if assoc is None or not assoc.is_established:
            return self._ended(f"{self._who} ended the association")
        self._replies.clear()
        assoc.dimse_timeout = limit_s
        began = time.monotonic()
        try:
            with self._at_most(limit_s + _GRACE_S):
                response = call(assoc)
        except RuntimeError:  # pynetdicom: it ended between our look and its own
            return self._ended(f"{self._who} ended the association")
        except _UNREADABLE as error:
            assoc.abort()  # half a message may be on the line
            self._ended("the object before could not be read to its end")
            return _unreadable(error)
        if "Status" not in response:
            if time.monotonic() - began >= limit_s:
                return self._ended(f"no response within {limit_s:.0f} s")
            return self._ended("the association ended before the response")
        if not self._replies or not all(_answers(r, answer, message_id, sop_instance_uid) for r in self._replies):
            # Whatever it acknowledges, it is not this object: believing it would lose a result.
            assoc.abort()
            return replace(self._ended("the response was not for this object"), alarm=True)
        return replace(outcome_of_status(int(response.Status)), comment=str(response.get("ErrorComment", "")))

    def _ended(self, text: str) -> Outcome:
        """The association is over: this object and all after it are for later."""
        self.fault = Outcome("later", None, f"not sent: {text}")
        return Outcome("later", None, text)

    def _no_association(self, assoc: Association, peer: Peer, calling_ae_title: str) -> Outcome | None:
        if assoc.is_established:
            limit = assoc.acceptor.maximum_length or 0
            if 0 < limit < _MIN_PEER_PDU_BYTES:
                assoc.abort()
                return Outcome("later", None, f"{self._who} takes no more than {limit} bytes at once", alarm=True)
            return None
        if self._rejection is not None:
            given = (self._rejection.source or 0, self._rejection.reason_diagnostic or 0)
            reason = REJECTION_REASONS.get(given, f"source {given[0]}, reason {given[1]}")
            if self._rejection.result == 0x01:
                text = f"association rejected for good, calling {peer.ae_title} as {calling_ae_title}: {reason}"
                return Outcome("later", None, text, alarm=True, unauthenticated=True)
            return Outcome("later", None, f"association rejected for now: {reason}")
        if assoc.rejected_contexts:
            return Outcome("rejected_context", None, "the archive takes none of the SOP classes proposed")
        if self._encrypting is not None and (fault := self._encrypting.fault) is not None:
            # A person has to mend a certificate; an archive that restarts in the middle of it mends itself.
            passing = isinstance(fault, (TimeoutError, ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError))
            text = f"no TLS with {_where(peer)}: {why(fault)}"
            return Outcome("later", None, text, alarm=not passing, unauthenticated=not passing)
        if self._connection is None:
            return Outcome("later", None, f"no connection to {_where(peer)}")
        refusal = ", which may mean our certificate" if self._encrypting else ""
        return Outcome("later", None, f"no answer to our association request, or an abort{refusal}")

    def _next_message_id(self) -> int:
        self._sent = self._sent % 0xFFFF + 1
        return self._sent

    def _opened(self, event: evt.Event) -> None:
        transport = event.assoc.dul.socket
        if transport is None or transport.socket is None:
            return
        connection = self._connection = transport.socket
        # Without it the last, short fragment of an object waits for the peer's delayed acknowledgement, about 40 ms.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _pdu_received(self, event: evt.Event) -> None:
        # pynetdicom loses a rejection, and calls it a failed connection, where the peer closes at once behind it (1 in
        # 5 with DCMTK); that the archive does not know us must reach a person every time.
        if isinstance(event.pdu, A_ASSOCIATE_RJ):
            self._rejection = event.pdu

    def _received(self, event: evt.Event) -> None:
        command = event.message.command_set
        if "MessageIDBeingRespondedTo" not in command:
            return  # a request of the peer's own
        self._replies.append(
            _Reply(
                message_type=type(event.message).__name__,
                answers_message_id=command.MessageIDBeingRespondedTo,
                sop_instance_uid=str(command.get("AffectedSOPInstanceUID", "") or "").rstrip("\0 "),
            )
        )

    def _report(self, event: evt.Event) -> tuple[int, None]:
        """Take an N-EVENT-REPORT, in pynetdicom's thread, which would answer an exception of ours with 0110 as well."""
        if self._heed is None:
            return 0x0211, None  # unrecognised operation: we asked for nothing
        try:
            return self._heed(event.event_information, int(event.event_type or 0)), None
        finally:
            self._reported.set()

    @contextmanager
    def _at_most(self, seconds: float) -> Iterator[None]:
        """Cut the connection if what happens inside takes longer than `seconds`.

        pynetdicom's own time-outs run in the caller's thread, but its reactor blocks without limit in a send to a peer
        that stopped reading and in the read of a PDU that trickles; closing under it is what ends those.
        """

        def cut() -> None:
            if self._connection is not None:
                try:
                    # Not the connection's own: under TLS it drops the encryption while another thread reads.
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
                except OSError:
                    return  # already closed, which is what we want

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _Encrypting:
    """What pynetdicom calls in the place of a context: it keeps the connection, whose fault pynetdicom drops."""

    def __init__(self, encryption: Encryption) -> None:
        self._context = encryption.context
        self._names = encryption.names
        self._stream: ssl.SSLSocket | None = None

    @property
    def fault(self) -> OSError | None:
        """Why there is no TLS connection, or none any more."""
        return self._stream.fault if isinstance(self._stream, Caller) else None

    def wrap_socket(self, stream: socket.socket, *, server_side: bool, server_hostname: str) -> ssl.SSLSocket:
        """As a context does; the handshake comes with the connection, in its time-out."""
        self._stream = self._context.wrap_socket(stream, server_side=server_side, server_hostname=server_hostname)
        if isinstance(self._stream, Caller):
            self._stream.names = self._names
        return self._stream

    def close(self) -> None:
        """Close the connection: after a handshake that failed pynetdicom does not."""
        if self._stream is not None:
            self._stream.close()


_PENDING = (0xFF00, 0xFF01)  # PS3.4 table C.4-1
_MOST_ANSWERS = 16


def study_query(study_instance_uid: str) -> Dataset:
    """Return the identifier of a query for one study; in UTF-8, because an archive may answer in the query's set."""
    query = Dataset()
    query.SpecificCharacterSet = "ISO_IR 192"
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = study_instance_uid
    for keyword in _ASKED:
        setattr(query, keyword, "")
    return query


def object_query(study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str) -> Dataset:
    """Return the identifier of a query for one object, by its unique keys (PS3.4 C.6.2.1)."""
    query = Dataset()
    query.QueryRetrieveLevel = "IMAGE"
    query.StudyInstanceUID = study_instance_uid
    query.SeriesInstanceUID = series_instance_uid
    query.SOPInstanceUID = sop_instance_uid
    return query


def encoded_query(query: Dataset) -> bytes:
    """Return the identifier of a query in Implicit VR Little Endian, for whoever keeps record."""
    return encode(query, is_implicit_vr=True, is_little_endian=True) or b""


_ASKED = ("PatientID", "IssuerOfPatientID", "PatientName", "AccessionNumber", "PatientBirthDate", "PatientSex")


def _identity(identifier: Dataset) -> Identity:
    return Identity(
        study_instance_uid=_text(identifier, "StudyInstanceUID"),
        patient_id=_text(identifier, "PatientID"),
        issuer_of_patient_id=_text(identifier, "IssuerOfPatientID"),
        patient_name=_text(identifier, "PatientName"),
        accession_number=_text(identifier, "AccessionNumber"),
        patient_birth_date=_text(identifier, "PatientBirthDate"),
        patient_sex=_text(identifier, "PatientSex"),
    )


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword)
    # A value may hold what no database takes; it then differs from ours, which holds the result back.
    return "" if value is None else str(value).replace("\0", "").strip().encode("utf-8", "replace").decode("utf-8")


# Syntaxes that differ from Implicit VR Little Endian in nothing but the coding of lengths and representations.
_PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
# What pydicom raises for files that are not what they should be, beside its own exception.
_UNREADABLE = (OSError, InvalidDicomError, ValueError, LookupError, AttributeError, EOFError, struct.error)


def _inspect(parcel: Parcel) -> tuple[str, Outcome | None]:
    """Return the transfer syntax of a parcel's file, or why it must not be sent."""
    try:
        if parcel.sha256 and hashlib.sha256(parcel.path.read_bytes()).hexdigest() != parcel.sha256.lower():
            return "", Outcome("refused", None, "the stored object is damaged: its digest differs", alarm=True)
        meta = read_file_meta_info(parcel.path)
        found = (str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID))
        if found != (parcel.sop_class_uid, parcel.sop_instance_uid):
            return "", Outcome("refused", None, "the stored file holds another object than expected", alarm=True)
        return str(meta.TransferSyntaxUID), None
    except _UNREADABLE as error:
        return "", _unreadable(error)


def _unreadable(error: Exception) -> Outcome:
    if isinstance(error, OSError):  # a volume may be away for a while; a person should know at once all the same
        return Outcome("later", None, f"the stored object cannot be read: {error.strerror or error}", alarm=True)
    return Outcome("refused", None, f"the stored object is not a DICOM file ({type(error).__name__})", alarm=True)


def _proposals(ready: Sequence[tuple[Parcel, str]]) -> list[PresentationContext]:
    """Contexts for all parcels, each (class, syntax) once; classes that share a syntax are proposed together."""
    wanted: dict[tuple[str, str], PresentationContext] = {}
    for syntax in dict.fromkeys(syntax for _, syntax in ready):
        for cx in contexts.proposed_contexts((p.sop_class_uid for p, s in ready if s == syntax), syntax):
            wanted.setdefault((str(cx.abstract_syntax), str(cx.transfer_syntax[0])), cx)
    return list(wanted.values())


def _answers(reply: _Reply, message_type: str, message_id: int, sop_instance_uid: str) -> bool:
    return (
        reply.message_type == message_type
        and reply.answers_message_id == message_id
        and reply.sop_instance_uid in ("", sop_instance_uid)  # optional in a response: PS3.7 table 9.1-1
    )


def _where(peer: Peer) -> str:
    return f"{peer.host}:{peer.port}"
