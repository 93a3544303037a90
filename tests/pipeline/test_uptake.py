"""Uptake in percent: what a header has to say for it, and whether a drawn activity comes out again."""

import math
from datetime import datetime, timedelta

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.sequence import Sequence as Items

from pipeline.finding import Focus, SourceFrame, ViewImage, ViewName
from pipeline.foci import find_foci
from pipeline.uptake import ATTENUATION_PER_MM, HALF_LIFE_H, Exposure, bed_uptake, exposure_of

MM, SIDE = 2.2, 256
FRAME = SourceFrame("1.2", "1.2.3", "1.2.4", 1, 2)
SENSITIVITY = 30.0
GIVEN = Exposure(administered_mbq=185.0, delay_h=48.0, duration_s=600.0)


def _neck(
    percent: float, *, thickness_mm: float = 122.0, depth_mm: float = 24.0, seed: int = 1, lateral: float = 0.0
) -> list[ViewImage]:
    """A focus in the bed (and one beside it, `lateral` percent) that sends what a camera of `SENSITIVITY` counts."""
    axis = (np.arange(SIDE) - (SIDE - 1) / 2) * MM
    names: tuple[ViewName, ViewName] = ("anterior", "posterior")
    images = []
    for view in names:
        rng = np.random.default_rng([seed, view == "anterior"])
        mean = np.tile(0.5 + 2.5 / (1 + np.exp((np.abs(axis) - 65) / 4.0)), (SIDE, 1))
        path_mm = depth_mm if view == "anterior" else thickness_mm - depth_mm
        for left_mm, share in ((12.0, percent), (-48.0, lateral)):
            activity = share / 100 * GIVEN.administered_mbq * 0.5 ** (GIVEN.delay_h / HALF_LIFE_H)
            counts = activity * SENSITIVITY * GIVEN.duration_s * math.exp(-ATTENUATION_PER_MM * path_mm)
            across = np.exp(-0.5 * ((axis - (left_mm if view == "anterior" else -left_mm)) / 6.0) ** 2)
            spot = np.outer(np.exp(-0.5 * (axis / 6.0) ** 2), across)
            mean += counts * MM**2 / (2 * np.pi * 36) * spot
        images.append(ViewImage(view, rng.poisson(mean).astype(np.float32), (MM, MM), FRAME))
    return images


def _percent(images: list[ViewImage], exposure: Exposure = GIVEN) -> tuple[float, float]:
    uptake = bed_uptake(images, find_foci(images), exposure, SENSITIVITY)
    assert uptake is not None
    return uptake.percent, uptake.percent_sd


@pytest.mark.parametrize("percent", [0.2, 1.0, 6.0])
def test_a_known_uptake_comes_out_again(percent: float) -> None:
    figures = [_percent(_neck(percent, seed=seed)) for seed in range(6)]
    assert float(np.mean([one for one, _ in figures])) == pytest.approx(percent, rel=0.05)
    assert all(abs(one - percent) < 2 * spread for one, spread in figures)


def test_the_depth_of_the_tissue_hardly_matters_and_the_error_covers_the_thickness_of_the_neck() -> None:
    shallow, deep = (_percent(_neck(2.0, depth_mm=depth))[0] for depth in (15.0, 32.0))
    assert shallow == pytest.approx(deep, rel=0.05)
    for thickness in (105.0, 140.0):
        figure, spread = _percent(_neck(2.0, thickness_mm=thickness))
        assert abs(figure - 2.0) < 2 * spread


def test_without_a_view_from_behind_the_anterior_one_answers_and_says_so() -> None:
    front = _neck(2.0)[:1]
    uptake = bed_uptake(front, find_foci(front), GIVEN, SENSITIVITY)
    assert uptake is not None
    assert uptake.percent == pytest.approx(2.0, rel=0.08)
    assert "anterior view alone" in uptake.method
    assert "30 cps/MBq" in uptake.method
    behind = _neck(2.0)[1:]
    assert bed_uptake(behind, find_foci(behind), GIVEN, SENSITIVITY) is None


def test_a_node_beside_the_bed_is_not_counted_as_uptake_of_the_bed() -> None:
    assert _percent(_neck(1.0, lateral=2.0))[0] == pytest.approx(1.0, rel=0.08)
    lateral = _neck(0.0, lateral=2.0)
    assert bed_uptake(lateral, find_foci(lateral), GIVEN, SENSITIVITY) is None
    no_focus: tuple[Focus, ...] = ()
    assert bed_uptake(lateral, no_focus, GIVEN, SENSITIVITY) is None


def _header(**changed: object) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.20", "1.2.3"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.4", "1.2.5"
    acquired = datetime(2026, 3, 4, 9, 30)  # noqa: DTZ001 - a camera's clock is naive local time
    ds.AcquisitionDate, ds.AcquisitionTime = acquired.strftime("%Y%m%d"), acquired.strftime("%H%M%S")
    ds.ActualFrameDuration = 600_000
    drug = Dataset()
    drug.RadionuclideTotalDose = 185
    drug.RadiopharmaceuticalStartDateTime = (acquired - timedelta(hours=48)).strftime("%Y%m%d%H%M%S")
    ds.RadiopharmaceuticalInformationSequence = Items([drug])
    for keyword, value in changed.items():
        setattr(drug if keyword.startswith("Radio") else ds, keyword, value)
    return ds


def test_dose_and_times_are_read_in_megabecquerel_and_in_becquerel() -> None:
    assert exposure_of([_header()]) == GIVEN
    assert exposure_of([_header(RadionuclideTotalDose=185e6)]) == GIVEN
    offset = "20260302093000+0100"
    assert exposure_of([_header(RadiopharmaceuticalStartDateTime=offset)]) == GIVEN
    assert exposure_of([_header(), _header()]) == GIVEN


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("RadionuclideTotalDose", 0),
        ("RadionuclideTotalDose", None),
        ("RadionuclideTotalDose", 5),  # millicurie, or a forgotten unit: nobody knows
        ("RadionuclideTotalDose", 185_000),
        ("RadiopharmaceuticalStartDateTime", None),
        ("RadiopharmaceuticalStartDateTime", "20260304100000"),  # after the scan
        ("RadiopharmaceuticalStartDateTime", "20250302093000"),  # a year before it
        ("RadiopharmaceuticalStartDateTime", "2026"),
        ("AcquisitionTime", None),
        ("ActualFrameDuration", None),
        ("ActualFrameDuration", 0),
    ],
)
def test_a_header_that_says_too_little_or_the_impossible_gives_no_exposure(keyword: str, value: object) -> None:
    assert exposure_of([_header(**{keyword: value})]) is None


def test_objects_that_contradict_each_other_or_hold_two_doses_give_no_exposure() -> None:
    assert exposure_of([_header(), _header(RadionuclideTotalDose=74)]) is None
    assert exposure_of([]) is None
    assert exposure_of([Dataset()]) is None
    twice = _header()
    twice.RadiopharmaceuticalInformationSequence = Items(list(twice.RadiopharmaceuticalInformationSequence) * 2)
    assert exposure_of([twice]) is None
