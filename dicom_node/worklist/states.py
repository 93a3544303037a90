"""The states of a row and the changes between them, as data. `guard.change` is the one function that makes a change."""

from collections.abc import Mapping
from types import MappingProxyType

from dicom_node.errors import RemnantError

STATES = ("receiving", "queued", "analysing", "sending", "delivered", "declined", "failed", "recalled")

REST = frozenset({"delivered", "declined", "failed", "recalled"})
"""States in which nothing happens by itself. Retention counts from the time a row came to rest."""

DELIVERY_STATES = ("pending", "acknowledged", "refused", "given_up", "cancelled")

RELAY_STATES = ("asking", "reporting", "reported", "given_up")
"""Of a camera's request for Storage Commitment: archives are asked, the camera is told, and how that ended."""

QUARANTINED = ("pending", "identity_changed", "other_pixels")
"""Verdicts on other bytes under a known UID that keep them from being used, and keep them longer."""

NEW = "new"
"""Where a row comes from; no row is ever in it."""

_REVISION = "its set of views changed: a new revision begins"
_IDENTITY = "the same image arrived with another identity: sending stops and a person decides"

TRANSITIONS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (NEW, "receiving"): "a view arrived and a required view is missing",
        (NEW, "declined"): "an object arrived that is never analysed",
        ("receiving", "queued"): "all required views are here, or none is waited for any longer",
        ("receiving", "declined"): "another row took its views",
        ("queued", "analysing"): "a worker claimed it",
        ("analysing", "queued"): "try later, or the worker was lost",
        ("analysing", "sending"): "results, or a note, are durable",
        ("analysing", "declined"): "it is not a scan we answer",
        ("analysing", "failed"): "it could not be judged, and not even a note could be made",
        ("sending", "delivered"): "every destination has the finding",
        ("sending", "declined"): "every destination has the note that says why there is no finding",
        ("sending", "failed"): "the analysis failed, or a destination refused a result or was given up",
        ("delivered", "queued"): "a person asked for a retry: a new revision",
        ("declined", "queued"): "a person asked for a retry: a new revision",
        ("failed", "queued"): "a person asked for a retry: a new revision",
        ("recalled", "queued"): "a person asked for a retry: a new revision",
        **{
            (state, "recalled"): "a person withdrew what was sent"
            for state in ("sending", "delivered", "declined", "failed")
        },
        **{(state, "receiving"): _REVISION for state in STATES},
        **{(state, "failed"): _IDENTITY for state in ("receiving", "queued", "delivered", "declined", "recalled")},
    }
)
"""(from, to) -> when."""


class TransitionRefused(RemnantError):  # noqa: N818 - the name says what happened, for whoever catches it
    """The row cannot make this change: it is in another state, or the table has no such change. Nothing was changed."""


class LeaseLost(RemnantError):  # noqa: N818 - see above
    """The worker no longer holds the row: it was requeued, or its views changed. What it found must not be used."""
