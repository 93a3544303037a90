"""DIMSE messages of the called side: command sets and the fragments they come in (PS3.7 6.3 and 9.3, PS3.8 annex E).

A command set is a few flat elements in Implicit VR Little Endian, read and written here directly: through a Dataset a
response costs as much time as everything else about receiving an object. The tests hold both directions to pynetdicom's
codec. What is malformed raises `Violation`; nothing is believed about a length before it was compared with what came.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from threading import Lock

C_STORE_RQ = 0x0001
C_ECHO_RQ = 0x0030
N_EVENT_REPORT_RQ = 0x0100
N_ACTION_RQ = 0x0130
C_CANCEL_RQ = 0x0FFF
RESPONSE = 0x8000
"""The bit by which a response's Command Field differs from its request's (PS3.7 E.1)."""

UNRECOGNISED_OPERATION = 0x0211

COMMAND_LIMIT = 16 * 1024
"""Longest command set taken, bytes; those of the standard have a few hundred."""

_NO_DATA_SET = 0x0101
COMMAND, _LAST = 0x01, 0x02  # message control header, PS3.8 E.2

# Element numbers of group 0000: PS3.7 E.1.
_GROUP_LENGTH = 0x0000
_AFFECTED_SOP_CLASS_UID = 0x0002
_REQUESTED_SOP_CLASS_UID = 0x0003
_COMMAND_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_MESSAGE_ID_RESPONDED_TO = 0x0120
_COMMAND_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_AFFECTED_SOP_INSTANCE_UID = 0x1000
_REQUESTED_SOP_INSTANCE_UID = 0x1001
_EVENT_TYPE_ID = 0x1002
_ACTION_TYPE_ID = 0x1008

_ELEMENT = struct.Struct("<HHI")


class Violation(Exception):  # noqa: N818 - it is the peer's, and the word says so
    """The peer broke the protocol; the message says how."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command set: what every message needs, and all elements as they came (number in group 0000 -> value)."""

    field: int
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    has_data: bool
    elements: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message. `excess` says why the data set was not kept: "object" too long, "memory" of the node full."""

    context_id: int
    command: Command
    data: bytes
    excess: str


def read_command(data: bytes) -> Command:
    """Read a command set. Raises Violation."""
    elements: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        if offset + _ELEMENT.size > len(data):
            raise Violation("a command element is cut off")
        group, number, length = _ELEMENT.unpack_from(data, offset)
        offset += _ELEMENT.size
        if group != 0:
            raise Violation("a command set holds an element of another group")
        if length > len(data) - offset:
            raise Violation("a command element is longer than its command set")
        if number in elements:
            raise Violation("a command set holds an element twice")
        elements[number] = data[offset : offset + length]
        offset += length
    field = _number(elements, _COMMAND_FIELD)
    if field is None:
        raise Violation("a command set has no Command Field")
    message_id = _number(elements, _MESSAGE_ID)
    if message_id is None and not field & RESPONSE and field != C_CANCEL_RQ:
        raise Violation("a request has no Message ID")
    data_set_type = _number(elements, _COMMAND_DATA_SET_TYPE)
    if data_set_type is None:
        raise Violation("a command set has no Command Data Set Type")
    return Command(
        field=field,
        message_id=message_id or 0,
        sop_class_uid=_uid(elements, _AFFECTED_SOP_CLASS_UID, _REQUESTED_SOP_CLASS_UID),
        sop_instance_uid=_uid(elements, _AFFECTED_SOP_INSTANCE_UID, _REQUESTED_SOP_INSTANCE_UID),
        has_data=data_set_type != _NO_DATA_SET,
        elements=elements,
    )


def type_id(command: Command) -> int | None:
    """Return the Event Type ID of an N-EVENT-REPORT-RQ, the Action Type ID of an N-ACTION-RQ; None where there is none.

    Raises Violation.
    """
    return _number(command.elements, _ACTION_TYPE_ID if command.field == N_ACTION_RQ else _EVENT_TYPE_ID)


def response(request: Command, status: int) -> bytes:
    """Return the command set that answers a request without a data set: its class and instance, and the status."""
    values: list[tuple[int, bytes]] = []
    class_uid = request.elements.get(_AFFECTED_SOP_CLASS_UID, request.elements.get(_REQUESTED_SOP_CLASS_UID, b""))
    if class_uid:
        values.append((_AFFECTED_SOP_CLASS_UID, _even(class_uid)))
    values += [
        (_COMMAND_FIELD, struct.pack("<H", request.field | RESPONSE)),
        (_MESSAGE_ID_RESPONDED_TO, struct.pack("<H", request.message_id)),
        (_COMMAND_DATA_SET_TYPE, struct.pack("<H", _NO_DATA_SET)),
        (_STATUS, struct.pack("<H", status)),
    ]
    instance_uid = request.elements.get(
        _AFFECTED_SOP_INSTANCE_UID, request.elements.get(_REQUESTED_SOP_INSTANCE_UID, b"")
    )
    if instance_uid:
        values.append((_AFFECTED_SOP_INSTANCE_UID, _even(instance_uid)))
    content = b"".join(_ELEMENT.pack(0, number, len(value)) + value for number, value in values)
    return _ELEMENT.pack(0, _GROUP_LENGTH, 4) + struct.pack("<I", len(content)) + content


def fragments(context_id: int, command: bytes, maximum_length: int) -> list[bytes]:
    """Return a command set as whole P-DATA-TF PDUs, none longer than the peer takes (0: no limit). PS3.8 9.3.5."""
    room = max(1, maximum_length - 6) if maximum_length else len(command)
    pdus = []
    for start in range(0, len(command), room):
        piece = command[start : start + room]
        last = _LAST if start + room >= len(command) else 0
        value = struct.pack(">IBB", len(piece) + 2, context_id, COMMAND | last) + piece
        pdus.append(struct.pack(">BBI", 0x04, 0, len(value)) + value)
    return pdus


class Memory:
    """Bytes of data sets in hand, over all associations, within a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._taken = 0
        self._lock = Lock()

    @property
    def taken_bytes(self) -> int:
        """How much is in hand now."""
        return self._taken

    def take(self, count: int) -> bool:
        """Reserve `count` bytes; False where they would exceed the limit."""
        with self._lock:
            if self._taken + count > self._limit:
                return False
            self._taken += count
            return True

    def give(self, count: int) -> None:
        """Give `count` bytes back."""
        with self._lock:
            self._taken -= count


