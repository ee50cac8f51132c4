"""Jobs from claim to end: images, progress, cancellation, order, adapters, process exits."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import LOKR, LORA, LORA_CONV
from tests.workers.worker_support import (
    DEADLINE_S,
    RECIPE,
    Recorder,
    add,
    claimed_by_another,
    wait_for_prefetches,
    wait_for_writes,
)

from fidelora import AdapterRef, Engine, Recipe, read_record
from fidelora.adapters.library import AdapterLibrary
from fidelora.jobs.job import Job, Status
from fidelora.jobs.memory import MemoryStore
from fidelora.storage.images import FolderImages
from fidelora.workers.attempt import WorkerLimits
from fidelora.workers.worker import Worker


def test_an_empty_queue_returns_none(worker):
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
    assert set(done.timings) == {"load", "read", "adapters", "text", "denoise", "decode"}


def test_progress_counts_steps_and_images_and_estimates_the_rest(worker, store, clock):
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


def test_a_slow_model_load_does_not_cost_the_lease(store, engine, clock, tmp_path, monkeypatch):
    """The lease is longer while a model is downloaded, as no step sends a heartbeat meanwhile."""
    limits = WorkerLimits(lease_s=60, load_s=1800, report_every_s=0, timeout_s=10_000)
    worker = Worker(
        "worker",
        store,
        engine,
        FolderImages(tmp_path),
        limits,
        now=clock.now,
        monotonic=clock.monotonic,
    )
    leases: list[float] = []
    original = engine.load

    def slow(recipe: Recipe) -> dict[str, float]:
        clock.seconds += 1000
        assert store.abandon_expired(clock.now()) == ()
        seconds: dict[str, float] = original(recipe)
        return seconds | {"load": 1000.0}

    def at_first_step(job_id: str) -> None:
        expires = MemoryStore.get(store, job_id).lease_expires_at
        assert expires is not None
        leases.append((expires - clock.now()).total_seconds())

    monkeypatch.setattr(engine, "load", slow)
    store.at_get = {1: at_first_step}
    add(store, clock)
    done = worker.run_next()
    assert done is not None
    assert done.status is Status.SUCCEEDED
    assert done.timings["load"] >= 1000
    assert 0 < leases[0] <= 180  # of the first step


def test_cancellation_takes_effect_at_the_next_step(worker, store, clock, tmp_path):
    add(store, clock, RECIPE, RECIPE)
    store.at_get = {2: lambda job_id: store.cancel(job_id, clock.now())}
    done = worker.run_next()
    assert (done.status, store.gets) == (Status.CANCELED, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_job_canceled_in_its_second_image_leaves_no_file(worker, store, clock, tmp_path):
    add(store, clock, RECIPE, RECIPE)
    store.at_get = {6: lambda job_id: store.cancel(job_id, clock.now())}
    assert worker.run_next().status is Status.CANCELED
    assert list(tmp_path.iterdir()) == []


def test_heartbeats_carry_a_preview_that_is_removed_when_the_job_ends(engine, tmp_path, clock):
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
        FolderImages(tmp_path),
        WorkerLimits(report_every_s=0),
        now=clock.now,
        monotonic=clock.monotonic,
    ).run_next()
    shown = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    assert [(picture.format, picture.size) for picture in shown[:4]] == [("JPEG", (16, 8))] * 4
    assert np.asarray(shown[0]).std() > 1, "the preview shows nothing"
    done = store.get(added.id)
    assert (done.status, done.progress and done.progress.preview) == (Status.SUCCEEDED, "")


def test_an_image_is_written_while_the_next_one_is_made(harness, disk):
    job = harness.add("a b", RECIPE)

    def before_step(batch: int, step: int) -> None:
        assert harness.files() == []
        if (batch, step) == (2, 4):
            assert disk.started.wait(DEADLINE_S)
            disk.allowed.set()

    succeed, files = harness.store.succeed, []

    def succeeds(*arguments):
        files.extend(harness.files())
        return succeed(*arguments)

    harness.engine.before_step = before_step
    harness.store.succeed = succeeds
    done = harness.run()
    assert done.status is Status.SUCCEEDED
    assert files == harness.files_of(job)
    assert [output.sha256 for output in done.outputs] == [
        hashlib.sha256((harness.folder / name).read_bytes()).hexdigest() for name in files
    ]


def test_an_adapter_is_found_in_the_folder_of_hashes(store, clock, tmp_path):
    ref = AdapterRef.from_file(LORA)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / f"{ref.sha256}.safetensors").write_bytes(LORA.read_bytes())
    engine = Engine(device="cpu", adapters=AdapterLibrary(folder=tmp_path / "adapters"))
    add(store, clock, replace(RECIPE, adapters=(AdapterRef(ref.sha256),)))
    done = Worker("worker", store, engine, FolderImages(tmp_path)).run_next()
    assert done is not None
    assert done.status is Status.SUCCEEDED
    assert engine.adapters.loaded() == {ref.sha256}


def test_jobs_whose_adapters_are_loaded_go_first(store, clock, tmp_path):
    engine = Engine(device="cpu")
    ref = engine.adapters.add(LORA)
    add(store, clock, replace(RECIPE, adapters=(AdapterRef("0" * 64),)))
    warm = add(store, clock, replace(RECIPE, adapters=(ref,)))
    done = Worker("worker", store, engine, FolderImages(tmp_path)).run_next()
    assert done is not None
    assert (done.id, done.status) == (warm.id, Status.SUCCEEDED)


def test_jobs_whose_adapters_are_merged_go_before_those_merely_loaded(store, clock, tmp_path):
    """Merging adapters costs more than reading a file; this order merges least often."""
    engine = Engine(device="cpu")
    one, other = (engine.adapters.add(path) for path in (LORA, LORA_CONV))
    jobs = [
        add(store, clock, replace(RECIPE, adapters=(ref,))) for ref in (one, other, one, other, one)
    ]
    worker = Worker("worker", store, engine, FolderImages(tmp_path))
    done = [worker.run_next() for _ in jobs]
    assert [job.id for job in done if job is not None] == [
        jobs[place].id for place in (0, 2, 4, 1, 3)
    ]


def test_the_adapters_of_the_next_job_are_prefetched(harness):
    own, after, last = (AdapterRef.from_file(path) for path in (LORA, LORA_CONV, LOKR))
    harness.add("a", replace(RECIPE, adapters=(own,)))
    harness.add("b", replace(RECIPE, adapters=(own, after)))
    harness.add("c", replace(RECIPE, adapters=(last,)))
    worker, loaded = harness.worker(), []

    def before_step(batch: int, step: int) -> None:
        wait_for_prefetches(worker)
        loaded.append(harness.engine.adapters.loaded())

    harness.engine.before_step = before_step
    worker.run_next()
    assert loaded[0] == {own.sha256, after.sha256}
    assert [(report.adapters_warm, report.adapters_cold) for report in harness.reports] == [(0, 1)]
    worker.run_next()
    assert [(report.adapters_warm, report.adapters_cold) for report in harness.reports[1:]] == [
        (2, 0)
    ]
    assert last.sha256 in loaded[-1]


def test_claims_hold_jobs_for_as_long_as_the_last_read_took(harness, monkeypatch):
    own = AdapterRef.from_file(LORA)
    harness.add("a", replace(RECIPE, adapters=(own,)))
    harness.add("b", replace(RECIPE, adapters=(own,)))
    worker, claim, held = harness.worker(), harness.store.claim, []

    def claim_and_note(*args: Any, **options: Any) -> Job | None:
        held.append(options["hold_s"])
        claimed: Job | None = claim(*args, **options)
        return claimed

    monkeypatch.setattr(harness.store, "claim", claim_and_note)
    worker.run_next()
    harness.engine.load_seconds["read"] = 0.0  # the second job finds its adapter in memory
    worker.run_next()
    worker.run_next()
    assert held == [0.0, 0.5, 0.5]


def test_adapters_of_a_running_job_stay_loaded_until_it_ends(harness):
    own, other = AdapterRef.from_file(LORA), AdapterRef.from_file(LORA_CONV)
    harness.engine.adapters = AdapterLibrary(1)
    harness.add("a", replace(RECIPE, adapters=(own,)))
    kept = []

    def before_step(batch: int, step: int) -> None:
        harness.engine.adapters.get(other)
        kept.append(own.sha256 in harness.engine.adapters.loaded())

    harness.engine.before_step = before_step
    harness.run()
    assert kept == [True] * 4
    assert harness.engine.adapters.loaded() == {other.sha256}


def test_prefetching_stops_when_the_job_ends(harness, monkeypatch):
    """The next job may go to another worker, and its worker reads what it needs."""
    refs = [AdapterRef.from_file(path) for path in (LORA, LORA_CONV)]
    begun, go, read = threading.Event(), threading.Event(), []

    def slow(ref: AdapterRef) -> None:
        read.append(ref)
        begun.set()
        assert go.wait(DEADLINE_S)

    def before_step(batch: int, step: int) -> None:
        assert begun.wait(DEADLINE_S)

    monkeypatch.setattr(harness.engine.adapters, "prefetch", slow)
    harness.engine.before_step = before_step
    harness.add("a")
    harness.add("b", replace(RECIPE, adapters=tuple(refs)))
    worker = harness.worker()
    assert worker.run_next().status is Status.SUCCEEDED
    go.set()
    wait_for_prefetches(worker)
    assert read == refs[:1]


def test_a_process_that_exits_releases_its_job(worker, store, clock, monkeypatch, tmp_path):
    def exits(*args, **kwargs):
        raise SystemExit(0)

    job = add(store, clock)
    monkeypatch.setattr("fidelora.engine.engine.sample", exits)
    with pytest.raises(SystemExit):
        worker.run_next()
    back = store.get(job.id)
    assert (back.status, back.attempts) == (Status.IN_QUEUE, 0)


def test_a_process_that_exits_releases_every_job_of_a_batch(harness):
    jobs = [harness.add("a b"), harness.add("c"), harness.add("d")]

    def exits(batch: int, step: int) -> None:
        if step == 2:
            harness.store.cancel(jobs[1].id, harness.clock.now())
        if step == 3:
            claimed_by_another(harness.store, harness.clock, jobs[2].id)
            raise SystemExit(0)

    harness.engine.before_step = exits
    with pytest.raises(SystemExit):
        harness.run()
    assert harness.status(*jobs) == [Status.IN_QUEUE, Status.CANCELED, Status.IN_PROGRESS]
    back = harness.store.get(jobs[0].id)
    assert (back.attempts, back.worker) == (0, "")
    assert harness.store.get(jobs[2].id).worker == "another"
    assert harness.files() == []


def test_a_process_that_exits_while_writing_removes_unfinished_files(
    harness,
):
    jobs = [harness.add("a"), harness.add("b")]
    worker, succeed = harness.worker(), harness.store.succeed

    def exits(job_id, *rest):
        if job_id == jobs[1].id:
            wait_for_writes(worker)
            assert harness.files() == harness.files_of(*jobs)
            raise SystemExit(0)
        return succeed(job_id, *rest)

    harness.store.succeed = exits
    with pytest.raises(SystemExit):
        worker.run_next()
    assert harness.status(*jobs) == [Status.SUCCEEDED, Status.IN_QUEUE]
    assert harness.store.get(jobs[1].id).attempts == 0
    assert harness.files() == harness.files_of(jobs[0])
    assert [report.job_id for report in harness.reports] == [jobs[0].id]


def test_a_process_that_exits_while_a_batch_waits_releases_its_jobs(harness):
    harness.limits = replace(harness.limits, batch_wait_s=100)
    jobs = [harness.add("a"), harness.add("b")]

    def exits() -> None:
        assert harness.status(*jobs) == [Status.IN_PROGRESS] * 2
        raise SystemExit(0)

    harness.while_waiting = exits
    with pytest.raises(SystemExit):
        harness.run()
    assert harness.status(*jobs) == [Status.IN_QUEUE] * 2
    assert [harness.store.get(job.id).attempts for job in jobs] == [0, 0]
