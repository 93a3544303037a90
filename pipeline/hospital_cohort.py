"""A hospital's own labelled cohort: a folder of DICOM objects and a CSV that says which scan shows residual tissue.

Objects become scans by the node's own rule (`pipeline.views.group`), so that what is measured here is what the node
would judge. Nothing is guessed and nothing is dropped in silence: every file belongs to a scan of the cohort or stands
in `HospitalCohort.excluded` with a reason, and so does every line of the CSV that names nothing, or nothing usable.
Patients are told apart by PatientID and its issuer (PS3.3 C.7.1.1) and never shared between training and testing; the
cohort holds only a digest of them. Paths are the hospital's own and may tell who a patient is: they belong on the
physicist's screen, not in a log.
"""

import csv
import hashlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from pipeline.camera import SIMULATED_ISSUER
from pipeline.reasons import REASONS
from pipeline.views import Acquisition, HeaderFacts, UnreadableHeader, UnusableScan, facts_of, group, view_images

WHY: Final = {
    "unreadable": "it cannot be read as a DICOM image",
    "duplicate": "it repeats another one",
    "conflicting_copy": "objects of one SOPInstanceUID differ",
    "out_of_scope": "it is not a scan that the node judges",
    "no_patient_id": "it has no PatientID, so that scans of one patient cannot be kept on one side of a split",
    "unlabelled": "no line of the labels names it",
    "ambiguous_label": "its study holds several scans; label each by SOPInstanceUID",
    "conflicting_label": "its labels contradict each other",
    "bad_label": "the line has no usable label or UID",
    "trained_on": "its patient was used to make these weights, so that it cannot measure them",
    "label_without_scan": "no object that could be read has this UID",
}
"""Every reason for which a file or a line is not in the cohort: a closed list."""

LABELS: Final = {"residual": True, "1": True, "clean": False, "0": False}
_ALIASES: Final = {
    "study_instance_uid": "StudyInstanceUID",
    "sop_instance_uid": "SOPInstanceUID",
    "residual": "label",
}
"""The columns of `truth.csv`, as they are called in a hospital's CSV."""
_READING_ERRORS = (InvalidDicomError, UnreadableHeader, OSError, ValueError, EOFError, AttributeError, KeyError)


