"""The table `identity`: what an archive, or a second sending, says about whose a scan is.

A migration never imports the tables of the day: it has to do tomorrow what it does now.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "identity",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("said_by", sa.Text(), nullable=False),
        sa.Column("instance_id", sa.Integer(), nullable=True),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("patient_id", sa.Text(), nullable=False),
        sa.Column("issuer_of_patient_id", sa.Text(), nullable=False),
        sa.Column("patient_name", sa.Text(), nullable=False),
        sa.Column("accession_number", sa.Text(), nullable=False),
        sa.Column("patient_birth_date", sa.Text(), nullable=False),
        sa.Column("patient_sex", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.Text(), nullable=False),
        sa.Column("settled_at", sa.Text(), nullable=True),
        sa.Column("accepted_revision", sa.Integer(), nullable=True),
        sa.CheckConstraint("origin IN ('archive', 'resend')", name=op.f("ck_identity_origin")),
        sa.ForeignKeyConstraint(["instance_id"], ["instance.id"], name=op.f("fk_identity_instance_id")),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_identity_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_identity")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_identity_scan_id", "identity", ["scan_id"], unique=False)
    op.create_index("ix_identity_instance_id", "identity", ["instance_id"], unique=False)
