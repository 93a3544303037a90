"""How the shipped weights were made: `python -m pipeline.train_demonstration --work DIR`.

Simulates the cohorts (training, validation; no seed in two of them), trains, fits the embedding's range on training
scans, chooses temperature, threshold and undetermined band on the validation cohort, rounds the weights to float16, and
measures what the node's own analysis then says on the stress set, which nothing was chosen on, beside the hand-made
baseline. Writes the weights record, the tensors and `figures.json` into DIR/result; ships nothing by itself.
Interrupted, it goes on from the last epoch. `models/cards/` says how long it took.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import embedding, metrics, weights
from models.train import EpochReport, TrainingSettings, embeddings, logits, single_view, train
from pipeline import baseline
from pipeline.analyse import analyse_views, fused_logit, load_model, sigmoid
from pipeline.cohort import VIEWS, Cohort, CohortPlan, phantom_cohort
from pipeline.demonstration_card import card
from pipeline.evaluation import Figures, Rate, Scored, by_stratum, figures, labels_of, view_areas
from pipeline.finding import Declined, SourceFrame, ViewImage, ViewName
from pipeline.hospital_training import undetermined_band
from pipeline.phantom import phantom
from pipeline.preprocess import GRID, PREPROCESSING_VERSION, ROOT_COUNTS

NAME: Final = "remnant-resnet18-phantom"
# Two of three phantoms from the named strata, so that the faint and confusing ones are seen often enough. The other
# camera is left out: it shows what carries over to one that was never seen.
_LEARNT = CohortPlan(0, 0, stratum_period=3, stratum_run=2, confusers=3.0, without=("other_camera",))
PLANS: Final = {
    "training": dataclasses.replace(_LEARNT, first_seed=20_000_000, pairs=8_000),
    "training_harder": dataclasses.replace(_LEARNT, first_seed=26_000_000, pairs=8_000, confusers=6.0),
    "validation": dataclasses.replace(_LEARNT, first_seed=21_000_000, pairs=1_000),
    "stress": CohortPlan(35_000_000, 2_000, stratum_period=1, stratum_run=1, confusers=8.0),
    "population": CohortPlan(23_000_000, 1_000, prevalence=0.5),
    "other_camera": CohortPlan(24_000_000, 500, physics="other", prevalence=0.5),
}
COARSE: Final = TrainingSettings(
    # Pixels of twice the size cost a quarter and hold nearly all that a camera of 12 mm resolution sees.
    stages=((10, GRID // 2), (8, GRID)),
    stop_after=10,
    batch_size=32,
    learning_rate=1e-3,
    shift=5,
    view_dropout=0.2,
    scale=ROOT_COUNTS.scale,
    mean=ROOT_COUNTS.mean,
    std=ROOT_COUNTS.std,
)
FINE: Final = dataclasses.replace(COARSE, stages=((5, GRID),), stop_after=None, learning_rate=5e-4, seed=132)
FINAL: Final = dataclasses.replace(FINE, stages=((18, GRID),), epoch_images=8_000, learning_rate=7e-4, seed=133)
TRAINING: Final = ("training", "training_harder")
PHASES: Final = ((COARSE, TRAINING[:1]), (FINE, TRAINING[:1]), (FINAL, TRAINING))
"""Settings and cohorts in turn; each starts from what the one before it learnt."""
SENSITIVITY: Final = 0.98
"""Share of the validation cohort's residual scans that the threshold has to call."""
UNDETERMINED: Final = 0.006
"""Share of the validation cohort that the undetermined band may hold."""
_EMBEDDED = 4_000


