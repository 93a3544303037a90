"""Command sets, fragments and association requests: as pynetdicom writes and reads them, and safe before any bytes."""

import struct
from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import AE, build_context
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RQ, C_STORE_RSP, N_ACTION_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_STORE, N_ACTION
from pynetdicom.dsutils import decode
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ, P_DATA_TF
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)

from dicom_node.contexts import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, accepted_contexts
from dicom_node.part10 import part_10_header
from dicom_node.transport import MAXIMUM_PDU_SIZE
from dicom_node.transport.dimse import (
    COMMAND_LIMIT,
    Inbox,
    Memory,
    Violation,
    fragments,
    read_command,
    response,
)
from dicom_node.transport.negotiation import Malformed, accept, read_request

NM = "1.2.840.10008.5.1.4.1.1.20"
INSTANCE = "1.2.3.4.55"
QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def encoded(message: DIMSEMessage, primitive: object, maximum: int = 0) -> list[tuple[int, int, bytes]]:
    """What pynetdicom puts on the wire for a message: context, control byte and fragment."""
    message.primitive_to_message(primitive)  # type: ignore[arg-type] # takes every DIMSE primitive, declares them singly
    return [
        (context_id, value[0], bytes(value[1:]))
        for data in message.encode_msg(1, maximum or 65536)
        for context_id, value in data.presentation_data_value_list
    ]


def store_request(data: bytes = b"\0" * 100, maximum: int = 0) -> list[tuple[int, int, bytes]]:
    primitive = C_STORE()
    primitive.MessageID = 7
    primitive.AffectedSOPClassUID = NM
    primitive.AffectedSOPInstanceUID = INSTANCE
    primitive.Priority = 2
    primitive.DataSet = BytesIO(data)
    return encoded(C_STORE_RQ(), primitive, maximum)


def inbox(object_bytes: int = 1000, memory_bytes: int = 10_000) -> Inbox:
    return Inbox(Memory(memory_bytes), object_bytes, frozenset({1, 3}))


# --- command sets -----------------------------------------------------------------------------------------------------


def test_a_store_request_is_read_as_pynetdicom_writes_it() -> None:
    command = read_command(store_request()[0][2])
    assert (command.field, command.message_id, command.has_data) == (0x0001, 7, True)
    assert (command.sop_class_uid, command.sop_instance_uid) == (NM, INSTANCE)


def test_a_request_with_requested_uids_is_read_too() -> None:
    """Storage Commitment asks so (PS3.4 J.3.2)."""
    primitive = N_ACTION()
    primitive.MessageID, primitive.ActionTypeID = 3, 1
    primitive.RequestedSOPClassUID, primitive.RequestedSOPInstanceUID = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
    command = read_command(encoded(N_ACTION_RQ(), primitive)[0][2])
    assert (command.field, command.sop_class_uid) == (0x0130, "1.2.840.10008.1.20.1")
    assert command.sop_instance_uid == "1.2.840.10008.1.20.1.1"


@pytest.mark.parametrize("status", [0x0000, 0xA700, 0xA900, 0xC000, 0x0110])
def test_a_response_is_byte_for_byte_the_one_that_pynetdicom_writes(status: int) -> None:
    primitive = C_STORE()
    primitive.MessageIDBeingRespondedTo = 7
    primitive.AffectedSOPClassUID = NM
    primitive.AffectedSOPInstanceUID = INSTANCE
    primitive.Status = status
    ((_, _, theirs),) = encoded(C_STORE_RSP(), primitive)
    assert response(read_command(store_request()[0][2]), status) == theirs


def test_an_echo_is_answered_without_an_instance() -> None:
    primitive = C_ECHO()
    primitive.MessageID, primitive.AffectedSOPClassUID = 9, "1.2.840.10008.1.1"
    command = read_command(encoded(C_ECHO_RQ(), primitive)[0][2])
    ds = decode(BytesIO(response(command, 0)), True, True)
    assert (ds.CommandField, ds.MessageIDBeingRespondedTo, ds.Status) == (0x8030, 9, 0)
    assert ds.AffectedSOPClassUID == "1.2.840.10008.1.1"
    assert "AffectedSOPInstanceUID" not in ds


