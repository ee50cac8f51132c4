"""One worker: takes jobs from a store, one at a time or several that share a batch, and makes their images with one engine."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from fidelora.errors import FideloraError, GenerationCancelled, JobStoreError, LeaseLostError
from fidelora.jobs.job import Failure, Job, Status
from fidelora.jobs.store import JobStore
from fidelora.recipe import AdapterRef, Recipe, may_share_batch
from fidelora.workers.attempt import Attempt, ImageFiles, Part, TimeIsUpError, batches

if TYPE_CHECKING:  # a server watches workers and needs no torch for that
    from fidelora.engine.engine import Engine, Progress

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.05
"""How often a worker that waits for company looks for it."""


class _NobodyLeft(GenerationCancelled):
    """Every job of the batch has come to its end before the batch did."""


@dataclass(frozen=True)
class WorkerLimits:
    """Times of a worker, in seconds.

    Attributes:
        lease_s: how long a claim lasts without a report.
        load_s: how long a base model may take to be found, downloaded and loaded, when no step can report.
        report_every_s: how often progress is written down at most; wishes to cancel are looked for at every step.
        timeout_s: how long one attempt at a job may take; then the work stops and the job has failed.
        batch_wait_s: how long a job whose batch has room waits for others that can share it; those that are queued already come
            along in any case.
    """

    lease_s: float = 60.0
    load_s: float = 1800.0
    report_every_s: float = 0.5
    timeout_s: float = 600.0
    batch_wait_s: float = 0.0


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
    """Makes the images of one job after the other, and of several at once if they can share a batch.

    Args:
        name: told in the job while it runs.
        outputs: the folder for images, which are called `{job}_output_{index}` with the ending of their format.
        on_end: called after each attempt.
        now, monotonic: the clocks; tests have their own.
        wait: lets this many seconds pass.
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
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._name = name
        self._on_end = on_end
        self._store = store
        self._engine = engine
        self._outputs = outputs
        self._limits = limits or WorkerLimits()
        self._now = now
        self._monotonic = monotonic
        self._wait = wait
        self._writer = ThreadPoolExecutor(1, "writes-images")
        self._reader = ThreadPoolExecutor(1, "reads-adapters")
        self._reading: list[Future[None]] = []

    def run_next(self) -> Job | None:
        """Take the next job, and others that can share its batch, and bring each to an end; None if there is none.

        Whatever goes wrong with a job becomes its failure, and the worker is fit for the next one. What is no error of ours
        (a fault in the code, a broken device) costs the job an attempt. Files of a job that did not succeed are removed.

        Returns:
            the first of these jobs as it is afterwards; it may belong to another worker by then.
        """
        loaded = self._engine.adapters.loaded()
        job = self._store.claim(
            self._name, self._now(), self._lease_s, loaded, merged=self._engine.merged()
        )
        if job is None:
            return None
        attempts = [self._begin(job)]
        try:
            with self._engine.adapters.pinned(
                _adapters(job)
            ):  # whoever shares its batch needs the same ones
                with self._blaming(attempts[:1]):
                    self._find_company(attempts)
                if len(attempts) > 1:
                    self._make(attempts, attempts)
                for attempt in attempts:
                    if attempt.going:
                        attempt.begin()
                        self._make([attempt], attempts)
        except Exception:
            raise  # of the store: nothing can be said about the jobs, and their leases will run out
        except (
            BaseException
        ):  # the process is told to stop: somebody else may have the jobs, and no attempt is lost
            for attempt in attempts:
                self._give_back(attempt)
            raise
        finally:
            self._stop_reading_ahead()
            for attempt in attempts:
                if attempt.after is not None:
                    self._on_end(_report(attempt, loaded))
        return attempts[0].after or self._store.get(job.id)

    @property
    def _lease_s(self) -> float:
        """Of a new claim, which may have to last while the worker waits for company."""
        return self._limits.lease_s + self._limits.batch_wait_s

    def _begin(self, job: Job) -> Attempt:
        log.info("job begins, attempt %d", job.attempts, extra={"request_id": job.id})
        files = ImageFiles(job, self._outputs, self._writer)
        return Attempt(job, files, self._store, self._limits, self._now, self._monotonic)

    def _find_company(self, attempts: list[Attempt]) -> None:
        """Claim jobs whose images can go through the model together with those of the first, as long as there is room."""
        first = attempts[0].job
        recipe = first.recipes[0]
        # A job that was tried before may be one that ends the process: it shall not cost others an attempt.
        if first.attempts > 1 or not _may_share_batch(recipe, first):
            return
        room = self._engine.max_batch(recipe) - len(first.recipes)
        latest = self._monotonic() + self._limits.batch_wait_s
        while room > 0:
            job = self._store.claim(
                self._name, self._now(), self._lease_s, wanted=partial(_fits, recipe, room)
            )
            if job is not None:
                attempts.append(self._begin(job))
                room -= len(job.recipes)
            elif (left_s := latest - self._monotonic()) > 0:
                self._wait(min(left_s, _LOOK_AGAIN_S))
            else:
                return

    def _make(self, making: Sequence[Attempt], attempts: Sequence[Attempt]) -> None:
        """Make the images of these jobs and bring each to its end; several that fail together do not end.

        Args:
            attempts: at all jobs that the worker has; those that wait keep their claims meanwhile.
        """
        with self._blaming(making):
            for parts in self._batches(making):
                self._make_batch(parts, attempts)
            for attempt in making:
                if attempt.going:
                    with self._blaming([attempt]):
                        self._succeed(attempt)

    @contextmanager
    def _blaming(self, attempts: Sequence[Attempt]) -> Iterator[None]:
        """Whatever goes wrong in the block ends the one job that is to blame; it is not known which of several that would be.

        Raises:
            JobStoreError: what happened cannot be written down.
        """
        try:
            yield
        except _NobodyLeft:
            return
        except JobStoreError:
            raise
        except Exception as error:
            if len(attempts) == 1:
                self._end(attempts[0], error)
            else:
                log.warning(
                    "a batch of %d jobs failed: %s; each is made by itself now",
                    len(attempts),
                    error,
                    exc_info=error,
                )

    def _batches(self, making: Sequence[Attempt]) -> Iterator[Sequence[Part]]:
        """What goes through the model together: several jobs at once, or the images of one in turns."""
        if len(making) == 1:
            (attempt,) = making
            for images in batches(attempt.job.recipes, self._engine.max_batch):
                yield [Part(attempt, attempt.job.recipes[images], images.start)]
        else:
            places = accumulate((len(attempt.job.recipes) for attempt in making), initial=0)
            yield [
                Part(attempt, attempt.job.recipes, place=place)
                for attempt, place in zip(making, places, strict=False)
            ]

    def _make_batch(self, parts: Sequence[Part], attempts: Sequence[Attempt]) -> None:
        """Make the images of one batch, and have them written.

        Raises:
            _NobodyLeft: none of the jobs wants them any more.
        """
        part_of = {part.attempt: part for part in parts}
        recipes = [recipe for part in parts for recipe in part.recipes]

        def each(what: Callable[[Attempt], None]) -> None:
            for attempt in attempts:
                if attempt.going:
                    with self._blaming([attempt]):  # and the others go on
                        what(attempt)
            if not any(attempt.going for attempt in part_of):
                raise _NobodyLeft

        def step_is_done(progress: Progress) -> None:
            each(
                lambda attempt: (
                    attempt.step(part_of[attempt], progress)
                    if attempt in part_of
                    else attempt.look()
                )
            )

        def take(attempt: Attempt) -> None:
            if attempt in part_of:
                attempt.take(part_of[attempt], images)

        each(lambda attempt: attempt.report(self._limits.load_s))
        start = self._monotonic()
        self._engine.load(recipes[0])
        load_s = self._monotonic() - start
        for part in parts:
            part.attempt.spend({"load": load_s}, len(part.recipes) / len(recipes))
        each(Attempt.report)
        self._read_ahead()
        if len(recipes) == 1:
            images = [self._engine.generate(recipes[0], step_is_done)]
        else:
            images = self._engine.generate_batch(recipes, step_is_done)
        each(take)

    def _succeed(self, attempt: Attempt) -> None:
        job = attempt.job
        outputs = attempt.files.outputs()
        self._has_ended(
            attempt, self._store.succeed(job.id, job.epoch, outputs, attempt.timings, self._now())
        )

    def _end(self, attempt: Attempt, error: Exception) -> None:
        """Bring a job to the end that this error means.

        Raises:
            JobStoreError: it cannot be written down.
        """
        job = attempt.job
        attempt.files.stop()
        try:
            if isinstance(error, LeaseLostError):
                raise error
            after = self._say(job, error)
        except LeaseLostError:
            log.warning("the job belongs to another worker now", extra={"request_id": job.id})
            attempt.going = False
            return
        # Only now, when the store has said that the job was still ours: another worker's files have the same names.
        attempt.files.remove()
        self._has_ended(attempt, after)

    def _say(self, job: Job, error: Exception) -> Job:
        if isinstance(error, GenerationCancelled):
            return self._store.stop(job.id, job.epoch, self._now())
        if isinstance(error, FideloraError):
            return self._store.fail(
                job.id, job.epoch, Failure(error_code(error), str(error)), self._now()
            )
        log.error(
            "attempt %d came to an unexpected end",
            job.attempts,
            extra={"request_id": job.id},
            exc_info=error,
        )
        reason = f"of an unexpected {type(error).__name__}: {error}"
        return self._store.abandon(job.id, job.epoch, reason, self._now())

    def _has_ended(self, attempt: Attempt, after: Job) -> None:
        attempt.going, attempt.after = False, after
        about = {"request_id": after.id}
        if after.status is Status.FAILED and after.error:
            log.warning("job failed: %s: %s", after.error.code, after.error.message, extra=about)
        else:
            log.info("job ends: %s", after.status, extra=about)

    def _give_back(self, attempt: Attempt) -> None:
        """Release a job, unless it has come to an end."""
        attempt.files.stop()
        try:
            self._store.release(attempt.job.id, attempt.job.epoch, self._now())
        except (LeaseLostError, JobStoreError):
            return  # it has, or is another worker's; or its lease will run out
        attempt.files.remove()

    def _read_ahead(self) -> None:
        """Have the adapters of the next job read while this one runs."""
        self._stop_reading_ahead()
        job = self._store.peek()
        if job is not None:
            self._reading = [self._reader.submit(self._prefetch, ref) for ref in _adapters(job)]

    def _stop_reading_ahead(self) -> None:
        for one in self._reading:
            one.cancel()

    def _prefetch(self, ref: AdapterRef) -> None:
        try:
            self._engine.adapters.prefetch(ref)
        except Exception:  # nobody waits for it; whoever needs the adapter will read it himself
            log.exception("the adapter %s could not be read ahead", ref.sha256)


