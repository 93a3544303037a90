"""What the worker and its analysis child say to each other: plain frozen data.

A module of its own because both sides unpickle it, and the worker must not load torch or highdicom for that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from dicom_node.whose import AcceptedIdentity
from pipeline.finding import ViewName

Outcome = Literal["analysed", "declined", "failed"]
Version = Literal["same_content", "identity_changed", "other_pixels"]
Kind = Literal["sr", "sc", "seg"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a child needs once."""

    weights: str
    preprocessing: str
    require_views: tuple[ViewName, ...]
    log_json: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """A result that some destination gets: its kind and its variant, the colours of a picture or the view of a mask."""

    kind: Kind
    variant: Literal["", "colour", "grey", "anterior", "posterior"] = ""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a result says of its making beside the finding; all of it enters the result's bytes or UIDs.

    `source_digests` maps SOPInstanceUID to the SHA-256 of the received dataset; `analysed_at` is aware, UTC;
    `predecessors` are (SOPClassUID, SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID) of the Structured Reports that
    this revision replaces; `accepted` is whose the result is to be, where a person accepted another identity than the
    received one; `offline` chooses the UID namespace of `remnant analyse`, whose results must never pass for
    the node's; `sensitivity_cps_per_mbq` is the camera's calibration, None without one.
    """

    revision: int
    source_digests: Mapping[str, str]
    analysed_at: datetime
    timezone: str
    ae_title: str
    codes: Mapping[str, tuple[str, str, str]]
    settings_fingerprint: str
    predecessors: tuple[tuple[str, str, str, str], ...] = ()
    accepted: AcceptedIdentity | None = field(default=None, repr=False)
    offline: bool = False
    sensitivity_cps_per_mbq: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One acquisition: the files of its objects.

    `reason` is set where the worklist knows already that there can be no finding; then only the note is made.
    """

    paths: tuple[Path, ...]
    reason: str | None
    provenance: Provenance
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two objects under one SOP Instance UID, to be compared by content."""

    first: Path
    second: Path


@dataclass(frozen=True, slots=True)
class Rendered:
    """A result object, checked: a complete Part 10 file."""

    kind: Kind
    variant: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the worklist is told. `results` is empty where nothing may be sent."""

    outcome: Outcome
    reason: str | None
    detail: str
    finding: str | None
    probability: float | None
    views: tuple[str, ...]
    model: str | None
    model_sha256: str | None
    results: tuple[Rendered, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """The child ended, or was ended, or failed, before it had a reply."""

    why: str


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Nobody wants the reply any more: the lease went to somebody else."""