@pytest.mark.parametrize("maximum", [0, 7, 13, 64, 16384])
def test_a_response_keeps_to_the_length_that_the_peer_takes(maximum: int) -> None:
    command = response(read_command(store_request()[0][2]), 0)
    pdus = fragments(3, command, maximum)
    joined = b""
    for number, raw in enumerate(pdus, start=1):
        pdu = P_DATA_TF()
        pdu.decode(raw)
        assert not maximum or pdu.pdu_length <= maximum
        ((context_id, value),) = pdu.to_primitive().presentation_data_value_list
        assert (context_id, value[0]) == (3, 3 if number == len(pdus) else 1)
        joined += value[1:]
    assert joined == command


def element(number: int, value: bytes, group: int = 0) -> bytes:
    return struct.pack("<HHI", group, number, len(value)) + value


US = b"\1\0"
MINIMAL = element(0x0100, b"\x30\0") + element(0x0110, US) + element(0x0800, b"\1\1")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no Command Field"),
        (b"\0\0\0", "cut off"),
        (struct.pack("<HHI", 0, 0x0100, 0xFFFF_FFFF), "longer than its command set"),
        (struct.pack("<HHI", 0, 0x0100, 3) + US, "longer than its command set"),
        (element(0x0010, b"", group=8), "another group"),
        (MINIMAL + element(0x0110, US), "twice"),
        (element(0x0100, b"\1"), "no 16-bit number"),
        (element(0x0100, b"\1\0\0\0"), "no 16-bit number"),
        (element(0x0100, b"\x30\0") + element(0x0800, b"\1\1"), "no Message ID"),
        (element(0x0100, b"\x30\0") + element(0x0110, US), "no Command Data Set Type"),
    ],
)
def test_a_command_set_that_is_none_is_a_violation_that_says_why(data: bytes, why: str) -> None:
    assert read_command(MINIMAL).field == 0x0030
    with pytest.raises(Violation, match=why):
        read_command(data)


@QUICK
@given(st.binary(max_size=300))
def test_no_bytes_at_all_do_more_to_a_command_set_than_violate_it(data: bytes) -> None:
    try:
        command = read_command(data)
    except Violation:
        return
    assert len(response(command, 0)) <= len(data) + 64


@QUICK
@given(st.data())
def test_a_changed_command_set_is_read_or_a_violation(draw: st.DataObject) -> None:
    original = bytearray(store_request()[0][2])
    for _ in range(draw.draw(st.integers(1, 4))):
        original[draw.draw(st.integers(0, len(original) - 1))] = draw.draw(st.integers(0, 255))
    try:
        command = read_command(bytes(original))
    except Violation:
        return
    assert isinstance(command.sop_instance_uid, str)


# --- fragments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximum", [0, 32, 64])
def test_a_message_in_any_number_of_fragments_is_one_message(maximum: int) -> None:
    data = bytes(range(200))
    box = inbox()
    *first, last = [box.take(cx, control, memoryview(piece)) for cx, control, piece in store_request(data, maximum)]
    assert set(first) == {None}
    assert last is not None
    assert (last.context_id, last.data, last.excess) == (1, data, "")
    box.clear()
    assert box.empty


@pytest.mark.parametrize(
    ("limits", "excess"), [({"object_bytes": 99}, "object"), ({"memory_bytes": 150}, "memory")], ids=str
)
def test_what_is_too_long_is_read_to_its_end_but_not_kept(limits: dict[str, int], excess: str) -> None:
    box = inbox(**limits)
    *_, last = [box.take(cx, control, memoryview(piece)) for cx, control, piece in store_request(bytes(200), 32)]
    assert last is not None
    assert (last.data, last.excess) == (b"", excess)
    assert box._memory.taken_bytes == 0


