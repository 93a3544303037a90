"""Foci, uptake and flags come beside a finding and change nothing of it."""

from dataclasses import fields, replace

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.sequence import Sequence as Items

from pipeline import foci_wording, wording
from pipeline.beside import with_details
from pipeline.finding import Box, Finding, ModelFacts, SourceFrame, Verdict, ViewFinding, ViewImage, ViewName

MM, SIDE = 2.2, 256
MODEL = ModelFacts("m", "1", "resnet18", "0" * 64, "demonstration", "simulated scans only", "")


def _finding(verdict: Verdict, *spots: tuple[float, float]) -> Finding:
    """`spots`: mm to the patient's left and towards the feet."""
    axis = (np.arange(SIDE) - (SIDE - 1) / 2) * MM
    views = []
    names: tuple[ViewName, ViewName] = ("anterior", "posterior")
    for name in names:
        mean = np.tile(0.6 + 2.4 / (1 + np.exp((np.abs(axis) - 65) / 4.0)), (SIDE, 1))
        for left_mm, below_mm in spots:
            x_mm = left_mm if name == "anterior" else -left_mm
            spot = np.outer(np.exp(-0.5 * ((axis - below_mm) / 6) ** 2), np.exp(-0.5 * ((axis - x_mm) / 6) ** 2))
            mean += 3000 * (1.0 if name == "anterior" else 0.4) * MM**2 / (2 * np.pi * 36) * spot
        counts = np.random.default_rng(len(views)).poisson(mean).astype(np.float32)
        image = ViewImage(name, counts, (MM, MM), SourceFrame("1.2", "1.2.3", "1.2.4", len(views) + 1, 2))
        box = ((90.0, 90.0), (160.0, 90.0), (160.0, 160.0), (90.0, 90.0))
        mask = np.zeros(counts.shape, bool)
        views.append(ViewFinding(image, Box(90, 90, 70, 70), mask, "grabcut", 0.0, box, 1.0, 0.5, 1, 1))
    return Finding(verdict, 0.5, 0.5, None, tuple(views), MODEL, "native", "1", 131, ("resampled",), {"total": 1.0})


def _header() -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.20", "1.2.3"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.4", "1.2.5"
    ds.AcquisitionDate, ds.AcquisitionTime, ds.ActualFrameDuration = "20260304", "093000", 600_000
    drug = Dataset()
    drug.RadionuclideTotalDose, drug.RadiopharmaceuticalStartDateTime = 185, "20260302093000"
    ds.RadiopharmaceuticalInformationSequence = Items([drug])
    return ds


def test_nothing_of_the_decision_changes() -> None:
    before = _finding("present", (14, 4), (-44, -10))
    after = with_details(before, [_header()], 30.0)
    added = ("foci", "uptake", "flags", "timings_ms")
    for field in fields(Finding):
        if field.name not in added:
            assert getattr(after, field.name) is getattr(before, field.name)
    assert after.flags == ("resampled",)
    assert after.timings_ms["total"] == pytest.approx(1.0 + after.timings_ms["foci"])


def test_uptake_is_given_only_for_tissue_found_by_a_calibrated_camera_with_a_full_header() -> None:
    found = _finding("present", (14, 4))
    given = with_details(found, [_header()], 30.0).uptake
    assert given is not None
    assert given.percent > 0
    assert with_details(found, [_header()]).uptake is None
    assert with_details(found, [Dataset()], 30.0).uptake is None
    assert with_details(replace(found, finding="absent"), [_header()], 30.0).uptake is None


def test_a_lateral_focus_alone_is_called_other_uptake_in_words() -> None:
    absent = with_details(_finding("absent", (-44, -10)), [], None)
    assert absent.flags == ("resampled", "other_uptake")
    said = "\n".join(wording.summary(absent, None))
    assert "Flags: resampled, other uptake outside of the thyroid bed" in said
    assert "1 side of neck right" in said
    assert "is other uptake, not residual tissue" in said


def test_a_focus_in_the_bed_beside_an_absent_verdict_asks_for_a_person() -> None:
    said = "\n".join(wording.summary(with_details(_finding("absent", (14, 4)), [], None), None))
    assert "REVIEW: focus in or above the thyroid bed" in said
    assert "PRESENT" not in said


def test_a_neck_without_foci_says_so_and_one_not_searched_says_nothing() -> None:
    searched = with_details(_finding("absent"), [], None)
    assert "Foci of uptake: none stands out." in wording.summary(searched, None)
    assert not any("oc" in line and "uptake" in line for line in wording.summary(_finding("absent"), None))


def test_every_sentence_is_plain_ascii() -> None:
    many = with_details(_finding("present", (14, 4), (-44, -10), (0, 60), (30, -68), (-30, -68), (0, -42)), [], None)
    assert len(many.foci or ()) == 6
    lines = (*foci_wording.details(many), foci_wording.foci_line(many))
    assert "1 more in the report" in lines[-1]
    assert all(line == wording.ascii_text(line) for line in lines)
