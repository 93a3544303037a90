"""The paper's experiment (sections 2.4, 3.1 to 3.3): each network trained on random 3:1 groupings, and compared.

`run_protocol` trains and keeps one file a network and grouping, so that an interrupted run goes on where it stopped; a
file of other settings, data or start is refused, never mixed in. `read_protocol` reads them back, `performance`,
`ranks` and `areas` make Table 4, Figure 10 and the tests from them. All networks see the same groupings, drawn from
patients and not from images. It works on arrays, from simulated scans and from a hospital's alike: shapes below.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from models import metrics
from models.initial import InitialWeights
from models.train import EpochReport, TrainingSettings, logits, train
from pipeline.hospital_cohort import divide
from pipeline.preprocess import IMAGENET, Standard

PAPER_NETWORKS: Final = ("resnet18", "squeezenet1_1", "shufflenet_v2_x1_0")
PAPER_LEARNING_RATE: Final = 1e-5
RANDOM_LEARNING_RATE: Final = 1e-3
MEASURES: Final = ("accuracy", "sensitivity", "specificity", "precision", "f1", "auc")
SCHEMA: Final = 1

Progress = Callable[[str, int, int], None]
"""Called after each epoch: what is being done, epochs done, epochs in all."""


class ProtocolError(Exception):
    """The experiment cannot run or go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class ProtocolData:
    """Prepared scans. P scans of K network inputs each (`paper`: one a view; `native`: one with both views).

    `planes`: (P, K, 3, S, S), as `models.train.train` takes images; `labels`: (P,), 1 with residual tissue;
    `patients`: (P,), whose scan it is, any names; `description`: which scans these are, in words; `synthetic`: whether
    any of them is simulated; `standard`: what makes planes the network's inputs.
    """

    planes: NDArray[Any]
    labels: NDArray[np.uint8]
    patients: tuple[str, ...]
    description: str
    synthetic: bool
    standard: Standard = IMAGENET


@dataclass(frozen=True, slots=True)
class ProtocolSettings:
    """How to run it; the defaults are the paper's where the paper says.

    `learning_rate`: None takes the paper's 1e-5 for a pre-trained start and 1e-3 for random numbers, which 1e-5 cannot
    move in 80 epochs. `frozen`: train only the new head. `flip`, `shift`: augmentation, of which the paper says
    nothing. `curve_every`: training and test are measured after every so many epochs, and after the last one.
    """

    architectures: tuple[str, ...] = PAPER_NETWORKS
    groupings: int = 10
    test_share: float = 0.25
    epochs: int = 80
    batch_size: int = 16
    learning_rate: float | None = None
    frozen: bool = False
    flip: bool = False
    shift: int = 0
    seed: int = 131
    curve_every: int = 1

    def rate_for(self, start: InitialWeights) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return PAPER_LEARNING_RATE if start.pretrained else RANDOM_LEARNING_RATE


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """After an epoch (1-based): mean cross-entropy and share of right calls of single network inputs."""

    epoch: int
    training_loss: float
    training_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True, slots=True)
class Run:
    """One network on one grouping (0-based).

    `training`, `testing`: places in the data; `labels`: of the tested scans; `logits`: one row a tested scan, one
    column a network input, evidence for residual tissue.
    """

    architecture: str
    grouping: int
    start: str
    start_sha256: str
    pretrained: bool
    learning_rate: float
    training: tuple[int, ...]
    testing: tuple[int, ...]
    training_residual: int
    labels: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]
    curve: tuple[CurvePoint, ...]
    seconds: float
    device: str

    @property
    def scores(self) -> NDArray[np.float64]:
        """(tested scans,): mean logit of a scan's inputs; "present" from 0 up, which is Softmax's greater half."""
        return np.array([math.fsum(row) / len(row) for row in self.logits])


