"""The one entry to the method: the datasets of one acquisition in, a `Finding` or a `Declined` out.

Used by the worker, the command line, evaluation and tests alike, so that all of them get the same answer: equal pixels,
weights and preprocessing give an equal probability, bit for bit, on one machine. A fault of the input never raises; it
ends in `Declined` with a reason of the closed list. What raises is a fault of ours: weights that do not belong to the
preprocessing (`WrongPreprocessing`), weights that are not what their record says (`models.weights.WeightsError`).
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom import Dataset

from models.architectures import judged
from models.embedding import distance
from models.weights import LoadedModel, WeightsRecord, load
from pipeline.explain import attribution, native_activation
from pipeline.finding import Declined, Finding, ModelFacts, Verdict, ViewFinding, ViewImage, ViewName
from pipeline.preprocess import (
    ORDERS,
    PREPROCESSING_VERSION,
    SEED,
    Order,
    Prepared,
    Standard,
    prepare_scan,
    standardize,
    without_view,
)
from pipeline.quality import problem_of
from pipeline.quantify import area_mm2, box_outline, main_component, outline, remnant_to_background
from pipeline.reasons import REASONS
from pipeline.views import UnusableScan, view_images

BOTH_VIEWS: Final[tuple[ViewName, ...]] = ("anterior", "posterior")


class WrongPreprocessing(Exception):  # noqa: N818  named for what it says, like the rest of the pipeline's exceptions
    """These weights were trained on other preprocessing than was asked for; the message says which."""


def load_model(weights: str) -> LoadedModel:
    """The network of a shipped name or a record's path, verified; raises `models.weights.WeightsError`."""
    return load(weights)


def analyse(
    datasets: Sequence[Dataset],
    model: LoadedModel,
    *,
    preprocessing: str = "native",
    require_views: Sequence[str] = BOTH_VIEWS,
) -> Finding | Declined:
    """Judge one acquisition: one object with its views, or the objects that belong together.

    `datasets`: at least one, of one acquisition (`pipeline.views.group`); anything else is declined, not guessed.
    `require_views`: without one of them the answer is `Declined("view_missing")`; views beyond them are used as well.
    `timings_ms` of the answer: decode, quality, preprocess, network, quantify, total, as far as it came.
    """
    check_preprocessing(model.record, preprocessing)
    clock = _Clock()
    try:
        images = view_images(datasets)
    except UnusableScan as error:
        clock.lap("decode")
        return Declined(error.reason, error.detail, REASONS[error.reason].ours and error.ours, (), clock.done())
    clock.lap("decode")
    return _judged(images, model, ORDERS[preprocessing], preprocessing, require_views, clock)


def analyse_views(
    images: Sequence[ViewImage],
    model: LoadedModel,
    *,
    preprocessing: str = "native",
    require_views: Sequence[str] = BOTH_VIEWS,
    outlined: bool = True,
) -> Finding | Declined:
    """`analyse` of views that were read already, one of a name at most.

    `outlined = False` leaves GrabCut's masks out where the network does not see them: the decision is the same, and
    measuring thousands of scans needs no outlines. Every view's outline is then the analysed region.
    """
    check_preprocessing(model.record, preprocessing)
    order = ORDERS[preprocessing]
    return _judged(
        images, model, order if outlined else order.without_outline(), preprocessing, require_views, _Clock()
    )


