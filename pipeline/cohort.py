"""Labelled cohorts for training and measuring: phantoms, preprocessed once and cached on disk as arrays.

A cohort is built in one folder under a key that holds the seeds, the preprocessing and the source of the simulator and
of the preprocessing, so that a change in either builds anew. A cohort that was interrupted is built again; one that
stands is complete, because its folder gets its name last.
"""

import hashlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline import phantom as phantom_module
from pipeline import preprocess as preprocess_module
from pipeline.phantom import STRATA, phantom
from pipeline.preprocess import SIZE, prepare

VIEWS = ("anterior", "posterior")


@dataclass(frozen=True, slots=True)
class CohortPlan:
    """Which phantoms: `seeds` first to first + pairs - 1.

    Of every `stratum_period` phantoms the last `stratum_run` are drawn from the named strata in turn, the others from
    the natural population; (1, 0) is the natural population alone.
    """

    first_seed: int
    pairs: int
    preprocessing: str = "native"
    stratum_period: int = 1
    stratum_run: int = 0

    def stratum(self, index: int) -> str | None:
        turn, place = divmod(index, self.stratum_period)
        late = place - (self.stratum_period - self.stratum_run)
        return STRATA[(turn * self.stratum_run + late) % len(STRATA)] if late >= 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    """Preprocessed pairs. P pairs; view 0 is anterior, 1 posterior.

    Attributes
    ----------
    planes: (P, 2, 3, 224, 224), uint8, memory-mapped: what the network sees before it is standardized.
    labels: (P,), uint8: 1 with residual tissue. strata: (P,), names. uptake_percent: (P,), float32.
    seeds: (P,), int64. total_counts: (P, 2), float32. spacing_mm: (P,), float32.
    masked: (P, 2), bool: whether the mask rule kept GrabCut's mask.
    """

    planes: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    strata: NDArray[np.str_]
    uptake_percent: NDArray[np.float32]
    seeds: NDArray[np.int64]
    total_counts: NDArray[np.float32]
    spacing_mm: NDArray[np.float32]
    masked: NDArray[np.bool_]

    @property
    def images(self) -> NDArray[np.uint8]:
        """(2P, 3, 224, 224): both views of each pair as separate images."""
        return self.planes.reshape(-1, *self.planes.shape[2:])

    @property
    def image_labels(self) -> NDArray[np.uint8]:
        return np.repeat(self.labels, len(VIEWS))


def phantom_cohort(
    folder: Path,
    plan: CohortPlan,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Cohort:
    """The cohort of a plan, from `folder` if it stands there, else built; `progress(done, all)` after each pair."""
    home = folder / _key(plan)
    if not home.is_dir():
        part = home.with_name(f".{home.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _build(part, plan, processes, progress)
        part.rename(home)
    facts = np.load(home / "facts.npz")
    return Cohort(
        planes=np.load(home / "planes.npy", mmap_mode="r"),
        **{name: facts[name] for name in facts.files},
    )


def _key(plan: CohortPlan) -> str:
    digest = hashlib.sha256()
    for module in (phantom_module, preprocess_module, sys.modules[__name__]):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(json.dumps([getattr(plan, name) for name in plan.__slots__]).encode())
    return f"{plan.preprocessing}-{plan.first_seed}-{plan.pairs}-{digest.hexdigest()[:12]}"


def _build(part: Path, plan: CohortPlan, processes: int, progress: Callable[[int, int], None] | None) -> None:
    shape = (plan.pairs, len(VIEWS), 3, SIZE, SIZE)
    planes = np.lib.format.open_memmap(part / "planes.npy", mode="w+", dtype=np.uint8, shape=shape)
    rows: list[dict[str, Any]] = []
    for index, (pair, row) in enumerate(_pairs(plan, processes)):
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


def _pairs(plan: CohortPlan, processes: int) -> Iterator[tuple[NDArray[np.uint8], dict[str, Any]]]:
    jobs = ((plan, index) for index in range(plan.pairs))
    if processes <= 1:
        yield from map(_pair, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.imap(_pair, jobs, chunksize=8)


def _pair(job: tuple[CohortPlan, int]) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    plan, index = job
    simulated = phantom(plan.first_seed + index, stratum=plan.stratum(index))
    views = [
        prepare(counts.astype(np.float32), simulated.spacing_mm, preprocessing=plan.preprocessing)
        for counts in (simulated.anterior, simulated.posterior)
    ]
    truth = simulated.truth
    return np.stack([view.planes for view in views]), {
        "labels": truth.residual,
        "strata": truth.stratum,
        "uptake_percent": truth.uptake_percent,
        "seeds": truth.seed,
        "total_counts": [int(counts.sum()) for counts in (simulated.anterior, simulated.posterior)],
        "spacing_mm": simulated.spacing_mm[0],
        "masked": [view.mask_rule == "grabcut" for view in views],
    }
