"""One attempt at one job: its limits, progress, heartbeats, image files and final report."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from fidelora.errors import FideloraError, GenerationCancelled, JobStoreError, StorageError
from fidelora.images.formats import suffix_of
from fidelora.images.write import GeneratedImage, preview_jpeg
from fidelora.jobs.job import Job, JobProgress, Output
from fidelora.jobs.store import JobStore
from fidelora.recipe import Recipe
from fidelora.storage.images import ImageStore

if TYPE_CHECKING:  # the server imports this module and must not load torch
    from fidelora.engine.engine import Progress


log = logging.getLogger(__name__)


class JobTimeoutError(FideloraError):
    """The attempt took longer than `WorkerLimits.timeout_s`."""


def error_code(error: FideloraError) -> str:
    """Return the code of an error, which is derived from its class name.

    For example, `AdapterMismatchError` has the code `ADAPTER_MISMATCH`. A job that exceeded its
    time limit has the code `TIMEOUT`.
    """
    if isinstance(error, JobTimeoutError):
        return "TIMEOUT"
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__.removesuffix("Error"))
    return "_".join(words).upper()


@dataclass(frozen=True)
class WorkerLimits:
    """Time limits of a worker, in seconds.

    Attributes:
        lease_s: duration of a lease, from the last heartbeat, and time that a step may take. Slow
            steps extend both, see `StepAllowance`.
        load_s: duration of the lease while a base model is located, downloaded and loaded. No
            heartbeats are sent during that time.
        report_every_s: shortest time between two heartbeats with progress, except that a longer
            lease is requested at once. Each heartbeat also checks whether the job was canceled.
            `JobStore.cancel_requested` is called at every step, with or without a heartbeat.
        timeout_s: longest duration of one attempt; after it, the job fails.
        batch_wait_s: time to wait for further jobs while the batch has room. Jobs that are already
            queued join the batch without a wait.
    """

    lease_s: float = 60.0
    load_s: float = 1800.0
    report_every_s: float = 0.5
    timeout_s: float = 600.0
    batch_wait_s: float = 0.0


_MAX_LEASES_PER_STEP = 3  # a worker is hung after this many leases, however slow its steps are
_SLOW_STEP_FACTOR = 10  # a step may take this many times as long as the longest one before it
_STORE_RETRY_INTERVAL_S = 1.0  # seconds between two attempts while the store fails
_STORE_RETRY_S = 900.0  # seconds after which a result that cannot be stored is given up


class StepAllowance:
    """Seconds until a worker without a finished step counts as hung, for one batch.

    The duration of a step is only known after the first one: large images, compilation and slow
    devices can make it longer than `WorkerLimits.lease_s`. So the first step, and the decoding of
    the images after the last step, may each take `_MAX_LEASES_PER_STEP` times `lease_s`.
    """

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._longest_step_s = 0.0

    @property
    def longest_s(self) -> float:
        """Allowance before the first step and after the last one."""
        return _MAX_LEASES_PER_STEP * self._limits.lease_s

    def after_step(self, seconds: float, *, is_last: bool) -> float:
        """Return the allowance after a step that took `seconds`."""
        if is_last:
            return self.longest_s
        self._longest_step_s = max(self._longest_step_s, seconds)
        slow_s = min(_SLOW_STEP_FACTOR * self._longest_step_s, self.longest_s)
        return max(self._limits.lease_s, slow_s)


def retry_while_store_fails(call: Callable[[], Job], wait: Callable[[float], None]) -> Job:
    """Return the result of `call`, which is repeated while it raises `JobStoreError`.

    Args:
        call: changes a job in the store.
        wait: sleeps for the given seconds.

    Raises:
        JobStoreError: the store has failed for `_STORE_RETRY_S`.
    """
    for _ in range(int(_STORE_RETRY_S / _STORE_RETRY_INTERVAL_S)):
        try:
            return call()
        except JobStoreError as error:
            log.warning("job store unavailable, retrying: %s", error)
            wait(_STORE_RETRY_INTERVAL_S)
    return call()


@dataclass(frozen=True)
class AttemptReport:
    """Result of one attempt at one job, for metrics.

    Attributes:
        status: status of the job afterwards; `in_queue` if it will be retried.
        code: error code of a failed job; empty for others.
        wait_s: seconds that the job spent in the queue before its first attempt; None for retries.
        images, steps: number of finished images, and of their steps.
        pixel_steps: sum of `pixel_steps` of the finished images.
        model: model of the images.
        claim_s: seconds that the claim took; None for further jobs of a batch.
        timings: seconds by phase, see `Job.timings`.
        adapters_warm: number of the job's adapters that were in memory before the attempt.
        adapters_cold: number of the job's adapters that were not in memory before the attempt.
    """

    job_id: str
    status: str
    code: str
    wait_s: float | None
    images: int
    steps: int
    timings: Mapping[str, float]
    adapters_warm: int
    adapters_cold: int
    pixel_steps: int = 0
    model: str = ""
    claim_s: float | None = None


@dataclass(frozen=True)
class BatchPart:
    """Images of one job in a batch.

    Attributes:
        recipes: recipes of these images.
        first_image: index of the first of them in the job.
        offset: index of the first of them in the batch.
    """

    attempt: Attempt
    recipes: Sequence[Recipe]
    first_image: int = 0
    offset: int = 0


class Attempt:
    """One attempt at one job.

    Attributes:
        job: the job as claimed.
        files: image files of the job.
        timings: seconds by phase, see `Job.timings`.
        running: True until the job ends or this worker loses the lease.
        ended_job: the job as stored when the attempt ended; None while it runs, and if the lease
            was lost.
    """

    def __init__(
        self,
        job: Job,
        files: ImageFiles,
        store: JobStore,
        limits: WorkerLimits,
        now: Callable[[], datetime | None],
        monotonic: Callable[[], float],
        wait: Callable[[float], None],
    ) -> None:
        self.job = job
        self.files = files
        self.timings: dict[str, float] = {}
        self.running = True
        self.ended_job: Job | None = None
        self._store = store
        self._limits = limits
        self._now = now
        self._monotonic = monotonic
        self._wait = wait
        self._lease_s = limits.lease_s
        self._started = self._last_heartbeat = monotonic()
        self._progress: JobProgress | None = None

    def restart_timeout(self) -> None:
        """Restart the timeout, after the job waited for other jobs or its shared batch failed."""
        self._started = self._monotonic()

    def on_step(self, part: BatchPart, progress: Progress, lease_s: float) -> None:
        """Record one finished step of the batch that contains `part`.

        The images of a batch are denoised together, but the progress counts them as if they were
        made one after the other.

        Args:
            lease_s: duration of the lease if a heartbeat is due.

        Raises:
            GenerationCancelled, JobTimeoutError, LeaseLostError: the job has to leave the batch.
            OutputError: an earlier image could not be written.
        """
        images, in_batch, steps = len(self.job.recipes), len(part.recipes), progress.steps
        image, step = divmod(in_batch * progress.step, steps)
        if image == in_batch:  # report the end of the last image, not the start of another
            image, step = in_batch - 1, steps
        done = part.first_image + image + step / steps
        seconds = self._monotonic() - self._started
        eta_s = seconds / done * (images - done)
        self._progress = JobProgress(part.first_image + image, images, step, steps, eta_s)
        if seconds > self._limits.timeout_s:
            raise JobTimeoutError(
                f"The job was stopped after {seconds:.0f} seconds; "
                f"{self._limits.timeout_s:g} are allowed. Request fewer images or steps."
            )
        self.files.raise_errors()
        self.poll(
            lease_s,
            lambda: base64.b64encode(preview_jpeg(progress.preview(part.offset))).decode(),
        )

    def poll(self, lease_s: float, preview: Callable[[], str] | None = None) -> None:
        """Check for cancellation, and send a heartbeat if one is due.

        While the store fails, the job continues without either.

        Args:
            lease_s: duration of the new lease.
            preview: makes the preview to send with the heartbeat, a JPEG in base64.

        Raises:
            GenerationCancelled: cancellation of the job was requested.
            LeaseLostError: another worker has the job.
        """
        try:
            if self._store.cancel_requested(self.job.id):
                raise GenerationCancelled
            is_due = self._monotonic() - self._last_heartbeat >= self._limits.report_every_s
            if is_due or lease_s > self._lease_s:
                if self._progress is not None and preview is not None:
                    self._progress = replace(self._progress, preview=preview())
                if self.heartbeat(lease_s).cancel_requested:
                    raise GenerationCancelled
        except JobStoreError as error:
            log.warning("no heartbeat: %s", error, extra={"request_id": self.job.id})

    def heartbeat(self, lease_s: float | None = None) -> Job:
        """Renew the lease, store the progress, and return the job.

        Args:
            lease_s: duration of the new lease; by default `WorkerLimits.lease_s`.

        Raises:
            LeaseLostError: another worker has the job.
        """
        lease_s = lease_s or self._limits.lease_s
        job = self._store.renew(self.job.id, self.job.epoch, self._progress, self._now(), lease_s)
        self._lease_s = lease_s
        self._last_heartbeat = self._monotonic()
        return job

    def write(self, part: BatchPart, images: Sequence[GeneratedImage]) -> None:
        """Queue this job's images from a finished batch for writing.

        Raises:
            LeaseLostError: another worker has the job.
        """
        own = images[part.offset : part.offset + len(part.recipes)]
        self.add_timings(own[0].seconds, len(own) / len(images))
        # Without a lease, the files would replace those of another worker.
        retry_while_store_fails(self.heartbeat, self._wait)
        for index, image in enumerate(own, part.first_image):
            self.files.write(index, image)

    def add_timings(self, seconds: Mapping[str, float], share: float) -> None:
        """Add a share of a batch's timings; every image of a batch gets the same share."""
        for phase, spent in seconds.items():
            self.timings[phase] = self.timings.get(phase, 0.0) + spent * share

    def report(self, loaded: frozenset[str], claim_s: float | None = None) -> AttemptReport:
        """Return the report of an attempt that has ended.

        Args:
            loaded: sha256 of the adapters that were in memory before the attempt.
            claim_s: seconds that the claim took, if it was measured.
        """
        job, ended = self.job, self.ended_job
        assert ended is not None, "the attempt has not ended"
        assert job.started_at is not None, "the job was not claimed"
        made = job.recipes if ended.outputs else ()
        return AttemptReport(
            job_id=job.id,
            status=ended.status.value,
            code=ended.error.code if ended.error else "",
            # The two times may come from different clocks.
            wait_s=max(0.0, (job.started_at - job.created_at).total_seconds())
            if job.attempts == 1
            else None,
            images=len(ended.outputs),
            steps=sum(recipe.steps for recipe in made),
            pixel_steps=sum(map(pixel_steps, made)),
            model=job.recipes[0].model,
            claim_s=claim_s,
            timings=dict(self.timings),
            adapters_warm=len(job.adapters & loaded),
            adapters_cold=len(job.adapters - loaded),
        )


