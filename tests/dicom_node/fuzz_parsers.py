"""Everything that reads what a peer sends, fed with bytes that no peer should send, for minutes instead of moments.

Run by `make fuzz`: FUZZ_S seconds (600 by default), FUZZ_SEED for the first of the seeds. Each parser may say no in the
way that its callers expect, within a second; anything else is a failure that hypothesis makes small and prints.
"""

import os
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom.dsutils import encode

from dicom_node.contexts import accepted_contexts
from dicom_node.part10 import part_10_header
from dicom_node.transport.dimse import Inbox, Memory, Violation, read_command, response
from dicom_node.transport.negotiation import Malformed, accept, read_request
from pipeline.camera import examination, expose, foreign
from pipeline.phantom import phantom
from pipeline.views import UnreadableHeader, UnusableScan, early_facts, header_facts, view_images

LIMIT_S = float(os.environ.get("FUZZ_S", "600"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "1"))
SLOWEST_S = 2.0
"""Of the CPU: no parser waits for anything, and what else the machine does is no fault of theirs."""
EXAMPLES = 300
NM = "1.2.840.10008.5.1.4.1.1.20"
SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
LENGTHS = (0, 1, 2, 7, 8, 255, 0x7FFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
PIECES = (
    b"\xfe\xff\x00\xe0",
    b"\xfe\xff\x0d\xe0",
    b"\xfe\xff\xdd\xe0",
    b"SQ\0\0\xff\xff\xff\xff",
    b"UN\0\0",
    b"\x1b$B",
)


def _headers() -> list[tuple[bytes, str]]:
    """Datasets with small matrices in three syntaxes, and what is none of ours."""
    objects = [
        *expose(phantom(1, residual=True), examination(1), "two_frames"),
        expose(phantom(2, residual=False), examination(2), "two_objects")[0],
        foreign("tc99m_thyroid", examination(3)),
    ]
    found = []
    for ds in objects:
        ds.Rows = ds.Columns = 8
        ds.PixelData = bytes(128 * int(ds.get("NumberOfFrames", 1)))
        for implicit, little, syntax in (
            (True, True, ImplicitVRLittleEndian),
            (False, True, ExplicitVRLittleEndian),
        ):
            data = encode(ds, implicit, little)
            assert data is not None
            found.append((data, str(syntax)))
    return found


HEADERS = _headers()


def _command() -> bytes:
    values = [
        (0x0002, NM.encode() + b"\0" * (len(NM) % 2)),
        (0x0100, b"\1\0"),
        (0x0110, b"\7\0"),
        (0x0800, b"\0\0"),
        (0x1000, b"1.2.3.4 "),
    ]
    return b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in values)


def _request() -> bytes:
    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(content)) + content

    contexts = b"".join(
        item(
            0x20,
            struct.pack(">I", number << 24) + item(0x30, NM.encode()) + item(0x40, ImplicitVRLittleEndian.encode()),
        )
        for number in (1, 3)
    )
    role = struct.pack(">H", len(NM)) + NM.encode() + b"\1\1"
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4") + item(0x54, role) + item(0x55, b"FUZZ")
    names = b"REMNANT".ljust(16) + b"CAMERA".ljust(16)
    return b"\0\1\0\0" + names + bytes(32) + item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + item(0x50, user)


