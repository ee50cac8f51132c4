"""Job store in a database: an SQLite file by default, or PostgreSQL for several machines.

A change reads the row of a job, applies a function of `job.py` and writes the changed columns only
if the version is still the one that was read; otherwise the change is repeated (optimistic
locking). A claim locks the row that it chooses, and skips rows that other claims have locked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from fidelora.errors import (
    CursorError,
    IdempotencyConflictError,
    JobNotFoundError,
    JobStoreError,
    QueueFullError,
)
from fidelora.jobs import job as transitions
from fidelora.jobs.adapter_sets import AdapterSets
from fidelora.jobs.codec import DOCUMENT_FORMAT
from fidelora.jobs.database import ADD_LOCK
from fidelora.jobs.job import Job, Status
from fidelora.jobs.notifications import CANCEL
from fidelora.jobs.places import Places
from fidelora.jobs.queries import (
    COUNT_QUEUED,
    FIRST_FRESH,
    FIRST_RETRY,
    READ_POSITION,
    READ_POSITIONS,
    READ_VERSIONS,
    Queries,
    id_batches,
    update_of_job,
)
from fidelora.jobs.queue_order import adapter_key
from fidelora.jobs.rows import (
    JOB_COLUMNS,
    JOBS,
    document_text,
    job_of,
    state_of,
)
from fidelora.jobs.store import (
    WORKER_LOST_S,
    JobChanges,
    JobPage,
    StoreByTransition,
    Submission,
    WorkerState,
)
from fidelora.jobs.transactions import Database
from fidelora.jobs.worker_table import WorkerTable


class _VersionConflictError(Exception):
    """Another thread or process changed the row between reading and writing it."""


class SqlStore(StoreByTransition):
    """Jobs in a database. Implements `JobStore`.

    The tables are created or migrated in one transaction at the start.

    Args:
        url: address of the database, such as `sqlite:////var/lib/fidelora/jobs.sqlite` or
            `postgresql://user:password@host/fidelora`; or a database that is open, which the store
            closes.
        document_format: format of the documents that this process writes, and the largest one that
            it claims; only tests set it.

    Raises:
        JobStoreError: the database cannot be opened, or was written by a newer version.
    """

    def __init__(self, url: str | Database, *, document_format: int = DOCUMENT_FORMAT) -> None:
        self._database = Database(url) if isinstance(url, str) else url
        self._document_format = document_format
        self._queries = Queries(self._database.dialect, document_format)
        self._places = Places(self._database, self._queries)
        self._workers = WorkerTable(self._database, self._queries)
        self._adapter_sets = AdapterSets(self._database)
        self._notifications = self._database.notifications

    @property
    def journal_mode(self) -> str:
        """SQLite's journal mode; empty for other databases."""
        if not self._database.is_sqlite:
            return ""
        with self._database.reading() as connection:
            return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())

    def add(
        self,
        job: Job,
        *,
        submission: Submission | None = None,
        capacity: int | None = None,
        now: datetime | None = None,
    ) -> Job:
        with self._database.writing() as connection:
            if capacity is not None and not self._database.is_sqlite:
                # Counting and inserting must not overlap with those of another process. SQLite has
                # one writer at a time anyway.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADD_LOCK)))
            if submission and (existing := self._submitted(connection, submission)):
                return existing
            if capacity is not None and self._count_queued(connection) >= capacity:
                raise QueueFullError
            place = self._places.of_new_job(connection, job, now)
            row = (
                state_of(job)
                | place.columns
                | {
                    "id": job.id,
                    "owner": job.owner,
                    "document": document_text(job),
                    "document_format": self._document_format,
                    "adapters": adapter_key(job.adapters),
                    "device_kind": job.device_kind,
                    "idempotency_key": submission and submission.key,
                    "body_sha256": submission and submission.body_sha256,
                }
            )
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(JOBS).values(row))
            except sa.exc.IntegrityError:
                if submission and (existing := self._submitted(connection, submission)):
                    return existing  # the same request arrived twice at the same time
                raise
            self._adapter_sets.store(connection, job)
            if not self._database.is_sqlite:
                idle = self._workers.idle(connection, job, place.before + 1, now)
                self._notifications.send_new_job(connection, idle)
        self._adapter_sets.stored(job)
        self._notifications.wake_if_local()
        return job

    def submitted(self, submission: Submission) -> Job | None:
        with self._database.reading() as connection:
            return self._submitted(connection, submission)

    def get(self, job_id: str) -> Job:
        with self._database.reading() as connection:
            return self._get(connection, job_id, None)[0]

    def read_changes(self, known: Mapping[str, int]) -> JobChanges:
        jobs: list[Job] = []
        found: set[str] = set()
        queued: set[str] = set()
        positions: dict[str, int] = {}
        with self._database.reading() as connection:
            for ids in id_batches(known):
                rows = connection.execute(READ_VERSIONS, {"ids": ids}).all()
                found |= {row.id for row in rows}
                queued |= {row.id for row in rows if row.status == Status.IN_QUEUE.value}
                changed = [row.id for row in rows if row.version != known[row.id]]
                if changed:
                    read = connection.execute(self._queries.read_jobs, {"ids": changed})
                    jobs += map(job_of, read)
            for ids in id_batches(queued):
                read = connection.execute(READ_POSITIONS, {"ids": ids})
                positions |= {row.id: row.position for row in read}
        return JobChanges(
            changed={job.id: job for job in jobs},
            positions=positions,
            missing=frozenset(known.keys() - found),
        )

    def list(
        self,
        *,
        status: Status | None = None,
        owner: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        visible = [] if owner is None else [JOBS.c.owner == owner]
        query = sa.select(*JOB_COLUMNS).where(*visible, self._queries.is_readable)
        query = query.order_by(JOBS.c.seq.desc())
        if status is not None:
            query = query.where(JOBS.c.status == status.value)
        query = query.limit(limit + 1)
        with self._database.reading() as connection:
            if cursor is not None:
                last_seq = connection.execute(
                    sa.select(JOBS.c.seq).where(JOBS.c.id == cursor, *visible)
                ).scalar()
                if last_seq is None:
                    raise CursorError
                query = query.where(JOBS.c.seq < last_seq)
            found = [job_of(row) for row in connection.execute(query)]
        return JobPage(tuple(found[:limit]), found[limit - 1].id if len(found) > limit else None)

    def queue_position(self, job_id: str) -> int | None:
        with self._database.reading() as connection:
            position = connection.execute(READ_POSITION, {"id": job_id}).scalar()
            return None if position is None else int(position)

    def count(self, status: Status) -> int:
        query = sa.select(sa.func.count()).select_from(JOBS).where(JOBS.c.status == status.value)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def needs_adapter(self, sha256: str) -> bool:
        with self._database.reading() as connection:
            return self._adapter_sets.is_needed(connection, sha256)

    def peek(self) -> Job | None:
        with self._database.reading() as connection:
            row = connection.execute(FIRST_FRESH).first() or connection.execute(FIRST_RETRY).first()
            return None if row is None else job_of(row)

    def claim(
        self,
        worker: str,
        now: datetime | None,
        lease_s: float,
        loaded: Collection[str] = (),
        *,
        merged: Collection[str] = (),
        matches: Callable[[Job], bool] | None = None,
        hold_s: float = 0.0,
        device_kind: str = "",
    ) -> Job | None:
        with self._database.writing() as connection:
            if matches is not None:
                row = self._first_match(connection, matches, device_kind, now)
                is_counted = False
            else:
                given = self._database.now(now) | {
                    "worker": worker,
                    "loaded": sorted(loaded),
                    "merged": adapter_key(merged) or None,
                    "hold_s": hold_s,
                    "device_kind": device_kind,
                }
                row = connection.execute(self._queries.claim, given).first()
                is_counted = not self._database.is_sqlite
            if row is None:
                return None
            if not is_counted:
                connection.execute(self._queries.count_claim)
            job, at = job_of(row), datetime.fromtimestamp(row.now_s, UTC)
            return self._put(connection, job, transitions.claimed(job, worker, at, lease_s), at)

    def _first_match(
        self,
        connection: sa.Connection,
        matches: Callable[[Job], bool],
        device_kind: str,
        now: datetime | None,
    ) -> Any:
        """Lock and return the row of the first job that matches; None if another job is due."""
        given = self._database.now(now) | {"device_kind": device_kind}
        due = connection.execute(self._queries.claim_due, given).first()
        if due is not None:
            return due if matches(job_of(due)) else None
        for query in (self._queries.candidates, self._queries.retry_candidates):
            for row in connection.execute(query, given).all():
                if matches(job_of(row)):
                    locked = connection.execute(
                        self._queries.claim_one, given | {"seq": row.seq}
                    ).first()
                    if locked is not None:
                        return locked
        return None

    def change(
        self, job_id: str, change: Callable[[Job, datetime], Job], now: datetime | None = None
    ) -> Job:
        while True:
            try:
                with self._database.writing() as connection:
                    job, at = self._get(connection, job_id, now)
                    after = self._put(connection, job, change(job, at), at)
            except _VersionConflictError:
                continue
            if after.status is Status.IN_QUEUE:
                self._notifications.wake_if_local()
            return after

    def abandon_expired(
        self, now: datetime | None = None, *, spare: Collection[str] = ()
    ) -> tuple[Job, ...]:
        given = self._database.now(now) | {"lost_s": WORKER_LOST_S, "spared": sorted(spare)}
        with self._database.reading() as connection:
            if connection.execute(self._queries.expired, given).first() is None:
                return ()
        abandoned = []
        with self._database.writing() as connection:
            for row in connection.execute(self._queries.lock_expired, given).all():
                job, at = job_of(row), datetime.fromtimestamp(row.now_s, UTC)
                after = transitions.abandoned(job, job.epoch, transitions.SILENT, at)
                abandoned.append(self._put(connection, job, after, at))
        self._notifications.wake_if_local()
        return tuple(abandoned)

    def cancel_requested(self, job_id: str) -> bool:
        if not self._database.is_sqlite:
            return self._notifications.cancel_requested(job_id)
        query = sa.select(JOBS.c.cancel_requested).where(JOBS.c.id == job_id)
        with self._database.reading() as connection:
            requested = connection.execute(query).scalar()
        if requested is None:
            raise JobNotFoundError
        return bool(requested)

    def running(self, worker_prefix: str) -> tuple[Job, ...]:
        given = {"prefix": worker_prefix, "length": len(worker_prefix)}
        with self._database.reading() as connection:
            return tuple(map(job_of, connection.execute(self._queries.read_running, given)))

    def report_worker(self, state: WorkerState, now: datetime | None = None) -> None:
        self._workers.report(state, now)

    def remove_worker(self, name: str) -> None:
        self._workers.remove(name)

    def workers(self, now: datetime | None = None) -> tuple[WorkerState, ...]:
        return self._workers.live(now)

    def on_new_job(self, wake: Callable[[Collection[str] | None], None]) -> None:
        self._notifications.on_new_job(wake)

    def remove_finished(self, *, before: datetime, keep: int) -> tuple[Job, ...]:
        query = self._queries.finished(before.timestamp(), keep)
        with self._database.writing() as connection:
            removed = [
                job_of(row)
                for row in connection.execute(query).all()
                # Another process may have removed it in the meantime.
                if connection.execute(sa.delete(JOBS).where(JOBS.c.seq == row.seq)).rowcount == 1
            ]
        return tuple(removed)

    def close(self) -> None:
        self._database.close()

    def _submitted(self, connection: sa.Connection, submission: Submission) -> Job | None:
        query = sa.select(*JOB_COLUMNS, JOBS.c.body_sha256).where(
            JOBS.c.idempotency_key == submission.key
        )
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.body_sha256 != submission.body_sha256:
            raise IdempotencyConflictError
        return job_of(row)

    def _count_queued(self, connection: sa.Connection) -> int:
        return int(connection.execute(COUNT_QUEUED).scalar_one())

    def _get(
        self, connection: sa.Connection, job_id: str, now: datetime | None
    ) -> tuple[Job, datetime]:
        """Return a job and the time."""
        row = connection.execute(
            self._queries.get, self._database.now(now) | {"id": job_id}
        ).first()
        if row is None:
            raise JobNotFoundError
        if row.document_format > self._document_format:
            raise JobStoreError(
                "The request was accepted by a newer version of Fidelora. Upgrade this server, or "
                "ask a server with the newer version."
            )
        return job_of(row), datetime.fromtimestamp(row.now_s, UTC)

    def _put(self, connection: sa.Connection, before: Job, after: Job, at: datetime) -> Job:
        """Write the columns that differ.

        Raises:
            _VersionConflictError: the row has changed since it was read.
        """
        if after == before:
            return after
        old, new = state_of(before), state_of(after)
        values: dict[str, Any] = {name: new[name] for name in new if new[name] != old[name]}
        is_retry = after.status is Status.IN_QUEUE and after.retry_at is not None
        if is_retry and before.status is not Status.IN_QUEUE:
            values["due"] = self._places.due_of_retry(connection, after, at)
        given = values | {"job_id": before.id, "job_version": before.version}
        if connection.execute(update_of_job(frozenset(values)), given).rowcount != 1:
            raise _VersionConflictError
        if after.status is Status.IN_QUEUE:
            self._notifications.send_new_job(connection)
        if after.cancel_requested and not before.cancel_requested:
            self._notifications.send(connection, CANCEL + after.id)
        return after