def _judged(
    images: Sequence[ViewImage],
    model: LoadedModel,
    order: Order,
    preprocessing: str,
    require_views: Sequence[str],
    clock: "_Clock",
) -> Finding | Declined:
    images = tuple(images)
    present = {image.view for image in images}
    if missing := [view for view in require_views if view not in present]:
        # A scan whose header gave a reason never comes here, so this one is ours.
        return Declined("view_missing", f"{' and '.join(missing)} view missing", True, images, clock.done())
    problem = problem_of(images, model.record.training_range)
    clock.lap("quality")
    if problem is not None:
        return Declined(problem.reason, problem.detail, REASONS[problem.reason].ours, images, clock.done())

    standard = Standard(model.record.input.scale, model.record.input.mean, model.record.input.std)
    prepared = prepare_scan(
        {image.view: (image.counts, image.spacing_mm) for image in images}, order, standard=standard
    )
    clock.lap("preprocess")
    answers = [judge(model, network_input, explained=True) for network_input in prepared.inputs]
    probability = sigmoid(
        fused_logit([answer.logit for answer in answers], model.record.fusion, model.record.temperature)
    )
    verdict = verdict_of(probability, model.record)
    far = max((answer.distance for answer in answers if answer.distance is not None), default=0.0)
    limit = model.record.training_range.embedding_distance
    if limit is not None and far > limit:
        clock.lap("network")
        detail = f"in the network's own features it lies {far:.1f} from the scans trained on; at most {limit:.1f}"
        return Declined("out_of_training_range", detail, REASONS["out_of_training_range"].ours, images, clock.done())
    if order.joint and len(images) > 1:
        alone = {
            image.view: judge(model, standardize(without_view(prepared.planes[0], image.view), standard))
            for image in images
        }
    elif order.joint:
        alone = {images[0].view: answers[0]}
    else:
        alone = {image.view: answer for image, answer in zip(images, answers, strict=True)}
    seen = _evidence(answers, images, joint=order.joint)
    top = max(float(evidence.max()) for evidence in seen)  # one scale: a view that says little shall look so
    clock.lap("network")
    views = tuple(
        _view_finding(
            image,
            view,
            sigmoid(fused_logit([alone[image.view].logit], model.record.fusion, model.record.temperature)),
            evidence,
            top,
            verdict,
        )
        for image, view, evidence in zip(images, prepared.views, seen, strict=True)
    )
    clock.lap("quantify")
    record = model.record
    return Finding(
        finding=verdict,
        probability=probability,
        threshold=record.threshold,
        undetermined_band=record.undetermined_band,
        views=views,
        model=model_facts(record),
        preprocessing=preprocessing,
        preprocessing_version=PREPROCESSING_VERSION,
        seed=SEED,
        flags=("resampled",) if any(view.resampled for view in prepared.views) else (),
        timings_ms=clock.done(),
    )


