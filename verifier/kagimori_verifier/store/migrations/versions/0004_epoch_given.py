"""The epoch that a header is about to be sealed with, beside the one that it must have at least."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add a column. What an interrupted seal of an earlier release has given is not known: 0 counts from the header's own."""
    op.add_column(
        "volume", sa.Column("epoch_given", sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
