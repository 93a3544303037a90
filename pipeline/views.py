"""What the header of a received object says, how objects form acquisitions, and the counts of their views.

Reads the encoded bytes of a dataset itself (PS3.5 sections 7 and 10, annexes A and 6.1 for character sets) instead of
through a DICOM library: a receiver needs this to be bounded in time, memory and depth for hostile bytes, silent, and
safe in threads. Intake is tolerant, because real files fail strict validation: a bad value makes that value absent, and
only a header without class and UIDs is an error. What cannot be told is never guessed: it becomes a reason.

Imports neither torch nor cv2.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal

from pydicom.charset import CODES_TO_ENCODINGS, python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    NuclearMedicineImageStorage,
)

from pipeline.finding import SourceFrame, ViewImage, ViewName

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEADER_LIMIT: Final = 262_144
"""How many bytes of an encoded dataset are looked at, inflated or not: 256 KiB."""
DEPTH_LIMIT: Final = 8
"""How deep sequences may nest before the header counts as unreadable."""
SIMULTANEOUS_S: Final = 2.0
"""Two views that start within this time were taken by two heads of one camera at once."""


@dataclass(frozen=True, slots=True)
class FrameFacts:
    """A photopeak frame whose view is known. `frame_number` is 1-based."""

    view: ViewName
    frame_number: int


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """What the header of one object says, before its pixels are looked at.

    Strings are decoded, stripped, "" where absent. `reason` is None for an object that may be analysed, else a token
    of `pipeline.reasons.REASONS`; `ours` says whether the header shows an 131I neck scan.

    Attributes
    ----------
    acquired_at: start of the acquisition as the camera wrote it, naive local time; None where the header has no usable
        date and time.
    spacing_mm: (row, column), None where absent.
    energy_window_kev: the photopeak window the frames were taken from (lower, upper), None where absent.
    frames: the photopeak frames with a known view; one per view at the most.
    views: the views of `frames`, in the order anterior, posterior.
    detail: why there is a reason: a sentence for the admin, without a value that could identify a patient.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str
    issuer_of_patient_id: str
    patient_name: str
    accession_number: str
    acquired_at: datetime | None
    timezone_offset_from_utc: str
    rows: int
    columns: int
    number_of_frames: int
    spacing_mm: tuple[float, float] | None
    energy_window_kev: tuple[float, float] | None
    frames: tuple[FrameFacts, ...]
    reason: str | None
    ours: bool
    detail: str = ""

    @property
    def views(self) -> tuple[ViewName, ...]:
        return tuple(sorted({frame.view for frame in self.frames}))


class UnreadableHeader(Exception):  # noqa: N818 - the name is part of the contract with the receiver
    """Class or UIDs of a dataset cannot be read, so that it cannot be stored under a name: C-STORE answers C000.

    The message is one sentence without any value of the dataset.
    """


class UnusableScan(Exception):  # noqa: N818 - it tells of a scan, not of an error of ours
    """An acquisition whose pixels cannot be used.

    `reason` is a token of `pipeline.reasons.REASONS`, `detail` a sentence without identity, `ours` whether the header
    showed an 131I neck scan, so that a note is due.
    """

    def __init__(self, reason: str, detail: str, *, ours: bool = True) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.ours = ours


@dataclass(frozen=True, slots=True)
class Acquisition:
    """The views of one neck taken together.

    `sop_instance_uids` sorted; `views` in the order anterior, posterior; `reason` None for what may be analysed once
    complete, else the reason that keeps its members from being analysed.
    """

    sop_instance_uids: tuple[str, ...]
    views: tuple[ViewName, ...]
    reason: str | None


def header_facts(header: bytes, transfer_syntax_uid: str) -> HeaderFacts:
    """Facts from the first bytes of an encoded dataset, without preamble and file meta information.

    Parameters
    ----------
    header: the dataset's bytes as sent, from its start; may be cut at or after PixelData; `HEADER_LIMIT` bytes at most
        are looked at.
    transfer_syntax_uid: as negotiated. Syntaxes with compressed pixels have Explicit VR Little Endian headers.

    Raises
    ------
    UnreadableHeader: SOPClassUID or SOPInstanceUID is absent or no UID (PS3.5 9.1), or StudyInstanceUID or
        SeriesInstanceUID is absent or holds anything but digits and dots. Everything else that cannot be read gives
        facts with the reason "unreadable".
    """
    return _facts(*_read_header(header[:HEADER_LIMIT], transfer_syntax_uid))


def early_facts(beginning: bytes, transfer_syntax_uid: str) -> HeaderFacts | None:
    """What `header_facts` gives for any dataset that begins so; None where that depends on what follows.

    For whoever receives a dataset piece by piece. Raises UnreadableHeader, as `header_facts` would.
    """
    if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        return None  # its end decides whether it can be inflated
    node, problem = _read_header(beginning, transfer_syntax_uid)
    return _facts(node, problem) if node.reached_pixels and len(beginning) <= HEADER_LIMIT else None


def _read_header(header: bytes, transfer_syntax_uid: str) -> tuple[_Node, str]:
    """Read a header of `HEADER_LIMIT` bytes at the most; return what it holds and what is wrong with it."""
    node = _Node()
    problem = ""
    try:
        if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
            header = _inflate(header)
        encoding = _Encoding(
            implicit=transfer_syntax_uid == ImplicitVRLittleEndian, little=transfer_syntax_uid != ExplicitVRBigEndian
        )
        _scan(header, 0, len(header), encoding, 0, node, delimited=False)
        if len(header) >= HEADER_LIMIT and not node.reached_pixels:
            problem = "the header is longer than 256 KiB"
    except _MalformedError as error:
        problem = str(error)
    return node, problem


