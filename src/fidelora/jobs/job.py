"""A job: some images to make, and everything that can happen to it.

A job is frozen. Each thing that can happen is a function from a job to the next one, so every store does exactly the same, and
the whole life cycle can be read, and tested, without a database:

    in_queue -> in_progress -> succeeded | failed | canceled
    in_queue <- in_progress    the worker died, or the server stops: another try
    in_queue -> canceled

Workers may be slow, partitioned or dead, so a claim is a lease with an epoch. Every report carries the epoch of its claim, and a
report of any epoch but the current one is refused: a worker that was given up for dead cannot change a job that another has.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from fidelora.errors import FideloraError, LeaseLostError, RecipeError
from fidelora.recipe import Recipe

MAX_ATTEMPTS = 3
SILENT = "its worker was silent until its lease ran out"


class Status(StrEnum):
    """Where a job is in its life; the values are those of the HTTP API."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def final(self) -> bool:
        """Whether nothing can happen any more."""
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELED)


@dataclass(frozen=True)
class JobProgress:
    """How far a job is: `step` of `steps` of image `image` (from 0) of `images`; `eta_s` seconds are left, if that is known.

    `preview` is a rough picture of that image, a small JPEG in base64; empty if there is none, and once the job has ended.
    """

    image: int
    images: int
    step: int
    steps: int
    eta_s: float | None = None
    preview: str = ""

    @property
    def fraction(self) -> float:
        """Of the whole job, 0..1, all images counted alike."""
        return (self.image + self.step / self.steps) / self.images


@dataclass(frozen=True)
class Output:
    """A finished image's file."""

    file_path: str
    format: str
    width: int
    height: int
    seed: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Failure:
    """Why a job failed: a code for programs and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """One request for images.

    Attributes:
        recipes: one per image, complete; adapters are known by their sha256.
        image_format: of the files.
        image_quality: 0..100, of JPEG and WebP files; None is JPEG's 95 and WebP without loss.
        attempts: how often a worker began it.
        epoch: number of the current claim, or of the last one.
        worker: who has the current claim; empty if nobody has.
        lease_expires_at: when the claim ends if its worker does not report; None if nobody has one.
        cancel_requested: somebody wants it to stop; its worker will be told at its next report.
        passed_over: how often a later job was preferred, because its adapters were loaded already or it could share a batch.
        version: counts every change; the number of an event.
    """

    id: str
    created_at: datetime
    recipes: tuple[Recipe, ...]
    image_format: str = "png"
    image_quality: int | None = None
    status: Status = Status.IN_QUEUE
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempts: int = 0
    epoch: int = 0
    worker: str = ""
    lease_expires_at: datetime | None = None
    cancel_requested: bool = False
    passed_over: int = 0
    progress: JobProgress | None = None
    outputs: tuple[Output, ...] = ()
    error: Failure | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    version: int = 1

    @property
    def adapters(self) -> frozenset[str]:
        """Sha256 of every adapter that the job needs."""
        return frozenset(ref.sha256 for recipe in self.recipes for ref in recipe.adapters)


def new_job(
    recipes: tuple[Recipe, ...],
    now: datetime,
    *,
    image_format: str = "png",
    image_quality: int | None = None,
) -> Job:
    """A job for these images, in the queue.

    Raises:
        RecipeError: there is not one recipe.
    """
    if not recipes:
        raise RecipeError("A job needs at least one recipe.", field="prompts")
    _aware(now)
    return Job(
        id=uuid.uuid4().hex,
        created_at=now,
        recipes=recipes,
        image_format=image_format,
        image_quality=image_quality,
    )


def claimed(job: Job, worker: str, now: datetime, lease_s: float) -> Job:
    """A worker takes the job out of the queue, under a new epoch."""
    assert job.status is Status.IN_QUEUE, "stores offer only queued jobs"
    return _changed(
        job,
        status=Status.IN_PROGRESS,
        worker=worker,
        epoch=job.epoch + 1,
        attempts=job.attempts + 1,
        started_at=job.started_at or now,
        lease_expires_at=now + timedelta(seconds=lease_s),
        passed_over=0,
    )


def renewed(
    job: Job, epoch: int, progress: JobProgress | None, now: datetime, lease_s: float
) -> Job:
    """The worker is alive and this far.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _hold(job, epoch)
    return _changed(
        job, progress=progress or job.progress, lease_expires_at=now + timedelta(seconds=lease_s)
    )


def succeeded(
    job: Job, epoch: int, outputs: tuple[Output, ...], timings: Mapping[str, float], now: datetime
) -> Job:
    """The images are made and their files are in place. A wish to cancel came too late then.

    Raises:
        LeaseLostError: the claim is no longer the current one; the files are not the job's.
    """
    _hold(job, epoch)
    return _ended(job, Status.SUCCEEDED, now, outputs=outputs, timings=timings)


def failed(job: Job, epoch: int, error: Failure, now: datetime) -> Job:
    """It cannot be done, and another try would not help.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _hold(job, epoch)
    return _ended(job, Status.FAILED, now, error=error)


def stopped(job: Job, epoch: int, now: datetime) -> Job:
    """The worker did what a wish to cancel asked for.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _hold(job, epoch)
    return _ended(job, Status.CANCELED, now)


def released(job: Job, epoch: int, now: datetime) -> Job:
    """The worker gives the job back because the server stops; the attempt does not count.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _hold(job, epoch)
    if job.cancel_requested:
        return _ended(job, Status.CANCELED, now)
    return _back_in_queue(replace(job, attempts=job.attempts - 1))


def abandoned(job: Job, epoch: int, reason: str, now: datetime) -> Job:
    """The worker is dead or silent: another try, unless there were `MAX_ATTEMPTS` or somebody wants the job to stop.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _hold(job, epoch)
    if job.cancel_requested:
        return _ended(job, Status.CANCELED, now)
    if job.attempts >= MAX_ATTEMPTS:
        message = f"Given up after {job.attempts} attempts; the last one ended because {reason}."
        return _ended(job, Status.FAILED, now, error=Failure("WORKER_LOST", message))
    return _back_in_queue(job)


def cancel_asked(job: Job, now: datetime) -> Job:
    """Somebody wants the job to stop: a queued one is canceled at once, a running one at its worker's next report.

    A job that has ended stays as it is.
    """
    if job.status.final or job.cancel_requested:
        return job
    if job.status is Status.IN_QUEUE:
        return _ended(job, Status.CANCELED, now)
    return _changed(job, cancel_requested=True)


def passed(job: Job) -> Job:
    """A later job was preferred."""
    return _changed(job, passed_over=job.passed_over + 1)


def _hold(job: Job, epoch: int) -> None:
    if job.status is not Status.IN_PROGRESS or job.epoch != epoch:
        raise LeaseLostError(
            f"The claim {epoch} on job {job.id} is over: the job is {job.status}, its claim is {job.epoch}."
        )


def _back_in_queue(job: Job) -> Job:
    return _changed(job, status=Status.IN_QUEUE, worker="", lease_expires_at=None, progress=None)


def _ended(job: Job, status: Status, now: datetime, **fields: object) -> Job:
    progress = replace(job.progress, preview="") if job.progress else None
    return _changed(
        job,
        status=status,
        worker="",
        lease_expires_at=None,
        finished_at=now,
        progress=progress,
        **fields,
    )


def _changed(job: Job, **fields: object) -> Job:
    return replace(job, version=job.version + 1, **fields)  # type: ignore[arg-type]


def _aware(moment: datetime) -> None:
    if moment.tzinfo is None:
        raise FideloraError("Times of jobs are aware UTC datetimes.")
