"""The paper's experiment on a simulated cohort of its size: `python -m pipeline.simulated_protocol --work DIR`.

446 invented patients, 346 with residual tissue, in the paper's preprocessing; ResNet-18, SqueezeNet and ShuffleNetV2 in
ten random 3:1 groupings (sections 2.4 and 3). ImageNet weights of all three cannot be had everywhere, so that a fair
comparison starts all of them alike: each was first trained on other simulated scans, of other seeds and of a camera
whose physics the cohort never has. SqueezeNet from ImageNet, where its file is given, is an experiment of its own and
takes part in no test.

Everything is resumable: cohorts, pre-training (each epoch) and runs (each network and grouping) are kept in DIR. The
page is written of what there is, and says what is missing: `DIR/page/paper-protocol.md` with its drawings, and
`paper-protocol.json` with each run's figures.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from models.initial import InitialWeights, initial_weights
from models.train import TrainingSettings, train
from pipeline.cohort import Cohort, CohortPlan, phantom_cohort
from pipeline.evaluation_report import Block, Drawing, Table, Text, protocol_blocks
from pipeline.preprocess import IMAGENET, ORDERS, Order
from pipeline.protocol import Protocol, ProtocolData, ProtocolSettings, measures, read_protocol, run_protocol

PRETRAINING: Final = CohortPlan(
    33_000_000,
    1_500,
    preprocessing="paper",
    stratum_period=2,
    stratum_run=1,
    physics="other",
    without=("other_camera",),
    confusers=3.0,
)
PAPER_COHORT: Final = CohortPlan(
    34_000_000, 446, preprocessing="paper", prevalence=346 / 446, without=("other_camera",), confusers=3.0
)
"""Nothing but the natural population, oesophagus, nodes and contamination three times as frequent."""
PRETRAINING_RATES: Final = MappingProxyType({"resnet18": 1e-3, "squeezenet1_1": 2e-4, "shufflenet_v2_x1_0": 1e-3})
"""SqueezeNet has no batch normalisation: from random numbers at 1e-3 it ended with one answer for every scan."""
IMAGENET_ROW: Final = "squeezenet1_1"
PARTS: Final = MappingProxyType(
    {
        "protocol": "All layers trained",
        "head": "Only the head trained",
        "imagenet": "SqueezeNet from ImageNet, all layers trained, outside the comparison",
    }
)
"""Folder of a part -> its title on the page."""
QUICK: Final = dataclasses.replace(
    ORDERS["paper"],
    steps=(
        "bin",
        "field_of_view",
        "crop_as_in_the_paper",
        "smooth_for_grabcut",
        "window",
        "grabcut",
        "mask",
        "equalize",
        "masked_plane",
        "resize_224",
    ),
)
"""The paper's steps, but GrabCut on the native crop and before equalization: a third of a second a pair instead of the
20 and more that the paper's own order takes, and a mask that is empty less often."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is run. `edge`: pictures are averaged down to it; 224 is the paper's. `order`: how pictures are made."""

    pretraining: CohortPlan = PRETRAINING
    cohort: CohortPlan = PAPER_COHORT
    order: Order = ORDERS["paper"]
    edge: int = 224
    pretraining_epochs: int = 6
    settings: ProtocolSettings = dataclasses.field(default_factory=lambda: ProtocolSettings(curve_every=8))


def pretrain(
    experiment: Experiment, architecture: str, images: NDArray[Any], labels: NDArray[np.uint8], work: Path
) -> InitialWeights:
    """One network trained on the other camera's pictures (N, 3, edge, edge), from random numbers; kept in `work`."""
    settings = TrainingSettings(
        architecture=architecture,
        stages=((experiment.pretraining_epochs, experiment.edge),),
        batch_size=32,
        learning_rate=PRETRAINING_RATES[architecture],
        scale=IMAGENET.scale,
        mean=IMAGENET.mean,
        std=IMAGENET.std,
    )
    path = work / "pretrained" / f"{architecture}.safetensors"
    if not path.exists():
        network = train(images, labels, settings, checkpoint=work / "pretrained" / f"{architecture}.pt")
        part = path.with_name(f".{path.name}.part")
        state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
        safetensors.torch.save_file(state, part)
        part.replace(path)
    start = initial_weights(architecture, str(path))
    told = (
        f"our pre-training on {experiment.pretraining.pairs} simulated scans of another camera "
        f"({experiment.pretraining_epochs} epochs, learning rate {settings.learning_rate:g}, from random numbers)"
    )
    return dataclasses.replace(start, description=told)


