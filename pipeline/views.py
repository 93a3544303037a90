"""Header facts of a received object, and how objects form acquisitions.

Imports neither torch nor cv2: the receiver uses it. Intake is tolerant: real files fail strict validation.
"""

from dataclasses import dataclass
from datetime import datetime

from pipeline.finding import ViewName


@dataclass(frozen=True, slots=True)
class FrameFacts:
    """A photopeak frame whose view is known. `frame_number` is 1-based."""

    view: ViewName
    frame_number: int


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """What the header of one object says, before its pixels are looked at.

    Strings are decoded, stripped, "" where absent. `reason` is None for an object that may be analysed, else a token
    of `pipeline.reasons.REASONS`; `ours` says whether the header shows an 131I neck scan.

    Attributes
    ----------
    acquired_at: start of the acquisition as the camera wrote it, naive local time; None where the header has no usable
        date and time.
    spacing_mm: (row, column), None where absent.
    energy_window_kev: the photopeak window the frames were taken from (lower, upper), None where absent.
    frames: the photopeak frames with a known view; one per view at the most.
    views: the views of `frames`, in the order anterior, posterior.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str
    issuer_of_patient_id: str
    patient_name: str
    accession_number: str
    acquired_at: datetime | None
    timezone_offset_from_utc: str
    rows: int
    columns: int
    number_of_frames: int
    spacing_mm: tuple[float, float] | None
    energy_window_kev: tuple[float, float] | None
    frames: tuple[FrameFacts, ...]
    reason: str | None
    ours: bool

    @property
    def views(self) -> tuple[ViewName, ...]:
        return tuple(sorted({frame.view for frame in self.frames}))
