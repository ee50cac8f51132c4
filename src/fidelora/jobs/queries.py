"""Queries of the job store, built once per store, because building takes longer than executing.

Statuses are literals, because databases use a partial index only for a condition that they can
compare with the index. `FOR UPDATE SKIP LOCKED` has no effect on SQLite, whose transactions exclude
each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from fidelora.jobs.job import MAX_RETRY_PAUSE_S
from fidelora.jobs.rows import (
    ADAPTER_SETS,
    CLAIM_COUNTER,
    CLAIM_WINDOW,
    FINAL_STATUSES,
    JOB_COLUMNS,
    JOBS,
    WORKER_ADAPTERS,
    WORKERS,
)
from fidelora.jobs.store import WORKER_ALIVE_S
from fidelora.jobs.transactions import clock

MAX_IDS = 500
"""Number of ids in a query; databases limit the number of a statement's parameters."""
_FIRST_OF_SET = 8  # number of jobs to read per loaded set; other claims may have locked seven
_RETRY_WINDOW = 10  # number of retries that a claim for a batch reads

_ids: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_in_queue = JOBS.c.status == sa.literal_column("'in_queue'")
_in_progress = JOBS.c.status == sa.literal_column("'in_progress'")
_zero: sa.ColumnElement[int] = sa.literal_column("0")
_is_fresh = sa.and_(_in_queue, JOBS.c.attempts == _zero)
_is_retry = sa.and_(_in_queue, JOBS.c.attempts > _zero)
_is_fresh_by_adapters = sa.case((JOBS.c.attempts == _zero, JOBS.c.status)) == sa.literal_column(
    "'in_queue'"
)
"""Equivalent to `_is_fresh`, but only PostgreSQL's index `jobs_by_adapters` has this condition.
With `_is_fresh`, PostgreSQL chooses another partial index until it has statistics of the queue's
length, and reads the whole queue: 12 ms for 10,000 jobs instead of 0.02 ms."""
_is_fresh_by_number = sa.case(
    (JOBS.c.attempts > _zero, sa.literal_column("''")), else_=JOBS.c.status
) == sa.literal_column("'in_queue'")
"""Equivalent to `_is_fresh`. No index has this condition, so PostgreSQL uses the primary key."""
_arrival = JOBS.c.seq + _zero
"""Order of arrival. Adding 0 keeps PostgreSQL from using the primary key: it would read all jobs in
this order, including those that have ended, until it finds the first retry."""
_turn_of_fresh = sa.case((JOBS.c.attempts > _zero, _zero), else_=JOBS.c.turn)
_place = ((JOBS.c.attempts > _zero), _turn_of_fresh, JOBS.c.seq)
"""Order of the queue: jobs without a failed attempt by turn, then the others by arrival."""

READ_VERSIONS = sa.select(JOBS.c.id, JOBS.c.version, JOBS.c.status).where(JOBS.c.id.in_(_ids))
_queue = (
    sa.select(JOBS.c.id, (sa.func.row_number().over(order_by=_place) - 1).label("position"))
    .where(_in_queue)
    .subquery()
)
READ_POSITIONS = sa.select(_queue.c.id, _queue.c.position).where(_queue.c.id.in_(_ids))
READ_POSITION = sa.select(_queue.c.position).where(_queue.c.id == sa.bindparam("id"))
COUNT_QUEUED = sa.select(sa.func.count()).select_from(JOBS).where(_in_queue)
_fresh_jobs = sa.select(*JOB_COLUMNS).where(_is_fresh).order_by(JOBS.c.turn, JOBS.c.seq)
_retried_jobs = sa.select(*JOB_COLUMNS).where(_is_retry).order_by(_arrival)
FIRST_FRESH = _fresh_jobs.limit(1)
FIRST_RETRY = _retried_jobs.limit(1)
COMPLETE_SETS = (
    sa.select(ADAPTER_SETS.c.adapters)
    .where(ADAPTER_SETS.c.sha256.in_(sa.bindparam("loaded", expanding=True)))
    .group_by(ADAPTER_SETS.c.adapters, ADAPTER_SETS.c.size)
    .having(sa.func.count() == ADAPTER_SETS.c.size)
)
"""Keys of the sets of adapters whose members are all among the loaded ones."""


@lru_cache(maxsize=100)  # there are about ten sets of columns that change together
def update_of_job(columns: frozenset[str]) -> sa.Update:
    """Return the update of these columns for the job `job_id`, if it has version `job_version`."""
    return (
        sa.update(JOBS)
        .where(
            JOBS.c.id == sa.bindparam("job_id", type_=sa.String),
            JOBS.c.version == sa.bindparam("job_version", type_=sa.Integer),
        )
        .values({name: sa.bindparam(name, type_=JOBS.c[name].type) for name in sorted(columns)})
    )


