"""The first tables: scan, instance, result, delivery, event; the view `worklist`; append-only triggers.

A migration never imports the tables of the day: it has to do tomorrow what it does now.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

VIEW = {
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

TRIGGERS = {
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


def upgrade() -> None:
    """Make everything."""
    op.create_table(
        "scan",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("patient_id", sa.Text(), nullable=True),
        sa.Column("issuer_of_patient_id", sa.Text(), nullable=True),
        sa.Column("patient_name", sa.Text(), nullable=True),
        sa.Column("accession_number", sa.Text(), nullable=True),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("acquired_at", sa.Text(), nullable=True),
        sa.Column("source_aet", sa.Text(), nullable=False),
        sa.Column("received_at", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("intake_reason", sa.Text(), nullable=True),
        sa.Column("views", sa.Text(), nullable=False),
        sa.Column("views_deadline", sa.Text(), nullable=True),
        sa.Column("finding", sa.Text(), nullable=True),
        sa.Column("probability", sa.Float(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("claims", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Text(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_boot", sa.Text(), nullable=True),
        sa.Column("lease_counter", sa.Integer(), nullable=False),
        sa.Column("analysed_at", sa.Text(), nullable=True),
        sa.Column("at_rest_since", sa.Text(), nullable=True),
        sa.Column("purged_at", sa.Text(), nullable=True),
        sa.Column("forgotten_at", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "(finding IS NOT NULL) = (coalesce(outcome, '') = 'analysed')", name=op.f("ck_scan_finding_has_outcome")
        ),
        sa.CheckConstraint("(state = 'analysing') = (lease_owner IS NOT NULL)", name=op.f("ck_scan_lease")),
        sa.CheckConstraint("finding IN ('present', 'absent', 'undetermined')", name=op.f("ck_scan_finding")),
        sa.CheckConstraint("kind IN ('acquisition', 'kept')", name=op.f("ck_scan_kind")),
        sa.CheckConstraint("outcome IN ('analysed', 'declined', 'failed')", name=op.f("ck_scan_outcome")),
        sa.CheckConstraint(
            "state IN ('receiving', 'queued', 'analysing', 'sending', 'delivered', 'declined', 'failed', 'recalled')",
            name=op.f("ck_scan_state"),
        ),
        sa.CheckConstraint("probability >= 0 AND probability <= 1", name=op.f("ck_scan_probability")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scan")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_scan_state_not_before", "scan", ["state", "not_before"], unique=False)
    op.create_index("ix_scan_study_instance_uid", "scan", ["study_instance_uid"], unique=False)
    op.create_index(
        "uq_scan_kept",
        "scan",
        ["study_instance_uid", "patient_id", "issuer_of_patient_id"],
        unique=True,
        sqlite_where=sa.text("kind = 'kept'"),
        postgresql_where=sa.text("kind = 'kept'"),
    )
    op.create_table(
        "event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=True),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=True),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("from_state", sa.Text(), nullable=True),
        sa.Column("to_state", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_event_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "instance",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("series_instance_uid", sa.Text(), nullable=False),
        sa.Column("transfer_syntax_uid", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("spool_name", sa.Text(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=True),
        sa.Column("source_aet", sa.Text(), nullable=False),
        sa.Column("received_at", sa.Text(), nullable=False),
        sa.Column("purged_at", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "verdict IN ('pending', 'same_content', 'identity_changed', 'other_pixels')",
            name=op.f("ck_instance_verdict"),
        ),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_instance_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_instance")),
        sa.UniqueConstraint("sop_instance_uid", "sha256", name=op.f("uq_instance_sop_instance_uid_sha256")),
        sa.UniqueConstraint("sop_instance_uid", "version", name=op.f("uq_instance_sop_instance_uid_version")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_instance_scan_id", "instance", ["scan_id"], unique=False)
    op.create_index("ix_instance_verdict", "instance", ["verdict"], unique=False)
    op.create_table(
        "result",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("variant", sa.Text(), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("series_instance_uid", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("file_name", sa.Text(), nullable=False),
        sa.Column("successor_scan_id", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("purged_at", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_result_scan_id")),
        sa.ForeignKeyConstraint(["successor_scan_id"], ["scan.id"], name=op.f("fk_result_successor_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_result")),
        sa.UniqueConstraint("sop_instance_uid", name=op.f("uq_result_sop_instance_uid")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_result_scan_id_revision", "result", ["scan_id", "revision"], unique=False)
    op.create_index("ix_result_successor_scan_id", "result", ["successor_scan_id"], unique=False)
    op.create_table(
        "delivery",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("result_id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("destination", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Text(), nullable=False),
        sa.Column("claimed_by", sa.Text(), nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("first_tried_at", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "state IN ('pending', 'acknowledged', 'refused', 'given_up', 'cancelled')", name=op.f("ck_delivery_state")
        ),
        sa.ForeignKeyConstraint(["result_id"], ["result.id"], name=op.f("fk_delivery_result_id")),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_delivery_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_delivery")),
        sa.UniqueConstraint("result_id", "destination", name=op.f("uq_delivery_result_id_destination")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_delivery_destination_state_not_before", "delivery", ["destination", "state", "not_before"], unique=False
    )
    op.create_index("ix_delivery_scan_id", "delivery", ["scan_id"], unique=False)
    op.create_index("uq_event_scan_id_sequence", "event", [sa.text("coalesce(scan_id, 0)"), "sequence"], unique=True)
    dialect = op.get_bind().dialect.name
    for statement in (VIEW[dialect], *TRIGGERS[dialect]):
        op.get_bind().exec_driver_sql(statement)