def test_the_memory_of_a_message_is_given_back_when_it_is_done_or_dropped() -> None:
    memory = Memory(1000)
    box = Inbox(memory, 1000, frozenset({1}))
    for _ in range(3):
        for cx, control, piece in store_request(bytes(600))[:2]:
            box.take(cx, control, memoryview(piece))
        assert memory.taken_bytes == 600
        box.clear()
        assert memory.taken_bytes == 0


COMMAND = store_request()[0][2]


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([(1, 0, b"data")], "without a command"),
        ([(5, 3, COMMAND)], "not agreed on"),
        ([(1, 3, COMMAND), (3, 2, b"data")], "changed its presentation context"),
        ([(1, 3, COMMAND), (1, 3, COMMAND)], "data set was announced"),
        ([(1, 1, b"")], "fragment is empty"),
        ([(1, 1, bytes(COMMAND_LIMIT)), (1, 1, b"x")], f"more than {COMMAND_LIMIT}"),
    ],
    ids=["data first", "unknown context", "another context", "two commands", "nothing", "a long command"],
)
def test_fragments_that_make_no_message_are_a_violation(pieces: list[tuple[int, int, bytes]], why: str) -> None:
    box = inbox()
    *good, (cx, control, piece) = pieces
    for one in good:
        assert box.take(one[0], one[1], memoryview(one[2])) is None
    with pytest.raises(Violation, match=why):
        box.take(cx, control, memoryview(piece))


# --- association requests ---------------------------------------------------------------------------------------------


def request(*extra: object, contexts: int = 2) -> bytes:
    """An A-ASSOCIATE-RQ as pynetdicom writes it, without its header."""
    ae = AE(ae_title="CAMERA")
    primitive = A_ASSOCIATE()
    primitive.application_context_name = UID("1.2.840.10008.3.1.1.1")
    primitive.calling_ae_title, primitive.called_ae_title = ae.ae_title, "REMNANT"
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = 16384
    implementation.implementation_class_uid = UID("1.2.3.4")
    primitive.user_information = [length, implementation, *extra]  # type: ignore[list-item] # any user information item
    asked = [build_context(NM), *(build_context(f"1.2.3.{number}") for number in range(contexts - 1))]
    for number, cx in enumerate(asked):
        cx.context_id = 2 * number + 1
    primitive.presentation_context_definition_list = asked
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(primitive)
    return pdu.encode()[6:]


def test_a_request_is_read_and_answered_so_that_pynetdicom_reads_the_answer() -> None:
    asked = read_request(request())
    assert (asked.called_ae_title, asked.calling_ae_title, asked.maximum_length) == ("REMNANT", "CAMERA", 16384)
    answer, agreed = accept(asked, accepted_contexts([]), IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME)
    pdu = A_ASSOCIATE_AC()
    pdu.decode(answer)
    primitive = pdu.to_primitive()
    assert [cx.result for cx in primitive.presentation_context_definition_results_list] == [0, 3]
    assert primitive.maximum_length_received == MAXIMUM_PDU_SIZE
    assert {number: (cx.abstract_syntax, cx.transfer_syntax) for number, cx in agreed.items()} == {
        1: (NM, ExplicitVRLittleEndian)
    }


def window() -> AsynchronousOperationsWindowNegotiation:
    item = AsynchronousOperationsWindowNegotiation()
    item.maximum_number_operations_invoked, item.maximum_number_operations_performed = 5, 5
    return item


def role() -> SCP_SCU_RoleSelectionNegotiation:
    item = SCP_SCU_RoleSelectionNegotiation()
    item.sop_class_uid, item.scu_role, item.scp_role = UID(NM), True, True
    return item


def extended() -> SOPClassExtendedNegotiation:
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid, item.service_class_application_information = UID(NM), b"\2\0\3"
    return item


def identity() -> UserIdentityNegotiation:
    item = UserIdentityNegotiation()
    item.user_identity_type, item.primary_field = 1, b"somebody"
    return item


