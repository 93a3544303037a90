"""What is kept and not used until a person looks: listed, shown, released, discarded.

Two kinds of object are here. Other bytes under a known SOP Instance UID hang on the row of the first; they stay on the
shelf, and their verdict keeps them from being used. A file that no row owns and that cannot be entered lies in the
folder `spool/quarantine` (see `reconcile`). An object is named by its number in the worklist, a file by the first
digits of its name. Nothing here shows a patient's identity unless it is asked for.
"""

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from dicom_node import log, spool, worklist
from dicom_node.errors import StorageError
from dicom_node.reconcile import enter, read_orphan, rules_of
from dicom_node.settings import Settings
from dicom_node.spool import Spool
from dicom_node.whose import Identity
from dicom_node.worklist.clock import text_of
from pipeline.views import HEADER_LIMIT, HeaderFacts, UnreadableHeader, header_facts

_DIGITS = 16

_log = log.get("quarantine")

_IDENTITY = ("patient_id", "issuer_of_patient_id", "patient_name", "accession_number")


@dataclass(frozen=True, slots=True)
class Held:
    """An object in quarantine. `id` is a number, or the first digits of a file's name; `scan_id` is None for a file."""

    id: str
    why: str
    scan_id: int | None
    sop_instance_uid: str
    source_aet: str
    received_at: str
    size_bytes: int
    sha256: str
    path: Path
    transfer_syntax_uid: str


def held(engine: Engine, store: Spool) -> tuple[Held, ...]:
    """Everything in quarantine: versions by number, then files by age. Reads the header of each file."""
    versions = [
        Held(
            id=str(one["id"]),
            why=one["verdict"],
            scan_id=one["scan_id"],
            sop_instance_uid=one["sop_instance_uid"],
            source_aet=one["source_aet"],
            received_at=one["received_at"],
            size_bytes=one["size_bytes"],
            sha256=one["sha256"],
            path=store.objects / one["spool_name"],
            transfer_syntax_uid=one["transfer_syntax_uid"],
        )
        for one in worklist.quarantined(engine)
    ]
    files = sorted(store.quarantine.glob("*.dcm"), key=lambda path: path.stat().st_mtime)
    return (*versions, *(_file(path) for path in files))


def _file(path: Path) -> Held:
    orphan = read_orphan(path, path.name)
    facts = path.stat()
    read = None if isinstance(orphan, str) else orphan
    return Held(
        id=path.name[:_DIGITS],
        why=orphan if isinstance(orphan, str) else "it has no row, and can be released",
        scan_id=None,
        sop_instance_uid=read.facts.sop_instance_uid if read else "",
        source_aet=read.source_aet if read else "",
        received_at=text_of(datetime.fromtimestamp(facts.st_mtime, UTC)),
        size_bytes=facts.st_size,
        sha256=path.stem,
        path=path,
        transfer_syntax_uid=read.stored.transfer_syntax_uid if read else "",
    )


def one_held(engine: Engine, store: Spool, which: str) -> Held:
    """The object in quarantine that a person names. Raises TransitionRefused where there is none, or are several."""
    found = [one for one in held(engine, store) if one.id == which or (one.scan_id is None and _means(which, one))]
    if len(found) != 1:
        raise worklist.TransitionRefused(
            f"there {'are several objects' if found else 'is no object'} {which[:64]!r} in quarantine",
            hint="see `remnant quarantine list`",
        )
    return found[0]


def _means(which: str, one: Held) -> bool:
    return len(which) >= 6 and one.sha256.startswith(which.lower())


def shown(one: Held, *, identity: bool) -> dict[str, Any]:
    """What is known of an object: where it is, why, and its header; patient and order only with `identity`."""
    told: dict[str, Any] = {name: value for name, value in asdict(one).items() if value not in (None, "")}
    told["path"] = str(one.path)
    facts = _facts(one)
    if isinstance(facts, str):
        return told | {"header": facts}
    return told | {
        name: value
        for name, value in asdict(facts).items()
        if name not in told and value not in (None, "") and (identity or name not in _IDENTITY)
    }


def _facts(one: Held) -> HeaderFacts | str:
    try:
        header, _ = spool.dataset_header(one.path, HEADER_LIMIT)
        return header_facts(header, one.transfer_syntax_uid)
    except (StorageError, UnreadableHeader) as error:
        return str(error)


def whose(engine: Engine, one: Held) -> Identity:
    """Whose an object is: its row's identity, else its header's, empty where that cannot be read."""
    if one.scan_id is not None:
        return worklist.whose(engine, one.scan_id)
    facts = _facts(one)
    if isinstance(facts, str):
        return Identity("", "", "", "", "")
    return Identity(
        facts.study_instance_uid,
        facts.patient_id,
        facts.issuer_of_patient_id,
        facts.patient_name,
        facts.accession_number,
    )


def release(engine: Engine, store: Spool, settings: Settings, which: str) -> worklist.Receipt:
    """Put an object back to work: a version takes the place of the first one, a file is entered as received.

    Raises
    ------
    TransitionRefused: it may not be used, with the reason and what to do instead.
    """
    one = one_held(engine, store, which)
    if one.scan_id is not None:
        if spool.dataset_digest(one.path) != one.sha256:
            raise worklist.TransitionRefused(
                f"the bytes of object {one.id} are missing or damaged", hint="have the camera send it again"
            )
        facts = _facts(one)
        if isinstance(facts, str):
            raise worklist.TransitionRefused(
                f"object {one.id} cannot be read: {facts}", hint="it can only be discarded"
            )
        return worklist.release_version(engine, int(one.id), facts, rules_of(settings))
    orphan = read_orphan(one.path, f"{one.path.name[:2]}/{one.path.name}")
    if isinstance(orphan, str):
        raise worklist.TransitionRefused(
            f"file {one.id} cannot be entered: {orphan}", hint="have the camera send it again, then discard this"
        )
    spool.bring_back(store, one.path.name)
    return enter(engine, orphan, rules_of(settings))


def discard(engine: Engine, store: Spool, which: str, reason: str) -> None:
    """Remove the bytes of an object for good; the history keeps its digest and the reason.

    Raises
    ------
    TransitionRefused: it is not in quarantine, or somebody has to decide first.
    """
    one = one_held(engine, store, which)
    if one.scan_id is None:
        worklist.record_event(engine, "node", f"file {one.sha256} of the quarantine was discarded: {reason}")
        spool.remove(one.path)
        return
    # Written down first: a kill in between leaves bytes that retention has written off, and reconcile removes them.
    spool.remove(store.objects / worklist.discard_version(engine, int(one.id), reason))


def expire_files(engine: Engine, store: Spool) -> int:
    """Remove files of the quarantine folder whose time is over, and warn of those whose time is near, each with a line
    in the node's history; returns how many were removed. Versions that hang on a row go with the row."""
    removed = 0
    for path in store.quarantine.glob("*.dcm"):
        days = (time.time() - path.stat().st_mtime) / 86_400
        if days >= worklist.DISPUTED_DAYS:
            worklist.record_event(engine, "purged", f"file sha256 {path.stem} of the quarantine")
            spool.remove(path)
            removed += 1
        elif days >= worklist.DISPUTED_DAYS - worklist.WARNING_DAYS and worklist.record_event(
            engine, "purge_near", f"file sha256 {path.stem} of the quarantine", once=True
        ):
            _log.warning("alarm", what="purge_near", file=path.name[:_DIGITS])
    return removed
