"""Audit messages: their form against the standard's schema, their spool through kills and full disks, and the way to
repositories that are real sockets: TCP, TLS, UDP, away and back, and Debian's rsyslog."""

import base64
import itertools
import os
import re
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from dicom_node import tls
from dicom_node.audit import AuditSpool, Query, Recorder, spool_of
from dicom_node.audit.repository import Repository
from dicom_node.audit.spool import SEGMENT_BYTES
from dicom_node.doctor import check_audit
from dicom_node.settings import TLS, Destination, Settings
from dicom_node.transport import Peer
from dicom_node.whose import Identity

WHOSE = Identity("1.2.826.0.1.3680043.10.1.77", "RMN-1", "HOSPITAL", "Erfunden^Iris", "A-1")
NM = "1.2.840.10008.5.1.4.1.1.20"
CAMERA = Peer("10.0.0.12", "OPTIMA1", "REMNANT")
PACS = Destination(name="pacs", ae_title="ARCHIVE", host="pacs.hospital.example")
QUERY = Query("1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.1.2", b"\x08\0\x52\0\x06\0\0\0STUDY ")

# PS3.15 A.5.1.1, as data: element -> (attributes it must have, attributes it may have, children in order with bounds).
_CODED = ({"csd-code", "codeSystemName", "originalText"}, {"displayName"}, ())
_MANY = 10**6
SCHEMA: dict[str, tuple[set[str], set[str], tuple[tuple[str, int, int], ...]]] = {
    "AuditMessage": (
        set(),
        set(),
        (
            ("EventIdentification", 1, 1),
            ("ActiveParticipant", 1, _MANY),
            ("AuditSourceIdentification", 1, 1),
            ("ParticipantObjectIdentification", 0, _MANY),
        ),
    ),
    "EventIdentification": (
        {"EventDateTime", "EventOutcomeIndicator"},
        {"EventActionCode"},
        (("EventID", 1, 1), ("EventTypeCode", 0, _MANY), ("EventOutcomeDescription", 0, 1)),
    ),
    "EventID": _CODED,
    "EventTypeCode": _CODED,
    "EventOutcomeDescription": (set(), set(), ()),
    "ActiveParticipant": (
        {"UserID", "UserIsRequestor"},
        {"AlternativeUserID", "UserName", "NetworkAccessPointID", "NetworkAccessPointTypeCode"},
        (("RoleIDCode", 0, _MANY),),
    ),
    "RoleIDCode": _CODED,
    "AuditSourceIdentification": (
        {"AuditSourceID"},
        {"AuditEnterpriseSiteID"},
        (("AuditSourceTypeCode", 0, _MANY),),
    ),
    "AuditSourceTypeCode": ({"csd-code"}, set(), ()),
    "ParticipantObjectIdentification": (
        {"ParticipantObjectID"},
        {"ParticipantObjectTypeCode", "ParticipantObjectTypeCodeRole"},
        (
            ("ParticipantObjectIDTypeCode", 1, 1),
            ("ParticipantObjectName", 0, 1),
            ("ParticipantObjectQuery", 0, 1),
            ("ParticipantObjectDetail", 0, _MANY),
            ("ParticipantObjectDescription", 0, _MANY),
        ),
    ),
    "ParticipantObjectIDTypeCode": _CODED,
    "ParticipantObjectName": (set(), set(), ()),
    "ParticipantObjectQuery": (set(), set(), ()),
    "ParticipantObjectDetail": ({"type", "value"}, set(), ()),
    "ParticipantObjectDescription": (set(), set(), (("SOPClass", 0, _MANY),)),
    "SOPClass": ({"NumberOfInstances"}, {"UID"}, ()),
}
VALUES = {
    "EventActionCode": re.compile("[CRUDE]"),
    "EventDateTime": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"),
    "EventOutcomeIndicator": re.compile("0|4|8|12"),
    "UserIsRequestor": re.compile("true|false"),
    "NetworkAccessPointTypeCode": re.compile("[1-5]"),
    "ParticipantObjectTypeCode": re.compile("[1-4]"),
    "ParticipantObjectTypeCodeRole": re.compile("[1-9]|1[0-9]|2[0-6]"),
    "NumberOfInstances": re.compile(r"\d+"),
}
HEADER = re.compile(
    rb"<8[45]>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [!-~]{1,255} remnant \d+ DICOM\+RFC3881 - \xef\xbb\xbf"
    rb'(<\?xml version="1\.0" encoding="UTF-8"\?><AuditMessage>.*</AuditMessage>)'
)


