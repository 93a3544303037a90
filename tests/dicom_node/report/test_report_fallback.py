"""Simpler reports before the real judges, and against deliberate faults: each says what its original says."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import BasicTextSRStorage, Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage

from dicom_node import contexts
from dicom_node.report import RenderError, check_fallback, codes, derive
from dicom_node.report.equipment import code_item
from dicom_node.report.fallback import VARIANTS
from pipeline import wording
from pipeline.camera import examination

_HERE = Path(sys.executable).parent
_OUTCOMES = [
    ("present", {}),
    ("absent", {"shape": "six_frames", "release": "local"}),
    ("undetermined", {"shape": "anterior_only"}),
    ("low_counts", {}),
    ("view_missing", {"shape": "anterior_only", "model": None}),
    ("present", {"revision": 2, "predecessors": ((str(Comprehensive3DSRStorage), "2.25.1", "2.25.2"),)}),
    *(("absent", {"who": examination(seed)}) for seed in (2, 3, 4)),  # other character sets
]


def _texts(ds):
    said = [item for item in ds.ContentSequence if item.RelationshipType == "CONTAINS"]
    return [item.TextValue for item in said if item.ValueType == "TEXT"]


def _read(data):
    return pydicom.dcmread(BytesIO(data))


@pytest.mark.parametrize("sop_class_uid", VARIANTS)
@pytest.mark.parametrize(("outcome", "options"), _OUTCOMES)
def test_every_simpler_report_passes_the_judges_and_our_own_gate(case, peer, tmp_path, outcome, options, sop_class_uid):
    original = case(outcome, **options).render().data
    made = derive(original, sop_class_uid)
    assert check_fallback(made.data, original) == ()
    path = tmp_path / "sr.dcm"
    path.write_bytes(made.data)
    judged = subprocess.run(
        [peer(str(_HERE / "dciodvfy")), "-new", path], capture_output=True, text=True, errors="replace"
    )
    assert judged.returncode == 0, judged.stderr
    assert "Error" not in judged.stderr
    dumped = subprocess.run([peer("/usr/bin/dsrdump"), path], capture_output=True, text=True, errors="replace")
    assert dumped.returncode == 0
    said = (dumped.stdout + dumped.stderr).splitlines()
    assert not [line for line in said if line.startswith(("E:", "W:")) and "Character" not in line]


@pytest.mark.parametrize("sop_class_uid", [ComprehensiveSRStorage, EnhancedSRStorage])
def test_a_foreign_reader_finds_the_same_in_a_report_of_another_class(case, peer, tmp_path, sop_class_uid):
    original = case("present").render().data
    read = []
    for number, data in enumerate((original, derive(original, sop_class_uid).data)):
        path, out = tmp_path / f"{number}.dcm", tmp_path / f"{number}.json"
        path.write_bytes(data)
        subprocess.run(
            [peer(str(_HERE / "tid1500reader")), "--inputDICOM", path, "--outputMetadata", out],
            check=True,
            capture_output=True,
        )
        read.append(json.loads(out.read_text()))
    assert len(read[0]["Measurements"]) == 2
    assert read[1]["Measurements"] == read[0]["Measurements"]


@pytest.mark.parametrize("verdict", ["present", "absent", "undetermined"])
def test_the_short_document_says_in_words_what_the_picture_says(case, verdict):
    made = case(verdict)
    ds = _read(derive(made.render().data, BasicTextSRStorage).data)
    said = _texts(ds)
    assert said[:3] == [
        wording.verdict_line(made.outcome),
        wording.probability_line(made.outcome),
        "Judged from: anterior view and posterior view.",
    ]
    assert said[3:] == list(wording.summary(made.outcome, None)[2:])
    coded = [item.ConceptCodeSequence[0].CodeMeaning for item in ds.ContentSequence if item.ValueType == "CODE"]
    assert coded[-1] == codes.VERDICTS[verdict].meaning
    assert {item.ValueType for item in ds.ContentSequence} == {"TEXT", "CODE"}
    assert "ContentTemplateSequence" not in ds


def test_a_short_note_says_why_and_nothing_that_reads_as_negative(case):
    made = case("low_counts", codes={"RMN005": ("7", "99SITE", "Why not"), "RMN008": ("8", "99SITE", "No result")})
    ds = _read(derive(made.render().data, BasicTextSRStorage).data)
    assert _texts(ds) == list(wording.summary(made.outcome, made.context.model))
    assert "This is not a negative result." in _texts(ds)
    coded = [item.ConceptCodeSequence[0].CodeValue for item in ds.ContentSequence if item.ValueType == "CODE"]
    assert coded[-2:] == ["111245", "110513"]
    assert not set(coded) & {code.value for code in codes.VERDICTS.values()}
    assert ds.ConceptNameCodeSequence[0].CodeMeaning == "No result"


def test_each_class_has_its_own_uid_and_the_same_input_gives_the_same_bytes(case):
    report = case("present").render()
    made = [derive(report.data, uid) for uid in VARIANTS]
    assert [derive(report.data, uid) for uid in VARIANTS] == made
    assert len({report.sop_instance_uid, *(one.sop_instance_uid for one in made)}) == 4
    assert {one.series_instance_uid for one in made} == {report.series_instance_uid}
    other = derive(case("present", revision=2).render().data, ComprehensiveSRStorage)
    assert other.sop_instance_uid != made[0].sop_instance_uid


def test_the_chain_is_the_one_that_the_network_side_knows():
    assert [one.uid for one in contexts.REPORT_CHAIN] == [str(Comprehensive3DSRStorage), *VARIANTS]


def test_only_our_own_three_dimensional_report_is_turned_into_another(case):
    original = case("present").render().data
    with pytest.raises(RenderError, match="only from a Comprehensive 3D SR"):
        derive(derive(original, ComprehensiveSRStorage).data, EnhancedSRStorage)
    with pytest.raises(RenderError, match="not a class"):
        derive(original, str(Comprehensive3DSRStorage))
    with pytest.raises(RenderError, match="cannot be read"):
        derive(b"no DICOM", BasicTextSRStorage)


def _set(item, **values):
    for keyword, value in values.items():
        setattr(item, keyword, value)


def _say(ds, old, new):
    hits = [item for item in ds.ContentSequence if old in item.get("TextValue", "")]
    assert hits, old
    for item in hits:
        item.TextValue = item.TextValue.replace(old, new)


def _turn_verdict(ds):
    for item in ds.ContentSequence:
        if item.ValueType == "CODE" and item.ConceptCodeSequence[0].CodeMeaning == "Present":
            item.ConceptCodeSequence = [code_item(codes.VERDICTS["absent"])]


def _drop(ds, words):
    kept = [item for item in ds.ContentSequence if words not in item.get("TextValue", "")]
    assert len(kept) < len(ds.ContentSequence)
    ds.ContentSequence = kept


def _claim_template(ds):
    item = pydicom.Dataset()
    item.MappingResource, item.TemplateIdentifier = "DCMR", "1500"
    ds.ContentTemplateSequence = [item]


_FAULTS = {
    "another patient": (lambda ds: _set(ds, PatientID="X"), "PatientID is not"),
    "another name": (lambda ds: _set(ds, PatientName="Other^Name"), "PatientName is not"),
    "another study": (lambda ds: _set(ds, StudyInstanceUID="1.2.3"), "StudyInstanceUID is not"),
    "no evidence": (lambda ds: ds.pop("CurrentRequestedProcedureEvidenceSequence"), "EvidenceSequence is not"),
    "no algorithm": (lambda ds: ds.pop("ContributingEquipmentSequence"), "ContributingEquipmentSequence is not"),
    "the original's UID": (lambda ds: _set(ds, SOPInstanceUID="2.25.7"), "SOPInstanceUID is not the one"),
    "another class": (lambda ds: _set(ds, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "SOPClassUID is none"),
    "a private element": (
        lambda ds: ds.private_block(0x0009, "GEMS_GENIE_1", create=True).add_new(0x40, "LO", "x"),
        "a private element is not the original's",
    ),
    "verdict turned round": (_turn_verdict, "coded verdict is not"),
    "verdict turned round in words": (lambda ds: _say(ds, "PRESENT", "ABSENT"), "verdict in words is not"),
    "another verdict beside": (lambda ds: _say(ds, "Judged from", "ABSENT, judged from"), "verdict in words is not"),
    "another probability": (lambda ds: _say(ds, "87.30", "8.73"), "probability against its threshold"),
    "another threshold": (lambda ds: _say(ds, "threshold 50.00", "threshold 90.00"), "probability against its"),
    "no disclaimer": (lambda ds: _drop(ds, wording.REVIEW), "the disclaimer is missing"),
    "no digest": (lambda ds: _drop(ds, "SHA-256"), "a sentence of the original is missing"),
    "no view": (lambda ds: _say(ds, "posterior", "other"), "a view that was judged is not named"),
    "another title": (lambda ds: _set(ds, ConceptNameCodeSequence=[code_item(codes.TITLE)]), "the title is not"),
    "a template": (_claim_template, "claims a template"),
    "a number": (lambda ds: _set(ds.ContentSequence[-1], ValueType="NUM"), "another value type"),
}


def _changed(data, change):
    ds = _read(data)
    change(ds)
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, ds)
    return buffer.getvalue()


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_deliberate_fault_in_a_short_document_is_found(case, fault):
    change, sentence = _FAULTS[fault]
    original = case("present").render().data
    made = derive(original, BasicTextSRStorage).data
    assert check_fallback(made, original) == ()
    assert any(sentence in found for found in check_fallback(_changed(made, change), original))


_NOTE_FAULTS = {
    "reads as negative": (lambda ds: _drop(ds, "This is not a negative"), "a sentence of the original is missing"),
    "says that all succeeded": (
        lambda ds: [
            _set(item.ConceptCodeSequence[0], CodeValue="111241")
            for item in ds.ContentSequence
            if item.ValueType == "CODE" and item.ConceptCodeSequence[0].CodeValue == "111245"
        ],
        "whether an algorithm succeeded",
    ),
    "no reason": (
        lambda ds: _set(
            ds,
            ContentSequence=[
                item
                for item in ds.ContentSequence
                if item.ValueType != "CODE" or item.ConceptCodeSequence[0].CodeValue != "110513"
            ],
        ),
        "the code of its reason",
    ),
    "a verdict": (lambda ds: _say(ds, "NOT ANALYSED", "ABSENT"), "verdict in words is not"),
}


@pytest.mark.parametrize("fault", _NOTE_FAULTS)
def test_a_deliberate_fault_in_a_short_note_is_found(case, fault):
    change, sentence = _NOTE_FAULTS[fault]
    original = case("low_counts").render().data
    made = derive(original, BasicTextSRStorage).data
    assert any(sentence in found for found in check_fallback(_changed(made, change), original))


def test_a_changed_tree_and_bytes_that_are_no_object_are_found(case):
    original = case("present").render().data
    made = derive(original, EnhancedSRStorage)
    assert check_fallback(made.data[:600], original)
    turned = _changed(made.data, lambda ds: ds.ContentSequence.pop())
    assert "ContentSequence is not the original's" in check_fallback(turned, original)
    other = case("present", revision=2).render().data
    assert "SOPInstanceUID is not the one that this result has" in check_fallback(made.data, other)
