"""Training and fine-tuning of the two-class networks (paper, section 3.2), on arrays: no DICOM.

Adam with weight decay 1e-5, cross-entropy over softmax, batches drawn by a WeightedRandomSampler so that both classes
come alike. The same settings, data and machine give the same weights: every draw of an epoch comes from a generator
seeded with (seed, epoch), which also makes a run resumable at each epoch. The only files are checkpoints;
one of other settings is refused, never continued. The passes run channels last, on a CUDA device where there is one.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.utils.data import WeightedRandomSampler

from models.architectures import build, features, head, judged

WEIGHT_DECAY: Final = 1e-5
_KEPT_FEATURES: Final = 1 << 30
"""Bytes that may be held of a frozen backbone's features."""
Images = NDArray[np.uint8] | NDArray[np.float16] | NDArray[np.float32]
SCHEDULES: Final = ("constant", "cosine")
FROZEN: Final = ("none", "backbone")


class TrainingError(Exception):
    """The training cannot run or go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train.

    Attributes
    ----------
    stages: (epochs, edge) in sequence: pictures are averaged down to `edge` pixels in the early stages, which costs a
        quarter at half the edge. The last stage's edge is what the network will judge at.
    epoch_images: images drawn in an epoch; None draws as many as there are.
    learning_rate: at the start; 1e-5 suits pre-trained weights only.
    schedule: "constant" as in the paper, or "cosine": down to 1 % of it along half a cosine.
    stop_after: end after so many epochs, although the schedule goes on; None runs it to its end.
    frozen: "none" trains the whole network, "backbone" the head alone.
    flip, shift: augmentation: mirror left-right with chance one half; move by up to `shift` pixels.
    view_dropout: chance that a picture whose channels are anterior, posterior, and share of views loses one view, so
        that the network can be asked about a single one.
    haze, brightness: another camera, for such pictures of roots of counts: up to this share of the counts is spread
        widely, as scatter and septal penetration do; and the counts are multiplied by up to this factor or its inverse.
    scale, mean, std: each channel is (value / scale - mean) / std.
    bfloat16: whether the passes run in it. It depends on the machine whether that pays: on one CPU it took 0.4 of the
        time of float32, on another 1.4 times as long.
    """

    architecture: str = "resnet18"
    stages: tuple[tuple[int, int], ...] = ((10, 224),)
    epoch_images: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 131
    schedule: str = "cosine"
    stop_after: int | None = None
    frozen: str = "none"
    flip: bool = True
    shift: int = 8
    view_dropout: float = 0.0
    haze: float = 0.0
    brightness: float = 1.0
    bfloat16: bool = False
    scale: float = 255.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def epochs(self) -> int:
        return sum(count for count, _ in self.stages)

    def edge(self, epoch: int) -> int:
        """Edge of the pictures in an epoch, 0-based."""
        for count, edge in self.stages:
            if epoch < count:
                return edge
            epoch -= count
        raise ValueError("there are not that many epochs")


@dataclass(frozen=True, slots=True)
class EpochReport:
    """After an epoch (1-based): mean training loss, learning rate at its end."""

    epoch: int
    epochs: int
    loss: float
    learning_rate: float


