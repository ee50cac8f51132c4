"""Worker: claims one job, or several jobs for one batch, and makes their images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from fidelora.errors import (
    FideloraError,
    GenerationCancelled,
    JobStoreError,
    LeaseLostError,
    StorageError,
)
from fidelora.jobs.job import Failure, Job, Status
from fidelora.jobs.store import JobStore
from fidelora.storage.images import ImageStore
from fidelora.workers.attempt import (
    Attempt,
    AttemptReport,
    BatchPart,
    ImageFiles,
    StepAllowance,
    WorkerLimits,
    error_code,
    retry_while_store_fails,
)
from fidelora.workers.batch import (
    Batch,
    BatchEndedEarly,
    all_may_share_batch,
    fits_batch,
    parts_in_turn,
    parts_side_by_side,
)
from fidelora.workers.prefetch import AdapterPrefetcher, adapters_of
from fidelora.workers.presence import Presence
from fidelora.workers.signals import beating
from fidelora.workers.storage_pause import StoragePause

if TYPE_CHECKING:  # the server imports this module and must not load torch
    from fidelora.engine.engine import Engine

log = logging.getLogger(__name__)

_CLAIM_INTERVAL_S = 0.05  # seconds between claims while a batch waits; a step takes longer
MAX_HOLD_S = 1.0  # seconds; largest `hold_s` of a claim: longer waits gain little


class Worker:
    """Makes the images of one job at a time, or of several jobs that can share a batch.

    Args:
        name: name of the worker, stored in its current job.
        outputs: storage for the images, named `{job}_output_{index}` with their format's suffix.
        on_end: called after each attempt.
        on_pause: called with the reason when the worker pauses because it cannot write images, and
            with an empty reason when it continues.
        beat: called while the worker makes progress, with the seconds until the next call. If that
            call is late, the worker counts as hung.
        presence: reports the state of the worker to the store; None for no reports.
        now: current time; None for the store's clock.
        monotonic: clock, replaced in tests.
        wait: sleeps for the given seconds.
    """

    def __init__(
        self,
        name: str,
        store: JobStore,
        engine: Engine,
        outputs: ImageStore,
        limits: WorkerLimits | None = None,
        *,
        on_end: Callable[[AttemptReport], None] = lambda report: None,
        on_pause: Callable[[str], None] = lambda reason: None,
        beat: Callable[[float], None] = lambda seconds: None,
        presence: Presence | None = None,
        now: Callable[[], datetime | None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._name = name
        self._on_end = on_end
        self._pause = StoragePause(outputs, on_pause, monotonic)
        self._beat = beat
        self._store = store
        self._engine = engine
        self._outputs = outputs
        self._limits = limits or WorkerLimits()
        self._now = now
        self._monotonic = monotonic
        self._wait = self._with_beat(wait)
        self._interrupted: dict[str, Attempt] | None = None
        self._write_thread = ThreadPoolExecutor(1, "writes-images")
        self._prefetcher = AdapterPrefetcher(engine.adapters)
        self._presence = presence
        self._hold_s = 0.0
        self._device_kind = engine.device_kind

    def run_next(self) -> Job | None:
        """Claim the next job and others that can share its batch, run them and store the results.

        A `FideloraError` is stored as the failure of its job. After any other error (a bug, a
        broken device), the job is retried until it has no attempts left. If images cannot be
        written, the job returns to the queue, and the worker pauses until they can. In all cases,
        the worker can be called again. Files of a job that did not succeed are removed.

        Returns:
            the first of these jobs as it is stored afterwards (another worker may already have
            claimed it again); None if the queue is empty or the worker pauses.

        Raises:
            JobStoreError: the store failed for a long time. The next call returns the jobs of this
                worker to the queue.
        """
        self._beat(self._limits.lease_s)
        try:
            self._release_interrupted()
            return self._run_next() if self._pause.is_over() else None
        except JobStoreError:
            self._interrupted = self._interrupted or {}
            raise

    def _run_next(self) -> Job | None:
        loaded, merged = self._engine.adapters.loaded(), self._engine.merged()
        began = time.perf_counter()
        job = self._store.claim(
            self._name,
            self._now(),
            self._claim_lease_s,
            loaded,
            merged=merged,
            hold_s=self._hold_s,
            device_kind=self._device_kind,
        )
        claim_s: float | None = time.perf_counter() - began
        if self._presence is not None:
            self._presence.update(loaded, merged, self._engine.models(), is_idle=job is None)
        if job is None:
            return None
        attempts = [self._begin(job)]
        try:
            with self._engine.adapters.pinned(adapters_of(job)):  # the same for the whole batch
                with self._ending_on_error(attempts[0]):
                    self._claim_for_batch(attempts)
                if len(attempts) > 1:
                    self._make(attempts)
                for index, attempt in enumerate(attempts):
                    if attempt.running:
                        attempt.restart_timeout()
                        self._make([attempt], others=attempts[index + 1 :])
        except Exception:
            # The store cannot record results.
            self._interrupted = {attempt.job.id: attempt for attempt in attempts}
            raise
        except BaseException:
            # The process is stopping. Release the jobs, so that this attempt does not count.
            for attempt in attempts:
                self._release(attempt)
            raise
        finally:
            self._prefetcher.cancel()
            for attempt in attempts:
                if attempt.ended_job is not None:
                    self._update_hold_time(report := attempt.report(loaded, claim_s))
                    self._on_end(report)
                claim_s = None
        return attempts[0].ended_job or self._store.get(job.id)

    def _update_hold_time(self, report: AttemptReport) -> None:
        """Set how long a job is left for another worker that has its adapters loaded.

        The time is what this worker took to read the adapters of the last job for which it had to
        read some, at most `MAX_HOLD_S`.
        """
        if report.adapters_cold and (read_s := report.timings.get("read")):
            self._hold_s = min(read_s, MAX_HOLD_S)

    def _release_interrupted(self) -> None:
        """Return the jobs in this worker's name to the queue, after the store failed.

        They include a job whose claim was stored, but not confirmed, because the connection broke.

        Raises:
            JobStoreError: the store still fails.
        """
        if self._interrupted is None:
            return
        for job in self._store.running(self._name):
            if job.worker == self._name:
                attempt = self._interrupted.get(job.id)
                if attempt is not None:
                    attempt.files.stop()
                with suppress(LeaseLostError):
                    self._store.release(job.id, job.epoch, self._now())
                    if attempt is not None:
                        attempt.files.remove()
        self._interrupted = None

    def _with_beat(self, wait: Callable[[float], None]) -> Callable[[float], None]:
        """Return a function that reports that the worker is alive, and then calls `wait`."""

        def beat_and_wait(seconds: float) -> None:
            self._beat(self._limits.lease_s + seconds)
            wait(seconds)

        return beat_and_wait

    @property
    def _claim_lease_s(self) -> float:
        """Lease of a new claim in seconds; includes the time that a batch waits for jobs."""
        return self._limits.lease_s + self._limits.batch_wait_s

    def _begin(self, job: Job) -> Attempt:
        log.info("job begins, attempt %d", job.attempts, extra={"request_id": job.id})
        files = ImageFiles(job, self._outputs, self._write_thread)
        return Attempt(
            job, files, self._store, self._limits, self._now, self._monotonic, self._wait
        )

    def _claim_for_batch(self, attempts: list[Attempt]) -> None:
        """Claim jobs that can share the first job's batch, as long as the batch has room."""
        first = attempts[0].job
        recipe = first.recipes[0]
        # A retried job may crash the process, which would cost the others an attempt.
        if first.attempts > 1 or not all_may_share_batch(recipe, first):
            return
        room = self._engine.max_batch(recipe) - len(first.recipes)
        deadline = self._monotonic() + self._limits.batch_wait_s
        while room > 0:
            job = self._store.claim(
                self._name,
                self._now(),
                self._claim_lease_s,
                matches=partial(fits_batch, recipe, room),
                device_kind=self._device_kind,
            )
            if job is not None:
                attempts.append(self._begin(job))
                room -= len(job.recipes)
            elif (left_s := deadline - self._monotonic()) > 0:
                self._wait(min(left_s, _CLAIM_INTERVAL_S))
            else:
                return

    def _make(self, attempts: Sequence[Attempt], others: Sequence[Attempt] = ()) -> None:
        """Make the images of these jobs and store the result of each job.

        If a batch of several jobs fails, any of them may be the cause. No job is ended then, and
        the caller has to run each one separately.

        Args:
            others: claimed jobs that wait meanwhile; their leases are renewed.

        Raises:
            JobStoreError: a result could not be stored.
        """
        try:
            for batch in self._batches(attempts, others):
                self._make_batch(batch)
            for attempt in attempts:
                if attempt.running:
                    with self._ending_on_error(attempt):
                        self._succeed(attempt)
        except BatchEndedEarly:
            return
        except JobStoreError:
            raise
        except Exception as error:
            if len(attempts) == 1:
                self._end(attempts[0], error)
            else:
                log.warning(
                    "a batch of %d jobs failed: %s; running each job separately",
                    len(attempts),
                    error,
                    exc_info=error,
                )

    def _batches(self, attempts: Sequence[Attempt], others: Sequence[Attempt]) -> Iterator[Batch]:
        """Yield several jobs as one batch, or one job in as many batches as its images need."""
        if len(attempts) == 1:
            for parts in parts_in_turn(attempts[0], self._engine.max_batch):
                yield self._batch(parts, others)
        else:
            yield self._batch(parts_side_by_side(attempts), others)

    def _batch(self, parts: Sequence[BatchPart], others: Sequence[Attempt]) -> Batch:
        return Batch(
            parts,
            others,
            self._ending_on_error,
            StepAllowance(self._limits),
            self._beat,
            self._monotonic,
        )

    def _make_batch(self, batch: Batch) -> None:
        """Make the images of one batch and queue them for writing.

        Raises:
            BatchEndedEarly: all jobs of the batch have ended.
        """
        recipes = batch.recipes
        batch.renew(self._limits.load_s)
        with beating(self._beat, self._limits.lease_s, self._limits.load_s):
            batch.add_timings(self._engine.load(recipes[0]))
        batch.before_first_step()
        self._prefetch_next_job()
        if len(recipes) == 1:
            images = [self._engine.generate(recipes[0], batch.on_step)]
        else:
            images = self._engine.generate_batch(recipes, batch.on_step)
        batch.write(images)

    @contextmanager
    def _ending_on_error(self, attempt: Attempt) -> Iterator[None]:
        """End the job if the block raises an error.

        Raises:
            JobStoreError: the end of the job could not be stored.
        """
        try:
            yield
        except JobStoreError:
            raise
        except Exception as error:  # noqa: BLE001  # stored as the end of the job
            self._end(attempt, error)

    def _succeed(self, attempt: Attempt) -> None:
        job = attempt.job
        outputs = attempt.files.outputs()
        ended = retry_while_store_fails(
            lambda: self._store.succeed(job.id, job.epoch, outputs, attempt.timings, self._now()),
            self._wait,
        )
        self._record_end(attempt, ended)

    def _end(self, attempt: Attempt, error: Exception) -> None:
        """End a job with this error, and remove its files.

        Raises:
            JobStoreError: the end of the job could not be stored.
        """
        job = attempt.job
        attempt.files.stop()
        if not isinstance(error, FideloraError):
            log.error(
                "attempt %d ended with an unexpected error",
                job.attempts,
                extra={"request_id": job.id},
                exc_info=error,
            )
        try:
            if isinstance(error, LeaseLostError):
                raise error
            ended = retry_while_store_fails(lambda: self._store_error(job, error), self._wait)
        except LeaseLostError:
            log.warning("the job belongs to another worker now", extra={"request_id": job.id})
            attempt.running = False
            return
        # If another worker has the job by now, its files have the same names. So remove the files
        # only after the store has confirmed the lease.
        attempt.files.remove()
        self._record_end(attempt, ended)

    def _store_error(self, job: Job, error: Exception) -> Job:
        """Store the end of an attempt: as canceled, failed, released or abandoned."""
        if isinstance(error, StorageError):  # the job is not the cause
            self._pause.begin(error)
            return self._store.release(job.id, job.epoch, self._now())
        if isinstance(error, GenerationCancelled):
            return self._store.stop(job.id, job.epoch, self._now())
        if isinstance(error, FideloraError):
            failure = Failure(error_code(error), str(error))
            return self._store.fail(job.id, job.epoch, failure, self._now())
        reason = f"of an unexpected {type(error).__name__}: {error}"
        return self._store.abandon(job.id, job.epoch, reason, self._now())

    def _record_end(self, attempt: Attempt, ended: Job) -> None:
        attempt.running, attempt.ended_job = False, ended
        extra = {"request_id": ended.id}
        if ended.status is Status.FAILED and ended.error:
            log.warning("job failed: %s: %s", ended.error.code, ended.error.message, extra=extra)
        else:
            log.info("job ends: %s", ended.status, extra=extra)

    def _release(self, attempt: Attempt) -> None:
        """Return a job to the queue without counting the attempt, unless the job has ended."""
        attempt.files.stop()
        try:
            self._store.release(attempt.job.id, attempt.job.epoch, self._now())
        except (LeaseLostError, JobStoreError):
            return  # the job has ended or has another worker; otherwise its lease will expire
        attempt.files.remove()

    def _prefetch_next_job(self) -> None:
        self._prefetcher.cancel()
        with suppress(JobStoreError):
            if (job := self._store.peek()) is not None:
                self._prefetcher.start(job)
