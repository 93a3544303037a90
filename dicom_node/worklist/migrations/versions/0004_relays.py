"""A camera's requests for Storage Commitment that are passed on to the archives.

A migration never imports the tables of the day: it has to do tomorrow what it does now.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "relay",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Text(), nullable=False),
        sa.Column("claimed_by", sa.Text(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("requested_at", sa.Text(), nullable=False),
        sa.Column("decided_at", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.Text(), nullable=False),
        sa.CheckConstraint("state IN ('asking', 'reporting', 'reported', 'given_up')", name=op.f("ck_relay_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_relay")),
        sa.UniqueConstraint("source", "transaction_uid", name=op.f("uq_relay_source_transaction_uid")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_relay_state_not_before", "relay", ["state", "not_before"], unique=False)
    op.create_table(
        "relayed_object",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("relay_id", sa.Integer(), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("retrieve_ae_title", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["relay_id"], ["relay.id"], name=op.f("fk_relayed_object_relay_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_relayed_object")),
        sa.UniqueConstraint("relay_id", "sop_instance_uid", name=op.f("uq_relayed_object_relay_id_sop_instance_uid")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "relay_asking",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("relay_id", sa.Integer(), nullable=False),
        sa.Column("destination", sa.Text(), nullable=False),
        sa.Column("retrieve_ae_title", sa.Text(), nullable=False),
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("asked_at", sa.Text(), nullable=False),
        sa.Column("reported_at", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["relay_id"], ["relay.id"], name=op.f("fk_relay_asking_relay_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_relay_asking")),
        sa.UniqueConstraint("transaction_uid", name=op.f("uq_relay_asking_transaction_uid")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_relay_asking_relay_id", "relay_asking", ["relay_id"], unique=False)
    op.create_table(
        "relay_answer",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("object_id", sa.Integer(), nullable=False),
        sa.Column("destination", sa.Text(), nullable=False),
        sa.Column("failure_reason", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["object_id"], ["relayed_object.id"], name=op.f("fk_relay_answer_object_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_relay_answer")),
        sa.UniqueConstraint("object_id", "destination", name=op.f("uq_relay_answer_object_id_destination")),
        sqlite_autoincrement=True,
    )
