"""Table of the jobs in a database, its queries, and the conversion of its rows.

Each row holds the whole job as a JSON document, plus the few columns that queries need.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from fidelora.jobs.codec import job_from_dict, job_to_dict
from fidelora.jobs.job import Job, Status

CLAIM_WINDOW = 100  # number of oldest jobs that a claim reads; bounds its cost in long queues
_CACHED_CHARACTERS = 20_000  # longest document to keep parsed; most have less than 2,000
FINAL_STATUSES = [status.value for status in Status if status.final]

JOBS = sa.table(
    "jobs",
    *(
        sa.column(name)
        for name in (
            "seq",
            "id",
            "status",
            "version",
            "attempts",
            "lease_expires_at_s",
            "finished_at_s",
            "owner",
            "document",
        )
    ),
    *(sa.column(name) for name in ("idempotency_key", "body_sha256")),
)

MAX_IDS = 500
"""Number of ids in a query; databases limit the number of a statement's parameters."""

# Built once, because SQLAlchemy takes longer to build these queries than SQLite to execute them.
_ids: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
READ_VERSIONS = sa.select(JOBS.c.id, JOBS.c.version, JOBS.c.status).where(JOBS.c.id.in_(_ids))
READ_DOCUMENTS = sa.select(JOBS.c.id, JOBS.c.document).where(JOBS.c.id.in_(_ids))
_queue = (
    sa.select(JOBS.c.id, (sa.func.row_number().over(order_by=JOBS.c.seq) - 1).label("position"))
    .where(JOBS.c.status == Status.IN_QUEUE.value)
    .subquery()
)
READ_POSITIONS = sa.select(_queue.c.id, _queue.c.position).where(_queue.c.id.in_(_ids))


def row_of(job: Job) -> dict[str, Any]:
    """Return the values of the columns for a job, except for its idempotency key."""
    return {
        "id": job.id,
        "status": job.status.value,
        "version": job.version,
        "attempts": job.attempts,
        "lease_expires_at_s": job.lease_expires_at and job.lease_expires_at.timestamp(),
        "finished_at_s": job.finished_at and job.finished_at.timestamp(),
        "owner": job.owner,
        "document": json.dumps(job_to_dict(job), ensure_ascii=False),
    }


def job_of(document: str) -> Job:
    """Return the job in the column `document`; most documents are parsed only once."""
    return _parse(document) if len(document) > _CACHED_CHARACTERS else _parse_cached(document)


def _parse(document: str) -> Job:
    return job_from_dict(json.loads(document))


# Each claim reads the beginning of the queue, and most of these jobs were read by the claim before.
_parse_cached = lru_cache(maxsize=2 * CLAIM_WINDOW)(_parse)
