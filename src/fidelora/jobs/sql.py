"""Job store in a database: SQLite by default, or any other by its URL, such as PostgreSQL.

A change reads the row of a job, applies a function of `job.py` and writes the row back only if its
version is still the one that was read; otherwise the change is repeated (optimistic locking).
Therefore a dead process cannot hold a lock, and all databases behave the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

import sqlalchemy as sa

from fidelora.errors import (
    CursorError,
    IdempotencyConflictError,
    JobNotFoundError,
    JobStoreError,
    QueueFullError,
)
from fidelora.jobs import job as transitions
from fidelora.jobs.database import BUSY_TIMEOUT_S, database_errors, open_database
from fidelora.jobs.job import Job, Status
from fidelora.jobs.rows import (
    CLAIM_WINDOW,
    FINAL_STATUSES,
    JOBS,
    MAX_IDS,
    READ_DOCUMENTS,
    READ_POSITIONS,
    READ_VERSIONS,
    job_of,
    row_of,
)
from fidelora.jobs.store import (
    JobChanges,
    JobPage,
    StoreByTransition,
    Submission,
    choose,
    in_claim_order,
    jobs_passed_over,
)

_RETRY_WINDOW = 10  # number of oldest jobs with a failed attempt that a claim reads


class _VersionConflictError(Exception):
    """Another thread or process changed the row between reading and writing it."""


class SqlStore(StoreByTransition):
    """Jobs in a database. Implements `JobStore`.

    The tables are created or migrated in one transaction at the start.

    Args:
        url: address of the database, such as `sqlite:////var/lib/fidelora/jobs.sqlite`.

    Raises:
        JobStoreError: the database cannot be opened, or was written by a newer version.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)
        is_sqlite = self._engine.dialect.name == "sqlite"
        self._write_lock = threading.Lock() if is_sqlite else None

    @property
    def journal_mode(self) -> str:
        """SQLite's journal mode; empty for other databases."""
        if self._engine.dialect.name != "sqlite":
            return ""
        with self._reading() as connection:
            return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())

    def add(
        self, job: Job, *, submission: Submission | None = None, capacity: int | None = None
    ) -> Job:
        with self._writing() as connection:
            if submission and (existing := self._submitted(connection, submission)):
                return existing
            if capacity is not None and self._count_queued(connection) >= capacity:
                raise QueueFullError
            row = row_of(job) | {
                "idempotency_key": submission and submission.key,
                "body_sha256": submission and submission.body_sha256,
            }
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(JOBS).values(row))
            except sa.exc.IntegrityError:
                if submission and (existing := self._submitted(connection, submission)):
                    return existing  # the same request arrived twice at the same time
                raise
        return job

    def submitted(self, submission: Submission) -> Job | None:
        with self._reading() as connection:
            return self._submitted(connection, submission)

    def get(self, job_id: str) -> Job:
        with self._reading() as connection:
            return self._get(connection, job_id)

    def read_changes(self, known: Mapping[str, int]) -> JobChanges:
        documents: dict[str, str] = {}
        found: set[str] = set()
        queued: set[str] = set()
        positions: dict[str, int] = {}
        with self._reading() as connection:
            for ids in _batched(known, MAX_IDS):
                rows = connection.execute(READ_VERSIONS, {"ids": ids}).all()
                found |= {row.id for row in rows}
                queued |= {row.id for row in rows if row.status == Status.IN_QUEUE.value}
                changed = [row.id for row in rows if row.version != known[row.id]]
                if changed:
                    read = connection.execute(READ_DOCUMENTS, {"ids": changed})
                    documents |= {row.id: row.document for row in read}
            for ids in _batched(queued, MAX_IDS):
                read = connection.execute(READ_POSITIONS, {"ids": ids})
                positions |= {row.id: row.position for row in read}
        return JobChanges(
            changed={job_id: job_of(document) for job_id, document in documents.items()},
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
        query = sa.select(JOBS.c.document).where(*visible).order_by(JOBS.c.seq.desc())
        if status is not None:
            query = query.where(JOBS.c.status == status.value)
        query = query.limit(limit + 1)
        with self._reading() as connection:
            if cursor is not None:
                last_seq = connection.execute(
                    sa.select(JOBS.c.seq).where(JOBS.c.id == cursor, *visible)
                ).scalar()
                if last_seq is None:
                    raise CursorError
                query = query.where(JOBS.c.seq < last_seq)
            found = [job_of(document) for document in connection.execute(query).scalars()]
        return JobPage(tuple(found[:limit]), found[limit - 1].id if len(found) > limit else None)

    def queue_position(self, job_id: str) -> int | None:
        with self._reading() as connection:
            row = connection.execute(
                sa.select(JOBS.c.seq, JOBS.c.status, JOBS.c.attempts).where(JOBS.c.id == job_id)
            ).one_or_none()
            if row is None or row.status != Status.IN_QUEUE.value:
                return None
            never_failed, earlier = JOBS.c.attempts == 0, JOBS.c.seq < row.seq
            before = (never_failed | earlier) if row.attempts else (never_failed & earlier)
            return self._count_queued(connection, before)

    def count(self, status: Status) -> int:
        query = sa.select(sa.func.count()).select_from(JOBS).where(JOBS.c.status == status.value)
        with self._reading() as connection:
            return int(connection.execute(query).scalar_one())

    def needs_adapter(self, sha256: str) -> bool:
        # A document contains the sha256 if the job needs the adapter, or if a prompt quotes the
        # hash. The second case is harmless: a file is kept longer than necessary.
        mentions = JOBS.c.document.contains(sha256, autoescape=True)
        query = sa.select(JOBS.c.seq).where(JOBS.c.status.not_in(FINAL_STATUSES), mentions).limit(1)
        with self._reading() as connection:
            return connection.execute(query).first() is not None

    def peek(self) -> Job | None:
        with self._reading() as connection:
            queue = self._queue(connection, 1) or self._retries(connection, 1)
            return next(iter(queue), None)

    def claim(
        self,
        worker: str,
        now: datetime,
        lease_s: float,
        loaded: Collection[str] = (),
        *,
        merged: Collection[str] = (),
        matches: Callable[[Job], bool] | None = None,
    ) -> Job | None:
        while True:
            try:
                with self._writing() as connection:
                    queue, retries = in_claim_order(
                        self._queue(connection, CLAIM_WINDOW),
                        self._retries(connection, _RETRY_WINDOW),
                        now,
                    )
                    index = choose(queue, loaded, merged=merged, matches=matches)
                    if index is None:
                        return None
                    for skipped in jobs_passed_over(queue, retries, index):
                        self._put(connection, skipped, transitions.passed_over(skipped))
                    job = queue[index]
                    return self._put(
                        connection, job, transitions.claimed(job, worker, now, lease_s)
                    )
            except _VersionConflictError:
                continue

    def change(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        while True:
            try:
                with self._writing() as connection:
                    job = self._get(connection, job_id)
                    return self._put(connection, job, change(job))
            except _VersionConflictError:
                continue

    def abandon_expired(self, now: datetime, *, spare: Collection[str] = ()) -> tuple[Job, ...]:
        with self._reading() as connection:
            query = sa.select(JOBS.c.document).where(JOBS.c.lease_expires_at_s <= now.timestamp())
            expired = [job_of(document) for document in connection.execute(query).scalars()]
        changed = []
        for job in (job for job in expired if job.worker not in spare):
            after = self.change(job.id, lambda current: _abandoned_if_expired(current, now))
            if after.lease_expires_at is None:
                changed.append(after)
        return tuple(changed)

    def remove_finished(self, *, before: datetime, keep: int) -> tuple[Job, ...]:
        ended = sa.select(JOBS.c.seq, JOBS.c.finished_at_s, JOBS.c.document).where(
            JOBS.c.status.in_(FINAL_STATUSES)
        )
        with self._writing() as connection:
            rows = connection.execute(
                ended.order_by(JOBS.c.finished_at_s.desc(), JOBS.c.seq.desc())
            ).all()
            removed = [
                row
                for index, row in enumerate(rows)
                if index >= keep or row.finished_at_s < before.timestamp()
            ]
            for row in removed:
                connection.execute(sa.delete(JOBS).where(JOBS.c.seq == row.seq))
        return tuple(job_of(row.document) for row in removed)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        # SQLite allows one writer at a time and makes others sleep with a growing backoff. Threads
        # of this process wait for a lock instead, which is faster and fairer.
        with database_errors(), self._write_turn(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _write_turn(self) -> Iterator[None]:
        if self._write_lock is None:
            yield
            return
        if not self._write_lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise JobStoreError(
                "The job database cannot be used at the moment: it is locked by another write."
            )
        try:
            yield
        finally:
            self._write_lock.release()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with (
            database_errors(),
            self._engine.connect().execution_options(fidelora_reads=True) as connection,
        ):
            yield connection

    def _queue(self, connection: sa.Connection, limit: int) -> Sequence[Job]:
        """Return queued jobs without a failed attempt, oldest first."""
        return self._queued(connection, JOBS.c.attempts == 0, limit)

    def _retries(self, connection: sa.Connection, limit: int) -> Sequence[Job]:
        """Return queued jobs with a failed attempt, oldest first."""
        return self._queued(connection, JOBS.c.attempts > 0, limit)

    def _queued(
        self, connection: sa.Connection, condition: sa.ColumnElement[bool], limit: int
    ) -> Sequence[Job]:
        query = (
            sa.select(JOBS.c.document)
            .where(JOBS.c.status == Status.IN_QUEUE.value, condition)
            .order_by(JOBS.c.seq)
        )
        return [job_of(document) for document in connection.execute(query.limit(limit)).scalars()]

    def _submitted(self, connection: sa.Connection, submission: Submission) -> Job | None:
        query = sa.select(JOBS.c.document, JOBS.c.body_sha256).where(
            JOBS.c.idempotency_key == submission.key
        )
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.body_sha256 != submission.body_sha256:
            raise IdempotencyConflictError
        return job_of(row.document)

    def _count_queued(self, connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> int:
        query = (
            sa.select(sa.func.count())
            .select_from(JOBS)
            .where(JOBS.c.status == Status.IN_QUEUE.value, *conditions)
        )
        return int(connection.execute(query).scalar_one())

    def _get(self, connection: sa.Connection, job_id: str) -> Job:
        document = connection.execute(
            sa.select(JOBS.c.document).where(JOBS.c.id == job_id)
        ).scalar()
        if document is None:
            raise JobNotFoundError
        return job_of(document)

    def _put(self, connection: sa.Connection, before: Job, after: Job) -> Job:
        if after != before:
            update = sa.update(JOBS).where(JOBS.c.id == before.id, JOBS.c.version == before.version)
            if connection.execute(update.values(row_of(after))).rowcount != 1:
                raise _VersionConflictError
        return after


def _abandoned_if_expired(job: Job, now: datetime) -> Job:
    # The lease may have been renewed after the query.
    expired = job.lease_expires_at is not None and job.lease_expires_at <= now
    return transitions.abandoned(job, job.epoch, transitions.SILENT, now) if expired else job


def _batched(ids: Iterable[str], size: int) -> Iterator[list[str]]:
    left = list(ids)
    for start in range(0, len(left), size):
        yield left[start : start + size]
