"""Audit messages as bytes: the XML of PS3.15 A.5.1, in the events of A.5.3, as syslog messages (RFC 5424, PS3.15 A.6).

A message is one line: whatever a peer has put into a name, control characters are written out as escapes, so that no
value ends a message, begins another or leaves its element. Values are cut to a length that fits into one datagram.

`ParticipantObjectName` stands in each object: the schema asks for it or a query, A.5.3 calls it optional.
"""

import base64
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from dicom_node.log import printable

Outcome = Literal[0, 4, 8, 12]
"""EventOutcomeIndicator (A.5.2): success, minor, serious, major failure."""

_LONGEST = 256  # characters of a value from the wire
_PRIORITY = 10 * 8 + 5  # facility "security/authorization", severity "notice", as IHE's ATNA has it
_WARNING = 10 * 8 + 4


@dataclass(frozen=True, slots=True)
class Code:
    """A coded value; the scheme is DICOM's own unless given."""

    value: str
    meaning: str
    scheme: str = "DCM"


APPLICATION_ACTIVITY = Code("110100", "Application Activity")
INSTANCES_ACCESSED = Code("110103", "DICOM Instances Accessed")
INSTANCES_TRANSFERRED = Code("110104", "DICOM Instances Transferred")
QUERY = Code("110112", "Query")
SECURITY_ALERT = Code("110113", "Security Alert")

STARTED, STOPPED = Code("110120", "Application Start"), Code("110121", "Application Stop")
NODE_AUTHENTICATION = Code("110126", "Node Authentication")
RECORDING_STOPPED = Code("110133", "Audit Recording Stopped")
RECORDING_STARTED = Code("110134", "Audit Recording Started")
IDENTITY_CHANGED = Code("identity_changed", "The same image or study has another patient identity", "99REMNANT")

APPLICATION, LAUNCHER = Code("110150", "Application"), Code("110151", "Application Launcher")
DESTINATION, SOURCE = Code("110152", "Destination Role ID"), Code("110153", "Source Role ID")

_STUDY_UID, _CLASS_UID = Code("110180", "Study Instance UID"), Code("110181", "SOP Class UID")
_NODE_ID = Code("110182", "Node ID")
_PATIENT_NUMBER = Code("2", "Patient Number", "RFC-3881")


@dataclass(frozen=True, slots=True)
class Participant:
    """An active participant (A.5.2): who did it, or with whom. address: host name or IP address, "" where unknown."""

    user_id: str
    requestor: bool
    role: Code | None = None
    ae_title: str = ""
    name: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True)
class Thing:
    """A participant object. details: (type, value), encoded in base 64 as the schema wants it."""

    id: str
    id_type: Code
    name: str = ""
    kind: str = "2"
    role: str = "3"
    query: bytes | None = None
    details: tuple[tuple[str, str], ...] = ()
    sop_class_uid: str = ""
    instances: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """What happened; action: C, R, U, D or E (A.5.2, EventActionCode)."""

    id: Code
    action: Literal["C", "R", "U", "D", "E"]
    participants: Sequence[Participant]
    things: Sequence[Thing] = ()
    types: Sequence[Code] = ()
    outcome: Outcome = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Sender:
    """Who reports: the header of RFC 5424 and AuditSourceIdentification."""

    host: str
    process_id: int
    source_id: str
    site_id: str = ""


def study(uid: str, *, sop_class_uid: str = "", instances: int = 0) -> Thing:
    """Return a study as a participant object; with a class, how many of its instances took part."""
    return Thing(uid, _STUDY_UID, name="study", sop_class_uid=sop_class_uid, instances=instances)


def patient(patient_id: str, name: str) -> Thing:
    """Return a patient as a participant object."""
    return Thing(patient_id, _PATIENT_NUMBER, name=name, kind="1", role="1")


def query(sop_class_uid: str, identifier: bytes, transfer_syntax_uid: str) -> Thing:
    """Return what was asked (A.5.3.10): the encoded identifier and its transfer syntax."""
    return Thing(
        sop_class_uid, _CLASS_UID, query=identifier, details=(("TransferSyntax", transfer_syntax_uid),)
    )  # fmt: skip