def faults(element: ET.Element) -> Iterator[str]:
    """In what an element differs from the schema."""
    must, may, children = SCHEMA[element.tag]
    if must - set(element.attrib) or set(element.attrib) - must - may:
        yield f"{element.tag} has the attributes {sorted(element.attrib)}"
    for name, value in element.attrib.items():
        if name in VALUES and not VALUES[name].fullmatch(value):
            yield f"{element.tag} {name}={value}"
    order = [name for name, _, _ in children]
    names = [child.tag for child in element]
    if [name for name in order for _ in range(names.count(name))] != names:
        yield f"{element.tag} has the children {names}"
    for name, least, most in children:
        if not least <= names.count(name) <= most:
            yield f"{element.tag} has {names.count(name)} {name}"
    named = names.count("ParticipantObjectName") + names.count("ParticipantObjectQuery")
    if element.tag == "ParticipantObjectIdentification" and named != 1:
        yield "neither a name nor a query, or both"
    for one in element:
        yield from faults(one)


def read(message: bytes) -> ET.Element:
    """The audit message in a syslog message, which must be one of RFC 5424 in one line and fit the schema."""
    assert b"\n" not in message
    found = HEADER.fullmatch(message)
    assert found, message
    root = ET.fromstring(found[1])  # noqa: S314 - our own
    assert list(faults(root)) == []
    return root


def settings_for(directory: Path, **audit: Any) -> Settings:
    return Settings.model_validate(
        {
            "storage": {"directory": str(directory), "min_free": 0},
            "audit": {"host": "127.0.0.1", "port": 9, "transport": "tcp", **audit},
        }
    )


def waiting(settings: Settings) -> list[bytes]:
    """Every message in the spool, oldest first; nothing is taken away."""
    held = spool_of(settings)
    return [
        line for path in sorted(held.folder.glob("*.messages")) for line in path.read_bytes().split(b"\n") if line
    ]  # fmt: skip


def event_of(root: ET.Element) -> tuple[str, ...]:
    (identification,) = root.findall("EventIdentification")
    codes = [one.attrib.get("csd-code", "") for one in identification]
    return (*codes[: 1 + len(identification.findall("EventTypeCode"))], identification.attrib["EventOutcomeIndicator"])


def details(root: ET.Element) -> list[str]:
    return [base64.b64decode(one.attrib["value"]).decode() for one in root.iter("ParticipantObjectDetail")]


# --- the form ---------------------------------------------------------------------------------------------------------


def everything(recorder: Recorder) -> None:
    recorder.started()
    recorder.received(WHOSE, NM, CAMERA, new=True)
    recorder.received(WHOSE, NM, CAMERA, new=False)
    recorder.queried(PACS, QUERY)
    recorder.queried(PACS, QUERY, "the archive could not answer (A700)")
    recorder.sent(WHOSE, NM, PACS)
    recorder.sent(WHOSE, NM, PACS, "refused (A900)")
    recorder.not_authenticated("unknown called AE title", address="10.0.0.99", ae_title="STRANGER")
    recorder.identity_changed("the same image has another identity", WHOSE, "OPTIMA1")
    recorder.acted("U", "results withdrawn", WHOSE)
    recorder.stopped()


def test_every_event_is_a_message_of_the_standards_schema(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, site_id="Klinikum Süd")
    everything(Recorder(settings, "remnant receive"))
    roots = [read(message) for message in waiting(settings)]
    assert [event_of(root) for root in roots] == [
        ("110100", "110120", "0"),
        ("110104", "0"),
        ("110104", "0"),
        ("110112", "0"),
        ("110112", "4"),
        ("110104", "0"),
        ("110104", "8"),
        ("110113", "110126", "4"),
        ("110113", "identity_changed", "4"),
        ("110103", "0"),
        ("110100", "110121", "0"),
    ]
    assert {root.find("AuditSourceIdentification").attrib["AuditEnterpriseSiteID"] for root in roots} == {
        "Klinikum Süd"
    }