class CohortError(Exception):
    """The cohort cannot be made; one sentence that says what to change."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """`what`: a file, relative to the folder, or "labels line N"; `reason`: a token of `WHY`; `detail`: a sentence."""

    what: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class LabelledScan:
    """One scan with its label.

    `patient`: digest of PatientID and issuer; `files`: one an object, in the order of `sop_instance_uids`; `strata`:
    groups that the labels put it in, such as "salivary_only"; `uptake_percent`: of residual tissue, where it is known;
    `synthetic`: whether it says itself that it was simulated.
    """

    files: tuple[Path, ...]
    sop_instance_uids: tuple[str, ...]
    study_instance_uid: str
    patient: str
    residual: bool
    strata: tuple[str, ...] = ()
    uptake_percent: float | None = None
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class HospitalCohort:
    """`scans` sorted by their UIDs, whatever the files are called; `excluded` sorted by what."""

    scans: tuple[LabelledScan, ...]
    excluded: tuple[Excluded, ...]


@dataclass(frozen=True, slots=True)
class Grouping:
    """One random division: places in `HospitalCohort.scans`, rising. No patient is on both sides."""

    training: tuple[int, ...]
    testing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """One usable line of the labels. `target`: the UID it names, `study_instance_uid`: "" where it names none."""

    number: int
    target: str
    by_object: bool
    study_instance_uid: str
    residual: bool
    strata: tuple[str, ...] = ()
    uptake_percent: float | None = None

    @property
    def what(self) -> str:
        return f"labels line {self.number}"


@dataclass(frozen=True, slots=True)
class _Object:
    path: Path
    facts: HeaderFacts


def read_cohort(
    folder: Path,
    labels: Path,
    *,
    pair_window_s: float = 3600.0,
    require_views: Sequence[str] = ("anterior", "posterior"),
    progress: Callable[[int, int], None] | None = None,
) -> HospitalCohort:
    """The cohort of a folder, read recursively, under the labels of a CSV.

    The CSV has a column `label` (residual or 1, clean or 0) and `StudyInstanceUID`, or `SOPInstanceUID` where a study
    holds several scans; with both, the object leads and must be of that study. `stratum` (several parted by "|") and
    `uptake_percent` may be there, and are told in the figures; other columns are not looked at. The `truth.csv` of
    `pipeline.camera.simulate` is such a CSV (its names are taken too).
    Separator comma, semicolon or tab; UTF-8. A label of one object is the label of its scan. `progress(done, all)` is
    called after each file. Raises `CohortError` where folder or CSV cannot be used at all.
    """
    lines, excluded = _read_labels(labels)
    objects, unread = _read_objects(folder, labels, progress)
    excluded += unread
    chosen, copies = _one_of_each(objects, folder)
    excluded += copies
    known = {item.facts.sop_instance_uid: item.facts for item in objects}
    studies = {facts.study_instance_uid for facts in known.values()}
    usable = []
    for line in lines:
        if line.target not in (known if line.by_object else studies):
            excluded.append(_out(line.what, "label_without_scan"))
        elif line.by_object and line.study_instance_uid not in ("", known[line.target].study_instance_uid):
            excluded.append(_out(line.what, "bad_label", "the object is not of the study that the line names"))
        else:
            usable.append(line)
    acquisitions = group([item.facts for item in chosen.values()], pair_window_s=pair_window_s)
    in_study = Counter(_study(found, chosen) for found in acquisitions if _may_be_meant(found))
    scans: list[tuple[LabelledScan, str]] = []
    for found in acquisitions:
        problem = _problem(found, chosen, require_views) or _label_problem(found, chosen, usable, in_study)
        content = "" if problem else _content(found, chosen)
        if isinstance(content, Excluded):
            problem = content
        if problem is not None:
            excluded += [
                _out(_name(chosen[uid].path, folder), problem.reason, problem.detail) for uid in found.sop_instance_uids
            ]
            continue
        line = next(line for line in usable if _names(line, found, chosen))
        scans.append((_scan(found, chosen, line), str(content)))
    kept, repeated = _without_repeats(scans, folder)
    excluded += repeated
    return HospitalCohort(
        tuple(sorted(kept, key=lambda scan: scan.sop_instance_uids)),
        tuple(sorted(excluded, key=lambda item: (item.what, item.reason))),
    )


def groupings(
    scans: Sequence[LabelledScan], *, count: int = 10, seed: int = 0, test_share: float = 0.25
) -> tuple[Grouping, ...]:
    """Random divisions as in the paper (3:1, section 2.3), but of patients and not of images.

    Patients are drawn within three strata: only residual scans, only clean ones, both. The same scans and seed give
    the same groupings in any order of files. Raises `CohortError` unless either side holds both labels.
    """
    return divide([scan.residual for scan in scans], [scan.patient for scan in scans], count, seed, test_share)


def divide(
    residual: Sequence[bool], patients: Sequence[str], count: int, seed: int, test_share: float = 0.25
) -> tuple[Grouping, ...]:
    """`groupings` of scans that are given as two columns of one length: their labels, and whose they are.

    Half a patient more goes to the training, as in the paper: 346 and 100 scans of as many patients become 260 and 75
    for training, 86 and 25 for testing.
    """
    if not 0 < test_share < 1 or count < 1:
        raise CohortError("a grouping needs a test share between 0 and 1 and a count of at least 1")
    places: dict[str, list[int]] = defaultdict(list)
    for place, patient in enumerate(patients):
        places[patient].append(place)
    strata: dict[tuple[bool, ...], list[str]] = defaultdict(list)
    for patient in sorted(places):
        strata[tuple(sorted({bool(residual[place]) for place in places[patient]}))].append(patient)
    found = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        held_out: set[str] = set()
        for stratum in sorted(strata):
            alike = strata[stratum]
            size = max(math.ceil(len(alike) * test_share - 0.5), int(len(alike) > 1))
            held_out.update(alike[i] for i in rng.permutation(len(alike))[:size])
        testing = tuple(sorted(place for patient in held_out for place in places[patient]))
        training = tuple(sorted(place for patient in set(places) - held_out for place in places[patient]))
        if any({bool(residual[place]) for place in side} != {True, False} for side in (training, testing)):
            raise CohortError(
                "either side of a grouping needs residual and clean scans, and there are too few patients for that; "
                "add patients"
            )
        found.append(Grouping(training, testing))
    return tuple(found)


# Labels ----------------------------------------------------------------------------------------------------------


def _read_labels(path: Path) -> tuple[list[_Line], list[Excluded]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CohortError(f"the labels {path.name!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CohortError(f"the labels {path.name!r} are not text in UTF-8; save them as UTF-8") from error
    head = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    named = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = [_ALIASES.get(name, name) if _ALIASES.get(name) not in named else name for name in named]
    columns = set(reader.fieldnames)
    if "label" not in columns or not columns & {"StudyInstanceUID", "SOPInstanceUID"}:
        raise CohortError(
            f"the labels {path.name!r} need a first line with the columns label and StudyInstanceUID or SOPInstanceUID"
        )
    lines: list[_Line] = []
    excluded: list[Excluded] = []
    told: dict[tuple[str, bool], bool] = {}
    for row in reader:
        number = reader.line_num
        study, sop, label = (
            (row.get(column) or "").strip() for column in ("StudyInstanceUID", "SOPInstanceUID", "label")
        )
        if label.lower() not in LABELS or not (study or sop):
            excluded.append(_out(f"labels line {number}", "bad_label"))
            continue
        strata = tuple(word.strip() for word in (row.get("stratum") or "").split("|") if word.strip())
        try:
            uptake = float(row.get("uptake_percent") or "nan")
        except ValueError:
            excluded.append(_out(f"labels line {number}", "bad_label", "uptake_percent is not a number"))
            continue
        known = uptake if uptake >= 0 and math.isfinite(uptake) else None
        line = _Line(number, sop or study, bool(sop), study, LABELS[label.lower()], strata, known)
        if told.setdefault((line.target, line.by_object), line.residual) == line.residual and any(
            (other.target, other.by_object) == (line.target, line.by_object) for other in lines
        ):
            excluded.append(_out(line.what, "duplicate"))
            continue
        lines.append(line)
    return lines, excluded


def _names(line: _Line, found: Acquisition, chosen: dict[str, _Object]) -> bool:
    return line.target in (found.sop_instance_uids if line.by_object else (_study(found, chosen)[1],))


def _label_problem(
    found: Acquisition, chosen: dict[str, _Object], lines: Iterable[_Line], in_study: Counter[tuple[str, str]]
) -> Excluded | None:
    naming = [line for line in lines if _names(line, found, chosen)]
    if not naming:
        return _out("", "unlabelled")
    if len({line.residual for line in naming}) > 1:
        return _out("", "conflicting_label", "see " + ", ".join(line.what for line in naming))
    if not any(line.by_object for line in naming) and in_study[_study(found, chosen)] > 1:
        return _out("", "ambiguous_label")
    return None


# Objects ---------------------------------------------------------------------------------------------------------


def _read_objects(
    folder: Path, labels: Path, progress: Callable[[int, int], None] | None
) -> tuple[list[_Object], list[Excluded]]:
    if not folder.is_dir():
        raise CohortError(f"{folder.name!r} is not a folder")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve() != labels.resolve()]
    if not paths:
        raise CohortError(f"{folder.name!r} holds no files")
    objects, excluded = [], []
    for done, path in enumerate(paths, start=1):
        try:
            objects.append(_Object(path, facts_of(dcmread(path, stop_before_pixels=True))))
        except _READING_ERRORS as error:
            detail = str(error) if isinstance(error, UnreadableHeader) else ""
            excluded.append(_out(_name(path, folder), "unreadable", detail))
        if progress is not None:
            progress(done, len(paths))
    return objects, excluded


def _one_of_each(objects: Iterable[_Object], folder: Path) -> tuple[dict[str, _Object], list[Excluded]]:
    """One object a SOPInstanceUID: the first of equal ones; none where they differ, for nobody knows which is right."""
    same: dict[str, list[_Object]] = defaultdict(list)
    for item in objects:
        same[item.facts.sop_instance_uid].append(item)
    chosen, excluded = {}, []
    for uid, items in same.items():
        first, *others = items
        if others and any(_body(item.path) != _body(first.path) for item in others):
            excluded += [_out(_name(item.path, folder), "conflicting_copy") for item in items]
            continue
        chosen[uid] = first
        excluded += [_out(_name(item.path, folder), "duplicate", "an equal object was read already") for item in others]
    return chosen, excluded


def _body(path: Path) -> bytes:
    """Digest of a dataset as it stands in the file, without the meta information of whoever wrote the file."""
    meta = dcmread(path, stop_before_pixels=True).file_meta
    # Group length (0002,0000) counts what follows it: its own 12 bytes come after preamble and prefix (PS3.10 7.1).
    start = 132 + 12 + int(meta.FileMetaInformationGroupLength) if "FileMetaInformationGroupLength" in meta else 0
    return hashlib.sha256(path.read_bytes()[start:]).digest()


def _problem(found: Acquisition, chosen: dict[str, _Object], require_views: Sequence[str]) -> Excluded | None:
    facts = chosen[found.sop_instance_uids[0]].facts
    if found.reason is not None:
        kind = "unreadable" if found.reason in ("unreadable", "bad_pixel_length") else "out_of_scope"
        return _out("", kind, f"{found.reason}: {REASONS[found.reason].sentence}")
    if missing := [view for view in require_views if view not in found.views]:
        return _out("", "out_of_scope", f"view_missing: {' and '.join(missing)}")
    return None if facts.patient_id else _out("", "no_patient_id")


def _content(found: Acquisition, chosen: dict[str, _Object]) -> str | Excluded:
    """Digest of the counts of all views, or why they cannot be used."""
    try:
        images = view_images([dcmread(chosen[uid].path) for uid in found.sop_instance_uids])
    except UnusableScan as error:
        return _out("", "unreadable", f"{error.reason}: {error.detail}")
    except _READING_ERRORS:
        return _out("", "unreadable", "the file ends or breaks within the pixels")
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.view} {image.counts.shape}".encode() + image.counts.tobytes())
    return digest.hexdigest()


def _without_repeats(
    scans: Iterable[tuple[LabelledScan, str]], folder: Path
) -> tuple[list[LabelledScan], list[Excluded]]:
    """Scans of the same counts under other UIDs are one scan, exported twice: in training and testing it would leak."""
    same: dict[str, list[LabelledScan]] = defaultdict(list)
    for scan, content in scans:
        same[content].append(scan)
    kept, excluded = [], []
    for copies in same.values():
        agree = len({scan.residual for scan in copies}) == 1
        reason, detail = ("duplicate", "the same counts under other UIDs") if agree else ("conflicting_label", "")
        kept += copies[:1] if agree else []
        excluded += [
            _out(_name(path, folder), reason, detail or "the same counts are labelled otherwise elsewhere")
            for scan in copies[1 if agree else 0 :]
            for path in scan.files
        ]
    return kept, excluded


def _may_be_meant(found: Acquisition) -> bool:
    """Whether the label of a study could speak of this acquisition: a scan of ours, judgeable or not."""
    return found.reason is None or REASONS[found.reason].ours


def _study(found: Acquisition, chosen: dict[str, _Object]) -> tuple[str, str]:
    facts = chosen[found.sop_instance_uids[0]].facts
    return _patient(facts), facts.study_instance_uid


def _patient(facts: HeaderFacts) -> str:
    return hashlib.sha256(f"{facts.issuer_of_patient_id}\0{facts.patient_id}".encode()).hexdigest()


def _scan(found: Acquisition, chosen: dict[str, _Object], line: _Line) -> LabelledScan:
    patient, study_instance_uid = _study(found, chosen)
    files = tuple(chosen[uid].path for uid in found.sop_instance_uids)
    return LabelledScan(
        files,
        found.sop_instance_uids,
        study_instance_uid,
        patient,
        line.residual,
        line.strata,
        line.uptake_percent,
        chosen[found.sop_instance_uids[0]].facts.issuer_of_patient_id == SIMULATED_ISSUER,
    )


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _out(what: str, reason: str, detail: str = "") -> Excluded:
    return Excluded(what, reason, detail or WHY[reason])
