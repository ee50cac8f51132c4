"""A worker with a real engine on the tiny base: images, progress, cancelling, time, and everything that goes wrong."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import LORA, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe, read_record
from fidelora.adapters.library import AdapterLibrary
from fidelora.errors import AdapterMismatchError, GenerationCancelled, PickleRefusedError, WeightsFileError
from fidelora.jobs.job import MAX_ATTEMPTS, Failure, Job, Status, new_job
from fidelora.jobs.memory import MemoryStore
from fidelora.work.worker import Worker, WorkerLimits, error_code

RECIPE = Recipe(prompt="a ball", base_model=str(TINY_BASE), width=64, height=64, steps=4)


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
            self.reports.append((progress.image, progress.images, progress.step, progress.steps, progress.eta_s))
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
    return Worker("worker", store, engine, tmp_path, limits, now=clock.now, monotonic=clock.monotonic)


def add(store: Recorder, clock: Clock, *recipes: Recipe, image_format: str = "png") -> Job:
    return store.add(new_job(recipes or (RECIPE,), clock.now(), image_format=image_format))


def test_without_jobs_there_is_nothing_to_do(worker):
    assert worker.run_next() is None


@pytest.mark.parametrize(("image_format", "suffix"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_a_job_becomes_files(worker, store, clock, engine, tmp_path, image_format, suffix):
    recipes = (RECIPE, replace(RECIPE, seed=7, width=72))
    job = add(store, clock, *recipes, image_format=image_format)
    done = worker.run_next()
    assert (done.id, done.status, done.error) == (job.id, Status.SUCCEEDED, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{job.id}_output_{index}.{suffix}" for index in range(2)]
    for recipe, output in zip(recipes, done.outputs, strict=True):
        content = Path(output.file_path).read_bytes()
        assert (output.sha256, output.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
        assert (output.width, output.height, output.seed, output.format) == (recipe.width, 64, recipe.seed, image_format)
        assert Recipe.from_dict(read_record(output.file_path)["recipe"]) == recipe
        if image_format != "jpeg":
            assert np.array_equal(np.asarray(Image.open(output.file_path)), engine.generate(recipe).pixels)
    assert set(done.timings) == {"load", "adapters", "text", "denoise", "decode"}


def test_progress_counts_steps_and_images_and_guesses_the_rest(worker, store, clock):
    add(store, clock, RECIPE, RECIPE)
    worker.run_next()
    steps = [report[:4] for report in store.reports]
    assert [step for step in steps if step[2] < 4] == [(image, 2, step, 4) for image in (0, 1) for step in (1, 2, 3)]
    assert steps[-1] == (1, 2, 4, 4)
    etas = [report[4] for report in store.reports]
    assert etas[-1] == 0
    assert all(eta >= 0 for eta in etas)


def test_a_model_that_takes_long_to_load_does_not_cost_the_claim(store, engine, clock, tmp_path, monkeypatch):
    """No step can report while a model is downloaded; the lease is longer for that time, and short again for the steps."""
    limits = WorkerLimits(lease_s=60, load_s=1800, report_every_s=0, timeout_s=10_000)
    worker = Worker("worker", store, engine, tmp_path, limits, now=clock.now, monotonic=clock.monotonic)
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
    worker = Worker("worker", store, engine, tmp_path, limits, now=clock.now, monotonic=clock.monotonic)
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


@pytest.mark.parametrize("error", [GenerationCancelled(), AdapterMismatchError(), ZeroDivisionError()], ids=str)
def test_files_of_a_worker_that_has_the_job_now_are_left_alone(worker, store, clock, tmp_path, monkeypatch, error):
    """The first worker stumbles in its second image, after another one took the job and wrote the first."""
    job = add(store, clock, RECIPE, RECIPE)
    original = worker._engine.generate

    def stumbles(recipe, on_step):
        if list(tmp_path.iterdir()):
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


def test_an_unexpected_error_costs_an_attempt_and_then_the_job(worker, store, clock, monkeypatch, tmp_path):
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


def test_a_process_that_is_told_to_stop_gives_the_job_back(worker, store, clock, monkeypatch, tmp_path):
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
    Worker("w", store, engine, tmp_path, WorkerLimits(report_every_s=0), now=clock.now, monotonic=clock.monotonic).run_next()
    shown = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    assert [(picture.format, picture.size) for picture in shown[:4]] == [("JPEG", (16, 8))] * 4
    assert np.asarray(shown[0]).std() > 1, "it shows something"
    done = store.get(added.id)
    assert (done.status, done.progress and done.progress.preview) == (Status.SUCCEEDED, "")
