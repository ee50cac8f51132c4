"""Job store in a database: SQLite by default, or any other by its URL, such as PostgreSQL.

This is the only module that imports SQLAlchemy. Each row holds the whole job as a JSON document,
plus the few columns that queries need. A change reads the row, applies a function of `job.py` and
writes the row back only if its version is still the one that was read; otherwise the change is
repeated (optimistic locking). Therefore a dead process cannot hold a lock, and all databases behave
the same.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from fidelora.errors import (
    CursorError,
    IdempotencyConflictError,
    JobNotFoundError,
    JobStoreError,
    QueueFullError,
)
from fidelora.jobs import job as life
from fidelora.jobs.codec import job_from_dict, job_to_dict
from fidelora.jobs.job import Job, Status
from fidelora.jobs.store import JobChanges, JobPage, StoreByTransition, Submission, choose

_MIGRATIONS = Path(__file__).parent / "migrations"
_CLAIM_WINDOW = 100  # number of oldest jobs that a claim reads; bounds its cost in long queues
_BUSY_TIMEOUT_S = 30.0  # longest wait for another process that writes to the same SQLite file
_FINAL = [status.value for status in Status if status.final]

_jobs = sa.table(
    "jobs",
    *(
        sa.column(name)
        for name in (
            "seq",
            "id",
            "status",
            "version",
            "lease_expires_at_s",
            "finished_at_s",
            "owner",
            "document",
        )
    ),
    *(sa.column(name) for name in ("idempotency_key", "body_sha256")),
)


_MAX_IDS = 500
"""Number of ids in a query; databases limit the number of a statement's parameters."""
# Built once, because SQLAlchemy takes longer to build these queries than SQLite to execute them.
_ids: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_READ_VERSIONS = sa.select(_jobs.c.id, _jobs.c.version, _jobs.c.status).where(_jobs.c.id.in_(_ids))
_READ_DOCUMENTS = sa.select(_jobs.c.id, _jobs.c.document).where(_jobs.c.id.in_(_ids))
_queue = (
    sa.select(_jobs.c.id, (sa.func.row_number().over(order_by=_jobs.c.seq) - 1).label("position"))
    .where(_jobs.c.status == Status.IN_QUEUE.value)
    .subquery()
)
_READ_POSITIONS = sa.select(_queue.c.id, _queue.c.position).where(_queue.c.id.in_(_ids))


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
        try:
            self._engine = sa.create_engine(url, **_engine_options(url))
            self._write_lock: AbstractContextManager[object] = nullcontext()
            if self._engine.dialect.name == "sqlite":
                self._write_lock = threading.Lock()
                _restrict_to_owner(self._engine)
                _configure_sqlite(self._engine)
            with self._engine.begin() as connection:
                _migrate(connection)
        except (sa.exc.SQLAlchemyError, OSError) as error:
            shown_url = ""
            if "://" in url:
                shown_url = " " + sa.make_url(url).render_as_string(hide_password=True)
            reason = str(error).splitlines()[0]
            raise JobStoreError(f"The job database{shown_url} cannot be used: {reason}.") from error

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
            row = _row(job) | {
                "idempotency_key": submission and submission.key,
                "body_sha256": submission and submission.body_sha256,
            }
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(_jobs).values(row))
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
            for ids in _batched(known, _MAX_IDS):
                rows = connection.execute(_READ_VERSIONS, {"ids": ids}).all()
                found |= {row.id for row in rows}
                queued |= {row.id for row in rows if row.status == Status.IN_QUEUE.value}
                changed = [row.id for row in rows if row.version != known[row.id]]
                if changed:
                    read = connection.execute(_READ_DOCUMENTS, {"ids": changed})
                    documents |= {row.id: row.document for row in read}
            for ids in _batched(queued, _MAX_IDS):
                read = connection.execute(_READ_POSITIONS, {"ids": ids})
                positions |= {row.id: row.position for row in read}
        return JobChanges(
            changed={job_id: _job(document) for job_id, document in documents.items()},
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
        visible = [] if owner is None else [_jobs.c.owner == owner]
        query = sa.select(_jobs.c.document).where(*visible).order_by(_jobs.c.seq.desc())
        if status is not None:
            query = query.where(_jobs.c.status == status.value)
        query = query.limit(limit + 1)
        with self._reading() as connection:
            if cursor is not None:
                last_seq = connection.execute(
                    sa.select(_jobs.c.seq).where(_jobs.c.id == cursor, *visible)
                ).scalar()
                if last_seq is None:
                    raise CursorError
                query = query.where(_jobs.c.seq < last_seq)
            found = [_job(document) for document in connection.execute(query).scalars()]
        return JobPage(tuple(found[:limit]), found[limit - 1].id if len(found) > limit else None)

    def queue_position(self, job_id: str) -> int | None:
        with self._reading() as connection:
            row = connection.execute(
                sa.select(_jobs.c.seq, _jobs.c.status).where(_jobs.c.id == job_id)
            ).one_or_none()
            if row is None or row.status != Status.IN_QUEUE.value:
                return None
            return self._count_queued(connection, _jobs.c.seq < row.seq)

    def count(self, status: Status) -> int:
        query = sa.select(sa.func.count()).select_from(_jobs).where(_jobs.c.status == status.value)
        with self._reading() as connection:
            return int(connection.execute(query).scalar_one())

    def needs_adapter(self, sha256: str) -> bool:
        # A document contains the sha256 if the job needs the adapter, or if a prompt quotes the
        # hash. The second case is harmless: a file is kept longer than necessary.
        mentions = _jobs.c.document.contains(sha256, autoescape=True)
        query = sa.select(_jobs.c.seq).where(_jobs.c.status.not_in(_FINAL), mentions).limit(1)
        with self._reading() as connection:
            return connection.execute(query).first() is not None

    def peek(self) -> Job | None:
        with self._reading() as connection:
            return next(iter(self._queue(connection, 1)), None)

    def claim(
        self,
        worker: str,
        now: datetime,
        lease_s: float,
        loaded: Collection[str] = (),
        *,
        merged: Collection[str] = (),
        wanted: Callable[[Job], bool] | None = None,
    ) -> Job | None:
        while True:
            try:
                with self._writing() as connection:
                    queue = self._queue(connection, _CLAIM_WINDOW)
                    index = choose(queue, loaded, merged=merged, wanted=wanted)
                    if index is None:
                        return None
                    for skipped in queue[:index]:
                        self._put(connection, skipped, life.passed(skipped))
                    job = queue[index]
                    return self._put(connection, job, life.claimed(job, worker, now, lease_s))
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

    def abandon_expired(self, now: datetime) -> tuple[Job, ...]:
        with self._reading() as connection:
            query = sa.select(_jobs.c.document).where(_jobs.c.lease_expires_at_s <= now.timestamp())
            expired = [_job(document) for document in connection.execute(query).scalars()]
        changed = []
        for job in expired:
            after = self.change(job.id, lambda current: _abandoned_if_expired(current, now))
            if after.lease_expires_at is None:
                changed.append(after)
        return tuple(changed)

    def remove_finished(self, *, before: datetime, keep: int) -> tuple[Job, ...]:
        ended = sa.select(_jobs.c.seq, _jobs.c.finished_at_s, _jobs.c.document).where(
            _jobs.c.status.in_(_FINAL)
        )
        with self._writing() as connection:
            rows = connection.execute(
                ended.order_by(_jobs.c.finished_at_s.desc(), _jobs.c.seq.desc())
            ).all()
            removed = [
                row
                for index, row in enumerate(rows)
                if index >= keep or row.finished_at_s < before.timestamp()
            ]
            for row in removed:
                connection.execute(sa.delete(_jobs).where(_jobs.c.seq == row.seq))
        return tuple(_job(row.document) for row in removed)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        # SQLite allows one writer at a time and makes others sleep with a growing backoff. Threads
        # of this process wait for a lock instead, which is faster and fairer.
        with _database_errors(), self._write_lock, self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with (
            _database_errors(),
            self._engine.connect().execution_options(fidelora_reads=True) as connection,
        ):
            yield connection

    def _queue(self, connection: sa.Connection, limit: int) -> Sequence[Job]:
        query = (
            sa.select(_jobs.c.document)
            .where(_jobs.c.status == Status.IN_QUEUE.value)
            .order_by(_jobs.c.seq)
        )
        return [_job(document) for document in connection.execute(query.limit(limit)).scalars()]

    def _submitted(self, connection: sa.Connection, submission: Submission) -> Job | None:
        query = sa.select(_jobs.c.document, _jobs.c.body_sha256).where(
            _jobs.c.idempotency_key == submission.key
        )
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.body_sha256 != submission.body_sha256:
            raise IdempotencyConflictError
        return _job(row.document)

    def _count_queued(self, connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> int:
        query = (
            sa.select(sa.func.count())
            .select_from(_jobs)
            .where(_jobs.c.status == Status.IN_QUEUE.value, *conditions)
        )
        return int(connection.execute(query).scalar_one())

    def _get(self, connection: sa.Connection, job_id: str) -> Job:
        document = connection.execute(
            sa.select(_jobs.c.document).where(_jobs.c.id == job_id)
        ).scalar()
        if document is None:
            raise JobNotFoundError
        return _job(document)

    def _put(self, connection: sa.Connection, before: Job, after: Job) -> Job:
        if after != before:
            update = sa.update(_jobs).where(
                _jobs.c.id == before.id, _jobs.c.version == before.version
            )
            if connection.execute(update.values(_row(after))).rowcount != 1:
                raise _VersionConflictError
        return after


def wal_is_safe(version: str) -> bool:
    """True if this SQLite release is free of the bug that corrupts databases on a WAL reset.

    The bug was introduced with the WAL in 3.7.0 and fixed in 3.51.3. Backports of the fix to older
    series are not recognised; with those releases, the store uses the rollback journal, which is
    slower but just as safe.
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3]) >= (3, 51, 3)


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise JobStoreError(
            f"The job database cannot be used at the moment: {str(error.orig).splitlines()[0]}."
        ) from error


def _abandoned_if_expired(job: Job, now: datetime) -> Job:
    # The lease may have been renewed after the query.
    expired = job.lease_expires_at is not None and job.lease_expires_at <= now
    return life.abandoned(job, job.epoch, life.SILENT, now) if expired else job


def _row(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.status.value,
        "version": job.version,
        "lease_expires_at_s": job.lease_expires_at and job.lease_expires_at.timestamp(),
        "finished_at_s": job.finished_at and job.finished_at.timestamp(),
        "owner": job.owner,
        "document": json.dumps(job_to_dict(job), ensure_ascii=False),
    }


def _batched(ids: Iterable[str], size: int) -> Iterator[list[str]]:
    left = list(ids)
    for start in range(0, len(left), size):
        yield left[start : start + size]


def _job(document: str) -> Job:
    return job_from_dict(json.loads(document))


def _engine_options(url: str) -> dict[str, Any]:
    return (
        {"connect_args": {"timeout": _BUSY_TIMEOUT_S}}
        if url.startswith("sqlite")
        else {"pool_pre_ping": True}
    )


def _restrict_to_owner(engine: sa.Engine) -> None:
    """Create the database's file, or change its mode, so that only its owner can read the jobs.

    SQLite gives the same mode to the files beside it.
    """
    path = engine.url.database
    if path and path != ":memory:" and not path.startswith("file:"):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with suppress(PermissionError):  # the file of another user, who decides who may read it
            Path(path).chmod(0o600)


def _configure_sqlite(engine: sa.Engine) -> None:
    """Sync every commit to disk, and take the write lock when a writing transaction begins.

    If two transactions took the write lock only at their first write, they could deadlock.
    """
    journal = "WAL" if wal_is_safe(sqlite3.sqlite_version) else "DELETE"

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        # None disables the implicit transactions of `sqlite3`, which DDL statements would commit.
        connection.isolation_level = None
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.execute("PRAGMA synchronous = FULL")

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        reads = connection.get_execution_options().get("fidelora_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _migrate(connection: sa.Connection) -> None:
    """Migrate the tables and record their version, both in the caller's transaction."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise JobStoreError(
            f"The job database was written by another version of Fidelora: {error}. "
            "Use that version, or another database."
        ) from error
