"""Storage Commitment: when an archive took an object, and what it said about keeping it.

A migration never imports the tables of the day: it has to do tomorrow what it does now.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the column and the table."""
    op.add_column("delivery", sa.Column("stored_at", sa.Text(), nullable=True))
    op.create_table(
        "commitment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("delivery_id", sa.Integer(), nullable=False),
        sa.Column("asked_at", sa.Text(), nullable=False),
        sa.Column("reported_at", sa.Text(), nullable=True),
        sa.Column("failure_reason", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["delivery_id"], ["delivery.id"], name=op.f("fk_commitment_delivery_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commitment")),
        sa.UniqueConstraint("transaction_uid", "delivery_id", name=op.f("uq_commitment_transaction_uid_delivery_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_commitment_delivery_id", "commitment", ["delivery_id"], unique=False)
