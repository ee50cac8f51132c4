"""Add the format of each job's document, so that older workers leave newer jobs in the queue."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Processes of older versions that are still running insert rows without this column.
    column = sa.Column("document_format", sa.Integer, nullable=False, server_default="1")
    op.add_column("jobs", column)


def downgrade() -> None:
    op.drop_column("jobs", "document_format")
