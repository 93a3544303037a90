"""The tables of the worklist, its triggers, and the view `worklist` that people read.

`scan` holds what is true now, one row for each acquisition; `instance` what was received; `result` what we made;
`delivery` what became of it at each destination, `commitment` what an archive was asked to keep, `relay` what a camera
asked the archives to keep through us; `event` what happened, in order, for ever. Times are text from the database's
clock (see `clock`), lists are JSON text, so that plain `sqlite3` shows everything.

A new database is made by the migrations, never from here; a test compares the two.
"""

from collections.abc import Callable

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    event,
    func,
    text,
)

from dicom_node.worklist.states import DELIVERY_STATES, RELAY_STATES, STATES

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


scan = Table(
    "scan",
    metadata,
    Column("id", Integer, primary_key=True),
    # "acquisition": views that belong together; "kept": the objects of a study that are never analysed.
    Column("kind", Text, nullable=False),
    # Identity as received; null after `forget`. "" where the header has none.
    Column("patient_id", Text),
    Column("issuer_of_patient_id", Text),
    Column("patient_name", Text),
    Column("accession_number", Text),
    Column("study_instance_uid", Text, nullable=False),
    Column("acquired_at", Text),
    Column("source_aet", Text, nullable=False),
    Column("received_at", Text, nullable=False),
    Column("updated_at", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("outcome", Text),
    Column("reason", Text),
    # The reason that intake found for this revision: a retry starts from it again.
    Column("intake_reason", Text),
    Column("views", Text, nullable=False),
    Column("views_deadline", Text),
    Column("finding", Text),
    Column("probability", Float),
    Column("model", Text),
    Column("attempts", Integer, nullable=False),
    Column("claims", Integer, nullable=False),
    Column("not_before", Text),
    Column("last_error", Text),
    Column("lease_owner", Text),
    Column("lease_boot", Text),
    # Never goes back, not even between two leases: an unmoved counter means the same lease without a heartbeat.
    Column("lease_counter", Integer, nullable=False),
    Column("analysed_at", Text),
    Column("at_rest_since", Text),
    Column("purged_at", Text),
    Column("forgotten_at", Text),
    CheckConstraint(_one_of("state", STATES), name="state"),
    CheckConstraint("kind IN ('acquisition', 'kept')", name="kind"),
    CheckConstraint("outcome IN ('analysed', 'declined', 'failed')", name="outcome"),
    CheckConstraint("finding IN ('present', 'absent', 'undetermined')", name="finding"),
    CheckConstraint("probability >= 0 AND probability <= 1", name="probability"),
    # A finding without the outcome "analysed", or the reverse, could be read as an answer that nobody gave.
    CheckConstraint("(finding IS NOT NULL) = (coalesce(outcome, '') = 'analysed')", name="finding_has_outcome"),
    CheckConstraint("(state = 'analysing') = (lease_owner IS NOT NULL)", name="lease"),
    Index("ix_scan_state_not_before", "state", "not_before"),
    Index("ix_scan_study_instance_uid", "study_instance_uid"),
    Index(
        "uq_scan_kept",
        "study_instance_uid",
        "patient_id",
        "issuer_of_patient_id",
        unique=True,
        sqlite_where=text("kind = 'kept'"),
        postgresql_where=text("kind = 'kept'"),
    ),
    # A row's id stands in logs and in people's notes: it must not name another scan later.
    sqlite_autoincrement=True,
)

instance = Table(
    "instance",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("scan_id", Integer, ForeignKey("scan.id"), nullable=False),
    Column("sop_class_uid", Text, nullable=False),
    Column("sop_instance_uid", Text, nullable=False),
    Column("study_instance_uid", Text, nullable=False),
    Column("series_instance_uid", Text, nullable=False),
    Column("transfer_syntax_uid", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("spool_name", Text, nullable=False),
    # What grouping needs to know, as JSON, without patient identity (that stands on the row).
    Column("facts", Text, nullable=False),
    # 1 where the object may be analysed, 0 where it is only kept.
    Column("candidate", Integer, nullable=False),
    Column("reason", Text),
    # 1 is what was received first; others are other bytes under the same UID.
    Column("version", Integer, nullable=False),
    Column("verdict", Text),
    Column("source_aet", Text, nullable=False),
    Column("received_at", Text, nullable=False),
    Column("purged_at", Text),
    UniqueConstraint("sop_instance_uid", "sha256"),
    UniqueConstraint("sop_instance_uid", "version"),
    CheckConstraint("verdict IN ('pending', 'same_content', 'identity_changed', 'other_pixels')", name="verdict"),
    Index("ix_instance_scan_id", "scan_id"),
    Index("ix_instance_verdict", "verdict"),
    sqlite_autoincrement=True,
)

result = Table(
    "result",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("scan_id", Integer, ForeignKey("scan.id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("variant", Text, nullable=False),
    Column("sop_class_uid", Text, nullable=False),
    Column("sop_instance_uid", Text, nullable=False),
    Column("series_instance_uid", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("file_name", Text, nullable=False),
    # The row that took this row's views away, whose results replace these.
    Column("successor_scan_id", Integer, ForeignKey("scan.id")),
    Column("created_at", Text, nullable=False),
    Column("purged_at", Text),
    UniqueConstraint("sop_instance_uid"),
    Index("ix_result_scan_id_revision", "scan_id", "revision"),
    Index("ix_result_successor_scan_id", "successor_scan_id"),
    sqlite_autoincrement=True,
)

delivery = Table(
    "delivery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("result_id", Integer, ForeignKey("result.id"), nullable=False),
    Column("scan_id", Integer, ForeignKey("scan.id"), nullable=False),
    Column("destination", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("not_before", Text, nullable=False),
    Column("claimed_by", Text),
    Column("last_status", Integer),
    Column("last_error", Text),
    Column("first_tried_at", Text),
    Column("updated_at", Text, nullable=False),
    # Since when the archive has the object, where it is asked for Storage Commitment; null again where it lost it.
    Column("stored_at", Text),
    UniqueConstraint("result_id", "destination"),
    CheckConstraint(_one_of("state", DELIVERY_STATES), name="state"),
    Index("ix_delivery_destination_state_not_before", "destination", "state", "not_before"),
    Index("ix_delivery_scan_id", "scan_id"),
    sqlite_autoincrement=True,
)

# Askings for Storage Commitment: a line for each object of a transaction.
commitment = Table(
    "commitment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transaction_uid", Text, nullable=False),
    Column("delivery_id", Integer, ForeignKey("delivery.id"), nullable=False),
    Column("asked_at", Text, nullable=False),
    # When the archive reported; null while it has not. Failure Reason (0008,1197) where it does not keep the object.
    Column("reported_at", Text),
    Column("failure_reason", Integer),
    UniqueConstraint("transaction_uid", "delivery_id"),
    Index("ix_commitment_delivery_id", "delivery_id"),
    sqlite_autoincrement=True,
)

# A camera's requests for Storage Commitment that are passed on to the archives.
relay = Table(
    "relay",
    metadata,
    Column("id", Integer, primary_key=True),
    # AE title and address that asked, and are told.
    Column("source", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("transaction_uid", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("not_before", Text, nullable=False),
    Column("claimed_by", Text),
    Column("last_error", Text),
    Column("requested_at", Text, nullable=False),
    # Since when no archive is asked any longer and the camera is to be told.
    Column("decided_at", Text),
    Column("updated_at", Text, nullable=False),
    UniqueConstraint("source", "transaction_uid"),
    CheckConstraint(_one_of("state", RELAY_STATES), name="state"),
    Index("ix_relay_state_not_before", "state", "not_before"),
    sqlite_autoincrement=True,
)

relayed_object = Table(
    "relayed_object",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("relay_id", Integer, ForeignKey("relay.id"), nullable=False),
    Column("sop_class_uid", Text, nullable=False),
    Column("sop_instance_uid", Text, nullable=False),
    # AE title of the archive that committed itself to keep it; null while none has.
    Column("retrieve_ae_title", Text),
    UniqueConstraint("relay_id", "sop_instance_uid"),
    sqlite_autoincrement=True,
)

relay_asking = Table(
    "relay_asking",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("relay_id", Integer, ForeignKey("relay.id"), nullable=False),
    Column("destination", Text, nullable=False),
    Column("retrieve_ae_title", Text, nullable=False),
    Column("transaction_uid", Text, nullable=False),
    Column("asked_at", Text, nullable=False),
    Column("reported_at", Text),
    UniqueConstraint("transaction_uid"),
    Index("ix_relay_asking_relay_id", "relay_id"),
    sqlite_autoincrement=True,
)

# What an archive said last of an object that it does not keep: Failure Reason (0008,1197).
relay_answer = Table(
    "relay_answer",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("object_id", Integer, ForeignKey("relayed_object.id"), nullable=False),
    Column("destination", Text, nullable=False),
    Column("failure_reason", Integer, nullable=False),
    UniqueConstraint("object_id", "destination"),
    sqlite_autoincrement=True,
)

# Other identities under which a row's scan is known, for a person to compare: an archive's answer to a query, or the
# same image sent again. The rows go when `forget` empties the identity columns of `scan`.
identity = Table(
    "identity",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("scan_id", Integer, ForeignKey("scan.id"), nullable=False),
    Column("origin", Text, nullable=False),
    # The destination that answered, or the AE title that sent the image again.
    Column("said_by", Text, nullable=False),
    # The other version of an image, where origin is "resend".
    Column("instance_id", Integer, ForeignKey("instance.id")),
    Column("study_instance_uid", Text, nullable=False),
    Column("patient_id", Text, nullable=False),
    Column("issuer_of_patient_id", Text, nullable=False),
    Column("patient_name", Text, nullable=False),
    Column("accession_number", Text, nullable=False),
    Column("patient_birth_date", Text, nullable=False),
    Column("patient_sex", Text, nullable=False),
    Column("seen_at", Text, nullable=False),
    # When a person decided, or the same archive said something else; null while it is open.
    Column("settled_at", Text),
    # The revision that a person opened by accepting it; null where nobody did.
    Column("accepted_revision", Integer),
    CheckConstraint("origin IN ('archive', 'resend')", name="origin"),
    Index("ix_identity_scan_id", "scan_id"),
    Index("ix_identity_instance_id", "instance_id"),
    sqlite_autoincrement=True,
)

event_table = Table(
    "event",
    metadata,
    Column("id", Integer, primary_key=True),
    # Null for the node's own history.
    Column("scan_id", Integer, ForeignKey("scan.id")),
    # 1, 2, 3 ... within a row's history: a missing one shows.
    Column("sequence", Integer, nullable=False),
    Column("at", Text, nullable=False),
    Column("revision", Integer),
    Column("event", Text, nullable=False),
    Column("from_state", Text),
    Column("to_state", Text),
    Column("detail", Text, nullable=False),
    Column("digest", Text, nullable=False),
    sqlite_autoincrement=True,
)
Index("uq_event_scan_id_sequence", func.coalesce(event_table.c.scan_id, text("0")), event_table.c.sequence, unique=True)

VIEW_COLUMNS = (
    "id",
    "state",
    "outcome",
    "reason",
    "accession_number",
    "patient_id",
    "study_instance_uid",
    "acquired_at",
    "source_aet",
    "received_at",
    "updated_at",
    "views",
    "finding",
    "probability",
    "model",
    "results",
    "delivered_to",
    "revision",
    "attempts",
    "not_before",
    "last_error",
)
"""The columns of the view `worklist`, in order. Other people's scripts depend on them."""

# `delivered_to` names one state for each destination, although a destination has a delivery for each result object: the
# one that most needs a person. Only the JSON functions differ between the databases.
VIEW_SQL = {
    "sqlite": """CREATE VIEW worklist AS
SELECT
    scan.id, scan.state, scan.outcome, scan.reason, scan.accession_number, scan.patient_id,
    scan.study_instance_uid, scan.acquired_at, scan.source_aet, scan.received_at, scan.updated_at,
    scan.views, scan.finding, scan.probability, scan.model,
    (SELECT json_group_array(
        json_object('kind', kind, 'sop_class_uid', sop_class_uid, 'sop_instance_uid', sop_instance_uid))
     FROM (
        SELECT kind, sop_class_uid, sop_instance_uid FROM result
        WHERE result.scan_id = scan.id AND result.revision = scan.revision ORDER BY result.id
     )) AS results,
    (SELECT json_group_object(destination, state) FROM (
        SELECT delivery.destination,
               CASE min(CASE delivery.state WHEN 'refused' THEN 1 WHEN 'given_up' THEN 2 WHEN 'pending' THEN 3
                                            WHEN 'acknowledged' THEN 4 ELSE 5 END)
                 WHEN 1 THEN 'refused' WHEN 2 THEN 'given_up' WHEN 3 THEN 'pending' WHEN 4 THEN 'acknowledged'
                 ELSE 'cancelled' END AS state
        FROM delivery JOIN result ON result.id = delivery.result_id
        WHERE delivery.scan_id = scan.id AND result.revision = scan.revision
        GROUP BY delivery.destination
        ORDER BY delivery.destination
     )) AS delivered_to,
    scan.revision, scan.attempts, scan.not_before, scan.last_error
FROM scan""",
    "postgresql": """CREATE VIEW worklist AS
SELECT
    scan.id, scan.state, scan.outcome, scan.reason, scan.accession_number, scan.patient_id,
    scan.study_instance_uid, scan.acquired_at, scan.source_aet, scan.received_at, scan.updated_at,
    scan.views, scan.finding, scan.probability, scan.model,
    (SELECT coalesce(json_agg(
        json_build_object('kind', kind, 'sop_class_uid', sop_class_uid, 'sop_instance_uid', sop_instance_uid)
        ORDER BY result.id), '[]')::text
     FROM result WHERE result.scan_id = scan.id AND result.revision = scan.revision) AS results,
    (SELECT coalesce(json_object_agg(destination, sent.state ORDER BY destination), '{}')::text FROM (
        SELECT delivery.destination,
               CASE min(CASE delivery.state WHEN 'refused' THEN 1 WHEN 'given_up' THEN 2 WHEN 'pending' THEN 3
                                            WHEN 'acknowledged' THEN 4 ELSE 5 END)
                 WHEN 1 THEN 'refused' WHEN 2 THEN 'given_up' WHEN 3 THEN 'pending' WHEN 4 THEN 'acknowledged'
                 ELSE 'cancelled' END AS state
        FROM delivery JOIN result ON result.id = delivery.result_id
        WHERE delivery.scan_id = scan.id AND result.revision = scan.revision
        GROUP BY delivery.destination
     ) AS sent) AS delivered_to,
    scan.revision, scan.attempts, scan.not_before, scan.last_error
FROM scan""",
}

# History that can be edited proves nothing; the digests make it show, the triggers keep it from happening by mistake.
TRIGGER_SQL = {
    "sqlite": (
        "CREATE TRIGGER event_no_update BEFORE UPDATE ON event"
        " BEGIN SELECT raise(ABORT, 'events are append-only'); END",
        "CREATE TRIGGER event_no_delete BEFORE DELETE ON event"
        " BEGIN SELECT raise(ABORT, 'events are append-only'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION event_append_only() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'events are append-only'; END $$",
        "CREATE TRIGGER event_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON event"
        " FOR EACH STATEMENT EXECUTE FUNCTION event_append_only()",
    ),
}

_ddl: Callable[[str], DDL] = DDL  # the constructor has no annotations of its own

for _dialect in ("sqlite", "postgresql"):
    for _statement in (VIEW_SQL[_dialect], *TRIGGER_SQL[_dialect]):
        event.listen(metadata, "after_create", _ddl(_statement).execute_if(dialect=_dialect))
