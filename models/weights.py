"""Weights records: which file holds the trained numbers, what they may be used for, and how they were measured.

A record is one JSON file. Shipped ones lie in `models/cards/<name>.json` with their tensors in `models/shipped/<file>`;
a site's own record is a path, with its tensors beside it, or installed: checked and copied into `<folder>/<name>/`,
where it stays as it was accepted. Tensors are safetensors in float16 and nothing else: no pickle, so no file can run
code. The digest is compared before a byte is parsed. Whatever is wrong (a changed or truncated file, an unknown key,
shapes of another network) ends in `WeightsError` with one sentence, and no network comes out. Reading a record imports
no torch, so that `serve` and `doctor` can do it cheaply; `load` does.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from models.embedding import EmbeddingRange

if TYPE_CHECKING:
    import torch
    from torch import nn

CARDS = Path(__file__).parent / "cards"
SHIPPED = Path(__file__).parent / "shipped"
RELEASES = ("demonstration", "research", "local")
FUSIONS = ("views_as_channels", "mean_logit", "mean_probability")
SCHEMA = 2
"""2: the scale of the input, views as channels, and the range of the embedding."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
_EMBEDDING = "embedding_range."
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_RECORD_BYTES = 1 << 20
_MAX_WEIGHTS_BYTES = 1 << 29


class WeightsError(Exception):
    """The weights cannot be used; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class InputFormat:
    """What the network takes: float32 (3, size, size), each channel (value / scale - mean) / std."""

    size: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class TrainingRange:
    """Extent of the scans trained on; outside it nothing is asked.

    Attributes
    ----------
    spacing_mm: of pixels. total_counts: of a whole view.
    embedding_distance: the greatest `models.embedding.distance` that is still answered; None: not checked.
    """

    spacing_mm: tuple[float, float]
    total_counts: tuple[float, float]
    embedding_distance: float | None


@dataclass(frozen=True, slots=True)
class AcceptanceReport:
    """A physicist's acceptance of these weights for one camera; required for release "local".

    `accepted_sha256` and `accepted_preprocessing_version` must be those of the record: it does not carry over.
    """

    signed_by: str
    signed_on: str
    camera: str
    accepted_sha256: str
    accepted_preprocessing_version: str
    summary: str


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """Everything about one set of weights that a result, a person or the node needs to know.

    Attributes
    ----------
    schema: version of this layout, `SCHEMA`.
    file: bare name of the safetensors file; sha256: its digest, lower-case hex.
    preprocessing, preprocessing_version: what the images went through in training; other images are refused.
    threshold: fused probability from which a finding is "present"; operating_point: how it was chosen, in words.
    undetermined_band: (low, high) of fused probability reported as "undetermined", or None.
    temperature: each logit is divided by it (calibration), or None.
    fusion: how the views become one: "views_as_channels" of one input, or "mean_logit" or "mean_probability" of one
        input each.
    release: "demonstration" (test destinations only), "research" or "local".
    data: what it was trained and measured on; trained_on: the same as a fragment for every result.
    metrics: name -> figure; n stands among them.
    """

    schema: int
    name: str
    version: str
    file: str
    sha256: str
    architecture: str
    preprocessing: str
    preprocessing_version: str
    input: InputFormat
    threshold: float
    operating_point: str
    undetermined_band: tuple[float, float] | None
    temperature: float | None
    fusion: str
    release: str
    data: str
    trained_on: str
    training_range: TrainingRange
    metrics: Mapping[str, float]
    intended_use: str
    acceptance: AcceptanceReport | None


@dataclass(frozen=True, slots=True)
class WeightsPlace:
    """A record that was read and checked, and where its two files lie."""

    record: WeightsRecord
    record_path: Path
    weights_path: Path


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A record and its network: eval mode, float32, on the CPU, gradients off; `embedding` where the file holds one."""

    record: WeightsRecord
    network: "nn.Module"
    embedding: EmbeddingRange | None


def available() -> tuple[str, ...]:
    """Names of the shipped records."""
    return tuple(sorted(path.stem for path in CARDS.glob("*.json")))


def find(name_or_path: str) -> WeightsPlace:
    """Read and check the record of a shipped name, or of a path to a record's JSON file. The tensors are not opened."""
    if _NAME.fullmatch(name_or_path) and not name_or_path.endswith(".json"):
        record_path = CARDS / f"{name_or_path}.json"
        if not record_path.is_file():
            raise WeightsError(
                f"there are no weights named {name_or_path!r}; known: {', '.join(available()) or 'none'}; "
                "or give the path of a weights record (.json)"
            )
    else:
        record_path = Path(name_or_path)
        if record_path.suffix != ".json":
            raise WeightsError(
                f"{record_path.name!r} is not a weights record: give the path of its .json file, not of the tensors"
            )
    record = _read_record(record_path)
    folder = SHIPPED if record_path.resolve().parent == CARDS.resolve() else record_path.parent
    return WeightsPlace(record, record_path, folder / record.file)


def verify(name_or_path: str) -> WeightsPlace:
    """`find`, and compare the digest of the tensors' file. Imports no torch."""
    place = find(name_or_path)
    _verified_bytes(place)
    return place