def pixel_steps(recipe: Recipe) -> int:
    """Return width x height x frames x steps, to which the time of an image is proportional."""
    return recipe.width * recipe.height * recipe.frames * recipe.steps


class ImageFiles:
    """Image files of one job, encoded and written on another thread while the next image is made.

    Args:
        images: storage for them; files are named `{job}_output_{index}` with their format's
            suffix.
        executor: an executor with one thread, so that files are written in order.
    """

    def __init__(self, job: Job, images: ImageStore, executor: Executor) -> None:
        self._job = job
        self._images = images
        self._executor = executor
        self._writes: dict[str, Future[Output]] = {}

    def write(self, index: int, image: GeneratedImage) -> None:
        """Queue an image for writing."""
        suffix = suffix_of(self._job.image_format)  # type: ignore[arg-type]
        name = f"{self._job.id}_output_{index}{suffix}"
        self._writes[name] = self._executor.submit(
            _write_image, self._images, name, image, self._job
        )

    def raise_errors(self) -> None:
        """Raise the error of the first write that has failed so far, if any."""
        for future in self._writes.values():
            if future.done():
                future.result()

    def outputs(self) -> list[Output]:
        """Wait until all files are written, and return them.

        Raises:
            OutputError: a file could not be written.
        """
        return [future.result() for future in self._writes.values()]

    def stop(self) -> None:
        """Cancel the writes that have not started, and wait for the one in progress."""
        for future in self._writes.values():
            future.cancel()
        wait(self._writes.values())

    def remove(self) -> None:
        """Remove the files, as far as possible."""
        try:
            self._images.remove([self._images.location(name) for name in self._writes])
        except StorageError as error:
            log.warning("images were left behind: %s", error)


def _write_image(images: ImageStore, name: str, image: GeneratedImage, job: Job) -> Output:
    content = image.encode(job.image_format, job.image_quality)  # type: ignore[arg-type]
    location = images.write(name, content)
    height, width = image.pixels.shape[:2]
    sha256 = hashlib.sha256(content).hexdigest()
    return Output(
        location, job.image_format, width, height, image.recipe.seed, sha256, len(content)
    )
