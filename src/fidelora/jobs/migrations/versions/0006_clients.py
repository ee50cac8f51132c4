"""Add API keys, sessions of browsers, and the state of AUTOMATIC1111's API."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False, unique=True),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.Column("created_at_s", sa.Float, nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("token_sha256", sa.String(64), primary_key=True),
        sa.Column("key_sha256", sa.String(64), nullable=False),
        sa.Column("ends_at_s", sa.Float, nullable=False),
    )
    op.create_index("sessions_by_key", "sessions", ["key_sha256"])
    op.create_index("sessions_by_end", "sessions", ["ends_at_s"])
    op.create_table(
        "a1111_models",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("model", sa.String(64), nullable=False),
    )
    op.create_table(
        "a1111_jobs",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
    )
    op.create_index("a1111_jobs_by_owner", "a1111_jobs", ["owner"])


def downgrade() -> None:
    for table in ("a1111_jobs", "a1111_models", "sessions", "api_keys"):
        op.drop_table(table)
