"""A batch of images that are denoised together, from one job or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import TYPE_CHECKING

from fidelora.errors import GenerationCancelled
from fidelora.images.write import GeneratedImage
from fidelora.jobs.job import Job
from fidelora.recipe import Recipe, may_share_batch
from fidelora.workers.attempt import Attempt, BatchPart, StepAllowance

if TYPE_CHECKING:  # the server imports this module and must not load torch
    from fidelora.engine.engine import Progress


class BatchEndedEarly(GenerationCancelled):
    """All jobs of the batch ended before its images were finished."""


class Batch:
    """Images that are denoised together, and the jobs that wait meanwhile.

    An error that concerns one job ends that job; the batch continues for the other jobs. Each
    method except `add_timings` raises `BatchEndedEarly` once all jobs of the batch have ended.

    Args:
        parts: images of the batch by job, in the batch's order.
        others: further jobs that the worker has claimed; only their leases are renewed.
        ending_on_error: context manager that ends the given job if its block raises an error.
        allowance: seconds that steps may take.
        beat: reports that the worker is alive, and the seconds until it has to report again.
        monotonic: clock.
    """

    def __init__(
        self,
        parts: Sequence[BatchPart],
        others: Sequence[Attempt],
        ending_on_error: Callable[[Attempt], AbstractContextManager[None]],
        allowance: StepAllowance,
        beat: Callable[[float], None],
        monotonic: Callable[[], float],
    ) -> None:
        self.recipes = [recipe for part in parts for recipe in part.recipes]
        self._parts = parts
        self._others = others
        self._ending_on_error = ending_on_error
        self._allowance = allowance
        self._beat = beat
        self._monotonic = monotonic
        self._last_step = monotonic()

    def before_first_step(self) -> None:
        """Renew the leases of all jobs for the time that the first step may take."""
        self.renew(self._allowance.longest_s)
        self._last_step = self._monotonic()

    def renew(self, lease_s: float) -> None:
        """Renew the leases of all jobs.

        The leases may be longer than the allowance for the first step, but the worker has to
        report that it is alive within this allowance.
        """
        self._beat(self._allowance.longest_s)
        for attempt in [*(part.attempt for part in self._parts), *self._others]:
            if attempt.running:
                with self._ending_on_error(attempt):
                    attempt.heartbeat(lease_s)
        self._raise_if_ended()

    def on_step(self, progress: Progress) -> None:
        """Record a step for the jobs of the batch, and poll the store for the other jobs."""
        now = self._monotonic()
        lease_s = self._allowance.after_step(
            now - self._last_step, is_last=progress.step == progress.steps
        )
        self._last_step = now
        self._beat(lease_s)
        for part in self._running_parts():
            with self._ending_on_error(part.attempt):
                part.attempt.on_step(part, progress, lease_s)
        for attempt in self._others:
            if attempt.running:
                with self._ending_on_error(attempt):
                    attempt.poll(lease_s)
        self._raise_if_ended()

    def write(self, images: Sequence[GeneratedImage]) -> None:
        """Queue the finished images for writing, each to the files of its job."""
        for part in self._running_parts():
            with self._ending_on_error(part.attempt):
                part.attempt.write(part, images)
        self._raise_if_ended()

    def add_timings(self, seconds: Mapping[str, float]) -> None:
        """Divide time spent on the whole batch among its jobs, by their number of images."""
        for part in self._parts:
            part.attempt.add_timings(seconds, len(part.recipes) / len(self.recipes))

    def _running_parts(self) -> Iterator[BatchPart]:
        return (part for part in self._parts if part.attempt.running)

    def _raise_if_ended(self) -> None:
        if not any(part.attempt.running for part in self._parts):
            raise BatchEndedEarly


def parts_in_turn(
    attempt: Attempt, max_batch: Callable[[Recipe], int]
) -> Iterator[Sequence[BatchPart]]:
    """Yield the images of one job batch by batch; see `batch_slices`."""
    recipes = attempt.job.recipes
    for images in batch_slices(recipes, max_batch):
        yield [BatchPart(attempt, recipes[images], first_image=images.start)]


def parts_side_by_side(attempts: Sequence[Attempt]) -> Sequence[BatchPart]:
    """Return all images of several jobs as one batch."""
    offsets = accumulate((len(attempt.job.recipes) for attempt in attempts), initial=0)
    return [
        BatchPart(attempt, attempt.job.recipes, offset=offset)
        for attempt, offset in zip(attempts, offsets, strict=False)
    ]


def batch_slices(recipes: Sequence[Recipe], max_batch: Callable[[Recipe], int]) -> Iterator[slice]:
    """Yield the slices of `recipes` that are denoised together.

    Args:
        max_batch: returns the maximum batch size for recipes like the given one. Called only where
            neighbouring recipes may share a batch.
    """
    start = 0
    while start < len(recipes):
        first, end = recipes[start], start + 1
        while end < len(recipes) and may_share_batch(first, recipes[end]):
            end += 1
        if end > start + 1:
            end = min(end, start + max(1, max_batch(first)))
        yield slice(start, end)
        start = end


def all_may_share_batch(recipe: Recipe, job: Job) -> bool:
    """True if every image of a job can be denoised together with an image of `recipe`."""
    return all(may_share_batch(recipe, other) for other in job.recipes)


def fits_batch(recipe: Recipe, room: int, job: Job) -> bool:
    """True if a queued job can join a batch with `recipe` and room for `room` more images.

    A retried job does not fit: it may be one that crashes the process.
    """
    return job.attempts == 0 and len(job.recipes) <= room and all_may_share_batch(recipe, job)