def load(name_or_path: str) -> LoadedModel:
    """The network of a record, ready to judge. Raises `WeightsError` and never gives a network it is not sure of."""
    place = find(name_or_path)
    content = _verified_bytes(place)
    import safetensors
    import safetensors.torch
    import torch

    from models.architectures import UnknownArchitecture, build

    record = place.record
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{record.file} is not a safetensors file; fetch it again") from error
    others = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype != torch.float16})
    if others:
        raise WeightsError(f"{record.file} holds {', '.join(others)}; weights are float16 tensors only")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise WeightsError(f"{record.file} holds numbers that are not finite; train or fetch it again")
    try:
        network = build(record.architecture)
        known = _embedding_range(record, tensors)
        network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=True)
    except UnknownArchitecture as error:
        raise WeightsError(f"record {record.name!r}: {error}") from error
    except RuntimeError as error:
        raise WeightsError(
            f"the tensors in {record.file} are not those of a {record.architecture} with two classes"
        ) from error
    network.requires_grad_(requires_grad=False)
    return LoadedModel(record, network.eval(), known)


def _embedding_range(record: WeightsRecord, tensors: "dict[str, torch.Tensor]") -> EmbeddingRange | None:
    """Takes the tensors of the embedding's range, if there are any, out of those of the network."""
    parts = {name: tensors.pop(f"{_EMBEDDING}{name}", None) for name in EmbeddingRange.__slots__}
    found = {name: tensor.float().numpy() for name, tensor in parts.items() if tensor is not None}
    if not found and record.training_range.embedding_distance is None:
        return None
    if len(found) < len(parts) or found["basis"].shape[1:] != found["mean"].shape:
        raise WeightsError(
            f"{record.file} holds no whole range of the embedding, which its record limits; fetch it again"
        )
    return EmbeddingRange(**found)


