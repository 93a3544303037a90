"""Storage Commitment as SCU (PS3.4 annex J): asking an archive to keep what it stored, and believing its report.

The same report may come on the association on which we asked, on a later one or on a new one that the archive opens to
our receiver; whoever takes it calls `take_report`, whose Success says that it is durable in the worklist. Nothing that
a report says is believed of a transaction that this archive was not asked.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from uuid import uuid4

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode
from sqlalchemy import Engine

from dicom_node import log, worklist
from dicom_node.sender import back_off_s
from dicom_node.settings import Delivery
from dicom_node.uids import valid_uid

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_EVENT = 0x0113
INVALID_ARGUMENT = 0x0115

REPORT_LIMIT = 1024 * 1024
"""Longest report that is read, bytes; one about a hundred objects has about 20 KiB."""

_ALL_COMMITTED, _SOME_FAILED = 1, 2  # Event Type ID: PS3.4 J.3.3

_log = log.get("commitment")


class UnreadableReport(Exception):  # noqa: N818 - it says what the report is
    """A report that is none; the message says why and holds nothing of its values."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an archive says: SOP Instance UIDs that it keeps, and those that it does not -> Failure Reason."""

    transaction_uid: str
    committed: frozenset[str]
    failed: Mapping[str, int]


def new_transaction_uid() -> str:
    """Return a UID that no transaction had before (PS3.5 B.2)."""
    return f"2.25.{uuid4().int}"


def request(transaction_uid: str, references: Sequence[tuple[str, str]]) -> Dataset:
    """Return the Action Information of a request (PS3.4 table J.3-1) for objects, each (SOP class, SOP instance)."""
    ds = Dataset()
    ds.TransactionUID = UID(transaction_uid)
    ds.ReferencedSOPSequence = []
    for sop_class_uid, sop_instance_uid in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = UID(sop_class_uid), UID(sop_instance_uid)
        ds.ReferencedSOPSequence.append(item)
    return ds


def read_report(data: bytes, transfer_syntax_uid: str) -> Report:
    """Read the Event Information of an N-EVENT-REPORT as it came. Raises UnreadableReport."""
    if len(data) > REPORT_LIMIT:
        raise UnreadableReport(f"it is longer than {REPORT_LIMIT} bytes")
    syntax = UID(transfer_syntax_uid)
    try:
        return report_of(decode(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian))
    except UnreadableReport:
        raise
    except Exception as error:  # noqa: BLE001 - a codec fails in many ways on damaged bytes
        raise UnreadableReport(f"its data set cannot be read ({type(error).__name__})") from None


def report_of(ds: Dataset) -> Report:
    """Read Event Information (PS3.4 table J.3-2). Raises UnreadableReport."""
    transaction_uid = str(ds.get("TransactionUID") or "")
    if not valid_uid(transaction_uid):
        raise UnreadableReport("it has no Transaction UID")
    failed = {
        str(item.get("ReferencedSOPInstanceUID") or ""): int(item.get("FailureReason") or PROCESSING_FAILURE)
        for item in ds.get("FailedSOPSequence") or ()
    }
    # An archive that says both of one object has not committed itself to it.
    named = {str(item.get("ReferencedSOPInstanceUID") or "") for item in ds.get("ReferencedSOPSequence") or ()}
    return Report(transaction_uid, frozenset(named - set(failed)), failed)


def take_report(
    engine: Engine, rules: Delivery, destinations: Sequence[str], report: Report, event_type_id: int | None
) -> int:
    """Write a report of one of `destinations` into the worklist; return the status that answers it (PS3.7 10.1.1.1.8).

    Raises
    ------
    DatabaseUnavailable: nothing was written.
    """
    if event_type_id not in (_ALL_COMMITTED, _SOME_FAILED):
        return NO_SUCH_EVENT
    taken = worklist.record_report(
        engine,
        destinations,
        report.transaction_uid,
        report.committed,
        report.failed,
        pause_s=partial(pause_s, rules),
    )
    if taken is None:
        _log.warning("commitment_report_refused", destination=destinations[0], why="we did not ask it this transaction")
        return INVALID_ARGUMENT
    for one in taken:
        fields = {"scan": one.scan_id, "revision": one.revision, "kind": one.kind, "destination": one.destination}
        if one.failure:
            _log.error("not_committed", outcome=one.failure, **fields)
        else:
            _log.info("committed", **fields)
    return SUCCESS


def pause_s(rules: Delivery, attempts: int) -> float:
    """Seconds to wait after the `attempts`-th ended try, by the settings: doubled, capped, spread."""
    jitter = random.random()  # noqa: S311 - spreads retries, keeps no secret
    return back_off_s(max(1, attempts), first_s=rules.first_retry_s, max_s=rules.max_retry_s, jitter=jitter)
