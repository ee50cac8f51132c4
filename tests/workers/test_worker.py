"""A worker with a real engine on the tiny base: images, progress, cancelling, time, and everything that goes wrong."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import LOKR, LORA, LORA_CONV, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe, read_record
from fidelora.adapters.library import AdapterLibrary
from fidelora.atomic import write_atomically
from fidelora.engine.engine import OnStep, Progress
from fidelora.errors import (
    AdapterMismatchError,
    GenerationCancelled,
    JobStoreError,
    LeaseLostError,
    NumericsError,
    OutputError,
    PickleRefusedError,
    WeightsFileError,
)
from fidelora.images.write import GeneratedImage
from fidelora.jobs.job import MAX_ATTEMPTS, Failure, Job, JobProgress, Status, new_job
from fidelora.jobs.memory import MemoryStore
from fidelora.jobs.store import MAX_PASSED_OVER
from fidelora.recipe import may_share_batch
from fidelora.workers.attempt import ImageFiles
from fidelora.workers.attempt import AttemptReport, WorkerLimits
from fidelora.workers.worker import Worker, error_code

RECIPE = Recipe(prompt="a ball", base_model=str(TINY_BASE), width=64, height=64, steps=4)
FAST = replace(RECIPE, fidelity="fast")
DEADLINE_S = 60.0
"""That only a failure reaches."""


class Clock:
    """A clock that goes on by a second with every look, and by more when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 1
        return self.seconds

    def now(self) -> datetime:
        return datetime(2026, 11, 22, 12, tzinfo=UTC) + timedelta(seconds=self.monotonic())


