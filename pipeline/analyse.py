"""The one entry to the method: the datasets of one acquisition in, a `Finding` or a `Declined` out.

Used by the worker, the command line, evaluation and tests alike, so that all of them get the same answer: equal pixels,
weights and preprocessing give an equal probability, bit for bit, on one machine. A fault of the input never raises; it
ends in `Declined` with a reason of the closed list. What raises is a fault of ours: weights that do not belong to the
preprocessing (`WrongPreprocessing`), weights that are not what their record says (`models.weights.WeightsError`).
"""

import math
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom import Dataset

from models.architectures import logits_and_evidence
from models.weights import LoadedModel, WeightsRecord, load
from pipeline.explain import native_activation
from pipeline.finding import Declined, Finding, ModelFacts, Verdict, ViewFinding, ViewImage, ViewName
from pipeline.preprocess import ORDERS, PREPROCESSING_VERSION, SEED, Prepared, Standard, prepare
from pipeline.quality import problem_of
from pipeline.quantify import area_mm2, box_outline, main_component, outline, remnant_to_background
from pipeline.reasons import REASONS
from pipeline.views import UnusableScan, view_images

BOTH_VIEWS: Final[tuple[ViewName, ...]] = ("anterior", "posterior")


class WrongPreprocessing(Exception):  # noqa: N818  named for what it says, like the rest of the pipeline's exceptions
    """These weights were trained on other preprocessing than was asked for; the message says which."""


def load_model(weights: str) -> LoadedModel:
    """The network of a shipped name or a record's path, verified; raises `models.weights.WeightsError`.

    From here on this process computes on one thread. Two views are too little work to share: a second thread saves
    some 30 ms on an idle machine, and where another process holds its core, all threads wait for it at every layer
    (measured beside one busy process on 2 cores: 3.5 s with two threads, 0.2 s with one).
    """
    torch.set_num_threads(1)
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
    present = {image.view for image in images}
    if missing := [view for view in require_views if view not in present]:
        # A scan whose header gave a reason never comes here, so this one is ours.
        return Declined("view_missing", f"{' and '.join(missing)} view missing", True, images, clock.done())
    problem = problem_of(images, model.record.training_range)
    clock.lap("quality")
    if problem is not None:
        return Declined(problem.reason, problem.detail, REASONS[problem.reason].ours, images, clock.done())

    standard = Standard(model.record.input.mean, model.record.input.std)
    prepared = [
        prepare(image.counts, image.spacing_mm, preprocessing=preprocessing, standard=standard) for image in images
    ]
    clock.lap("preprocess")
    judged = [judge(model, view.network_input) for view in prepared]
    logits = [logit for logit, _ in judged]
    probability = sigmoid(fused_logit(logits, model.record.fusion, model.record.temperature))
    verdict = verdict_of(probability, model.record)
    clock.lap("network")
    alone = [sigmoid(fused_logit([logit], model.record.fusion, model.record.temperature)) for logit in logits]
    views = tuple(
        _view_finding(image, view, score, evidence, verdict)
        for image, view, score, (_, evidence) in zip(images, prepared, alone, judged, strict=True)
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
        flags=("resampled",) if any(view.resampled for view in prepared) else (),
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


def judge(model: LoadedModel, network_input: NDArray[np.float32]) -> tuple[float, NDArray[np.float32] | None]:
    """Logit of class "present" against "absent" for one view (3, 224, 224), and the evidence's map (h, w) or None.

    One view at a time: in a batch the last bits of a view's logit depend on the views beside it.
    """
    with torch.inference_mode():
        batch = torch.from_numpy(network_input[None])
        output, evidence = logits_and_evidence(model.record.architecture, model.network, batch)
        logit = float(output[0, 1] - output[0, 0])
    return logit, None if evidence is None else evidence[0].numpy()


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
    evidence: NDArray[np.float32] | None,
    verdict: Verdict,
) -> ViewFinding:
    shape = (image.counts.shape[0], image.counts.shape[1])
    activation = None if evidence is None else native_activation(evidence, prepared.crop, shape)
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
