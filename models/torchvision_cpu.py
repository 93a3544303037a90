"""Imports torchvision beside a CPU build of torch.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU torch its compiled library does not load, and then
`import torchvision` stops with "operator torchvision::nms does not exist", because it registers shapes for two
operators that only the library declares. We declare the schemas of those two (and nothing else) where the library does
not load; models and transforms then work, the detection operators themselves and `torchvision.io` do not, and nothing
here uses them. With a torchvision that matches its torch this module changes nothing.
"""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_library_loads() -> bool:
    """Whether torchvision's own operators can be had; loads them as torchvision itself is about to do."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed; install the versions in constraints.txt")
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        except OSError:
            return False
        return True
    return False


@cache
def _declared() -> torch.library.Library | None:
    """The declaration, which torch withdraws as soon as the object goes: the cache keeps it for the process."""
    if _compiled_library_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return library


def torchvision_models() -> ModuleType:
    """`torchvision.models`, imported so that it works beside a CPU build of torch."""
    _declared()
    return importlib.import_module("torchvision.models")
