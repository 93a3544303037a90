"""Header facts, acquisitions and counts: everything real cameras send, everything hostile peers might."""

import io
import itertools
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from pipeline.camera import FOREIGN, SHAPES, Foreign, Shape, examination, expose, foreign
from pipeline.finding import ViewName
from pipeline.phantom import Phantom, phantom
from pipeline.reasons import REASONS
from pipeline.views import (
    HEADER_LIMIT,
    FrameFacts,
    HeaderFacts,
    UnreadableHeader,
    UnusableScan,
    counts_accumulated_matches,
    early_facts,
    facts_of,
    group,
    header_facts,
    view_images,
)

SCAN: Phantom = phantom(3)


def encoded(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The dataset as it stands in a C-STORE request: no preamble, no file meta information."""
    stream = DicomBytesIO()
    stream.is_little_endian = syntax != ExplicitVRBigEndian
    stream.is_implicit_VR = syntax == ImplicitVRLittleEndian
    write_dataset(stream, ds)
    data = stream.getvalue()
    if syntax == DeflatedExplicitVRLittleEndian:
        deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        data = deflater.compress(data) + deflater.flush()
    return data


def scan_of(shape: Shape = "two_frames", seed: int = 1) -> Dataset:
    return expose(SCAN, examination(seed), shape)[0]


def both_ways(ds: Dataset) -> HeaderFacts:
    """Facts from the bytes and from the parsed dataset, which must be the same."""
    facts = header_facts(encoded(ds)[:HEADER_LIMIT], ExplicitVRLittleEndian)
    assert facts == facts_of(ds)
    return facts


# Facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless],
)
def test_every_shape_is_understood_in_every_transfer_syntax(shape: Shape, syntax: str) -> None:
    objects = expose(SCAN, examination(2), shape)
    facts = [header_facts(encoded(ds, syntax)[:HEADER_LIMIT], syntax) for ds in objects]
    assert all(one.reason is None and one.ours for one in facts)
    views = [one.views for one in facts]
    expected: dict[Shape, list[tuple[ViewName, ...]]] = {
        "two_frames": [("anterior", "posterior")],
        "six_frames": [("anterior", "posterior")],
        "two_objects": [("anterior",), ("posterior",)],
        "two_series": [("anterior",), ("posterior",)],
        "anterior_only": [("anterior",)],
    }
    assert views == expected[shape]
    assert facts == [facts_of(ds) for ds in objects]
    assert facts[0].energy_window_kev == (327.6, 400.4)
    assert facts[0].spacing_mm == pytest.approx(SCAN.spacing_mm, abs=1e-5)
    assert facts[0].acquired_at == examination(2).acquired_at


@pytest.mark.parametrize("seed", range(7))
def test_identity_is_decoded_in_every_character_set(seed: int) -> None:
    person = examination(seed)
    facts = both_ways(scan_of(seed=seed))
    assert facts.patient_name == person.patient_name
    assert (facts.patient_id, facts.issuer_of_patient_id) == (person.patient_id, person.issuer_of_patient_id)
    assert facts.accession_number == person.accession_number
    read = pydicom.dcmread(io.BytesIO(encoded(scan_of(seed=seed))), force=True)
    assert facts_of(read).patient_name == person.patient_name


def test_a_japanese_name_with_a_delimiters_byte_within_a_character_survives() -> None:
    ds = scan_of()
    ds.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    name = "Mori^Sora=森^空=もり^そら"  # the last kana but one is encoded with 0x3D, the equals sign
    raw = b"=".join(part.encode("iso2022_jp") for part in name.split("="))
    del ds.PatientName
    data = encoded(ds)
    element = struct.pack("<HH2sH", 0x0010, 0x0010, b"PN", len(raw) + len(raw) % 2) + raw + b" " * (len(raw) % 2)
    at = data.index(struct.pack("<HH", 0x0010, 0x0020))
    facts = header_facts((data[:at] + element + data[at:])[:HEADER_LIMIT], ExplicitVRLittleEndian)
    assert facts.patient_name == name


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tc99m_thyroid", "not_131i"),
        ("i123_thyroid", "not_131i"),
        ("whole_body", "whole_body"),
        ("dynamic", "not_static"),
        ("tomo", "not_static"),
        ("flood", "flood"),
        ("ct_slice", "wrong_class"),
        ("secondary_capture", "wrong_class"),
    ],
)
def test_what_is_not_ours_is_told_with_its_reason_and_sends_nothing(kind: Foreign, reason: str) -> None:
    facts = both_ways(foreign(kind, examination(1)))
    assert facts.reason == reason
    assert facts.reason in REASONS
    assert facts.detail
    assert not facts.ours
    assert facts.frames == ()


def test_the_table_above_knows_everything_that_the_camera_can_send() -> None:
    assert len(FOREIGN) == 8


def _image_type(ds: Dataset, *values: str) -> None:
    ds.ImageType = list(values)


def _window(ds: Dataset, lower: float, upper: float, *, named: bool = True) -> None:
    limits = ds.EnergyWindowInformationSequence[0].EnergyWindowRangeSequence[0]
    limits.EnergyWindowLowerLimit, limits.EnergyWindowUpperLimit = lower, upper
    if not named:
        _no_nuclide(ds)


def _describe(ds: Dataset, series: str) -> None:
    ds.SeriesDescription, ds.ImageID = series, ""


def _no_nuclide(ds: Dataset) -> None:
    # As a workstation of the field writes it: the sequence present and empty, the total dose 0.
    drug = ds.RadiopharmaceuticalInformationSequence[0]
    drug.RadionuclideCodeSequence = Items([])
    drug.RadiopharmaceuticalCodeSequence = Items([])
    drug.RadionuclideTotalDose = 0
    ds.EnergyWindowInformationSequence[0].EnergyWindowName = ""


Change = Callable[[Dataset], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: setattr(ds, "Modality", "OT"),
        lambda ds: setattr(ds, "BodyPartExamined", "BREAST"),
        lambda ds: setattr(ds, "ManufacturerModelName", "Tandem_Optima_640"),
        _no_nuclide,
        lambda ds: _window(ds, 323.0, 405.0, named=False),
        lambda ds: _window(ds, 336.7, 391.3, named=False),
        lambda ds: _window(ds, 300.0, 430.0),  # wide, but the nuclide is named
        lambda ds: delattr(ds.EnergyWindowInformationSequence[0], "EnergyWindowRangeSequence"),
        lambda ds: delattr(ds, "EnergyWindowInformationSequence"),
        lambda ds: _describe(ds, "NECK QC OF UPTAKE, line 2"),
        lambda ds: _describe(ds, "off-line 131I barium free"),
        lambda ds: setattr(ds, "AcquisitionTime", "9h30"),
        lambda ds: setattr(ds, "PatientBirthDate", ""),
        lambda ds: _image_type(ds, "ORIGINAL", "PRIMARY", "STATIC"),
    ],
)
def test_what_the_field_writes_oddly_is_still_ours(change: Change) -> None:
    ds = scan_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns while the test writes the bad value; ours must not
        change(ds)
        data = encoded(ds)
    facts = header_facts(data[:HEADER_LIMIT], ExplicitVRLittleEndian)
    assert (facts.reason, facts.ours, facts.views) == (None, True, ("anterior", "posterior"))


@pytest.mark.parametrize(
    ("change", "reason", "ours"),
    [
        (lambda ds: _image_type(ds, "DERIVED", "PRIMARY", "STATIC", "EMISSION"), "not_static", False),
        (lambda ds: _image_type(ds, "ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"), "not_static", False),
        (lambda ds: _image_type(ds, "ORIGINAL", "PRIMARY", "GATED", "EMISSION"), "not_static", False),
        (lambda ds: _image_type(ds, "ORIGINAL", "PRIMARY", "STATIC", "TRANSMISSION"), "not_static", False),
        (lambda ds: _image_type(ds, "ORIGINAL", "PRIMARY", "WHOLE_BODY", "EMISSION"), "whole_body", False),
        (lambda ds: _window(ds, 100, 600, named=False), "not_131i", False),
        (lambda ds: _window(ds, 316, 412, named=False), "not_131i", False),
        (lambda ds: _window(ds, 126, 154), "not_131i", False),
        (lambda ds: _describe(ds, "Bar phantom 364 keV"), "flood", False),
        (lambda ds: _describe(ds, "Daily uniformity"), "flood", False),
        (lambda ds: delattr(ds, "ImageType"), "unreadable", True),
        (lambda ds: setattr(ds, "Rows", 128), "unreadable", True),
        (lambda ds: setattr(ds, "PixelSpacing", ["0", "0"]), "unreadable", True),
        (lambda ds: delattr(ds, "PixelSpacing"), "unreadable", True),
        (lambda ds: setattr(ds, "NumberOfFrames", 0), "unreadable", True),
        (lambda ds: setattr(ds, "NumberOfFrames", 2_000_000_000), "unreadable", True),
        (lambda ds: setattr(ds, "EnergyWindowVector", [1, 1, 1]), "unreadable", True),
        (lambda ds: setattr(ds, "EnergyWindowVector", [7, 7]), "unreadable", True),
        (lambda ds: delattr(ds, "DetectorVector"), "unknown_view", True),
        (lambda ds: delattr(ds, "DetectorInformationSequence"), "unknown_view", True),
        (lambda ds: setattr(ds, "DetectorVector", [1, 1]), "ambiguous_views", True),
        (lambda ds: setattr(ds, "DetectorVector", [1, 9]), "unknown_view", True),
    ],
)
def test_each_reason_and_whether_a_note_is_due(change: Change, reason: str, ours: bool) -> None:
    ds = scan_of()
    change(ds)
    facts = both_ways(ds)
    assert (facts.reason, facts.ours) == (reason, ours)
    assert facts.reason in REASONS
    assert facts.frames == ()


def test_frames_are_found_by_their_vectors_wherever_they_stand() -> None:
    ds = scan_of("six_frames")
    ds.EnergyWindowVector = [3, 3, 2, 2, 1, 1]
    ds.DetectorVector = [1, 2, 1, 2, 2, 1]
    windows = ds.EnergyWindowInformationSequence
    assert both_ways(ds).frames == (FrameFacts("anterior", 6), FrameFacts("posterior", 5))
    ds.EnergyWindowInformationSequence = Items([windows[2], windows[1], windows[0]])
    assert both_ways(ds).frames == (FrameFacts("anterior", 1), FrameFacts("posterior", 2))


# Views -----------------------------------------------------------------------------------------------------------


def _one_view(
    *,
    code: tuple[str, str] | None = None,
    angle: float | None = None,
    image_id: str = "",
    series: str = "",
) -> Dataset:
    ds = scan_of("anterior_only")
    ds.ImageID, ds.SeriesDescription = image_id, series
    detector = ds.DetectorInformationSequence[0]
    detector.ViewCodeSequence = Items([])
    if code:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = *code, "a view"
        detector.ViewCodeSequence = Items([item])
    if angle is None:
        del detector.StartAngle
    else:
        detector.StartAngle = angle
    return ds


@pytest.mark.parametrize(
    ("ds", "view"),
    [
        (_one_view(code=("399321004", "SCT")), "anterior"),
        (_one_view(code=("399001007", "SCT")), "posterior"),
        (_one_view(code=("G-5215", "SRT")), "anterior"),
        (_one_view(code=("G-5216", "99SDM")), "posterior"),
        (_one_view(code=("G-5216", "SNM3")), "posterior"),
        (_one_view(code=("G-5216", "SRT"), image_id="NECK ANT"), "posterior"),
        (_one_view(angle=180), "anterior"),
        (_one_view(angle=135), "anterior"),
        (_one_view(angle=-180), "anterior"),
        (_one_view(angle=0), "posterior"),
        (_one_view(angle=360), "posterior"),
        (_one_view(angle=315), "posterior"),
        (_one_view(angle=44.9, image_id="ANT"), "posterior"),
        (_one_view(image_id="NECK ANT"), "anterior"),
        (_one_view(image_id="Neck_E"), "anterior"),
        (_one_view(image_id="Neck_F"), "posterior"),
        (_one_view(image_id="POST NECK"), "posterior"),
        (_one_view(series="131I Neck posterior 24h"), "posterior"),
        (_one_view(image_id="ANTERIOR", series="NECK ANT POST"), "anterior"),
    ],
)
def test_the_view_is_taken_from_codes_then_angle_then_names(ds: Dataset, view: ViewName) -> None:
    facts = both_ways(ds)
    assert (facts.reason, facts.views) == (None, (view,))


@pytest.mark.parametrize(
    ("ds", "reason"),
    [
        (_one_view(), "unknown_view"),
        (_one_view(angle=90), "unknown_view"),
        (_one_view(angle=270, image_id="ANT"), "unknown_view"),
        (_one_view(code=("399173006", "SCT")), "unknown_view"),  # left lateral
        (_one_view(code=("399321004", "99OTHER")), "unknown_view"),
        (_one_view(series="NECK ANT POST"), "unknown_view"),
        (_one_view(series="Neck POST THERAPY"), "unknown_view"),
        (_one_view(series="131I post op 24h"), "unknown_view"),
        (_one_view(series="relevant posture"), "unknown_view"),
        (_one_view(code=("399321004", "SCT"), angle=0), "ambiguous_views"),
        (_one_view(code=("G-5216", "SRT"), angle=180), "ambiguous_views"),
    ],
)
def test_what_does_not_name_a_view_clearly_is_never_guessed(ds: Dataset, reason: str) -> None:
    facts = both_ways(ds)
    assert (facts.reason, facts.frames, facts.ours) == (reason, (), True)


def test_two_zeros_in_a_single_valued_angle_say_nothing() -> None:
    data = encoded(_one_view(angle=180))
    at = data.index(struct.pack("<HH2s", 0x0054, 0x0200, b"DS"))
    size = data[at + 6]
    data = data[: at + 8] + b"0\\0".ljust(size) + data[at + 8 + size :]
    facts = header_facts(data[:HEADER_LIMIT], ExplicitVRLittleEndian)
    assert facts.reason == "unknown_view"


# Hostile and damaged headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("SOPClassUID", ""),
        ("SOPInstanceUID", "1.2.03"),
        ("SOPInstanceUID", "../../etc/passwd"),
        ("SOPInstanceUID", "1.2.3\\1.2.4"),
        ("SOPInstanceUID", "1." + "2" * 63),
        ("StudyInstanceUID", ""),
        ("SeriesInstanceUID", "Tester^Anna"),
    ],
)
def test_without_class_and_uids_a_header_is_refused_without_repeating_it(tag: str, value: str) -> None:
    ds = scan_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(ds, tag, value)
        data = encoded(ds)
    with pytest.raises(UnreadableHeader, match=tag) as caught:
        header_facts(data[:HEADER_LIMIT], ExplicitVRLittleEndian)
    if value:
        assert value not in str(caught.value)


@pytest.mark.parametrize("value", [b"", b"\0", b"not a dataset at all", b"DICM" * 200, b"\xff" * 4096])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_what_is_no_dataset_is_refused(value: bytes, syntax: str) -> None:
    with pytest.raises(UnreadableHeader):
        header_facts(value, syntax)


def _nested(levels: int, tag: tuple[int, int]) -> bytes:
    """A sequence in a sequence in a sequence, none of them with a length."""
    start = struct.pack("<HH2sHL", *tag, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return start * levels


def test_twenty_thousand_nested_sequences_cost_no_stack() -> None:
    data = encoded(scan_of())
    before = data[: data.index(struct.pack("<HH", 0x0010, 0x0010))]
    with pytest.raises(UnreadableHeader, match="nest deeper"):
        header_facts((before + _nested(20_000, (0x0010, 0x1002)))[:HEADER_LIMIT], ExplicitVRLittleEndian)
    after = data[: data.index(struct.pack("<HH", 0x7FE0, 0x0010))]
    facts = header_facts((after + _nested(20_000, (0x0054, 0x0414)))[:HEADER_LIMIT], ExplicitVRLittleEndian)
    assert (facts.reason, facts.ours) == ("unreadable", True)
    assert "nest" in facts.detail


def test_a_deep_structured_report_is_no_nuclear_medicine_image_however_deep() -> None:
    ds = foreign("secondary_capture", examination(1))
    data = encoded(ds)
    data = data[: data.index(struct.pack("<HH", 0x7FE0, 0x0010))] + _nested(30, (0x0040, 0xA730))
    assert header_facts(data, ExplicitVRLittleEndian).reason == "wrong_class"


def test_a_deflate_bomb_is_inflated_no_further_than_the_limit() -> None:
    ds = scan_of()
    ds.add_new(0x00091001, "OB", b"\0" * 40_000_000)
    data = encoded(ds, DeflatedExplicitVRLittleEndian)
    assert len(data) < HEADER_LIMIT
    with pytest.raises(UnreadableHeader, match="breaks off"):
        header_facts(data, DeflatedExplicitVRLittleEndian)


def test_a_header_longer_than_the_limit_is_unreadable_but_has_its_uids() -> None:
    ds = scan_of()
    ds.add_new(0x00550010, "LO", "SOMEBODY")
    ds.add_new(0x00551001, "OB", b"\0" * 300_000)
    facts = header_facts(encoded(ds)[:HEADER_LIMIT], ExplicitVRLittleEndian)
    assert (facts.reason, facts.ours) == ("unreadable", True)
    assert facts.sop_instance_uid == ds.SOPInstanceUID
    assert facts_of(ds).reason is None  # the worker, who reads all of it, can tell more


def test_a_header_may_be_cut_anywhere_from_the_pixels_on() -> None:
    data = encoded(scan_of())
    whole = header_facts(data[:HEADER_LIMIT], ExplicitVRLittleEndian)
    at = data.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
    for cut in (at, at + 2, at + 4, at + 7, at + 12, at + 100):
        assert header_facts(data[:cut], ExplicitVRLittleEndian) == whole


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_what_is_known_of_a_dataset_early_is_what_is_known_of_the_whole(syntax: str) -> None:
    data = encoded(scan_of(), syntax)
    whole = header_facts(data[:HEADER_LIMIT], syntax)
    seen = [early_facts(data[:cut], syntax) for cut in range(0, 6000, 7)]
    assert {facts for facts in seen if facts is not None} == (
        {whole} if syntax != DeflatedExplicitVRLittleEndian else set()
    )
    assert seen[0] is None


def test_private_junk_and_bad_values_pass_without_a_sound() -> None:
    ds = scan_of()
    ds.add_new(0x00090010, "LO", "GEMS_GENIE_1")
    ds.add_new(0x00091040, "LO", "Somebody^Else")
    data = encoded(ds)
    for old, new in (
        (examination(1).patient_birth_date.encode(), b"19999999"),
        (f"{examination(1).acquired_at:%Y%m%d}".encode(), b"20251399"),
    ):
        assert old in data
        data = data.replace(old, new)
    facts = header_facts(data[:HEADER_LIMIT], ExplicitVRLittleEndian)
    assert (facts.reason, facts.acquired_at) == (None, None)
    read = pydicom.dcmread(io.BytesIO(data), force=True)
    assert facts_of(read) == facts


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cut=st.integers(0, 2500),
    changes=st.lists(st.tuples(st.integers(0, 2300), st.integers(0, 255)), max_size=12),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]),
)
def test_mutilated_headers_give_facts_or_one_error_and_nothing_else(
    cut: int, changes: list[tuple[int, int]], syntax: str
) -> None:
    data = bytearray(_ENCODED[syntax])
    for at, value in changes:
        data[at % len(data)] = value
    try:
        facts = header_facts(bytes(data[: len(data) if cut > 2300 else cut]), syntax)
    except UnreadableHeader:
        return
    assert facts.reason is None or facts.reason in REASONS
    assert facts.reason is not None or facts.views


_ENCODED: dict[str, bytes] = {
    syntax: encoded(scan_of("six_frames", seed=3), syntax)[:2300]
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
}


def test_importing_views_loads_neither_torch_nor_cv2() -> None:
    code = "import sys, pipeline.views; print([m for m in ('torch', 'torchvision', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# Grouping --------------------------------------------------------------------------------------------------------

_NOON = datetime(2025, 3, 3, 12, 0)  # noqa: DTZ001 - cameras write naive local time


def one_view(uid: str, view: ViewName, minutes: float | None = 0.0, **changes: Any) -> HeaderFacts:
    facts = HeaderFacts(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.20",
        sop_instance_uid=f"1.2.{uid}",
        study_instance_uid="1.2.100",
        series_instance_uid="1.2.200",
        patient_id="P1",
        issuer_of_patient_id="HERE",
        patient_name="Tester^Anna",
        accession_number="A1",
        acquired_at=None if minutes is None else _NOON + timedelta(minutes=minutes),
        timezone_offset_from_utc="",
        rows=256,
        columns=256,
        number_of_frames=1,
        spacing_mm=(2.20903, 2.20903),
        energy_window_kev=(327.6, 400.4),
        frames=(FrameFacts(view, 1),),
        reason=None,
        ours=True,
    )
    return replace(facts, **changes)


def grouped(objects: list[HeaderFacts], pair_window_s: float = 3600.0) -> set[tuple[tuple[str, ...], str | None]]:
    """The acquisitions, the same for every order of arrival."""
    orders = itertools.permutations(objects)
    results = {group(list(order), pair_window_s=pair_window_s) for order in orders}
    assert len(results) == 1
    (acquisitions,) = results
    uids = [uid for acquisition in acquisitions for uid in acquisition.sop_instance_uids]
    assert sorted(uids) == sorted({facts.sop_instance_uid for facts in objects})
    return {
        (tuple(uid.removeprefix("1.2.") for uid in acquisition.sop_instance_uids), acquisition.reason)
        for acquisition in acquisitions
    }


def test_simultaneous_views_of_two_acquisitions_never_cross() -> None:
    objects = [one_view("1", "anterior", 0), one_view("2", "posterior", 0)]
    objects += [one_view("3", "anterior", 20), one_view("4", "posterior", 20.01)]
    assert grouped(objects) == {(("1", "2"), None), (("3", "4"), None)}


def test_two_candidates_for_one_place_are_never_guessed() -> None:
    objects = [one_view("1", "anterior", 0), one_view("2", "anterior", 12), one_view("3", "posterior", 10)]
    assert grouped(objects) == {(("1", "2", "3"), "ambiguous_views")}


def test_a_certain_pair_is_no_candidate_for_a_third_view() -> None:
    objects = [one_view("1", "anterior", 0), one_view("2", "posterior", 0), one_view("3", "anterior", 15)]
    assert grouped(objects) == {(("1", "2"), None), (("3",), None)}


def test_three_views_at_once_are_ambiguous() -> None:
    objects = [one_view("1", "anterior", 0), one_view("2", "anterior", 0.02), one_view("3", "posterior", 0)]
    assert grouped(objects) == {(("1", "2", "3"), "ambiguous_views")}


def test_views_one_after_the_other_pair_within_the_window_only() -> None:
    objects = [one_view("1", "anterior", 0), one_view("2", "posterior", 12)]
    assert grouped(objects) == {(("1", "2"), None)}
    assert grouped(objects, pair_window_s=600) == {(("1",), None), (("2",), None)}


def test_the_24_h_and_the_48_h_neck_stay_apart() -> None:
    day = 24 * 60
    objects = [one_view("1", "anterior", 0), one_view("2", "posterior", 10)]
    objects += [one_view("3", "anterior", day), one_view("4", "posterior", day + 10)]
    objects.append(one_view("5", "anterior", 2 * day))
    assert grouped(objects) == {(("1", "2"), None), (("3", "4"), None), (("5",), None)}


@pytest.mark.parametrize(
    "changes",
    [
        {"patient_id": "P2"},
        {"issuer_of_patient_id": "THERE"},
        {"study_instance_uid": "1.2.101"},
        {"rows": 128, "columns": 128},
        {"spacing_mm": (1.10452, 1.10452)},
        {"energy_window_kev": (336.7, 391.3)},
        {"acquired_at": None, "series_instance_uid": "1.2.201"},
    ],
)
def test_views_that_differ_in_anything_that_matters_do_not_join(changes: dict[str, Any]) -> None:
    objects = [one_view("1", "anterior"), one_view("2", "posterior", **changes)]
    assert grouped(objects) == {(("1",), None), (("2",), None)}


def test_rounding_of_spacing_and_energy_does_not_part_views() -> None:
    other = one_view("2", "posterior", 5, spacing_mm=(2.2094, 2.2094), energy_window_kev=(327.5, 400.5))
    assert grouped([one_view("1", "anterior"), other]) == {(("1", "2"), None)}


def test_without_times_the_series_decides() -> None:
    objects = [one_view("1", "anterior", None), one_view("2", "posterior", None)]
    assert grouped(objects) == {(("1", "2"), None)}
    objects.append(one_view("3", "posterior", None))
    assert grouped(objects) == {(("1", "2", "3"), "ambiguous_views")}


def test_an_object_with_both_views_or_with_a_reason_stands_alone() -> None:
    both = one_view("1", "anterior", frames=(FrameFacts("anterior", 1), FrameFacts("posterior", 2)))
    unknown = one_view("2", "posterior", frames=(), reason="unknown_view")
    assert grouped([both, unknown, one_view("3", "posterior")]) == {
        (("1",), None),
        (("2",), "unknown_view"),
        (("3",), None),
    }


def test_an_object_received_twice_counts_once() -> None:
    objects = [one_view("1", "anterior"), one_view("2", "posterior"), one_view("1", "anterior")]
    assert grouped(objects) == {(("1", "2"), None)}


@settings(max_examples=60, deadline=None)
@given(
    views=st.lists(
        st.tuples(st.sampled_from(["anterior", "posterior"]), st.sampled_from([None, 0, 0.02, 30, 59, 100, 1440])),
        max_size=7,
    ),
    shuffle=st.randoms(use_true_random=False),
)
def test_grouping_does_not_depend_on_the_order_and_no_pair_is_of_one_side(
    views: list[tuple[ViewName, float | None]], shuffle: random.Random
) -> None:
    objects = [one_view(str(number), view, minutes) for number, (view, minutes) in enumerate(views, start=1)]
    acquisitions = group(objects, pair_window_s=3600)
    by_uid = {facts.sop_instance_uid: facts for facts in objects}
    for acquisition in acquisitions:
        sides = [view for uid in acquisition.sop_instance_uids for view in by_uid[uid].views]
        assert acquisition.reason is not None or len(set(sides)) == len(sides) <= 2
    shuffle.shuffle(objects)
    assert group(objects, pair_window_s=3600) == acquisitions


# Pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_counts_come_back_as_the_camera_counted_them(shape: Shape) -> None:
    objects = expose(SCAN, examination(1), shape)
    images = view_images(list(reversed(objects)))
    assert [image.view for image in images] == (["anterior"] if shape == "anterior_only" else ["anterior", "posterior"])
    for image, expected in zip(images, (SCAN.anterior, SCAN.posterior), strict=False):
        assert image.counts.dtype == np.float32
        assert np.array_equal(image.counts, expected)
        assert image.spacing_mm == pytest.approx(SCAN.spacing_mm, abs=1e-5)
        ds = next(ds for ds in objects if ds.SOPInstanceUID == image.source.sop_instance_uid)
        assert np.array_equal(ds.pixel_array.reshape(-1, 256, 256)[image.source.frame_number - 1], expected)
        assert image.source.number_of_frames == ds.NumberOfFrames
    assert all(counts_accumulated_matches(ds) is True for ds in objects)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_counts_do_not_depend_on_the_transfer_syntax(syntax: str) -> None:
    ds = scan_of()
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    read = pydicom.dcmread(io.BytesIO(stream.getvalue()))
    front, back = view_images([read])
    assert np.array_equal(front.counts, SCAN.anterior)
    assert np.array_equal(back.counts, SCAN.posterior)


def test_compressed_pixels_are_decoded_and_damaged_ones_are_a_reason() -> None:
    ds = scan_of()
    ds.compress(RLELossless, generate_instance_uid=False)
    assert np.array_equal(view_images([ds])[0].counts, SCAN.anterior)
    ds.PixelData = encapsulate([b"\x01\0\0\0nonsense", b"\x01\0\0\0nonsense"])
    with pytest.raises(UnusableScan) as caught:
        view_images([ds])
    assert caught.value.reason in ("unreadable", "bad_pixel_length")
    assert caught.value.ours


@pytest.mark.parametrize("change", [-2, 2, -131072, 131072])
def test_pixels_of_another_length_are_refused_before_they_are_decoded(change: int) -> None:
    ds = scan_of()
    ds.PixelData = ds.PixelData[:change] if change < 0 else ds.PixelData + b"\0" * change
    with pytest.raises(UnusableScan) as caught:
        view_images([ds])
    assert (caught.value.reason, caught.value.ours) == ("bad_pixel_length", True)
    del ds.PixelData
    with pytest.raises(UnusableScan, match="no pixel data"):
        view_images([ds])


def test_signed_and_rescaled_pixels_become_counts() -> None:
    ds = scan_of()
    signed = np.stack([SCAN.anterior, SCAN.posterior]).astype("<i2")
    signed[0, 0, 0] = -3  # what a scatter correction leaves behind
    ds.PixelData, ds.PixelRepresentation = signed.tobytes(), 1
    front = view_images([ds])[0].counts
    assert front[0, 0] == 0
    assert np.array_equal(front.ravel()[1:], SCAN.anterior.ravel()[1:])
    ds.RescaleSlope, ds.RescaleIntercept = "0.5", "0"
    assert np.array_equal(view_images([ds])[0].counts.ravel()[1:], SCAN.anterior.ravel()[1:] / 2)
    ds.RescaleSlope = "0"
    with pytest.raises(UnusableScan, match="RescaleSlope"):
        view_images([ds])
    ds.RescaleSlope, ds.PixelData = "1", (-signed).tobytes()
    with pytest.raises(UnusableScan, match="negative"):
        view_images([ds])


def test_bits_above_the_stored_ones_are_no_counts() -> None:
    ds = scan_of()
    frames = np.stack([SCAN.anterior, SCAN.posterior])
    assert frames.max() < 4096
    ds.PixelData = (frames | 0x8000).astype("<u2").tobytes()
    ds.BitsStored, ds.HighBit = 12, 11
    assert np.array_equal(view_images([ds])[0].counts, SCAN.anterior)
    ds.HighBit = 15
    with pytest.raises(UnusableScan, match="HighBit"):
        view_images([ds])


def test_any_square_matrix_is_taken_at_its_own_size() -> None:
    ds = scan_of()
    small = np.arange(2 * 128 * 128, dtype="<u2").reshape(2, 128, 128) % 500
    ds.Rows = ds.Columns = 128
    ds.PixelSpacing = ["4.418", "4.418"]
    ds.PixelData = small.astype("<u2").tobytes()
    front, back = view_images([ds])
    assert np.array_equal(front.counts, small[0])
    assert back.spacing_mm == (4.418, 4.418)


def test_counts_accumulated_is_checked_and_is_no_condition() -> None:
    ds = scan_of()
    ds.CountsAccumulated = 12
    assert counts_accumulated_matches(ds) is False
    assert len(view_images([ds])) == 2
    ds.CountsAccumulated = 0
    assert counts_accumulated_matches(ds) is None


def test_views_of_two_patients_never_make_one_scan() -> None:
    front, _ = expose(SCAN, examination(1), "two_objects")
    _, back = expose(SCAN, examination(2), "two_objects")
    with pytest.raises(UnusableScan) as caught:
        view_images([front, back])
    assert caught.value.reason == "ambiguous_views"
    with pytest.raises(UnusableScan, match="twice"):
        view_images([front, front])
    with pytest.raises(ValueError, match="at least one"):
        view_images([])


def test_what_is_not_ours_has_no_images() -> None:
    with pytest.raises(UnusableScan) as caught:
        view_images([foreign("tc99m_thyroid", examination(1))])
    assert (caught.value.reason, caught.value.ours) == ("not_131i", False)
