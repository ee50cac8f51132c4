"""Add the owner of each job: the id of the API key that submitted it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Jobs of older versions have no owner, so only admin keys can read them.
    op.add_column("jobs", sa.Column("owner", sa.String(64), nullable=False, server_default=""))
    op.create_index("jobs_by_owner", "jobs", ["owner", "seq"])


def downgrade() -> None:
    op.drop_index("jobs_by_owner", "jobs")
    op.drop_column("jobs", "owner")