class Recorder(MemoryStore):
    """A store that remembers every report, and does what it is told at a certain one."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[tuple[int, int, int, int, float]] = []
        self.progress: dict[str, list[JobProgress]] = {}
        self.looks = 0
        self.at_look: dict[int, Callable[[str], Any]] = {}

    def get(self, job_id: str) -> Job:
        self.looks += 1
        if self.looks in self.at_look:
            self.at_look[self.looks](job_id)
        return super().get(job_id)

    def renew(self, job_id, epoch, progress, now, lease_s):
        job = super().renew(job_id, epoch, progress, now, lease_s)
        if progress:
            self.reports.append(
                (progress.image, progress.images, progress.step, progress.steps, progress.eta_s)
            )
            self.progress.setdefault(job_id, []).append(progress)
        return job


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Recorder:
    return Recorder()


@pytest.fixture
def worker(store, engine, clock, tmp_path):
    limits = WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=1000)
    return Worker(
        "worker", store, engine, tmp_path, limits, now=clock.now, monotonic=clock.monotonic
    )


def add(store: Recorder, clock: Clock, *recipes: Recipe, image_format: str = "png") -> Job:
    return store.add(new_job(recipes or (RECIPE,), clock.now(), image_format=image_format))


def written(worker: Worker) -> None:
    """Wait until every image that was handed over so far is on the disk."""
    worker._write_thread.submit(lambda: None).result(DEADLINE_S)


def test_without_jobs_there_is_nothing_to_do(worker):
    assert worker.run_next() is None


@pytest.mark.parametrize(
    ("image_format", "suffix"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")]
)
def test_a_job_becomes_files(worker, store, clock, engine, tmp_path, image_format, suffix):
    recipes = (RECIPE, replace(RECIPE, seed=7, width=72))
    job = add(store, clock, *recipes, image_format=image_format)
    done = worker.run_next()
    assert (done.id, done.status, done.error) == (job.id, Status.SUCCEEDED, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{job.id}_output_{index}.{suffix}" for index in range(2)
    ]
    for recipe, output in zip(recipes, done.outputs, strict=True):
        content = Path(output.file_path).read_bytes()
        assert (output.sha256, output.size_bytes) == (
            hashlib.sha256(content).hexdigest(),
            len(content),
        )
        assert (output.width, output.height, output.seed, output.format) == (
            recipe.width,
            64,
            recipe.seed,
            image_format,
        )
        assert Recipe.from_dict(read_record(output.file_path)["recipe"]) == recipe
        if image_format != "jpeg":
            assert np.array_equal(
                np.asarray(Image.open(output.file_path)), engine.generate(recipe).pixels
            )
    assert set(done.timings) == {"load", "adapters", "text", "denoise", "decode"}


def test_progress_counts_steps_and_images_and_guesses_the_rest(worker, store, clock):
    add(store, clock, RECIPE, RECIPE)
    worker.run_next()
    steps = [report[:4] for report in store.reports]
    assert [step for step in steps if step[2] < 4] == [
        (image, 2, step, 4) for image in (0, 1) for step in (1, 2, 3)
    ]
    assert steps[-1] == (1, 2, 4, 4)
    etas = [report[4] for report in store.reports]
    assert etas[-1] == 0
    assert all(eta >= 0 for eta in etas)


def test_a_model_that_takes_long_to_load_does_not_cost_the_claim(
    store, engine, clock, tmp_path, monkeypatch
):
    """No step can report while a model is downloaded; the lease is longer for that time, and short again for the steps."""
    limits = WorkerLimits(lease_s=60, load_s=1800, report_every_s=0, timeout_s=10_000)
    worker = Worker(
        "worker", store, engine, tmp_path, limits, now=clock.now, monotonic=clock.monotonic
    )
    leases: list[float] = []
    original = engine.load

    def slow(recipe: Recipe) -> None:
        clock.seconds += 1000
        assert store.abandon_expired(clock.now()) == ()
        original(recipe)

    def at_first_step(job_id: str) -> None:
        expires = MemoryStore.get(store, job_id).lease_expires_at
        assert expires is not None
        leases.append((expires - clock.now()).total_seconds())

    monkeypatch.setattr(engine, "load", slow)
    store.at_look = {1: at_first_step}
    add(store, clock)
    done = worker.run_next()
    assert done is not None
    assert done.status is Status.SUCCEEDED
    assert done.timings["load"] >= 1000
    assert 0 < leases[0] <= 60


def test_a_wish_to_cancel_is_seen_at_the_next_step(worker, store, clock, tmp_path):
    add(store, clock, RECIPE, RECIPE)
    store.at_look = {2: lambda job_id: store.cancel(job_id, clock.now())}
    done = worker.run_next()
    assert (done.status, store.looks) == (Status.CANCELED, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_job_canceled_in_its_second_image_leaves_no_file(worker, store, clock, tmp_path):
    add(store, clock, RECIPE, RECIPE)
    store.at_look = {6: lambda job_id: store.cancel(job_id, clock.now())}
    assert worker.run_next().status is Status.CANCELED
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_takes_too_long_is_stopped_and_has_failed(store, engine, clock, tmp_path):
    limits = WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=10)
    worker = Worker(
        "worker", store, engine, tmp_path, limits, now=clock.now, monotonic=clock.monotonic
    )
    add(store, clock, RECIPE, RECIPE)
    done = worker.run_next()
    assert done is not None
    assert done.error is not None
    assert (done.status, done.error.code) == (Status.FAILED, "TIMEOUT")
    assert "10 are allowed" in done.error.message
    assert store.reports[-1][:3] < (1, 2, 0)  # long before its end
    assert list(tmp_path.iterdir()) == []
    add(store, clock)
    after = Worker("worker", store, engine, tmp_path).run_next()
    assert after is not None
    assert after.status is Status.SUCCEEDED  # the engine is free


def test_a_worker_that_lost_its_claim_leaves_the_job_alone(worker, store, clock, tmp_path):
    job = add(store, clock)

    def another_takes_it(job_id: str) -> None:
        store.abandon(job_id, 1, "it seemed dead", clock.now())
        store.claim("another", clock.now(), 1000)

    store.at_look = {2: another_takes_it}
    after = worker.run_next()
    assert (after.status, after.worker, after.epoch) == (Status.IN_PROGRESS, "another", 2)
    assert list(tmp_path.iterdir()) == []
    assert store.get(job.id) == after


@pytest.mark.parametrize(
    "error", [GenerationCancelled(), AdapterMismatchError(), ZeroDivisionError()], ids=str
)
def test_files_of_a_worker_that_has_the_job_now_are_left_alone(
    worker, store, clock, tmp_path, monkeypatch, error
):
    """The first worker stumbles in its second image, after another one took the job and wrote the first."""
    job = add(store, clock, RECIPE, RECIPE)
    original, calls = worker._engine.generate, []

    def stumbles(recipe, on_step):
        calls.append(recipe)
        if len(calls) == 2:
            written(worker)
            store.abandon(job.id, 1, "it seemed dead", clock.now())
            store.claim("another", clock.now(), 1000)
            raise error
        return original(recipe, on_step)

    monkeypatch.setattr(worker._engine, "generate", stumbles)
    after = worker.run_next()
    assert (after.status, after.worker) == (Status.IN_PROGRESS, "another")
    assert [path.name for path in tmp_path.iterdir()] == [f"{job.id}_output_0.png"]


def test_an_adapter_of_unknown_bytes_fails_the_job_with_its_reason(worker, store, clock):
    add(store, clock, replace(RECIPE, adapters=(AdapterRef("0" * 64, name="gone"),)))
    done = worker.run_next()
    assert (done.status, done.attempts) == (Status.FAILED, 1)
    assert done.error.code == "ADAPTER_NOT_FOUND"
    assert "gone" in done.error.message


def test_an_adapter_is_found_in_the_folder_of_hashes(store, clock, tmp_path):
    ref = AdapterRef.from_file(LORA)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / f"{ref.sha256}.safetensors").write_bytes(LORA.read_bytes())
    engine = Engine(device="cpu", adapters=AdapterLibrary(folder=tmp_path / "adapters"))
    add(store, clock, replace(RECIPE, adapters=(AdapterRef(ref.sha256),)))
    done = Worker("worker", store, engine, tmp_path).run_next()
    assert done is not None
    assert done.status is Status.SUCCEEDED
    assert engine.adapters.loaded() == {ref.sha256}


def test_jobs_whose_adapters_are_loaded_go_first(store, clock, tmp_path):
    engine = Engine(device="cpu")
    ref = engine.adapters.add(LORA)
    add(store, clock, replace(RECIPE, adapters=(AdapterRef("0" * 64),)))
    warm = add(store, clock, replace(RECIPE, adapters=(ref,)))
    done = Worker("worker", store, engine, tmp_path).run_next()
    assert done is not None
    assert (done.id, done.status) == (warm.id, Status.SUCCEEDED)


def test_of_these_the_jobs_whose_adapters_are_in_the_weights_go_first(store, clock, tmp_path):
    """A switch costs more than reading a file, so what needs none comes first, and no other order has as few."""
    engine = Engine(device="cpu")
    one, other = (engine.adapters.add(path) for path in (LORA, LORA_CONV))
    jobs = [
        add(store, clock, replace(RECIPE, adapters=(ref,))) for ref in (one, other, one, other, one)
    ]
    worker = Worker("worker", store, engine, tmp_path)
    done = [worker.run_next() for _ in jobs]
    assert [job.id for job in done if job is not None] == [
        jobs[place].id for place in (0, 2, 4, 1, 3)
    ]


def test_an_unexpected_error_costs_an_attempt_and_then_the_job(
    worker, store, clock, monkeypatch, tmp_path
):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("fidelora.engine.engine.denoise", broken)
    add(store, clock)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        after = worker.run_next()
        assert after.attempts == attempt
    assert after.status is Status.FAILED
    assert after.error == Failure(
        "WORKER_LOST",
        "Given up after 3 attempts; the last one ended because of an unexpected ZeroDivisionError: division by zero.",
    )
    monkeypatch.undo()
    add(store, clock)
    assert worker.run_next().status is Status.SUCCEEDED


def test_a_process_that_is_told_to_stop_gives_the_job_back(
    worker, store, clock, monkeypatch, tmp_path
):
    def told_to_stop(*args, **kwargs):
        raise SystemExit(0)

    job = add(store, clock)
    monkeypatch.setattr("fidelora.engine.engine.denoise", told_to_stop)
    with pytest.raises(SystemExit):
        worker.run_next()
    back = store.get(job.id)
    assert (back.status, back.attempts) == (Status.IN_QUEUE, 0)


def test_a_full_disk_fails_the_job_and_leaves_nothing(worker, store, clock, monkeypatch, tmp_path):
    import errno
    import os

    calls = []

    def full_from_the_second_image_on(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # a file and its folder for the first image
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_from_the_second_image_on)
    add(store, clock, RECIPE, RECIPE)
    done = worker.run_next()
    assert (done.status, done.error.code) == (Status.FAILED, "OUTPUT")
    assert list(tmp_path.iterdir()) == []


def test_errors_have_codes_for_programs():
    assert error_code(AdapterMismatchError()) == "ADAPTER_MISMATCH"
    assert error_code(WeightsFileError()) == "WEIGHTS_FILE"
    assert error_code(PickleRefusedError()) == "PICKLE_REFUSED"


def test_reports_carry_a_rough_picture_that_ends_with_the_job(engine, tmp_path, clock):
    pictures: list[str] = []

    class Watching(Recorder):
        def renew(self, job_id, epoch, progress, now, lease_s):
            if progress and progress.preview:
                pictures.append(progress.preview)
            return super().renew(job_id, epoch, progress, now, lease_s)

    store = Watching()
    added = add(store, clock, replace(RECIPE, width=128))
    Worker(
        "w",
        store,
        engine,
        tmp_path,
        WorkerLimits(report_every_s=0),
        now=clock.now,
        monotonic=clock.monotonic,
    ).run_next()
    shown = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    assert [(picture.format, picture.size) for picture in shown[:4]] == [("JPEG", (16, 8))] * 4
    assert np.asarray(shown[0]).std() > 1, "it shows something"
    done = store.get(added.id)
    assert (done.status, done.progress and done.progress.preview) == (Status.SUCCEEDED, "")


class FakeEngine:
    """Makes plain pictures, as an engine would that takes up to `most` of them at once.

    Attributes:
        batches: the prompts of everything that was begun.
        steps: how many steps were made of each of these.
        before_step: called with the number of the batch, from 1, and that of the step.
        bad: whatever is begun with this prompt in it ends with an error.
    """

    def __init__(self, most: int = 4, adapters: AdapterLibrary | None = None) -> None:
        self.adapters = adapters or AdapterLibrary()
        self.most = most
        self.batches: list[str] = []
        self.steps: list[int] = []
        self.before_step: Callable[[int, int], Any] = lambda batch, step: None
        self.bad: dict[str, BaseException] = {}

    def merged(self) -> frozenset[str]:
        return frozenset()

    def load(self, recipe: Recipe) -> None:
        for ref in recipe.adapters:
            self.adapters.get(ref)

    def max_batch(self, recipe: Recipe) -> int:
        assert recipe.fidelity == "fast", "exact images are made one by one, and nobody has to ask"
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
        seconds = {"load": 0.0, "adapters": 0.0, "text": 4.0, "denoise": 12.0, "decode": 8.0}
        pixels = np.zeros((recipes[0].height, recipes[0].width, 3), np.uint8)
        return [
            GeneratedImage(pixels, recipe, {"fidelora": "test"}, (), seconds) for recipe in recipes
        ]


class Many:
    """A worker with a fake engine, and short names for what is done with it."""

    def __init__(self, store: Recorder, clock: Clock, folder: Path) -> None:
        self.store, self.clock, self.folder = store, clock, folder
        self.engine = FakeEngine()
        self.limits = WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=1000)
        self.reports: list[AttemptReport] = []
        self.waited: list[float] = []
        self.while_waiting: Callable[[], Any] = lambda: None

    def worker(self) -> Worker:
        made: Any = self.engine
        clocks: Any = {"now": self.clock.now, "monotonic": self.clock.monotonic, "wait": self._wait}
        return Worker(
            "worker",
            self.store,
            made,
            self.folder,
            self.limits,
            on_end=self.reports.append,
            **clocks,
        )

    def run(self) -> Job | None:
        return self.worker().run_next()

    def add(self, prompts: str, common: Recipe = FAST) -> Job:
        """A job of an image for each word."""
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


@pytest.fixture
def many(store, clock, tmp_path):
    return Many(store, clock, tmp_path)


def test_images_of_a_job_that_are_alike_are_made_side_by_side(many):
    many.engine.most = 2
    recipes = [replace(FAST, prompt=prompt) for prompt in "abc"]
    recipes += [
        replace(RECIPE, prompt="exact"),
        replace(RECIPE, prompt="exact"),
        replace(FAST, prompt="longer", steps=5),
    ]
    recipes = [replace(recipe, seed=seed) for seed, recipe in enumerate(recipes)]
    job = add(many.store, many.clock, *recipes)
    done = many.run()
    assert (done.id, done.status) == (job.id, Status.SUCCEEDED)
    assert many.engine.batches == ["a b", "c", "exact", "exact", "longer"]
    assert [output.seed for output in done.outputs] == [0, 1, 2, 3, 4, 5]
    for recipe, output in zip(recipes, done.outputs, strict=True):
        assert Recipe.from_dict(read_record(output.file_path)["recipe"]) == recipe
    assert many.files() == many.files_of(job)
    assert done.timings["denoise"] == 5 * 12


def test_progress_in_a_batch_counts_as_if_images_were_made_one_by_one(many):
    many.engine.most = 2
    job = many.add("a b c")
    many.run()
    reports = many.store.progress[job.id]
    assert all((report.images, report.steps) == (3, 4) for report in reports)
    counted = list(dict.fromkeys((report.image, report.step) for report in reports))
    assert counted == [(0, 2), (1, 0), (1, 2), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4)]
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] == 2 / 12
    assert fractions[-1] == 1
    assert reports[-1].eta_s == 0
    # The clock goes on by itself, and alike at each step: what is left is what was spent, times what is left over what is done.
    assert all(
        report.eta_s * report.fraction <= many.clock.seconds * (1 - report.fraction)
        for report in reports
    )


def test_jobs_that_are_alike_share_a_batch(many):
    first, second, third = many.add("a"), many.add("b c"), many.add("d")
    done = many.run()
    assert many.engine.batches == ["a b c d"]
    assert done.id == first.id
    assert many.run() is None
    for job in (first, second, third):
        done = many.store.get(job.id)
        assert (done.status, done.attempts, done.worker) == (Status.SUCCEEDED, 1, "")
        assert [
            Recipe.from_dict(read_record(output.file_path)["recipe"]) for output in done.outputs
        ] == list(job.recipes)
        share = len(job.recipes) / 4
        assert {part: done.timings[part] / share for part in ("text", "denoise", "decode")} == {
            "text": 4, "denoise": 12, "decode": 8,
        }  # fmt: skip
        assert done.timings["load"] > 0
    assert many.files() == many.files_of(first, second, third)
    assert [report.job_id for report in many.reports] == [first.id, second.id, third.id]
    assert [(report.status, report.images, report.steps) for report in many.reports] == [
        ("succeeded", 1, 4), ("succeeded", 2, 8), ("succeeded", 1, 4),
    ]  # fmt: skip
    assert all(report.wait_s is not None for report in many.reports)


def test_a_model_that_takes_long_to_load_costs_no_job_of_a_batch_its_claim(many, monkeypatch):
    many.limits = replace(many.limits, lease_s=60, timeout_s=10_000)
    jobs = [many.add("a"), many.add("b")]

    def slow(recipe: Recipe) -> None:
        many.clock.seconds += 1000
        assert many.store.abandon_expired(many.clock.now()) == ()

    def before_step(batch: int, step: int) -> None:
        now = many.clock.now()
        expiries = [MemoryStore.get(many.store, job.id).lease_expires_at for job in jobs]
        assert all(expires - now <= timedelta(seconds=60) for expires in expiries if expires)

    monkeypatch.setattr(many.engine, "load", slow)
    many.engine.before_step = before_step
    many.run()
    assert many.engine.batches == ["a b"]
    assert many.status(*jobs) == [Status.SUCCEEDED] * 2
    assert all(many.store.get(job.id).timings["load"] >= 500 for job in jobs)


def test_each_job_of_a_batch_has_its_own_progress_and_picture(many):
    first, second = many.add("a b"), many.add("c")
    many.run()
    counted = {
        job.id: list(
            dict.fromkeys(
                (report.image, report.images, report.step) for report in many.store.progress[job.id]
            )
        )
        for job in (first, second)
    }
    assert counted[first.id] == [(0, 2, 2), (1, 2, 0), (1, 2, 2), (1, 2, 4)]
    assert counted[second.id] == [(0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 1, 4)]
    for job, place in ((first, 0), (second, 2)):
        picture = Image.open(io.BytesIO(base64.b64decode(many.store.progress[job.id][0].preview)))
        assert abs(int(np.asarray(picture).mean()) - 20 * place) <= 2


def test_a_batch_takes_no_more_than_there_is_room_for(many):
    many.engine.most = 3
    first, large, second, third, fourth = (
        many.add(prompts) for prompts in ("a", "b c d", "e", "f", "g")
    )
    many.run()
    assert many.engine.batches == ["a e f"]
    assert many.status(first, second, third) == [Status.SUCCEEDED] * 3
    assert many.status(large, fourth) == [Status.IN_QUEUE] * 2
    assert [many.store.get(job.id).passed_over for job in (large, fourth)] == [2, 0]
    many.run()
    assert many.engine.batches[1:] == ["b c d"]


@pytest.mark.parametrize(
    "other",
    [
        replace(FAST, steps=5),
        replace(FAST, width=128),
        replace(FAST, adapters=(AdapterRef("0" * 64),)),
        RECIPE,
    ],
    ids=["steps", "size", "adapter", "exact"],
)
def test_jobs_that_are_unlike_stay_in_the_queue(many, other):
    first, unlike = many.add("a"), many.add("b", other)
    mixed = add(many.store, many.clock, FAST, replace(FAST, steps=5))
    alike = many.add("c")
    many.run()
    assert many.engine.batches == ["a c"]
    assert many.status(first, unlike, mixed, alike) == [
        Status.SUCCEEDED,
        Status.IN_QUEUE,
        Status.IN_QUEUE,
        Status.SUCCEEDED,
    ]


def test_a_job_of_unlike_images_and_one_in_exact_are_made_alone(many):
    mixed = add(
        many.store, many.clock, replace(FAST, prompt="a"), replace(FAST, prompt="b", steps=5)
    )
    exact = many.add("c", RECIPE)
    others = [many.add("d"), many.add("e", RECIPE)]
    many.run()
    many.run()
    assert many.engine.batches == ["a", "b", "c"]
    assert many.status(mixed, exact, *others) == [Status.SUCCEEDED] * 2 + [Status.IN_QUEUE] * 2


def test_company_is_not_taken_past_a_job_that_was_passed_over_often_enough(many):
    first, unlike, alike = many.add("a"), many.add("b", RECIPE), many.add("c")
    with many.store._lock:
        many.store._put(replace(unlike, passed_over=MAX_PASSED_OVER))
    many.run()
    assert many.engine.batches == ["a"]
    assert many.status(first, unlike, alike) == [Status.SUCCEEDED, Status.IN_QUEUE, Status.IN_QUEUE]


def test_who_was_tried_before_is_made_alone(many):
    """It may be a job that ends its process, and would take others with it each time."""
    tried = many.add("a")
    many.store.claim("worker", many.clock.now(), 1000)
    many.store.abandon(tried.id, 1, "its process died", many.clock.now())
    others = [many.add("b"), many.add("c")]
    many.run()
    assert many.engine.batches == ["a"]
    many.store.claim("worker", many.clock.now(), 1000)
    many.store.abandon(others[0].id, 1, "its process died", many.clock.now())
    last = many.add("d")
    many.store.cancel(others[0].id, many.clock.now())
    assert many.run().id == others[1].id
    assert many.engine.batches == ["a", "c d"]
    assert many.status(last) == [Status.SUCCEEDED]


def test_who_was_tried_before_is_no_company(many):
    tried = many.add("a")
    many.store.claim("worker", many.clock.now(), 1000)
    many.limits = replace(many.limits, batch_wait_s=10)

    def while_waiting() -> None:
        if many.status(tried) == [Status.IN_PROGRESS]:
            many.store.abandon(tried.id, 1, "its process died", many.clock.now())

    many.while_waiting = while_waiting
    first = many.add("b")
    assert many.run().id == first.id
    assert many.engine.batches == ["b"]
    assert many.status(tried) == [Status.IN_QUEUE]


def test_one_of_a_batch_that_is_cancelled_leaves_it_at_once(many):
    first, second = many.add("a b"), many.add("c")
    seen = {}

    def before_step(batch: int, step: int) -> None:
        seen[step] = many.status(first, second)
        if step == 2:
            many.store.cancel(first.id, many.clock.now())

    many.engine.before_step = before_step
    assert many.run().id == first.id
    assert seen[3] == [Status.CANCELED, Status.IN_PROGRESS]
    assert many.status(first, second) == [Status.CANCELED, Status.SUCCEEDED]
    assert (many.engine.batches, many.engine.steps) == (["a b c"], [4])
    assert many.files() == many.files_of(second)
    assert {report.job_id: (report.status, report.images) for report in many.reports} == {
        first.id: ("canceled", 0), second.id: ("succeeded", 1),
    }  # fmt: skip
    # An image had a third of the batch, whether the others were thrown away or not.
    assert many.store.get(second.id).timings["denoise"] == 4


def test_a_batch_that_nobody_wants_any_more_is_stopped(many):
    jobs = [many.add("a"), many.add("b")]
    many.engine.before_step = lambda batch, step: (
        step in (2, 3) and many.store.cancel(jobs[step - 2].id, many.clock.now())
    )
    many.run()
    assert many.status(*jobs) == [Status.CANCELED] * 2
    assert (many.engine.batches, many.engine.steps) == (["a b"], [2])
    assert many.files() == []
    assert many.run() is None


def test_one_of_a_batch_that_is_out_of_time_leaves_it(many):
    """The first waited for the second, and has less time left."""
    many.engine.most = 2
    many.limits = replace(many.limits, lease_s=10_000, batch_wait_s=5000, timeout_s=5000)
    jobs = [many.add("a")]

    def while_waiting() -> None:
        many.clock.seconds += 4000
        jobs.append(many.add("b"))

    def before_step(batch: int, step: int) -> None:
        many.clock.seconds += 1500 * (step == 3)

    many.while_waiting = while_waiting
    many.engine.before_step = before_step
    many.run()
    assert many.engine.batches == ["a b"]
    assert many.status(*jobs) == [Status.FAILED, Status.SUCCEEDED]
    error = many.store.get(jobs[0].id).error
    assert error is not None
    assert error.code == "TIMEOUT"
    assert many.files() == many.files_of(jobs[1])


def test_one_of_a_batch_that_belongs_to_another_worker_now_is_left_alone(many):
    first, second = many.add("a"), many.add("b")
    theirs = many.folder / many.files_of(first)[0]

    def before_step(batch: int, step: int) -> None:
        if step == 2:
            many.store.abandon(first.id, 1, "it seemed dead", many.clock.now())
            many.store.claim("another", many.clock.now(), 1000)
            theirs.write_bytes(b"theirs")

    many.engine.before_step = before_step
    after = many.run()
    assert (after.id, after.status, after.worker, after.epoch) == (
        first.id,
        Status.IN_PROGRESS,
        "another",
        2,
    )
    assert many.status(second) == [Status.SUCCEEDED]
    assert many.files() == many.files_of(first, second)
    assert theirs.read_bytes() == b"theirs"
    assert [report.job_id for report in many.reports] == [second.id]


def test_a_claim_that_is_lost_right_before_the_files_are_written_is_noticed(many):
    first, second = many.add("a"), many.add("b")
    renew = many.store.renew

    def lost_at_the_end(job_id, epoch, progress, now, lease_s):
        if job_id == first.id and many.engine.steps == [4]:
            raise LeaseLostError
        return renew(job_id, epoch, progress, now, lease_s)

    many.store.renew = lost_at_the_end
    many.run()
    assert many.status(second) == [Status.SUCCEEDED]
    assert many.files() == many.files_of(second)


@pytest.mark.parametrize(
    "error",
    [NumericsError(), ZeroDivisionError("division by zero")],
    ids=lambda error: type(error).__name__,
)
def test_what_goes_wrong_with_one_of_a_batch_is_not_the_others_fault(many, error):
    jobs = [many.add("a"), many.add("bad worse"), many.add("c")]
    many.engine.bad = {"worse": error}
    many.run()
    assert many.engine.batches == ["a bad worse c", "a", "bad worse", "c"]
    expected = Status.FAILED if isinstance(error, NumericsError) else Status.IN_QUEUE
    assert many.status(*jobs) == [Status.SUCCEEDED, expected, Status.SUCCEEDED]
    failed = many.store.get(jobs[1].id)
    assert failed.attempts == 1
    if failed.error:
        assert failed.error.code == "NUMERICS"
    assert many.files() == many.files_of(jobs[0], jobs[2])
    assert sorted((report.job_id, report.images) for report in many.reports) == sorted(
        (job.id, images) for job, images in zip(jobs, (1, 0, 1), strict=True)
    )


@pytest.mark.parametrize("steps", [2, 4], ids=["among steps", "at the end"])
def test_what_goes_wrong_with_the_report_of_one_ends_that_one_alone(many, steps):
    first, second, third = many.add("a"), many.add("b"), many.add("c")
    renew = many.store.renew

    def fails(job_id, epoch, progress, now, lease_s):
        if job_id == second.id and many.engine.steps == [steps]:
            raise ZeroDivisionError
        return renew(job_id, epoch, progress, now, lease_s)

    many.store.renew = fails
    many.run()
    assert many.engine.batches == ["a b c"]
    assert many.status(first, second, third) == [
        Status.SUCCEEDED,
        Status.IN_QUEUE,
        Status.SUCCEEDED,
    ]
    assert many.store.get(second.id).attempts == 1
    assert many.files() == many.files_of(first, third)


def test_jobs_that_wait_to_be_made_by_themselves_keep_their_claims_and_may_be_cancelled(many):
    """No step takes longer than a lease, but all of them together do."""
    many.limits = replace(many.limits, lease_s=60, timeout_s=400)
    jobs = [many.add(prompt) for prompt in ("bad", "b", "c")]
    many.engine.bad = {"bad": NumericsError()}
    seen = []

    def before_step(batch: int, step: int) -> None:
        many.clock.seconds += 40
        assert many.store.abandon_expired(many.clock.now()) == ()
        if (batch, step) == (2, 1):
            many.store.cancel(jobs[2].id, many.clock.now())
        if (batch, step) == (2, 2):
            seen.append(many.status(jobs[2]))

    many.engine.before_step = before_step
    many.run()
    assert many.engine.batches == ["bad b c", "bad", "b"]
    assert seen == [[Status.CANCELED]]
    assert many.status(*jobs) == [Status.FAILED, Status.SUCCEEDED, Status.CANCELED]


def test_the_database_cannot_be_used_and_no_job_is_to_blame(many):
    jobs = [many.add("a"), many.add("b")]

    def broken(batch: int, step: int) -> None:
        raise JobStoreError

    many.engine.before_step = broken
    with pytest.raises(JobStoreError):
        many.run()
    assert many.engine.batches == ["a b"]
    assert many.status(*jobs) == [Status.IN_PROGRESS] * 2


def test_an_engine_that_cannot_say_how_many_fails_the_job_and_not_the_worker(many):
    job = many.add("a")
    many.engine.max_batch = lambda recipe: 1 // 0
    assert many.run().attempts == 1
    assert many.status(job) == [Status.IN_QUEUE]


def test_a_process_that_is_told_to_stop_gives_every_job_of_a_batch_back(many):
    jobs = [many.add("a b"), many.add("c"), many.add("d")]

    def told_to_stop(batch: int, step: int) -> None:
        if step == 2:
            many.store.cancel(jobs[1].id, many.clock.now())
        if step == 3:
            many.store.abandon(jobs[2].id, 1, "it seemed dead", many.clock.now())
            many.store.claim("another", many.clock.now(), 1000)
            raise SystemExit(0)

    many.engine.before_step = told_to_stop
    with pytest.raises(SystemExit):
        many.run()
    assert many.status(*jobs) == [Status.IN_QUEUE, Status.CANCELED, Status.IN_PROGRESS]
    back = many.store.get(jobs[0].id)
    assert (back.attempts, back.worker) == (0, "")
    assert many.store.get(jobs[2].id).worker == "another"
    assert many.files() == []


def test_a_process_that_is_told_to_stop_among_files_removes_those_of_jobs_that_did_not_succeed(
    many,
):
    jobs = [many.add("a"), many.add("b")]
    worker, succeed = many.worker(), many.store.succeed

    def told_to_stop(job_id, *rest):
        if job_id == jobs[1].id:
            written(worker)
            assert many.files() == many.files_of(*jobs)
            raise SystemExit(0)
        return succeed(job_id, *rest)

    many.store.succeed = told_to_stop
    with pytest.raises(SystemExit):
        worker.run_next()
    assert many.status(*jobs) == [Status.SUCCEEDED, Status.IN_QUEUE]
    assert many.store.get(jobs[1].id).attempts == 0
    assert many.files() == many.files_of(jobs[0])
    assert [report.job_id for report in many.reports] == [jobs[0].id]


def test_by_default_nobody_waits_for_company(many):
    many.add("a")
    many.run()
    assert many.waited == []


def test_a_job_waits_for_company_as_long_as_there_is_room(many):
    many.engine.most = 3
    many.limits = replace(many.limits, batch_wait_s=500)
    many.add("a")
    coming = iter(["b", "c", "d"])
    many.while_waiting = lambda: many.add(next(coming))
    many.run()
    assert many.engine.batches == ["a b c"]
    assert len(many.waited) == 2
    assert many.store.count(Status.IN_QUEUE) == 0
    many.waited.clear()
    full = many.add("e f g")
    assert many.run().id == full.id
    assert many.waited == []


def test_nobody_waits_for_company_longer_than_was_said(many):
    many.limits = replace(many.limits, batch_wait_s=20)
    job = many.add("a")
    many.while_waiting = lambda: many.store.abandon_expired(many.clock.now())
    assert many.run().status is Status.SUCCEEDED
    assert 0 < sum(many.waited) <= 20
    many.waited.clear()
    many.add("b", RECIPE)
    many.run()
    assert many.waited == []
    assert many.status(job) == [Status.SUCCEEDED]


def test_a_claim_lasts_while_its_job_waits_for_company(many):
    many.limits = replace(many.limits, lease_s=50, batch_wait_s=100)
    job = many.add("a")

    def while_waiting() -> None:
        many.clock.seconds += 20
        assert many.store.abandon_expired(many.clock.now()) == ()

    many.while_waiting = while_waiting
    many.run()
    assert len(many.waited) > 1
    assert many.status(job) == [Status.SUCCEEDED]


def test_a_process_that_is_told_to_stop_while_it_waits_gives_its_jobs_back(many):
    many.limits = replace(many.limits, batch_wait_s=100)
    jobs = [many.add("a"), many.add("b")]

    def told_to_stop() -> None:
        assert many.status(*jobs) == [Status.IN_PROGRESS] * 2
        raise SystemExit(0)

    many.while_waiting = told_to_stop
    with pytest.raises(SystemExit):
        many.run()
    assert many.status(*jobs) == [Status.IN_QUEUE] * 2
    assert [many.store.get(job.id).attempts for job in jobs] == [0, 0]


class SlowDisk:
    """Stands for `write_atomically`: each file waits until it may be written."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.files: list[str] = []

    def __call__(self, path: Path, content: bytes) -> None:
        self.files.append(path.name)
        self.begun.set()
        assert self.go.wait(DEADLINE_S)
        if self.error:
            raise self.error
        path.write_bytes(content)