def run(
    work: Path,
    experiment: Experiment,
    processes: int,
    say: Callable[[str], None],
    *,
    imagenet_squeezenet: Path | None = None,
    squeezenet_groupings: int | None = None,
) -> Path:
    """All that `work` does not hold yet. Returns the path of the page. Raises what `run_protocol` raises.

    `imagenet_squeezenet`: ImageNet's weights of SqueezeNet, for the row of its own; `squeezenet_groupings`: of that
    row, as many as of the others where None.
    """
    say(f"cohort: {experiment.cohort.pairs} simulated scans")
    cohort = phantom_cohort(work / "cohorts", experiment.cohort, processes=processes, order=experiment.order)
    say(f"pre-training cohort: {experiment.pretraining.pairs} simulated scans of another camera")
    other = phantom_cohort(work / "cohorts", experiment.pretraining, processes=processes, order=experiment.order)
    images = averaged(other.images, experiment.edge)
    starts = {}
    for name in experiment.settings.architectures:
        say(f"pre-training {name}")
        starts[name] = pretrain(experiment, name, images, other.image_labels, work)
    data = protocol_data(cohort, experiment.edge)

    def progress(told: str, done: int, whole: int) -> None:
        if done % experiment.settings.epochs == 0:
            say(f"{told}: {done} of {whole} epochs")

    head = dataclasses.replace(experiment.settings, frozen=True, curve_every=experiment.settings.curve_every * 2)
    run_protocol(data, head, starts, work / "head", progress=progress)
    if imagenet_squeezenet is not None:
        groupings = squeezenet_groupings or experiment.settings.groupings
        alone = dataclasses.replace(experiment.settings, architectures=(IMAGENET_ROW,), groupings=groupings)
        given = initial_weights(IMAGENET_ROW, str(imagenet_squeezenet), seed=experiment.settings.seed)
        given = dataclasses.replace(given, description=f"ImageNet ({imagenet_squeezenet.name})")
        run_protocol(data, alone, {IMAGENET_ROW: given}, work / "imagenet", progress=progress)
    run_protocol(data, experiment.settings, starts, work / "protocol", progress=progress)
    return write_page(work, experiment)


def protocol_data(cohort: Cohort, edge: int) -> ProtocolData:
    """The cohort for the experiment; every simulated scan is a patient of its own."""
    planes = averaged(cohort.planes.reshape(-1, *cohort.planes.shape[2:]), edge)
    return ProtocolData(
        planes=planes.reshape(*cohort.planes.shape[:3], edge, edge),
        labels=np.asarray(cohort.labels),
        patients=tuple(f"seed {seed}" for seed in cohort.seeds),
        description=(
            f"{len(cohort.labels)} simulated scans of as many invented patients (synthetic; nothing clinical), "
            f"{int(cohort.labels.sum())} with residual tissue, pictures of {edge} x {edge}"
        ),
        synthetic=True,
    )


def averaged(images: NDArray[Any], edge: int) -> NDArray[Any]:
    """(N, C, S, S) -> (N, C, edge, edge), in whole blocks. Raises `ValueError` where S is no multiple of it."""
    size = images.shape[-1]
    if size % edge:
        raise ValueError(f"{edge} does not divide {size}")
    if size == edge:
        return np.asarray(images)
    block = size // edge
    means = np.asarray(images).reshape(*images.shape[:-2], edge, block, edge, block).mean(axis=(-3, -1))
    return np.asarray(np.rint(means) if images.dtype == np.uint8 else means, images.dtype)


# The page ---------------------------------------------------------------------------------------------------------


