"""Jobs and their transitions.

A job is frozen, and each transition is a function that returns the changed job. Therefore all
stores behave the same, and the life cycle can be tested without a database:

    in_queue -> in_progress -> succeeded | failed | canceled
    in_queue <- in_progress    the attempt was interrupted: retry
    in_queue -> canceled

Workers may be slow, partitioned or dead, so a claim is a lease with an epoch. Every report carries
the epoch of its claim, and a report with an outdated epoch is refused: a worker that lost its
lease cannot change a job that another worker has claimed.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from fidelora.errors import FideloraError, LeaseLostError, RecipeError
from fidelora.recipe import Recipe
from fidelora.texts import shortened

MAX_ATTEMPTS = 3  # a job fails after this many attempts without a result
_RETRY_PAUSES_S = (2.0, 20.0)
"""Seconds before the second and the third attempt. A job that kills its worker then leaves time for
other jobs, and a machine that is out of memory can recover."""
MAX_RETRY_PAUSE_S = max(_RETRY_PAUSES_S)
SILENT = "its worker stopped reporting"  # a reason for `abandoned`


class Status(StrEnum):
    """State of a job; the values are those of the HTTP API."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def final(self) -> bool:
        """True if no transition leads out of this state."""
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELED)


@dataclass(frozen=True)
class JobProgress:
    """Progress of a job.

    Attributes:
        image: index of the current image, from 0.
        images: number of images of the job.
        step: number of finished steps of the current image.
        steps: number of steps of the current image.
        eta_s: estimated seconds until the job ends; None if unknown.
        preview: preview of the current image, a small JPEG in base64; empty if there is none, and
            after the job has ended.
    """

    image: int
    images: int
    step: int
    steps: int
    eta_s: float | None = None
    preview: str = ""

    @property
    def fraction(self) -> float:
        """Finished fraction of the job, 0..1; all images have the same weight."""
        return (self.image + self.step / self.steps) / self.images


@dataclass(frozen=True)
class Output:
    """File of a finished image."""

    file_path: str
    format: str
    width: int
    height: int
    seed: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Failure:
    """Reason why a job failed: a code for programs and a message for users.

    A message of more than 2,000 bytes is cut, because it is stored and sent with each status.
    """

    code: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", shortened(self.message))


@dataclass(frozen=True)
class Job:
    """One request for images.

    Attributes:
        recipes: one complete recipe per image; adapters are identified by sha256.
        image_format: format of the files.
        image_quality: 0..100, for JPEG and WebP files; None for the default, which
            `GeneratedImage.encode` describes.
        attempts: number of claims, not counting released ones.
        epoch: number of the current or last claim.
        worker: name of the worker that holds the claim; empty without a claim.
        lease_expires_at: end of the claim unless its worker renews it; None without a claim.
        retry_at: earliest time of the next attempt, set after a failed attempt. None before the
            first failed attempt, and while an attempt runs.
        cancel_requested: True if the job has to stop; its worker stops it after the current step.
        timings: seconds of the last attempt by phase: `load` (base model), `read` (adapter files),
            `adapters` (merging), `text` (prompts), `denoise` and `decode`; empty until the job has
            succeeded.
        notes: sentences about values that the server chose, such as a LoRA's own trigger word.
        owner: id of the API key that submitted the job; empty on a server without keys, and for
            jobs of versions that did not store it.
        device_kind: only workers with a device of this kind (`cpu`, `cuda`, ...) claim the job,
            because each kind rounds in its own way; empty for all workers.
        version: number of the last change; also the id of its event.
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
    retry_at: datetime | None = None
    cancel_requested: bool = False
    progress: JobProgress | None = None
    outputs: tuple[Output, ...] = ()
    error: Failure | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    owner: str = ""
    device_kind: str = ""
    version: int = 1

    @property
    def adapters(self) -> frozenset[str]:
        """Sha256 of every adapter that the job needs."""
        return frozenset(ref.sha256 for recipe in self.recipes for ref in recipe.files)


def new_job(
    recipes: tuple[Recipe, ...],
    now: datetime,
    *,
    image_format: str = "png",
    image_quality: int | None = None,
    notes: tuple[str, ...] = (),
    owner: str = "",
    device_kind: str = "",
) -> Job:
    """Return a queued job for these images.

    Raises:
        RecipeError: there are no recipes.
    """
    if not recipes:
        raise RecipeError("A job needs at least one recipe.", field="prompts")
    _require_aware(now)
    return Job(
        id=uuid.uuid4().hex,
        created_at=now,
        recipes=recipes,
        image_format=image_format,
        image_quality=image_quality,
        notes=notes,
        owner=owner,
        device_kind=device_kind,
    )


def claimed(job: Job, worker: str, now: datetime, lease_s: float) -> Job:
    """Claim a queued job for a worker, under a new epoch."""
    assert job.status is Status.IN_QUEUE, "stores offer only queued jobs"
    return _changed(
        job,
        status=Status.IN_PROGRESS,
        worker=worker,
        epoch=job.epoch + 1,
        attempts=job.attempts + 1,
        started_at=job.started_at or now,
        lease_expires_at=now + timedelta(seconds=lease_s),
        retry_at=None,
    )


def is_due(job: Job, now: datetime) -> bool:
    """True if a queued job may be claimed: it never failed, or its pause before a retry is over.

    The job is also due if `retry_at` is further in the future than the longest pause. This happens
    if the system clock was set back after the failed attempt.
    """
    if job.retry_at is None:
        return True
    ahead_s = (job.retry_at - now).total_seconds()
    return ahead_s <= 0 or ahead_s > MAX_RETRY_PAUSE_S


def renewed(
    job: Job, epoch: int, progress: JobProgress | None, now: datetime, lease_s: float
) -> Job:
    """Extend the lease after a heartbeat, and store the progress if one was sent.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _require_claim(job, epoch)
    return _changed(
        job, progress=progress or job.progress, lease_expires_at=now + timedelta(seconds=lease_s)
    )