@pytest.fixture
def disk(monkeypatch):
    made = SlowDisk()
    monkeypatch.setattr("fidelora.workers.attempt.write_atomically", made)
    return made


def test_an_image_is_written_while_the_next_one_is_made_and_before_the_job_succeeds(many, disk):
    job = many.add("a b", RECIPE)

    def before_step(batch: int, step: int) -> None:
        assert many.files() == []
        if (batch, step) == (2, 4):
            assert disk.begun.wait(DEADLINE_S)
            disk.go.set()

    succeed, files = many.store.succeed, []

    def succeeds(*arguments):
        files.extend(many.files())
        return succeed(*arguments)

    many.engine.before_step = before_step
    many.store.succeed = succeeds
    done = many.run()
    assert done.status is Status.SUCCEEDED
    assert files == many.files_of(job)
    assert [output.sha256 for output in done.outputs] == [
        hashlib.sha256((many.folder / name).read_bytes()).hexdigest() for name in files
    ]


@pytest.mark.parametrize("how", ["cancelled", "failed", "told to stop"])
def test_files_that_are_still_written_when_a_job_ends_are_removed_too(many, disk, monkeypatch, how):
    job = many.add("a b c", RECIPE)
    stop = ImageFiles.stop

    def stops(files: ImageFiles) -> None:
        disk.go.set()  # only now, so that whoever does not wait removes nothing
        stop(files)

    def before_step(batch: int, step: int) -> None:
        if (batch, step) == (3, 2):
            assert disk.begun.wait(DEADLINE_S)
            if how == "cancelled":
                many.store.cancel(job.id, many.clock.now())
            else:
                raise NumericsError if how == "failed" else SystemExit(0)

    monkeypatch.setattr(ImageFiles, "stop", stops)
    many.engine.before_step = before_step
    worker = many.worker()
    if how == "told to stop":
        with pytest.raises(SystemExit):
            worker.run_next()
    else:
        worker.run_next()
    expected = {
        "cancelled": Status.CANCELED,
        "failed": Status.FAILED,
        "told to stop": Status.IN_QUEUE,
    }
    assert many.status(job) == [expected[how]]
    written(worker)
    assert many.files() == []
    assert disk.files == many.files_of(job)[:1]  # what waited for its turn was not even begun