@pytest.mark.parametrize("extra", [window, role, extended, identity])
def test_what_is_negotiated_beyond_contexts_is_read_and_left_unanswered(extra: type) -> None:
    """No answer means one operation at a time, default roles, and no extension (PS3.7 D.3.3)."""
    answer, agreed = accept(read_request(request(extra())), accepted_contexts([]), "1.2.3", "X")
    pdu = A_ASSOCIATE_AC()
    pdu.decode(answer)
    assert [item.item_type for item in pdu.user_information.user_data] == [0x51, 0x52, 0x55]
    assert list(agreed) == [1]


def test_a_role_is_answered_where_a_context_of_ours_has_one() -> None:
    context = build_context(NM)
    context.scu_role = context.scp_role = True
    answer, _ = accept(read_request(request(role())), [context], "1.2.3", "X")
    pdu = A_ASSOCIATE_AC()
    pdu.decode(answer)
    assert 0x54 in [item.item_type for item in pdu.user_information.user_data]


def test_items_that_the_standard_does_not_know_are_passed_over() -> None:
    unknown = struct.pack(">BBH", 0x7E, 0, 3) + b"new"
    content = request()
    at = content.index(struct.pack(">BB", 0x50, 0), 68)
    user = content[at + 4 :] + unknown
    changed = unknown + content[68:at] + struct.pack(">BBH", 0x50, 0, len(user)) + user
    assert read_request(content[:68] + changed).calling_ae_title == "CAMERA"


def test_as_many_contexts_as_there_are_identifiers_are_read_and_one_more_is_not() -> None:
    asked = read_request(request(contexts=128))
    assert len(asked.primitive.presentation_context_definition_list) == 128
    with pytest.raises(Malformed, match="twice"):
        read_request(request() + request()[68 + 25 :])


def lie(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


CONTENT = request()
CONTEXT_AT = CONTENT.index(b"\x20\0", 68)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (CONTENT[:60], "shorter"),
        (CONTENT[:68], "no presentation context"),
        (CONTENT[:-3], "longer than what holds it"),
        (CONTENT + b"\x20", "cut off"),
        (lie(CONTENT, CONTEXT_AT + 2, b"\xff\xff"), "longer than what holds it"),
        (lie(CONTENT, CONTEXT_AT + 4, b"\2"), "even"),
        (CONTENT[:68] + struct.pack(">BBH", 0x20, 0, 2) + b"\1\0", "cut off"),
        (CONTENT[:68] + struct.pack(">BBHI", 0x20, 0, 4, 0x01000000), "one abstract syntax"),
        (CONTENT[:68] + b"\x51\0\0\0" * 5000, "too many items"),
        (CONTENT + CONTENT[68 : 68 + 25], "one application context"),
        (lie(CONTENT, 4, "Ä".encode() * 8), "cannot be decoded"),
    ],
)
def test_a_request_that_is_malformed_is_refused_and_says_why(content: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        read_request(content)


@QUICK
@given(st.data())
def test_a_changed_request_is_answered_or_malformed(draw: st.DataObject) -> None:
    content = bytearray(CONTENT)
    for _ in range(draw.draw(st.integers(1, 6))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    del content[draw.draw(st.integers(len(content) // 2, len(content))) :]
    try:
        asked = read_request(bytes(content))
    except Malformed:
        return
    answer, agreed = accept(asked, accepted_contexts([]), "1.2.3", "X")
    assert answer[0] == 0x02
    assert set(agreed) <= set(range(1, 256, 2))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instance", ["1.2.3", "1.2.3.4"], ids=["odd", "even"])
@pytest.mark.parametrize("sender", ["", "OPTIMA1", "OPTIMA12"])
def test_the_beginning_of_a_file_is_byte_for_byte_the_one_that_pydicom_writes(instance: str, sender: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(NM)
    meta.MediaStorageSOPInstanceUID = UID(instance)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    if sender:
        meta.SourceApplicationEntityTitle = sender
    buffer = DicomBytesIO()
    write_file_meta_info(buffer, meta)
    ours = part_10_header(NM, instance, ExplicitVRLittleEndian, sender)
    assert ours == b"\0" * 128 + b"DICM" + buffer.getvalue()
    assert dcmread(BytesIO(ours)).file_meta.MediaStorageSOPInstanceUID == instance