def facts_of(ds: Dataset) -> HeaderFacts:
    """The same facts from a parsed dataset; raises `UnreadableHeader` alike. Leaves the dataset unconverted."""
    node = _Node()
    problem = ""
    try:
        _from_dataset(ds, node, 0)
    except _MalformedError as error:
        problem = str(error)
    return _facts(node, problem)


def group(objects: Sequence[HeaderFacts], *, pair_window_s: float) -> tuple[Acquisition, ...]:
    """Which objects belong together; a pure function that does not depend on the order of its input.

    An object with both views, or with a reason, is its own acquisition. Views that are objects of their own join only
    if patient, issuer, study, matrix, spacing and energy window agree and their times lie within `pair_window_s`
    (without times: same series). Two views that start within `SIMULTANEOUS_S` are certain, for a camera cannot expose a
    patient twice at once, and are no candidates for others. Where two candidates compete for one place, all of them
    are one acquisition with the reason "ambiguous_views": never guessed.

    Returns
    -------
    sorted by their SOP Instance UIDs. An object given twice counts once.
    """
    by_uid = {facts.sop_instance_uid: facts for facts in sorted(objects, key=repr)}
    alone = [facts for facts in by_uid.values() if facts.reason is not None or len(facts.views) != 1]
    single = [facts for facts in by_uid.values() if facts.reason is None and len(facts.views) == 1]
    found = [_acquisition([facts], facts.reason) for facts in alone]

    def at_once(one: HeaderFacts, other: HeaderFacts) -> bool:
        seconds = _seconds_apart(one, other)
        return _agree(one, other) and seconds is not None and seconds <= min(SIMULTANEOUS_S, pair_window_s)

    rest = []
    for cluster in _components(single, at_once):
        if {facts.views for facts in cluster} == {("anterior",), ("posterior",)}:
            found.append(_acquisition(cluster, None if len(cluster) == 2 else "ambiguous_views"))
        else:
            rest.extend(cluster)

    def may_join(one: HeaderFacts, other: HeaderFacts) -> bool:
        if one.views == other.views or not _agree(one, other):
            return False
        seconds = _seconds_apart(one, other)
        if seconds is None:
            return one.series_instance_uid == other.series_instance_uid
        return seconds <= pair_window_s

    found += [
        _acquisition(cluster, None if len(cluster) <= 2 else "ambiguous_views")
        for cluster in _components(rest, may_join)
    ]
    return tuple(sorted(found, key=lambda acquisition: acquisition.sop_instance_uids))


def view_images(datasets: Sequence[Dataset]) -> tuple[ViewImage, ...]:
    """The counts of the photopeak views of one acquisition, in the order anterior, posterior.

    Counts are stored values times RescaleSlope plus RescaleIntercept where present. The posterior view stays mirrored,
    as received. CountsAccumulated is no condition, because real files disagree with it; see
    `counts_accumulated_matches`.

    Raises
    ------
    ValueError: no dataset given.
    UnusableScan: any object has a reason; the objects do not belong together or hold a view twice ("ambiguous_views");
        pixel data of another length than frames x rows x columns x bytes ("bad_pixel_length", checked before decoding,
        for a longer one would be re-shaped silently); pixels that cannot be decoded, or negative beyond 1 % of the
        counts ("unreadable"; below, they are the residue of a correction and become 0).
    """
    if not datasets:
        raise ValueError("an acquisition has at least one dataset")
    found: list[ViewImage] = []
    first: HeaderFacts | None = None
    for ds in datasets:
        try:
            facts = facts_of(ds)
        except UnreadableHeader as error:
            raise UnusableScan("unreadable", str(error), ours=False) from error
        if facts.reason is not None:
            raise UnusableScan(facts.reason, facts.detail, ours=facts.ours)
        first = first or facts
        if not _agree(first, facts):
            raise UnusableScan("ambiguous_views", "the objects differ in patient, study, matrix or energy window")
        if facts.spacing_mm is None:
            raise UnusableScan("unreadable", "PixelSpacing is absent")
        stored = _stored_values(ds, facts)
        for frame in facts.frames:
            found.append(
                ViewImage(
                    view=frame.view,
                    counts=_counts(stored[frame.frame_number - 1], ds),
                    spacing_mm=facts.spacing_mm,
                    source=SourceFrame(
                        sop_class_uid=facts.sop_class_uid,
                        sop_instance_uid=facts.sop_instance_uid,
                        series_instance_uid=facts.series_instance_uid,
                        frame_number=frame.frame_number,
                        number_of_frames=facts.number_of_frames,
                    ),
                )
            )
    if len({image.view for image in found}) != len(found):
        raise UnusableScan("ambiguous_views", "a view was given twice")
    return tuple(sorted(found, key=lambda image: image.view))


def counts_accumulated_matches(ds: Dataset) -> bool | None:
    """Whether CountsAccumulated (0018,0070) is the sum of all stored values; None where it is absent or not above 0.

    An integrity check for the record, never a condition. Raises `UnusableScan` as `view_images` does.
    """
    node = _Node()
    _from_dataset(ds, node, 0)
    counts = _whole(node.only("CountsAccumulated"))
    if counts is None or counts <= 0:
        return None
    return int(_stored_values(ds, facts_of(ds)).sum(dtype="int64")) == counts


# Reading encoded elements ----------------------------------------------------------------------------------------

