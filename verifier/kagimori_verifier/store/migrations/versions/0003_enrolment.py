"""One-time codes of enrolments, and how each volume was enrolled."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add two tables. Every volume before was added on the owner's machine: there was no other way."""
    op.create_table(
        "enrol_code",
        sa.Column("vm_id", sa.Text(), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("expires", sa.BigInteger(), nullable=False),
        sa.Column("session", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.vm_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("vm_id"),
    )
    op.create_table(
        "enrolment",
        sa.Column("vm_id", sa.Text(), nullable=False),
        sa.Column("uuid", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("provenance", sa.Text(), nullable=False),
        sa.Column("session", sa.Text(), nullable=True),
        sa.Column("explained", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["vm_id", "uuid", "version"],
            ["volume.vm_id", "volume.uuid", "volume.version"],
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("vm_id", "uuid", "version"),
    )
    op.create_index(op.f("ix_enrolment_session"), "enrolment", ["session"], unique=False)
    op.execute(
        "INSERT INTO enrolment (vm_id, uuid, version, provenance, session, explained) "
        "SELECT vm_id, uuid, version, 'owner-machine', NULL, true FROM volume"
    )