def train(
    images: Images,
    labels: NDArray[np.uint8],
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    initial: dict[str, torch.Tensor] | None = None,
    after_epoch: Callable[[EpochReport, nn.Module], None] | None = None,
) -> nn.Module:
    """Train on images (N, 3, H, W) or (N, 1, H, W) (may be memory-mapped) and labels (N,) in {0, 1}.

    `initial`: weights to start from instead of random ones (fine-tuning), with a head of two classes.
    `checkpoint`: a file written after every epoch, and continued from where it exists.
    Returns the network in eval mode, float32. Raises `TrainingError` for data that cannot be trained on, a loss that is
    no number, and a checkpoint that belongs to other settings or data.
    """
    _check(images, labels, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build(settings.architecture)
    if initial is not None:
        network.load_state_dict(initial)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    learning = _learning(network, settings)
    optimizer = torch.optim.Adam(learning, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    identity = _identity(images, labels, settings, initial)
    done = _resume(checkpoint, identity, network, optimizer)
    known = _unchanging_features(network, images, settings)
    for epoch in range(done, settings.epochs if settings.stop_after is None else settings.stop_after):
        with torch.random.fork_rng(devices=[]):  # dropout draws from torch's own generator
            torch.manual_seed(settings.seed * 1_000_003 + epoch)
            loss = _epoch(network, optimizer, images, labels, settings, epoch, known)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of epoch {epoch + 1} is not a number; lower the learning rate")
        if checkpoint is not None:
            _keep(checkpoint, identity, network, optimizer, epoch + 1)
        if after_epoch is not None:
            report = EpochReport(epoch + 1, settings.epochs, loss, float(optimizer.param_groups[0]["lr"]))
            after_epoch(report, network.eval())
    return network.cpu().eval()


def _learning(network: nn.Module, settings: TrainingSettings) -> list[nn.Parameter]:
    """The parameters that are trained; the others are told that they need no gradient."""
    for parameter in network.parameters():
        parameter.requires_grad_(settings.frozen == "none")
    for parameter in head(settings.architecture, network).parameters():
        parameter.requires_grad_(True)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _unchanging_features(network: nn.Module, images: Images, settings: TrainingSettings) -> torch.Tensor | None:
    """What the head sees of each image, (N, ...), where that is the same in every epoch and there is room; else None.

    Only a backbone that learns nothing, shown pictures that nothing augments, need not be asked again.
    """
    augmented = settings.flip or settings.shift or settings.view_dropout or _changes_camera(settings)
    if settings.frozen == "none" or augmented or any(edge < images.shape[-1] for _, edge in settings.stages):
        return None
    device = next(network.parameters()).device
    found: list[torch.Tensor] = []
    network.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
        for start in range(0, len(images), 32):
            batch = standardized(images[start : start + 32], settings).to(device)
            found.append(features(settings.architecture, network, batch.contiguous(memory_format=torch.channels_last)))
            if found[0][0].nbytes * len(images) > _KEPT_FEATURES:
                return None
    return torch.cat(found)


def logits(
    network: nn.Module,
    images: Images,
    settings: TrainingSettings,
    *,
    batch_size: int = 32,
    bfloat16: bool = False,
) -> NDArray[np.float32]:
    """Evidence for class 1: logit 1 - logit 0 of each image (N, 3 or 1, H, W), shape (N,), float32."""
    found = []
    device = next(network.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        for start in range(0, len(images), batch_size):
            batch = standardized(images[start : start + batch_size], settings)
            output = network(batch.to(device).contiguous(memory_format=torch.channels_last)).float()
            found.append((output[:, 1] - output[:, 0]).cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def embeddings(network: nn.Module, images: Images, settings: TrainingSettings) -> NDArray[np.float32]:
    """Features before the last layer, (N, D), of images before they are standardized."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            batch = standardized(images[start : start + 64], settings)
            found.append(judged(settings.architecture, network, batch).embedding.numpy())
    return np.concatenate(found)


def _check(images: Images, labels: NDArray[np.uint8], settings: TrainingSettings) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype not in (np.uint8, np.float16, np.float32):
        raise TrainingError(
            f"images of shape {images.shape}, {images.dtype}; needed are (N, 3 or 1, H, W), uint8 or floating"
        )
    if settings.schedule not in SCHEDULES or settings.frozen not in FROZEN:
        raise TrainingError(
            f"schedule {settings.schedule!r} and frozen {settings.frozen!r}: known are {', '.join(SCHEDULES)} and "
            f"{', '.join(FROZEN)}"
        )
    if (settings.view_dropout or _changes_camera(settings)) and images.shape[1] != 3:
        raise TrainingError(
            "view_dropout, haze and brightness need pictures whose three channels are two views and their share"
        )
    if not 0 <= settings.haze < 1 or settings.brightness < 1:
        raise TrainingError("haze is a share below 1, brightness a factor of 1 or more")
    if labels.shape != (len(images),) or not np.isin(labels, (0, 1)).all():
        raise TrainingError("labels must be 0 or 1, one for each image")
    if labels.min(initial=1) == labels.max(initial=0):
        raise TrainingError("training needs images of both classes")


def _epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    labels: NDArray[np.uint8],
    settings: TrainingSettings,
    epoch: int,
    known: torch.Tensor | None,
) -> float:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    prevalence = labels.mean()
    weights = np.where(labels == 1, 1 / prevalence, 1 / (1 - prevalence)).tolist()
    order = list(
        WeightedRandomSampler(weights, settings.epoch_images or len(labels), replacement=True, generator=generator)
    )
    edge, size = settings.edge(epoch), settings.batch_size
    starts = range(0, len(order) - size + 1, size) or range(1)  # batch normalisation wants no rest of one picture
    network.train()
    if settings.frozen == "backbone":
        # A frozen backbone keeps its running means too: only then is it the one that was pre-trained.
        network.eval()
    last = head(settings.architecture, network)
    last.train()
    device = next(network.parameters()).device
    total = 0.0
    for step, start in enumerate(starts):
        progress = (epoch + step / len(starts)) / settings.epochs
        share = 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        chosen = order[start : start + size]
        if known is None:
            planes = _dropped(images[chosen], settings, generator)
            batch = standardized(_before_another_camera(planes, settings, generator), settings)
            batch = _augmented(batch, settings, generator)
            if edge < batch.shape[-1]:
                batch = functional.interpolate(batch, size=(edge, edge), mode="area")
            batch = batch.to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            output = network(batch) if known is None else last(known[chosen]).flatten(1)
        truth = torch.from_numpy(labels[chosen].astype(np.int64)).to(device)
        loss = functional.cross_entropy(output.float(), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        total += float(loss.detach())
    return total / len(starts)


def standardized(planes: Images, settings: TrainingSettings) -> torch.Tensor:
    """float32 (N, 3, H, W), with the arithmetic of `pipeline.preprocess.standardize`."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (settings.mean, settings.std))
    return torch.from_numpy((planes.astype(np.float32) / np.float32(settings.scale) - mean) / std)


def single_view(planes: Images, view: int) -> Images:
    """Pictures of channels anterior, posterior, share of views, as if only view 0 or 1 had come. Shape stays."""
    alone = planes.copy()
    alone[..., 1 - view, :, :] = 0
    alone[..., 2, :, :] = planes[..., 2, :, :] / 2
    return alone


def _dropped(planes: Images, settings: TrainingSettings, generator: torch.Generator) -> Images:
    if not settings.view_dropout:
        return planes
    drawn = torch.rand(len(planes), generator=generator).numpy()
    result = planes.copy()
    for view in (0, 1):
        chosen = (drawn >= view * settings.view_dropout / 2) & (drawn < (view + 1) * settings.view_dropout / 2)
        result[chosen] = single_view(planes[chosen], view)
    return result


def _changes_camera(settings: TrainingSettings) -> bool:
    return settings.haze > 0 or settings.brightness > 1


def _before_another_camera(planes: Images, settings: TrainingSettings, generator: torch.Generator) -> Images:
    """The views (N, 3, H, W) as a camera with more scatter, broader tails or another sensitivity would show them.

    Each picture gets a share of haze of its own, drawn evenly from none to `haze`, and one of two widths. The counts
    stay where the field was; noise is not drawn anew, so a hazed picture is a little smoother than a real one.
    """
    if not _changes_camera(settings):
        return planes
    count = len(planes)
    share = torch.rand(count, generator=generator) * settings.haze
    broad = torch.rand(count, generator=generator) < 0.5
    factor = settings.brightness ** (2 * torch.rand(count, generator=generator) - 1)
    counts = torch.from_numpy(planes[:, :2].astype(np.float32)) ** 2
    spread = torch.where(broad[:, None, None, None], _spread_out(counts, 16), _spread_out(counts, 8))
    share, factor = share[:, None, None, None], factor[:, None, None, None]
    seen = torch.from_numpy(planes[:, 2:].astype(np.float32) > 0)
    changed = planes.copy()
    changed[:, :2] = (torch.sqrt(factor * ((1 - share) * counts + share * spread)) * seen).numpy()
    return changed


def _spread_out(counts: torch.Tensor, cell: int) -> torch.Tensor:
    """(N, C, H, W) under a broad bell of about 1.3 cells (sigma): cells are averaged, smoothed and enlarged."""
    coarse = functional.avg_pool2d(counts, cell, ceil_mode=True, count_include_pad=False)
    for _ in range(2):
        coarse = functional.avg_pool2d(coarse, 3, stride=1, padding=1, count_include_pad=False)
    return functional.interpolate(coarse, size=counts.shape[2:], mode="bilinear", align_corners=False)


def _augmented(batch: torch.Tensor, settings: TrainingSettings, generator: torch.Generator) -> torch.Tensor:
    count = len(batch)
    flips = torch.rand(count, generator=generator) < 0.5
    moves = torch.randint(-settings.shift, settings.shift + 1, (count, 2), generator=generator)
    if settings.flip:
        batch = torch.where(flips[:, None, None, None], batch.flip(3), batch)
    if not settings.shift:
        return batch
    height, width = batch.shape[2:]
    padded = functional.pad(batch, (settings.shift,) * 4, mode="replicate")
    places = (moves + settings.shift).tolist()
    return torch.stack(
        [picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(padded, places, strict=True)]
    )


def _identity(
    images: Images,
    labels: NDArray[np.uint8],
    settings: TrainingSettings,
    initial: dict[str, torch.Tensor] | None,
) -> str:
    """What a checkpoint must agree in to be continued. Of the pictures the shape and a sample of sums."""
    sample = [float(images[index].sum(dtype=np.float64)) for index in range(0, len(images), max(1, len(images) // 16))]
    start = None if initial is None else {key: float(tensor.double().sum()) for key, tensor in initial.items()}
    facts = [dataclasses.asdict(settings), images.shape, sample, labels.tolist(), start]
    return json.dumps(facts)


def _keep(path: Path, identity: str, network: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    state = {"identity": identity, "done": done, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, part)
    part.replace(path)


def _resume(path: Path | None, identity: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if path is None or not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise TrainingError(f"{path.name} was written with other settings or data; delete it or name another file")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["done"])
