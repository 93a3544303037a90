"""How the shipped weights were made: `python -m pipeline.train_demonstration --work DIR`.

Simulates the cohorts (training, validation, test; no seed in two of them), trains, chooses fusion, temperature and
threshold on the validation cohort, rounds the weights to float16, and measures those rounded weights on the test
cohort, which nothing was chosen on. Writes the weights record, the tensors and `figures.json` into DIR/result; ships
nothing by itself. Interrupted, it goes on from the last epoch. About 35 minutes on 2 shared cores: 11 simulating, 17
training, 6 measuring.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import metrics, weights
from models.train import EpochReport, TrainingSettings, logits, train
from pipeline.analyse import fused_logit
from pipeline.cohort import Cohort, CohortPlan, phantom_cohort
from pipeline.preprocess import PREPROCESSING_VERSION, SIZE

NAME: Final = "remnant-resnet18-phantom"
PLANS: Final = {
    # Two of five phantoms from the named strata, so that the rare and confusing ones are seen often enough.
    "training": CohortPlan(100_000, 2_200, stratum_period=5, stratum_run=2),
    "validation": CohortPlan(200_000, 400, stratum_period=5, stratum_run=2),
    "test": CohortPlan(300_000, 600),
    "strata": CohortPlan(400_000, 800, stratum_period=1, stratum_run=1),
}
SETTINGS: Final = TrainingSettings(stages=((2, 112), (2, 224)), epoch_images=2_200, learning_rate=1e-3)


def view_logits(cohort: Cohort, network: nn.Module, settings: TrainingSettings) -> NDArray[np.float64]:
    """Logits of each view, (P, 2), float64."""
    return logits(network, cohort.images, settings).astype(np.float64).reshape(len(cohort.labels), -1)


def _probability(values: NDArray[np.float64], fusion: str, temperature: float | None) -> NDArray[np.float64]:
    joined = np.array([fused_logit(row, fusion, temperature) for row in values])
    return np.asarray(1 / (1 + np.exp(-joined)))


def _figures(cohort: Cohort, probability: NDArray[np.float64], threshold: float, name: str) -> dict[str, float]:
    labels = cohort.labels
    table = metrics.confusion(labels, probability, threshold)
    low, high = metrics.roc_auc_interval(labels, probability)
    return {
        f"{name}_pairs": float(len(labels)),
        f"{name}_pairs_residual": float(labels.sum()),
        f"{name}_auc": metrics.roc_auc(labels, probability),
        f"{name}_auc_low": low,
        f"{name}_auc_high": high,
        f"{name}_accuracy": table.accuracy,
        f"{name}_sensitivity": table.sensitivity,
        f"{name}_specificity": table.specificity,
        f"{name}_calibration_error": metrics.calibration_error(labels, probability),
    }


def _by_stratum(cohort: Cohort, probability: NDArray[np.float64], threshold: float) -> list[dict[str, Any]]:
    rows = []
    for stratum in sorted(set(cohort.strata.tolist())):
        for residual in (1, 0):
            chosen = (cohort.strata == stratum) & (cohort.labels == residual)
            if count := int(chosen.sum()):
                called = int((probability[chosen] >= threshold).sum())
                rows.append({"stratum": stratum, "residual": bool(residual), "pairs": count, "called_present": called})
    return rows


def make(
    work: Path,
    processes: int,
    say: Callable[[str], None],
    *,
    plans: Mapping[str, CohortPlan] = PLANS,
    settings: TrainingSettings = SETTINGS,
) -> Path:
    """All of it. Returns the path of the written record."""
    cohorts = {}
    for name, plan in plans.items():
        say(f"{name} cohort: {plan.pairs} pairs")
        cohorts[name] = phantom_cohort(work / "cohorts", plan, processes=processes)
    training, validation = cohorts["training"], cohorts["validation"]
    started = time.monotonic()

    def after_epoch(report: EpochReport, network: nn.Module) -> None:
        values = view_logits(validation, network, settings)
        area = metrics.roc_auc(validation.labels, values.mean(axis=1))
        say(
            f"epoch {report.epoch}/{report.epochs}: loss {report.loss:.4f}, validation AUC {area:.4f}, "
            f"{time.monotonic() - started:.0f} s"
        )

    network = train(
        training.images,
        training.image_labels,
        settings,
        checkpoint=work / "checkpoint.pt",
        after_epoch=after_epoch,
    )
    result = work / "result"
    path = weights.save(result, _record(training, plans, settings), network)
    rounded = weights.load(str(path)).network

    values = view_logits(validation, rounded, settings)
    areas = {
        fusion: metrics.roc_auc(validation.labels, _probability(values, fusion, None)) for fusion in weights.FUSIONS
    }
    fusion = max(areas, key=lambda name: areas[name])
    joined = np.array([fused_logit(row, fusion, None) for row in values])
    temperature = metrics.temperature(validation.labels, joined)
    probability = _probability(values, fusion, temperature)
    threshold = round(metrics.youden_threshold(validation.labels, probability), 4)
    figures = _figures(validation, probability, threshold, "validation")
    strata = {}
    for name in ("test", "strata"):
        say(f"measuring on {name}")
        values = view_logits(cohorts[name], rounded, settings)
        measured = _probability(values, fusion, temperature)
        figures |= _figures(cohorts[name], measured, threshold, name)
        strata[name] = _by_stratum(cohorts[name], measured, threshold)
        for view, place in (("anterior", 0), ("posterior", 1)):
            figures[f"{name}_auc_{view}_alone"] = metrics.roc_auc(cohorts[name].labels, values[:, place])
        # What GrabCut alone knows, and what the network knows without it: the masked plane replaced by the whole one.
        figures[f"{name}_auc_of_mask_kept_or_not"] = metrics.roc_auc(
            cohorts[name].labels, cohorts[name].masked.sum(axis=1)
        )
        blind = dataclasses.replace(cohorts[name], planes=cohorts[name].planes[:, :, [0, 1, 1]])
        figures[f"{name}_auc_without_mask"] = metrics.roc_auc(
            blind.labels, _probability(view_logits(blind, rounded, settings), fusion, temperature)
        )
    figures = {name: round(figure, 4) for name, figure in figures.items()}
    record = dataclasses.replace(
        _record(training, plans, settings), fusion=fusion, temperature=temperature, threshold=threshold, metrics=figures
    )
    path = weights.save(result, record, network)
    report = {"fusion_auc": areas, "threshold": threshold, "temperature": temperature, "figures": figures} | strata
    (result / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
    return path


def _record(training: Cohort, plans: Mapping[str, CohortPlan], settings: TrainingSettings) -> weights.WeightsRecord:
    spacing, total = training.spacing_mm.astype(float), training.total_counts.astype(float)
    return weights.WeightsRecord(
        schema=weights.SCHEMA,
        name=NAME,
        version="1",
        file=f"{NAME}.safetensors",
        sha256="0" * 64,
        architecture=settings.architecture,
        preprocessing="native",
        preprocessing_version=PREPROCESSING_VERSION,
        input=weights.InputFormat(SIZE, settings.mean, settings.std),
        threshold=0.5,
        operating_point=(
            "the fused probability with the greatest sensitivity + specificity on the validation cohort "
            f"({plans['validation'].pairs} simulated pairs, about half of them residual)"
        ),
        undetermined_band=None,
        temperature=None,
        fusion="mean_logit",
        release="demonstration",
        data=(
            f"{plans['training'].pairs} simulated pairs of anterior and posterior neck views from pipeline.phantom for "
            f"training, {plans['validation'].pairs} for choosing fusion, temperature and threshold, "
            f"{plans['test'].pairs} of the natural mixture and {plans['strata'].pairs} of the named strata for "
            "measuring; no seed in two of them; trained from random weights, no pre-training; "
            "no patient's image at any point"
        ),
        trained_on="simulated scans only",
        training_range=weights.TrainingRange(
            spacing_mm=(round(spacing.min() * 0.95, 3), round(spacing.max() * 1.05, 3)),
            total_counts=(round(total.min() * 0.8), round(total.max() * 1.25)),
        ),
        metrics={},
        intended_use=(
            "demonstration and testing of the software with simulated scans; no clinical accuracy is claimed; "
            "not for diagnosis"
        ),
        acceptance=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration weights on simulated scans.")
    parser.add_argument("--work", type=Path, required=True, help="folder for cohorts (2 GB), checkpoint and result")
    parser.add_argument("--processes", type=int, default=2, help="processes that simulate")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; the shipped weights were made with 1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = make(arguments.work, arguments.processes, lambda line: print(line, file=sys.stderr, flush=True))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
