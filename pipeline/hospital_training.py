"""Weights from a hospital's own labelled cohort: trained, calibrated, given an operating point, and measured.

The patients are divided three ways, and nobody stands in two of them: on one part the network is trained, on the second
temperature, threshold and undetermined band are chosen, and on the third, of which nothing was chosen, the finished
record is measured by the node's own analysis. Release is always "research": a person's signed acceptance makes "local"
of it, never this program. An interrupted training goes on at its last epoch. A scan that the node would decline is not
trained on; it stands in `Prepared.excluded`, with the reason.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from torch import nn

from models import embedding, metrics, weights
from models.initial import InitialWeights
from models.train import EpochReport, TrainingSettings, embeddings, logits, single_view, train
from pipeline.analyse import fused_logit, sigmoid
from pipeline.evaluation import Figures, Scored, figures, score
from pipeline.finding import ViewImage
from pipeline.hospital_cohort import WHY, CohortError, Excluded, HospitalCohort, LabelledScan, divide
from pipeline.preprocess import ORDERS, PREPROCESSING_VERSION, prepare_scan
from pipeline.protocol import ProtocolData, ProtocolSettings, training_settings
from pipeline.quality import problem_of
from pipeline.reasons import REASONS
from pipeline.views import view_images

Tell = Callable[[str, int, int], None]
"""What is being done, how much is done, how much there is."""

CHECKPOINT = "training.pt"
"""Kept beside the record, so that the same command does not train again; whoever is done with it may delete it."""
ANY_RANGE = weights.TrainingRange(spacing_mm=(1e-3, 1e3), total_counts=(1e-3, 1e12), embedding_distance=None)
"""For scans that are about to define a training range themselves."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What is asked for beside the settings of the training.

    `name`: of the record; `sensitivity`: share of residual scans that the threshold has to call on the scans it is
    chosen on; `undetermined`: share of those scans that the undetermined band around the threshold may hold, or
    0 for none; `preprocessing`: "native" or "paper".
    """

    name: str
    sensitivity: float = 0.95
    undetermined: float = 0.02
    preprocessing: str = "native"


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Scans as the network sees them. `scans` and the rows of `data` are in one order; `excluded` were declined.

    `spacing_mm`: (P,), of each scan; `total_counts`: (P, views).
    """

    scans: tuple[LabelledScan, ...]
    data: ProtocolData
    excluded: tuple[Excluded, ...]
    spacing_mm: NDArray[np.float64]
    total_counts: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trained:
    """The record's path, what it answered on patients it has never seen, and how many scans made it."""

    record_path: Path
    record: weights.WeightsRecord
    scored: tuple[Scored, ...]
    figures: Figures
    training: int
    choosing: int


def prepare_cohort(cohort: HospitalCohort, preprocessing: str, *, tell: Tell | None = None) -> Prepared:
    """Read and prepare every scan of a cohort. Raises nothing for a scan; `CohortError` where none is left."""
    kept: list[LabelledScan] = []
    planes, spacing, counts, excluded = [], [], [], []
    for done, scan in enumerate(cohort.scans, start=1):
        images = view_images([dcmread(path) for path in scan.files])
        problem = problem_of(images, ANY_RANGE)
        if problem is None:
            kept.append(scan)
            planes.append(network_planes(images, preprocessing))
            spacing.append(images[0].spacing_mm[0])
            counts.append([float(image.counts.sum(dtype=np.float64)) for image in images])
        else:
            told = f"{problem.reason}: {REASONS[problem.reason].sentence}"
            excluded += [Excluded(uid, "out_of_scope", told) for uid in scan.sop_instance_uids]
        if tell is not None:
            tell("preparing scans", done, len(cohort.scans))
    if not kept:
        raise CohortError("no scan of this cohort can be trained on; the list of excluded ones says why")
    synthetic = sum(scan.synthetic for scan in kept)
    patients = tuple(scan.patient for scan in kept)
    data = ProtocolData(
        planes=np.stack(planes),
        labels=np.array([scan.residual for scan in kept], np.uint8),
        patients=patients,
        description=describe(len(kept), len(set(patients)), synthetic),
        synthetic=bool(synthetic),
        standard=ORDERS[preprocessing].standard,
    )
    return Prepared(tuple(kept), data, tuple(excluded), np.array(spacing), np.array(counts))


def describe(scans: int, patients: int, synthetic: int) -> str:
    """Which scans these are, in words, saying it where any is simulated."""
    if not synthetic:
        return f"{scans} scans of {patients} patients"
    if synthetic == scans:
        return f"{scans} simulated scans of {patients} invented patients (synthetic; nothing clinical)"
    return f"{scans} scans of {patients} patients, of which {synthetic} scans are simulated (synthetic)"


def network_planes(images: Sequence[ViewImage], preprocessing: str) -> NDArray[Any]:
    """The network's inputs of one scan before they are standardized, (K, 3, S, S)."""
    views = {str(image.view): (image.counts, image.spacing_mm) for image in images}
    return prepare_scan(views, ORDERS[preprocessing].without_outline()).planes