def write_page(work: Path, experiment: Experiment) -> Path:
    """The page of what was run so far, drawings beside it, and each run's figures."""
    page = work / "page"
    page.mkdir(parents=True, exist_ok=True)
    protocols = {name: read_protocol(work / name) for name in PARTS if (work / name).is_dir()}
    blocks: list[Block] = [
        Text(
            "banner",
            "SYNTHETIC: every scan was simulated. These figures say nothing about accuracy on patients, nor which "
            "network is better on them.",
        ),
        Text("paragraph", _how(experiment)),
    ]
    for name, protocol in protocols.items():
        blocks += [Text("heading", PARTS[name]), *protocol_blocks(protocol)[1:]]
    lines = ["# The paper's experiment on simulated scans", ""]
    drawings = 0
    for block in blocks:
        if isinstance(block, Drawing):
            drawings += 1
            (page / f"paper-protocol-{drawings}.svg").write_bytes(block.svg)
        lines += [*_markdown(block, drawings), ""]
    (page / "paper-protocol.json").write_text(json.dumps(_runs(protocols), indent=1) + "\n", encoding="utf-8")
    path = page / "paper-protocol.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _how(experiment: Experiment) -> str:
    other, cohort = experiment.pretraining, experiment.cohort
    scaled = "" if experiment.edge == 224 else f" (the paper's 224 x 224 averaged down to {experiment.edge}, for time)"
    steps = (
        "preprocessing `paper`"
        if experiment.order == ORDERS["paper"]
        else "the steps of preprocessing `paper`, but GrabCut on the native crop and before equalization, for time"
    )
    return (
        f"Cohort: {cohort.pairs} phantoms, seeds from {cohort.first_seed:,}, natural population with other uptake "
        f"{cohort.confusers:g} times as frequent; {steps}; each view a picture of its own{scaled}. "
        f"Pre-training of all networks: {other.pairs} phantoms, seeds from {other.first_seed:,}, of a camera with "
        f"other pixels, resolution, sensitivity and scatter; {experiment.pretraining_epochs} epochs from random "
        "numbers. Made by `python -m pipeline.simulated_protocol`, which also goes on with what is missing."
    )


def _runs(protocols: Mapping[str, Protocol]) -> list[dict[str, Any]]:
    return [
        {"experiment": name, "network": run.architecture, "grouping": run.grouping + 1, "start": run.start}
        | {"start_sha256": run.start_sha256, "learning_rate": run.learning_rate, "seconds": run.seconds}
        | {measure: round(value, 6) for measure, value in measures(run).items()}
        for name, protocol in protocols.items()
        for run in protocol.runs
    ]


def _markdown(block: Block, drawing: int) -> Sequence[str]:
    if isinstance(block, Drawing):
        return (f"![{block.caption}](paper-protocol-{drawing}.svg)", "", block.caption)
    if isinstance(block, Table):
        head = block.head or ("",) * len(block.rows[0])
        rows = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *block.rows)]
        return (f"**{block.caption}**", "", *rows, *(("", block.note) if block.note else ()))
    shape = MappingProxyType({"heading": "## {}", "banner": "**{}**", "paragraph": "{}"})
    return (shape[block.kind].format(block.text),)


def main() -> None:
    default = Experiment()
    parser = argparse.ArgumentParser(description="The paper's experiment on simulated scans.")
    parser.add_argument("--work", type=Path, required=True, help="folder for cohorts, runs and the page")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--edge", type=int, default=default.edge, help="pixels of a picture's edge; the paper's are 224"
    )
    parser.add_argument("--quick", action="store_true", help="GrabCut on the native crop, not on 800 x 750 pixels")
    parser.add_argument("--groupings", type=int, default=default.settings.groupings)
    parser.add_argument("--squeezenet", type=Path, help="ImageNet's weights of SqueezeNet, for a row of its own")
    parser.add_argument("--squeezenet-groupings", type=int, help="groupings of that row")
    parser.add_argument("--only-page", action="store_true", help="write the page of what is there")
    arguments = parser.parse_args()
    experiment = dataclasses.replace(
        default,
        edge=arguments.edge,
        order=QUICK if arguments.quick else default.order,
        settings=dataclasses.replace(default.settings, groupings=arguments.groupings),
    )
    if arguments.only_page:
        sys.stdout.write(f"{write_page(arguments.work, experiment)}\n")
        return

    def say(line: str) -> None:
        print(datetime.now(UTC).strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)

    path = run(
        arguments.work,
        experiment,
        arguments.processes,
        say,
        imagenet_squeezenet=arguments.squeezenet,
        squeezenet_groupings=arguments.squeezenet_groupings,
    )
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
