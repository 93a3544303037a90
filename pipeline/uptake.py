"""Uptake of the thyroid bed in percent of what was administered: only where dose, times and a calibration are known.

The conjugate-view method: the geometric mean of the counts from before and behind does not depend on how deep the
tissue lies, only on how thick the neck is (activity = sqrt(anterior x posterior) exp(mu T / 2) / sensitivity); T is not
measured but assumed. Without counts from behind the anterior view alone, at an assumed depth. A header that says too
little or contradicts itself gives no figure, never a guess: a wrong percentage steers a therapy.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from pipeline.finding import Focus, Uptake, ViewImage
from pipeline.foci import BED_SITES, distance_mm
from pipeline.preprocess import field_of_view
from pipeline.views import facts_of, moment_of

HALF_LIFE_H: Final = 8.02 * 24
ATTENUATION_PER_MM: Final = 0.0110
"""Narrow beam, 364 keV, water."""
NECK_MM: Final = (122.0, 12.0)
"""Assumed thickness of a neck and its standard deviation: adults have 105 to 140 mm."""
DEPTH_MM: Final = (24.0, 6.0)
"""Assumed depth of thyroid tissue under the skin, for a single view: 15 to 32 mm."""
REGION_MM: Final = 20.0
"""Radius around each focus of the bed that is counted; the calibration has to be counted within the same radius."""

METHOD_SD: Final = 0.12
"""Share of the figure by which the method missed the truth on simulated scans, beyond counting and path."""

_RING_MM = (26.0, 36.0)
_NO_NEIGHBOUR_MM = 18.0
_DOSE_MBQ = (10.0, 12_000.0)
_DELAY_H = (1.0, 14 * 24.0)
_DURATION_S = (10.0, 7200.0)


@dataclass(frozen=True, slots=True)
class Exposure:
    """What the header says of the dose: MBq when it was given, hours from then to the scan, seconds of counting."""

    administered_mbq: float
    delay_h: float
    duration_s: float


def exposure_of(datasets: Sequence[Dataset]) -> Exposure | None:
    """Dose, delay and duration of an acquisition; None unless all of its objects say the same, completely.

    RadionuclideTotalDose is MBq in Nuclear Medicine (PS3.3 C.8.4.10) and Bq in PET, and some cameras write Bq into
    both: the two lie a million apart, so a number fits one unit or none. A time of administration without its
    day is worth nothing one to three days later: RadiopharmaceuticalStartDateTime is needed.
    """
    said = [_one(ds) for ds in datasets]
    if not said or any(one is None for one in said):
        return None
    known = [one for one in said if one is not None]
    first = known[0]
    same = all(
        math.isclose(one.administered_mbq, first.administered_mbq, rel_tol=0.01)
        and abs(one.delay_h - first.delay_h) < 1.0
        and math.isclose(one.duration_s, first.duration_s, rel_tol=0.01)
        for one in known
    )
    return first if same else None


def bed_uptake(
    images: Sequence[ViewImage], foci: Sequence[Focus], exposure: Exposure, sensitivity_cps_per_mbq: float
) -> Uptake | None:
    """Uptake of the foci in the bed; None without one, or without counts above the surroundings.

    `sensitivity_cps_per_mbq`: net counts per second and MBq of a small source of known activity in air, within
    `REGION_MM`, at the distance that necks are scanned at.
    """
    net = {image.view: _net(image, foci) for image in images}
    front, back = net.get("anterior"), net.get("posterior")
    if front is None or front[0] < 3 * front[1]:
        return None
    if back is not None and back[0] > 3 * back[1]:
        counts = math.sqrt(front[0] * back[0])
        noise = 0.5 * math.hypot(front[1] / front[0], back[1] / back[0])
        path_mm, path_sd_mm = NECK_MM[0] / 2, NECK_MM[1] / 2
        how = f"geometric mean of both views, neck assumed {NECK_MM[0]:.0f} mm thick"
    else:
        counts, noise = front[0], front[1] / front[0]
        path_mm, path_sd_mm = DEPTH_MM
        how = f"anterior view alone, tissue assumed {DEPTH_MM[0]:.0f} mm deep"
    activity_mbq = counts / exposure.duration_s * math.exp(ATTENUATION_PER_MM * path_mm) / sensitivity_cps_per_mbq
    left = math.exp2(-(exposure.delay_h + exposure.duration_s / 7200) / HALF_LIFE_H)
    percent = 100 * activity_mbq / (exposure.administered_mbq * left)
    method = (
        f"Uptake by {how}, attenuation {10 * ATTENUATION_PER_MM:.2f} per cm, foci of the bed within "
        f"{REGION_MM:.0f} mm, decay-corrected over {exposure.delay_h:.1f} h, {exposure.administered_mbq:.0f} MBq as "
        f"the header states, camera calibrated to {sensitivity_cps_per_mbq:g} cps/MBq. The error given is one standard "
        "deviation of counting, path and method, without dose and calibration."
    )
    return Uptake(percent, percent * math.hypot(noise, ATTENUATION_PER_MM * path_sd_mm, METHOD_SD), method)


def _one(ds: Dataset) -> Exposure | None:
    drugs = ds.get("RadiopharmaceuticalInformationSequence") or []
    if len(drugs) != 1:
        return None
    dose_mbq = _dose_mbq(_number(drugs[0].get("RadionuclideTotalDose")))
    given_at, acquired_at = _moment(drugs[0]), facts_of(ds).acquired_at
    duration_s = _number(ds.get("ActualFrameDuration")) / 1000
    if dose_mbq is None or given_at is None or acquired_at is None:
        return None
    delay_h = (acquired_at - given_at).total_seconds() / 3600
    if not (_DELAY_H[0] <= delay_h <= _DELAY_H[1] and _DURATION_S[0] <= duration_s <= _DURATION_S[1]):
        return None
    return Exposure(dose_mbq, delay_h, duration_s)


def _dose_mbq(number: float) -> float | None:
    low, high = _DOSE_MBQ
    if low <= number <= high:
        return number
    return number / 1e6 if low <= number / 1e6 <= high else None


def _moment(drug: Dataset) -> datetime | None:
    """Local time of the camera, as `acquired_at` is; a stated offset is left aside: both clocks hang in one house."""
    return moment_of(re.split("[+-]", str(drug.get("RadiopharmaceuticalStartDateTime") or "").strip())[0])


def _number(value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _net(image: ViewImage, foci: Sequence[Focus]) -> tuple[float, float] | None:
    """Counts above the surroundings within `REGION_MM` of any focus of the bed, and their standard deviation."""
    at = {focus: one.position for focus in foci for one in focus.views if one.view == image.view}
    shape = (image.counts.shape[0], image.counts.shape[1])
    bed = [distance_mm(shape, at[focus], image.spacing_mm) for focus in at if focus.site in BED_SITES]
    if not bed:
        return None
    away_mm: NDArray[np.float64] = np.min(bed, axis=0)
    field = field_of_view(image.counts)
    inside = (away_mm <= REGION_MM) & field
    ring = (away_mm > _RING_MM[0]) & (away_mm <= _RING_MM[1]) & field
    for focus in at:
        if focus.site not in BED_SITES:
            other_mm = distance_mm(shape, at[focus], image.spacing_mm)
            ring &= other_mm > _NO_NEIGHBOUR_MM
            inside &= (other_mm > _NO_NEIGHBOUR_MM) | (away_mm < other_mm)
    if not inside.any() or ring.sum() < 20:
        return None
    gross, size = float(image.counts[inside].sum(dtype=np.float64)), int(inside.sum())
    mean = float(image.counts[ring].mean(dtype=np.float64))
    return gross - mean * size, math.sqrt(max(1.0, gross + mean * size**2 / int(ring.sum())))
