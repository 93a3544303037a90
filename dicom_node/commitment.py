"""Storage Commitment (PS3.4 annex J): what its messages say, and what a report means for the worklist.

As SCU we ask an archive to keep what it stored. The same report may come on the association on which we asked, on a
later one or on a new one that the archive opens to our receiver; whoever takes it calls `take_report`, whose Success
says that it is durable in the worklist. Nothing that a report says is believed of a transaction that this archive was
not asked.

As SCP we pass a camera's request on to the archives (`commitment = "proxy"`; `dicom_node/relay.py`): we purge what we
receive and cannot be queried, so that nothing but an archive's own commitment is worth anything to the camera.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TypeVar
from uuid import uuid4

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode
from sqlalchemy import Engine

from dicom_node import log, worklist
from dicom_node.sender import back_off_s
from dicom_node.settings import Delivery, Source
from dicom_node.uids import valid_uid

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT = 0x0113
INVALID_ARGUMENT = 0x0115
NO_SUCH_ACTION = 0x0123
RESOURCE_LIMITATION = 0x0213

MESSAGE_LIMIT = 1024 * 1024
"""Longest request or report that is read, bytes; one about a hundred objects has about 20 KiB."""

_REQUEST = 1  # Action Type ID: PS3.4 J.3.2
_ALL_COMMITTED, _SOME_FAILED = 1, 2  # Event Type ID: PS3.4 J.3.3

_log = log.get("commitment")

_T = TypeVar("_T")


class Unreadable(Exception):  # noqa: N818 - it says what the message is
    """A request or a report that is none; the message says why and holds nothing of its values."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an archive says: SOP Instance UIDs that it keeps, and those that it does not -> Failure Reason."""

    transaction_uid: str
    committed: frozenset[str]
    failed: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a camera asks for: objects, each (SOP class, SOP instance), under its Transaction UID."""

    transaction_uid: str
    references: tuple[tuple[str, str], ...]


def new_transaction_uid() -> str:
    """Return a UID that no transaction had before (PS3.5 B.2)."""
    return f"2.25.{uuid4().int}"


def request(transaction_uid: str, references: Sequence[tuple[str, str]]) -> Dataset:
    """Return the Action Information of a request (PS3.4 table J.3-1) for objects, each (SOP class, SOP instance)."""
    ds = Dataset()
    ds.TransactionUID = UID(transaction_uid)
    ds.ReferencedSOPSequence = [_reference(*one) for one in references]
    return ds


def answer(relay: worklist.DueRelay) -> tuple[Dataset, int]:
    """Return the Event Information of the report on a camera's request (PS3.4 table J.3-2), and its Event Type ID.

    Each committed object names the archive that keeps it, to retrieve it from. What none committed itself to has 0112
    where every archive says that it does not have it, else 0110.
    """
    ds = Dataset()
    ds.TransactionUID = UID(relay.transaction_uid)
    kept, failed = [], []
    for one in relay.objects:
        item = _reference(one.sop_class_uid, one.sop_instance_uid)
        if one.kept_by:
            item.RetrieveAETitle = one.kept_by
            kept.append(item)
        else:
            item.FailureReason = NO_SUCH_INSTANCE if one.nowhere else PROCESSING_FAILURE
            failed.append(item)
    if kept:
        ds.ReferencedSOPSequence = kept
    if failed:
        ds.FailedSOPSequence = failed
    return ds, _SOME_FAILED if failed else _ALL_COMMITTED


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = UID(sop_class_uid), UID(sop_instance_uid)
    return item


def _read(data: bytes, transfer_syntax_uid: str, of: Callable[[Dataset], _T]) -> _T:
    """Decode a data set as it came and hand it to `of`. Raises Unreadable."""
    if len(data) > MESSAGE_LIMIT:
        raise Unreadable(f"it is longer than {MESSAGE_LIMIT} bytes")
    syntax = UID(transfer_syntax_uid)
    try:
        return of(decode(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian))
    except Unreadable:
        raise
    except Exception as error:  # noqa: BLE001 - a codec fails in many ways on damaged bytes
        raise Unreadable(f"its data set cannot be read ({type(error).__name__})") from None


def _transaction_uid(ds: Dataset) -> str:
    uid = str(ds.get("TransactionUID") or "")
    if not valid_uid(uid):
        raise Unreadable("it has no Transaction UID")
    return uid


def read_request(data: bytes, transfer_syntax_uid: str) -> Asked:
    """Read the Action Information of an N-ACTION as it came (PS3.4 table J.3-1). Raises Unreadable."""
    return _read(data, transfer_syntax_uid, _asked)


def _asked(ds: Dataset) -> Asked:
    transaction_uid = _transaction_uid(ds)
    references = tuple(
        dict.fromkeys(
            (str(item.get("ReferencedSOPClassUID") or ""), str(item.get("ReferencedSOPInstanceUID") or ""))
            for item in ds.get("ReferencedSOPSequence") or ()
        )
    )
    if not references:
        raise Unreadable("it names no object")
    if not all(valid_uid(uid) for one in references for uid in one):
        raise Unreadable("it names an object by what is no UID")
    if len({instance for _, instance in references}) < len(references):
        raise Unreadable("it names an object under two SOP classes")
    return Asked(transaction_uid, references)


def read_report(data: bytes, transfer_syntax_uid: str) -> Report:
    """Read the Event Information of an N-EVENT-REPORT as it came. Raises Unreadable."""
    return _read(data, transfer_syntax_uid, report_of)


def report_of(ds: Dataset) -> Report:
    """Read Event Information (PS3.4 table J.3-2). Raises Unreadable."""
    transaction_uid = _transaction_uid(ds)
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
    said = destinations, report.transaction_uid, report.committed, report.failed
    taken = worklist.record_report(engine, *said, pause_s=partial(pause_s, rules))
    if taken is None and worklist.record_relayed(engine, *said):
        return SUCCESS
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


_NOT_TAKEN = {
    "reused": (INVALID_ARGUMENT, "its Transaction UID was used before, for other objects"),
    "too_many": (RESOURCE_LIMITATION, f"{worklist.MOST_OPEN} of its requests wait for an answer"),
}


def take_request(engine: Engine, source: Source, address: str, asked: Asked, action_type_id: int | None) -> int:
    """Write a camera's request into the worklist; return the status that answers it (PS3.7 10.1.4.1.10).

    Raises
    ------
    DatabaseUnavailable: nothing was written.
    """
    if action_type_id != _REQUEST:
        return NO_SUCH_ACTION
    taken = worklist.record_request(
        engine,
        source=source.ae_title,
        address=address,
        transaction_uid=asked.transaction_uid,
        references=asked.references,
    )
    if taken != "taken":
        status, why = _NOT_TAKEN[taken]
        _log.warning("commitment_request_refused", source_aet=source.ae_title, status=f"{status:04X}", why=why)
        return status
    _log.info("commitment_requested", source_aet=source.ae_title, objects=len(asked.references))
    return SUCCESS


def pause_s(rules: Delivery, attempts: int) -> float:
    """Seconds to wait after the `attempts`-th ended try, by the settings: doubled, capped, spread."""
    jitter = random.random()  # noqa: S311 - spreads retries, keeps no secret
    return back_off_s(max(1, attempts), first_s=rules.first_retry_s, max_s=rules.max_retry_s, jitter=jitter)