def check_preprocessing(record: WeightsRecord, preprocessing: str) -> None:
    """Raises `WrongPreprocessing` unless the weights were trained on exactly this preprocessing."""
    if preprocessing not in ORDERS:
        raise WrongPreprocessing(f"there is no preprocessing {preprocessing!r}; known: {', '.join(ORDERS)}")
    if record.preprocessing != preprocessing:
        raise WrongPreprocessing(
            f"the weights {record.name!r} were trained on {record.preprocessing!r} images and cannot judge "
            f"{preprocessing!r} ones; set [analysis] preprocessing, or choose other weights"
        )
    if record.preprocessing_version != PREPROCESSING_VERSION:
        raise WrongPreprocessing(
            f"the weights {record.name!r} were trained on version {record.preprocessing_version} of the preprocessing, "
            f"this software has version {PREPROCESSING_VERSION}; use weights made for it"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the network says of one input.

    `logit` of "present" against "absent"; `distance` from the scans trained on, None where the weights have no range of
    it; `evidence` (3, size, size): `pipeline.explain.attribution` of each channel, None where nobody asked.
    """

    logit: float
    distance: float | None
    evidence: NDArray[np.float32] | None


def judge(model: LoadedModel, network_input: NDArray[np.float32], *, explained: bool = False) -> Answer:
    """Ask the network about one input (3, size, size); `explained`: and where its evidence lies.

    One at a time: in a batch the last bits of a logit depend on the images beside it.
    """
    batch = torch.from_numpy(np.array(network_input, np.float32))[None]
    with _one_thread(), torch.set_grad_enabled(explained):
        seen = judged(model.record.architecture, model.network, batch.requires_grad_(explained))
        logit = seen.logits[0, 1] - seen.logits[0, 0]
        if explained:
            logit.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    gradient = batch.grad
    return Answer(
        logit=float(logit.detach()),
        distance=None if model.embedding is None else distance(seen.embedding[0].detach().numpy(), model.embedding),
        evidence=None if gradient is None else attribution(gradient[0].numpy(), np.asarray(network_input)),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The network on one thread, whatever the process is set to: the same bits on any number of cores.

    Two views are too little work to share: a second thread saves some 30 ms on an idle machine, and where another
    process holds its core, all threads wait for it at every layer (measured beside one busy process on 2 cores: 3.5 s
    with two threads, 0.2 s with one).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _evidence(answers: Sequence[Answer], images: Sequence[ViewImage], *, joint: bool) -> list[NDArray[np.float32]]:
    """The evidence in each view, (size, size), on its own sides: a joint input shows the posterior view turned."""
    found = [answer.evidence for answer in answers if answer.evidence is not None]
    if not joint:
        return [np.asarray(evidence.sum(axis=0), np.float32) for evidence in found]
    (both,) = found
    return [both[1][:, ::-1] if image.view == "posterior" else both[0] for image in images]


def fused_logit(logits: Sequence[float] | NDArray[np.float64], fusion: str, temperature: float | None) -> float:
    """One calibrated logit from those of the views; `fusion` and `temperature` as in the weights record."""
    if fusion == "mean_probability":
        mean = math.fsum(sigmoid(float(logit)) for logit in logits) / len(logits)
        mean = min(max(mean, 1e-12), 1 - 1e-12)
        joined = math.log(mean / (1 - mean))
    else:
        joined = math.fsum(float(logit) for logit in logits) / len(logits)
    return joined / (temperature or 1.0)


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def verdict_of(probability: float, record: WeightsRecord) -> Verdict:
    band = record.undetermined_band
    if band is not None and band[0] <= probability <= band[1]:
        return "undetermined"
    return "present" if probability >= record.threshold else "absent"


def model_facts(record: WeightsRecord) -> ModelFacts:
    """What a result says about its weights."""
    return ModelFacts(
        name=record.name,
        version=record.version,
        architecture=record.architecture,
        sha256=record.sha256,
        release=record.release,
        trained_on=record.trained_on,
        intended_use=record.intended_use,
    )


def _view_finding(
    image: ViewImage,
    prepared: Prepared,
    probability: float,
    evidence: NDArray[np.float32],
    top: float,
    verdict: Verdict,
) -> ViewFinding:
    shape = (image.counts.shape[0], image.counts.shape[1])
    # Without tissue there is nothing to point at, and a map scaled to its own maximum would point all the same.
    activation = None if verdict == "absent" else native_activation(evidence, prepared.crop, shape, top=top)
    component = main_component(prepared.mask, image.counts, activation)
    tissue = verdict == "present" and bool(component.any())
    line = outline(component) if tissue else box_outline(prepared.crop)
    return ViewFinding(
        image=image,
        crop=prepared.crop,
        mask=prepared.mask,
        mask_rule=prepared.mask_rule,
        mask_area_mm2=prepared.mask_area_mm2,
        outline=line,
        outline_area_mm2=area_mm2(line, image.spacing_mm),
        probability=probability,
        total_counts=round(float(image.counts.sum(dtype=np.float64))),
        maximum_counts=round(float(image.counts.max())),
        remnant_to_background=(
            remnant_to_background(image.counts, component, prepared.mask, prepared.crop) if tissue else None
        ),
        activation=activation,
    )


class _Clock:
    """Milliseconds by step and in total."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = (now - self._last) * 1000
        self._last = now

    def done(self) -> dict[str, float]:
        return self._laps | {"total": (time.perf_counter() - self._start) * 1000}
