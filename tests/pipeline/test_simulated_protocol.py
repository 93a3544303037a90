"""The paper's experiment on simulated scans, small: everything is run, nothing is measured that would mean anything."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.torchvision_cpu import torchvision_models
from pipeline.cohort import CohortPlan
from pipeline.protocol import ProtocolSettings
from pipeline.simulated_protocol import PAPER_COHORT, PRETRAINING, QUICK, Experiment, averaged, run, write_page

SMALL = Experiment(
    pretraining=CohortPlan(33_500_000, 12, preprocessing="paper", physics="other", prevalence=0.5),
    cohort=CohortPlan(34_500_000, 16, preprocessing="paper", prevalence=0.75),
    order=QUICK,
    edge=56,
    pretraining_epochs=1,
    settings=ProtocolSettings(architectures=("squeezenet1_1", "shufflenet_v2_x1_0"), groupings=2, epochs=1),
)


def test_the_cohort_has_the_papers_numbers_and_shares_neither_seed_nor_camera_with_the_pre_training() -> None:
    classes = [PAPER_COHORT.draw(index)[1] for index in range(PAPER_COHORT.pairs)]
    assert (classes.count(True), classes.count(False)) == (346, 100)
    seeds = [{plan.first_seed + index for index in range(plan.pairs)} for plan in (PAPER_COHORT, PRETRAINING)]
    assert not seeds[0] & seeds[1]
    assert (PAPER_COHORT.physics, PRETRAINING.physics) == ("varied", "other")


def test_networks_start_alike_are_compared_and_the_page_says_what_was_run(tmp_path: Path) -> None:
    said: list[str] = []
    page = run(tmp_path, SMALL, 1, said.append)
    text = page.read_text(encoding="utf-8")
    assert "SYNTHETIC" in text
    assert "Table 4" in text
    assert "Mann-Whitney U" in text
    assert "DeLong" in text
    assert text.count("4 of 4 trainings were run") == 2
    assert "only the head trained" in text
    assert "averaged down to 56" in text
    assert all((page.parent / f"paper-protocol-{number}.svg").read_bytes() for number in (1, 2, 3, 4))
    runs = json.loads((page.parent / "paper-protocol.json").read_text(encoding="utf-8"))
    assert [(one["experiment"], one["network"], one["grouping"]) for one in runs] == [
        (part, name, grouping)
        for part in ("protocol", "head")
        for name in SMALL.settings.architectures
        for grouping in (1, 2)
    ]
    assert {one["learning_rate"] for one in runs} == {1e-5}
    assert all("pre-training on 12 simulated scans of another camera" in one["start"] for one in runs)

    # Asked again for less or the same, nothing is trained anew; for more, the page says what is missing.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "protocol" / "runs").iterdir()}
    run(tmp_path, SMALL, 1, said.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    head = tmp_path / "protocol" / "protocol.json"
    content = json.loads(head.read_text(encoding="utf-8"))
    content["settings"]["groupings"] = 3
    head.write_text(json.dumps(content), encoding="utf-8")
    assert "NOT RUN YET: squeezenet1_1 3, shufflenet_v2_x1_0 3" in write_page(tmp_path, SMALL).read_text("utf-8")


def test_imagenets_squeezenet_is_a_row_of_its_own(tmp_path: Path) -> None:
    stand_in = tmp_path / "squeezenet1_1.safetensors"
    with torch.random.fork_rng():
        save_file(torchvision_models().squeezenet1_1(weights=None).state_dict(), stand_in)
    small = dataclasses.replace(
        SMALL, settings=dataclasses.replace(SMALL.settings, architectures=("squeezenet1_1",), groupings=1)
    )
    text = run(tmp_path, small, 1, lambda _: None, imagenet_squeezenet=stand_in).read_text("utf-8")
    own, alone = text.split("## SqueezeNet from ImageNet, all layers trained, outside the comparison")
    assert "ImageNet (" in alone
    assert "ImageNet (" not in own


def test_pictures_are_averaged_in_whole_blocks() -> None:
    picture = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    assert averaged(picture, 2).tolist() == [[[[2, 4], [10, 12]]]]
    with pytest.raises(ValueError, match="3 does not divide 4"):
        averaged(picture, 3)