_KEYWORDS: Final = (
    "SpecificCharacterSet",
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "AcquisitionDate",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "AccessionNumber",
    "TimezoneOffsetFromUTC",
    "SeriesDescription",
    "ProtocolName",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "CountsAccumulated",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "ImageComments",
    "ImageID",
    "SamplesPerPixel",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "EnergyWindowVector",
    "NumberOfEnergyWindows",
    "EnergyWindowInformationSequence",
    "EnergyWindowName",
    "EnergyWindowRangeSequence",
    "EnergyWindowLowerLimit",
    "EnergyWindowUpperLimit",
    "RadiopharmaceuticalInformationSequence",
    "Radiopharmaceutical",
    "RadionuclideCodeSequence",
    "RadiopharmaceuticalCodeSequence",
    "DetectorVector",
    "NumberOfDetectors",
    "DetectorInformationSequence",
    "StartAngle",
    "ViewCodeSequence",
    "CodeValue",
    "CodingSchemeDesignator",
    "CodeMeaning",
)


def _wanted() -> dict[int, tuple[str, str]]:
    wanted = {}
    for keyword in _KEYWORDS:
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise KeyError(f"{keyword} is no DICOM keyword")
        wanted[int(tag)] = (keyword, dictionary_VR(tag))
    return wanted


_WANTED: Final = _wanted()
"""Tag -> keyword and VR of every element that is read; everything else is stepped over."""

_UNWANTED: Final = ("", "")
_PIXEL_GROUP: Final = 0x7FE0
_UNDEFINED: Final = 0xFFFFFFFF
_LONG_VRS: Final = frozenset(
    {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
)
_BINARY: Final = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


class _MalformedError(Exception):
    """The encoding breaks off or nests too deep; the message is a sentence for a person."""


_SHORT_VRS: Final = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN"}
    | {b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}
)


class _Encoding:
    """How elements are encoded, and the readers of what stands in their heads: tag (group, number), VR and a length of
    16 bits; tag and a length of 32 bits; a number of 16 bits; one of 32."""

    def __init__(self, *, implicit: bool, little: bool) -> None:
        self.implicit, self.little = implicit, little
        order = "<" if little else ">"
        self.explicit_head, self.head, self.short, self.long = (
            struct.Struct(f"{order}{code}").unpack_from for code in ("HH2sH", "HHI", "H", "I")
        )


_IMPLICIT_LITTLE: Final = _Encoding(implicit=True, little=True)


@dataclass(slots=True)
class _Node:
    """The wanted elements of a dataset or item: texts by keyword (stripped, empty ones dropped), items by keyword."""

    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    items: dict[str, list[_Node]] = field(default_factory=dict)
    # An item without a SpecificCharacterSet of its own has its dataset's (PS3.3 C.12.1.1.2).
    codecs: tuple[str, ...] = ("latin-1",)
    reached_pixels: bool = False

    def text(self, keyword: str) -> str:
        return "\\".join(self.texts.get(keyword, ()))

    def only(self, keyword: str) -> str:
        """The value of a single-valued element; "" where several stand, for then none is right."""
        values = self.texts.get(keyword, ())
        return values[0] if len(values) == 1 else ""

    def put(self, keyword: str, values: tuple[str, ...]) -> None:
        self.texts[keyword] = values
        if keyword == "SpecificCharacterSet":
            self.codecs = _codecs(values)


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEADER_LIMIT)
    except zlib.error as error:
        raise _MalformedError("the deflated dataset cannot be inflated") from error


def _scan(data: bytes, at: int, end: int, encoding: _Encoding, depth: int, node: _Node, *, delimited: bool) -> int:
    """Reads a dataset or an item into `node`; returns where it ended. At depth 0, stops before pixel data."""
    # Each element costs a few calls, and a header has some hundred of them while a camera waits: so what most are, a
    # text of a short VR that nobody asks for, goes the shortest way.
    implicit, explicit_head, wanted = encoding.implicit, encoding.explicit_head, _WANTED.get
    while at < end:
        if end - at < 8:
            if depth == 0 and end - at >= 2 and encoding.short(data, at)[0] >= _PIXEL_GROUP:
                node.reached_pixels = True
                return at
            raise _MalformedError("the header breaks off within an element")
        group, number, written, length = explicit_head(data, at)
        if group >= _PIXEL_GROUP:
            if depth == 0:
                node.reached_pixels = True
                return at
            if group == 0xFFFE:
                if delimited and number == 0xE00D:
                    return at + 8
                raise _MalformedError("an item delimiter stands where an element should be")
        keyword, dictionary_vr = wanted(group << 16 | number, _UNWANTED)
        if implicit or written not in _SHORT_VRS:
            vr, length, at = _element_start(data, at, end, encoding)
        else:
            vr, at = "" if not keyword else written.decode("ascii"), at + 8
        if not keyword and length <= end - at:  # most elements: a length of all ones is never within the data
            at += length
            continue
        # UN of undefined length holds Implicit VR Little Endian (PS3.5 6.2.2); so does a sequence re-sent as UN.
        inner = _IMPLICIT_LITTLE if vr == "UN" else encoding
        is_sequence = vr == "SQ" or (vr in ("", "UN") and dictionary_vr == "SQ")
        if length == _UNDEFINED:
            if vr not in ("", "SQ", "UN"):
                raise _MalformedError("an element that is no sequence has no length")
            items, at = _scan_items(data, at, end, inner, depth + 1, node.codecs, delimited=True)
            if keyword and dictionary_vr == "SQ":
                node.items[keyword] = items
            continue
        if length > end - at:
            raise _MalformedError("the header breaks off within an element")
        if keyword and is_sequence and dictionary_vr == "SQ":
            node.items[keyword], _ = _scan_items(data, at, at + length, inner, depth + 1, node.codecs, delimited=False)
        elif keyword and not is_sequence and dictionary_vr != "SQ":
            value_vr = dictionary_vr if vr in ("", "UN") else vr
            node.put(keyword, _texts(value_vr, data[at : at + length], encoding.little, node.codecs))
        at += length
    if delimited:
        raise _MalformedError("the header breaks off within a sequence")
    return at