def _adapters(job: Job) -> Sequence[AdapterRef]:
    """Every adapter of a job once."""
    return list({ref.sha256: ref for recipe in job.recipes for ref in recipe.adapters}.values())


def _may_share_batch(recipe: Recipe, job: Job) -> bool:
    return all(may_share_batch(recipe, other) for other in job.recipes)


def _fits(recipe: Recipe, room: int, job: Job) -> bool:
    """Whether a job that was not tried before can share a batch with `recipe` that has so much room left."""
    return job.attempts == 0 and len(job.recipes) <= room and _may_share_batch(recipe, job)


def error_code(error: FideloraError) -> str:
    """The code of an error for programs: `AdapterMismatchError` is `ADAPTER_MISMATCH`, a job out of time `TIMEOUT`."""
    if isinstance(error, TimeIsUpError):
        return "TIMEOUT"
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__.removesuffix("Error"))
    return "_".join(words).upper()


def _report(attempt: Attempt, loaded: frozenset[str]) -> AttemptReport:
    job, after = attempt.job, attempt.after
    assert after is not None, "it has ended"
    assert job.started_at is not None, "it was claimed"
    return AttemptReport(
        job_id=job.id,
        status=after.status.value,
        code=after.error.code if after.error else "",
        wait_s=(job.started_at - job.created_at).total_seconds() if job.attempts == 1 else None,
        images=len(after.outputs),
        steps=sum(recipe.steps for recipe in job.recipes) if after.outputs else 0,
        timings=dict(attempt.timings),
        adapters_warm=len(job.adapters & loaded),
        adapters_cold=len(job.adapters - loaded),
    )
