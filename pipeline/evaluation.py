"""How well a set of weights answers on labelled scans: scores, and the figures made of them.

Every scan goes through `pipeline.analyse`, so that what is measured is what the node would say. A scan that was
declined, or called undetermined, is never left out: it counts as an error on either side, and as 0.5 in the area under
the curve; how many there are stands beside. Residual tissue is positive; the paper's text exchanges the names of
sensitivity and specificity, and both are given under its names as well. A figure that the scans do not define is None.
Pure functions but for `score`, which reads files and asks the network; it raises for a fault of ours, never of a scan.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from models import metrics
from models.weights import LoadedModel
from pipeline.analyse import analyse
from pipeline.finding import Declined
from pipeline.hospital_cohort import LabelledScan

UPTAKE_BANDS: Final = MappingProxyType(
    {
        "uptake_0.03_0.1": (0.03, 0.1),
        "uptake_0.1_0.3": (0.1, 0.3),
        "uptake_0.3_1": (0.3, 1.0),
        "uptake_1_up": (1.0, math.inf),
    }
)
"""Uptake of residual tissue in percent, by the names that simulated strata have (`pipeline.phantom.STRATA`)."""
FULL_FIELD_MM: Final = 2.20903
"""Pixel spacing of the paper's camera at 256 pixels and zoom 1.0."""
ZOOMS: Final = (1.0, 1.28, 1.5, 2.0)
NOT_ANSWERED_SCORE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Scored:
    """One labelled scan and what was answered.

    Attributes
    ----------
    key: SOP Instance UIDs, or the seed of a simulated scan; never a name or an ID.
    group: whose scan it is, as a digest.
    outcome: "present", "absent", "undetermined" or "declined"; `reason`: why declined, a token of `pipeline.reasons`.
    probability: None where declined; `views`: each view's own, where the weights judge views alone.
    strata: groups it belongs to; `uptake_percent`: of residual tissue, where it is known.
    spacing_mm, total_counts: of its anterior view (or the first there is); None where it could not be read.
    """

    key: str
    group: str
    residual: bool
    outcome: str
    probability: float | None = None
    reason: str = ""
    views: Mapping[str, float] = field(default_factory=dict)
    strata: tuple[str, ...] = ()
    uptake_percent: float | None = None
    spacing_mm: float | None = None
    total_counts: float | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """So many of so many; `low`, `high`: Wilson's 95 % interval. Without scans all are None."""

    count: int
    of: int

    @property
    def share(self) -> float | None:
        return self.count / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float] | None:
        if not self.of:
            return None
        low, high = metrics.share_interval(self.count, self.of)
        return max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True, slots=True)
class Area:
    """Area under the ROC curve, with DeLong's 95 % interval where each class has two scans."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all scans given. `auc` counts whoever got no answer as 0.5; `auc_answered` leaves them out, and says so.

    `precision`: of the scans called present; `f1`: of precision and sensitivity; `calibration_error`: of the scans that
    got a probability, in 10 bins.
    """

    scans: int
    residual: int
    patients: int
    accuracy: Rate
    sensitivity: Rate
    specificity: Rate
    precision: Rate
    f1: float | None
    undetermined: Rate
    declined: Rate
    auc: Area | None
    auc_answered: Area | None
    calibration_error: float | None

    @property
    def sensitivity_as_in_paper(self) -> Rate:
        """Its section 2.4: scans without residual tissue that are called so."""
        return self.specificity

    @property
    def specificity_as_in_paper(self) -> Rate:
        """Its section 2.4: scans with residual tissue that are called so."""
        return self.sensitivity


@dataclass(frozen=True, slots=True)
class StratumRow:
    """One stratum: residual scans called present, and clean ones that were not called absent (false alarms)."""

    name: str
    scans: int
    sensitivity: Rate
    false_alarms: Rate
    undetermined: int
    declined: int


def score(
    scans: Sequence[LabelledScan],
    model: LoadedModel,
    *,
    preprocessing: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scored, ...]:
    """Ask the node's own analysis about each scan. `progress(done, all)` after each."""
    found = []
    for done, scan in enumerate(scans, start=1):
        answer = analyse([dcmread(path) for path in scan.files], model, preprocessing=preprocessing)
        images = answer.images if isinstance(answer, Declined) else tuple(view.image for view in answer.views)
        first = next((image for image in images if image.view == "anterior"), next(iter(images), None))
        found.append(
            Scored(
                key=" ".join(scan.sop_instance_uids),
                group=scan.patient,
                residual=scan.residual,
                outcome="declined" if isinstance(answer, Declined) else answer.finding,
                probability=None if isinstance(answer, Declined) else answer.probability,
                reason=answer.reason if isinstance(answer, Declined) else "",
                views={} if isinstance(answer, Declined) else {str(v.image.view): v.probability for v in answer.views},
                strata=scan.strata,
                uptake_percent=scan.uptake_percent,
                spacing_mm=None if first is None else first.spacing_mm[0],
                total_counts=None if first is None else float(first.counts.sum(dtype=np.float64)),
            )
        )
        if progress is not None:
            progress(done, len(scans))
    return tuple(found)


