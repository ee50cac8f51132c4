"""Add the number of attempts, by which jobs with a failed attempt are claimed after all others."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("attempts", sa.Integer, nullable=False, server_default="0"))
    jobs = sa.table("jobs", *map(sa.column, ("seq", "status", "attempts", "document")))
    queued = sa.select(jobs.c.seq, jobs.c.document).where(jobs.c.status == "in_queue")
    connection = op.get_bind()
    for seq, document in connection.execute(queued).all():
        if attempts := json.loads(document)["attempts"]:
            connection.execute(sa.update(jobs).where(jobs.c.seq == seq).values(attempts=attempts))
    op.create_index("jobs_by_attempts", "jobs", ["status", "attempts", "seq"])


def downgrade() -> None:
    op.drop_index("jobs_by_attempts", "jobs")
    op.drop_column("jobs", "attempts")
