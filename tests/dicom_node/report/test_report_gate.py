"""Deliberate faults in finished objects: each is found before the object may leave."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest

from dicom_node.report import check, codes
from dicom_node.report.equipment import code_item
from pipeline import overlay


def _items(ds):
    yield ds
    for item in ds.get("ContentSequence") or ():
        yield from _items(item)


def _first(ds, code):
    return next(
        item
        for item in _items(ds)
        if item.get("ConceptNameCodeSequence") and item.ConceptNameCodeSequence[0].CodeValue == code.value
    )


def _rewritten(result, change):
    ds = pydicom.dcmread(BytesIO(result.data))
    change(ds)
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, ds)
    return replace(result, data=buffer.getvalue())


def _verdict(ds):
    coded = [item for item in _items(ds) if item.get("ConceptCodeSequence")]
    return next(item for item in coded if item.ConceptCodeSequence[0].CodeMeaning == "Present")


def _set(item, **values):
    for keyword, value in values.items():
        setattr(item, keyword, value)


def _drop_comment(ds, words):
    for item in _items(ds):
        if words in item.get("TextValue", ""):
            item.TextValue = "-"


def _probability(ds):
    return _first(ds, codes.PROBABILITY).MeasuredValueSequence[0]


def _figure(ds, code):
    return _first(ds, code).MeasuredValueSequence[0]


def _unit(ds, code):
    return _figure(ds, code).MeasurementUnitsCodeSequence[0]


def _measurements(ds):
    return _first(ds, codes.IMAGING_MEASUREMENTS).ContentSequence


def _both(ds, code):
    """The item of that name in the anterior and in the posterior group."""
    return [_first(group, code) for group in _measurements(ds)]


def _swap_names(ds):
    front, back = _both(ds, codes.TRACKING_IDENTIFIER)
    front.TextValue, back.TextValue = back.TextValue, front.TextValue


def _swap_outlines(ds):
    front, back = _both(ds, codes.IMAGE_REGION)
    front.GraphicData, back.GraphicData = back.GraphicData, front.GraphicData
    front.ContentSequence, back.ContentSequence = back.ContentSequence, front.ContentSequence


def _move_verdict(ds):
    front, back = _measurements(ds)
    verdict = _verdict(ds)
    front.ContentSequence = [item for item in front.ContentSequence if item is not verdict]
    back.ContentSequence.append(verdict)


def _garble_name(ds):
    """The bytes of another character set under the declared one, as a careless copy leaves them."""
    name = str(ds.PatientName)
    assert not name.isascii()
    ds.PatientName = name.encode("utf-8").decode("latin-1")


def _outline(ds):
    return _first(ds, codes.IMAGE_REGION)


def _sop_of_outline(ds):
    return _outline(ds).ContentSequence[0].ReferencedSOPSequence[0]


def _add_private(ds):
    ds.private_block(0x0009, "GEMS_GENIE_1", create=True).add_new(0x40, "LO", "x")


def _remove(ds, code):
    gone = _first(ds, code)
    for holder in _items(ds):
        children = holder.get("ContentSequence") or ()
        if any(child is gone for child in children):
            holder.ContentSequence = [child for child in children if child is not gone]
            return


_SR_FAULTS = {
    "another patient": (lambda ds: _set(ds, PatientID="X"), "PatientID is not the source's"),
    "another issuer": (lambda ds: _set(ds, IssuerOfPatientID="X"), "IssuerOfPatientID is not"),
    "another name": (lambda ds: _set(ds, PatientName="Other^Name"), "PatientName is not"),
    "another birth date": (lambda ds: _set(ds, PatientBirthDate="19010101"), "PatientBirthDate is not"),
    "another sex": (lambda ds: _set(ds, PatientSex="O"), "PatientSex is not"),
    "another study": (lambda ds: _set(ds, StudyInstanceUID="1.2.3"), "StudyInstanceUID is not"),
    "another order": (lambda ds: _set(ds, AccessionNumber="X"), "AccessionNumber is not"),
    "another character set": (lambda ds: _set(ds, SpecificCharacterSet="ISO_IR 192"), "SpecificCharacterSet is not"),
    "the camera's series": (lambda ds: _set(ds, SeriesInstanceUID=_sources_series(ds)), "is a UID of the sources"),
    "a drawn UID": (lambda ds: _set(ds, SOPInstanceUID="2.25.7"), "SOPInstanceUID is not the one"),
    "no document": (lambda ds: _set(ds, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33"), "SOPClassUID is not"),
    "another modality": (lambda ds: _set(ds, Modality="NM"), "Modality is not"),
    "a private group": (_add_private, "a private element is there"),
    "probability of 873 %": (lambda ds: _set(_probability(ds), NumericValue="873"), "not within 0 to 100"),
    "probability of 173 %": (lambda ds: _set(_probability(ds), NumericValue="173"), "not within 0 to 100"),
    "probability below 0": (lambda ds: _set(_probability(ds), NumericValue="-1"), "not within 0 to 100"),
    "probability off by a digit": (lambda ds: _set(_probability(ds), NumericValue="87.32"), "not that of the finding"),
    "probability as a fraction": (lambda ds: _set(_probability(ds), NumericValue="0.873"), "not that of the finding"),
    "unit not UCUM": (
        lambda ds: _set(_probability(ds).MeasurementUnitsCodeSequence[0], CodingSchemeDesignator="99X"),
        "unit of the probability",
    ),
    "percent as the unit": (
        lambda ds: _set(_probability(ds).MeasurementUnitsCodeSequence[0], CodeValue="percent"),
        "unit of the probability",
    ),
    "square metres": (lambda ds: _set(_unit(ds, codes.AREA), CodeValue="m2"), "is not the UCUM unit of its figure"),
    "unit of the area not UCUM": (
        lambda ds: _set(_unit(ds, codes.AREA), CodingSchemeDesignator="99X"),
        "is not the UCUM unit of its figure",
    ),
    "another area": (lambda ds: _set(_figure(ds, codes.AREA), NumericValue="1.0"), "is not that of its view"),
    "another maximum": (lambda ds: _set(_figure(ds, codes.MAXIMUM), NumericValue="1"), "is not that of its view"),
    "another ratio": (lambda ds: _set(_figure(ds, codes.RATIO), NumericValue="0.10"), "is not that of its view"),
    "another uptake": (lambda ds: _set(_figure(ds, codes.UPTAKE), NumericValue="12.3"), "is not that of its view"),
    "a focus more": (lambda ds: _set(_figure(ds, codes.FOCI), NumericValue="3"), "is not that of its view"),
    "other counts": (lambda ds: _set(_figure(ds, codes.FOCUS_COUNTS), NumericValue="1"), "is not that of its view"),
    "another focus": (
        lambda ds: _set(_first(_first(ds, codes.FOCUS_COUNTS), codes.FOCUS), TextValue="2"),
        "is not under its own focus and site",
    ),
    "a focus on the other side": (
        lambda ds: _set(
            _first(_first(ds, codes.FOCUS_COUNTS), codes.FINDING_SITE).ConceptCodeSequence[0],
            CodeValue=codes.SITES["bed_right"].value,
            CodeMeaning=codes.SITES["bed_right"].meaning,
        ),
        "is not under its own focus and site",
    ),
    "no area": (lambda ds: _remove(ds, codes.AREA), "has not the figures of its view"),
    "views swapped": (lambda ds: _measurements(ds).reverse(), "is not on the frame it was seen in"),
    "names of the views swapped": (_swap_names, "group is not called so"),
    "outlines of the views swapped": (_swap_outlines, "outline is not on the frame it was seen in"),
    "decision in the posterior group": (_move_verdict, "carries the decision of another view"),
    "another tracking UID": (lambda ds: _set(_first(ds, codes.TRACKING_UID), UID="2.25.5"), "or another one"),
    "outline elsewhere": (
        lambda ds: _set(_outline(ds), GraphicData=[1.0, 1.0, 9.0, 1.0, 5.0, 5.0, 1.0, 1.0]),
        "is not the one that was drawn",
    ),
    "frame 3 of 2": (lambda ds: _set(_sop_of_outline(ds), ReferencedFrameNumber=3), "frame does not exist"),
    "name in another encoding": (_garble_name, "PatientName is not"),
    "SOP instance of the scan": (
        lambda ds: _set(ds, SOPInstanceUID=_sop_of_outline(ds).ReferencedSOPInstanceUID),
        "SOPInstanceUID is a UID of the sources",
    ),
    "no model": (lambda ds: ds.pop("ContributingEquipmentSequence"), "model's version and digest"),
    "verdict turned round": (
        lambda ds: _set(_verdict(ds), ConceptCodeSequence=[code_item(codes.VERDICTS["absent"])]),
        "the verdict is not that of the finding",
    ),
    "verdict's meaning turned round": (
        lambda ds: _set(_verdict(ds).ConceptCodeSequence[0], CodeMeaning="Absent"),
        "has another meaning",
    ),
    "verdict twice": (lambda ds: ds.ContentSequence.append(_verdict(ds)), "said once"),
    "no probability": (lambda ds: _remove(ds, codes.PROBABILITY), "does not stand exactly once"),
    "title of a note": (
        lambda ds: _set(ds, ConceptNameCodeSequence=[code_item(codes.NO_RESULT)]),
        "the document's title is not that of a finding",
    ),
    "no procedure": (lambda ds: _remove(ds, codes.PROCEDURE_REPORTED), "the procedure reported is missing"),
    "no tracking UID": (lambda ds: _remove(ds, codes.TRACKING_UID), "has no tracking UID"),
    "no outline": (lambda ds: _remove(ds, codes.IMAGE_REGION), "has no outline of its own"),
    "no algorithm version": (lambda ds: _remove(ds, codes.ALGORITHM_VERSION), "Algorithm Version is missing"),
    "outline on another frame": (lambda ds: _set(_sop_of_outline(ds), ReferencedFrameNumber=2), "not on the frame"),
    "outline on no frame": (lambda ds: _set(_sop_of_outline(ds), ReferencedFrameNumber=99), "frame does not exist"),
    "outline outside": (
        lambda ds: _set(_outline(ds), GraphicData=[0.0, 0.0, 999.0, 0.0, 5.0, 5.0, 0.0, 0.0]),
        "leaves the image",
    ),
    "outline open": (lambda ds: _set(_outline(ds), GraphicData=[1.0, 1.0, 9.0, 1.0, 5.0, 5.0, 2.0, 2.0]), "not closed"),
    "reference to another scan": (
        lambda ds: _set(_sop_of_outline(ds), ReferencedSOPInstanceUID="1.2.3"),
        "a reference is not one of the sources",
    ),
    "reference to another class": (
        lambda ds: _set(_sop_of_outline(ds), ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.2"),
        "another SOP class",
    ),
    "no digest": (
        lambda ds: _set(ds.ContributingEquipmentSequence[0], SoftwareVersions="0.1.0"),
        "model's version and digest",
    ),
    "no disclaimer": (lambda ds: _drop_comment(ds, "Not for diagnosis"), "the disclaimer is missing"),
    "no release": (lambda ds: _drop_comment(ds, "DEMONSTRATION"), "what the release allows is missing"),
    "no training data": (lambda ds: _drop_comment(ds, "rained on"), "what the model was trained on"),
    "no DEMONSTRATION in the series": (lambda ds: _set(ds, SeriesDescription="Remnant"), "disagree on demonstration"),
    "a finding called not analysed": (
        lambda ds: _set(ds, SeriesDescription="DEMONSTRATION NOT ANALYSED"),
        "disagree on whether",
    ),
    "a finding that nothing succeeded": (
        lambda ds: _set(_verdict(ds), ConceptCodeSequence=[code_item(codes.NONE_SUCCEEDED)]),
        "a finding says that no algorithm succeeded",
    ),
    "scheme unidentified": (lambda ds: ds.pop("CodingSchemeIdentificationSequence"), "is not identified"),
    "a final report": (lambda ds: _set(ds, PreliminaryFlag="FINAL"), "PreliminaryFlag is not PRELIMINARY"),
    "a verified report": (lambda ds: _set(ds, VerificationFlag="VERIFIED"), "VerificationFlag is not UNVERIFIED"),
    "another time": (lambda ds: _set(ds, ContentTime="120000"), "ContentTime is not"),
    "an offset of our own": (lambda ds: _set(ds, TimezoneOffsetFromUTC="+0100"), "TimezoneOffsetFromUTC is not"),
}


def _sources_series(ds):
    return ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].SeriesInstanceUID


@pytest.fixture(scope="module")
def present(case):
    made = case("present")
    return made, made.render("sr"), made.render("sc")


@pytest.mark.parametrize("fault", _SR_FAULTS)
def test_a_faulty_report_does_not_leave(present, fault):
    made, result, _ = present
    change, said = _SR_FAULTS[fault]
    faults = check(_rewritten(result, change), made.sources, made.outcome, made.context)
    assert any(said in one for one in faults), faults
    patient = made.sources[0]
    assert not any(str(secret) in one for one in faults for secret in (patient.PatientName, patient.PatientID))


def test_an_unchanged_report_that_was_only_rewritten_may_leave(present):
    made, *results = present
    for result in results:
        assert check(_rewritten(result, lambda ds: None), made.sources, made.outcome, made.context) == ()


_NOTE_FAULTS = {
    "a verdict": (codes.RESIDUAL_TISSUE, codes.VERDICTS["absent"], "carries a verdict"),
    "all succeeded, nothing found": (
        codes.SUMMARY,
        ("111241", "DCM", "All algorithms succeeded; without findings"),
        "an algorithm succeeded",
    ),
}


@pytest.mark.parametrize("fault", _NOTE_FAULTS)
def test_a_note_that_could_be_read_as_negative_does_not_leave(case, fault):
    made = case("low_counts")
    name, value, said = _NOTE_FAULTS[fault]

    def answer(ds):
        item = _first(ds, codes.SUMMARY)
        item.ConceptNameCodeSequence = [code_item(name)]
        item.ConceptCodeSequence = [code_item(pydicom.sr.coding.Code(*value))]

    faults = check(_rewritten(made.render(), answer), made.sources, made.outcome, made.context)
    assert any(said in one for one in faults), faults
    assert any("does not say that no algorithm succeeded" in one for one in faults)


def test_a_note_with_the_title_of_a_finding_does_not_leave(case):
    made = case("low_counts")
    faulty = _rewritten(made.render(), lambda ds: _set(ds, ConceptNameCodeSequence=[code_item(codes.TITLE)]))
    assert any("title is not" in one for one in check(faulty, made.sources, made.outcome, made.context))


def test_a_note_with_the_figures_of_a_finding_does_not_leave(case, present):
    note = case("low_counts")
    figure = _first(pydicom.dcmread(BytesIO(present[1].data)), codes.PROBABILITY)
    faulty = _rewritten(note.render(), lambda ds: ds.ContentSequence.append(figure))
    assert any("carries a probability" in one for one in check(faulty, note.sources, note.outcome, note.context))


@pytest.mark.parametrize(("probability", "written"), [(0.999999, "100.00"), (0.999999, "100")])
def test_a_probability_that_reads_as_certainty_does_not_leave(case, probability, written):
    made = case("present")
    made = replace(made, outcome=replace(made.outcome, probability=probability))
    assert check(made.render(), made.sources, made.outcome, made.context) == ()
    assert _probability(made.read()).NumericValue == "99.99"
    faulty = _rewritten(made.render(), lambda ds: _set(_probability(ds), NumericValue=written))
    assert any("reads as certainty" in one for one in check(faulty, made.sources, made.outcome, made.context))


def test_a_result_is_held_against_its_own_outcome(case, present):
    made, document, picture = present
    other = replace(made.outcome, finding="absent", probability=0.02)
    assert any("the verdict" in one for one in check(document, made.sources, other, made.context))
    assert any("picture" in one for one in check(picture, made.sources, other, made.context))
    contradiction = replace(made.outcome, finding="absent")
    assert any("contradict" in one for one in check(picture, made.sources, contradiction, made.context))
    refused = case("low_counts")
    assert len(check(document, made.sources, refused.outcome, made.context)) > 3


def test_a_result_for_another_scan_does_not_leave(case, present):
    _, document, _ = present
    other = case("present", seed=4)
    assert any("not one of the sources" in one for one in check(document, other.sources, other.outcome, other.context))


_SC_FAULTS = {
    "another picture": (lambda ds: _set(ds, PixelData=bytes(len(ds.PixelData))), "not that of the outcome"),
    "a smaller picture": (lambda ds: _set(ds, Rows=100), "another size"),
    "an original": (lambda ds: _set(ds, ImageType=["ORIGINAL", "PRIMARY"]), "ImageType is not"),
    "identity in the pixels": (lambda ds: _set(ds, BurnedInAnnotation="YES"), "BurnedInAnnotation is not NO"),
    "other words": (
        lambda ds: _set(ds, ImageComments=ds.ImageComments.replace("PRESENT", "ABSENT")),
        "do not say what the picture says",
    ),
    "no source": (lambda ds: ds.pop("SourceImageSequence") and ds.pop("ReferencedSeriesSequence"), "is not referenced"),
    "another patient": (lambda ds: _set(ds, PatientID="X"), "PatientID is not the source's"),
    "no disclaimer": (lambda ds: _set(ds, ImageComments="-"), "the disclaimer is missing"),
}


@pytest.mark.parametrize("fault", _SC_FAULTS)
def test_a_faulty_picture_does_not_leave(present, fault):
    made, _, result = present
    change, said = _SC_FAULTS[fault]
    faults = check(_rewritten(result, change), made.sources, made.outcome, made.context)
    assert any(said in one for one in faults), faults


def test_the_picture_of_a_note_is_not_that_of_a_finding(case, present):
    note = case("low_counts")
    negative = overlay.draw(replace(present[0].outcome, finding="absent", probability=0.02))
    faulty = _rewritten(note.render("sc"), lambda ds: _set(ds, PixelData=np.ascontiguousarray(negative).tobytes()))
    assert any("not that of the outcome" in one for one in check(faulty, note.sources, note.outcome, note.context))


@pytest.mark.parametrize("length", [0, 100, 131, 200, 400, 2000, 6001])
def test_a_damaged_file_does_not_leave(present, length):
    made, result, _ = present
    faults = check(replace(result, data=result.data[:length]), made.sources, made.outcome, made.context)
    assert faults


def test_whatever_is_broken_in_a_file_ends_in_an_answer_and_never_in_an_exception(present):
    made, result, _ = present
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(80):
        data = bytearray(result.data)
        for place in rng.integers(132, len(data), size=3):
            data[place] = rng.integers(256)
        found += bool(check(replace(result, data=bytes(data)), made.sources, made.outcome, made.context))
    assert found > 40