def test_a_file_that_cannot_be_written_ends_the_job_at_the_next_step(many, disk):
    job = many.add("a b", RECIPE)
    worker = many.worker()
    disk.error = OutputError("There is no space left.")

    def before_step(batch: int, step: int) -> None:
        if (batch, step) == (2, 2):
            disk.go.set()
            written(worker)

    many.engine.before_step = before_step
    done = worker.run_next()
    assert (done.id, done.status, done.error) == (
        job.id,
        Status.FAILED,
        Failure("OUTPUT", "There is no space left."),
    )
    assert many.engine.steps == [4, 1]


def test_a_file_that_cannot_be_written_is_the_failure_of_its_job_alone(many, monkeypatch):
    first, second = many.add("a"), many.add("b")

    def full_for_the_first(path: Path, content: bytes) -> None:
        if first.id in path.name:
            raise OutputError("There is no space left.")
        write_atomically(path, content)

    monkeypatch.setattr("fidelora.workers.attempt.write_atomically", full_for_the_first)
    many.run()
    assert many.engine.batches == ["a b"]
    assert many.status(first, second) == [Status.FAILED, Status.SUCCEEDED]
    assert many.files() == many.files_of(second)


def read_ahead(worker: Worker) -> None:
    """Wait until everything is read that was to be read ahead so far."""
    worker._prefetch_thread.submit(lambda: None).result(DEADLINE_S)


