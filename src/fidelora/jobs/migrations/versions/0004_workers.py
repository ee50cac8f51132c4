"""Move the state of jobs into columns, add the order of the queue, and the table of workers."""

import hashlib
import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_QUEUED = "status = 'in_queue' AND attempts {} 0"


def upgrade() -> None:
    _add_columns()
    _fill_columns()
    for name in ("jobs_by_lease", "jobs_by_attempts"):
        op.drop_index(name, "jobs")
    _add_partial_index("jobs_in_queue", ["turn", "seq"], _QUEUED.format("="))
    _add_partial_index("jobs_by_adapters", ["adapters", "turn", "seq"], _QUEUED.format("="))
    _add_partial_index("jobs_by_turn_of_owner", ["owner", "turn"], _QUEUED.format("="))
    _add_partial_index("jobs_to_retry", ["due", "seq"], _QUEUED.format(">"))
    _add_partial_index("jobs_in_progress", ["seq"], "status = 'in_progress'")
    op.create_index("jobs_by_end", "jobs", ["finished_at_s"])
    op.create_table(
        "adapter_sets",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("adapters", sa.String(64), primary_key=True),
        sa.Column("size", sa.Integer, nullable=False),
    )
    _fill_adapter_sets()
    op.create_table(
        "workers",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("loaded", sa.Text, nullable=False),
        sa.Column("merged", sa.Text, nullable=False),
        sa.Column("idle_since_s", sa.Float),
        sa.Column("reported_at_s", sa.Float, nullable=False),
    )
    op.create_table(
        "worker_adapters",
        sa.Column("worker", sa.String(255), primary_key=True),
        sa.Column("adapters", sa.String(64), primary_key=True),
    )
    op.create_index("worker_adapters_by_key", "worker_adapters", ["adapters"])
    if op.get_bind().dialect.name == "postgresql":
        # A sequence, because claims that add to a row would wait for each other.
        op.execute("CREATE SEQUENCE claim_counter AS bigint MINVALUE 0 START 0")
    else:
        counter = op.create_table(
            "claim_counter", sa.Column("claims", sa.BigInteger, nullable=False)
        )
        op.bulk_insert(counter, [{"claims": 0}])


def _add_columns() -> None:
    empty: dict[str, Any] = {"nullable": False, "server_default": ""}
    zero: dict[str, Any] = {"nullable": False, "server_default": "0"}
    for column in (
        sa.Column("epoch", sa.Integer, **zero),
        sa.Column("worker", sa.String(255), **empty),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("started_at_s", sa.Float),
        sa.Column("retry_at_s", sa.Float),
        sa.Column("progress", sa.Text),
        sa.Column("preview", sa.Text, **empty),
        sa.Column("result", sa.Text),
        sa.Column("adapters", sa.String(64), **empty),
        sa.Column("turn", sa.Integer, **zero),
        sa.Column("due", sa.BigInteger, **zero),
        sa.Column("queued_at_s", sa.Float, **zero),
    ):
        op.add_column("jobs", column)


def _fill_columns() -> None:
    connection = op.get_bind()
    names = ("seq", "attempts", "epoch", "worker", "cancel_requested", "started_at_s", "retry_at_s")
    jobs = sa.table(
        "jobs",
        *map(sa.column, (*names, "progress", "result", "adapters", "turn", "due", "document")),
    )
    queued = 0
    for seq in connection.execute(sa.select(jobs.c.seq).order_by(jobs.c.seq)).scalars().all():
        document = sa.select(jobs.c.document).where(jobs.c.seq == seq)
        plain = json.loads(connection.execute(document).scalar_one())
        progress, result = plain.get("progress"), None
        if progress:
            progress = {name: value for name, value in progress.items() if name != "preview"}
        if plain.get("outputs") or plain.get("error") or plain.get("timings"):
            result = {name: plain.get(name) for name in ("outputs", "error", "timings")}
        values = {
            "attempts": plain["attempts"],
            "epoch": plain["epoch"],
            "worker": plain["worker"],
            "cancel_requested": bool(plain["cancel_requested"]),
            "started_at_s": _seconds(plain.get("started_at")),
            "retry_at_s": _seconds(plain.get("retry_at")),
            "progress": json.dumps(progress) if progress else None,
            "result": json.dumps(result, ensure_ascii=False) if result else None,
            "adapters": _key(_adapters(plain)),
            "turn": seq,
            "due": queued + 8,
        }
        queued += plain["status"] == "in_queue"
        connection.execute(sa.update(jobs).where(jobs.c.seq == seq).values(values))


def _fill_adapter_sets() -> None:
    connection = op.get_bind()
    jobs = sa.table("jobs", *map(sa.column, ("status", "document")))
    sets = sa.table("adapter_sets", *map(sa.column, ("sha256", "adapters", "size")))
    query = sa.select(jobs.c.document).where(jobs.c.status.in_(("in_queue", "in_progress")))
    found = {_adapters(json.loads(text)) for text in connection.execute(query).scalars()}
    rows = [
        {"sha256": sha256, "adapters": _key(adapters), "size": len(adapters)}
        for adapters in found
        for sha256 in adapters
    ]
    if rows:
        connection.execute(sa.insert(sets), rows)


def _add_partial_index(name: str, columns: list[str], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, "jobs", columns, sqlite_where=where, postgresql_where=where)


def _seconds(time: str | None) -> float | None:
    return datetime.fromisoformat(time).timestamp() if time else None


def _adapters(document: dict[str, Any]) -> frozenset[str]:
    return frozenset(
        ref["sha256"]
        for recipe in document["recipes"]
        for name in ("history", "adapters")
        for ref in recipe.get(name) or ()
    )


def _key(adapters: frozenset[str]) -> str:
    """Return `queue_order.adapter_key`, as it was in the version of this migration."""
    distinct = sorted(adapters)
    if len(distinct) < 2:
        return "".join(distinct)
    return hashlib.sha256(" ".join(distinct).encode()).hexdigest()


def downgrade() -> None:
    raise NotImplementedError("restore a backup instead")
