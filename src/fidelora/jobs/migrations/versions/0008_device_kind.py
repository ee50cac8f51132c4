"""Add the kind of device that a job is restricted to."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("device_kind", sa.String, nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("jobs", "device_kind")