def _element_start(data: bytes, at: int, end: int, encoding: _Encoding) -> tuple[str, int, int]:
    """VR ("" where implicit), length, and where the value starts."""
    vr = data[at + 4 : at + 6]
    if encoding.implicit or not (vr.isalpha() and vr.isupper()):
        # Some writers mix implicit elements into explicit datasets; no VR is spelt in anything but capitals.
        return "", encoding.long(data, at + 4)[0], at + 8
    if vr in _LONG_VRS:
        if end - at < 12:
            raise _MalformedError("the header breaks off within an element")
        return vr.decode("ascii"), encoding.long(data, at + 8)[0], at + 12
    return vr.decode("ascii"), encoding.short(data, at + 6)[0], at + 8


def _scan_items(
    data: bytes, at: int, end: int, encoding: _Encoding, depth: int, codecs: tuple[str, ...], *, delimited: bool
) -> tuple[list[_Node], int]:
    if depth > DEPTH_LIMIT:
        raise _MalformedError(f"sequences nest deeper than {DEPTH_LIMIT}")
    items: list[_Node] = []
    while at < end:
        if end - at < 8:
            raise _MalformedError("the header breaks off within a sequence")
        group, number, length = encoding.head(data, at)
        tag = group << 16 | number
        at += 8
        if tag == 0xFFFEE0DD:
            if delimited:
                return items, at
            break
        if tag != 0xFFFEE000:
            raise _MalformedError("a sequence holds something that is no item")
        item = _Node(codecs=codecs)
        if length == _UNDEFINED:
            at = _scan(data, at, end, encoding, depth, item, delimited=True)
        elif length > end - at:
            raise _MalformedError("the header breaks off within a sequence")
        else:
            at = _scan(data, at, at + length, encoding, depth, item, delimited=False)
        items.append(item)
    if delimited:
        raise _MalformedError("the header breaks off within a sequence")
    return items, at


def _from_dataset(ds: Dataset, node: _Node, depth: int) -> None:
    """Fills `node` from a parsed dataset; what the parser left raw stays raw, so that no bad value can raise."""
    if depth > DEPTH_LIMIT:
        raise _MalformedError(f"sequences nest deeper than {DEPTH_LIMIT}")
    for tag, (keyword, dictionary_vr) in sorted(_WANTED.items()):
        if tag not in ds:
            continue
        element: object = ds.get_item(tag)  # its annotation leaves out the raw elements that it returns
        if isinstance(element, RawDataElement):
            vr = element.VR or ""
            encoding = _Encoding(implicit=element.is_implicit_VR or vr == "UN", little=element.is_little_endian)
            raw = element.value or b""
            if dictionary_vr == "SQ":
                if vr in ("", "SQ", "UN"):
                    node.items[keyword], _ = _scan_items(
                        raw, 0, len(raw), encoding, depth + 1, node.codecs, delimited=False
                    )
            else:
                value_vr = dictionary_vr if vr in ("", "UN") else vr
                node.put(keyword, _texts(value_vr, raw, element.is_little_endian, node.codecs))
        elif isinstance(element, DataElement):
            if dictionary_vr == "SQ":
                if element.VR == "SQ":
                    node.items[keyword] = []
                    for item in element.value:
                        inner = _Node(codecs=node.codecs)
                        _from_dataset(item, inner, depth + 1)
                        node.items[keyword].append(inner)
            elif element.VR != "SQ":
                node.put(keyword, _plain(element.value, node.codecs))


def _plain(value: object, codecs: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, bytes):
        return _split(_decode(value, codecs))
    if isinstance(value, Iterable) and not isinstance(value, str) and type(value).__name__ != "PersonName":
        return _stripped(str(part) for part in value)
    return _split(str(value))


def _texts(vr: str, raw: bytes, little: bool, codecs: tuple[str, ...]) -> tuple[str, ...]:
    if vr in _BINARY:
        code = _BINARY[vr]
        size = struct.calcsize(f"={code}")
        count = len(raw) // size
        return tuple(str(value) for value in struct.unpack_from(f"{'<' if little else '>'}{count}{code}", raw))
    if vr in ("OB", "OW", "OF", "OD", "OL", "OV", "SQ", "AT"):
        return ()
    return _split(_decode(raw, codecs))


_PADDING: Final = " \0\t\r\n"


def _split(text: str) -> tuple[str, ...]:
    if "\\" in text:
        return _stripped(text.split("\\"))
    only = text.strip(_PADDING)
    return (only,) if only else ()


def _stripped(values: Iterable[str]) -> tuple[str, ...]:
    """Without padding; an element with nothing but empty values is absent."""
    stripped = tuple(value.strip(_PADDING) for value in values)
    return stripped if any(stripped) else ()


def _codecs(terms: tuple[str, ...]) -> tuple[str, ...]:
    """Python codecs of SpecificCharacterSet; an unknown term is read as Latin-1, which no byte can break."""
    if not terms:
        return ("latin-1",)
    spelt = (term if term in python_encoding else re.sub(r"^ISO[ _-]IR[ _-]", "ISO_IR ", term) for term in terms)
    return tuple(python_encoding.get(term, "latin-1") for term in spelt)


