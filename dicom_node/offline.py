"""`remnant analyse`: DICOM files in, findings out, without node, worklist or network. The same code as the node's.

What a camera would have sent is grouped by the same rule, answered by the same road and written as the same objects;
only the UIDs come from a namespace of their own, so that a result made by hand never passes for the node's.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from dicom_node.answer import answer
from dicom_node.errors import WrongUse
from dicom_node.messages import Answer, Provenance, Task
from dicom_node.settings import Settings
from dicom_node.worker import fingerprint_of, wanted_by
from models.weights import LoadedModel
from pipeline.reasons import REASONS
from pipeline.views import HeaderFacts, UnreadableHeader, facts_of, group


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for one acquisition, and where its result objects were written."""

    study_instance_uid: str
    source_sop_instance_uids: tuple[str, ...]
    answer: Answer
    preprocessing: str
    files: tuple[Path, ...]
    ours: bool

    def as_json(self) -> dict[str, object]:
        """The object that `analyse --json` prints: the contract of the design's section 7."""
        return {
            "study_instance_uid": self.study_instance_uid,
            "source_sop_instance_uids": list(self.source_sop_instance_uids),
            "outcome": self.answer.outcome,
            "finding": self.answer.finding,
            "probability": self.answer.probability,
            "reason": self.answer.reason,
            "views": list(self.answer.views),
            "model": self.answer.model,
            "model_sha256": self.answer.model_sha256,
            "preprocessing": self.preprocessing,
            "files": [str(path) for path in self.files],
            "timings_ms": {step: round(value, 2) for step, value in self.answer.timings_ms.items()},
        }


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of `paths`, folders read recursively, each once. Raises WrongUse for a missing path."""
    files: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise WrongUse(f"{path} does not exist.", hint="Give files or folders with DICOM objects.")
        for found in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if found.is_file() and found.name != "DICOMDIR":
                files[found] = None
    return list(files)


def analyse_files(
    files: Sequence[Path], model: LoadedModel, settings: Settings, out: Path | None
) -> Iterator[Verdict | tuple[Path, str]]:
    """Analyse files; yield a verdict for each acquisition, and (path, why) for each file that cannot be read.

    `out` is where results are written; None writes none.
    """
    objects: dict[str, tuple[Dataset, HeaderFacts]] = {}
    for path in files:
        try:
            ds = dcmread(path)
            facts = facts_of(ds)
        except (InvalidDicomError, UnreadableHeader, OSError, ValueError, EOFError) as error:
            yield path, str(error) if isinstance(error, UnreadableHeader) else "not a readable DICOM file"
            continue
        objects.setdefault(facts.sop_instance_uid, (ds, facts))
    kept: dict[tuple[str, str], list[str]] = {}
    for uid, (_, facts) in objects.items():
        if facts.reason in _NEVER_ANALYSED:
            kept.setdefault((facts.study_instance_uid, facts.patient_id), []).append(uid)
    ours = [facts for _, facts in objects.values() if facts.reason not in _NEVER_ANALYSED]
    for acquisition in group(ours, pair_window_s=settings.analysis.pair_window_s):
        datasets = [objects[uid][0] for uid in acquisition.sop_instance_uids]
        yield _answer(datasets, acquisition.reason, model, settings, out)
    for (study_instance_uid, _), uids in kept.items():
        reasons = {str(objects[uid][1].reason) for uid in uids}
        yield _kept(study_instance_uid, uids, (reasons - {"wrong_class"} or reasons).pop(), settings)


# A reason that the header alone decides and that the analysis never sees.
_NEVER_ANALYSED = frozenset(token for token, reason in REASONS.items() if not reason.ours)


def _answer(
    datasets: list[Dataset], reason: str | None, model: LoadedModel, settings: Settings, out: Path | None
) -> Verdict:
    now = datetime.now(UTC)
    # No row remembers when this was analysed, so two runs are two results: the time enters their UIDs.
    fingerprint = hashlib.sha256(f"{fingerprint_of(settings)} {now.isoformat()}".encode()).hexdigest()
    task = Task(
        paths=(),
        reason=reason,
        provenance=Provenance(
            revision=1,
            source_digests={str(ds.SOPInstanceUID): _digest(ds) for ds in datasets},
            analysed_at=now,
            timezone=settings.zone.key,
            ae_title=settings.node.ae_title,
            codes=settings.codes,
            settings_fingerprint=fingerprint,
            offline=True,
            sensitivity_cps_per_mbq=settings.analysis.sensitivity_cps_per_mbq or None,
        ),
        wanted=wanted_by(settings.destinations) if out is not None else (),
    )
    told = answer(
        datasets,
        model,
        task,
        preprocessing=settings.analysis.preprocessing,
        require_views=settings.analysis.require_views,
    )
    files = tuple(
        _write(out, result.sop_instance_uid, result.kind, result.variant, result.data) for result in told.results if out
    )
    return Verdict(
        study_instance_uid=str(datasets[0].StudyInstanceUID),
        source_sop_instance_uids=tuple(sorted(str(ds.SOPInstanceUID) for ds in datasets)),
        answer=told,
        preprocessing=settings.analysis.preprocessing,
        files=files,
        ours=told.reason is None or REASONS[told.reason].ours,
    )


def _kept(study_instance_uid: str, uids: list[str], reason: str, settings: Settings) -> Verdict:
    declined = Answer(
        outcome="declined",
        reason=reason,
        detail="",
        finding=None,
        probability=None,
        views=(),
        model=None,
        model_sha256=None,
        results=(),
    )
    return Verdict(study_instance_uid, tuple(sorted(uids)), declined, settings.analysis.preprocessing, (), ours=False)


def _digest(ds: Dataset) -> str:
    """SHA-256 of the file an object was read from, as the node takes it of what it received."""
    return hashlib.sha256(Path(str(ds.filename)).read_bytes()).hexdigest()


def _write(out: Path, sop_instance_uid: str, kind: str, variant: str, data: bytes) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{sop_instance_uid}.{'-'.join(part for part in (kind, variant) if part)}.dcm"
    path.write_bytes(data)
    return path
