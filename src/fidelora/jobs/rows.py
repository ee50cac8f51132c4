"""Tables of the jobs and workers in a database, and the conversion of their rows.

The document of a job is written once. The columns that change often are few and short, so a claim
or a heartbeat writes little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from fidelora.jobs.codec import (
    document_of,
    fields_of_result,
    job_of_document,
    progress_to_dict,
    result_of,
)
from fidelora.jobs.job import Job, JobProgress, Status

CLAIM_WINDOW = 100  # number of jobs that a claim for a batch reads; bounds its cost
_CACHED_CHARACTERS = 20_000  # longest document to keep parsed; most have less than 2,000
FINAL_STATUSES = [status.value for status in Status if status.final]

_STATE: dict[str, Any] = {
    "status": sa.String,
    "version": sa.Integer,
    "attempts": sa.Integer,
    "epoch": sa.Integer,
    "worker": sa.String,
    "cancel_requested": sa.Boolean,
    "started_at_s": sa.Float,
    "finished_at_s": sa.Float,
    "lease_expires_at_s": sa.Float,
    "retry_at_s": sa.Float,
    "progress": sa.Text,
    "preview": sa.Text,
    "result": sa.Text,
}
"""Columns with the fields of a job that change, and their types."""

JOBS = sa.table(
    "jobs",
    *(sa.column(name, type_) for name, type_ in _STATE.items()),
    sa.column("seq", sa.Integer),
    sa.column("id", sa.String),
    sa.column("owner", sa.String),
    sa.column("document", sa.Text),
    sa.column("document_format", sa.Integer),
    sa.column("idempotency_key", sa.String),
    sa.column("body_sha256", sa.String),
    sa.column("adapters", sa.String),
    sa.column("device_kind", sa.String),
    sa.column("turn", sa.Integer),
    sa.column("due", sa.BigInteger),
    sa.column("queued_at_s", sa.Float),
)
ADAPTER_SETS = sa.table(
    "adapter_sets",
    sa.column("sha256", sa.String),
    sa.column("adapters", sa.String),
    sa.column("size", sa.Integer),
)
WORKERS = sa.table(
    "workers",
    sa.column("name", sa.String),
    sa.column("device", sa.String),
    sa.column("version", sa.String),
    sa.column("loaded", sa.Text),
    sa.column("merged", sa.Text),
    sa.column("models", sa.Text),
    sa.column("idle_since_s", sa.Float),
    sa.column("reported_at_s", sa.Float),
)
WORKER_ADAPTERS = sa.table(
    "worker_adapters", sa.column("worker", sa.String), sa.column("adapters", sa.String)
)
CLAIM_COUNTER = sa.table("claim_counter", sa.column("claims", sa.BigInteger))

JOB_COLUMNS = [
    JOBS.c.seq,
    JOBS.c.document,
    JOBS.c.document_format,
    *(JOBS.c[name] for name in _STATE),
]
"""Columns that `job_of` reads, the number of the row, and the format of the document."""


def state_of(job: Job) -> dict[str, Any]:
    """Return the values of the columns that change, for a job."""
    progress, result = job.progress, result_of(job)
    return {
        "status": job.status.value,
        "version": job.version,
        "attempts": job.attempts,
        "epoch": job.epoch,
        "worker": job.worker,
        "cancel_requested": job.cancel_requested,
        "started_at_s": job.started_at and job.started_at.timestamp(),
        "finished_at_s": job.finished_at and job.finished_at.timestamp(),
        "lease_expires_at_s": job.lease_expires_at and job.lease_expires_at.timestamp(),
        "retry_at_s": job.retry_at and job.retry_at.timestamp(),
        "progress": json.dumps(progress_to_dict(progress)) if progress else None,
        "preview": progress.preview if progress else "",
        "result": json.dumps(result, ensure_ascii=False) if result else None,
    }


def document_text(job: Job) -> str:
    """Return the value of the column `document` for a job."""
    return json.dumps(document_of(job), ensure_ascii=False)


def job_of(row: Any) -> Job:
    """Return the job in a row with `JOB_COLUMNS`; most documents are parsed only once."""
    return replace(_added_job(row.document), **_fields_of(row._mapping))


def time_of(seconds: float | None) -> datetime | None:
    """Return the time in a column, in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _fields_of(row: Mapping[str, Any]) -> dict[str, Any]:
    progress = None
    if row["progress"]:
        progress = JobProgress(**json.loads(row["progress"]), preview=row["preview"])
    return {
        "status": Status(row["status"]),
        "version": row["version"],
        "attempts": row["attempts"],
        "epoch": row["epoch"],
        "worker": row["worker"],
        "cancel_requested": row["cancel_requested"],
        "started_at": time_of(row["started_at_s"]),
        "finished_at": time_of(row["finished_at_s"]),
        "lease_expires_at": time_of(row["lease_expires_at_s"]),
        "retry_at": time_of(row["retry_at_s"]),
        "progress": progress,
        **(fields_of_result(json.loads(row["result"])) if row["result"] else {}),
    }


def _added_job(document: str) -> Job:
    return _parse(document) if len(document) > _CACHED_CHARACTERS else _parse_cached(document)


def _parse(document: str) -> Job:
    return job_of_document(json.loads(document))


# The document of a job is read at each claim, heartbeat and status call.
_parse_cached = lru_cache(maxsize=2 * CLAIM_WINDOW)(_parse)
