"""Shared by the tests of the worker: clocks, a recording store, a fake engine and a slow disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tests.support import TINY_BASE

from fidelora import Recipe
from fidelora.adapters.library import AdapterLibrary
from fidelora.engine.engine import OnStep, Progress
from fidelora.families import get_family
from fidelora.images.write import GeneratedImage
from fidelora.jobs.job import Job, JobProgress, Status, new_job
from fidelora.jobs.memory import MemoryStore
from fidelora.recipe import may_share_batch
from fidelora.storage.images import FolderImages
from fidelora.weights.content import ContentHashes
from fidelora.weights.files import BaseFiles
from fidelora.workers.attempt import AttemptReport, WorkerLimits
from fidelora.workers.worker import Worker

RECIPE = Recipe(
    prompt="a ball",
    base_model=str(TINY_BASE),
    base_sha256=ContentHashes().sha256_of(BaseFiles.find(get_family("sd15"), str(TINY_BASE))),
    width=64,
    height=64,
    steps=4,
)
FAST = replace(RECIPE, fidelity="fast")
DEADLINE_S = 60.0  # reached only by a test that fails


class Clock:
    """A clock that advances by one second at every read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 1
        return self.seconds

    def now(self) -> datetime:
        return datetime(2026, 11, 22, 12, tzinfo=UTC) + timedelta(seconds=self.monotonic())


class Recorder(MemoryStore):
    """A store that records heartbeats and calls hooks.

    Attributes:
        reports: image, images, step, steps and eta_s of every heartbeat with progress.
        progress: progress of these heartbeats, by job.
        gets: number of calls of `get`.
        at_get: called with the job's id at the call of `get` with this number, from 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[tuple[int, int, int, int, float]] = []
        self.progress: dict[str, list[JobProgress]] = {}
        self.gets = 0
        self.at_get: dict[int, Callable[[str], Any]] = {}

    def get(self, job_id: str) -> Job:
        self.gets += 1
        if self.gets in self.at_get:
            self.at_get[self.gets](job_id)
        return super().get(job_id)

    def renew(self, job_id, epoch, progress, now, lease_s):
        job = super().renew(job_id, epoch, progress, now, lease_s)
        if progress:
            self.reports.append(
                (progress.image, progress.images, progress.step, progress.steps, progress.eta_s)
            )
            self.progress.setdefault(job_id, []).append(progress)
        return job


def add(store: MemoryStore, clock: Clock, *recipes: Recipe, image_format: str = "png") -> Job:
    return store.add(new_job(recipes or (RECIPE,), clock.now(), image_format=image_format))


def claimed_by_another(store: MemoryStore, clock: Clock, job_id: str) -> None:
    """End a job's first attempt as if its worker had died, and claim the job for another."""
    store.abandon(job_id, 1, "it seemed dead", clock.now())
    clock.seconds += 5  # the pause before a retry
    store.claim("another", clock.now(), 1000)


def wait_for_writes(worker: Worker) -> None:
    """Wait until all queued images are on the disk."""
    worker._write_thread.submit(lambda: None).result(DEADLINE_S)


def wait_for_prefetches(worker: Worker) -> None:
    """Wait until all queued prefetches have ended."""
    worker._prefetcher._thread.submit(lambda: None).result(DEADLINE_S)