def alert_subject(node: str, description: str) -> Thing:
    """Return what a Security Alert is about (A.5.3.11): a node, and what it did."""
    return Thing(node, _NODE_ID, name=node, role="13", details=(("Alert Description", description),))


def syslog(event: Event, sender: Sender, at: datetime) -> bytes:
    """Return an event as one syslog message: a line without its end, UTF-8."""
    header = " ".join(
        (
            f"<{_WARNING if event.outcome else _PRIORITY}>1",
            at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            _header_field(sender.host, 255),
            "remnant",
            str(sender.process_id),
            "DICOM+RFC3881",  # MSGID: PS3.15 A.6
            "-",
        )
    )
    text = f'{header} \ufeff<?xml version="1.0" encoding="UTF-8"?>{_xml(event, sender, at)}'
    return text.encode()


def _xml(event: Event, sender: Sender, at: datetime) -> str:
    root = ET.Element("AuditMessage")
    identification = ET.SubElement(
        root,
        "EventIdentification",
        EventActionCode=event.action,
        EventDateTime=at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        EventOutcomeIndicator=str(event.outcome),
    )
    _coded(identification, "EventID", event.id)
    for one in event.types:
        _coded(identification, "EventTypeCode", one)
    if event.why:
        ET.SubElement(identification, "EventOutcomeDescription").text = _clean(event.why)
    for who in event.participants:
        _participant(root, who)
    source = {"AuditSourceID": _clean(sender.source_id)}
    if sender.site_id:
        source["AuditEnterpriseSiteID"] = _clean(sender.site_id)
    ET.SubElement(ET.SubElement(root, "AuditSourceIdentification", source), "AuditSourceTypeCode", {"csd-code": "4"})
    for thing in event.things:
        _thing(root, thing)
    return ET.tostring(root, encoding="unicode")


def _participant(root: ET.Element, who: Participant) -> None:
    facts = {"UserID": _clean(who.user_id), "UserIsRequestor": str(who.requestor).lower()}
    if who.ae_title:
        facts["AlternativeUserID"] = f"AETITLES={_clean(who.ae_title)}"
    if who.name:
        facts["UserName"] = _clean(who.name)
    if who.address:
        facts["NetworkAccessPointID"] = _clean(who.address)
        facts["NetworkAccessPointTypeCode"] = "2" if _is_address(who.address) else "1"
    element = ET.SubElement(root, "ActiveParticipant", facts)
    if who.role is not None:
        _coded(element, "RoleIDCode", who.role)


def _thing(root: ET.Element, thing: Thing) -> None:
    element = ET.SubElement(
        root,
        "ParticipantObjectIdentification",
        ParticipantObjectID=_clean(thing.id),
        ParticipantObjectTypeCode=thing.kind,
        ParticipantObjectTypeCodeRole=thing.role,
    )
    _coded(element, "ParticipantObjectIDTypeCode", thing.id_type)
    if thing.query is None:
        ET.SubElement(element, "ParticipantObjectName").text = _clean(thing.name)
    else:
        ET.SubElement(element, "ParticipantObjectQuery").text = _base64(thing.query)
    for kind, value in thing.details:
        ET.SubElement(element, "ParticipantObjectDetail", type=kind, value=_base64(_clean(value).encode()))
    if thing.sop_class_uid:
        description = ET.SubElement(element, "ParticipantObjectDescription")
        ET.SubElement(
            description, "SOPClass", UID=_clean(thing.sop_class_uid), NumberOfInstances=str(thing.instances)
        )  # fmt: skip


def _coded(parent: ET.Element, name: str, code: Code) -> None:
    ET.SubElement(
        parent, name, {"csd-code": code.value, "codeSystemName": code.scheme, "originalText": code.meaning}
    )  # fmt: skip


def _clean(text: str) -> str:
    """No control character, no surrogate, nothing that XML 1.0 forbids; at most `_LONGEST` characters."""
    return printable(text, _LONGEST)


def _header_field(text: str, longest: int) -> str:
    """RFC 5424 6: printable ASCII without a space, "-" for nothing."""
    return "".join(c for c in text if "!" <= c <= "~")[:longest] or "-"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _is_address(text: str) -> bool:
    return ":" in text or text.replace(".", "").isdigit()
