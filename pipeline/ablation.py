"""What each step of the paper's image processing does to the answer: `python -m pipeline.ablation --work DIR`.

The same simulated pairs are shown to the same network, trained alike from the same random weights, as plain roots of
counts and under every variant of equalization and GrabCut; each is measured on unseen pairs of the same cameras and on
those of a camera that none was trained on (other pixels, resolution, sensitivity, scatter). `mask_alone` sees nothing
but GrabCut's outline: its area says how much of the label the mask itself betrays. Small on purpose, so that all of it
fits into one sitting: the areas compare the variants with each other, not with the shipped weights. `--large` asks of
plain and equalized pictures whether what helped with few scans still helps with more, in several trainings each: two
trainings that differ in nothing but their random numbers differ too.

Writes `ablation.json` and the page `ablation.md` into DIR (`--large`: `ablation-large`), row by row, and goes on where
it was interrupted.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import metrics, weights
from models.train import TrainingSettings, logits, train
from pipeline.cohort import CohortPlan
from pipeline.phantom import phantom
from pipeline.preprocess import (
    GRABCUT_SMOOTHING_MM,
    GRID,
    ROOT_COUNTS,
    Order,
    equalize,
    field_of_view,
    on_grid,
    prepare,
    smooth,
    window,
)

SETS: Final = MappingProxyType(
    {
        "training": CohortPlan(
            30_000_000, 3_000, stratum_period=2, stratum_run=1, confusers=3.0, without=("other_camera",)
        ),
        "same_cameras": CohortPlan(
            31_000_000, 500, stratum_period=2, stratum_run=1, confusers=3.0, without=("other_camera",)
        ),
        "other_camera": CohortPlan(32_000_000, 500, stratum_period=2, stratum_run=1, confusers=3.0, physics="other"),
    }
)
LAYERS: Final = ("root", "equalized", "mask")
"""What is cached of each view, on the native grid: root of counts; equalized picture and GrabCut's mask, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much one comparison sees. `name`: of its page. `variants`: the rows, `plain` first.

    `outlined`: whether any variant needs GrabCut's mask, which takes longer than everything else; else its layer is 0.
    `trainings`: of each variant, from other random numbers. `beside`: name of weights that are measured on the same
    tests, for reference.
    """

    name: str
    plans: Mapping[str, CohortPlan]
    settings: TrainingSettings
    variants: tuple[str, ...]
    outlined: bool
    trainings: int = 1
    beside: str = ""

    def rows(self) -> tuple[tuple[str, str, int], ...]:
        """(name of the row, variant, seed) in the order in which they are trained: each variant once, then again."""
        return tuple(
            (variant if turn == 0 else f"{variant}-{turn + 1}", variant, self.settings.seed + turn)
            for turn in range(self.trainings)
            for variant in self.variants
        )


_ORDER: Final = Order(
    steps=("bin", "field_of_view", "crop", "root_plane", "smooth_for_grabcut", "window", "grabcut", "mask"),
    joint=True,
    standard=ROOT_COUNTS,
    size=GRID,
)

Planes = NDArray[np.float16]


def _views(layers: Planes, make: Callable[[Planes], Planes]) -> Planes:
    """(P, 7, edge, edge) -> (P, 3, edge, edge): `make` of the (P, 3, ...) layers of each view, and the field."""
    return np.stack([make(layers[:, :3]), make(layers[:, 3:6]), layers[:, 6]], axis=1)


def _each(layers: Planes, make: Callable[[Planes], Planes]) -> Planes:
    """-> (2 P, 3, edge, edge): each view an image of its own, as in the paper; its third plane is the field."""
    both = [np.stack([make(part), make(part), layers[:, 6]], axis=1) for part in (layers[:, :3], layers[:, 3:6])]
    return np.stack(both, axis=1).reshape(-1, 3, *layers.shape[2:])


def _root(view: Planes) -> Planes:
    return view[:, 0]


def _equalized(view: Planes) -> Planes:
    return view[:, 1] * np.float16(4)  # to the size of roots of counts


def _masked(image: Planes, view: Planes) -> Planes:
    """Under the mask; where GrabCut left none, as it was: the rule of `preprocess.mask_rule`."""
    empty = np.asarray(~(view[:, 2] > 0).any(axis=(1, 2)))
    return np.asarray(image * np.where(empty[:, None, None], 1, view[:, 2]), np.float16)


VARIANTS: Final[Mapping[str, Callable[[Planes], Planes]]] = MappingProxyType(
    {
        "plain": lambda layers: _views(layers, _root),
        "plain_hazed": lambda layers: _views(layers, _root),
        "plain_each_view": lambda layers: _each(layers, _root),
        "equalized": lambda layers: _views(layers, _equalized),
        "masked": lambda layers: _views(layers, lambda view: _masked(_root(view), view)),
        "equalized_masked": lambda layers: _views(layers, lambda view: _masked(_equalized(view), view)),
        "equalized_masked_each_view": lambda layers: _each(layers, lambda view: _masked(_equalized(view), view)),
        "mask_alone": lambda layers: _views(layers, lambda view: view[:, 2] * np.float16(4)),
    }
)
"""Name -> network inputs from the cached layers. `plain` is `native`; `equalized_masked_each_view` is the paper's idea
with a mask that is sound (GrabCut on the native crop, not on the equalized picture)."""
TOLD: Final = MappingProxyType(
    {
        "plain": "`plain`: roots of counts, both views as channels (`native`)",
        "plain_hazed": "`plain_hazed`: the same, in training changed as by another camera: up to 40 % of the counts "
        "spread widely, counts times .67 to 1.5",
        "plain_each_view": "`plain_each_view`: roots of counts, each view a picture of its own",
        "equalized": "`equalized`: equalized, both views",
        "masked": "`masked`: roots of counts under GrabCut's mask",
        "equalized_masked": "`equalized_masked`: equalized, under the mask",
        "equalized_masked_each_view": "`equalized_masked_each_view`: the paper's idea, mask cut on native pixels",
        "mask_alone": "`mask_alone`: nothing but the mask's outline",
    }
)
CHANGES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"plain_hazed": {"haze": 0.4, "brightness": 1.5}})
"""Variant -> what its training sets otherwise."""
TESTED: Final = ("same_cameras", "other_camera")
SETTINGS: Final = TrainingSettings(
    stages=((8, GRID // 2), (3, GRID)),
    batch_size=32,
    learning_rate=1e-3,
    shift=5,
    scale=1.0,
    mean=ROOT_COUNTS.mean,
    std=ROOT_COUNTS.std,
)
SMALL: Final = Scale("ablation", SETS, SETTINGS, tuple(name for name in VARIANTS if name not in CHANGES), outlined=True)
LARGE: Final = Scale(
    "ablation-large",
    {
        name: replace(plan, pairs=8_000 if name == "training" else 2_000, first_seed=plan.first_seed + 500_000)
        for name, plan in SETS.items()
    },
    replace(SETTINGS, stages=((6, GRID // 2), (2, GRID))),
    ("plain", "equalized", "plain_hazed"),
    outlined=False,
    trainings=2,
    beside="remnant-resnet18-phantom",
)
"""Whether what helped with few scans still helps with more: no mask, and the tests four times as large."""


def layers_of(plan: CohortPlan, index: int, *, outlined: bool = True) -> tuple[Planes, bool, int]:
    """(7, edge, edge): `LAYERS` of the anterior view, of the posterior one turned, and the field; label; masks kept."""
    order = _ORDER if outlined else _ORDER.without_outline()
    stratum, residual = plan.draw(index)
    scan = phantom(
        plan.first_seed + index, stratum=stratum, residual=residual, physics=plan.physics, confusers=plan.confusers
    )
    found, field, kept = [], np.zeros((GRID, GRID), np.float32), 0
    for counts, sides in ((scan.anterior, 1), (scan.posterior, -1)):
        view = prepare(counts.astype(np.float32), scan.spacing_mm, order)
        box = view.crop
        part = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        crop = counts[part].astype(np.float32)
        seen = field_of_view(counts.astype(np.float32))[part]
        grey = equalize(window(smooth(crop, seen, scan.spacing_mm, GRABCUT_SMOOTHING_MM)), seen)
        planes = (
            view.planes[0],
            on_grid(grey.astype(np.float32) / np.float32(255), scan.spacing_mm),
            on_grid(view.mask[part].astype(np.float32), scan.spacing_mm),
        )
        found += [plane[:, ::sides] for plane in planes]
        field += view.field[:, ::sides] / 2
        kept += outlined and view.mask_rule == "grabcut"
    return np.stack([*found, field]).astype(np.float16), scan.truth.residual, kept


def _layers(job: tuple[CohortPlan, int, bool]) -> tuple[Planes, bool, int]:
    plan, index, outlined = job
    return layers_of(plan, index, outlined=outlined)


def cached(
    folder: Path, name: str, plan: CohortPlan, processes: int, *, outlined: bool = True
) -> tuple[Planes, NDArray[np.uint8], NDArray[Any]]:
    """Layers (P, 7, edge, edge), labels (P,), number of masks kept (P,); simulated once."""
    path = folder / f"{name}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(processes, cv2.setNumThreads, (1,)) as pool:
            rows = pool.map(_layers, [(plan, index, outlined) for index in range(plan.pairs)], chunksize=8)
        layers, labels, kept = zip(*rows, strict=True)
        part = path.with_name(f".{path.name}")
        with part.open("wb") as file:
            np.savez(file, layers=np.stack(layers), labels=np.array(labels, np.uint8), kept=np.array(kept))
        part.replace(path)
    data = np.load(path)
    return data["layers"], data["labels"], data["kept"]


def run(work: Path, processes: int, say: Callable[[str], None], scale: Scale = SMALL) -> Path:
    """All variants that have no row yet. Returns the path of `NAME.json`."""
    sets = {name: cached(work, name, plan, processes, outlined=scale.outlined) for name, plan in scale.plans.items()}
    path = work / f"{scale.name}.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if scale.outlined:
        kept = {name: {"auc": metrics.roc_auc(labels, kept)} for name, (_, labels, kept) in sets.items()}
        rows.setdefault("mask_kept_or_not", kept)
    truths = {name: labels for name, (_, labels, _) in sets.items()}
    layers, labels, _ = sets["training"]
    for row_name, variant, seed in scale.rows():
        if row_name in rows:
            continue
        started, make = time.monotonic(), VARIANTS[variant]
        images = make(layers)
        inputs = len(images) // len(labels)
        # Shown to the network as often as the others: a view of its own counts as half a pair.
        settings = replace(scale.settings, epoch_images=inputs * len(labels), seed=seed, **CHANGES.get(variant, {}))
        network = train(images, np.repeat(labels, inputs), settings, checkpoint=work / f"{row_name}.pt")
        measured = _measured(work, row_name, network, settings, make, sets)
        # Of the same turn: trained from the same random numbers.
        plain = row_name.replace(variant, "plain", 1)
        for name in TESTED if variant != "plain" else ():
            paths = [work / f"{one}.{name}.npy" for one in (plain, row_name)]
            if paths[0].exists():
                measured[name]["p"] = metrics.compare_areas(truths[name], *map(np.load, paths)).p_value
        rows[row_name] = {**measured, "seconds": round(time.monotonic() - started)}
        path.write_text(json.dumps(rows, indent=2) + "\n")
        say(f"{row_name}: {json.dumps(rows[row_name])}")
        write_page(work, rows, truths, scale)
    if scale.beside and scale.beside not in rows:
        model = weights.load(scale.beside)
        shown = model.record.input
        settings = replace(scale.settings, scale=shown.scale, mean=shown.mean, std=shown.std)
        measured = _measured(work, scale.beside, model.network, settings, VARIANTS["plain"], sets)
        record = model.record
        rows[scale.beside] = {**measured, "version": record.version, "pairs": round(record.metrics["training_pairs"])}
        path.write_text(json.dumps(rows, indent=2) + "\n")
    write_page(work, rows, truths, scale)
    return path


def _measured(
    work: Path,
    row: str,
    network: nn.Module,
    settings: TrainingSettings,
    make: Callable[[Planes], Planes],
    sets: Mapping[str, tuple[Planes, NDArray[np.uint8], NDArray[Any]]],
) -> dict[str, Any]:
    """Areas of a network on the sets of `TESTED`; its scores are kept in `work`, for comparing rows."""
    found: dict[str, Any] = {}
    for name in TESTED:
        unseen, truth, _ = sets[name]
        scores = logits(network, make(unseen), settings).reshape(len(truth), -1).mean(axis=1)
        low, high = metrics.roc_auc_interval(truth, scores)
        found[name] = {"auc": metrics.roc_auc(truth, scores), "low": low, "high": high}
        np.save(work / f"{row}.{name}.npy", scores)
    return found


def write_page(work: Path, rows: Mapping[str, Any], truths: Mapping[str, NDArray[np.uint8]], scale: Scale) -> None:
    """`NAME.md` of the rows there are."""
    (work / f"{scale.name}.md").write_text(page(rows, truths, scale), encoding="utf-8")


def page(
    rows: Mapping[str, Any],
    truths: Mapping[str, NDArray[np.uint8]],
    scale: Scale = SMALL,
) -> str:
    """Markdown for `models/cards/`. `rows`: of `NAME.json`; `truths`: set -> labels (P,)."""
    again = ", but shows between its lines" if scale.trainings > 1 else ""
    epochs = " and ".join(f"{count} epochs at {edge} pixels" for count, edge in scale.settings.stages)
    lines = [
        "# What each step of the paper's image processing does to the answer",
        "",
        "**SYNTHETIC: every scan was simulated. These figures say nothing about accuracy on patients.**",
        "",
        f"ResNet-18 from the same random weights, {len(truths['training']):,} simulated pairs, {epochs}, tested on "
        f"{len(truths['same_cameras']):,} unseen pairs of the same cameras and {len(truths['other_camera']):,} of a "
        "camera that none was trained on. AUC with DeLong's 95 % interval; p: DeLong's test against `plain` on the "
        "same pairs and from the same random numbers, not corrected for the number of comparisons. "
        f"Every line is one training: by what two trainings of one input differ is not in its interval{again}. Made "
        f"by `python -m pipeline.ablation{' --large' if scale.name == LARGE.name else ''} --work DIR`.",
        "",
        "| input | same cameras | p | other camera | p | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, variant, seed in sorted(scale.rows(), key=lambda one: (scale.variants.index(one[1]), one[2])):
        told = TOLD[variant] + (f", seed {seed}" if scale.trainings > 1 else "")
        if row not in rows:
            lines.append(f"| {told} | not run yet | | | | |")
            continue
        cells = []
        for name in TESTED:
            cells.append(_area(rows[row][name]))
            p_value = rows[row][name].get("p", "")
            cells.append(p_value if isinstance(p_value, str) else "<0.0001" if p_value < 1e-4 else f"{p_value:.4f}")
        lines.append(f"| {told} | {' | '.join(cells)} | {rows[row]['seconds'] / 60:.0f} |")
    if scale.beside in rows:
        found = rows[scale.beside]
        lines += [
            "",
            f"On the same tests the shipped weights (`{scale.beside}`, version {found['version']}), which see plain "
            f"counts too and were trained longer and on {found['pairs']:,} other and harder pairs: "
            + ", ".join(f"{_area(found[name])} ({name.replace('_', ' ')})" for name in TESTED)
            + ".",
        ]
    if not scale.outlined:
        return "\n".join(lines) + "\n"
    kept = rows["mask_kept_or_not"]
    leak = ", ".join(f"{found['auc']:.3f} ({name.replace('_', ' ')})" for name, found in kept.items())
    lines += [
        "",
        f"How much of the label GrabCut itself leaks: whether it left a mask in none, one or both views, without any "
        f"network, has an AUC of {leak}.",
    ]
    return "\n".join(lines) + "\n"


def _area(found: Mapping[str, float]) -> str:
    return f"{found['auc']:.4f} ({found['low']:.4f}-{found['high']:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the steps of the image processing on simulated scans.")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures (2 GB), checkpoints and result")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="plain against equalized, with more scans; no mask")
    parser.add_argument("--only-pictures", action="store_true", help="simulate, and stop before training")
    arguments = parser.parse_args()
    scale = LARGE if arguments.large else SMALL
    if arguments.only_pictures:
        for name, plan in scale.plans.items():
            cached(arguments.work, name, plan, arguments.processes, outlined=scale.outlined)
        return
    path = run(arguments.work, arguments.processes, lambda line: print(line, file=sys.stderr, flush=True), scale)
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
