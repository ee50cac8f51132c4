"""Create the table of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(32), nullable=False, unique=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("lease_expires_at_s", sa.Float),
        sa.Column("finished_at_s", sa.Float),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("idempotency_key", sa.String(255), unique=True),
        sa.Column("body_sha256", sa.String(64)),
        sqlite_autoincrement=True,
    )
    op.create_index("jobs_by_status", "jobs", ["status", "seq"])
    op.create_index("jobs_by_lease", "jobs", ["lease_expires_at_s"])


def downgrade() -> None:
    op.drop_table("jobs")
