"""One worker: takes jobs from a store, one at a time, and makes their images with one engine."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fidelora.engine.output import preview_jpeg, suffix_of
from fidelora.errors import FideloraError, GenerationCancelled, JobStoreError, LeaseLostError
from fidelora.files import write_atomically
from fidelora.jobs.job import Failure, Job, JobProgress, Output, Status
from fidelora.jobs.store import JobStore

if TYPE_CHECKING:  # a server watches workers and needs no torch for that
    from fidelora.engine.engine import Engine, Progress

log = logging.getLogger(__name__)


class _TimeIsUp(FideloraError):
    """The job took longer than it may."""


@dataclass(frozen=True)
class WorkerLimits:
    """Times of a worker, in seconds.

    Attributes:
        lease_s: how long a claim lasts without a report.
        load_s: how long a base model may take to be found, downloaded and loaded, when no step can report.
        report_every_s: how often progress is written down at most; wishes to cancel are looked for at every step.
        timeout_s: how long one attempt at a job may take; then the work stops and the job has failed.
    """

    lease_s: float = 60.0
    load_s: float = 1800.0
    report_every_s: float = 0.5
    timeout_s: float = 600.0


@dataclass(frozen=True)
class AttemptReport:
    """What one attempt at a job was like, for whoever counts.

    Attributes:
        job_id: of the job.
        status: of the job afterwards; `in_queue` if there will be another attempt.
        code: why it failed; empty if it did not.
        wait_s: how long the job was in the queue, if this was its first attempt.
        images, steps: that were finished.
        timings: seconds by part, see `Job.timings`.
        adapters_warm, adapters_cold: how many of its adapters were in memory already, and how many were not.
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


