"""Job store in memory, for tests and for servers that do not keep jobs across restarts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from fidelora.errors import CursorError, IdempotencyConflictError, JobNotFoundError, QueueFullError
from fidelora.jobs import job as transitions
from fidelora.jobs.job import Job, Status
from fidelora.jobs.queue_order import Queued, adapter_key, choose, due_of, turn_of_new_job
from fidelora.jobs.store import (
    WORKER_ALIVE_S,
    WORKER_LOST_S,
    JobChanges,
    JobPage,
    StoreByTransition,
    Submission,
    WorkerState,
)


class MemoryStore(StoreByTransition):
    """Jobs in a dictionary, in order of arrival. Implements `JobStore`."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._submissions: dict[str, tuple[str, str]] = {}
        self._places: dict[str, tuple[int, int, datetime]] = {}  # turn, due and arrival by job id
        self._claims = 0
        self._workers: dict[str, WorkerState] = {}
        self._wakes: list[Callable[[Collection[str] | None], None]] = []
        self._lock = threading.Lock()

    def add(
        self,
        job: Job,
        *,
        submission: Submission | None = None,
        capacity: int | None = None,
        now: datetime | None = None,
    ) -> Job:
        now = now or datetime.now(UTC)
        with self._lock:
            if submission and (existing := self._submitted(submission)):
                return existing
            if capacity is not None and len(self._queue()) >= capacity:
                raise QueueFullError
            fresh = self._fresh()
            own_turns = [one.turn for one in fresh if one.job.owner == job.owner]
            turn = turn_of_new_job(
                fresh[0].turn if fresh else None, own_turns[-1] if own_turns else None
            )
            before = sum(one.turn <= turn for one in fresh)
            due = due_of(self._claims, before, len(self._live(now)))
            self._places[job.id] = (turn, due, now)
            self._jobs[job.id] = job
            if submission:
                self._submissions[submission.key] = (job.id, submission.body_sha256)
        self._wake()
        return job

    def submitted(self, submission: Submission) -> Job | None:
        with self._lock:
            return self._submitted(submission)

    def get(self, job_id: str) -> Job:
        with self._lock:
            return self._get(job_id)

    def read_changes(self, known: Mapping[str, int]) -> JobChanges:
        with self._lock:
            found = [self._jobs[job_id] for job_id in known if job_id in self._jobs]
            positions = {job.id: position for position, job in enumerate(self._queue())}
        return JobChanges(
            changed={job.id: job for job in found if job.version != known[job.id]},
            positions={job.id: positions[job.id] for job in found if job.id in positions},
            missing=frozenset(known.keys() - {job.id for job in found}),
        )

    def list(
        self,
        *,
        status: Status | None = None,
        owner: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        with self._lock:
            newest_first = [
                job for job in reversed(self._jobs.values()) if owner in (None, job.owner)
            ]
            if cursor is not None:
                ids = [job.id for job in newest_first]
                if cursor not in ids:
                    raise CursorError
                newest_first = newest_first[ids.index(cursor) + 1 :]
            matching = [job for job in newest_first if status in (None, job.status)]
            page = matching[:limit]
            return JobPage(tuple(page), page[-1].id if len(matching) > limit else None)

    def queue_position(self, job_id: str) -> int | None:
        with self._lock:
            ids = [job.id for job in self._queue()]
            return ids.index(job_id) if job_id in ids else None

    def count(self, status: Status) -> int:
        with self._lock:
            return sum(job.status is status for job in self._jobs.values())

    def needs_adapter(self, sha256: str) -> bool:
        with self._lock:
            return any(
                sha256 in job.adapters for job in self._jobs.values() if not job.status.final
            )

    def peek(self) -> Job | None:
        with self._lock:
            return next(iter(self._queue()), None)

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
        at = now or datetime.now(UTC)
        with self._lock:
            others = [state for state in self._live(at) if state.name != worker]

            def is_held(job: Job) -> bool:
                recent = hold_s > 0 and self._places[job.id][2] > at - timedelta(seconds=hold_s)
                return recent and bool(job.adapters) and any(_holds(one, job) for one in others)

            fresh, retries = (
                [one for one in queued if one.job.device_kind in ("", device_kind)]
                for queued in (self._fresh(), self._retries())
            )
            job = choose(
                fresh,
                [one for one in retries if transitions.is_due(one.job, at)],
                self._claims,
                loaded,
                merged=merged,
                matches=matches,
                is_held=is_held,
            )
            if job is None:
                return None
            self._claims += 1
            return self._put(transitions.claimed(job, worker, at, lease_s))

    def abandon_expired(
        self, now: datetime | None = None, *, spare: Collection[str] = ()
    ) -> tuple[Job, ...]:
        at = now or datetime.now(UTC)
        with self._lock:
            lost = {
                state.name
                for state in self._workers.values()
                if state.reported_at is not None
                and state.reported_at <= at - timedelta(seconds=WORKER_LOST_S)
            }
            expired = [
                job
                for job in self._jobs.values()
                if job.lease_expires_at is not None
                and (job.lease_expires_at <= at or job.worker in lost)
                and job.worker not in spare
            ]
            return tuple(
                self._put_changed(
                    job, transitions.abandoned(job, job.epoch, transitions.SILENT, at), at
                )
                for job in expired
            )

    def cancel_requested(self, job_id: str) -> bool:
        return self.get(job_id).cancel_requested

    def running(self, worker_prefix: str) -> tuple[Job, ...]:
        with self._lock:
            return tuple(
                job
                for job in self._jobs.values()
                if job.status is Status.IN_PROGRESS and job.worker.startswith(worker_prefix)
            )

    def report_worker(self, state: WorkerState, now: datetime | None = None) -> None:
        with self._lock:
            self._workers[state.name] = replace(state, reported_at=now or datetime.now(UTC))

    def remove_worker(self, name: str) -> None:
        with self._lock:
            self._workers.pop(name, None)

    def workers(self, now: datetime | None = None) -> tuple[WorkerState, ...]:
        with self._lock:
            return self._live(now or datetime.now(UTC))

    def on_new_job(self, wake: Callable[[Collection[str] | None], None]) -> None:
        self._wakes.append(wake)

    def remove_finished(self, *, before: datetime, keep: int) -> tuple[Job, ...]:
        with self._lock:
            ended = [
                (job.finished_at, arrival, job)
                for arrival, job in enumerate(self._jobs.values())
                if job.finished_at
            ]
            newest_first = sorted(ended, key=lambda entry: entry[:2], reverse=True)
            removed = [
                job
                for index, (finished_at, _, job) in enumerate(newest_first)
                if index >= keep or finished_at < before
            ]
            for job in removed:
                del self._jobs[job.id], self._places[job.id]
            ids = {job.id for job in removed}
            self._submissions = {
                key: value for key, value in self._submissions.items() if value[0] not in ids
            }
            return tuple(removed)

    def close(self) -> None:
        pass

    def _submitted(self, submission: Submission) -> Job | None:
        if submission.key not in self._submissions:
            return None
        job_id, body_sha256 = self._submissions[submission.key]
        if body_sha256 != submission.body_sha256:
            raise IdempotencyConflictError
        return self._jobs[job_id]

    def _queue(self) -> Sequence[Job]:
        """Return the queued jobs in their order."""
        return [one.job for one in (*self._fresh(), *self._retries())]

    def _fresh(self) -> Sequence[Queued]:
        """Return the queued jobs without a failed attempt, by turn and then by arrival."""
        return sorted(self._queued(retries=False), key=lambda one: one.turn)

    def _retries(self) -> Sequence[Queued]:
        """Return the queued jobs with a failed attempt, by arrival."""
        return self._queued(retries=True)

    def _queued(self, *, retries: bool) -> Sequence[Queued]:
        return [
            Queued(job, *self._places[job.id][:2])
            for job in self._jobs.values()
            if job.status is Status.IN_QUEUE and (job.attempts > 0) == retries
        ]

    def _live(self, now: datetime) -> tuple[WorkerState, ...]:
        since = now - timedelta(seconds=WORKER_ALIVE_S)
        alive = [
            state
            for state in self._workers.values()
            if state.reported_at is not None and state.reported_at > since
        ]
        return tuple(sorted(alive, key=lambda state: state.name))

    def _get(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise JobNotFoundError
        return self._jobs[job_id]

    def _put(self, job: Job) -> Job:
        self._jobs[job.id] = job
        return job

    def _put_changed(self, before: Job, after: Job, now: datetime) -> Job:
        if after.status is Status.IN_QUEUE and after.retry_at is not None:
            turn, _, arrival = self._places[before.id]
            due = due_of(self._claims, 0, len(self._live(now)))
            self._places[before.id] = (turn, due, arrival)
        return self._put(after)

    def change(
        self, job_id: str, change: Callable[[Job, datetime], Job], now: datetime | None = None
    ) -> Job:
        at = now or datetime.now(UTC)
        with self._lock:
            before = self._get(job_id)
            after = self._put_changed(before, change(before, at), at)
        if after.status is Status.IN_QUEUE:
            self._wake()
        return after

    def _wake(self) -> None:
        for wake in self._wakes:
            wake(None)


def _holds(worker: WorkerState, job: Job) -> bool:
    """True if the worker has the adapters of a job loaded."""
    return job.adapters <= worker.loaded or adapter_key(job.adapters) == adapter_key(worker.merged)