def train_record(
    prepared: Prepared,
    settings: ProtocolSettings,
    plan: TrainingPlan,
    architecture: str,
    start: InitialWeights,
    out: Path,
    *,
    tell: Tell | None = None,
) -> Trained:
    """Train one network on the cohort and write its record into `out`.

    Raises `pipeline.hospital_cohort.CohortError` for too few patients, `models.train.TrainingError`,
    `models.weights.WeightsError` for a name or figures that no record may have.
    """
    data = prepared.data
    everyone = np.arange(len(data.labels))
    learn, test = _divided(data, everyone, settings)
    learn, choose = _divided(data, learn, dataclasses.replace(settings, seed=settings.seed + 1))
    how = training_settings(settings, architecture, start, data, seed=settings.seed)
    inputs = data.planes.shape[1]

    def after_epoch(report: EpochReport, _: object) -> None:
        if tell is not None:
            tell(f"training {architecture}, loss {report.loss:.3f}", report.epoch, report.epochs)

    planes = np.asarray(data.planes[learn])
    network = train(
        planes.reshape(-1, *planes.shape[2:]),
        np.repeat(data.labels[learn], inputs),
        how,
        checkpoint=out / CHECKPOINT,
        initial=start.state,
        after_epoch=after_epoch,
    )
    draft = _record(prepared, learn, settings, plan, architecture, start)
    rounded = weights.load(str(weights.save(out / "draft", draft, network))).network
    known = embedding.fit(_embeddings(rounded, planes, how, plan))
    planes = np.asarray(data.planes[choose])
    held = [embedding.distance(row, known) for row in _embeddings(rounded, planes, how, plan)]
    found = logits(rounded, planes.reshape(-1, *planes.shape[2:]), how).astype(float).reshape(len(choose), inputs)
    labels = data.labels[choose]
    ways = ("views_as_channels",) if ORDERS[plan.preprocessing].joint else ("mean_logit", "mean_probability")
    joined = {name: np.array([fused_logit(row, name, None) for row in found]) for name in ways}
    fusion = max(joined, key=lambda name: metrics.roc_auc(labels, joined[name]))
    temperature = metrics.temperature(labels, joined[fusion])
    probability = np.array([sigmoid(fused_logit(row, fusion, temperature)) for row in found])
    # A threshold of exactly 0 or 1 would call every scan alike for ever.
    threshold = min(max(metrics.sensitivity_threshold(labels, probability, plan.sensitivity), 1e-6), 1 - 1e-6)
    record = dataclasses.replace(
        draft,
        fusion=fusion,
        temperature=temperature,
        threshold=threshold,
        undetermined_band=undetermined_band(probability, threshold, plan.undetermined),
        operating_point=_operating_point(labels, probability, threshold, plan),
        training_range=dataclasses.replace(
            draft.training_range, embedding_distance=round(max(held) * _margin(len(choose)), 3)
        ),
    )
    model = weights.load(str(weights.save(out / "draft", record, network, embedding=known)))
    scans = [prepared.scans[place] for place in test]
    scored = score(
        scans,
        model,
        preprocessing=plan.preprocessing,
        progress=None if tell is None else lambda done, whole: tell("measuring", done, whole),
    )
    measured = figures(scored)
    record = dataclasses.replace(record, metrics=_metrics(measured, len(learn), len(choose)))
    used = sorted({prepared.scans[place].patient for place in (*learn, *choose)})
    _used_patients(out / f"{plan.name}.json").write_text(json.dumps(used, indent=1) + "\n", encoding="utf-8")
    path = weights.save(out, record, network, embedding=known)
    shutil.rmtree(out / "draft")
    return Trained(path, weights.find(str(path)).record, scored, measured, len(learn), len(choose))


def _embeddings(
    network: nn.Module, planes: NDArray[Any], how: TrainingSettings, plan: TrainingPlan
) -> NDArray[np.float32]:
    """Features of all inputs of scans (P, K, 3, S, S); where views are channels, also as if one view had not come."""
    images = planes.reshape(-1, *planes.shape[2:])
    shown = [images]
    if ORDERS[plan.preprocessing].joint:
        shown += [single_view(images, view) for view in range(2)]
    return embeddings(network, np.concatenate(shown), how)


def _margin(scans: int) -> float:
    """How much farther than the farthest of so many scans in scope another may lie: the fewer, the less they tell."""
    return max(1.1, 1 + 2 / math.sqrt(scans))


def _used_patients(record_path: Path) -> Path:
    """Digests of the patients that made a record; of no use to anyone else, and it stays in the house."""
    return record_path.with_suffix(".patients.json")


