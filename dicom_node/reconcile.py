"""Bringing spool and worklist together again after a kill, a power cut, a damaged disk or an old backup.

Every file is either owned by a row or it is not, and every row either finds its bytes or does not. An object without a
row is entered as received: its camera may hold a Success for it that an older database does not remember, and where it
holds none it sends again, to the same name. What cannot be entered is moved to the quarantine, never removed. Bytes
that a row owns and that are gone or changed are an alarm in its history; the worker refuses to read them. Only what
retention has written off already is removed.

Nothing here hurts a node at work: a receiver that is just entering the same object makes the same row, and whoever
comes second finds it there. So it runs at the worker's start and with every purge, and needs no lock.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom.filereader import read_file_meta_info
from sqlalchemy import Engine

from dicom_node import log, spool, worklist
from dicom_node.settings import Settings
from dicom_node.spool import Spool, StoredFile
from dicom_node.uids import valid_uid
from pipeline.views import HEADER_LIMIT, HeaderFacts, UnreadableHeader, header_facts

ORPHAN_RESULT_DAYS = 90
"""Days that a result without a row is kept: nothing sends it, but before an old backup came back it may have been."""

# Our file meta information is about 400 bytes: a file longer than its dataset by more is not what we wrote.
_META_LIMIT = 4096

_log = log.get("reconcile")


@dataclass(frozen=True, slots=True)
class Orphan:
    """A received object without a row, read as far as its header."""

    facts: HeaderFacts
    stored: worklist.Stored
    source_aet: str


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What was done, in numbers of files."""

    adopted: int = 0
    set_apart: int = 0
    missing: int = 0
    damaged: int = 0
    removed: int = 0

    def __str__(self) -> str:
        said = (
            (self.adopted, "entered without a row"),
            (self.set_apart, "moved to quarantine"),
            (self.missing, "missing"),
            (self.damaged, "of a wrong size"),
            (self.removed, "removed that retention had written off"),
        )
        return ", ".join(f"{count} {what}" for count, what in said if count)


def rules_of(settings: Settings) -> worklist.IntakeRules:
    """When views make a whole, as the settings say."""
    analysis = settings.analysis
    return worklist.IntakeRules(
        require_views=analysis.require_views,
        pair_window_s=analysis.pair_window_s,
        views_timeout_s=analysis.views_timeout_s,
        timezone=settings.zone,
    )


def reconcile(engine: Engine, store: Spool, rules: worklist.IntakeRules) -> Reconciled:
    """Compare the files with the rows and mend the difference; writes what it did into the history.

    Digests are not compared here, which would read the whole spool: the worker does before it reads an object, and
    `remnant db check` for all of them. Raises DatabaseUnavailable or StorageError; what was done until then stands.
    """
    on_disk = {
        "instance": {file.name: file for file in spool.shelved(store.objects)},
        "result": {file.name: file for file in spool.shelved(store.results)},
    }
    # Read after the folders: a file that came in between has no row here and is then looked at once more.
    missing = damaged = removed = 0
    for kept in worklist.kept_files(engine):
        shelf = store.objects if kept.kind == "instance" else store.results
        file = on_disk[kept.kind].pop(kept.file_name, None)
        if kept.purged_at is not None:
            if file is not None:
                spool.remove(shelf / kept.file_name)
                removed += 1
        elif file is None:
            if not (shelf / kept.file_name).exists() and worklist.note_lost(engine, kept, "bytes_missing"):
                missing += 1
        elif _wrong_size(kept, file) and worklist.note_lost(engine, kept, "bytes_damaged"):
            damaged += 1
    adopted = set_apart = 0
    for file in sorted(on_disk["instance"].values(), key=lambda one: one.modified_s):
        orphan = read_orphan(store.objects / file.name, file.name)
        if isinstance(orphan, str):
            path = spool.set_apart(store, file.name)
            worklist.record_event(engine, "node", f"object {path.stem} moved to quarantine: {orphan}")
            set_apart += 1
        else:
            adopted += enter(engine, orphan, rules).new
    old_s = time.time() - ORPHAN_RESULT_DAYS * 86_400
    for file in on_disk["result"].values():
        if file.modified_s < old_s:
            spool.remove(store.results / file.name)
            removed += 1
    done = Reconciled(adopted, set_apart, missing, damaged, removed)
    if str(done):
        worklist.record_event(engine, "node", f"spool and worklist compared: {done}")
        _log.warning("reconciled", what=str(done))
    return done


def faulty_files(engine: Engine, store: Spool) -> Iterator[str]:
    """Compare every file with the digest in its row, and every object's header with whose its row is; yield a sentence
    for each fault, and "" for each file that is well. Reads the whole spool; changes nothing."""
    whose = worklist.patients_and_studies(engine)
    for kept in worklist.kept_files(engine):
        if kept.purged_at is not None:
            continue
        received = kept.kind == "instance"
        path = (store.objects if received else store.results) / kept.file_name
        what = f"{'object' if received else 'result'} {kept.sha256} of scan {kept.scan_id}"
        found = spool.dataset_digest(path) if received else spool.file_digest(path)
        if found is None:
            yield f"{what} is missing or cannot be read"
        elif found != kept.sha256:
            yield f"{what} is not what it was: its bytes have another digest"
        elif received and kept.id in whose and _names_another(path, kept, whose[kept.id]):
            yield f"{what} names another patient or study than its row"
        else:
            yield ""


def _names_another(path: Path, kept: worklist.KeptFile, whose: tuple[str, str, str]) -> bool:
    orphan = read_orphan(path, kept.file_name)
    if isinstance(orphan, str):
        return False  # its row was made from what could be read when it came
    said = worklist.storable(orphan.facts)
    return (said.patient_id, said.issuer_of_patient_id, said.study_instance_uid) != whose


def _wrong_size(kept: worklist.KeptFile, file: StoredFile) -> bool:
    if kept.size_bytes is None:
        return file.size_bytes == 0
    return not kept.size_bytes < file.size_bytes <= kept.size_bytes + _META_LIMIT


def enter(engine: Engine, orphan: Orphan, rules: worklist.IntakeRules) -> worklist.Receipt:
    """Enter an object without a row as received; its history says where it came from."""
    receipt = worklist.receive(
        engine, orphan.facts, orphan.stored, source_aet=orphan.source_aet, rules=rules, adopted=True
    )
    if receipt.new:
        _log.warning("adopted", scan=receipt.scan_id, sop_instance_uid=orphan.facts.sop_instance_uid)
    return receipt


def read_orphan(path: Path, name: str) -> Orphan | str:
    """Read an object that no row owns, whose file was stored as `name`; or say why it cannot be entered."""
    digest = Path(name).stem
    found = spool.dataset_digest(path)
    if found is None:
        return "it is no DICOM file of ours any more"
    if found != digest:
        return "its bytes are not those that were received"
    try:
        # Not covered by the digest: a damaged length or UID in here can make the reader fail in many ways.
        meta = read_file_meta_info(path)
        syntax = str(meta.TransferSyntaxUID)
        source_aet = str(meta.get("SourceApplicationEntityTitle", "")).strip()
    except Exception as error:  # noqa: BLE001 - see above; the class says all that may be told of it
        return f"its file meta information cannot be read ({type(error).__name__})"
    if not valid_uid(syntax):
        return "its file meta information names no transfer syntax"
    header, size_bytes = spool.dataset_header(path, HEADER_LIMIT)
    try:
        facts = header_facts(header, syntax)
    except UnreadableHeader as error:
        return f"its header cannot be read: {error}"
    return Orphan(facts, worklist.Stored(name, digest, size_bytes, syntax), source_aet)