class Queries:
    """Queries that depend on the dialect.

    Args:
        dialect: `sqlite` or `postgresql`.
        document_format: largest format of a job's document that this process can read. Its claims
            leave other jobs in the queue.

    Attributes:
        now_s: expression for the current time in seconds; see `clock`.
        claims: number of claims so far.
        count_claim: statement that counts a claim.
        count_workers: number of live workers.
        places: values from which the place of a new job is computed.
        count_before: number of queued jobs before a job with the given turn.
        is_readable: condition for jobs that this process can read.
        read_jobs: the readable jobs with the given ids.
        read_running: the readable jobs of workers whose names begin with a prefix.
        get: one job, and `now_s`.
        claim: the job that a worker claims, and `now_s`; see `JobStore.claim`. This query and the
            next four take the parameter `device_kind`, and leave jobs for other kinds of devices in
            the queue. On PostgreSQL, the query also counts the claim.
        claim_due: the job that is due, and `now_s`.
        claim_one: one queued job, unless another claim has locked it, and `now_s`.
        candidates: first jobs without a failed attempt.
        retry_candidates: first jobs whose pause before a retry is over.
        expired: one row if there are jobs of lost workers.
        lock_expired: locks these jobs and returns them, and `now_s`.
        live_workers: workers whose last report is recent (`WORKER_ALIVE_S`).
        idle_workers: names of the first live workers that can claim a new job; see
            `WorkerTable.idle`.
    """

    def __init__(self, dialect: str, document_format: int) -> None:
        self.now_s = clock(dialect)
        now = self.now_s.label("now_s")
        alive = WORKERS.c.reported_at_s > self.now_s - WORKER_ALIVE_S
        self.claims, self.count_claim, counted = _claim_counter(dialect)
        self.count_workers = (
            sa.select(sa.func.count()).select_from(WORKERS).where(alive).scalar_subquery()
        )
        self.places = _places(self.claims, self.count_workers, now)
        self.count_before = (
            sa.select(sa.func.count())
            .select_from(JOBS)
            .where(_is_fresh, JOBS.c.turn <= sa.bindparam("turn"))
        )
        self.is_readable: sa.ColumnElement[bool] = JOBS.c.document_format <= sa.literal(
            document_format
        )
        self.read_jobs = sa.select(*JOB_COLUMNS).where(JOBS.c.id.in_(_ids), self.is_readable)
        self.read_running = sa.select(*JOB_COLUMNS).where(
            _in_progress,
            self.is_readable,
            sa.func.substr(JOBS.c.worker, 1, sa.bindparam("length", type_=sa.Integer))
            == sa.bindparam("prefix", type_=sa.String),
        )
        self.get = sa.select(*JOB_COLUMNS, now).where(JOBS.c.id == sa.bindparam("id"))
        is_claimable = sa.and_(
            self.is_readable,
            sa.or_(
                JOBS.c.device_kind == sa.literal_column("''"),
                JOBS.c.device_kind == sa.bindparam("device_kind", "", type_=sa.String),
            ),
        )
        # See `job.is_due` for a clock that was set back.
        ahead_s = JOBS.c.retry_at_s - self.now_s
        pause_is_over = sa.or_(
            JOBS.c.retry_at_s.is_(None), ahead_s <= 0, ahead_s > MAX_RETRY_PAUSE_S
        )
        fresh = sa.and_(_is_fresh, is_claimable)
        retried = sa.and_(_is_retry, is_claimable, pause_is_over)
        due = _due(fresh, retried, self.claims)
        with_adapters = _with_adapters(dialect, fresh, is_claimable)
        first = _one(fresh, sa.not_(_is_held(self.now_s, alive)))
        retry = _one(retried, order=(_arrival,))
        # Databases evaluate the arguments of `coalesce` one after the other, so each claim locks
        # one job at most.
        self.claim = sa.select(*JOB_COLUMNS, now, *counted).where(
            JOBS.c.seq == sa.func.coalesce(*due, *with_adapters, first, retry)
        )
        self.claim_due = sa.select(*JOB_COLUMNS, now).where(JOBS.c.seq == sa.func.coalesce(*due))
        self.claim_one = sa.select(*JOB_COLUMNS, now).where(
            JOBS.c.seq == _one(_in_queue, is_claimable, JOBS.c.seq == sa.bindparam("seq"))
        )
        self.candidates = _fresh_jobs.where(is_claimable).limit(CLAIM_WINDOW)
        self.retry_candidates = _retried_jobs.where(is_claimable, pause_is_over).limit(
            _RETRY_WINDOW
        )
        expired = _is_expired(self.now_s, self.is_readable)
        self.expired = sa.select(JOBS.c.seq).where(expired).limit(1)
        self.lock_expired = (
            sa.select(*JOB_COLUMNS, now).where(expired).with_for_update(skip_locked=True)
        )
        self.live_workers = sa.select(WORKERS).where(alive).order_by(WORKERS.c.name)
        self.idle_workers = _idle_workers(alive)

    def finished(self, before_s: float, keep: int) -> sa.Select[Any]:
        """Return the readable jobs that ended before a time or follow the `keep` newest ones."""
        ended = JOBS.c.status.in_(FINAL_STATUSES)
        newest_first = (JOBS.c.finished_at_s.desc(), JOBS.c.seq.desc())
        surplus = sa.select(JOBS.c.seq).where(ended).order_by(*newest_first).offset(keep)
        return (
            sa.select(*JOB_COLUMNS)
            .where(
                ended,
                self.is_readable,
                sa.or_(JOBS.c.finished_at_s < before_s, JOBS.c.seq.in_(surplus)),
            )
            .order_by(*newest_first)
        )


