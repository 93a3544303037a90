"""What rendering needs beside the outcome and the sources, and what it gives: plain frozen data."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from dicom_node.errors import RemnantError
from dicom_node.whose import AcceptedIdentity
from pipeline.finding import ModelFacts, ViewName

Kind = Literal["sr", "sc", "seg"]
"""Structured Report, Secondary Capture, Segmentation."""


class RenderError(RemnantError):
    """An outcome cannot be turned into an object that may leave: nothing was rendered."""


class Predecessor(NamedTuple):
    """A document of an earlier revision (PredecessorDocumentsSequence, PS3.3 C.17.2).

    `study_instance_uid` is given where it is not the study of the sources: a person accepted another identity since.
    """

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContext:
    """Everything about a result that neither the outcome nor the sources know.

    Attributes
    ----------
    revision: of the acquisition, from 1.
    source_digests: SOPInstanceUID -> SHA-256 (hex) of the source's bytes as received.
    analysed_at: aware; becomes ContentDate and ContentTime.
    timezone: in which these are written, unless the source brings an offset of its own.
    settings_fingerprint: digest of the settings that shape a result.
    uid_namespace: `uids.NODE_NAMESPACE` or `uids.OFFLINE_NAMESPACE`.
    ae_title: the node's name on the network, StationName of its results.
    software_version: the distribution's.
    sc: "colour" (RGB) or "grey" (MONOCHROME2) Secondary Captures.
    codes: a site's own codes for ours: "RMN001" -> (value, scheme, meaning).
    predecessors: `Predecessor`s, or plain tuples in its order; only documents (SR) may stand there.
    accepted: whose the result is to be, where a person accepted another identity than the received one; the sources
        then carry it already (`identity.adopted`).
    model: which weights the node runs, for the note of a Declined; a Finding names its own.
    device_serial_number: of the node; by default its AE title.
    seg: which view a Segmentation shows.
    """

    revision: int
    source_digests: Mapping[str, str]
    analysed_at: datetime
    timezone: ZoneInfo
    settings_fingerprint: str
    uid_namespace: uuid.UUID
    ae_title: str
    software_version: str
    sc: Literal["colour", "grey"] = "colour"
    codes: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    predecessors: tuple[tuple[str, ...], ...] = ()
    accepted: AcceptedIdentity | None = field(default=None, repr=False)
    model: ModelFacts | None = None
    device_serial_number: str = ""
    seg: ViewName = "anterior"


@dataclass(frozen=True, slots=True)
class RenderedResult:
    """One object, ready to be stored and sent.

    `data` is a complete Part 10 file, Explicit VR Little Endian. `variant` tells objects of one kind apart: "colour" or
    "grey" for a Secondary Capture, the view for a Segmentation, "" for a Structured Report.
    """

    kind: Kind
    variant: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    data: bytes
