"""What we accept and what we propose on the network, once, as data.

Receiver, sender and the generated conformance statement read the same tuples, so that what is promised to a hospital
is what is negotiated (PS3.8 section 7.1.1.13, PS3.4 annex B). A class or syntax in the settings that nobody knows
stops the start with a sentence that names it; nothing here changes after import.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import register_uid, sop_class
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.service_class import StorageServiceClass

from dicom_node import __version__
from dicom_node.errors import SettingsError
from dicom_node.uids import valid_uid

# PS3.7 D.3.3.2: identifies the implementation, not the site. UUIDv5 of "remnant-node" in the DNS namespace, as PS3.5
# B.2 allows without a registered root; it stays the same as long as the network behaviour is of one family.
IMPLEMENTATION_CLASS_UID = "2.25.192122012015948417401117794288184749199"
# PS3.7 D.3.3.2.4: at most 16 characters.
IMPLEMENTATION_VERSION_NAME = f"REMNANT_{__version__}"[:16]

VERIFICATION = "1.2.840.10008.1.1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # proposed to a destination with `query = true`
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"  # Push Model; used only where a setting asks for it
STORAGE_COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"  # its one well-known instance: PS3.4 J.3.5


@dataclass(frozen=True, slots=True)
class AcceptedClass:
    """A SOP class that the receiver takes.

    `purpose` is "analysed" for scans, "kept" for what a camera routes with them: stored, acknowledged, never analysed.
    """

    uid: str
    name: str
    keyword: str
    purpose: Literal["analysed", "kept"]


@dataclass(frozen=True, slots=True)
class Registered:
    """A transfer syntax or a SOP class as PS3.6 annex A registers it."""

    uid: str
    name: str
    keyword: str


def _accepted(uid: str, purpose: Literal["analysed", "kept"]) -> AcceptedClass:
    return AcceptedClass(uid=uid, name=UID(uid).name, keyword=UID(uid).keyword, purpose=purpose)


def _named(uid: str) -> Registered:
    return Registered(uid=uid, name=UID(uid).name, keyword=UID(uid).keyword)


ACCEPTED_CLASSES: tuple[AcceptedClass, ...] = (
    _accepted("1.2.840.10008.5.1.4.1.1.20", "analysed"),  # NM
    # A camera routes whole studies; refusing one of these would stall its queue.
    _accepted("1.2.840.10008.5.1.4.1.1.2", "kept"),  # CT
    _accepted("1.2.840.10008.5.1.4.1.1.7", "kept"),  # SC, single frame
    _accepted("1.2.840.10008.5.1.4.1.1.7.1", "kept"),  # SC, multi-frame: single bit, grey byte, grey word, true colour
    _accepted("1.2.840.10008.5.1.4.1.1.7.2", "kept"),
    _accepted("1.2.840.10008.5.1.4.1.1.7.3", "kept"),
    _accepted("1.2.840.10008.5.1.4.1.1.7.4", "kept"),
    _accepted("1.2.840.10008.5.1.4.1.1.104.1", "kept"),  # Encapsulated PDF
    _accepted("1.2.840.10008.5.1.4.1.1.88.11", "kept"),  # Basic Text SR
    _accepted("1.2.840.10008.5.1.4.1.1.88.22", "kept"),  # Enhanced SR
    _accepted("1.2.840.10008.5.1.4.1.1.88.33", "kept"),  # Comprehensive SR
    _accepted("1.2.840.10008.5.1.4.1.1.88.34", "kept"),  # Comprehensive 3D SR
    _accepted("1.2.840.10008.5.1.4.1.1.88.67", "kept"),  # X-Ray Radiation Dose SR
    _accepted("1.2.840.10008.5.1.4.1.1.88.68", "kept"),  # Radiopharmaceutical Radiation Dose SR
    _accepted("1.2.840.10008.5.1.4.1.1.88.59", "kept"),  # Key Object Selection
    _accepted("1.2.840.10008.5.1.4.1.1.11.1", "kept"),  # Grayscale Softcopy Presentation State
    _accepted("1.2.840.10008.5.1.4.1.1.66.4", "kept"),  # Segmentation
)

# What we send, by the name of the result in a destination's `results`.
RESULT_CLASSES: dict[Literal["sr", "sc", "seg"], Registered] = {
    "sr": _named("1.2.840.10008.5.1.4.1.1.88.34"),  # Comprehensive 3D SR
    "sc": _named("1.2.840.10008.5.1.4.1.1.7"),  # Secondary Capture, single frame
    "seg": _named("1.2.840.10008.5.1.4.1.1.66.4"),  # Segmentation, where a destination asks for it
}

# For a destination that refuses a Structured Report, what it gets instead, from the most to the least expressive; a
# Secondary Capture is what remains behind the last (PS3.3 A.35: the same tree fits the first three classes).
REPORT_CHAIN: tuple[Registered, ...] = (
    RESULT_CLASSES["sr"],
    _named("1.2.840.10008.5.1.4.1.1.88.33"),  # Comprehensive SR
    _named("1.2.840.10008.5.1.4.1.1.88.22"),  # Enhanced SR
    _named("1.2.840.10008.5.1.4.1.1.88.11"),  # Basic Text SR
)

# What withdraws results that were sent.
RECALL_CLASS = _named("1.2.840.10008.5.1.4.1.1.88.59")  # Key Object Selection

# Implicit VR Little Endian is the one syntax nobody may refuse (PS3.5 section 10.1). Explicit comes first: where a peer
# lists both in one context we take the one that keeps the value representations of private elements.
DEFAULT_SYNTAXES: tuple[Registered, ...] = (_named(ExplicitVRLittleEndian), _named(ImplicitVRLittleEndian))

# Only by setting: decoded in the worker, never in the receiver.
OPTIONAL_SYNTAXES: tuple[Registered, ...] = (
    _named(ExplicitVRBigEndian),
    _named(DeflatedExplicitVRLittleEndian),
    _named(RLELossless),
    _named(JPEGLosslessSV1),
    _named(JPEGLSLossless),
    _named(JPEG2000Lossless),
)

_DICOM_ROOT = "1.2.840.10008."  # every UID of the standard itself; all others are a manufacturer's
_MAX_PROPOSED = 128  # context IDs are the odd numbers 1 to 255 (PS3.8 section 9.3.2.2)


def resolve_classes(extra_classes: Sequence[str]) -> tuple[AcceptedClass, ...]:
    """Return the classes the receiver takes: ours and `extra_classes`, each given by keyword or UID.

    A UID outside the standard's own tree is a manufacturer's private storage class and is taken as it is.

    Raises
    ------
    SettingsError: an entry is no keyword of a storage class and no UID of one; the entry is named.
    """
    by_uid = {accepted.uid: accepted for accepted in ACCEPTED_CLASSES}
    for entry in extra_classes:
        extra = _extra_class(entry.strip())
        by_uid.setdefault(extra.uid, extra)
    return tuple(by_uid.values())


def resolve_syntaxes(extra_syntaxes: Sequence[str]) -> tuple[Registered, ...]:
    """Return the syntaxes the receiver takes: the default two and `extra_syntaxes` (keyword or UID of an optional one).

    Raises
    ------
    SettingsError: an entry is none of them; the entry is named, and the possible ones.
    """
    found = list(DEFAULT_SYNTAXES)
    for entry in extra_syntaxes:
        wanted = entry.strip()
        matches = [s for s in (*DEFAULT_SYNTAXES, *OPTIONAL_SYNTAXES) if wanted in (s.uid, s.keyword)]
        if not matches:
            raise SettingsError(
                f"The transfer syntax {entry!r} in the settings is not one we can decode.",
                hint=f"Use one of {', '.join(s.keyword for s in OPTIONAL_SYNTAXES)}.",
            )
        found += [s for s in matches if s not in found]
    return tuple(found)


def accepted_contexts(extra_classes: Sequence[str], extra_syntaxes: Sequence[str] = ()) -> list[PresentationContext]:
    """Return the receiver's presentation contexts: Verification and every accepted class. Build once, at the start.

    pynetdicom copies the whole list for every connection, so that each context costs a little on each association.

    Raises
    ------
    SettingsError: an unknown class or syntax, named.
    """
    syntaxes = [syntax.uid for syntax in resolve_syntaxes(extra_syntaxes)]
    contexts = [build_context(VERIFICATION, [syntax.uid for syntax in DEFAULT_SYNTAXES])]
    for accepted in resolve_classes(extra_classes):
        if sop_class.uid_to_service_class(accepted.uid) is not StorageServiceClass:
            # Without this pynetdicom answers a C-STORE of a private class with an abort, and the camera's queue stalls.
            register_uid(accepted.uid, f"Private_{accepted.uid.replace('.', '_')}", StorageServiceClass)
        contexts.append(build_context(accepted.uid, syntaxes))
    return contexts


def commitment_context(*, requests: bool, reports: bool) -> PresentationContext:
    """Return the accepted context of Storage Commitment: a camera calls as SCU with its `requests`, an archive as SCP
    with its `reports` (PS3.7 D.3.3.4)."""
    context = build_context(STORAGE_COMMITMENT, [syntax.uid for syntax in DEFAULT_SYNTAXES])
    context.scu_role, context.scp_role = requests, reports
    return context


def proposed_contexts(
    sop_class_uids: Iterable[str], transfer_syntax_uid: str = ExplicitVRLittleEndian
) -> list[PresentationContext]:
    """Return the contexts to propose as a sender, two for each class: the stored syntax, and the default one.

    Two contexts and not one with two syntaxes: an acceptor picks one syntax of a context by its own preference, and we
    want to know whether the bytes can go as they are stored. PS3.8 section 7.1.1.13.

    Raises
    ------
    ValueError: more classes than an association has room for (64).
    """
    classes = dict.fromkeys(sop_class_uids)
    syntaxes = dict.fromkeys((transfer_syntax_uid, ImplicitVRLittleEndian))
    contexts = [build_context(uid, syntax) for uid in classes for syntax in syntaxes]
    if len(contexts) > _MAX_PROPOSED:
        raise ValueError(f"{len(contexts)} presentation contexts do not fit in one association ({_MAX_PROPOSED})")
    return contexts


def next_report_class(sop_class_uid: str) -> str | None:
    """Return the class that goes in the place of a refused one; None behind the last, and for what is no report."""
    chain = [one.uid for one in REPORT_CHAIN]
    behind = chain[chain.index(sop_class_uid) + 1 :] if sop_class_uid in chain else []
    return behind[0] if behind else None


def _extra_class(entry: str) -> AcceptedClass:
    by_keyword = getattr(sop_class, entry, None)
    uid = str(by_keyword) if isinstance(by_keyword, sop_class.SOPClass) else entry
    if not valid_uid(uid):
        raise SettingsError(
            f"The SOP class {entry!r} in receiver.extra_classes is neither a keyword nor a UID we know.",
            hint="Use a keyword such as PositronEmissionTomographyImageStorage, or the UID from the camera's log.",
        )
    if not uid.startswith(_DICOM_ROOT):
        return AcceptedClass(uid=uid, name=f"Private storage class {uid}", keyword="", purpose="kept")
    if sop_class.uid_to_service_class(uid) is not StorageServiceClass:
        raise SettingsError(
            f"{entry!r} in receiver.extra_classes is not a storage SOP class.",
            hint="Only objects can be stored; remove it, or look up the class in the camera's conformance statement.",
        )
    return _accepted(uid, "kept")
