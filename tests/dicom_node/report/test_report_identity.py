"""The result belongs to the patient and study of the scan, in whatever state its header came."""

import traceback
from dataclasses import replace
from io import BytesIO

import pydicom
import pydicom.config
import pytest
from pydicom.dataelem import DataElement

from dicom_node.report import RenderError, check, render
from pipeline.camera import examination

_NAMES = [
    (("ISO_IR 100",), "Lindqvist^Åse"),
    (("ISO_IR 192",), "Shen^Yulan=沈^玉兰"),
    (("GB18030",), "Gao^Minghe=高^明河"),
    (("", "ISO 2022 IR 87"), "Morino^Haru=森野^晴=もりの^はる"),
    (("", "ISO 2022 IR 149"), "Baek^Haneul=백^하늘"),
    (("ISO_IR 144",), "Берегова^Злата"),
    (("",), "Quellmalz^Jorg"),
]


def _put(ds, keyword, value):
    """Write a value that a checking library would refuse, as cameras do."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    vr = pydicom.datadict.dictionary_VR(tag)
    ds[tag] = DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE)


def _passes(made):
    results = render(made.outcome, made.sources, made.context)
    return [check(one, made.sources, made.outcome, made.context) for one in results]


@pytest.mark.parametrize(("character_set", "name"), _NAMES)
@pytest.mark.parametrize("kind", ["sr", "sc"])
def test_a_name_arrives_as_it_was_sent(case, character_set, name, kind):
    who = replace(examination(1), patient_name=name, specific_character_set=character_set)
    made = case("present", who=who)
    ds = made.read(kind)
    assert str(ds.PatientName) == name
    assert ds.get("SpecificCharacterSet") == made.sources[0].get("SpecificCharacterSet")
    assert check(made.render(kind), made.sources, made.outcome, made.context) == ()


def test_undeclared_bytes_in_a_name_stay_the_same_bytes(case):
    def undeclared(ds):
        if "SpecificCharacterSet" in ds:
            del ds.SpecificCharacterSet
        ds.PatientName = "M\xfcller^Jana".encode("latin-1")

    made = case("present", change=undeclared)
    assert b"M\xfcller^Jana" in made.render().data
    assert _passes(made) == [(), ()]


# pydicom tells of such a set whenever somebody else than `render` and `check` decodes a value.
_ODD = pytest.mark.filterwarnings("ignore:(Unknown encoding|Incorrect value for Specific Character Set)")


def _declaring(case, term, name, kind="present"):
    """A case whose sources came with `term` (10 bytes) in SpecificCharacterSet: no library writes an unknown one."""
    made = case(kind, who=replace(examination(1), patient_name=name, specific_character_set=("ISO_IR 100",)))
    sources = []
    for ds in made.sources:
        buffer = BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        declared = b"\x08\x00\x05\x00CS\x0a\x00"
        assert buffer.getvalue().count(declared + b"ISO_IR 100") == 1
        data = buffer.getvalue().replace(declared + b"ISO_IR 100", declared + term.encode("ascii"))
        sources.append(pydicom.dcmread(BytesIO(data)))
    return replace(made, sources=tuple(sources))


@_ODD
@pytest.mark.parametrize("kind", ["present", "low_counts"])
@pytest.mark.parametrize("term", ["ZQCHARACTE", "ISO_IR 999", "\\ISO_IR 10"])
def test_a_name_in_a_character_set_that_nobody_knows_is_not_guessed_at(case, term, kind):
    made = _declaring(case, term, "M\xfcller^Jana", kind)
    with pytest.raises(RenderError, match="character set that DICOM does not know") as raised:
        render(made.outcome, made.sources, made.context)
    assert "ller" not in "".join(traceback.format_exception(raised.value))


@_ODD
@pytest.mark.parametrize("term", ["ZQCHARACTE", "ISO_IR 999"])
def test_a_name_in_ascii_needs_no_character_set_and_an_unknown_one_is_not_passed_on(case, term):
    made = _declaring(case, term, "Muller^Jana")
    for kind in ("sr", "sc"):
        ds = made.read(kind)
        assert "SpecificCharacterSet" not in ds
        assert str(ds.PatientName) == "Muller^Jana"
    assert _passes(made) == [(), ()]


@_ODD
@pytest.mark.parametrize("misspelt", ["ISO-IR 100", "ISO IR 100", "ISO_IR-100", "ISO_IR_100"])
def test_a_misspelt_character_set_is_written_as_the_standard_spells_it(case, misspelt):
    made = _declaring(case, misspelt, "M\xfcller^Jana")
    for kind in ("sr", "sc"):
        assert made.read(kind).SpecificCharacterSet == "ISO_IR 100"
        assert str(made.read(kind).PatientName) == "M\xfcller^Jana"
    assert _passes(made) == [(), ()]


def test_identity_is_copied_and_private_elements_are_not(case):
    def add_private(ds):
        block = ds.private_block(0x0009, "GEMS_GENIE_1", create=True)
        block.add_new(0x40, "LO", "Secret^Name")

    made = case("present", change=add_private)
    for kind in ("sr", "sc"):
        ds = made.read(kind)
        for keyword in (
            "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
            "StudyInstanceUID", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
        ):  # fmt: skip
            assert ds[keyword].value == made.sources[0][keyword].value
        assert b"GEMS_GENIE" not in made.render(kind).data
        assert b"Secret" not in made.render(kind).data


@pytest.mark.parametrize("birth_date", ["00000000", "2020-13-45", "19991332", "1999"])
def test_an_impossible_date_breaks_nothing_and_is_not_copied(case, birth_date):
    def spoil(ds):
        _put(ds, "PatientBirthDate", birth_date)
        _put(ds, "StudyDate", birth_date)
        _put(ds, "PatientSex", "U")
        _put(ds, "PatientAge", "old")

    made = case("present", change=spoil)
    for kind in ("sr", "sc"):
        ds = made.read(kind)
        assert not ds.PatientBirthDate
        assert not ds.StudyDate
        assert not ds.PatientSex
        assert "PatientAge" not in ds
    assert "PatientBirthDate of the source is not valid and was left empty." in made.read("sc").ImageComments
    assert _passes(made) == [(), ()]


def test_missing_type_2_elements_are_completed(case):
    gone = ("PatientBirthDate", "StudyID", "AccessionNumber", "StudyTime", "StudyDate", "PatientSex", "PatientName")

    def strip(ds):
        for keyword in (*gone, "ReferringPhysicianName", "IssuerOfPatientID"):
            if keyword in ds:
                del ds[keyword]

    made = case("absent", change=strip)
    for kind in ("sr", "sc"):
        assert all(keyword in made.read(kind) for keyword in (*gone, "ReferringPhysicianName"))
    assert _passes(made) == [(), ()]


@pytest.mark.parametrize(
    ("offset", "date", "time"),
    [("", "20260305", "003015.250000"), ("-0500", "20260304", "183015.250000"), ("+0930", "20260305", "090015.250000")],
)
def test_times_are_the_nodes_or_in_the_offset_that_the_scan_brings(case, offset, date, time):
    made = case("present", who=replace(examination(1), timezone_offset_from_utc=offset))
    for kind in ("sr", "sc"):
        ds = made.read(kind)
        assert (ds.ContentDate, ds.ContentTime) == (date, time)
        assert ds.get("TimezoneOffsetFromUTC", "") == offset


def test_an_offset_that_is_none_is_not_copied(case):
    made = case("present", change=lambda ds: _put(ds, "TimezoneOffsetFromUTC", "CET"))
    ds = made.read()
    assert "TimezoneOffsetFromUTC" not in ds
    assert ds.ContentTime == "003015.250000"


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientID", "OTHER-1"),
        ("PatientName", "Other^Person"),
        ("StudyInstanceUID", "1.2.3"),
        ("AccessionNumber", "X9"),
    ],
)
def test_views_of_different_patients_or_orders_give_no_result(case, keyword, value):
    made = case("present", shape="two_objects")
    kept = str(made.sources[0][keyword].value)
    setattr(made.sources[1], keyword, value)
    with pytest.raises(RenderError) as caught:
        made.render()
    said = "".join(traceback.format_exception(caught.value))
    assert keyword in said
    if keyword != "StudyInstanceUID":
        assert kept not in said
        assert value not in said


def test_a_source_without_a_digest_is_refused(case):
    made = case("present", source_digests={})
    with pytest.raises(RenderError, match="no digest"):
        made.render()
