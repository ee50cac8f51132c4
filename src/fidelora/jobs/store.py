"""Interface of job stores. All stores pass the same tests (`tests/jobs`, fixture `store`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from fidelora.jobs import job as transitions
from fidelora.jobs.job import Failure, Job, JobProgress, Output, Status

WORKER_ALIVE_S = 15.0
"""Seconds for which a worker counts as alive after a report: three times the reporting interval."""
WORKER_LOST_S = 60.0
"""Seconds without a report after which the jobs of a worker are abandoned. Longer than a restart of
the database, during which no worker can report."""


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


@dataclass(frozen=True)
class WorkerState:
    """Report of a worker, which other processes read.

    Attributes:
        name: name of the worker, as in `Job.worker`.
        device: device of its model, such as `cuda:0`.
        version: version of Fidelora.
        loaded: sha256 of the adapters in its memory.
        merged: sha256 of the adapters that are merged into its model.
        idle_since: time since which it has had no job; None while it has one.
        reported_at: time of the report; set by the store.
        models: ids of the model families in its memory, the most recently used one first.
    """

    name: str
    device: str = ""
    version: str = ""
    loaded: frozenset[str] = frozenset()
    merged: frozenset[str] = frozenset()
    idle_since: datetime | None = None
    reported_at: datetime | None = None
    models: tuple[str, ...] = ()


class JobStore(Protocol):
    """Store whose changes are durable once a method has returned.

    All times are aware UTC datetimes. All methods are thread-safe.

    `now` is the current time, for tests and simulations. None means the store's own clock. For a
    database that several machines use, this is the clock of the database's server.
    """

    def add(
        self,
        job: Job,
        *,
        submission: Submission | None = None,
        capacity: int | None = None,
        now: datetime | None = None,
    ) -> Job:
        """Add a new job to the queue, or return the job that the same submission added before.

        The capacity also holds if several processes add jobs at the same time.

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
        """Return the number of queued jobs before this one; None if it is not in the queue.

        Jobs without a failed attempt come first, one of each owner in turn, then those with one.
        """
        ...

    def count(self, status: Status) -> int:
        """Return the number of jobs with this status."""
        ...

    def needs_adapter(self, sha256: str) -> bool:
        """True if a job that has not ended needs the adapter with this sha256."""
        ...

    def peek(self) -> Job | None:
        """Return the first queued job without claiming it; None if the queue is empty."""
        ...

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
        """Claim the next job for a worker, or return None. Two workers never claim the same job.

        Order of preference:

        1. a job that is due: a retry, or the job at the head of the queue, that was delayed by
           `MAX_PASSED_OVER` claims per live worker;
        2. a job that needs exactly the merged adapters;
        3. a job whose adapters are all loaded;
        4. the job at the head of the queue.

        The head of the queue is the oldest job, or with several owners the oldest job of the owner
        whose turn it is. Jobs with a failed attempt that are not due come after all others, and
        only when their pause is over.

        Args:
            loaded: sha256 of the adapters in the worker's memory.
            merged: sha256 of the adapters that are merged into its model.
            matches: returns True for jobs that the worker can use. The first of these is claimed,
                regardless of loaded adapters, unless another job is due. Must not call the store.
            hold_s: seconds after its arrival during which a job is left for another live worker
                that has its adapters loaded. Applies to the fourth preference only.
            device_kind: kind of the worker's device. Jobs for another kind are left in the queue,
                and the others are claimed as if these were not there.
        """
        ...

    def renew(
        self,
        job_id: str,
        epoch: int,
        progress: JobProgress | None,
        now: datetime | None,
        lease_s: float,
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
        now: datetime | None = None,
    ) -> Job:
        """End the job with its images. The image files must already be synced to disk.

        Raises:
            LeaseLostError: the claim has ended; the result is discarded.
        """
        ...

    def fail(self, job_id: str, epoch: int, error: Failure, now: datetime | None = None) -> Job:
        """End the job with an error that a retry would not fix.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def stop(self, job_id: str, epoch: int, now: datetime | None = None) -> Job:
        """End the job as canceled, after its worker stopped.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def release(self, job_id: str, epoch: int, now: datetime | None = None) -> Job:
        """Return the job to the queue; the attempt does not count.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def abandon(self, job_id: str, epoch: int, reason: str, now: datetime | None = None) -> Job:
        """Requeue the job after a failed attempt, or end it as failed; see `job.abandoned`.

        Raises:
            LeaseLostError: the claim has ended.
        """
        ...

    def abandon_expired(
        self, now: datetime | None = None, *, spare: Collection[str] = ()
    ) -> tuple[Job, ...]:
        """Abandon the jobs of lost workers, and return these jobs.

        A worker is lost if the lease of its job has expired, or if it has reported with
        `report_worker`, but not for `WORKER_LOST_S` seconds.

        Args:
            spare: names of workers that are known to be alive; their jobs are kept.
        """
        ...

    def cancel(self, job_id: str, now: datetime | None = None) -> Job:
        """Request that a job stops; see `job.cancellation_requested`.

        Raises:
            JobNotFoundError: the job does not exist.
        """
        ...

    def cancel_requested(self, job_id: str) -> bool:
        """True if a running job has to stop.

        Cheap enough to be called at every step. The answer may be late, but the job that `renew`
        returns is always up to date.

        Raises:
            JobNotFoundError: the job does not exist (not every store checks this).
        """
        ...

    def running(self, worker_prefix: str) -> tuple[Job, ...]:
        """Return the running jobs of the workers whose names begin with this text."""
        ...

    def report_worker(self, state: WorkerState, now: datetime | None = None) -> None:
        """Store the state of a worker, which counts as alive for `WORKER_ALIVE_S` seconds."""
        ...

    def remove_worker(self, name: str) -> None:
        """Remove the state of a worker that has ended."""
        ...

    def workers(self, now: datetime | None = None) -> tuple[WorkerState, ...]:
        """Return the states of the live workers, by name."""
        ...

    def on_new_job(self, wake: Callable[[Collection[str] | None], None]) -> None:
        """Call `wake`, on a thread, when any process adds a job or returns one to the queue.

        `wake` receives the names of the workers that should look for the job, or None for all. A
        store that several machines use names as many idle workers as there are jobs, starting with
        those that have the adapters of the job loaded, so that not every worker tries to claim it.

        Some stores cannot notice other processes, and notifications can be lost. So workers also
        have to poll.
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
    def change(
        self, job_id: str, change: Callable[[Job, datetime], Job], now: datetime | None = None
    ) -> Job:
        """Replace the job by `change(job, now)` and return it. If `change` raises, the job is kept.

        Args:
            now: time to pass to `change`; None for the store's clock.

        Raises:
            JobNotFoundError: the job does not exist.
        """

    def renew(
        self,
        job_id: str,
        epoch: int,
        progress: JobProgress | None,
        now: datetime | None,
        lease_s: float,
    ) -> Job:
        return self.change(
            job_id, lambda job, at: transitions.renewed(job, epoch, progress, at, lease_s), now
        )

    def succeed(
        self,
        job_id: str,
        epoch: int,
        outputs: Sequence[Output],
        timings: Mapping[str, float],
        now: datetime | None = None,
    ) -> Job:
        return self.change(
            job_id,
            lambda job, at: transitions.succeeded(job, epoch, tuple(outputs), timings, at),
            now,
        )

    def fail(self, job_id: str, epoch: int, error: Failure, now: datetime | None = None) -> Job:
        return self.change(job_id, lambda job, at: transitions.failed(job, epoch, error, at), now)

    def stop(self, job_id: str, epoch: int, now: datetime | None = None) -> Job:
        return self.change(job_id, lambda job, at: transitions.stopped(job, epoch, at), now)

    def release(self, job_id: str, epoch: int, now: datetime | None = None) -> Job:
        return self.change(job_id, lambda job, at: transitions.released(job, epoch, at), now)

    def abandon(self, job_id: str, epoch: int, reason: str, now: datetime | None = None) -> Job:
        return self.change(
            job_id, lambda job, at: transitions.abandoned(job, epoch, reason, at), now
        )

    def cancel(self, job_id: str, now: datetime | None = None) -> Job:
        return self.change(job_id, transitions.cancellation_requested, now)