def _decode(raw: bytes, codecs: tuple[str, ...]) -> str:
    """Text with code extensions (PS3.3 C.12.1.1.2, PS3.5 6.1.2.5); what cannot be decoded becomes U+FFFD."""
    if b"\x1b" not in raw:
        return raw.decode(codecs[0], "replace")
    parts = raw.split(b"\x1b")
    text = parts[0].decode(codecs[0], "replace")
    for part in parts[1:]:
        escaped = b"\x1b" + part
        sequence = next((code for code in (escaped[:4], escaped[:3]) if code in CODES_TO_ENCODINGS), b"")
        codec = CODES_TO_ENCODINGS.get(sequence, codecs[0])
        # The stateful Japanese codecs need their escape sequence, the others would show it.
        text += (escaped if codec.startswith("iso2022") else escaped[len(sequence) :]).decode(codec, "replace")
    return text


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(text: str) -> int | None:
    value = _number(text)
    return int(value) if value is not None and value == int(value) else None


# From elements to facts ------------------------------------------------------------------------------------------

_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_LOOSE_UID = re.compile(r"[0-9][0-9.]{0,63}")
_FRAME_LIMIT: Final = 4096
_MATRIX_LIMIT: Final = 4096

_PEAK_KEV: Final = 364.0
_WINDOW_KEV: Final = (327.6 - 5.0, 400.4 + 5.0)
_NUCLIDE_CODES: Final = frozenset({"1368003", "C-114B1", "111160004"})
_NUCLIDE_NAME = re.compile(r"(?<![a-z0-9])(131[ _-]?i|i(odine|odide)?[ _^-]{0,2}131)(?![0-9])", re.IGNORECASE)

# "line" and "bar" alone occur in patients' descriptions too ("line 2"); content tells the rest (pipeline.quality).
_FLOOD_WORD = re.compile(
    r"(?<![a-z])(flood|uniformity|qc|qa|quality control|(bar|line)([ _-]*(phantom|pattern|source|test)|$))(?![a-z])",
    re.IGNORECASE,
)
_BODY_WORD = re.compile(r"neck|thyr|hals|patient|whole|remnant|ablat|uptake", re.IGNORECASE)

_VIEW_SCHEMES: Final = frozenset({"", "SCT", "SRT", "SNM3", "99SDM"})
_VIEW_CODES: Final[dict[str, ViewName]] = {
    "399321004": "anterior",
    "G-5215": "anterior",
    "399001007": "posterior",
    "G-5216": "posterior",
}
_Seen = Literal["anterior", "posterior", "other", "conflict", "unknown"]
"""What the header says of a detector: a view of ours, another projection, two answers, or nothing."""

