"""Give the index by adapters a condition that no other index has; see `queries.py`."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return  # SQLite uses the index for equalities only
    op.drop_index("jobs_by_adapters", "jobs")
    op.execute(
        "CREATE INDEX jobs_by_adapters ON jobs (adapters, turn, seq) "
        "WHERE (CASE WHEN attempts = 0 THEN status END) = 'in_queue'"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    op.drop_index("jobs_by_adapters", "jobs")
    op.execute(
        "CREATE INDEX jobs_by_adapters ON jobs (adapters, turn, seq) "
        "WHERE status = 'in_queue' AND attempts = 0"
    )