def test_the_adapters_of_the_next_job_are_read_while_this_one_runs(many):
    own, after, last = (AdapterRef.from_file(path) for path in (LORA, LORA_CONV, LOKR))
    many.add("a", replace(RECIPE, adapters=(own,)))
    many.add("b", replace(RECIPE, adapters=(own, after)))
    many.add("c", replace(RECIPE, adapters=(last,)))
    worker, loaded = many.worker(), []

    def before_step(batch: int, step: int) -> None:
        read_ahead(worker)
        loaded.append(many.engine.adapters.loaded())

    many.engine.before_step = before_step
    worker.run_next()
    assert loaded[0] == {own.sha256, after.sha256}
    assert [(report.adapters_warm, report.adapters_cold) for report in many.reports] == [(0, 1)]
    worker.run_next()
    assert [(report.adapters_warm, report.adapters_cold) for report in many.reports[1:]] == [(2, 0)]
    assert last.sha256 in loaded[-1]


def test_a_running_job_keeps_its_adapters_and_then_lets_them_go(many):
    own, other = AdapterRef.from_file(LORA), AdapterRef.from_file(LORA_CONV)
    many.engine.adapters = AdapterLibrary(1)
    many.add("a", replace(RECIPE, adapters=(own,)))
    kept = []

    def before_step(batch: int, step: int) -> None:
        many.engine.adapters.get(other)
        kept.append(own.sha256 in many.engine.adapters.loaded())

    many.engine.before_step = before_step
    many.run()
    assert kept == [True] * 4
    assert many.engine.adapters.loaded() == {other.sha256}


