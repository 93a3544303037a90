"""The closed list of reasons why a scan has no finding.

A reason is one token in the worklist, one coded concept in a report, and one sentence for a person. Nothing else in
the product may invent a reason: `REASONS[token]` raises `KeyError` for an unknown one. Codes: PS3.16 CID 9300-series
context of "Failure Reasons" (DCM 110521 ...), as chosen in the design's section 4.
"""

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Reason:
    """Why there is no finding.

    Attributes
    ----------
    token: what stands in the worklist.
    code_value, code_meaning: the DCM code that a report carries.
    ours: True where the scan is an 131I neck scan that should have been judged. Such a scan sends a visible
        "not analysed" note, because a reader would take silence for "negative". A scan that is not ours sends nothing.
    sentence: for the doctor, completing "Not analysed: ...".
    hint: for the admin, what to do.
    """

    token: str
    code_value: str
    code_meaning: str
    ours: bool
    sentence: str
    hint: str


_SET = ("110523", "Object set incomplete")
_TYPE = ("110522", "Object types not supported")
_FORMAT = ("110521", "Objects incorrectly formatted")
_OTHER = ("110513", "Discontinued for unspecified reason")

_ALL = (
    Reason(
        "view_missing",
        *_SET,
        True,
        "a required view was not received",
        "send the missing view; the scan is then analysed",
    ),
    Reason(
        "ambiguous_views",
        *_TYPE,
        True,
        "it cannot be told which anterior and posterior views belong together",
        "send each acquisition as one object, or with correct acquisition times",
    ),
    Reason(
        "unknown_view",
        *_TYPE,
        True,
        "the header does not say whether a view is anterior or posterior",
        "set ViewCodeSequence, StartAngle or the detector's name on the camera",
    ),
    Reason(
        "not_131i", *_TYPE, False, "it is not an iodine-131 scan", "nothing; only iodine-131 neck scans are analysed"
    ),
    Reason(
        "not_static",
        *_TYPE,
        False,
        "it is not a planar static emission image",
        "nothing; only static planar views are analysed",
    ),
    Reason("whole_body", *_TYPE, False, "it is a whole-body scan", "nothing; only neck views are analysed"),
    Reason("wrong_class", *_TYPE, False, "it is not a nuclear medicine image", "nothing; kept as part of the study"),
    Reason(
        "unreadable",
        *_FORMAT,
        True,
        "the object cannot be read",
        "send the scan again; compare the quarantined bytes with the camera's",
    ),
    Reason(
        "bad_pixel_length",
        *_FORMAT,
        True,
        "the pixel data do not have the length that the header declares",
        "send the scan again; the object is damaged",
    ),
    Reason("empty_frame", *_OTHER, True, "a view holds no counts", "check the acquisition on the camera"),
    Reason(
        "low_counts", *_OTHER, True, "a view holds too few counts", "check dose, time and duration of the acquisition"
    ),
    Reason("clipped", *_OTHER, True, "pixel values are clipped", "send the unscaled image"),
    Reason(
        "flood",
        *_OTHER,
        False,
        "it is a flood, bar or line phantom",
        "nothing; quality control images are not analysed",
    ),
    Reason(
        "neck_outside_field", *_OTHER, True, "the neck is not within the field of view", "check the patient's position"
    ),
    Reason(
        "out_of_training_range",
        *_OTHER,
        True,
        "the scan lies outside the range the model was trained on",
        "read the scan without the model",
    ),
    Reason(
        "analysis_failed",
        *_OTHER,
        True,
        "the analysis failed",
        "see last_error; `remnant worklist retry ID` tries again",
    ),
    Reason(
        "gate_failed",
        *_OTHER,
        True,
        "the result did not pass its own checks",
        "see last_error; correct what it names in the object and send it again, or report it to the makers",
    ),
    Reason(
        "identity_changed",
        *_OTHER,
        True,
        "patient or study identity changed",
        "compare with `remnant worklist show ID`; `remnant worklist accept-identity ID` takes the other identity",
    ),
)

REASONS: MappingProxyType[str, Reason] = MappingProxyType({reason.token: reason for reason in _ALL})
"""Token -> reason. The tokens are a contract with the readers of the worklist."""