def succeeded(
    job: Job, epoch: int, outputs: tuple[Output, ...], timings: Mapping[str, float], now: datetime
) -> Job:
    """End the job with its images, whose files exist; a pending cancel request has no effect.

    Raises:
        LeaseLostError: the claim is no longer the current one, so the files are not used.
    """
    _require_claim(job, epoch)
    return _ended(job, Status.SUCCEEDED, now, outputs=outputs, timings=timings)


def failed(job: Job, epoch: int, error: Failure, now: datetime) -> Job:
    """End the job with an error that a retry would not fix.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _require_claim(job, epoch)
    return _ended(job, Status.FAILED, now, error=error)


def stopped(job: Job, epoch: int, now: datetime) -> Job:
    """End the job as canceled, after its worker stopped.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _require_claim(job, epoch)
    return _ended(job, Status.CANCELED, now)


def released(job: Job, epoch: int, now: datetime) -> Job:
    """Return the job to the queue without counting the attempt.

    For interruptions that the job did not cause: the server stops, an image cannot be written, or
    the job store fails.

    A job with a cancel request ends as canceled.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _require_claim(job, epoch)
    if job.cancel_requested:
        return _ended(job, Status.CANCELED, now)
    return _back_in_queue(replace(job, attempts=job.attempts - 1))


def abandoned(job: Job, epoch: int, reason: str, now: datetime) -> Job:
    """Return the job to the queue after a failed attempt.

    An attempt fails if its worker dies, stops its heartbeats or has an unexpected error.

    The next attempt follows after a pause that grows with each attempt. A job with a cancel request
    ends as canceled. A job that has used all its `MAX_ATTEMPTS` attempts fails.

    Raises:
        LeaseLostError: the claim is no longer the current one.
    """
    _require_claim(job, epoch)
    if job.cancel_requested:
        return _ended(job, Status.CANCELED, now)
    if job.attempts >= MAX_ATTEMPTS:
        message = f"Given up after {job.attempts} attempts; the last one ended because {reason}."
        return _ended(job, Status.FAILED, now, error=Failure("WORKER_LOST", message))
    pause = timedelta(seconds=_RETRY_PAUSES_S[job.attempts - 1])
    return _back_in_queue(replace(job, retry_at=now + pause))


def cancellation_requested(job: Job, now: datetime) -> Job:
    """Request that the job stops.

    A queued job is canceled at once, a running one after its worker's current step. A job that has
    ended does not change.
    """
    if job.status.final or job.cancel_requested:
        return job
    if job.status is Status.IN_QUEUE:
        return _ended(job, Status.CANCELED, now)
    return _changed(job, cancel_requested=True)


def _require_claim(job: Job, epoch: int) -> None:
    if job.status is not Status.IN_PROGRESS or job.epoch != epoch:
        raise LeaseLostError(
            f"Claim {epoch} on job {job.id} has ended: "
            f"the job is {job.status}, its latest claim is {job.epoch}."
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


def _require_aware(time: datetime) -> None:
    if time.tzinfo is None:
        raise FideloraError("A job's time has no time zone; pass an aware UTC datetime.")