def not_trained_on(cohort: HospitalCohort, record_path: Path) -> HospitalCohort:
    """The cohort without the patients that made these weights, so far as the record's folder tells; they are listed.

    Raises `pipeline.hospital_cohort.CohortError` for a list that cannot be read.
    """
    path = _used_patients(record_path)
    if not path.exists():
        return cohort
    try:
        used = set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CohortError(f"{path.name} beside the weights cannot be read, so nobody knows who made them") from error
    excluded = [
        Excluded(uid, "trained_on", WHY["trained_on"])
        for scan in cohort.scans
        if scan.patient in used
        for uid in scan.sop_instance_uids
    ]
    kept = tuple(scan for scan in cohort.scans if scan.patient not in used)
    return HospitalCohort(kept, (*cohort.excluded, *excluded))


def undetermined_band(probability: NDArray[np.float64], threshold: float, share: float) -> tuple[float, float] | None:
    """(low, high) around the threshold, of equal width in logits to both sides, with at most this share of the scans.

    None where the share is not even one scan.
    """
    held = int(share * len(probability) + 1e-9)
    if not held:
        return None
    middle = _logit(threshold)
    distance = np.sort(np.abs(np.array([_logit(float(value)) for value in probability]) - middle))
    width = float(distance[held - 1])
    low, high = min(sigmoid(middle - width), threshold), max(sigmoid(middle + width), threshold)
    return low, high


def _logit(probability: float) -> float:
    inside = min(max(probability, 1e-12), 1 - 1e-12)
    return math.log(inside / (1 - inside))


def _divided(
    data: ProtocolData, places: NDArray[np.int64], settings: ProtocolSettings
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, testing), places in the data."""
    patients = [data.patients[place] for place in places]
    (one,) = divide(data.labels[places] == 1, patients, 1, settings.seed, settings.test_share)
    return places[list(one.training)], places[list(one.testing)]


def _operating_point(
    labels: NDArray[np.uint8], probability: NDArray[np.float64], threshold: float, plan: TrainingPlan
) -> str:
    called = metrics.confusion(labels, probability, threshold)
    residual = called.true_positive + called.false_negative
    low, high = metrics.share_interval(called.true_positive, residual)
    return (
        f"the greatest threshold that calls at least {plan.sensitivity:.0%} of the residual scans present or "
        f"undetermined, on {len(labels)} scans that the network was not trained on: "
        f"{called.true_positive} of {residual} (95 % interval {low:.3f} to {high:.3f})"
    )


def _metrics(found: Figures, training: int, choosing: int) -> dict[str, float]:
    """What the record says of itself, from patients it has never seen; a figure that is not defined is left out."""
    shares = {
        "accuracy": found.accuracy.share,
        "sensitivity": found.sensitivity.share,
        "specificity": found.specificity.share,
        "precision": found.precision.share,
        "f1": found.f1,
        "undetermined": found.undetermined.share,
        "declined": found.declined.share,
        "calibration_error": found.calibration_error,
        "auc": None if found.auc is None else found.auc.value,
        "auc_low": None if found.auc is None else found.auc.low,
        "auc_high": None if found.auc is None else found.auc.high,
    }
    counts = {
        "training_scans": training,
        "choosing_scans": choosing,
        "test_scans": found.scans,
        "test_scans_residual": found.residual,
    }
    return {name: float(count) for name, count in counts.items()} | {
        f"test_{name}": round(value, 4) for name, value in shares.items() if value is not None
    }


def _record(
    prepared: Prepared,
    learn: NDArray[np.int64],
    settings: ProtocolSettings,
    plan: TrainingPlan,
    architecture: str,
    start: InitialWeights,
) -> weights.WeightsRecord:
    scans, spacing = [prepared.scans[place] for place in learn], prepared.spacing_mm[learn]
    counts = prepared.total_counts[learn]
    what = describe(len(scans), len({scan.patient for scan in scans}), sum(scan.synthetic for scan in scans))
    standard = prepared.data.standard
    return weights.WeightsRecord(
        schema=weights.SCHEMA,
        name=plan.name,
        version="1",
        file=f"{plan.name}.safetensors",
        sha256="0" * 64,
        architecture=architecture,
        preprocessing=plan.preprocessing,
        preprocessing_version=PREPROCESSING_VERSION,
        input=weights.InputFormat(prepared.data.planes.shape[-1], standard.scale, standard.mean, standard.std),
        threshold=0.5,
        operating_point="not chosen yet",
        undetermined_band=None,
        temperature=None,
        fusion="views_as_channels" if ORDERS[plan.preprocessing].joint else "mean_logit",
        release="research",
        data=(
            f"trained on {what}; {prepared.data.description} in all, divided by patient into training, choosing of "
            f"temperature and threshold, and testing; started from {start.description}; learning rate "
            f"{settings.rate_for(start):g}, {settings.epochs} epochs, seed {settings.seed}"
        ),
        trained_on=what,
        training_range=weights.TrainingRange(
            spacing_mm=(round(float(spacing.min()) * 0.95, 3), round(float(spacing.max()) * 1.05, 3)),
            total_counts=(round(float(counts.min()) * 0.8), round(float(counts.max()) * 1.25)),
            embedding_distance=None,
        ),
        metrics={},
        intended_use=(
            "research; to be measured and accepted on the camera's own scans before any other use; not for diagnosis "
            "without review"
        ),
        acceptance=None,
    )
