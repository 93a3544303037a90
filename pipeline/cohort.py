"""Labelled cohorts for training and measuring: phantoms, preprocessed once and cached on disk as arrays.

A cohort is built in one folder under a key that holds the seeds, the preprocessing and the source of the simulator and
of the preprocessing, so that a change in either builds anew. A cohort that was interrupted is built again; one that
stands is complete, because its folder gets its name last.
"""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline import phantom as phantom_module
from pipeline import preprocess as preprocess_module
from pipeline.phantom import NEGATIVE_STRATA, RESIDUAL_STRATA, STRATA, PhysicsName, phantom
from pipeline.preprocess import ORDERS, Order, prepare_scan

VIEWS = ("anterior", "posterior")
_BOTH = tuple(
    stratum for stratum in STRATA if stratum not in {*RESIDUAL_STRATA, *NEGATIVE_STRATA, "plain", "view_missing"}
)
_WITH = (*sorted(RESIDUAL_STRATA), *(("uptake_0.03_0.1", "uptake_0.1_0.3") * 3), "thyroglossal_only", *_BOTH)
_WITHOUT = ("plain", *sorted(NEGATIVE_STRATA), *(("lateral_node", "contamination", "oesophagus") * 3), "thymus", *_BOTH)
STRATA_CYCLE: Final = tuple(
    pair for with_, without in zip(_WITH, _WITHOUT, strict=True) for pair in ((with_, True), (without, False))
)
"""Every stratum with each class that it can have, one half each; what is faint or deceives comes several times.

`view_missing` is not among them: its pixels are ordinary, and what becomes of it is a rule, not a judgement.
"""


@dataclass(frozen=True, slots=True)
class CohortPlan:
    """Which phantoms: `seeds` first to first + pairs - 1.

    Of every `stratum_period` phantoms the last `stratum_run` are drawn from the named strata in turn, the others from
    the natural population; (1, 0) is the natural population alone. `prevalence` is the share of residual tissue in the
    natural part, and None leaves it to the simulator's coin; the strata come with and without it, one half each.
    `without`: strata that are left out. `confusers`: as in `pipeline.phantom`.
    """

    first_seed: int
    pairs: int
    preprocessing: str = "native"
    stratum_period: int = 1
    stratum_run: int = 0
    physics: PhysicsName = "varied"
    prevalence: float | None = None
    without: tuple[str, ...] = ()
    confusers: float = 1.0

    def draw(self, index: int) -> tuple[str | None, bool | None]:
        """Stratum and class of a phantom; None where the simulator draws."""
        turn, place = divmod(index, self.stratum_period)
        late = place - (self.stratum_period - self.stratum_run)
        if late >= 0:
            cycle = [(stratum, residual) for stratum, residual in STRATA_CYCLE if stratum not in self.without]
            return cycle[(turn * self.stratum_run + late) % len(cycle)]
        if self.prevalence is None:
            return None, None
        # Spread evenly over the natural part, so that every piece of it has the same share.
        natural = turn * (self.stratum_period - self.stratum_run) + place
        return None, math.floor((natural + 1) * self.prevalence) > math.floor(natural * self.prevalence)


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    """Preprocessed pairs. P pairs; view 0 is anterior, 1 posterior.

    Attributes
    ----------
    planes: (P, K, 3, edge, edge), memory-mapped: what the network sees before it is standardized; K inputs a pair, one
        where the views are channels, else one for each view; float16, or uint8 where they are pictures.
    labels: (P,), uint8: 1 with residual tissue. strata: (P,), names. uptake_percent: (P,), float32.
    seeds: (P,), int64. total_counts: (P, 2), float32. spacing_mm: (P,), float32.
    masked: (P, 2), bool: whether the mask rule kept GrabCut's mask.
    """

    planes: NDArray[np.float16] | NDArray[np.uint8]
    labels: NDArray[np.uint8]
    strata: NDArray[np.str_]
    uptake_percent: NDArray[np.float32]
    seeds: NDArray[np.int64]
    total_counts: NDArray[np.float32]
    spacing_mm: NDArray[np.float32]
    masked: NDArray[np.bool_]

    @property
    def images(self) -> NDArray[np.float16] | NDArray[np.uint8]:
        """(K P, 3, edge, edge): every input of every pair as an image of its own."""
        return self.planes.reshape(-1, *self.planes.shape[2:])

    @property
    def image_labels(self) -> NDArray[np.uint8]:
        return np.repeat(self.labels, self.planes.shape[1])