def make(
    work: Path,
    processes: int,
    say: Callable[[str], None],
    *,
    plans: Mapping[str, CohortPlan] = PLANS,
    phases: Sequence[tuple[TrainingSettings, tuple[str, ...]]] = PHASES,
) -> Path:
    """All of it. Returns the path of the written record."""
    cohorts = {}
    for name in (*TRAINING, "validation"):
        say(f"{name} cohort: {plans[name].pairs} pairs")
        cohorts[name] = phantom_cohort(work / "cohorts", plans[name], processes=processes)
    trainings, validation = [cohorts[name] for name in TRAINING], cohorts["validation"]
    settings = phases[-1][0]
    network = _train(work, cohorts, phases, validation, say)
    result = work / "result"
    draft = _record(trainings, plans, settings)
    rounded = weights.load(str(weights.save(result, draft, network))).network
    say("fitting the range of the embedding, temperature, threshold and band")
    some = np.concatenate([cohort.images[: _EMBEDDED // len(trainings)] for cohort in trainings])
    shown = np.concatenate([_any_views(some), some])
    known = embedding.fit(embeddings(rounded, shown, settings))
    held = np.concatenate([_any_views(validation.images), validation.images])
    distances = np.array([embedding.distance(row, known) for row in embeddings(rounded, held, settings)])
    found = logits(rounded, validation.images, settings).astype(np.float64)
    temperature = metrics.temperature(validation.labels, found)
    probability = np.array([sigmoid(fused_logit([one], "views_as_channels", temperature)) for one in found])
    threshold = round(metrics.sensitivity_threshold(validation.labels, probability, SENSITIVITY), 4)
    record = dataclasses.replace(
        draft,
        temperature=temperature,
        threshold=threshold,
        undetermined_band=undetermined_band(probability, threshold, UNDETERMINED),
        operating_point=(
            f"the greatest threshold that calls {SENSITIVITY:.0%} of the residual scans of the validation cohort "
            f"({len(found)} simulated pairs, {int(validation.labels.sum())} residual); {UNDETERMINED:.1%} of the "
            "cohort, those nearest to it, are undetermined"
        ),
        # A tenth beyond the farthest of a thousand scans in scope: what is farther is another kind of picture.
        training_range=dataclasses.replace(
            draft.training_range, embedding_distance=round(float(distances.max()) * 1.1, 3)
        ),
    )
    return measure(work, weights.save(result, record, network, embedding=known), processes, say, plans=plans)


def measure(
    work: Path,
    record: Path,
    processes: int,
    say: Callable[[str], None],
    *,
    plans: Mapping[str, CohortPlan] = PLANS,
) -> Path:
    """What the node's analysis says with these weights on every set that nothing was chosen on, beside the baseline.

    Writes the weights with these figures in their record, `figures.json` and the card into `work`/result. Returns the
    path of that record. The tensors stay as they are, to the bit.
    """
    cohorts = {}
    for name in (*TRAINING, "validation"):
        say(f"{name} cohort: {plans[name].pairs} pairs")
        cohorts[name] = phantom_cohort(work / "cohorts", plans[name], processes=processes)
    trainings, validation = [cohorts[name] for name in TRAINING], cohorts["validation"]
    model = weights.load(str(record))
    shown = model.record.input
    settings = dataclasses.replace(FINAL, scale=shown.scale, mean=shown.mean, std=shown.std)
    found = logits(model.network, validation.images, settings).astype(np.float64)
    alone = [logits(model.network, single_view(validation.images, view), settings) for view in range(len(VIEWS))]
    fusions = {
        "views_as_channels": metrics.roc_auc(validation.labels, found),
        "mean_logit_of_single_views": metrics.roc_auc(validation.labels, np.mean(alone, axis=0)),
        **{f"{view}_alone": metrics.roc_auc(validation.labels, alone[place]) for place, view in enumerate(VIEWS)},
    }
    report: dict[str, Any] = {"validation_auc": fusions}
    table = np.concatenate([_table(cohort) for cohort in trainings])
    floor = baseline.fit(table, np.concatenate([cohort.labels for cohort in trainings]))
    measured: dict[str, float] = {"training_pairs": len(table), "validation_pairs": len(found)}
    for name in plans:
        if name in cohorts:
            continue
        say(f"measuring on {name}: {plans[name].pairs} pairs")
        scored = score_phantoms(plans[name], record, processes)
        cohort = phantom_cohort(work / "cohorts", plans[name], processes=processes)
        floor_scores = baseline.scores(floor, _table(cohort))
        report[name] = stress_report(scored) | {
            "baseline_auc": metrics.roc_auc(cohort.labels, floor_scores),
            "total_counts_auc": metrics.roc_auc(cohort.labels, cohort.total_counts.sum(axis=1)),
        }
        measured |= _short(name, figures(scored)) | {f"{name}_baseline_auc": report[name]["baseline_auc"]}
        say(json.dumps({"set": name, "baseline_auc": report[name]["baseline_auc"], **report[name]["figures"]}))
    result = work / "result"
    known = dataclasses.replace(
        model.record,
        metrics={key: round(value, 4) for key, value in measured.items()},
        data=_data(sum(len(cohort.labels) for cohort in trainings), plans),
    )
    path = weights.save(result, known, model.network, embedding=model.embedding)
    (result / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
    sources = {name: f"{plan.pairs:,}, seeds from {plan.first_seed}" for name, plan in plans.items()}
    (result / f"{NAME}.md").write_text(card(weights.find(str(path)).record, report, sources), encoding="utf-8")
    return path


def _train(
    work: Path,
    cohorts: Mapping[str, Cohort],
    phases: Sequence[tuple[TrainingSettings, tuple[str, ...]]],
    validation: Cohort,
    say: Callable[[str], None],
) -> nn.Module:
    """Every phase, each with a checkpoint of its own. Returns the last one's network."""
    network: nn.Module | None = None
    started = time.monotonic()
    for number, (settings, names) in enumerate(phases, start=1):
        images = np.concatenate([cohorts[name].images for name in names])
        labels = np.concatenate([cohorts[name].image_labels for name in names])

        def after_epoch(
            report: EpochReport, learnt: nn.Module, number: int = number, settings: TrainingSettings = settings
        ) -> None:
            found = metrics.roc_auc(validation.labels, logits(learnt, validation.images, settings))
            say(
                f"phase {number} of {len(phases)}, epoch {report.epoch}/{report.epochs}: loss {report.loss:.4f}, "
                f"validation AUC {found:.4f}, {time.monotonic() - started:.0f} s"
            )

        network = train(
            images,
            labels,
            settings,
            checkpoint=work / f"phase{number}.pt",
            initial=None if network is None else network.state_dict(),
            after_epoch=after_epoch,
        )
    if network is None:
        raise ValueError("there is no phase to train")
    return network


def _any_views(images: NDArray[Any]) -> NDArray[Any]:
    """A tenth of the pictures, each once with its anterior and once with its posterior view alone."""
    some = images[::10]
    return np.concatenate([single_view(some, view) for view in range(len(VIEWS))])


def score_phantoms(plan: CohortPlan, record: Path, processes: int) -> tuple[Scored, ...]:
    """What the node's own analysis says of each phantom of a plan, those without a view among them."""
    jobs = [(plan, str(record), index) for index in range(plan.pairs)]
    if processes <= 1:
        return tuple(map(_score, jobs))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return tuple(pool.imap(_score, jobs, chunksize=16))


_models: dict[str, weights.LoadedModel] = {}  # of this process: each of the pool's loads the network once


def _score(job: tuple[CohortPlan, str, int]) -> Scored:
    plan, record, index = job
    if record not in _models:
        _models[record] = load_model(record)
    stratum, residual = plan.draw(index)
    scan = phantom(
        plan.first_seed + index, stratum=stratum, residual=residual, physics=plan.physics, confusers=plan.confusers
    )
    answer = analyse_views(images_of(scan.anterior, scan.posterior, scan.spacing_mm), _models[record], outlined=False)
    return Scored(
        key=str(scan.truth.seed),
        group=str(scan.truth.seed),
        residual=scan.truth.residual,
        outcome="declined" if isinstance(answer, Declined) else answer.finding,
        probability=None if isinstance(answer, Declined) else answer.probability,
        reason=answer.reason if isinstance(answer, Declined) else "",
        views={} if isinstance(answer, Declined) else {str(v.image.view): v.probability for v in answer.views},
        strata=(scan.truth.stratum,),
        uptake_percent=scan.truth.uptake_percent,
        spacing_mm=scan.spacing_mm[0],
        total_counts=float(scan.anterior.sum()),
    )


def images_of(
    anterior: NDArray[np.uint16], posterior: NDArray[np.uint16], spacing_mm: tuple[float, float]
) -> tuple[ViewImage, ...]:
    """Both frames as the views of one object that was never written."""
    views: tuple[tuple[ViewName, NDArray[np.uint16]], ...] = (("anterior", anterior), ("posterior", posterior))
    return tuple(
        ViewImage(name, counts.astype(np.float32), spacing_mm, SourceFrame("", "", "", number, 2))
        for number, (name, counts) in enumerate(views, start=1)
    )


def stress_report(scored: Sequence[Scored]) -> dict[str, Any]:
    """All figures of a set, its strata, and its uptake bands over all strata, as plain JSON."""
    found = figures(scored)
    return {
        "figures": _short("", found),
        "views_alone": {name: None if one is None else one.value for name, one in view_areas(scored).items()},
        "strata": [
            {
                "stratum": row.name,
                "scans": row.scans,
                "called_present_of_residual": _pair(row.sensitivity),
                "not_absent_of_clean": _pair(row.false_alarms),
                "undetermined": row.undetermined,
                "declined": row.declined,
            }
            for row in by_stratum(scored)
        ],
        "reliability": [
            dataclasses.asdict(one)
            for one in metrics.reliability_curve(
                labels_of([s for s in scored if s.probability is not None]),
                [s.probability for s in scored if s.probability is not None],
            )
        ],
        "declined_for": {
            reason: sum(one.reason == reason for one in scored) for reason in sorted({s.reason for s in scored} - {""})
        },
    }


def _pair(rate: Rate) -> list[int]:
    return [rate.count, rate.of]


def _short(name: str, found: Figures) -> dict[str, float]:
    prefix = f"{name}_" if name else ""
    shares = {
        "pairs": float(found.scans),
        "residual": float(found.residual),
        "auc": None if found.auc is None else found.auc.value,
        "auc_low": None if found.auc is None else found.auc.low,
        "auc_high": None if found.auc is None else found.auc.high,
        "accuracy": found.accuracy.share,
        "sensitivity": found.sensitivity.share,
        "specificity": found.specificity.share,
        "undetermined": found.undetermined.share,
        "declined": found.declined.share,
        "calibration_error": found.calibration_error,
    }
    return {f"{prefix}{key}": value for key, value in shares.items() if value is not None}


def _table(cohort: Cohort) -> NDArray[np.float64]:
    return np.array([baseline.features(planes[0]) for planes in cohort.planes])


def _record(
    trainings: Sequence[Cohort], plans: Mapping[str, CohortPlan], settings: TrainingSettings
) -> weights.WeightsRecord:
    spacing = np.concatenate([cohort.spacing_mm for cohort in trainings]).astype(float)
    total = np.concatenate([cohort.total_counts for cohort in trainings]).astype(float)
    return weights.WeightsRecord(
        schema=weights.SCHEMA,
        name=NAME,
        version="3",
        file=f"{NAME}.safetensors",
        sha256="0" * 64,
        architecture=settings.architecture,
        preprocessing="native",
        preprocessing_version=PREPROCESSING_VERSION,
        input=weights.InputFormat(GRID, settings.scale, settings.mean, settings.std),
        threshold=0.5,
        operating_point="not chosen yet",
        undetermined_band=None,
        temperature=None,
        fusion="views_as_channels",
        release="demonstration",
        data=_data(len(total), plans),
        trained_on="simulated scans only",
        training_range=weights.TrainingRange(
            # Coarser by a tenth: other cameras' pixels are summed or spread onto the same grid.
            spacing_mm=(round(spacing.min() * 0.95, 3), round(spacing.max() * 1.1, 3)),
            total_counts=(round(total.min() * 0.8), round(total.max() * 1.25)),
            embedding_distance=None,
        ),
        metrics={},
        intended_use=(
            "demonstration and testing of the software with simulated scans; no clinical accuracy is claimed; "
            "not for diagnosis"
        ),
        acceptance=None,
    )


def _data(training_pairs: int, plans: Mapping[str, CohortPlan]) -> str:
    measured = ", ".join(
        f"{plan.pairs} ({name})" for name, plan in plans.items() if name not in (*TRAINING, "validation")
    )
    return (
        f"{training_pairs} simulated pairs of anterior and posterior neck views from pipeline.phantom for "
        f"training, {plans['validation'].pairs} for choosing temperature, threshold and band, and for measuring "
        f"{measured}; no seed in two of them; trained from random weights, no pre-training; no patient's image at "
        "any point"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration weights on simulated scans.")
    parser.add_argument("--work", type=Path, required=True, help="folder for cohorts (1 GB), checkpoint and result")
    parser.add_argument("--processes", type=int, default=2, help="processes that simulate and measure")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; the shipped weights were made with 2")
    parser.add_argument("--measure", type=Path, metavar="RECORD", help="train nothing: measure these weights again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.measure is None:
        path = make(arguments.work, arguments.processes, say)
    else:
        path = measure(arguments.work, arguments.measure, arguments.processes, say)
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