class Worker:
    """Makes the images of one job after the other.

    Args:
        name: told in the job while it runs.
        outputs: the folder for images, which are called `{job}_output_{index}` with the ending of their format.
        on_end: called after each attempt.
        now, monotonic: the clocks; tests have their own.
    """

    def __init__(
        self,
        name: str,
        store: JobStore,
        engine: Engine,
        outputs: Path,
        limits: WorkerLimits | None = None,
        *,
        on_end: Callable[[AttemptReport], None] = lambda report: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._on_end = on_end
        self._store = store
        self._engine = engine
        self._outputs = outputs
        self._limits = limits or WorkerLimits()
        self._now = now
        self._monotonic = monotonic

    def run_next(self) -> Job | None:
        """Take the next job and bring it to an end; None if there is none.

        Whatever goes wrong with the job becomes its failure, and the worker is fit for the next one. What is no error of ours
        (a fault in the code, a broken device) costs the job an attempt. Files of a job that did not succeed are removed.

        Returns:
            the job as it is afterwards; it may belong to another worker by then.
        """
        loaded = self._engine.adapters.loaded()
        job = self._store.claim(self._name, self._now(), self._limits.lease_s, loaded)
        if job is None:
            return None
        attempt = _Attempt(job, self._store, self._limits, self._now, self._monotonic)
        about = {"request_id": job.id}
        log.info("job begins, attempt %d", job.attempts, extra=about)
        try:
            after = self._bring_to_an_end(attempt)
        except LeaseLostError:
            log.warning("the job belongs to another worker now", extra=about)
            return self._store.get(job.id)
        if after.status is Status.FAILED and after.error:
            log.warning("job failed: %s: %s", after.error.code, after.error.message, extra=about)
        else:
            log.info("job ends: %s", after.status, extra=about)
        self._on_end(_report(job, after, attempt.timings, loaded))
        return after

    def _bring_to_an_end(self, attempt: _Attempt) -> Job:
        """Make the job's images, or say why not.

        Raises:
            LeaseLostError: neither counts any more.
            JobStoreError: neither can be written down.
        """
        job, written = attempt.job, list[Path]()
        try:
            outputs = self._make_images(attempt, written)
            return self._store.succeed(job.id, job.epoch, outputs, attempt.timings, self._now())
        except (LeaseLostError, JobStoreError):
            raise  # nothing can be said about the job: it is another's, or its lease will run out
        except GenerationCancelled:
            after = self._store.stop(job.id, job.epoch, self._now())
        except FideloraError as error:
            after = self._store.fail(job.id, job.epoch, Failure(error_code(error), str(error)), self._now())
        except Exception as error:
            log.exception("attempt %d came to an unexpected end", job.attempts, extra={"request_id": job.id})
            after = self._store.abandon(job.id, job.epoch, f"of an unexpected {type(error).__name__}: {error}", self._now())
        except BaseException:  # the process is told to stop: somebody else may have the job, and no attempt is lost
            self._store.release(job.id, job.epoch, self._now())
            _remove(written)
            raise
        # Only now, when the store has said that the job was still ours: another worker's files have the same names.
        _remove(written)
        return after

    def _make_images(self, attempt: _Attempt, written: list[Path]) -> list[Output]:
        job, timings = attempt.job, attempt.timings
        outputs: list[Output] = []
        for index, recipe in enumerate(job.recipes):
            attempt.report(self._limits.load_s)
            start = self._monotonic()
            self._engine.load(recipe)
            timings["load"] = timings.get("load", 0.0) + self._monotonic() - start
            attempt.report()
            image = self._engine.generate(recipe, attempt.on_step(index))
            content = image.encode(job.image_format)  # type: ignore[arg-type]  # `encode` checks it
            attempt.report()  # not to write over the files of a worker that has the job now
            path = self._outputs / f"{job.id}_output_{index}{suffix_of(job.image_format)}"  # type: ignore[arg-type]
            written.append(path)
            write_atomically(path, content)
            height, width = image.pixels.shape[:2]
            sha256 = hashlib.sha256(content).hexdigest()
            outputs.append(Output(str(path), job.image_format, width, height, recipe.seed, sha256, len(content)))
            for part, seconds in image.seconds.items():
                timings[part] = timings.get(part, 0.0) + seconds
        return outputs


class _Attempt:
    """One attempt at one job: what it has to look for at every step."""

    def __init__(
        self, job: Job, store: JobStore, limits: WorkerLimits, now: Callable[[], datetime], monotonic: Callable[[], float]
    ) -> None:
        self.job = job
        self.timings: dict[str, float] = {}
        self._store = store
        self._limits = limits
        self._now = now
        self._monotonic = monotonic
        self._start = self._reported = monotonic()
        self._progress: JobProgress | None = None

    def on_step(self, image: int) -> Callable[[Progress], None]:
        """What the engine calls after each step of this image."""
        images = len(self.job.recipes)

        def step_is_done(progress: Progress) -> None:
            done = image + progress.step / progress.steps
            seconds = self._monotonic() - self._start
            eta_s = seconds / done * (images - done)
            self._progress = JobProgress(image, images, progress.step, progress.steps, eta_s)
            if seconds > self._limits.timeout_s:
                raise _TimeIsUp(f"The job was stopped after {seconds:.0f} seconds; {self._limits.timeout_s:g} are allowed.")
            if self._store.get(self.job.id).cancel_requested:
                raise GenerationCancelled
            if self._monotonic() - self._reported >= self._limits.report_every_s:
                preview = base64.b64encode(preview_jpeg(progress.preview())).decode()
                self._progress = replace(self._progress, preview=preview)
                self.report()

        return step_is_done

    def report(self, lease_s: float | None = None) -> None:
        """Renew the lease, for the usual time if none is given, and write progress down.

        Raises:
            LeaseLostError: another worker has the job.
        """
        self._store.renew(self.job.id, self.job.epoch, self._progress, self._now(), lease_s or self._limits.lease_s)
        self._reported = self._monotonic()


def error_code(error: FideloraError) -> str:
    """The code of an error for programs: `AdapterMismatchError` is `ADAPTER_MISMATCH`, a job out of time `TIMEOUT`."""
    if isinstance(error, _TimeIsUp):
        return "TIMEOUT"
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__.removesuffix("Error"))
    return "_".join(words).upper()


def _report(job: Job, after: Job, timings: Mapping[str, float], loaded: frozenset[str]) -> AttemptReport:
    assert job.started_at is not None, "it was claimed"
    return AttemptReport(
        job_id=job.id,
        status=after.status.value,
        code=after.error.code if after.error else "",
        wait_s=(job.started_at - job.created_at).total_seconds() if job.attempts == 1 else None,
        images=len(after.outputs),
        steps=sum(recipe.steps for recipe in job.recipes) if after.outputs else 0,
        timings=dict(timings),
        adapters_warm=len(job.adapters & loaded),
        adapters_cold=len(job.adapters - loaded),
    )


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