class FakeEngine:
    """Makes black pictures, at most `most` in one batch.

    Attributes:
        batches: prompts of every batch that was started, joined by spaces.
        steps: number of steps made of each of these batches.
        before_step: called with the numbers of the batch and of the step, from 1.
        bad: errors by prompt; a batch with this prompt raises the error after its last step.
    """

    def __init__(self, most: int = 4, adapters: AdapterLibrary | None = None) -> None:
        self.adapters = adapters or AdapterLibrary()
        self.device_kind = "cpu"
        self.most = most
        self.batches: list[str] = []
        self.steps: list[int] = []
        self.before_step: Callable[[int, int], Any] = lambda batch, step: None
        self.bad: dict[str, BaseException] = {}
        self.load_seconds = {"load": 3.0, "read": 0.5, "adapters": 0.25}

    def merged(self) -> frozenset[str]:
        return frozenset()

    def models(self) -> tuple[str, ...]:
        return ("sd15",)

    def load(self, recipe: Recipe) -> dict[str, float]:
        for ref in recipe.adapters:
            self.adapters.get(ref)
        return dict(self.load_seconds)

    def max_batch(self, recipe: Recipe) -> int:
        assert recipe.fidelity == "fast", "the worker asked for the batch size of exact images"
        return self.most

    def generate(self, recipe: Recipe, on_step: OnStep) -> GeneratedImage:
        return self._make([recipe], on_step)[0]

    def generate_batch(self, recipes: Sequence[Recipe], on_step: OnStep) -> list[GeneratedImage]:
        assert 1 < len(recipes) <= self.most
        assert all(may_share_batch(recipes[0], recipe) for recipe in recipes)
        return self._make(recipes, on_step)

    def _make(self, recipes: Sequence[Recipe], on_step: OnStep) -> list[GeneratedImage]:
        self.batches.append(" ".join(recipe.prompt for recipe in recipes))
        self.steps.append(0)
        for step in range(1, recipes[0].steps + 1):
            self.before_step(len(self.batches), step)
            on_step(
                Progress(
                    step,
                    recipes[0].steps,
                    1.0,
                    lambda image=0: np.full((8, 8, 3), 20 * image, np.uint8),
                )
            )
            self.steps[-1] = step
        for recipe in recipes:
            if recipe.prompt in self.bad:
                raise self.bad[recipe.prompt]
        seconds = {
            "load": 0.0,
            "read": 0.0,
            "adapters": 0.0,
            "text": 4.0,
            "denoise": 12.0,
            "decode": 8.0,
        }
        pixels = np.zeros((recipes[0].height, recipes[0].width, 3), np.uint8)
        return [
            GeneratedImage(pixels, recipe, {"fidelora": "test"}, (), seconds) for recipe in recipes
        ]


class Harness:
    """A worker with a fake engine, and short names for what tests do with it.

    Attributes:
        reports: reports of ended attempts.
        waited: seconds of every wait for jobs that could join a batch.
        while_waiting: called during each of these waits.
    """

    def __init__(self, store: Recorder, clock: Clock, folder: Path) -> None:
        self.store, self.clock, self.folder = store, clock, folder
        self.engine = FakeEngine()
        self.limits = WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=1000)
        self.reports: list[AttemptReport] = []
        self.waited: list[float] = []
        self.while_waiting: Callable[[], Any] = lambda: None

    def worker(self) -> Worker:
        engine: Any = self.engine
        clocks: Any = {"now": self.clock.now, "monotonic": self.clock.monotonic, "wait": self._wait}
        return Worker(
            "worker",
            self.store,
            engine,
            FolderImages(self.folder),
            self.limits,
            on_end=self.reports.append,
            **clocks,
        )

    def run(self) -> Job | None:
        return self.worker().run_next()

    def add(self, prompts: str, common: Recipe = FAST) -> Job:
        """Add a job with one image per word of `prompts`."""
        recipes = [
            replace(common, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts.split())
        ]
        return add(self.store, self.clock, *recipes)

    def status(self, *jobs: Job) -> list[Status]:
        return [MemoryStore.get(self.store, job.id).status for job in jobs]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def files_of(self, *jobs: Job) -> list[str]:
        return sorted(
            f"{job.id}_output_{index}.png" for job in jobs for index in range(len(job.recipes))
        )

    def _wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.clock.seconds += seconds
        self.while_waiting()


class SlowDisk:
    """Replaces `write_atomically`: every write waits for `allowed`, then raises `error` if set.

    Attributes:
        started: set when a write has started.
        files: names of the files whose writes have started.
    """

    def __init__(self) -> None:
        self.allowed, self.started = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.files: list[str] = []

    def __call__(self, path: Path, content: bytes) -> None:
        self.files.append(path.name)
        self.started.set()
        assert self.allowed.wait(DEADLINE_S)
        if self.error:
            raise self.error
        path.write_bytes(content)
