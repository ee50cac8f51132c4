"""Several images and jobs in one batch: what is shared, and how long a batch waits for jobs."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from PIL import Image
from tests.support import LORA
from tests.workers.worker_support import (
    FAST,
    RECIPE,
    add,
)

from fidelora import AdapterRef, Recipe, read_record
from fidelora.jobs.job import Status
from fidelora.jobs.memory import MemoryStore
from fidelora.storage.images import FolderImages
from fidelora.workers.attempt import WorkerLimits
from fidelora.workers.worker import Worker


def test_similar_images_of_a_job_share_batches(harness):
    harness.engine.most = 2
    recipes = [replace(FAST, prompt=prompt) for prompt in "abc"]
    recipes += [
        replace(RECIPE, prompt="exact"),
        replace(RECIPE, prompt="exact"),
        replace(FAST, prompt="longer", steps=5),
    ]
    recipes = [replace(recipe, seed=seed) for seed, recipe in enumerate(recipes)]
    job = add(harness.store, harness.clock, *recipes)
    done = harness.run()
    assert (done.id, done.status) == (job.id, Status.SUCCEEDED)
    assert harness.engine.batches == ["a b", "c", "exact", "exact", "longer"]
    assert [output.seed for output in done.outputs] == [0, 1, 2, 3, 4, 5]
    for recipe, output in zip(recipes, done.outputs, strict=True):
        assert Recipe.from_dict(read_record(output.file_path)["recipe"]) == recipe
    assert harness.files() == harness.files_of(job)
    assert done.timings["denoise"] == 5 * 12


def test_progress_in_a_batch_counts_as_if_images_were_made_one_by_one(harness):
    harness.engine.most = 2
    job = harness.add("a b c")
    harness.run()
    reports = harness.store.progress[job.id]
    assert all((report.images, report.steps) == (3, 4) for report in reports)
    counted = list(dict.fromkeys((report.image, report.step) for report in reports))
    assert counted == [(0, 2), (1, 0), (1, 2), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4)]
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] == 2 / 12
    assert fractions[-1] == 1
    assert reports[-1].eta_s == 0
    # The clock advances evenly by step, so eta = spent * (1 - fraction) / fraction.
    assert all(
        report.eta_s * report.fraction <= harness.clock.seconds * (1 - report.fraction)
        for report in reports
    )


def test_similar_jobs_share_a_batch(harness):
    first, second, third = harness.add("a"), harness.add("b c"), harness.add("d")
    done = harness.run()
    assert harness.engine.batches == ["a b c d"]
    assert done.id == first.id
    assert harness.run() is None
    for job in (first, second, third):
        done = harness.store.get(job.id)
        assert (done.status, done.attempts, done.worker) == (Status.SUCCEEDED, 1, "")
        assert [
            Recipe.from_dict(read_record(output.file_path)["recipe"]) for output in done.outputs
        ] == list(job.recipes)
        share = len(job.recipes) / 4
        assert {part: done.timings[part] / share for part in ("text", "denoise", "decode")} == {
            "text": 4, "denoise": 12, "decode": 8,
        }  # fmt: skip
        assert done.timings["load"] > 0
    assert harness.files() == harness.files_of(first, second, third)
    assert [report.job_id for report in harness.reports] == [first.id, second.id, third.id]
    assert [(report.status, report.images, report.steps) for report in harness.reports] == [
        ("succeeded", 1, 4), ("succeeded", 2, 8), ("succeeded", 1, 4),
    ]  # fmt: skip
    assert all(report.wait_s is not None for report in harness.reports)


def test_a_slow_model_load_costs_no_job_of_a_batch_its_lease(harness, monkeypatch):
    harness.limits = replace(harness.limits, lease_s=60, timeout_s=10_000)
    jobs = [harness.add("a"), harness.add("b")]

    def slow(recipe: Recipe) -> dict[str, float]:
        harness.clock.seconds += 1000
        assert harness.store.abandon_expired(harness.clock.now()) == ()
        return {"load": 1000.0}

    def before_step(batch: int, step: int) -> None:
        now = harness.clock.now()
        expiries = [MemoryStore.get(harness.store, job.id).lease_expires_at for job in jobs]
        longest = timedelta(seconds=180)  # during a step; during the load, a lease is 1,800
        assert all(expires - now <= longest for expires in expiries if expires)

    monkeypatch.setattr(harness.engine, "load", slow)
    harness.engine.before_step = before_step
    harness.run()
    assert harness.engine.batches == ["a b"]
    assert harness.status(*jobs) == [Status.SUCCEEDED] * 2
    assert all(harness.store.get(job.id).timings["load"] >= 500 for job in jobs)


def test_each_job_of_a_batch_has_its_own_progress_and_preview(harness):
    first, second = harness.add("a b"), harness.add("c")
    harness.run()
    counted = {
        job.id: list(
            dict.fromkeys(
                (report.image, report.images, report.step)
                for report in harness.store.progress[job.id]
            )
        )
        for job in (first, second)
    }
    assert counted[first.id] == [(0, 2, 2), (1, 2, 0), (1, 2, 2), (1, 2, 4)]
    assert counted[second.id] == [(0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 1, 4)]
    for job, place in ((first, 0), (second, 2)):
        picture = Image.open(
            io.BytesIO(base64.b64decode(harness.store.progress[job.id][0].preview))
        )
        assert abs(int(np.asarray(picture).mean()) - 20 * place) <= 2


def test_a_batch_has_a_maximum_size(harness):
    harness.engine.most = 3
    first, large, second, third, fourth = (
        harness.add(prompts) for prompts in ("a", "b c d", "e", "f", "g")
    )
    harness.run()
    assert harness.engine.batches == ["a e f"]
    assert harness.status(first, second, third) == [Status.SUCCEEDED] * 3
    assert harness.status(large, fourth) == [Status.IN_QUEUE] * 2
    harness.run()
    assert harness.engine.batches[1:] == ["b c d"]


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
def test_different_jobs_stay_in_the_queue(harness, other):
    first, unlike = harness.add("a"), harness.add("b", other)
    mixed = add(harness.store, harness.clock, FAST, replace(FAST, steps=5))
    alike = harness.add("c")
    harness.run()
    assert harness.engine.batches == ["a c"]
    assert harness.status(first, unlike, mixed, alike) == [
        Status.SUCCEEDED,
        Status.IN_QUEUE,
        Status.IN_QUEUE,
        Status.SUCCEEDED,
    ]


def test_jobs_with_unequal_images_and_exact_jobs_are_made_alone(harness):
    mixed = add(
        harness.store, harness.clock, replace(FAST, prompt="a"), replace(FAST, prompt="b", steps=5)
    )
    exact = harness.add("c", RECIPE)
    others = [harness.add("d"), harness.add("e", RECIPE)]
    harness.run()
    harness.run()
    assert harness.engine.batches == ["a", "b", "c"]
    assert harness.status(mixed, exact, *others) == [Status.SUCCEEDED] * 2 + [Status.IN_QUEUE] * 2


def test_no_job_joins_a_batch_before_one_that_was_skipped_too_often(harness):
    first, unlike, alike = harness.add("a"), harness.add("b", RECIPE), harness.add("c")
    with harness.store._lock:
        turn, _, arrival = harness.store._places[unlike.id]
        harness.store._places[unlike.id] = (turn, 0, arrival)
    harness.run()
    assert harness.engine.batches == ["a"]
    assert harness.status(first, unlike, alike) == [
        Status.SUCCEEDED,
        Status.IN_QUEUE,
        Status.IN_QUEUE,
    ]


def test_a_retried_job_is_made_alone(harness):
    """It may be a job that crashes the process, and would cost the others an attempt each time."""
    tried = [harness.add("a"), harness.add("b")]
    for job in tried:
        harness.store.claim("worker", harness.clock.now(), 1000)
        harness.store.abandon(job.id, 1, "its process died", harness.clock.now())
    harness.clock.seconds += 30  # the pause before a retry
    others = [harness.add("c"), harness.add("d")]
    for _ in range(3):
        harness.run()
    assert harness.engine.batches == ["c d", "a", "b"]
    assert harness.status(*tried, *others) == [Status.SUCCEEDED] * 4


def test_a_retried_job_does_not_join_a_batch(harness):
    tried = harness.add("a")
    harness.store.claim("worker", harness.clock.now(), 1000)
    harness.limits = replace(harness.limits, batch_wait_s=10)

    def while_waiting() -> None:
        if harness.status(tried) == [Status.IN_PROGRESS]:
            harness.store.abandon(tried.id, 1, "its process died", harness.clock.now())

    harness.while_waiting = while_waiting
    first = harness.add("b")
    assert harness.run().id == first.id
    assert harness.engine.batches == ["b"]
    assert harness.status(tried) == [Status.IN_QUEUE]


def test_a_cancelled_job_leaves_its_batch_at_once(harness):
    first, second = harness.add("a b"), harness.add("c")
    seen = {}

    def before_step(batch: int, step: int) -> None:
        seen[step] = harness.status(first, second)
        if step == 2:
            harness.store.cancel(first.id, harness.clock.now())

    harness.engine.before_step = before_step
    assert harness.run().id == first.id
    assert seen[3] == [Status.CANCELED, Status.IN_PROGRESS]
    assert harness.status(first, second) == [Status.CANCELED, Status.SUCCEEDED]
    assert (harness.engine.batches, harness.engine.steps) == (["a b c"], [4])
    assert harness.files() == harness.files_of(second)
    assert {report.job_id: (report.status, report.images) for report in harness.reports} == {
        first.id: ("canceled", 0), second.id: ("succeeded", 1),
    }  # fmt: skip
    # Every image has a third of the batch, even if the other images are discarded.
    assert harness.store.get(second.id).timings["denoise"] == 4


def test_a_batch_stops_when_all_its_jobs_are_cancelled(harness):
    jobs = [harness.add("a"), harness.add("b")]
    harness.engine.before_step = lambda batch, step: (
        step in (2, 3) and harness.store.cancel(jobs[step - 2].id, harness.clock.now())
    )
    harness.run()
    assert harness.status(*jobs) == [Status.CANCELED] * 2
    assert (harness.engine.batches, harness.engine.steps) == (["a b"], [2])
    assert harness.files() == []
    assert harness.run() is None


def test_a_job_that_exceeds_its_time_limit_leaves_its_batch(harness):
    """The first job waited for the second, and has less time left."""
    harness.engine.most = 2
    harness.limits = replace(harness.limits, lease_s=10_000, batch_wait_s=5000, timeout_s=5000)
    jobs = [harness.add("a")]

    def while_waiting() -> None:
        harness.clock.seconds += 4000
        jobs.append(harness.add("b"))

    def before_step(batch: int, step: int) -> None:
        harness.clock.seconds += 1500 * (step == 3)

    harness.while_waiting = while_waiting
    harness.engine.before_step = before_step
    harness.run()
    assert harness.engine.batches == ["a b"]
    assert harness.status(*jobs) == [Status.FAILED, Status.SUCCEEDED]
    error = harness.store.get(jobs[0].id).error
    assert error is not None
    assert error.code == "TIMEOUT"
    assert harness.files() == harness.files_of(jobs[1])


def test_a_batch_does_not_wait_by_default(harness):
    harness.add("a")
    harness.run()
    assert harness.waited == []


def test_a_batch_waits_for_jobs_while_it_has_room(harness):
    harness.engine.most = 3
    harness.limits = replace(harness.limits, batch_wait_s=500)
    harness.add("a")
    coming = iter(["b", "c", "d"])
    harness.while_waiting = lambda: harness.add(next(coming))
    harness.run()
    assert harness.engine.batches == ["a b c"]
    assert len(harness.waited) == 2
    assert harness.store.count(Status.IN_QUEUE) == 0
    harness.waited.clear()
    full = harness.add("e f g")
    assert harness.run().id == full.id
    assert harness.waited == []


def test_a_batch_waits_at_most_batch_wait_s(harness):
    harness.limits = replace(harness.limits, batch_wait_s=20)
    job = harness.add("a")
    harness.while_waiting = lambda: harness.store.abandon_expired(harness.clock.now())
    assert harness.run().status is Status.SUCCEEDED
    assert 0 < sum(harness.waited) <= 20
    harness.waited.clear()
    harness.add("b", RECIPE)
    harness.run()
    assert harness.waited == []
    assert harness.status(job) == [Status.SUCCEEDED]


def test_the_lease_lasts_while_a_batch_waits_for_jobs(harness):
    harness.limits = replace(harness.limits, lease_s=50, batch_wait_s=100)
    job = harness.add("a")

    def while_waiting() -> None:
        harness.clock.seconds += 20
        assert harness.store.abandon_expired(harness.clock.now()) == ()

    harness.while_waiting = while_waiting
    harness.run()
    assert len(harness.waited) > 1
    assert harness.status(job) == [Status.SUCCEEDED]


def test_a_real_engine_makes_several_jobs_in_one_batch(store, engine, clock, tmp_path, monkeypatch):
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
        "worker",
        store,
        engine,
        FolderImages(tmp_path),
        limits,
        now=clock.now,
        monotonic=clock.monotonic,
    ).run_next()
    assert batches == [3]
    outputs = [output for job in jobs for output in store.get(job.id).outputs]
    expected = original(recipes, lambda progress: None)
    for recipe, output, image in zip(recipes, outputs, expected, strict=True):
        assert Recipe.from_dict(read_record(output.file_path)["recipe"]) == recipe
        assert np.array_equal(np.asarray(Image.open(output.file_path)), image.pixels)
    assert all(progress.preview for job in jobs for progress in store.progress[job.id])