@st.composite
def changed(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes as they came, or cut, doubled, with false lengths and foreign pieces in them."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(("byte", "length", "cut", "remove", "double", "insert", "bytes"))):
            case "byte":
                data[at] = draw(st.integers(0, 255))
            case "length":
                size, order = draw(st.sampled_from((2, 4))), draw(st.sampled_from(("little", "big")))
                value = draw(st.sampled_from(LENGTHS)) % (1 << 8 * size)
                data[at : at + size] = value.to_bytes(size, order)  # type: ignore[arg-type] # one of the two words
            case "cut":
                del data[at:]
            case "remove":
                del data[at : at + draw(st.integers(1, 40))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case "insert":
                data[at:at] = draw(st.sampled_from(PIECES))
            case "bytes":
                data[at:at] = draw(st.binary(max_size=12))
    return bytes(data)


def a_command_set(draw: st.DrawFn) -> Callable[[], object]:
    data = draw(changed(_command()) | st.binary(max_size=200))
    return lambda: response(read_command(data), 0)


def an_association_request(draw: st.DrawFn) -> Callable[[], object]:
    data = draw(changed(_request()) | st.binary(max_size=200))
    return lambda: accept(read_request(data), accepted_contexts([]), "1.2.3", "FUZZ")


def fragments_of_messages(draw: st.DrawFn) -> Callable[[], object]:
    command = _command()
    pieces = st.sampled_from((command, command[:20], command[20:], b"", b"data")) | changed(command)
    sent = draw(st.lists(st.tuples(st.sampled_from((1, 1, 1, 3, 5)), st.integers(0, 255), pieces), max_size=12))

    def take() -> None:
        memory = Memory(100)
        inbox = Inbox(memory, 50, frozenset({1, 3}))
        try:
            for context_id, control, piece in sent:
                if inbox.take(context_id, control, memoryview(piece)) is not None:
                    inbox.clear()
        finally:
            inbox.clear()
            assert memory.taken_bytes == 0, "memory is not given back"

    return take


def a_header(draw: st.DrawFn) -> Callable[[], object]:
    original, syntax = draw(st.sampled_from(HEADERS))
    data = draw(changed(original) | st.binary(max_size=300))
    named = str(draw(st.sampled_from((syntax, *SYNTAXES))))
    cut = draw(st.integers(0, len(data)))

    def read() -> None:
        """A beginning says of the whole what the whole says, or nothing."""
        try:
            early = early_facts(data[:cut], named)
        except UnreadableHeader:
            early = None
        whole = header_facts(data, named)
        assert early is None or early == whole

    return read


def a_stored_object(draw: st.DrawFn) -> Callable[[], object]:
    """As the analysis child reads it: whatever pydicom makes of it, the views are counts or an `UnusableScan`."""
    original, syntax = draw(st.sampled_from(HEADERS))
    data = part_10_header(NM, "1.2.3.4", UID(syntax)) + draw(changed(original))

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = dcmread(BytesIO(data))
                for _ in ds.iterall():
                    pass
            except Exception:  # noqa: BLE001 - the child answers `unreadable` to whatever a parser says here
                return
            view_images([ds])

    return read


EXPECTED = (Violation, Malformed, UnreadableHeader, UnusableScan)
TARGETS = (a_command_set, an_association_request, fragments_of_messages, a_header, a_stored_object)


def test_no_bytes_crash_or_hold_a_parser(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    ends = time.monotonic() + LIMIT_S

    def one(target: Callable[[st.DrawFn], Callable[[], object]]) -> Callable[..., Any]:
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def fed(data: st.DataObject) -> None:
            run = target(data.draw)  # type: ignore[arg-type] # the same call
            began = time.thread_time()
            try:
                run()
                counts[f"{target.__name__}: taken"] += 1
            except EXPECTED:
                counts[f"{target.__name__}: refused"] += 1
            took_s = time.thread_time() - began
            slowest[target.__name__] = max(slowest.get(target.__name__, 0.0), took_s)
            assert took_s < SLOWEST_S, f"{target.__name__} took {took_s:.1f} s"

        return fed

    number = FIRST_SEED
    while time.monotonic() < ends:
        for target in TARGETS:
            seed(number)(one(target))()
        number += 1
    with capsys.disabled():
        print(f"\nseeds {FIRST_SEED} to {number - 1}, {sum(counts.values())} examples")
        for name, count in sorted(counts.items()):
            print(f"{name} {count}")
        for name, took_s in slowest.items():
            print(f"{name}: slowest {1000 * took_s:.1f} ms")
    assert all(any(name.startswith(target.__name__) for name in counts) for target in TARGETS)