def test_a_received_object_names_camera_node_study_class_and_patient(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    recorder = Recorder(settings, "remnant receive")
    recorder.received(WHOSE, NM, CAMERA, new=True)
    recorder.received(WHOSE, NM, CAMERA, new=False)
    first, again = (read(message) for message in waiting(settings))
    assert [root.find("EventIdentification").attrib["EventActionCode"] for root in (first, again)] == ["C", "R"]
    source, destination = first.findall("ActiveParticipant")
    assert source.find("RoleIDCode").attrib["csd-code"] == "110153"
    assert source.attrib == {
        "UserID": "OPTIMA1",
        "AlternativeUserID": "AETITLES=OPTIMA1",
        "UserIsRequestor": "true",
        "NetworkAccessPointID": "10.0.0.12",
        "NetworkAccessPointTypeCode": "2",
    }
    assert destination.find("RoleIDCode").attrib["csd-code"] == "110152"
    assert destination.attrib["AlternativeUserID"] == "AETITLES=REMNANT"
    study, patient = first.findall("ParticipantObjectIdentification")
    assert (study.attrib["ParticipantObjectID"], study.attrib["ParticipantObjectTypeCode"]) == (
        WHOSE.study_instance_uid,
        "2",
    )
    assert study.find("ParticipantObjectDescription/SOPClass").attrib == {"UID": NM, "NumberOfInstances": "1"}
    assert (patient.attrib["ParticipantObjectID"], patient.attrib["ParticipantObjectTypeCodeRole"]) == ("RMN-1", "1")
    assert patient.find("ParticipantObjectName").text == "Erfunden^Iris"


def test_a_persons_command_names_the_user_of_the_operating_system(tmp_path: Path) -> None:
    import getpass

    settings = settings_for(tmp_path)
    Recorder(settings, "remnant worklist recall").acted("U", "results of row 7 withdrawn: wrong patient", WHOSE)
    (root,) = (read(message) for message in waiting(settings))
    person, program = root.findall("ActiveParticipant")
    assert (person.attrib["UserID"], person.attrib["UserIsRequestor"]) == (getpass.getuser(), "true")
    assert program.attrib["UserName"] == "remnant worklist recall"
    assert root.find("EventIdentification/EventOutcomeDescription").text.endswith("wrong patient")


def test_a_query_holds_what_was_asked(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    Recorder(settings, "remnant send").queried(PACS, QUERY)
    (root,) = (read(message) for message in waiting(settings))
    assert base64.b64decode(root.findtext("ParticipantObjectIdentification/ParticipantObjectQuery")) == QUERY.identifier
    assert details(root) == ["1.2.840.10008.1.2"]


@pytest.mark.parametrize(
    "hostile",
    [
        "A\nB<85>1 2026-01-01T00:00:00.000Z host remnant 1 DICOM+RFC3881 - forged",
        'X"/><AuditMessage>&amp;]]><!--',
        "\x00\x01\x1b[31m\x7f\x85\u2028\u2029\ufffe\uffff",
        "\ud800 half a pair",
        "王^小東=\u0414\u0436",
        "N" * 100_000,
        "",
    ],
)
def test_no_value_leaves_its_element_or_its_line(tmp_path: Path, hostile: str) -> None:
    settings = settings_for(tmp_path, source_id="S")
    recorder = Recorder(settings, "remnant receive")
    recorder.received(
        Identity(hostile, hostile, hostile, hostile, hostile), hostile, Peer(hostile, hostile, "R"), new=True
    )
    recorder.not_authenticated(hostile, address=hostile, ae_title=hostile)
    recorder.acted("U", hostile, WHOSE)
    found = waiting(settings)
    assert len(found) == 3
    for message in found:
        assert len(message) < 16_000
        root = read(message)
        texts = [
            *(value for one in root.iter() for value in one.attrib.values()),
            *(one.text or "" for one in root.iter()),
        ]
        assert all(text.isprintable() for text in texts)


def test_nothing_is_recorded_without_a_repository(tmp_path: Path) -> None:
    everything(Recorder(Settings.model_validate({"storage": {"directory": str(tmp_path)}}), "remnant receive"))
    assert list(tmp_path.iterdir()) == []


def test_a_flood_of_strangers_is_a_few_alerts_and_a_count(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    recorder = Recorder(settings, "remnant receive")
    fields = {"address": "10.0.0.99", "calling": "STRANGER", "why": "unknown", "for_good": True}
    for _ in range(5000):
        recorder.heed("association_refused", fields)
        recorder.heed("association_refused", fields | {"for_good": False})  # full, not unknown
        recorder.heed("association_cut", fields)
    recorder._pace._at -= 60
    recorder.heed("tls_refused", fields)
    found = [read(message) for message in waiting(settings)]
    assert {event_of(root) for root in found} == {("110113", "110126", "4")}
    assert len(found) < 60
    left = sum(
        int(n) for root in found for text in details(root) for n in re.findall(r"(\d+) more were left out", text)
    )
    assert left + len(found) == 5001


# --- the spool --------------------------------------------------------------------------------------------------------


def message(number: int, size: int = 0) -> bytes:
    return b"<85>1 %06d %b</AuditMessage>" % (number, b"x" * size)


def numbers(found: list[bytes]) -> list[int]:
    return [int(one.split()[1]) for one in found]


def drained(held: AuditSpool, limit: int = 4096) -> list[bytes]:
    found: list[bytes] = []
    while (batch := held.waiting(limit)) is not None:
        found += batch.messages
        held.sent(batch.end)
    return found


def test_messages_come_out_in_their_order_over_many_files_and_leave_nothing_behind(tmp_path: Path) -> None:
    held = AuditSpool(tmp_path / "audit", 2**26)
    for number in range(600):
        assert held.append(message(number, 5000))
    held.sync()
    assert len(list(held.folder.glob("*.messages"))) == 3
    assert max(path.stat().st_size for path in held.folder.glob("*.messages")) < SEGMENT_BYTES + 6000
    assert numbers(drained(held)) == list(range(600))
    assert held.bytes_waiting() == 0
    assert held.append(message(600))
    assert numbers(drained(held)) == [600]


def test_only_we_may_read_the_spool(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    before = os.umask(0)
    try:
        Recorder(settings, "remnant receive").started()
        held = spool_of(settings)
        held.sent(held.waiting(100).end)
        Recorder(settings, "remnant receive").started()
    finally:
        os.umask(before)
    assert stat.S_IMODE(held.folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in held.folder.iterdir()} == {
        "lock": 0o600,
        "turn": 0o600,
        "place": 0o600,
        "000000000002.messages": 0o600,
    }


def test_a_batch_that_was_not_confirmed_comes_again(tmp_path: Path) -> None:
    held = AuditSpool(tmp_path / "audit", 2**20)
    for number in range(3):
        held.append(message(number))
    assert numbers(list(held.waiting(100).messages)) == [0, 1, 2]
    held.append(message(3))
    first = held.waiting(100)
    held.append(message(4))
    held.sent(first.end)
    assert numbers(drained(AuditSpool(tmp_path / "audit", 2**20))) == [4]


WRITER = """
import sys
from pathlib import Path
from dicom_node.audit import AuditSpool
held = AuditSpool(Path(sys.argv[1]), 2**26)
for number in range(10**6):
    if held.append(b"<85>1 %06d %b</AuditMessage>" % (number, b"x" * 3000)):
        print("recorded", number, flush=True)
"""


def recorded(lines: Iterable[str]) -> Iterator[int]:
    """What a writer says that it recorded; its log, which tells of a lock that others hold too long, comes between."""
    return (int(line.split()[1]) for line in lines if line.startswith("recorded ") and line.endswith("\n"))


@contextmanager
def three_writers(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that record without a pause until the block ends."""
    with ExitStack() as ending:
        writers = []
        for _ in range(3):
            command = [sys.executable, "-c", WRITER, str(folder)]
            writers.append(ending.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
            ending.callback(writers[-1].kill)
        yield writers


def test_a_kill_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    """Three writers at once, killed anywhere, while somebody sends."""
    held = AuditSpool(tmp_path / "audit", 2**26)
    told: list[int] = []
    found: list[int] = []
    with three_writers(tmp_path / "audit") as writers:
        for writer, most in zip(writers, (40, 60, 80), strict=True):
            assert writer.stdout is not None
            told += itertools.islice(recorded(writer.stdout), most)
            found += numbers(drained(held))
            os.kill(writer.pid, signal.SIGKILL)
            told += recorded(writer.stdout)
    found += numbers(drained(held))
    assert [number for number in told if found.count(number) < told.count(number)] == []
    assert len(found) - len(told) in range(4)  # written, and killed before it could say so


def test_a_torn_line_is_left_out_and_harms_no_other(tmp_path: Path) -> None:
    held = AuditSpool(tmp_path / "audit", 2**20)
    held.append(message(0))
    (path,) = held.folder.glob("*.messages")
    with path.open("ab") as file:
        file.write(message(1)[:-5])
    assert numbers(drained(held)) == [0]
    held.append(message(2))
    with capture_logs() as lines:
        assert numbers(drained(held)) == [2]
    assert [(one["event"], one["count"]) for one in lines] == [("audit_messages_damaged", 1)]


@pytest.mark.parametrize("text", ["", "{", '{"number": 1}x', '{"other": 1}'])
def test_a_damaged_place_sends_again_rather_than_not_at_all(tmp_path: Path, text: str) -> None:
    held = AuditSpool(tmp_path / "audit", 2**20)
    for number in range(3):
        held.append(message(number))
    (held.folder / "place").write_text(text)
    assert numbers(drained(held)) == [0, 1, 2]


def test_a_full_spool_leaves_out_counts_alarms_and_says_so_when_there_is_room(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, max_spool="16 KiB")
    recorder, held = Recorder(settings, "remnant receive"), spool_of(settings)
    with capture_logs() as lines:
        for _ in range(200):
            recorder.received(WHOSE, NM, CAMERA, new=True)
    alarms = [one for one in lines if one["event"] == "alarm"]
    assert [(one["log_level"], one["error"]) for one in alarms] == [("error", "audit.max_spool is reached")]
    assert "Erfunden" not in str(lines)
    left = held.left_out()
    kept = len(waiting(settings))
    assert left is not None
    assert (left.count + kept, held.bytes_waiting() <= 16 * 1024) == (200, True)
    ok, text = check_audit(settings)
    assert not ok
    assert f"{left.count} messages were left out since" in text
    drained(held)
    recorder.stopped()
    stopped, started, last = (read(one) for one in waiting(settings))
    assert [event_of(one)[1] for one in (stopped, started, last)] == ["110133", "110134", "110121"]
    assert details(stopped)[0].startswith(f"{left.count} messages were left out since {left.since}")
    assert held.left_out() is None


def test_a_spool_that_cannot_be_used_or_is_held_delays_nobody_for_long(tmp_path: Path) -> None:
    import fcntl

    held = AuditSpool(tmp_path / "nowhere" / "audit", 2**20)
    with capture_logs() as lines:
        assert not held.append(message(0))
    assert [one["what"] for one in lines] == ["the audit spool cannot be used"]
    held = AuditSpool(tmp_path / "audit", 2**20)
    held.append(message(0))
    with (held.folder / "lock").open("r+b") as lock, capture_logs() as lines:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        assert not held.append(message(1))
        assert time.monotonic() - began < 2
    assert [one["error"] for one in lines] == ["another process holds the audit spool"]
    assert held.append(message(2))


# --- the way to the repository ----------------------------------------------------------------------------------------


class Listener:
    """A repository: takes octet-counted messages from a port until it is closed. broken: cuts each connection."""

    def __init__(self, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.taken: list[bytes] = []
        self.broken = False
        self._context = context
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                stream, _ = self._socket.accept()
            except OSError:
                return
            stream.settimeout(10)
            with stream, suppress(OSError):
                if self._context is not None:
                    with self._context.wrap_socket(stream, server_side=True) as secured:
                        self._take(secured)
                        if not self.broken:
                            secured.unwrap()
                else:
                    self._take(stream)

    def _take(self, stream: socket.socket) -> None:
        data = b""
        while True:
            piece = stream.recv(1000)
            if self.broken:  # as a system does whose program died with something unread
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if not piece:
                assert not data
                return
            data += piece
            while (found := re.match(rb"([1-9]\d*) ", data)) and len(data) >= found.end() + int(found[1]):
                self.taken.append(data[found.end() : found.end() + int(found[1])])
                data = data[found.end() + int(found[1]) :]


@pytest.fixture
def encrypted(tmp_path: Path, authority: Any) -> tuple[ssl.SSLContext, dict[str, str]]:
    """What a repository with TLS shakes hands with, and the settings to reach it."""
    theirs, ours = authority.sign("repository"), authority.sign("REMNANT")
    context = tls.server_context(
        TLS(certificate=str(theirs.certificate), key=str(theirs.key), authorities=str(authority.file))
    )
    return context, {
        "transport": "tls",
        "certificate": str(ours.certificate),
        "key": str(ours.key),
        "authorities": str(authority.file),
    }


@pytest.fixture(params=["tcp", "tls"])
def repository(request: pytest.FixtureRequest) -> Iterator[tuple[Listener, dict[str, Any]]]:
    context, how = request.getfixturevalue("encrypted") if request.param == "tls" else (None, {"transport": "tcp"})
    listener = Listener(context)
    yield listener, how | {"port": listener.port}
    listener.close()


def test_a_repository_gets_every_message_whole_and_in_order(repository: Any, tmp_path: Path) -> None:
    listener, how = repository
    settings = settings_for(tmp_path, **how)
    recorder = Recorder(settings, "remnant receive")
    for _ in range(3):
        everything(recorder)
    expected = waiting(settings)
    assert Repository(settings, spool_of(settings)).send_all()
    assert listener.taken == expected
    assert event_of(read(listener.taken[0])) == ("110100", "110120", "0")
    assert spool_of(settings).bytes_waiting() == 0
    assert check_audit(settings) == (True, "0.0 of 256 MiB wait; the repository answers")


def test_what_a_repository_did_not_read_is_sent_again(repository: Any, tmp_path: Path) -> None:
    listener, how = repository
    settings = settings_for(tmp_path, **how)
    everything(Recorder(settings, "remnant receive"))
    listener.broken = True
    with capture_logs() as lines:
        assert not Repository(settings, spool_of(settings)).send_all()
    assert [one["event"] for one in lines] == ["audit_repository_away"]
    listener.broken = False
    expected = waiting(settings)
    assert Repository(settings, spool_of(settings)).send_all()
    assert listener.taken == expected


def test_while_a_repository_is_away_nothing_is_lost_and_the_order_stays(tmp_path: Path) -> None:
    listener = Listener()
    port = listener.port
    settings = settings_for(tmp_path, port=port)
    recorder, repository = Recorder(settings, "remnant receive"), Repository(settings, spool_of(settings))
    recorder.acted("U", "one", WHOSE)
    assert repository.send_all()
    taken = list(listener.taken)
    listener.close()
    with capture_logs() as lines:
        for word in ("two", "three", "four"):
            recorder.acted("U", word, WHOSE)
            assert not repository.send_all()
        listener = Listener(port=port)
        recorder.acted("U", "five", WHOSE)
        assert repository.send_all()
    taken += listener.taken
    listener.close()
    assert [one["event"] for one in lines] == ["audit_repository_away", "audit_repository_back"]
    said = [read(one).findtext("EventIdentification/EventOutcomeDescription") for one in taken]
    assert said == ["one", "two", "three", "four", "five"]


def test_a_repository_with_a_strangers_certificate_gets_nothing(tmp_path: Path, encrypted: Any, stranger: Any) -> None:
    theirs = stranger.sign("repository")
    context = tls.server_context(
        TLS(certificate=str(theirs.certificate), key=str(theirs.key), authorities=str(stranger.file))
    )
    listener = Listener(context)
    settings = settings_for(tmp_path, **encrypted[1], port=listener.port)
    Recorder(settings, "remnant receive").started()
    with capture_logs() as lines:
        assert not Repository(settings, spool_of(settings)).send_all()
    assert lines[0]["why"] == "its certificate is refused: none of the authorities we know has signed it"
    assert check_audit(settings)[0] is False
    listener.close()
    assert listener.taken == []


def test_datagrams_hold_one_message_each_and_nobody_listening_is_noticed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(10)
        settings = settings_for(tmp_path, transport="udp", port=listener.getsockname()[1])
        everything(Recorder(settings, "remnant receive"))
        expected = waiting(settings)
        assert Repository(settings, spool_of(settings)).send_all()
        assert [listener.recv(65536) for _ in expected] == expected
    Recorder(settings, "remnant receive").started()
    with capture_logs() as lines:
        assert not Repository(settings, spool_of(settings)).send_all()
    assert [one["event"] for one in lines] == ["audit_repository_away"]
    assert len(waiting(settings)) == 1


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_debians_rsyslog_takes_the_messages(
    peer: Callable[[str], Path], tmp_path: Path, encrypted: Any, authority: Any, transport: str
) -> None:
    rsyslogd = peer("/usr/sbin/rsyslogd")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    theirs = authority.sign("repository")
    taken = tmp_path / "taken"
    encryption = f"""
        defaultNetstreamDriver="gtls" defaultNetstreamDriverCAFile="{authority.file}"
        defaultNetstreamDriverCertFile="{theirs.certificate}" defaultNetstreamDriverKeyFile="{theirs.key}" """
    mutual = 'StreamDriver.Name="gtls" StreamDriver.Mode="1" StreamDriver.AuthMode="x509/certvalid"'
    if transport == "tcp":
        encryption = mutual = ""
    driver = f'global(workDirectory="{tmp_path}" {encryption})\nmodule(load="imtcp" {mutual})\n'
    (tmp_path / "rsyslog.conf").write_text(
        driver + 'template(name="whole" type="string" string="%rawmsg%\\n")\n'
        f'input(type="imtcp" port="{port}" address="127.0.0.1" ruleset="keep")\n'
        f'ruleset(name="keep") {{ action(type="omfile" file="{taken}" template="whole") }}\n'
    )
    settings = settings_for(tmp_path / "var", **(encrypted[1] if transport == "tls" else {}), port=port)
    settings.storage.directory.mkdir()
    recorder = Recorder(settings, "remnant receive")
    for _ in range(20):
        everything(recorder)
    expected = waiting(settings)
    with subprocess.Popen(
        [str(rsyslogd), "-n", "-f", str(tmp_path / "rsyslog.conf"), "-i", str(tmp_path / "rsyslog.pid")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as server:
        try:
            repository = Repository(settings, spool_of(settings))
            pause = threading.Event()
            deadline = time.monotonic() + 30
            while not repository.send_all():
                assert time.monotonic() < deadline
                assert server.poll() is None, server.stdout.read() if server.stdout else ""
                pause.wait(0.05)
            while not taken.exists() or len(taken.read_bytes().splitlines()) < len(expected):
                assert time.monotonic() < deadline
                pause.wait(0.05)
        finally:
            server.terminate()
            server.communicate(timeout=30)
    assert [one.replace(b"#357#273#277", b"\xef\xbb\xbf") for one in taken.read_bytes().splitlines()] == expected


def test_the_thread_sends_by_itself_and_ends_when_told(tmp_path: Path) -> None:
    listener = Listener()
    settings = settings_for(tmp_path, port=listener.port)
    stop = threading.Event()
    thread = threading.Thread(target=Repository(settings, spool_of(settings)).run, args=(stop,))
    thread.start()
    recorder = Recorder(settings, "remnant send")
    recorder.started()
    deadline = time.monotonic() + 20
    while not listener.taken and time.monotonic() < deadline:
        stop.wait(0.02)
    recorder.stopped()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    listener.close()
    assert [event_of(read(one))[1] for one in listener.taken] == ["110120", "110121"]


@pytest.mark.alone
def test_writers_that_never_pause_wait_for_each_other_and_nothing_is_left_out(tmp_path: Path) -> None:
    """As under an attack: the receiver writes as fast as it can, and what worker and sender have to say must stand."""
    held = AuditSpool(tmp_path / "audit", 2**26)
    with three_writers(tmp_path / "audit") as writers:
        for writer in writers:
            assert writer.stdout is not None
            assert list(itertools.islice(recorded(writer.stdout), 300)) == list(range(300))
        assert held.left_out() is None
