"""Interface of job stores. All stores pass the same tests (`tests/jobs/test_stores.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Protocol

from fidelora.jobs import job as transitions
from fidelora.jobs.job import Failure, Job, JobProgress, Output, Status

MAX_PASSED_OVER = 8
"""Number of times that later jobs may be claimed before a job, because their adapters are loaded
or they can share a batch. Bounds the wait of jobs with rare adapters."""


@dataclass(frozen=True)
class Submission:
    """Idempotency key of a request, and the sha256 of its body."""

    key: str
    body_sha256: str


@dataclass(frozen=True)
class JobPage:
    """Jobs, newest first, and the cursor of the next page; None on the last page."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True)
class JobChanges:
    """Result of `JobStore.read_changes`.

    Attributes:
        changed: jobs whose version is not the known one, by id.
        positions: number of queued jobs before each of the jobs that are in the queue, by id.
        missing: ids of the jobs that do not exist.
    """

    changed: Mapping[str, Job]
    positions: Mapping[str, int]
    missing: frozenset[str]


class JobStore(Protocol):
    """Store whose changes are durable once a method has returned.

    All times are aware UTC datetimes. All methods are thread-safe.
    """

    def add(
        self, job: Job, *, submission: Submission | None = None, capacity: int | None = None
    ) -> Job:
        """Add a new job to the queue, or return the job that the same submission added before.

        Args:
            capacity: maximum length of the queue, including this job.

        Raises:
            IdempotencyConflictError: the key was used for another body.
            QueueFullError: the queue is at its capacity.
        """
        ...

    def submitted(self, submission: Submission) -> Job | None:
        """Return the job that this submission added before, or None.

        Raises:
            IdempotencyConflictError: the key was used for another body.
        """
        ...

    def get(self, job_id: str) -> Job:
        """Return the current state of a job.

        Raises:
            JobNotFoundError: the job does not exist.
        """
        ...

    def read_changes(self, known: Mapping[str, int]) -> JobChanges:
        """Read several jobs at one point in time, and return those that have changed.

        The cost hardly depends on the number of jobs that have not changed.

        Args:
            known: version of each job that the caller has, by id; 0 for none.
        """
        ...

    def list(
        self,
        *,
        status: Status | None = None,
        owner: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """Return one page of jobs, newest first.

        Args:
            owner: only jobs of this owner; None for the jobs of every owner.

        Raises:
            CursorError: the cursor was not returned by this store for this owner, or its job was
                removed.
        """
        ...

    def queue_position(self, job_id: str) -> int | None:
        """Return the number of queued jobs before this one; None if it is not in the queue."""
        ...

    def count(self, status: Status) -> int:
        """Return the number of jobs with this status."""
        ...

    def needs_adapter(self, sha256: str) -> bool:
        """True if a job that has not ended needs the adapter with this sha256."""
        ...

    def peek(self) -> Job | None:
        """Return the oldest queued job without claiming it; None if the queue is empty."""
        ...

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
        """Claim the next job for a worker, or return None. Two workers never claim the same job.

        Order of preference:

        1. the oldest job, once it was passed over `MAX_PASSED_OVER` times;
        2. a job that needs exactly the merged adapters;
        3. a job whose adapters are all loaded;
        4. the oldest job.

        If a job before the preferred one was passed over `MAX_PASSED_OVER` times, it is claimed
        instead. Jobs with a failed attempt come after all others, and only when their pause is
        over; each claim of another job passes them over.

        Args:
            loaded: sha256 of the adapters in the worker's memory.
            merged: sha256 of the adapters that are merged into its model.
            matches: returns True for jobs that the worker can use. The oldest of these is claimed,
                regardless of loaded adapters, unless a job before it was passed over
                `MAX_PASSED_OVER` times. Must not call the store.
        """
        ...

    def renew(
        self, job_id: str, epoch: int, progress: JobProgress | None, now: datetime, lease_s: float
    ) -> Job:
        """Extend the lease (heartbeat). The worker has to stop if the job has `cancel_requested`.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def succeed(
        self,
        job_id: str,
        epoch: int,
        outputs: Sequence[Output],
        timings: Mapping[str, float],
        now: datetime,
    ) -> Job:
        """End the job with its images. The image files must already be synced to disk.

        Raises:
            LeaseLostError: the claim has ended; the result is discarded.
        """
        ...

    def fail(self, job_id: str, epoch: int, error: Failure, now: datetime) -> Job:
        """End the job with an error that a retry would not fix.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def stop(self, job_id: str, epoch: int, now: datetime) -> Job:
        """End the job as canceled, after its worker stopped.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def release(self, job_id: str, epoch: int, now: datetime) -> Job:
        """Return the job to the queue; the attempt does not count.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def abandon(self, job_id: str, epoch: int, reason: str, now: datetime) -> Job:
        """Requeue the job after a failed attempt, or end it as failed after the last attempt.

        An attempt fails if its worker dies, stops its heartbeats or has an unexpected error.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def abandon_expired(self, now: datetime, *, spare: Collection[str] = ()) -> tuple[Job, ...]:
        """Abandon every job whose lease has expired, and return these jobs.

        Args:
            spare: names of workers that are known to be alive; their jobs are kept even if the
                lease has expired.
        """
        ...

    def cancel(self, job_id: str, now: datetime) -> Job:
        """Request that a job stops; see `job.cancellation_requested`.

        Raises:
            JobNotFoundError: the job does not exist.
        """
        ...

    def remove_finished(self, *, before: datetime, keep: int) -> tuple[Job, ...]:
        """Remove ended jobs: those older than `before`, and all but the newest `keep`.

        Returns the removed jobs.
        """
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...


class StoreByTransition(ABC):
    """Methods of `JobStore` that change one job, built on an atomic `change`."""

    @abstractmethod
    def change(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        """Replace the job by `change(job)` and return it. If `change` raises, the job is kept.

        Raises:
            JobNotFoundError: the job does not exist.
        """

    def renew(
        self, job_id: str, epoch: int, progress: JobProgress | None, now: datetime, lease_s: float
    ) -> Job:
        return self.change(
            job_id, lambda job: transitions.renewed(job, epoch, progress, now, lease_s)
        )

    def succeed(
        self,
        job_id: str,
        epoch: int,
        outputs: Sequence[Output],
        timings: Mapping[str, float],
        now: datetime,
    ) -> Job:
        return self.change(
            job_id, lambda job: transitions.succeeded(job, epoch, tuple(outputs), timings, now)
        )

    def fail(self, job_id: str, epoch: int, error: Failure, now: datetime) -> Job:
        return self.change(job_id, lambda job: transitions.failed(job, epoch, error, now))

    def stop(self, job_id: str, epoch: int, now: datetime) -> Job:
        return self.change(job_id, lambda job: transitions.stopped(job, epoch, now))

    def release(self, job_id: str, epoch: int, now: datetime) -> Job:
        return self.change(job_id, lambda job: transitions.released(job, epoch, now))

    def abandon(self, job_id: str, epoch: int, reason: str, now: datetime) -> Job:
        return self.change(job_id, lambda job: transitions.abandoned(job, epoch, reason, now))

    def cancel(self, job_id: str, now: datetime) -> Job:
        return self.change(job_id, lambda job: transitions.cancellation_requested(job, now))


def in_claim_order(
    fresh: Sequence[Job], retries: Sequence[Job], now: datetime
) -> tuple[list[Job], list[Job]]:
    """Return the jobs that can be claimed, in the order that `choose` expects, and the due retries.

    The due retries are also in the first list. Retries whose pause is not over are in neither.

    Args:
        fresh: queued jobs without a failed attempt, oldest first.
        retries: queued jobs with a failed attempt, oldest first.
    """
    due = [job for job in retries if transitions.is_due(job, now)]
    waited = [job for job in due if job.passed_over >= MAX_PASSED_OVER]
    rest = [job for job in due if job.passed_over < MAX_PASSED_OVER]
    return [*waited, *fresh, *rest], due


def jobs_passed_over(queue: Sequence[Job], retries: Sequence[Job], claimed: int) -> list[Job]:
    """Return the jobs that a claim passes over: those before the claimed one, and due retries.

    Args:
        queue, retries: result of `in_claim_order`.
        claimed: index of the claimed job in `queue`.
    """
    counted = {job.id for job in queue[: claimed + 1]}
    return [*queue[:claimed], *(job for job in retries if job.id not in counted)]


def choose(
    queue: Sequence[Job],
    loaded: Collection[str],
    *,
    merged: Collection[str] = (),
    matches: Callable[[Job], bool] | None = None,
) -> int | None:
    """Return the index of the job that `JobStore.claim` takes from a queue (oldest first), or None.

    A job without adapters suits every worker, but is not preferred to older jobs.
    """
    if matches is not None:
        for index, job in enumerate(queue):
            if matches(job):
                return index
            if job.passed_over >= MAX_PASSED_OVER:
                return None
        return None
    if not queue:
        return None
    if queue[0].passed_over >= MAX_PASSED_OVER:
        return 0
    loaded, merged = frozenset(loaded), frozenset(merged)
    needs_merged = (i for i, job in enumerate(queue) if job.adapters and job.adapters == merged)
    needs_loaded = (i for i, job in enumerate(queue) if job.adapters and job.adapters <= loaded)
    preferred = next(chain(needs_merged, needs_loaded), 0)
    # A claim passes over all jobs before the claimed one, so a job at the limit is claimed first.
    return next((i for i in range(preferred) if queue[i].passed_over >= MAX_PASSED_OVER), preferred)