class Inbox:
    """Puts one association's fragments together into messages, one at a time and in order.

    A data set beyond the limits is read to its end and dropped, so that the peer gets a status instead of an abort.
    """

    def __init__(self, memory: Memory, object_bytes: int, context_ids: frozenset[int]) -> None:
        self._memory = memory
        self._object_bytes = object_bytes
        self._context_ids = context_ids
        self._command_bytes = b""
        self._command: Command | None = None
        self._context_id = 0
        self._data = BytesIO()
        self._kept = 0
        self._excess = ""
        self.received_bytes = 0

    @property
    def empty(self) -> bool:
        """Whether no message is under way."""
        return self._command is None and not self._command_bytes

    @property
    def command(self) -> Command | None:
        """The command of the message under way, as soon as it is whole."""
        return self._command

    @property
    def excess(self) -> str:
        """Why the data set under way is not kept; see `Message`."""
        return self._excess

    def take(self, context_id: int, control: int, piece: memoryview) -> Message | None:
        """Take a fragment; return the message that it completes. Raises Violation."""
        if context_id not in self._context_ids:
            raise Violation("a presentation context that was not agreed on")
        if not self.empty and context_id != self._context_id:
            raise Violation("a message changed its presentation context")
        self._context_id = context_id
        self.received_bytes += len(piece)
        if control & COMMAND:
            return self._take_command(bool(control & _LAST), piece)
        if self._command is None:
            raise Violation("a data set came without a command")
        self._keep(piece)
        return self._whole(self._command) if control & _LAST else None

    def clear(self) -> None:
        """Forget what is under way or was handed out, and give its memory back."""
        self._memory.give(self._kept)
        self._command_bytes, self._command, self._data, self._excess = b"", None, BytesIO(), ""
        self._kept = self.received_bytes = 0

    def _take_command(self, last: bool, piece: memoryview) -> Message | None:
        if self._command is not None:
            raise Violation("a command came where a data set was announced")
        if len(self._command_bytes) + len(piece) > COMMAND_LIMIT:
            raise Violation(f"a command set has more than {COMMAND_LIMIT} bytes")
        if not piece:
            raise Violation("a command fragment is empty")
        self._command_bytes += piece
        if not last:
            return None
        self._command = read_command(self._command_bytes)
        return None if self._command.has_data else self._whole(self._command)

    def _keep(self, piece: memoryview) -> None:
        if self._excess:
            return
        if self._kept + len(piece) > self._object_bytes:
            self._excess = "object"
        elif not self._memory.take(len(piece)):
            self._excess = "memory"
        else:
            self._kept += len(piece)
            self._data.write(piece)
            return
        self._memory.give(self._kept)
        self._kept, self._data = 0, BytesIO()

    def _whole(self, command: Command) -> Message:
        # `getvalue` hands out the buffer itself, without a copy, as long as nobody writes to it again.
        return Message(self._context_id, command, self._data.getvalue(), self._excess)


def _number(elements: Mapping[int, bytes], number: int) -> int | None:
    value = elements.get(number)
    if value is None:
        return None
    if len(value) != 2:
        raise Violation(f"command element (0000,{number:04X}) is no 16-bit number")
    return int.from_bytes(value, "little")


def _uid(elements: Mapping[int, bytes], affected: int, requested: int) -> str:
    # Whether it is a UID at all is for the receiver to say, with a status: here it only has to become text.
    value = elements.get(affected, elements.get(requested, b""))
    return value.decode("latin-1").rstrip("\0 ")


def _even(value: bytes) -> bytes:
    return value + b"\0" * (len(value) % 2)
