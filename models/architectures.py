"""The three networks of the paper (sections 2.3 and 3.2), each with a head of two classes.

The layers are torchvision's; nothing is ever downloaded. Class 0 is "no residual tissue", class 1 "residual tissue".
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from models.torchvision_cpu import torchvision_models

CLASSES = ("absent", "present")


class UnknownArchitecture(ValueError):  # noqa: N818  a condition with a name people say, not "...Error"
    """The name is not one of `ARCHITECTURES`."""


def _resnet18() -> nn.Module:
    network: nn.Module = torchvision_models().resnet18(weights=None, num_classes=len(CLASSES))
    return network


def _squeezenet1_1() -> nn.Module:
    network: nn.Module = torchvision_models().squeezenet1_1(weights=None, num_classes=len(CLASSES))
    return network


def _shufflenet_v2_x1_0() -> nn.Module:
    network: nn.Module = torchvision_models().shufflenet_v2_x1_0(weights=None, num_classes=len(CLASSES))
    return network


ARCHITECTURES: MappingProxyType[str, Callable[[], nn.Module]] = MappingProxyType(
    {"resnet18": _resnet18, "squeezenet1_1": _squeezenet1_1, "shufflenet_v2_x1_0": _shufflenet_v2_x1_0}
)


def build(architecture: str) -> nn.Module:
    """The network with random weights, taking (N, 3, H, W) float and giving logits (N, 2).

    Raises `UnknownArchitecture` for a name that is not in `ARCHITECTURES`.
    """
    try:
        make = ARCHITECTURES[architecture]
    except KeyError:
        raise UnknownArchitecture(
            f"there is no architecture named {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        ) from None
    return make()


def head(architecture: str, network: nn.Module) -> nn.Module:
    """The last layer, which tells the classes; everything before it is the backbone."""
    if architecture == "squeezenet1_1":
        return network.get_submodule("classifier")
    return network.get_submodule("fc")


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What one pass gives for N images: `logits` (N, 2); `embedding` (N, D), the features before the last layer."""

    logits: torch.Tensor
    embedding: torch.Tensor


def features(architecture: str, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the backbone hands to the head for images (N, 3, H, W): (N, D), or maps (N, D, h, w) for SqueezeNet."""
    if architecture == "squeezenet1_1":
        found: torch.Tensor = network.get_submodule("features")(images)
        return found
    # ResNet's last layers are called so; ShuffleNet pools in its own forward.
    found = images
    for name, layer in network.named_children():
        if name in ("avgpool", "fc"):
            break
        found = layer(found)
    return (
        torch.flatten(network.get_submodule("avgpool")(found), 1) if architecture == "resnet18" else found.mean((2, 3))
    )


def judged(architecture: str, network: nn.Module, images: torch.Tensor) -> Judged:
    """One pass over images (N, 3, H, W)."""
    found = features(architecture, network, images)
    logits = torch.flatten(head(architecture, network)(found), 1)
    return Judged(logits, found.mean(dim=(2, 3)) if found.dim() == 4 else found)
