"""By which of a verifier's keys a session was signed, and where a volume's unlock key came from."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add two columns. Of sessions before, nobody knows the key; every volume's unlock key was made here."""
    op.add_column("redemption", sa.Column("verifier_key", sa.Text(), nullable=True))
    op.add_column("volume", sa.Column("origin", sa.Text(), nullable=False, server_default="made"))
