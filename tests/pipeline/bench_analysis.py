"""`make bench`: two views from datasets to finding, and where the time goes; beside it the paper's preprocessing.

A benchmark, not a test: nothing fails here, and on a shared machine the minimum tells most. No weights exist for the
paper's preprocessing, so of that only the images are made; the network would come on top.
"""

import statistics
import time

import numpy as np

from pipeline.analyse import analyse, load_model
from pipeline.beside import with_details
from pipeline.camera import examination, expose
from pipeline.finding import Finding
from pipeline.phantom import phantom
from pipeline.preprocess import ORDERS, prepare_scan

ROUNDS = 20
PAPER_ROUNDS = 2


def test_two_views_to_a_finding_and_each_steps_share() -> None:
    model = load_model("remnant-resnet18-phantom")
    took: list[float] = []
    steps: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        (ds,) = expose(phantom(980_000 + number), examination(8000 + number), "two_frames")
        started = time.perf_counter()
        outcome = analyse([ds], model)
        assert isinstance(outcome, Finding)
        outcome = with_details(outcome, (ds,))
        took.append(1000 * (time.perf_counter() - started))
        for name, spent in outcome.timings_ms.items():
            steps.setdefault(name, []).append(spent)
    paper: list[float] = []
    for number in range(PAPER_ROUNDS):
        scan = phantom(980_000 + number)
        views = {
            name: (counts.astype(np.float32), scan.spacing_mm)
            for name, counts in (("anterior", scan.anterior), ("posterior", scan.posterior))
        }
        started = time.perf_counter()
        prepare_scan(views, ORDERS["paper"])
        paper.append(1000 * (time.perf_counter() - started))
    print(f"\nnative, two views to a finding with foci, n = {ROUNDS}, ms: median {statistics.median(took):.0f},"
          f" fastest {min(took):.0f}, slowest {max(took):.0f}")  # fmt: skip
    shares = ", ".join(f"{name} {statistics.median(spent):.0f}" for name, spent in steps.items() if name != "total")
    print(f"  of it, medians: {shares}")
    print(f"paper, two views to the network's images alone, n = {PAPER_ROUNDS}, ms: fastest {min(paper):.0f};"
          f" {min(paper) / min(took):.0f} times native's whole analysis")  # fmt: skip
