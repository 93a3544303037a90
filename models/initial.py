"""What a training starts from: random numbers, official ImageNet weights, or an earlier training of ours.

Nothing is ever downloaded: official files of torchvision are taken from a folder, and each must agree with the digest
in its own name. They are pickles, read with torch's restricted reader (`weights_only`), which builds tensors and runs
nothing. A head of another number of classes is replaced by a new one of two (paper, section 3.2); every other tensor
must be there and of the right shape, or `InitialWeightsError` says which is not. The same seed gives the same head.
"""

import hashlib
import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import safetensors
import safetensors.torch
import torch

from models import weights
from models.architectures import build

OFFICIAL: Final = MappingProxyType(
    {
        "resnet18": "resnet18-f37072fd.pth",
        "squeezenet1_1": "squeezenet1_1-b8a52dc0.pth",
        "shufflenet_v2_x1_0": "shufflenetv2_x1-5666bf0f80.pth",
    }
)
"""The files of torchvision's ImageNet weights (IMAGENET1K_V1). Another one of the same beginning is taken as well."""

_HEADS: Final = MappingProxyType({"resnet18": "fc.", "squeezenet1_1": "classifier.1.", "shufflenet_v2_x1_0": "fc."})
_DIGEST_IN_NAME: Final = re.compile(r"-([0-9a-f]{8,64})\.pth")
_MAX_BYTES: Final = 1 << 29


class InitialWeightsError(Exception):
    """These weights cannot be started from; one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class InitialWeights:
    """A start of a training.

    `description`: for a person, such as "ImageNet (resnet18-f37072fd.pth)"; `sha256`: of the file, "" without one;
    `pretrained`: whether anything was learned before; `state`: tensors of the whole network, two classes, float32, or
    None for random numbers drawn by the training's own seed.
    """

    description: str
    sha256: str
    pretrained: bool
    state: dict[str, torch.Tensor] | None


def initial_weights(architecture: str, source: str, *, folder: Path | None = None, seed: int = 0) -> InitialWeights:
    """The start that a person asked for by `source`.

    "none": random numbers. "imagenet": torchvision's official file for this architecture, out of `folder`. Otherwise a
    path: a weights record (.json), tensors (.safetensors), or an official file (.pth, digest in its name).
    `seed` draws a new head where the file's has another number of classes.
    """
    if architecture not in _HEADS:
        raise InitialWeightsError(f"there is no architecture named {architecture!r}; known: {', '.join(_HEADS)}")
    if source == "none":
        return InitialWeights("random numbers, no pre-training", "", False, None)
    path = _official(architecture, folder) if source == "imagenet" else Path(source)
    if path.suffix == ".json":
        try:
            model = weights.load(str(path))
        except weights.WeightsError as error:
            raise InitialWeightsError(str(error)) from error
        if model.record.architecture != architecture:
            raise InitialWeightsError(f"{path.name} is a {model.record.architecture}, not a {architecture}")
        state = {key: tensor.float() for key, tensor in model.network.state_dict().items()}
        told = f"{model.record.name} ({model.record.trained_on})"
        return InitialWeights(told, model.record.sha256, True, state)
    content = _content(path)
    tensors = _tensors(path, content)
    state = _two_classes(architecture, tensors, path, seed)
    origin = f"ImageNet ({path.name})" if source == "imagenet" else path.name
    return InitialWeights(origin, hashlib.sha256(content).hexdigest(), True, state)


def _official(architecture: str, folder: Path | None) -> Path:
    wanted = OFFICIAL[architecture]
    if folder is None:
        raise InitialWeightsError(f"name the folder that holds torchvision's official file {wanted}; it is not fetched")
    found = sorted(folder.glob(wanted.rsplit("-", 1)[0] + "-*.pth"))
    if len(found) != 1:
        which = "none" if not found else ", ".join(path.name for path in found)
        raise InitialWeightsError(
            f"{folder} must hold one official file for {architecture}, such as {wanted}; found: {which}"
        )
    return found[0]


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InitialWeightsError(f"{path.name} is too large for weights")
        return path.read_bytes()
    except OSError as error:
        raise InitialWeightsError(f"the weights {path.name!r} cannot be read: {error.strerror}") from error


def _tensors(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            found: object = safetensors.torch.load(content)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise InitialWeightsError(f"{path.name} is not a safetensors file; fetch it again") from error
    elif path.suffix == ".pth":
        named = _DIGEST_IN_NAME.search(path.name)
        if named is None:
            raise InitialWeightsError(
                f"{path.name} has no digest in its name, as torchvision's official files have; keep their names"
            )
        if not hashlib.sha256(content).hexdigest().startswith(named[1]):
            raise InitialWeightsError(f"{path.name} is not the file its name says (digest differs); fetch it again")
        try:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise InitialWeightsError(f"{path.name} does not hold plain tensors") from error
    else:
        raise InitialWeightsError(
            f"{path.name!r} is no weights record (.json), no tensors (.safetensors), no official file (.pth)"
        )
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InitialWeightsError(f"{path.name} does not hold the tensors of one network")
    return found


def _two_classes(architecture: str, tensors: dict[str, torch.Tensor], path: Path, seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build(architecture).state_dict()
    head = _HEADS[architecture]
    wrong = sorted(set(tensors) - set(state))
    for key, own in state.items():
        given = tensors.get(key)
        if given is None:
            # Counters of batch normalisation: older files lack them, and nothing is computed with them.
            if not key.endswith("num_batches_tracked"):
                wrong.append(key)
        elif given.shape == own.shape:
            if not bool(torch.isfinite(given.float()).all()):
                raise InitialWeightsError(f"{path.name} holds numbers that are not finite; fetch it again")
            state[key] = given.to(own.dtype).clone()
        elif not (key.startswith(head) and given.shape[1:] == own.shape[1:]):
            wrong.append(key)
    if wrong:
        raise InitialWeightsError(f"{path.name} is not a {architecture}: {', '.join(wrong[:3])} missing or different")
    return state
