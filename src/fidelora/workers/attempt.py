"""What a worker knows of each job that it has: mostly of one, of several if they share a batch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fidelora.atomic import write_atomically
from fidelora.errors import FideloraError, GenerationCancelled
from fidelora.images.write import GeneratedImage, preview_jpeg, suffix_of
from fidelora.jobs.job import Job, JobProgress, Output
from fidelora.jobs.store import JobStore
from fidelora.recipe import Recipe, may_share_batch

if TYPE_CHECKING:  # a server watches workers and needs no torch for that
    from fidelora.engine.engine import Progress
    from fidelora.workers.worker import WorkerLimits


class TimeIsUpError(FideloraError):
    """The job took longer than it may."""


@dataclass(frozen=True)
class Part:
    """The images of one job in a batch.

    Attributes:
        recipes: of these images.
        first: the number of the first of them in the job.
        place: of the first of them in the batch.
    """

    attempt: Attempt
    recipes: Sequence[Recipe]
    first: int = 0
    place: int = 0


class Attempt:
    """One attempt at one job: what it has to look for at every step.

    Attributes:
        job: as it was claimed.
        files: of its images.
        timings: seconds by part, see `Job.timings`.
        going: whether the job has not come to an end yet, and is this worker's as far as it knows.
        after: the job as it was at its end; None before that, and if it belongs to another worker.
    """

    def __init__(
        self,
        job: Job,
        files: ImageFiles,
        store: JobStore,
        limits: WorkerLimits,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self.job = job
        self.files = files
        self.timings: dict[str, float] = {}
        self.going = True
        self.after: Job | None = None
        self._store = store
        self._limits = limits
        self._now = now
        self._monotonic = monotonic
        self._start = self._reported = monotonic()
        self._progress: JobProgress | None = None

    def begin(self) -> None:
        """The time that the job may take begins now, after it waited for others or was made with them in vain."""
        self._start = self._monotonic()

    def step(self, part: Part, progress: Progress) -> None:
        """A step of the batch is done in which the job has `part`.

        Images of a batch are made side by side, and counted as if they were made one after the other.

        Raises:
            GenerationCancelled, TimeIsUpError, LeaseLostError: the job leaves the batch.
            OutputError: an image that was made before could not be written.
        """
        images, in_batch, steps = len(self.job.recipes), len(part.recipes), progress.steps
        image, step = divmod(in_batch * progress.step, steps)
        if image == in_batch:
            image, step = (
                in_batch - 1,
                steps,
            )  # the end of the last one, not the beginning of another
        done = part.first + image + step / steps
        seconds = self._monotonic() - self._start
        eta_s = seconds / done * (images - done)
        self._progress = JobProgress(part.first + image, images, step, steps, eta_s)
        if seconds > self._limits.timeout_s:
            raise TimeIsUpError(
                f"The job was stopped after {seconds:.0f} seconds; {self._limits.timeout_s:g} are allowed."
            )
        self.files.check()
        self.look(lambda: base64.b64encode(preview_jpeg(progress.preview(part.place))).decode())

    def look(self, preview: Callable[[], str] | None = None) -> None:
        """See whether somebody wants the job to stop, and report if it is time to, with a new picture if there is one.

        Raises:
            GenerationCancelled: somebody does.
            LeaseLostError: another worker has the job.
        """
        if self._store.get(self.job.id).cancel_requested:
            raise GenerationCancelled
        if self._monotonic() - self._reported >= self._limits.report_every_s:
            if self._progress is not None and preview is not None:
                self._progress = replace(self._progress, preview=preview())
            self.report()

    def report(self, lease_s: float | None = None) -> None:
        """Renew the lease, for the usual time if none is given, and write progress down.

        Raises:
            LeaseLostError: another worker has the job.
        """
        self._store.renew(
            self.job.id,
            self.job.epoch,
            self._progress,
            self._now(),
            lease_s or self._limits.lease_s,
        )
        self._reported = self._monotonic()

    def take(self, part: Part, images: Sequence[GeneratedImage]) -> None:
        """A batch is done: have the job's own images written.

        Raises:
            LeaseLostError: another worker has the job.
        """
        own = images[part.place : part.place + len(part.recipes)]
        self.spend(own[0].seconds, len(own) / len(images))
        self.report()  # not to write over the files of a worker that has the job now
        for index, image in enumerate(own, part.first):
            self.files.write(index, image)

    def spend(self, seconds: Mapping[str, float], share: float) -> None:
        """Add a share of what a batch took, by part, to the job's own: a batch has one clock, and its images equal shares."""
        for part, spent in seconds.items():
            self.timings[part] = self.timings.get(part, 0.0) + spent * share


class ImageFiles:
    """The files of one job's images, encoded and written on another thread while the next image is made.

    Args:
        folder: where they are called `{job}_output_{index}` with the ending of their format.
        thread: with one thread, so that files are written in order.
    """

    def __init__(self, job: Job, folder: Path, thread: Executor) -> None:
        self._job = job
        self._folder = folder
        self._thread = thread
        self._writing: dict[Path, Future[Output]] = {}

    def write(self, index: int, image: GeneratedImage) -> None:
        """Have an image written soon."""
        path = self._folder / f"{self._job.id}_output_{index}{suffix_of(self._job.image_format)}"  # type: ignore[arg-type]
        self._writing[path] = self._thread.submit(_write, path, image, self._job)

    def check(self) -> None:
        """Raise what went wrong with a file, if anything did so far."""
        for one in self._writing.values():
            if one.done():
                one.result()

    def outputs(self) -> list[Output]:
        """All files, once they are written.

        Raises:
            OutputError: one could not be.
        """
        return [one.result() for one in self._writing.values()]

    def stop(self) -> None:
        """Write none any more; returns when none is being written."""
        for one in self._writing.values():
            one.cancel()
        wait(self._writing.values())

    def remove(self) -> None:
        for path in self._writing:
            path.unlink(missing_ok=True)


def batches(recipes: Sequence[Recipe], most: Callable[[Recipe], int]) -> Iterator[slice]:
    """Which recipes, one after the other, go through the model together; `most` says how many like one may."""
    start = 0
    while start < len(recipes):
        first, end = recipes[start], start + 1
        while end < len(recipes) and may_share_batch(first, recipes[end]):
            end += 1
        if end > start + 1:
            end = min(end, start + max(1, most(first)))
        yield slice(start, end)
        start = end


def _write(path: Path, image: GeneratedImage, job: Job) -> Output:
    content = image.encode(job.image_format, job.image_quality)  # type: ignore[arg-type]  # `encode` checks it
    write_atomically(path, content)
    height, width = image.pixels.shape[:2]
    sha256 = hashlib.sha256(content).hexdigest()
    return Output(
        str(path), job.image_format, width, height, image.recipe.seed, sha256, len(content)
    )
