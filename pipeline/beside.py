"""What a doctor wants beside yes or no: foci, uptake in percent where it can be given, and flags, added to a finding.

Runs after the decision and changes none of it: verdict, probability, outline and views stay as the network's analysis
gave them. A scan that was declined gets nothing, for a list of foci beside "not analysed" would read as an answer.
"""

import dataclasses
import time
from collections.abc import Sequence

from pydicom import Dataset

from pipeline.finding import Finding
from pipeline.foci import find_foci, flags_of
from pipeline.uptake import bed_uptake, exposure_of


def with_details(
    finding: Finding, datasets: Sequence[Dataset], sensitivity_cps_per_mbq: float | None = None
) -> Finding:
    """The finding with foci, flags and, for "present" with a calibrated camera, the uptake; `timings_ms` has "foci".

    `sensitivity_cps_per_mbq`: the camera's calibration (`pipeline.uptake.bed_uptake`); without it no percentage.
    """
    start = time.perf_counter()
    images = tuple(view.image for view in finding.views)
    foci = find_foci(images)
    exposure = None
    if sensitivity_cps_per_mbq is not None and finding.finding == "present":
        exposure = exposure_of(datasets)
    uptake = None
    if exposure is not None and sensitivity_cps_per_mbq is not None:
        uptake = bed_uptake(images, foci, exposure, sensitivity_cps_per_mbq)
    flags = dict.fromkeys((*finding.flags, *flags_of(images, foci, finding.finding)))
    spent_ms = (time.perf_counter() - start) * 1000
    timings_ms = dict(finding.timings_ms) | {"foci": spent_ms}
    if "total" in timings_ms:
        timings_ms["total"] += spent_ms
    return dataclasses.replace(finding, foci=foci, uptake=uptake, flags=tuple(flags), timings_ms=timings_ms)