def save(
    directory: Path,
    record: WeightsRecord,
    network: "nn.Module",
    *,
    embedding: EmbeddingRange | None = None,
    tensors_directory: Path | None = None,
) -> Path:
    """Write the tensors (float16, the counters of batch normalisation left out) and the record with their digest.

    `record.sha256` is filled in. Returns the record's path. Existing files are replaced; the record comes last, so that
    a record never stands without its tensors.
    """
    import safetensors.torch
    import torch

    tensors = {
        key: tensor.detach().half().contiguous()
        for key, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    if embedding is not None:
        for name in EmbeddingRange.__slots__:
            tensors[f"{_EMBEDDING}{name}"] = torch.from_numpy(getattr(embedding, name)).half().contiguous()
    content = safetensors.torch.save(tensors)
    record = dataclasses.replace(record, sha256=hashlib.sha256(content).hexdigest())
    checked(to_json(record))
    path = directory / f"{record.name}.json"
    for target, data in (
        ((tensors_directory or directory) / record.file, content),
        (path, to_json(record).encode()),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.write_bytes(data)
        part.replace(target)
    return path


def installed(folder: Path) -> tuple[str, ...]:
    """Names that were installed into `folder`, whether their files are still whole or not."""
    return tuple(sorted(path.name for path in folder.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()))


def installed_path(name: str, folder: Path) -> Path:
    """Where the record of an installed name lies, or would lie."""
    return folder / name / f"{name}.json"


def install(path: Path, folder: Path) -> WeightsPlace:
    """Check a record and its tensors, and copy both into `folder` under the record's name.

    The network is built once, so that what is installed loads. The folder gets its name last: an interrupted
    installation leaves nothing that could be found. A name stands for one set of weights: installing the same again
    does nothing, and other weights under a name that is taken are refused, for results in the archive name it.

    Raises `WeightsError` for whatever `load` refuses ("local" without a signed acceptance report among it), for a taken
    name, and where `folder` cannot be written.
    """
    if path.suffix != ".json":
        raise WeightsError(f"{path.name!r} is not a weights record: give the path of its .json file")
    if path.resolve().parent == CARDS.resolve():
        raise WeightsError(f"{path.stem!r} comes with this version and needs no installation")
    record = load(str(path.absolute())).record
    content = _verified_bytes(find(str(path.absolute())))
    home = folder / record.name
    if record.name in available():
        raise WeightsError(f"{record.name!r} is the name of weights that come with this version; give yours another")
    if home.exists():
        if verify(str(installed_path(record.name, folder))).record == record:
            return verify(str(installed_path(record.name, folder)))
        raise WeightsError(
            f"other weights are installed as {record.name!r} already, and results name them; give the new ones another "
            "name in their record"
        )
    part = folder / f".{record.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, data in ((record.file, content), (f"{record.name}.json", to_json(record).encode())):
            with (part / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        part.rename(home)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise WeightsError(f"weights cannot be installed into {folder}: {error.strerror}") from error
    return verify(str(installed_path(record.name, folder)))


def to_json(record: WeightsRecord) -> str:
    return json.dumps(dataclasses.asdict(record), indent=2, allow_nan=False) + "\n"


def checked(text: str) -> WeightsRecord:
    """The record that a JSON text holds; `WeightsError` for anything missing, unknown, mistyped or contradictory."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"the weights record is not JSON: {error}") from error
    record = _built(WeightsRecord, data, "record")
    if not isinstance(record, WeightsRecord):  # pragma: no cover  for the type checker
        raise WeightsError("the weights record is not a record")
    low_high = (record.training_range.spacing_mm, record.training_range.total_counts)
    rules: tuple[tuple[bool, str], ...] = (
        (record.schema == SCHEMA, f"schema must be {SCHEMA}"),
        (_NAME.fullmatch(record.name) is not None, "name must be lower-case letters, digits, '.', '_' and '-'"),
        (bool(record.version), "version must not be empty"),
        (_FILE.fullmatch(record.file) is not None, "file must be the bare name of a .safetensors file"),
        (_DIGEST.fullmatch(record.sha256) is not None, "sha256 must be 64 lower-case hex digits"),
        (record.release in RELEASES, f"release must be one of {', '.join(RELEASES)}"),
        (record.fusion in FUSIONS, f"fusion must be one of {', '.join(FUSIONS)}"),
        (bool(record.preprocessing and record.preprocessing_version), "preprocessing and its version must be named"),
        (32 <= record.input.size <= 1024, "input.size must lie between 32 and 1024"),
        (all(value > 0 for value in record.input.std), "input.std must be positive"),
        (0 < record.threshold < 1, "threshold must lie between 0 and 1"),
        (record.temperature is None or record.temperature > 0, "temperature must be positive or null"),
        (all(0 < low < high for low, high in low_high), "training_range must be (low, high) pairs above 0"),
        (
            bool(record.trained_on and record.intended_use and record.data),
            "data, trained_on, intended_use must be filled",
        ),
    )
    for holds, sentence in rules:
        if not holds:
            raise WeightsError(f"weights record {record.name!r}: {sentence}")
    band = record.undetermined_band
    if band is not None and not 0 <= band[0] <= record.threshold <= band[1] <= 1:
        raise WeightsError(f"weights record {record.name!r}: undetermined_band must enclose the threshold")
    _check_acceptance(record)
    return record


def _check_acceptance(record: WeightsRecord) -> None:
    report = record.acceptance
    if record.release == "local" and report is None:
        raise WeightsError(
            f"weights {record.name!r} claim release 'local' without an acceptance report; "
            "a physicist must accept them first"
        )
    if report is None:
        return
    if not (report.signed_by.strip() and report.signed_on.strip() and report.camera.strip()):
        raise WeightsError(f"weights record {record.name!r}: the acceptance report must name signer, date and camera")
    if (report.accepted_sha256, report.accepted_preprocessing_version) != (record.sha256, record.preprocessing_version):
        raise WeightsError(
            f"weights record {record.name!r}: the acceptance report is for other weights or preprocessing; "
            "accept these anew"
        )


def _read_record(path: Path) -> WeightsRecord:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise WeightsError(f"the weights record {path.name!r} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_RECORD_BYTES:
        raise WeightsError(f"{path.name!r} is too large for a weights record")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise WeightsError(f"the weights record {path.name!r} is not text in UTF-8") from error
    return checked(text)


def _verified_bytes(place: WeightsPlace) -> bytes:
    """The whole file, read once, so that what was verified is what gets parsed."""
    try:
        if place.weights_path.stat().st_size > _MAX_WEIGHTS_BYTES:
            raise WeightsError(f"{place.record.file} is too large for weights")
        content = place.weights_path.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"the weights file {place.record.file} of {place.record.name!r} cannot be read: {error.strerror}"
        ) from error
    if hashlib.sha256(content).hexdigest() != place.record.sha256:
        raise WeightsError(
            f"the weights file {place.record.file} is not the one its record names (digest differs); fetch it again"
        )
    return content


def _built(kind: type[Any], data: object, where: str) -> Any:
    """A dataclass from parsed JSON: every field present, none unknown, each of its declared type, no NaN."""
    if not isinstance(data, dict):
        raise WeightsError(f"weights record: {where} must be an object")
    names = [field.name for field in dataclasses.fields(kind)]
    for wrong, word in ((set(names) - set(data), "missing"), (set(data) - set(names), "unknown")):
        if wrong:
            raise WeightsError(f"weights record: {word} in {where}: {', '.join(sorted(map(str, wrong)))}")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in names})


def _value(kind: Any, value: object, where: str) -> Any:
    options = get_args(kind)
    if type(None) in options:
        return None if value is None else _value(next(o for o in options if o is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _built(kind, value, where)  # type: ignore[arg-type]  # is_dataclass also admits instances, hints hold none
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) != len(options):
            raise WeightsError(f"weights record: {where} must be a list of {len(options)}")
        return tuple(_value(option, item, where) for option, item in zip(options, value, strict=True))
    if get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise WeightsError(f"weights record: {where} must be an object")
        return {key: _value(options[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (str, int) and type(value) is kind:
        return value
    raise WeightsError(f"weights record: {where} must be a {'finite number' if kind is float else kind.__name__}")
