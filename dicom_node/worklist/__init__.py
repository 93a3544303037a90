"""The worklist: what the node knows about every scan, and all SQL of the product.

Plain functions on an SQLAlchemy engine. Start reading at `states` (what a row can be), then `intake` (what arrives),
`work` (the worker), `deliveries` (the sender), `view` (people) and `upkeep` (retention, checks); `tables` has the
columns, `guard` the one function that changes a state, `events` the history.

When a function raises, nothing of what it was to do has happened; when it returns, it is committed and on the disk.
"""

from dicom_node.worklist.deliveries import (
    DueDelivery,
    NewResult,
    due_deliveries,
    next_delivery_in_s,
    record_delivery,
    release_deliveries,
    stored_results,
    substitute_delivery,
)
from dicom_node.worklist.engine import DAMAGED, DatabaseUnavailable, WorklistFault, open_worklist
from dicom_node.worklist.guard import Lease
from dicom_node.worklist.history import EVENTS, Event, changes_since, events, last_event_id, record_event, verify_events
from dicom_node.worklist.identities import accept_identity, hold_identity
from dicom_node.worklist.intake import IntakeRules, Receipt, Stored, expire_views, receive
from dicom_node.worklist.recalls import SentResult, recall, sent_results
from dicom_node.worklist.schema import schema_is_current, upgrade
from dicom_node.worklist.states import DELIVERY_STATES, REST, STATES, TRANSITIONS, LeaseLost, TransitionRefused
from dicom_node.worklist.tables import VIEW_COLUMNS
from dicom_node.worklist.upkeep import (
    KeptFile,
    Loss,
    PurgeableFile,
    check,
    damage,
    forget,
    kept_files,
    mark_purged,
    note_lost,
    purgeable,
)
from dicom_node.worklist.view import counts_by_state, details, row, rows, scan_of
from dicom_node.worklist.work import (
    Claim,
    ClaimedInstance,
    ObservedLease,
    PendingVersion,
    Predecessor,
    break_lease,
    claim,
    finish,
    heartbeat,
    judge_version,
    next_work_in_s,
    observe_leases,
    pending_versions,
    release_owner,
    retry,
    try_again,
)

__all__ = [
    "DAMAGED",
    "DELIVERY_STATES",
    "EVENTS",
    "REST",
    "STATES",
    "TRANSITIONS",
    "VIEW_COLUMNS",
    "Claim",
    "ClaimedInstance",
    "DatabaseUnavailable",
    "DueDelivery",
    "Event",
    "IntakeRules",
    "KeptFile",
    "Lease",
    "LeaseLost",
    "Loss",
    "NewResult",
    "ObservedLease",
    "PendingVersion",
    "Predecessor",
    "PurgeableFile",
    "Receipt",
    "SentResult",
    "Stored",
    "TransitionRefused",
    "WorklistFault",
    "accept_identity",
    "break_lease",
    "changes_since",
    "check",
    "claim",
    "counts_by_state",
    "damage",
    "details",
    "due_deliveries",
    "events",
    "expire_views",
    "finish",
    "forget",
    "heartbeat",
    "hold_identity",
    "judge_version",
    "kept_files",
    "last_event_id",
    "mark_purged",
    "next_delivery_in_s",
    "next_work_in_s",
    "note_lost",
    "observe_leases",
    "open_worklist",
    "pending_versions",
    "purgeable",
    "recall",
    "receive",
    "record_delivery",
    "record_event",
    "release_deliveries",
    "release_owner",
    "retry",
    "row",
    "rows",
    "scan_of",
    "schema_is_current",
    "sent_results",
    "stored_results",
    "substitute_delivery",
    "try_again",
    "upgrade",
    "verify_events",
]