# "POST" alone mostly means "after": POST THERAPY, POST OP. It names a view only where nothing follows that is no view.
_ANTERIOR_NAME = re.compile(r"(?<![a-z])(ant|anterior)(?![a-z])|_e$", re.IGNORECASE)
_POSTERIOR_NAME = re.compile(
    r"(?<![a-z])(posterior|post(?=[ _-]*(view|image|static|neck|$)))(?![a-z])|_f$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class _Judgement:
    reason: str | None
    detail: str = ""
    ours: bool = False
    frames: tuple[FrameFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class _Photopeak:
    """Which energy windows (1-based) hold the 131I photopeak, and their limits where the header has them."""

    windows: frozenset[int]
    limits_kev: tuple[float, float] | None


def _facts(node: _Node, problem: str) -> HeaderFacts:
    sop_class_uid, sop_instance_uid = node.text("SOPClassUID"), node.text("SOPInstanceUID")
    for keyword, uid in (("SOPClassUID", sop_class_uid), ("SOPInstanceUID", sop_instance_uid)):
        if not (len(uid) <= 64 and _UID.fullmatch(uid)):
            raise UnreadableHeader(f"{keyword} is absent or not a UID" + (f": {problem}" if problem else ""))
    study_instance_uid, series_instance_uid = node.text("StudyInstanceUID"), node.text("SeriesInstanceUID")
    for keyword, uid in (("StudyInstanceUID", study_instance_uid), ("SeriesInstanceUID", series_instance_uid)):
        # Leading zeros are common in the field, and the study has to be answered under the UID that it has.
        if not _LOOSE_UID.fullmatch(uid):
            raise UnreadableHeader(f"{keyword} is absent or not a UID" + (f": {problem}" if problem else ""))

    rows, columns = (_whole(node.only(keyword)) or 0 for keyword in ("Rows", "Columns"))
    frame_text = node.text("NumberOfFrames")
    number_of_frames = 1 if not frame_text else _whole(frame_text) or 0
    spacing_mm = _spacing(node)
    photopeak = _photopeak(node) if sop_class_uid == NuclearMedicineImageStorage else None
    if sop_class_uid != NuclearMedicineImageStorage:
        judged = _Judgement("wrong_class", "it is not a Nuclear Medicine Image")
    else:
        judged = _judge(node, problem, rows, columns, number_of_frames, spacing_mm, photopeak)
    return HeaderFacts(
        sop_class_uid=sop_class_uid,
        sop_instance_uid=sop_instance_uid,
        study_instance_uid=study_instance_uid,
        series_instance_uid=series_instance_uid,
        patient_id=node.text("PatientID"),
        issuer_of_patient_id=node.text("IssuerOfPatientID"),
        patient_name=node.text("PatientName"),
        accession_number=node.text("AccessionNumber"),
        acquired_at=_acquired_at(node),
        timezone_offset_from_utc=node.only("TimezoneOffsetFromUTC"),
        rows=rows,
        columns=columns,
        number_of_frames=number_of_frames,
        spacing_mm=spacing_mm,
        energy_window_kev=photopeak.limits_kev if photopeak else None,
        frames=judged.frames,
        reason=judged.reason,
        ours=judged.ours,
        detail=judged.detail,
    )


def _judge(
    node: _Node,
    problem: str,
    rows: int,
    columns: int,
    number_of_frames: int,
    spacing_mm: tuple[float, float] | None,
    photopeak: _Photopeak | None,
) -> _Judgement:
    """Whether an NM object is a planar static 131I scan, and its photopeak frames."""
    image_type = [value.upper().replace("_", " ") for value in node.texts.get("ImageType", ())]
    if "WHOLE BODY" in image_type or "WHOLEBODY" in image_type:
        return _Judgement("whole_body", "ImageType says WHOLE BODY")
    expected = ("ORIGINAL", "PRIMARY", "STATIC", "EMISSION")
    for value, wanted in zip(image_type, expected, strict=False):
        if value not in ("", wanted):
            return _Judgement("not_static", f"ImageType has another value where {wanted} is needed")
    described = [node.text(keyword) for keyword in ("SeriesDescription", "ProtocolName", "ImageID")]
    if any(_FLOOD_WORD.search(text) for text in described) and not any(_BODY_WORD.search(text) for text in described):
        return _Judgement("flood", "the description names a flood, bar or line phantom or quality control")
    if problem and photopeak is None:
        return _Judgement("unreadable", problem)
    if photopeak is None:
        return _Judgement("not_131i", "no energy window holds the 364 keV photopeak of iodine-131")

    # From here on it is an 131I image. A matrix or header that cannot be used gets a note: silence would be worse.
    def unreadable(detail: str) -> _Judgement:
        return _Judgement("unreadable", detail, ours=True)

    if problem:
        return unreadable(problem)
    if len(image_type) < 3 or not image_type[2]:
        return unreadable("ImageType does not say what kind of image it is")
    if rows != columns or not 0 < rows <= _MATRIX_LIMIT:
        return unreadable(f"the matrix is {rows} x {columns}; a square one is needed")
    if not 0 < number_of_frames <= _FRAME_LIMIT:
        return unreadable("NumberOfFrames is not a usable number")
    if node.only("SamplesPerPixel") not in ("", "1"):
        return unreadable("SamplesPerPixel is not 1")
    if spacing_mm is None:
        return unreadable("PixelSpacing is absent or not two sizes above 0")
    return _photopeak_frames(node, number_of_frames, photopeak, unreadable)


def _photopeak(node: _Node) -> _Photopeak | None:
    """The 131I photopeak windows, or None for another nuclide.

    Limits tell, because a camera leaves nuclide codes empty or stale: a window that holds 364 keV and lies within the
    20 % window (327.6-400.4 keV, 5 keV to spare). With the nuclide's code or name, any window that holds 364 keV will
    do, and an only window may lack its limits.
    """
    named = _says_131i(node)
    infos = node.items.get("EnergyWindowInformationSequence", [])
    held: dict[int, tuple[float, float]] = {}
    any_limits = False
    for number, info in enumerate(infos, start=1):
        for limits in info.items.get("EnergyWindowRangeSequence", []):
            lower, upper = (_number(limits.only(f"EnergyWindow{edge}Limit")) for edge in ("Lower", "Upper"))
            if lower is None or upper is None or not 0 <= lower < upper:
                continue
            any_limits = True
            within = _WINDOW_KEV[0] <= lower and upper <= _WINDOW_KEV[1]
            if lower < _PEAK_KEV < upper and (within or named):
                held[number] = (lower, upper)
    if held:
        narrowest = min(held.values(), key=lambda window: (window[1] - window[0], window))
        windows = {n for n, window in held.items() if _close(window, narrowest, 0.5)}
        return _Photopeak(frozenset(windows), narrowest)
    only_one = len(infos) == 1 or (not infos and node.only("NumberOfEnergyWindows") in ("", "0", "1"))
    if named and not any_limits and only_one:
        return _Photopeak(frozenset({1}), None)
    return None


def _says_131i(node: _Node) -> bool:
    names = [info.text("EnergyWindowName") for info in node.items.get("EnergyWindowInformationSequence", [])]
    for drug in node.items.get("RadiopharmaceuticalInformationSequence", []):
        names.append(drug.text("Radiopharmaceutical"))
        for keyword in ("RadionuclideCodeSequence", "RadiopharmaceuticalCodeSequence"):
            for code in drug.items.get(keyword, []):
                if code.only("CodeValue") in _NUCLIDE_CODES:
                    return True
                names.append(code.text("CodeMeaning"))
    return any(_NUCLIDE_NAME.search(name) for name in names)


def _photopeak_frames(
    node: _Node, number_of_frames: int, photopeak: _Photopeak, unreadable: Callable[[str], _Judgement]
) -> _Judgement:
    """Frames by EnergyWindowVector and DetectorVector (PS3.3 C.8.4.8), never by their order."""
    infos = node.items.get("DetectorInformationSequence", [])
    windows = _vector(node, "EnergyWindowVector", "NumberOfEnergyWindows", number_of_frames)
    if windows is None:
        return unreadable("EnergyWindowVector does not say which window each frame was taken from")
    detectors = _vector(node, "DetectorVector", "NumberOfDetectors", number_of_frames)
    if detectors is None:
        return _Judgement("unknown_view", "DetectorVector does not say which detector took each frame", ours=True)
    chosen = [number for number in range(1, number_of_frames + 1) if windows[number - 1] in photopeak.windows]
    if not chosen:
        return unreadable("no frame was taken from the photopeak window")

    one_detector = len({detectors[number - 1] for number in chosen}) == 1
    frames: list[FrameFacts] = []
    other = 0
    for number in chosen:
        detector = detectors[number - 1]
        info = infos[detector - 1] if 1 <= detector <= len(infos) else _Node()
        seen = _view(info, node if one_detector else None)
        if seen == "conflict":
            return _Judgement("ambiguous_views", "ViewCodeSequence and StartAngle contradict each other", ours=True)
        if seen == "unknown":
            return _Judgement("unknown_view", f"nothing names the view of detector {detector}", ours=True)
        if seen == "other":
            other += 1
        else:
            frames.append(FrameFacts(view=seen, frame_number=number))
    if not frames:
        return _Judgement("unknown_view", f"{other} views are neither anterior nor posterior", ours=True)
    if len({frame.view for frame in frames}) != len(frames):
        return _Judgement("ambiguous_views", "two photopeak frames show the same view", ours=True)
    return _Judgement(None, ours=True, frames=tuple(sorted(frames, key=lambda frame: frame.view)))


def _vector(node: _Node, keyword: str, count_keyword: str, number_of_frames: int) -> list[int] | None:
    """One number a frame; all 1 where the vector is absent and there is nothing to choose from."""
    values = [_whole(text) for text in node.texts.get(keyword, ())]
    whole = [value for value in values if value is not None]
    if len(whole) == len(values) == number_of_frames:
        return whole
    infos = node.items.get(f"{count_keyword.removeprefix('NumberOf').removesuffix('s')}InformationSequence", [])
    if not values and (number_of_frames == 1 or (node.only(count_keyword) in ("", "1") and len(infos) == 1)):
        return [1] * number_of_frames
    return None


def _view(info: _Node, named_by: _Node | None) -> _Seen:
    """The view of a detector: codes, then StartAngle, then names; `named_by` where the object has one detector.

    Codes and angle are both the camera's own word, so that neither is believed where they disagree. Names are typed by
    people and asked only where both are silent.
    """
    said = {seen for seen in (_view_by_code(info), _view_by_angle(info)) if seen != "unknown"}
    if len(said) > 1:
        return "conflict"
    if said:
        return said.pop()
    return _view_by_name(named_by) if named_by is not None else "unknown"


def _view_by_code(info: _Node) -> _Seen:
    found: set[_Seen] = set()
    for code in info.items.get("ViewCodeSequence", []):
        value, meaning = code.only("CodeValue").upper(), code.text("CodeMeaning").lower()
        if value in _VIEW_CODES and code.only("CodingSchemeDesignator").upper() in _VIEW_SCHEMES:
            found.add(_VIEW_CODES[value])
        elif meaning in ("anterior", "ant", "anterior view", "anterior projection"):
            found.add("anterior")
        elif meaning in ("posterior", "post", "posterior view", "posterior projection"):
            found.add("posterior")
        elif value or meaning:
            found.add("other")
    if len(found) > 1:
        return "conflict"
    return found.pop() if found else "unknown"


def _view_by_angle(info: _Node) -> _Seen:
    """StartAngle: 0 at the patient's back, 180 in front (PS3.3 C.8.4.11), 45 degrees to either side."""
    angle = _number(info.only("StartAngle"))
    if angle is None:
        return "unknown"
    turned = angle % 360.0
    if abs(turned - 180.0) <= 45.0:
        return "anterior"
    return "posterior" if min(turned, 360.0 - turned) <= 45.0 else "other"


def _view_by_name(node: _Node) -> _Seen:
    for keyword in ("ImageID", "ImageComments", "SeriesDescription"):
        name = node.text(keyword)
        front, back = bool(_ANTERIOR_NAME.search(name)), bool(_POSTERIOR_NAME.search(name))
        if front != back:
            return "anterior" if front else "posterior"
        if front:
            return "unknown"
    return "unknown"


def _spacing(node: _Node) -> tuple[float, float] | None:
    sizes = [_number(text) for text in node.texts.get("PixelSpacing", ())]
    if len(sizes) != 2 or sizes[0] is None or sizes[1] is None or min(sizes[0], sizes[1]) <= 0:
        return None
    return sizes[0], sizes[1]


def _acquired_at(node: _Node) -> datetime | None:
    """AcquisitionDate and -Time, else AcquisitionDateTime. Never the series' or content's: they are not of the view."""
    date, time = node.only("AcquisitionDate").replace(".", ""), node.only("AcquisitionTime").replace(":", "")
    apart = moment_of(date + time) if date and time else None
    return apart or moment_of(re.split("[+-]", node.only("AcquisitionDateTime"))[0])


def moment_of(text: str) -> datetime | None:
    """Date and time as DICOM writes them (DT, or DA and TM joined), naive; None for all else, an offset included."""
    match = re.fullmatch(r"(\d{4})(\d{2})(\d{2})(\d{2})(\d{2})?(\d{2})?(?:\.(\d{1,6}))?", text, re.ASCII)
    if match is None:
        return None
    fraction = int((match[7] or "0").ljust(6, "0"))
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    try:
        # DICOM allows a leap second, Python does not. The camera writes naive local time.
        return datetime(year, month, day, hour, minute, min(second, 59), fraction)  # noqa: DTZ001 - naive on purpose
    except ValueError:
        return None


# Grouping --------------------------------------------------------------------------------------------------------


def _agree(one: HeaderFacts, other: HeaderFacts) -> bool:
    """Whether two objects could be of one acquisition, whatever their views and times."""
    return (
        one.patient_id == other.patient_id
        and one.issuer_of_patient_id == other.issuer_of_patient_id
        and one.study_instance_uid == other.study_instance_uid
        and (one.rows, one.columns) == (other.rows, other.columns)
        and _close(one.spacing_mm, other.spacing_mm, 1e-3)
        and _close(one.energy_window_kev, other.energy_window_kev, 0.5)
    )


def _close(one: tuple[float, float] | None, other: tuple[float, float] | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def _seconds_apart(one: HeaderFacts, other: HeaderFacts) -> float | None:
    if one.acquired_at is None or other.acquired_at is None:
        return None
    return abs((one.acquired_at - other.acquired_at).total_seconds())


def _components(
    objects: Sequence[HeaderFacts], linked: Callable[[HeaderFacts, HeaderFacts], bool]
) -> list[list[HeaderFacts]]:
    """Connected components of a symmetric relation."""
    left = {facts.sop_instance_uid: facts for facts in objects}
    components = []
    while left:
        component = [left.popitem()[1]]
        for member in component:  # grows while it is walked
            near = [facts for facts in left.values() if linked(member, facts)]
            component.extend(left.pop(facts.sop_instance_uid) for facts in near)
        components.append(component)
    return components


def _acquisition(members: Sequence[HeaderFacts], reason: str | None) -> Acquisition:
    views: set[ViewName] = {view for facts in members for view in facts.views}
    return Acquisition(
        sop_instance_uids=tuple(sorted(facts.sop_instance_uid for facts in members)),
        views=tuple(sorted(views)),
        reason=reason,
    )


# Pixels ----------------------------------------------------------------------------------------------------------

_DECODED_LIMIT: Final = 256 * 2**20
"""Bytes of decoded pixels that a compressed object may declare: a damaged header must not take the host's memory."""

# What pydicom's decoders raise for a damaged stream or header, and for a syntax that no installed decoder knows.
_DECODING_ERRORS = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    struct.error,
    TypeError,
    ValueError,
)


def _stored_values(ds: Dataset, facts: HeaderFacts) -> NDArray[np.integer]:
    """All frames, shape (frames, rows, columns), stored values before any rescaling."""
    import numpy as np

    node = _Node()
    _from_dataset(ds, node, 0)
    allocated = _whole(node.only("BitsAllocated"))
    stored = _whole(node.only("BitsStored")) or allocated
    high = _whole(node.only("HighBit"))
    signed = node.only("PixelRepresentation") == "1"
    if allocated not in (8, 16, 32) or stored is None or not 0 < stored <= allocated or high not in (None, stored - 1):
        raise UnusableScan("unreadable", "BitsAllocated, BitsStored and HighBit do not describe whole pixels")
    shape = (facts.number_of_frames, facts.rows, facts.columns)
    expected = math.prod(shape) * allocated // 8

    syntax = getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", ExplicitVRLittleEndian)
    encapsulated = syntax.is_transfer_syntax and not syntax.is_private and syntax.is_encapsulated
    element = ds.get_item(0x7FE00010) if 0x7FE00010 in ds else None
    data = element.value if element is not None else None
    if not isinstance(data, bytes) or not data:
        raise UnusableScan("bad_pixel_length", "the object has no pixel data")
    if not encapsulated and len(data) != expected + expected % 2:
        raise UnusableScan("bad_pixel_length", f"{len(data)} bytes of pixels where the header declares {expected}")
    if encapsulated and expected > _DECODED_LIMIT:
        raise UnusableScan("unreadable", f"the header declares {expected} bytes of pixels")
    if encapsulated or syntax == ExplicitVRBigEndian:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong with the values is judged below, not by the decoder
                decoded = np.asarray(ds.pixel_array)
        except _DECODING_ERRORS as error:
            raise UnusableScan("unreadable", f"the pixels cannot be decoded ({type(error).__name__})") from error
        if decoded.size != math.prod(shape):
            raise UnusableScan(
                "bad_pixel_length", f"{decoded.size} pixels where the header declares {math.prod(shape)}"
            )
        return decoded.reshape(shape)
    kind = f"<{'i' if signed else 'u'}{allocated // 8}"
    values: NDArray[np.integer] = np.frombuffer(data, dtype=kind, count=math.prod(shape)).reshape(shape)
    if stored < allocated:
        # Bits above HighBit may hold overlays of old: drop them, and for signed values carry the sign up.
        spare = allocated - stored
        values = np.right_shift(np.left_shift(values, spare), spare)
    return values


def _counts(stored: NDArray[np.integer], ds: Dataset) -> NDArray[np.float32]:
    import numpy as np

    node = _Node()
    _from_dataset(ds, node, 0)
    slope_text, intercept_text = node.text("RescaleSlope"), node.text("RescaleIntercept")
    slope = _number(slope_text) if slope_text else 1.0
    intercept = _number(intercept_text) if intercept_text else 0.0
    if slope is None or intercept is None or slope <= 0:
        raise UnusableScan("unreadable", "RescaleSlope or RescaleIntercept is not a usable number")
    counts = stored.astype(np.float64) * slope + intercept
    negative, positive = -float(counts[counts < 0].sum()), float(counts[counts > 0].sum())
    if negative > 0.01 * positive:
        raise UnusableScan("unreadable", "more than 1 % of the counts are negative")
    return np.maximum(counts, 0.0).astype(np.float32)