def phantom_cohort(
    folder: Path,
    plan: CohortPlan,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    order: Order | None = None,
    outlined: bool = False,
) -> Cohort:
    """The cohort of a plan, from `folder` if it stands there, else built; `progress(done, all)` after each pair.

    `order`: another preprocessing than the plan's named one, for comparing them. `outlined`: whether `masked` is wanted
    where the planes do not need GrabCut, which takes longer than everything else.
    """
    order = ORDERS[plan.preprocessing] if order is None else order
    order = order if outlined else order.without_outline()
    home = folder / _key(plan, order)
    if not home.is_dir():
        part = home.with_name(f".{home.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _build(part, plan, order, processes, progress)
        part.rename(home)
    facts = np.load(home / "facts.npz")
    return Cohort(
        planes=np.load(home / "planes.npy", mmap_mode="r"),
        **{name: facts[name] for name in facts.files},
    )


def _key(plan: CohortPlan, order: Order) -> str:
    digest = hashlib.sha256()
    for module in (phantom_module, preprocess_module, sys.modules[__name__]):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(json.dumps([dataclasses.asdict(plan), dataclasses.asdict(order)]).encode())
    return f"{plan.preprocessing}-{plan.first_seed}-{plan.pairs}-{digest.hexdigest()[:12]}"


def _build(
    part: Path, plan: CohortPlan, order: Order, processes: int, progress: Callable[[int, int], None] | None
) -> None:
    shape = (plan.pairs, 1 if order.joint else len(VIEWS), 3, order.size, order.size)
    kind = np.uint8 if order.standard.scale == 255 else np.float16
    planes = np.lib.format.open_memmap(part / "planes.npy", mode="w+", dtype=kind, shape=shape)
    rows: list[dict[str, Any]] = []
    for index, (pair, row) in enumerate(_pairs(plan, order, processes)):
        planes[index] = pair
        rows.append(row)
        if progress is not None:
            progress(index + 1, plan.pairs)
    planes.flush()
    kinds = {
        "labels": np.uint8,
        "strata": np.str_,
        "uptake_percent": np.float32,
        "seeds": np.int64,
        "total_counts": np.float32,
        "spacing_mm": np.float32,
        "masked": np.bool_,
    }
    columns: dict[str, Any] = {name: np.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    np.savez(part / "facts.npz", **columns)


def _pairs(plan: CohortPlan, order: Order, processes: int) -> Iterator[tuple[NDArray[np.float32], dict[str, Any]]]:
    jobs = ((plan, order, index) for index in range(plan.pairs))
    if processes <= 1:
        yield from map(_pair, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.imap(_pair, jobs, chunksize=8)


def _pair(job: tuple[CohortPlan, Order, int]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    plan, order, index = job
    stratum, residual = plan.draw(index)
    simulated = phantom(
        plan.first_seed + index, stratum=stratum, residual=residual, physics=plan.physics, confusers=plan.confusers
    )
    views = {"anterior": simulated.anterior, "posterior": simulated.posterior}
    scan = prepare_scan(
        {name: (counts.astype(np.float32), simulated.spacing_mm) for name, counts in views.items()}, order
    )
    truth = simulated.truth
    return scan.planes, {
        "labels": truth.residual,
        "strata": truth.stratum,
        "uptake_percent": truth.uptake_percent,
        "seeds": truth.seed,
        "total_counts": [int(counts.sum()) for counts in views.values()],
        "spacing_mm": simulated.spacing_mm[0],
        "masked": [view.mask_rule == "grabcut" for view in scan.views],
    }