def test_an_adapter_that_cannot_be_read_ahead_is_its_own_jobs_failure(many):
    first, second = (
        many.add("a"),
        many.add("b", replace(RECIPE, adapters=(AdapterRef("0" * 64, name="gone"),))),
    )
    worker = many.worker()
    many.engine.before_step = lambda batch, step: read_ahead(worker)
    worker.run_next()
    assert many.status(first, second) == [Status.SUCCEEDED, Status.IN_QUEUE]
    assert worker.run_next().error.code == "ADAPTER_NOT_FOUND"


def test_a_fault_while_an_adapter_is_read_ahead_is_logged_and_costs_nothing(
    many, monkeypatch, caplog
):
    def broken(ref: AdapterRef) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(many.engine.adapters, "prefetch", broken)
    first = many.add("a")
    many.add("b", replace(RECIPE, adapters=(AdapterRef.from_file(LORA),)))
    worker = many.worker()
    many.engine.before_step = lambda batch, step: read_ahead(worker)
    worker.run_next()
    assert many.status(first) == [Status.SUCCEEDED]
    assert "prefetching the adapter" in caplog.text
    many.engine.before_step = lambda batch, step: None
    assert worker.run_next().status is Status.SUCCEEDED


def test_nothing_more_is_read_ahead_when_the_job_has_ended(many, monkeypatch):
    """Who has the next job by then reads what it needs, and it may be another worker."""
    refs = [AdapterRef.from_file(path) for path in (LORA, LORA_CONV)]
    begun, go, read = threading.Event(), threading.Event(), []

    def slow(ref: AdapterRef) -> None:
        read.append(ref)
        begun.set()
        assert go.wait(DEADLINE_S)

    def before_step(batch: int, step: int) -> None:
        assert begun.wait(DEADLINE_S)

    monkeypatch.setattr(many.engine.adapters, "prefetch", slow)
    many.engine.before_step = before_step
    many.add("a")
    many.add("b", replace(RECIPE, adapters=tuple(refs)))
    worker = many.worker()
    assert worker.run_next().status is Status.SUCCEEDED
    go.set()
    read_ahead(worker)
    assert read == refs[:1]