def figures(scored: Sequence[Scored]) -> Figures:
    """The figures of these scans together."""
    residual = [one for one in scored if one.residual]
    clean = [one for one in scored if not one.residual]
    hits = sum(one.outcome == "present" for one in residual)
    cleared = sum(one.outcome == "absent" for one in clean)
    called = sum(one.outcome == "present" for one in scored)
    precision, sensitivity = Rate(hits, called), Rate(hits, len(residual))
    answered = [one for one in scored if one.probability is not None]
    return Figures(
        scans=len(scored),
        residual=len(residual),
        patients=len({one.group for one in scored}),
        accuracy=Rate(hits + cleared, len(scored)),
        sensitivity=sensitivity,
        specificity=Rate(cleared, len(clean)),
        precision=precision,
        f1=2 * hits / (called + len(residual)) if called + len(residual) else None,
        undetermined=Rate(sum(one.outcome == "undetermined" for one in scored), len(scored)),
        declined=Rate(sum(one.outcome == "declined" for one in scored), len(scored)),
        auc=area(labels_of(scored), ranking_scores(scored)),
        auc_answered=area(labels_of(answered), probabilities(answered)),
        calibration_error=metrics.calibration_error(labels_of(answered), probabilities(answered)) if answered else None,
    )


def labels_of(scored: Sequence[Scored]) -> NDArray[np.uint8]:
    """(scans,): 1 with residual tissue."""
    return np.array([one.residual for one in scored], np.uint8)


def probabilities(answered: Sequence[Scored]) -> NDArray[np.float64]:
    """(scans,), of scans that all got one."""
    return np.array([one.probability for one in answered], np.float64)


def ranking_scores(scored: Sequence[Scored]) -> NDArray[np.float64]:
    """(scans,): probability where the answer is present or absent, 0.5 where it is undetermined or declined."""
    return np.array([_ranked(one) for one in scored], np.float64)


def _ranked(one: Scored) -> float:
    if one.probability is None or one.outcome not in ("present", "absent"):
        return NOT_ANSWERED_SCORE
    return one.probability


def area(labels: NDArray[np.uint8], scores: NDArray[np.float64]) -> Area | None:
    """None where a class is missing."""
    try:
        value = metrics.roc_auc(labels, scores)
    except metrics.MetricsError:
        return None
    try:
        low, high = metrics.roc_auc_interval(labels, scores)
    except metrics.MetricsError:
        return Area(value, None, None)
    return Area(value, low, high)


def view_areas(scored: Sequence[Scored]) -> dict[str, Area | None]:
    """Each view's own area, over the scans that it was judged alone on."""
    names = dict.fromkeys(name for one in scored for name in one.views)
    found = {}
    for name in names:
        seen = [one for one in scored if name in one.views]
        found[name] = area(labels_of(seen), np.array([one.views[name] for one in seen]))
    return found


def strata_of(one: Scored) -> tuple[str, ...]:
    """What the labels say, and what uptake and pixel spacing say."""
    found = list(one.strata)
    if one.residual and one.uptake_percent is not None:
        found += [name for name, (low, high) in UPTAKE_BANDS.items() if low <= one.uptake_percent < high]
    if one.spacing_mm:
        zoom = FULL_FIELD_MM / one.spacing_mm
        found += [f"zoom_{known}" for known in ZOOMS if abs(zoom / known - 1) < 0.03]
    return tuple(dict.fromkeys(found))


def by_stratum(scored: Sequence[Scored]) -> tuple[StratumRow, ...]:
    """One row a stratum, by name; a scan stands in each of its strata."""
    members: dict[str, list[Scored]] = {}
    for one in scored:
        for name in strata_of(one):
            members.setdefault(name, []).append(one)
    return tuple(
        StratumRow(
            name=name,
            scans=len(within),
            sensitivity=Rate(
                sum(one.outcome == "present" for one in within if one.residual), sum(one.residual for one in within)
            ),
            false_alarms=Rate(
                sum(one.outcome != "absent" for one in within if not one.residual),
                sum(not one.residual for one in within),
            ),
            undetermined=sum(one.outcome == "undetermined" for one in within),
            declined=sum(one.outcome == "declined" for one in within),
        )
        for name, within in sorted(members.items())
    )


def roc_points(labels: NDArray[np.uint8], scores: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """(false-positive rate, true-positive rate) at every threshold, from (0, 0) to (1, 1). Needs both classes."""
    order = np.argsort(-scores, kind="stable")
    ranked, truth = scores[order], labels[order] == 1
    last = np.append(ranked[1:] != ranked[:-1], True)
    true, false = np.cumsum(truth)[last], np.cumsum(~truth)[last]
    points = zip(false / max(int(false[-1]), 1), true / max(int(true[-1]), 1), strict=True)
    return ((0.0, 0.0), *((float(x), float(y)) for x, y in points))
