"""What a store of jobs promises. Every store passes the same tests (`tests/jobs/test_stores.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Protocol

from fidelora.jobs import job as life
from fidelora.jobs.job import Failure, Job, JobProgress, Output, Status

MAX_PASSED_OVER = 8
"""How often a job may be passed over for one whose adapters are loaded already, or that can share a batch with another."""


@dataclass(frozen=True)
class Submission:
    """The key under which a client may repeat a request, and the sha256 of what it asked for."""

    key: str
    body_sha256: str


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first; `next_cursor` asks for the next page, and is None on the last."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


class JobStore(Protocol):
    """Jobs that are safe once a method has returned. All times are aware and UTC; all methods may be called from any thread."""

    def add(
        self, job: Job, *, submission: Submission | None = None, capacity: int | None = None
    ) -> Job:
        """Put a new job into the queue, or return the one that the same submission made before.

        Args:
            capacity: how many jobs the queue may hold with this one.

        Raises:
            IdempotencyConflictError: the key was used for another body.
            QueueFullError: the queue has no place left.
        """
        ...

    def submitted(self, submission: Submission) -> Job | None:
        """The job that this submission made before, if it did.

        Raises:
            IdempotencyConflictError: the key was used for another body.
        """
        ...

    def get(self, job_id: str) -> Job:
        """The job as it is now.

        Raises:
            JobNotFoundError: there is none.
        """
        ...

    def list(
        self, *, status: Status | None = None, limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        """Jobs, newest first.

        Raises:
            CursorError: the cursor is not one of this store's.
        """
        ...

    def queue_position(self, job_id: str) -> int | None:
        """How many queued jobs came before this one; None if it is not in the queue."""
        ...

    def count(self, status: Status) -> int:
        """How many jobs are in this state."""
        ...

    def needs_adapter(self, sha256: str) -> bool:
        """Whether a job that has not ended needs the adapter of this hash."""
        ...

    def peek(self) -> Job | None:
        """The oldest job in the queue, which stays there; None if the queue is empty."""
        ...

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
        """Give a worker the next job, or None if there is none for it.

        The next job is the oldest, but one whose adapters are all among the `loaded` (by sha256) goes first, and before that one
        that needs just the adapters that are `merged` into the model; unless the oldest was passed over `MAX_PASSED_OVER` times
        already. Two workers never get the same job.

        Args:
            wanted: whether the worker can use a job; then it gets the oldest of these, whatever is loaded, and nothing if one
                that came before it was passed over `MAX_PASSED_OVER` times. It must not call the store.
        """
        ...

    def renew(
        self, job_id: str, epoch: int, progress: JobProgress | None, now: datetime, lease_s: float
    ) -> Job:
        """The worker lives and is this far; the job that comes back may say `cancel_requested`.

        Raises:
            LeaseLostError: the claim is over.
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
        """The images are made and their files durable.

        Raises:
            LeaseLostError: the claim is over, and the result does not count.
        """
        ...

    def fail(self, job_id: str, epoch: int, error: Failure, now: datetime) -> Job:
        """The job cannot be done.

        Raises:
            LeaseLostError: the claim is over.
        """
        ...

    def stop(self, job_id: str, epoch: int, now: datetime) -> Job:
        """The worker stopped because somebody asked.

        Raises:
            LeaseLostError: the claim is over.
        """
        ...

    def release(self, job_id: str, epoch: int, now: datetime) -> Job:
        """The worker gives the job back unharmed.

        Raises:
            LeaseLostError: the claim is over.
        """
        ...

    def abandon(self, job_id: str, epoch: int, reason: str, now: datetime) -> Job:
        """The worker that had this claim is known to be dead.

        Raises:
            LeaseLostError: the claim is over.
        """
        ...

    def abandon_expired(self, now: datetime) -> tuple[Job, ...]:
        """Take back every job whose lease has run out; returns those jobs as they are now."""
        ...

    def cancel(self, job_id: str, now: datetime) -> Job:
        """Ask for a job to stop; see `job.cancel_asked`.

        Raises:
            JobNotFoundError: there is none.
        """
        ...

    def remove_finished(self, *, before: datetime, keep: int) -> tuple[Job, ...]:
        """Remove finished jobs that ended before a time, and all but the newest `keep`; returns those that are gone."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class StoreByTransition(ABC):
    """The methods of `JobStore` that change one job, for stores that can apply a function of `job.py` to it atomically."""

    @abstractmethod
    def change(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        """Replace the job by what `change` makes of it, and return that; what `change` raises leaves the job as it is.

        Raises:
            JobNotFoundError: there is none.
        """

    def renew(
        self, job_id: str, epoch: int, progress: JobProgress | None, now: datetime, lease_s: float
    ) -> Job:
        return self.change(job_id, lambda job: life.renewed(job, epoch, progress, now, lease_s))

    def succeed(
        self,
        job_id: str,
        epoch: int,
        outputs: Sequence[Output],
        timings: Mapping[str, float],
        now: datetime,
    ) -> Job:
        return self.change(
            job_id, lambda job: life.succeeded(job, epoch, tuple(outputs), timings, now)
        )

    def fail(self, job_id: str, epoch: int, error: Failure, now: datetime) -> Job:
        return self.change(job_id, lambda job: life.failed(job, epoch, error, now))

    def stop(self, job_id: str, epoch: int, now: datetime) -> Job:
        return self.change(job_id, lambda job: life.stopped(job, epoch, now))

    def release(self, job_id: str, epoch: int, now: datetime) -> Job:
        return self.change(job_id, lambda job: life.released(job, epoch, now))

    def abandon(self, job_id: str, epoch: int, reason: str, now: datetime) -> Job:
        return self.change(job_id, lambda job: life.abandoned(job, epoch, reason, now))

    def cancel(self, job_id: str, now: datetime) -> Job:
        return self.change(job_id, lambda job: life.cancel_asked(job, now))


def choose(
    queue: Sequence[Job],
    loaded: Collection[str],
    *,
    merged: Collection[str] = (),
    wanted: Callable[[Job], bool] | None = None,
) -> int | None:
    """Which job of a queue, oldest first, a worker with these adapters takes: its place, or None if there is none for it.

    A job that needs no adapter fits every worker, but is not preferred to one that came before it.
    """
    if wanted is not None:
        for place, job in enumerate(queue):
            if wanted(job):
                return place
            if job.passed_over >= MAX_PASSED_OVER:
                return None
        return None
    if not queue:
        return None
    if queue[0].passed_over >= MAX_PASSED_OVER:
        return 0
    warm, here = frozenset(loaded), frozenset(merged)
    as_it_is = (place for place, job in enumerate(queue) if job.adapters and job.adapters == here)
    in_memory = (place for place, job in enumerate(queue) if job.adapters and job.adapters <= warm)
    place = next(chain(as_it_is, in_memory), 0)
    # Whoever stands before the chosen one is passed over; nobody may be so more often than the limit.
    return next(
        (before for before in range(place) if queue[before].passed_over >= MAX_PASSED_OVER), place
    )
