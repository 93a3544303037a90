"""The same file gives the same probability, to the last bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from pipeline.analyse import analyse, load_model
from pipeline.camera import examination, expose
from pipeline.finding import Finding
from pipeline.phantom import phantom
from pipeline.preprocess import prepare, prepare_scan

SHIPPED = "remnant-resnet18-phantom"
_ALONE = """
import sys, pydicom
from pipeline.analyse import analyse, load_model
model = load_model(sys.argv[1])
for _ in range(4):
    print(analyse([pydicom.dcmread(sys.argv[2])], model).probability.hex())
"""


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    (ds,) = expose(phantom(960_007, stratum="uptake_0.03_0.1"), examination(7), "two_frames")
    path = tmp_path / "scan.dcm"
    ds.save_as(path, enforce_file_format=True)
    return path


def test_twenty_analyses_of_one_file_agree_to_the_last_bit_on_one_and_two_threads_and_after_a_restart(
    one_file: Path,
) -> None:
    model = load_model(SHIPPED)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(8):
                outcome = analyse([pydicom.dcmread(one_file)], model)
                assert isinstance(outcome, Finding)
                found.append(outcome.probability.hex())
            assert torch.get_num_threads() == threads, "an analysis changed what its process is set to"
    finally:
        torch.set_num_threads(before)
    again = subprocess.run(
        [sys.executable, "-c", _ALONE, SHIPPED, one_file], check=True, capture_output=True, text=True
    ).stdout.split()
    assert len(found + again) == 20
    assert len(set(found + again)) == 1


def test_the_views_give_the_same_masks_side_by_side_as_one_after_the_other() -> None:
    for seed in range(970_000, 970_006):
        scan = phantom(seed)
        views = {
            name: (counts.astype(np.float32), scan.spacing_mm)
            for name, counts in (("anterior", scan.anterior), ("posterior", scan.posterior))
        }
        together = prepare_scan(views)
        for view, (counts, spacing) in zip(together.views, views.values(), strict=True):
            alone = prepare(counts, spacing)
            assert (view.mask == alone.mask).all()
            assert (view.planes == alone.planes).all()