def _claim_counter(dialect: str) -> tuple[Any, Any, Sequence[Any]]:
    """Return the number of claims, a statement that counts a claim, and columns for queries.

    A query that selects these columns also counts a claim; there are none for SQLite.
    """
    if dialect == "postgresql":
        claims: Any = sa.literal_column(
            "(SELECT last_value + (CASE WHEN is_called THEN 1 ELSE 0 END) FROM claim_counter)"
        )
        counted: list[Any] = [sa.literal_column("nextval('claim_counter')").label("claim")]
        return claims, sa.select(*counted), counted
    count_claim = sa.update(CLAIM_COUNTER).values(claims=CLAIM_COUNTER.c.claims + 1)
    return sa.select(CLAIM_COUNTER.c.claims).scalar_subquery(), count_claim, []


def _places(claims: Any, workers: Any, now: sa.Label[float]) -> sa.Select[Any]:
    """Return the values from which the place of a new job is computed."""
    head = sa.select(sa.func.min(JOBS.c.turn)).where(_is_fresh).scalar_subquery()
    last_of_owner = (
        sa.select(sa.func.max(JOBS.c.turn))
        .where(_is_fresh, JOBS.c.owner == sa.bindparam("owner"))
        .scalar_subquery()
    )
    return sa.select(
        head.label("head"),
        last_of_owner.label("last_of_owner"),
        claims.label("claims"),
        workers.label("workers"),
        now,
    )


def _due(
    fresh: sa.ColumnElement[bool], retried: sa.ColumnElement[bool], claims: Any
) -> tuple[sa.ScalarSelect[Any], ...]:
    """Return subqueries that lock the first due retry, and the head of the queue if due."""
    is_due = JOBS.c.due <= claims
    head = (
        sa.select(JOBS.c.seq)
        .where(fresh)
        .order_by(JOBS.c.turn, JOBS.c.seq)
        .limit(1)
        .scalar_subquery()
    )
    return (
        _one(retried, is_due, order=(JOBS.c.due, JOBS.c.seq)),
        _one(fresh, JOBS.c.seq == head, is_due),
    )


def _with_adapters(
    dialect: str, fresh: sa.ColumnElement[bool], is_claimable: sa.ColumnElement[bool]
) -> tuple[sa.ScalarSelect[Any], ...]:
    """Return subqueries that lock the first job for the merged or for loaded adapters."""
    merged_key = sa.bindparam("merged", type_=sa.String)
    if dialect == "postgresql":
        by_adapters = sa.and_(_is_fresh_by_adapters, is_claimable)
        return (
            _first_with(by_adapters, merged_key),
            _first_loaded(by_adapters, sa.and_(_is_fresh_by_number, is_claimable)),
        )
    return (
        _one(fresh, JOBS.c.adapters == merged_key),
        _one(fresh, JOBS.c.adapters.in_(COMPLETE_SETS)),
    )


def _is_held(
    now_s: sa.ColumnElement[float], alive: sa.ColumnElement[bool]
) -> sa.ColumnElement[bool]:
    """Return the condition for jobs that wait for another live worker with their adapters."""
    is_other_worker_with_adapters = sa.and_(
        WORKER_ADAPTERS.c.adapters == JOBS.c.adapters,
        WORKER_ADAPTERS.c.worker != sa.bindparam("worker"),
        sa.exists().where(WORKERS.c.name == WORKER_ADAPTERS.c.worker, alive),
    )
    hold_s = sa.bindparam("hold_s", type_=sa.Float)
    return sa.and_(
        sa.cast(hold_s, sa.Float) > 0,
        JOBS.c.queued_at_s > now_s - hold_s,
        sa.exists().where(is_other_worker_with_adapters),
    )