@dataclass(frozen=True, slots=True)
class Protocol:
    """What was run: `runs` sorted by the order of `settings["architectures"]` and by grouping."""

    settings: Mapping[str, Any]
    description: str
    synthetic: bool
    scans: int
    residual: int
    patients: int
    runs: tuple[Run, ...]

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.architecture for run in self.runs))

    def of(self, architecture: str) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.architecture == architecture)

    @property
    def missing(self) -> tuple[tuple[str, int], ...]:
        """(architecture, grouping) that were asked for and are not there yet."""
        there = {(run.architecture, run.grouping) for run in self.runs}
        asked = [(name, n) for name in self.settings["architectures"] for n in range(self.settings["groupings"])]
        return tuple(one for one in asked if one not in there)


def run_protocol(
    data: ProtocolData,
    settings: ProtocolSettings,
    starts: Mapping[str, InitialWeights],
    out: Path,
    *,
    progress: Progress | None = None,
) -> Protocol:
    """Train every network of `settings.architectures` on every grouping that `out` does not hold yet.

    `starts`: for each architecture what it starts from. Groupings go outermost, so that an interrupted run has compared
    all networks on the groupings it reached. Raises `ProtocolError`, `pipeline.hospital_cohort.CohortError` for a
    cohort too small to be divided, `models.train.TrainingError`.
    """
    _check(data, settings, starts)
    divisions = divide(data.labels == 1, data.patients, settings.groupings, settings.seed, settings.test_share)
    prints = {name: _fingerprint(data, settings, name, starts[name]) for name in settings.architectures}
    _keep_head(out, data, settings)
    whole = len(settings.architectures) * settings.groupings * settings.epochs
    done = 0
    for number, division in enumerate(divisions):
        for name in settings.architectures:
            path = _path(out, name, number)
            if path.exists():
                _owned(path, prints[name])
            else:
                told = f"{name}, grouping {number + 1} of {settings.groupings}"
                before = done

                def tell(epoch: int, told: str = told, before: int = before) -> None:
                    if progress is not None:
                        progress(told, before + epoch, whole)

                run = _run(data, settings, name, starts[name], number, division.training, division.testing, tell)
                _write(path, {"schema": SCHEMA, "fingerprint": prints[name]} | dataclasses.asdict(run))
            done += settings.epochs
            if progress is not None:
                progress(f"{name}, grouping {number + 1} of {settings.groupings}", done, whole)
    return read_protocol(out)


def read_protocol(out: Path) -> Protocol:
    """What stands in the folder of a run, finished or not. Raises `ProtocolError` where it is none."""
    head = _read(out / "protocol.json")
    runs = []
    for name in head["settings"]["architectures"]:
        for number in range(head["settings"]["groupings"]):
            path = _path(out, name, number)
            if path.exists():
                runs.append(_as_run(_read(path), path))
    return Protocol(
        head["settings"], head["description"], head["synthetic"], head["scans"], head["residual"], head["patients"],
        tuple(runs),
    )  # fmt: skip


# What the runs say ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over groupings: mean and standard deviation (n - 1) of those where it is defined."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        known = [value for value in self.values if math.isfinite(value)]
        return math.fsum(known) / len(known) if known else math.nan

    @property
    def deviation(self) -> float:
        known = [value for value in self.values if math.isfinite(value)]
        return float(np.std(known, ddof=1)) if len(known) > 1 else math.nan


def measures(run: Run) -> dict[str, float]:
    """`MEASURES` of one run on its test scans, residual tissue being positive, called where the logit is 0 or more."""
    called = metrics.confusion(run.labels, run.scores, 0.0)
    found = {name: float(getattr(called, name)) for name in MEASURES if name != "auc"}
    return found | {"auc": metrics.roc_auc(run.labels, run.scores)}


def performance(protocol: Protocol, architecture: str) -> dict[str, Spread]:
    """Table 4 of the paper, for one network."""
    each = [measures(run) for run in protocol.of(architecture)]
    return {name: Spread(tuple(one[name] for one in each)) for name in MEASURES}


def ranks(protocol: Protocol, first: str, second: str) -> dict[str, metrics.RankComparison | None]:
    """Mann-Whitney U of each measure between two networks' groupings; None where it is not defined."""
    one, other = performance(protocol, first), performance(protocol, second)
    found: dict[str, metrics.RankComparison | None] = {}
    for name in MEASURES:
        try:
            found[name] = metrics.mann_whitney(one[name].values, other[name].values)
        except metrics.MetricsError:
            found[name] = None
    return found


