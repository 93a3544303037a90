"""What each step of the paper's image processing does to the answer: `python -m pipeline.ablation --work DIR`.

The same simulated pairs are shown to the same network, trained alike from the same random weights, as plain roots of
counts and under every variant of equalization and GrabCut; each is measured on unseen pairs of the same cameras and on
those of a camera that none was trained on (other pixels, resolution, sensitivity, scatter). `mask_alone` sees nothing
but GrabCut's outline: its area says how much of the label the mask itself betrays. Small on purpose, so that all of it
fits into one sitting: the areas compare the variants with each other, not with the shipped weights. `--large` asks of
plain and equalized pictures whether what helped with few scans still helps with more, in several trainings each: two
trainings that differ in nothing but their random numbers differ too. It also trains the shipped weights on, once on
plain counts and once on equalized pictures: what helps a network at the start need not help one that has learnt.

Writes `ablation.json` and the page `ablation.md` into DIR (`--large`: `ablation-large`), row by row, and goes on where
it was interrupted.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Mapping
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
class Row:
    """One training: `variant` of `VARIANTS`. `onward`: it starts from the weights `Scale.beside`, not random ones."""

    name: str
    variant: str
    settings: TrainingSettings
    onward: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """How much one comparison sees. `name`: of its page. `variants`: the rows, `plain` first.

    `outlined`: whether any variant needs GrabCut's mask, which takes longer than everything else; else its layer is 0.
    `trainings`: of each variant, from other random numbers. `beside`: name of weights that are measured on the same
    tests, for reference. `onward`: how these weights are trained on, once with each variant of `ONWARD`; None: not.
    """

    name: str
    plans: Mapping[str, CohortPlan]
    settings: TrainingSettings
    variants: tuple[str, ...]
    outlined: bool
    trainings: int = 1
    beside: str = ""
    onward: TrainingSettings | None = None

    def rows(self) -> tuple[Row, ...]:
        """In the order in which they are trained: each variant once, then again, then the weights `beside` on."""
        fresh = [
            Row(
                variant if turn == 0 else f"{variant}-{turn + 1}",
                variant,
                replace(self.settings, seed=self.settings.seed + turn, **CHANGES.get(variant, {})),
            )
            for turn in range(self.trainings)
            for variant in self.variants
        ]
        onward = self.onward
        further = [] if onward is None else [Row(f"shipped_on_{one}", one, onward, onward=True) for one in ONWARD]
        return (*fresh, *further)


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
ONWARD: Final = ("plain", "equalized")
"""The variants with which the weights beside a comparison are trained on; equal settings, so equal random numbers."""
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
    # A lower rate than from random numbers: to go on from what was learnt, and not to lose it in the first steps.
    onward=replace(SETTINGS, stages=((3, GRID // 2), (3, GRID)), learning_rate=3e-4),
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


def run(
    work: Path, processes: int, say: Callable[[str], None], scale: Scale = SMALL, only: Collection[str] | None = None
) -> Path:
    """All rows that are not there yet, or those of them named in `only`. Returns the path of `NAME.json`."""
    sets = {name: cached(work, name, plan, processes, outlined=scale.outlined) for name, plan in scale.plans.items()}
    path = work / f"{scale.name}.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    truths = {name: labels for name, (_, labels, _) in sets.items()}

    def keep(name: str, found: Mapping[str, Any]) -> None:
        rows[name] = found
        path.write_text(json.dumps(rows, indent=2) + "\n")
        write_page(work, rows, truths, scale)

    if scale.outlined:
        kept = {name: {"auc": metrics.roc_auc(labels, kept)} for name, (_, labels, kept) in sets.items()}
        rows.setdefault("mask_kept_or_not", kept)
    model = weights.load(scale.beside) if scale.beside else None
    if model is not None and scale.beside not in rows:
        record, settings = model.record, _as_shown(scale.settings, model)
        measured = _measured(work, scale.beside, model.network, settings, VARIANTS["plain"], sets)
        pairs = round(record.metrics["training_pairs"])
        keep(scale.beside, {**measured, "version": record.version, "pairs": pairs})
    layers, labels, _ = sets["training"]
    for row in scale.rows():
        if row.name in rows or (only is not None and row.name not in only):
            continue
        started, make = time.monotonic(), VARIANTS[row.variant]
        images = make(layers)
        inputs = len(images) // len(labels)
        # Shown to the network as often as the others: a view of its own counts as half a pair.
        settings, initial = replace(row.settings, epoch_images=inputs * len(labels)), None
        if row.onward and model is not None:
            settings, initial = _as_shown(settings, model), model.network.state_dict()
        network = train(
            images, np.repeat(labels, inputs), settings, checkpoint=work / f"{row.name}.pt", initial=initial
        )
        measured = _measured(work, row.name, network, settings, make, sets)
        # Of the same turn: trained from the same random numbers.
        against = {"p": row.name.replace(row.variant, "plain", 1)} if row.variant != "plain" else {}
        if row.onward:
            against["p_untouched"] = scale.beside
        for name in TESTED:
            for key, other in against.items():
                paths = [work / f"{one}.{name}.npy" for one in (other, row.name)]
                if paths[0].exists():
                    measured[name][key] = metrics.compare_areas(truths[name], *map(np.load, paths)).p_value
        keep(row.name, {**measured, "seconds": round(time.monotonic() - started)})
        say(f"{row.name}: {json.dumps(rows[row.name])}")
    write_page(work, rows, truths, scale)
    return path


def _as_shown(settings: TrainingSettings, model: weights.LoadedModel) -> TrainingSettings:
    """The settings, with pictures standardized as these weights learnt them."""
    shown = model.record.input
    return replace(settings, scale=shown.scale, mean=shown.mean, std=shown.std)


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
    lines = [
        "# What each step of the paper's image processing does to the answer",
        "",
        "**SYNTHETIC: every scan was simulated. These figures say nothing about accuracy on patients.**",
        "",
        f"ResNet-18 from the same random weights, {len(truths['training']):,} simulated pairs, "
        f"{_epochs(scale.settings)}, tested on "
        f"{len(truths['same_cameras']):,} unseen pairs of the same cameras and {len(truths['other_camera']):,} of a "
        "camera that none was trained on. AUC with DeLong's 95 % interval; p: DeLong's test against `plain` on the "
        "same pairs and from the same random numbers, not corrected for the number of comparisons. "
        f"Every line is one training: by what two trainings of one input differ is not in its interval{again}. Made "
        f"by `python -m pipeline.ablation{' --large' if scale.name == LARGE.name else ''} --work DIR`.",
        "",
        "| input | same cameras | p | other camera | p | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    fresh = [row for row in scale.rows() if not row.onward]
    for row in sorted(fresh, key=lambda one: (scale.variants.index(one.variant), one.settings.seed)):
        told = TOLD[row.variant] + (f", seed {row.settings.seed}" if scale.trainings > 1 else "")
        if row.name not in rows:
            lines.append(f"| {told} | not run yet | | | | |")
            continue
        found = rows[row.name]
        cells = [cell for name in TESTED for cell in (_area(found[name]), _p(found[name], "p"))]
        lines.append(f"| {told} | {' | '.join(cells)} | {found['seconds'] / 60:.0f} |")
    if scale.beside in rows:
        found = rows[scale.beside]
        lines += [
            "",
            f"On the same tests the shipped weights (`{scale.beside}`, version {found['version']}), which see plain "
            f"counts too and were trained longer and on {found['pairs']:,} other and harder pairs: "
            + ", ".join(f"{_area(found[name])} ({name.replace('_', ' ')})" for name in TESTED)
            + ".",
        ]
        lines += _onward(rows, len(truths["training"]), scale)
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


def _onward(rows: Mapping[str, Any], pairs: int, scale: Scale) -> list[str]:
    """Lines of the page about the weights `beside` that were trained on; none where the comparison has none."""
    settings, shipped = scale.onward, rows[scale.beside]
    if settings is None:
        return []
    lines = [
        "",
        "## The shipped weights, trained on",
        "",
        f"Both lines start from the shipped weights and see the same {pairs:,} pairs for {_epochs(settings)} (learning "
        f"rate {settings.learning_rate:g}, falling to 1 %) with equal settings and equal random numbers; they differ "
        "in the picture alone. No picture is changed as by another camera, and no view is left out. **This start "
        f"favours plain counts**: the shipped weights learnt on them, from {shipped['pairs']:,} other pairs, and had "
        "never seen an equalized picture. p (untouched): DeLong's test against the shipped weights as they are; p "
        "(plain): against those trained on with plain counts; on the same pairs, not corrected for the number of "
        "comparisons. One training each: what another training would give is not in the intervals.",
        "",
        "| weights and input | same cameras | p (untouched) | p (plain) | other camera | p (untouched) | p (plain) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    cells = [cell for name in TESTED for cell in (_area(shipped[name]), "", "")]
    lines.append(f"| shipped, untouched: plain counts | {' | '.join(cells)} |")
    further = [row for row in scale.rows() if row.onward]
    for row in further:
        told = f"`{row.name}`: trained on with {'plain counts' if row.variant == 'plain' else 'equalized pictures'}"
        if row.name not in rows:
            lines.append(f"| {told} | not run yet | | | | | |")
            continue
        cells = [
            cell
            for found in (rows[row.name][name] for name in TESTED)
            for cell in (_area(found), _p(found, "p_untouched"), _p(found, "p"))
        ]
        lines.append(f"| {told} | {' | '.join(cells)} |")
    if all(row.name in rows for row in further):
        lines += ["", _outcome(rows, scale.beside)]
    return lines


def _outcome(rows: Mapping[str, Any], beside: str) -> str:
    """What the equalized pictures gained or lost after training on, by area and DeLong's p below .05."""
    found = rows["shipped_on_equalized"]
    against = (
        ("shipped_on_plain", "p", "those trained on with plain counts"),
        (beside, "p_untouched", "the shipped weights untouched"),
    )
    said, verdicts = [], set()
    for name in TESTED:
        parts = []
        for other, key, told in against:
            gain = found[name]["auc"] - rows[other][name]["auc"]
            # No p where the other's scores are no longer in the folder: then nothing can be said.
            clear = float(found[name].get(key, 1)) < 0.05
            verdict = "not told apart from" if not clear else "better than" if gain > 0 else "worse than"
            verdicts.add(verdict)
            parts.append(f"{verdict} {told}")
        said.append(f"{' and '.join(parts)} ({name.replace('_', ' ')})")
    whole = ""
    if verdicts == {"better than"}:
        whole = " **They are clearly better than both, on both tests.**"
    elif "better than" not in verdicts:
        whole = (
            " A lead of equalized pictures was not seen from this start. As the start favours plain counts, that does "
            "not make them the worse input."
        )
    return f"At p < .05, the weights trained on with equalized pictures are {', and '.join(said)}.{whole}"


def _epochs(settings: TrainingSettings) -> str:
    return " and ".join(f"{count} epochs at {edge} pixels" for count, edge in settings.stages)


def _p(found: Mapping[str, Any], key: str) -> str:
    """A p value as the page shows it; a row that was published keeps it as it was shown."""
    value = found.get(key, "")
    return value if isinstance(value, str) else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _area(found: Mapping[str, float]) -> str:
    return f"{found['auc']:.4f} ({found['low']:.4f}-{found['high']:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the steps of the image processing on simulated scans.")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures (2 GB), checkpoints and result")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="plain against equalized, with more scans; no mask")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help="train these rows alone; the page tells which are open"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--only-pictures", action="store_true", help="simulate, and stop before training")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scale = LARGE if arguments.large else SMALL
    unknown = sorted({*(arguments.only or ())} - {row.name for row in scale.rows()})
    if unknown:
        parser.error(f"no row is named {', '.join(unknown)}; known: {', '.join(row.name for row in scale.rows())}")
    if arguments.only_pictures:
        for name, plan in scale.plans.items():
            cached(arguments.work, name, plan, arguments.processes, outlined=scale.outlined)
        return

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    path = run(arguments.work, arguments.processes, say, scale, arguments.only)
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
