"""Job store in memory, for tests and for servers that do not keep jobs across restarts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

from fidelora.errors import CursorError, IdempotencyConflictError, JobNotFoundError, QueueFullError
from fidelora.jobs import job as transitions
from fidelora.jobs.job import Job, Status
from fidelora.jobs.store import (
    JobChanges,
    JobPage,
    StoreByTransition,
    Submission,
    choose,
    in_claim_order,
    jobs_passed_over,
)


class MemoryStore(StoreByTransition):
    """Jobs in a dictionary, in order of arrival. Implements `JobStore`."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._submissions: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def add(
        self, job: Job, *, submission: Submission | None = None, capacity: int | None = None
    ) -> Job:
        with self._lock:
            if submission and (existing := self._submitted(submission)):
                return existing
            if capacity is not None and len(self._queue()) >= capacity:
                raise QueueFullError
            self._jobs[job.id] = job
            if submission:
                self._submissions[submission.key] = (job.id, submission.body_sha256)
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
            ids = [job.id for job in sorted(self._queue(), key=lambda job: job.attempts > 0)]
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
            return min(self._queue(), key=lambda job: job.attempts > 0, default=None)

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
        with self._lock:
            jobs = self._queue()
            queue, retries = in_claim_order(
                [job for job in jobs if not job.attempts],
                [job for job in jobs if job.attempts],
                now,
            )
            index = choose(queue, loaded, merged=merged, matches=matches)
            if index is None:
                return None
            for skipped in jobs_passed_over(queue, retries, index):
                self._put(transitions.passed_over(skipped))
            return self._put(transitions.claimed(queue[index], worker, now, lease_s))

    def abandon_expired(self, now: datetime, *, spare: Collection[str] = ()) -> tuple[Job, ...]:
        with self._lock:
            expired = [
                job
                for job in self._jobs.values()
                if job.lease_expires_at is not None
                and job.lease_expires_at <= now
                and job.worker not in spare
            ]
            return tuple(
                self._put(transitions.abandoned(job, job.epoch, transitions.SILENT, now))
                for job in expired
            )

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
                del self._jobs[job.id]
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
        return [job for job in self._jobs.values() if job.status is Status.IN_QUEUE]

    def _get(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise JobNotFoundError
        return self._jobs[job_id]

    def _put(self, job: Job) -> Job:
        self._jobs[job.id] = job
        return job

    def change(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        with self._lock:
            return self._put(change(self._get(job_id)))