@dataclass(frozen=True, slots=True)
class Areas:
    """DeLong's test between two networks on the same test scans.

    `each`: for each grouping that both were trained on, None where it is not defined; `together`: on all tested scans
    at once, each scored by the mean of its logits over the groupings that tested it, so that no scan counts twice.
    """

    each: tuple[metrics.AreaComparison | None, ...]
    together: metrics.AreaComparison | None


def areas(protocol: Protocol, first: str, second: str) -> Areas:
    """DeLong, grouping by grouping and together. Patients with several scans make p too small."""
    others = {run.grouping: run for run in protocol.of(second)}
    pairs = [(run, others[run.grouping]) for run in protocol.of(first) if run.grouping in others]
    each = tuple(_compared(one.labels, one.scores, other.scores) for one, other in pairs)
    if not pairs:
        return Areas((), None)
    labels, one_scores = pooled([one for one, _ in pairs])
    _, other_scores = pooled([other for _, other in pairs])
    return Areas(each, _compared(labels, one_scores, other_scores))


def pooled(runs: Sequence[Run]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Labels and mean logits (scans that were tested at all,), each scan once, in the order of the data."""
    found: dict[int, list[float]] = {}
    label: dict[int, int] = {}
    for run in runs:
        for place, truth, score in zip(run.testing, run.labels, run.scores, strict=True):
            found.setdefault(place, []).append(float(score))
            label[place] = truth
    places = sorted(found)
    return (
        np.array([label[place] for place in places], np.uint8),
        np.array([math.fsum(found[place]) / len(found[place]) for place in places]),
    )


def _compared(
    labels: Sequence[int] | NDArray[np.uint8], one: NDArray[np.float64], other: NDArray[np.float64]
) -> metrics.AreaComparison | None:
    try:
        return metrics.compare_areas(labels, one, other)
    except metrics.MetricsError:
        return None


# One run ----------------------------------------------------------------------------------------------------------


def _run(
    data: ProtocolData,
    settings: ProtocolSettings,
    architecture: str,
    start: InitialWeights,
    number: int,
    training: tuple[int, ...],
    testing: tuple[int, ...],
    tell: Callable[[int], None],
) -> Run:
    inputs = data.planes.shape[1]
    images, labels = _images(data, training)
    test_images, test_labels = _images(data, testing)
    how = training_settings(settings, architecture, start, data, seed=settings.seed + number)
    curve: list[CurvePoint] = []
    devices: set[str] = set()

    def after_epoch(report: EpochReport, network: torch.nn.Module) -> None:
        device = next(network.parameters()).device
        devices.add(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU")
        if report.epoch % settings.curve_every == 0 or report.epoch == report.epochs:
            seen, unseen = logits(network, images, how), logits(network, test_images, how)
            curve.append(
                CurvePoint(report.epoch, *_loss_and_accuracy(seen, labels), *_loss_and_accuracy(unseen, test_labels))
            )
        tell(report.epoch)

    begun = time.monotonic()
    network = train(images, labels, how, initial=start.state, after_epoch=after_epoch)
    seconds = time.monotonic() - begun
    found = logits(network, test_images, how).astype(float).reshape(len(testing), inputs)
    return Run(
        architecture=architecture,
        grouping=number,
        start=start.description,
        start_sha256=start.sha256,
        pretrained=start.pretrained,
        learning_rate=how.learning_rate,
        training=training,
        testing=testing,
        training_residual=int(data.labels[list(training)].sum()),
        labels=tuple(int(label) for label in data.labels[list(testing)]),
        logits=tuple(tuple(float(value) for value in row) for row in found),
        curve=tuple(curve),
        seconds=round(seconds, 1),
        device=", ".join(sorted(devices)),
    )


def training_settings(
    settings: ProtocolSettings, architecture: str, start: InitialWeights, data: ProtocolData, *, seed: int
) -> TrainingSettings:
    """How `models.train` trains one network of the experiment; the learning rate stays as it is, as in the paper."""
    return TrainingSettings(
        architecture=architecture,
        stages=((settings.epochs, data.planes.shape[-1]),),
        batch_size=settings.batch_size,
        learning_rate=settings.rate_for(start),
        schedule="constant",
        frozen="backbone" if settings.frozen else "none",
        seed=seed,
        flip=settings.flip,
        shift=settings.shift,
        scale=data.standard.scale,
        mean=data.standard.mean,
        std=data.standard.std,
    )


def _images(data: ProtocolData, places: Sequence[int]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Every input of these scans as an image of its own, and its label."""
    chosen = np.asarray(data.planes[list(places)])
    images = chosen.reshape(-1, *chosen.shape[2:])
    return images, np.repeat(data.labels[list(places)], chosen.shape[1])


def _loss_and_accuracy(found: NDArray[np.float32], labels: NDArray[np.uint8]) -> tuple[float, float]:
    signed = np.where(labels == 1, found, -found).astype(np.float64)
    return float(np.logaddexp(0.0, -signed).mean()), float(((found >= 0) == (labels == 1)).mean())


# Files ------------------------------------------------------------------------------------------------------------


def _check(data: ProtocolData, settings: ProtocolSettings, starts: Mapping[str, InitialWeights]) -> None:
    shape = data.planes.shape
    if len(shape) != 5 or shape[2] != 3 or shape[0] != len(data.labels) or not len(data.labels):
        raise ProtocolError(f"planes of shape {shape}; needed are (scans, inputs, 3, edge, edge), one label a scan")
    if len(data.patients) != len(data.labels):
        raise ProtocolError("every scan needs a patient")
    if lacking := [name for name in settings.architectures if name not in starts]:
        raise ProtocolError(f"nothing says what {', '.join(lacking)} starts from")
    if not settings.architectures or settings.epochs < 1 or settings.curve_every < 1:
        raise ProtocolError("needed are at least one network, one epoch, and a curve of every first epoch or more")


def _fingerprint(data: ProtocolData, settings: ProtocolSettings, architecture: str, start: InitialWeights) -> str:
    """What a kept run must agree in to count: everything but how many networks and groupings were asked for."""
    digest = hashlib.sha256()
    facts = dataclasses.asdict(settings) | {"architectures": architecture, "groupings": None}
    facts["learning_rate"] = settings.rate_for(start)
    digest.update(
        json.dumps(
            [facts, data.planes.shape, str(data.planes.dtype), data.patients, dataclasses.astuple(data.standard)]
        ).encode()
    )
    digest.update(np.ascontiguousarray(data.labels).tobytes())
    for scan in data.planes:
        digest.update(np.ascontiguousarray(scan).tobytes())
    for key, tensor in (start.state or {}).items():
        digest.update(key.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _keep_head(out: Path, data: ProtocolData, settings: ProtocolSettings) -> None:
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProtocolError(f"{out} cannot be written: {error.strerror}") from error
    _write(
        out / "protocol.json",
        {
            "schema": SCHEMA,
            "settings": dataclasses.asdict(settings),
            "description": data.description,
            "synthetic": data.synthetic,
            "scans": len(data.labels),
            "residual": int(data.labels.sum()),
            "patients": len(set(data.patients)),
        },
    )


def _owned(path: Path, fingerprint: str) -> None:
    if _read(path)["fingerprint"] != fingerprint:
        raise ProtocolError(
            f"{path.name} was made with other settings, other scans or another start; choose another folder"
        )


def _path(out: Path, architecture: str, grouping: int) -> Path:
    return out / "runs" / f"{architecture}-{grouping + 1:02d}.json"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProtocolError(f"there is no run to be read: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ProtocolError(f"{path.name} is not whole; delete it, and run again") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ProtocolError(f"{path.name} was not written by this version; choose another folder")
    return content


def _as_run(content: Mapping[str, Any], path: Path) -> Run:
    try:
        values = {field.name: content[field.name] for field in dataclasses.fields(Run)}
        values["curve"] = tuple(CurvePoint(**point) for point in content["curve"])
    except (KeyError, TypeError) as error:
        raise ProtocolError(f"{path.name} is not a run of this version; delete it, and run again") from error
    for name in ("training", "testing", "labels"):
        values[name] = tuple(values[name])
    values["logits"] = tuple(tuple(row) for row in values["logits"])
    return Run(**values)
