"""The recovery key that an enrolment's volumes get, wrapped, as long as its code waits for them."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add a column. Codes of before have no recovery key."""
    op.add_column("enrol_code", sa.Column("recovery", sa.LargeBinary(), nullable=True))