def test_a_real_engine_makes_what_several_jobs_want_in_one_batch(
    store, engine, clock, tmp_path, monkeypatch
):
    ref = AdapterRef.from_file(LORA)
    recipes = [
        replace(FAST, prompt=prompt, seed=seed, adapters=(ref,))
        for seed, prompt in enumerate(("a ball", "a cube", "a cone"))
    ]
    jobs = [add(store, clock, *recipes[:2]), add(store, clock, recipes[2])]
    batches, original = [], engine.generate_batch

    def counted(recipes, on_step):
        batches.append(len(recipes))
        return original(recipes, on_step)

    monkeypatch.setattr(engine, "generate_batch", counted)
    limits = WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=1000)
    Worker(
        "worker", store, engine, tmp_path, limits, now=clock.now, monotonic=clock.monotonic
    ).run_next()
    assert batches == [3]
    outputs = [output for job in jobs for output in store.get(job.id).outputs]
    expected = original(recipes, lambda progress: None)
    for recipe, output, image in zip(recipes, outputs, expected, strict=True):
        assert Recipe.from_dict(read_record(output.file_path)["recipe"]) == recipe
        assert np.array_equal(np.asarray(Image.open(output.file_path)), image.pixels)
    assert all(progress.preview for job in jobs for progress in store.progress[job.id])
