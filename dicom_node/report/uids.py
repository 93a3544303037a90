"""The UIDs of results: derived, never drawn, so that the same result has the same UID on every run and every host.

All are "2.25." and a version 5 UUID as a decimal number (PS3.5 B.2). What goes into the name is the rule of the
contract: sources and their digests, revision, class, variant, software, weights, preprocessing, settings.
"""

import json
import uuid
from collections.abc import Mapping, Sequence

NODE_NAMESPACE = uuid.UUID("49fab88b-b323-41a9-9364-70fe48bbefc7")
"""Results that a running node sends."""

OFFLINE_NAMESPACE = uuid.UUID("6047eaf3-2306-425b-80d4-7e794bea7a47")
"""Results written by `remnant analyse`: never the UID of an object that a node may have sent."""

IMPLEMENTATION_CLASS_UID = "2.25.189842544916292246360926522223052154512"
"""File Meta Information of every file we write (PS3.7 D.3.3.2)."""


def derived_uid(namespace: uuid.UUID, *parts: object) -> str:
    """Return the UID named by `parts` (text, numbers, lists of these), equal parts giving equal UIDs."""
    name = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return f"2.25.{uuid.uuid5(namespace, name).int}"


def fallback_uid(original_sop_instance_uid: str, sop_class_uid: str) -> str:
    """Return the SOPInstanceUID of a simpler report: the original's UID names all that went into it."""
    return derived_uid(NODE_NAMESPACE, "fallback", original_sop_instance_uid, sop_class_uid)


def result_parts(
    source_digests: Mapping[str, str],
    source_uids: Sequence[str],
    *,
    revision: int,
    software_version: str,
    weights_sha256: str,
    preprocessing_version: str,
    settings_fingerprint: str,
) -> tuple[object, ...]:
    """Return what names a result apart from its kind.

    Raises
    ------
    KeyError: a source without a digest.
    """
    sources = [[uid, source_digests[uid]] for uid in sorted(source_uids)]
    return (sources, revision, software_version, weights_sha256, preprocessing_version, settings_fingerprint)