def _is_expired(
    now_s: sa.ColumnElement[float], is_readable: sa.ColumnElement[bool]
) -> sa.ColumnElement[bool]:
    """Return the condition for the jobs of lost workers."""
    lost = sa.exists().where(
        WORKERS.c.name == JOBS.c.worker,
        WORKERS.c.reported_at_s <= now_s - sa.bindparam("lost_s", type_=sa.Float),
    )
    return sa.and_(
        _in_progress,
        is_readable,
        sa.or_(JOBS.c.lease_expires_at_s <= now_s, lost),
        JOBS.c.worker.not_in(sa.bindparam("spared", expanding=True)),
    )


def _idle_workers(alive: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Return the names of live workers that can claim a new job; see `WorkerTable.idle`."""
    # `idle_since_s` may be out of date by a few seconds, because workers report it periodically.
    is_busy = sa.exists().where(_in_progress, JOBS.c.worker == WORKERS.c.name)
    kind = sa.bindparam("device_kind", type_=sa.String)
    has_adapters = sa.exists().where(
        WORKER_ADAPTERS.c.worker == WORKERS.c.name,
        WORKER_ADAPTERS.c.adapters == sa.bindparam("adapters", type_=sa.String),
    )
    return (
        sa.select(WORKERS.c.name)
        .where(
            alive,
            sa.not_(is_busy),
            sa.or_(kind == "", WORKERS.c.device == kind, WORKERS.c.device.like(kind + ":%")),
        )
        .order_by(has_adapters.desc(), sa.func.length(WORKERS.c.loaded), WORKERS.c.name)
        .limit(sa.bindparam("count", type_=sa.Integer))
    )


def id_batches(ids: Iterable[str]) -> Iterator[list[str]]:
    """Yield the ids in lists of at most `MAX_IDS`."""
    left = list(ids)
    for start in range(0, len(left), MAX_IDS):
        yield left[start : start + MAX_IDS]


def _one(
    *conditions: sa.ColumnElement[bool], order: tuple[Any, ...] = (JOBS.c.turn, JOBS.c.seq)
) -> sa.ScalarSelect[Any]:
    """Return a subquery that locks the first unlocked row and selects its number."""
    query = sa.select(JOBS.c.seq).where(*conditions).order_by(*order).limit(1)
    return query.with_for_update(skip_locked=True).scalar_subquery()


def _first_with(
    is_fresh: sa.ColumnElement[bool], key: sa.ColumnElement[str]
) -> sa.ScalarSelect[Any]:
    """Return a subquery that locks the first job with this key of its adapters."""
    return _one(is_fresh, *_has_key(key), order=_BY_ADAPTERS)


def _first_loaded(
    is_fresh: sa.ColumnElement[bool], is_fresh_by_number: sa.ColumnElement[bool]
) -> sa.ScalarSelect[Any]:
    """Return a subquery that locks the first job whose adapters are all loaded.

    It reads the first jobs of each set of adapters, so the time does not depend on the length of
    the queue. Other claims may have locked some of them.
    """
    sets = COMPLETE_SETS.subquery()
    first_of_set = (
        sa.select(JOBS.c.seq)
        .where(is_fresh, *_has_key(sets.c.adapters))
        .order_by(*_BY_ADAPTERS)
        .limit(_FIRST_OF_SET)
        .lateral()
    )
    found = sa.select(first_of_set.c.seq).select_from(sets).join(first_of_set, sa.true())
    numbers = sa.func.array(found.scalar_subquery())  # read once, before the jobs are locked
    return _one(is_fresh_by_number, JOBS.c.seq == sa.func.any(numbers))


def _has_key(key: sa.ColumnElement[str]) -> tuple[sa.ColumnElement[bool], ...]:
    """Return the condition for jobs with this key of their adapters.

    The condition is a range, although an equality means the same. With an equality, PostgreSQL
    drops the constant first column of the order `_BY_ADAPTERS`, and other indexes also provide the
    remaining order.
    """
    return JOBS.c.adapters >= key, JOBS.c.adapters <= key


_BY_ADAPTERS = (JOBS.c.adapters, JOBS.c.turn, JOBS.c.seq)
"""Order of the index `jobs_by_adapters`."""
