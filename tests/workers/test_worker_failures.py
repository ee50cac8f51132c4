"""Errors, time limits and lost leases: which jobs they end, and which files remain."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import LORA
from tests.workers.worker_support import (
    DEADLINE_S,
    RECIPE,
    add,
    claimed_by_another,
    wait_for_prefetches,
    wait_for_writes,
)

from fidelora import AdapterRef
from fidelora.atomic import write_atomically
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
from fidelora.jobs.job import MAX_ATTEMPTS, Failure, Status
from fidelora.storage.images import FolderImages
from fidelora.workers.attempt import ImageFiles, WorkerLimits, error_code
from fidelora.workers.worker import Worker


def test_errors_have_codes():
    assert error_code(AdapterMismatchError()) == "ADAPTER_MISMATCH"
    assert error_code(WeightsFileError()) == "WEIGHTS_FILE"
    assert error_code(PickleRefusedError()) == "PICKLE_REFUSED"


def test_a_job_that_exceeds_its_time_limit_fails(store, engine, clock, tmp_path):
    limits = WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=10)
    worker = Worker(
        "worker",
        store,
        engine,
        FolderImages(tmp_path),
        limits,
        now=clock.now,
        monotonic=clock.monotonic,
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
    after = Worker("worker", store, engine, FolderImages(tmp_path)).run_next()
    assert after is not None
    assert after.status is Status.SUCCEEDED  # the engine is usable


def test_a_worker_that_lost_its_lease_leaves_the_job_alone(worker, store, clock, tmp_path):
    job = add(store, clock)

    def another_worker_claims(job_id: str) -> None:
        claimed_by_another(store, clock, job_id)

    store.at_get = {2: another_worker_claims}
    after = worker.run_next()
    assert (after.status, after.worker, after.epoch) == (Status.IN_PROGRESS, "another", 2)
    assert list(tmp_path.iterdir()) == []
    assert store.get(job.id) == after


@pytest.mark.parametrize(
    "error", [GenerationCancelled(), AdapterMismatchError(), ZeroDivisionError()], ids=str
)
def test_files_of_the_worker_that_has_the_lease_now_are_kept(
    worker, store, clock, tmp_path, monkeypatch, error
):
    """Worker 1 fails in image 2, after another worker claimed the job and wrote image 1."""
    job = add(store, clock, RECIPE, RECIPE)
    original, calls = worker._engine.generate, []

    def fails(recipe, on_step):
        calls.append(recipe)
        if len(calls) == 2:
            wait_for_writes(worker)
            claimed_by_another(store, clock, job.id)
            raise error
        return original(recipe, on_step)

    monkeypatch.setattr(worker._engine, "generate", fails)
    after = worker.run_next()
    assert (after.status, after.worker) == (Status.IN_PROGRESS, "another")
    assert [path.name for path in tmp_path.iterdir()] == [f"{job.id}_output_0.png"]


def test_an_unknown_adapter_fails_the_job(worker, store, clock):
    add(store, clock, replace(RECIPE, adapters=(AdapterRef("0" * 64, name="gone"),)))
    done = worker.run_next()
    assert (done.status, done.attempts) == (Status.FAILED, 1)
    assert done.error.code == "ADAPTER_NOT_FOUND"
    assert "gone" in done.error.message


def test_an_unexpected_error_costs_an_attempt_and_then_the_job(
    worker, store, clock, monkeypatch, tmp_path
):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("fidelora.engine.engine.sample", broken)
    add(store, clock)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        clock.seconds += 30  # the pause before a retry
        after = worker.run_next()
        assert after.attempts == attempt
    assert after.status is Status.FAILED
    assert after.error == Failure(
        "WORKER_LOST",
        "Given up after 3 attempts; the last one ended because of an unexpected "
        "ZeroDivisionError: division by zero.",
    )
    monkeypatch.undo()
    add(store, clock)
    assert worker.run_next().status is Status.SUCCEEDED


def test_a_full_disk_pauses_the_worker(store, engine, clock, monkeypatch, tmp_path):
    """The job returns to the queue without a failed attempt, and no file remains."""
    calls: list[int] = []
    pauses: list[str] = []
    worker = Worker(
        "worker",
        store,
        engine,
        FolderImages(tmp_path),
        WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=1000),
        on_pause=pauses.append,
        now=clock.now,
        monotonic=clock.monotonic,
    )

    def fail_from_the_second_image_on(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # a file and its folder for the first image
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_from_the_second_image_on)
    add(store, clock, RECIPE, RECIPE)
    back = worker.run_next()
    assert back is not None
    assert (back.status, back.attempts, back.error) == (Status.IN_QUEUE, 0, None)
    assert list(tmp_path.iterdir()) == []
    assert len(pauses) == 1
    assert "No space left on device" in pauses[0]
    for _ in range(20):  # each reads the clock, which advances by a second
        assert worker.run_next() is None
    assert list(tmp_path.iterdir()) == []
    assert len(pauses) == 1
    monkeypatch.undo()
    done = next(filter(None, (worker.run_next() for _ in range(20))))
    assert (done.id, done.status) == (back.id, Status.SUCCEEDED)
    assert len(list(tmp_path.iterdir())) == 2
    assert pauses[1:] == [""]


def test_a_failed_write_ends_the_job_at_the_next_step(harness, disk):
    job = harness.add("a b", RECIPE)
    worker = harness.worker()
    disk.error = OutputError("There is no space left.")

    def before_step(batch: int, step: int) -> None:
        if (batch, step) == (2, 2):
            disk.allowed.set()
            wait_for_writes(worker)

    harness.engine.before_step = before_step
    done = worker.run_next()
    assert (done.id, done.status, done.error) == (
        job.id,
        Status.FAILED,
        Failure("OUTPUT", "There is no space left."),
    )
    assert harness.engine.steps == [4, 1]


@pytest.mark.parametrize("how", ["cancelled", "failed", "exits"])
def test_files_still_being_written_when_a_job_ends_are_removed(harness, disk, monkeypatch, how):
    job = harness.add("a b c", RECIPE)
    stop = ImageFiles.stop

    def stops(files: ImageFiles) -> None:
        disk.allowed.set()  # not before, so that code that does not wait finds no file to remove
        stop(files)

    def before_step(batch: int, step: int) -> None:
        if (batch, step) == (3, 2):
            assert disk.started.wait(DEADLINE_S)
            if how == "cancelled":
                harness.store.cancel(job.id, harness.clock.now())
            else:
                raise NumericsError if how == "failed" else SystemExit(0)

    monkeypatch.setattr(ImageFiles, "stop", stops)
    harness.engine.before_step = before_step
    worker = harness.worker()
    if how == "exits":
        with pytest.raises(SystemExit):
            worker.run_next()
    else:
        worker.run_next()
    expected = {
        "cancelled": Status.CANCELED,
        "failed": Status.FAILED,
        "exits": Status.IN_QUEUE,
    }
    assert harness.status(job) == [expected[how]]
    wait_for_writes(worker)
    assert harness.files() == []
    assert disk.files == harness.files_of(job)[:1]  # queued writes never start


def test_a_failed_prefetch_fails_only_the_job_that_needs_the_adapter(harness):
    first, second = (
        harness.add("a"),
        harness.add("b", replace(RECIPE, adapters=(AdapterRef("0" * 64, name="gone"),))),
    )
    worker = harness.worker()
    harness.engine.before_step = lambda batch, step: wait_for_prefetches(worker)
    worker.run_next()
    assert harness.status(first, second) == [Status.SUCCEEDED, Status.IN_QUEUE]
    assert worker.run_next().error.code == "ADAPTER_NOT_FOUND"


def test_an_unexpected_prefetch_error_is_logged_and_ignored(harness, monkeypatch, caplog):
    def broken(ref: AdapterRef) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(harness.engine.adapters, "prefetch", broken)
    first = harness.add("a")
    harness.add("b", replace(RECIPE, adapters=(AdapterRef.from_file(LORA),)))
    worker = harness.worker()
    harness.engine.before_step = lambda batch, step: wait_for_prefetches(worker)
    worker.run_next()
    assert harness.status(first) == [Status.SUCCEEDED]
    assert "prefetching the adapter" in caplog.text
    harness.engine.before_step = lambda batch, step: None
    assert worker.run_next().status is Status.SUCCEEDED


def test_jobs_survive_a_store_that_fails_for_long(harness):
    """The worker gives them up, and returns them to the queue as soon as the store works."""
    jobs = [harness.add("a"), harness.add("b")]
    worker = harness.worker()

    def broken(batch: int, step: int) -> None:
        raise JobStoreError

    harness.engine.before_step = broken
    with pytest.raises(JobStoreError):
        worker.run_next()
    assert harness.engine.batches == ["a b"]
    assert harness.status(*jobs) == [Status.IN_PROGRESS] * 2
    harness.engine.before_step = lambda batch, step: None
    worker.run_next()
    assert harness.status(*jobs) == [Status.SUCCEEDED] * 2
    assert {harness.store.get(each.id).attempts for each in jobs} == {1}
    assert harness.files() == harness.files_of(*jobs)


def failing(method: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Return a method of a store that fails for its first calls."""
    left = iter(range(times))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is not None:
            raise JobStoreError
        return method(*args, **kwargs)

    return call


@pytest.mark.parametrize("method", ["get", "renew"])
def test_steps_continue_while_the_store_fails(harness, method):
    job = harness.add("a")
    worker = harness.worker()

    def before_step(batch: int, step: int) -> None:
        if step == 2:
            setattr(harness.store, method, failing(getattr(harness.store, method), 2))

    harness.engine.before_step = before_step
    assert worker.run_next().status is Status.SUCCEEDED
    assert harness.engine.steps == [4]
    assert harness.files() == harness.files_of(job)


@pytest.mark.parametrize("method", ["succeed", "fail", "abandon"])
def test_results_are_stored_when_the_store_works_again(harness, method):
    job = harness.add("a")
    errors = {"fail": NumericsError(), "abandon": ZeroDivisionError()}
    harness.engine.bad = {"a": errors[method]} if method in errors else {}
    setattr(harness.store, method, failing(getattr(harness.store, method), 30))
    ends = {"succeed": Status.SUCCEEDED, "fail": Status.FAILED, "abandon": Status.IN_QUEUE}
    assert harness.run().status is ends[method]
    assert harness.waited == [1.0] * 30
    assert harness.files() == (harness.files_of(job) if method == "succeed" else [])


def test_a_claim_whose_answer_was_lost_is_released(harness):
    job = harness.add("a")
    claim = harness.store.claim

    def answer_is_lost(*args: Any, **kwargs: Any) -> None:
        claim(*args, **kwargs)
        raise JobStoreError

    worker = harness.worker()
    harness.store.claim = answer_is_lost
    with pytest.raises(JobStoreError):
        worker.run_next()
    assert harness.status(job) == [Status.IN_PROGRESS]
    harness.store.claim = claim
    assert worker.run_next().status is Status.SUCCEEDED


def test_a_worker_reports_how_long_each_part_may_take(harness):
    """After a step of 100 seconds, the allowance grows, but not beyond three leases."""
    harness.limits = replace(harness.limits, lease_s=60, timeout_s=5000, load_s=1800)
    beats: list[float] = []
    leases: list[float] = []
    renew = harness.store.renew

    def renewed(job_id: str, epoch: int, progress: Any, now: Any, lease_s: float) -> Any:
        leases.append(lease_s)
        return renew(job_id, epoch, progress, now, lease_s)

    def before_step(batch: int, step: int) -> None:
        harness.clock.seconds += 2 if step == 1 else 100

    harness.store.renew = renewed
    harness.engine.before_step = before_step
    harness.add("a")
    worker = harness.worker()
    main = threading.current_thread()

    def beat(seconds: float) -> None:
        if threading.current_thread() is main:  # another thread beats during the load
            beats.append(seconds)

    worker._beat = beat
    worker.run_next()
    # idle, load, first step, after a step of about 5 s, after 100 s twice, decoding
    assert beats == [60, 180, 180, 60, 180, 180, 180]
    assert leases == [1800, 180, 60, 180, 180, 180, 60]


def test_an_error_in_max_batch_ends_the_job_and_not_the_worker(harness):
    job = harness.add("a")
    harness.engine.max_batch = lambda recipe: 1 // 0
    assert harness.run().attempts == 1
    assert harness.status(job) == [Status.IN_QUEUE]


@pytest.mark.parametrize(
    "error",
    [NumericsError(), ZeroDivisionError("division by zero")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_one_job_in_a_batch_does_not_fail_the_others(harness, error):
    jobs = [harness.add("a"), harness.add("bad worse"), harness.add("c")]
    harness.engine.bad = {"worse": error}
    harness.run()
    assert harness.engine.batches == ["a bad worse c", "a", "bad worse", "c"]
    expected = Status.FAILED if isinstance(error, NumericsError) else Status.IN_QUEUE
    assert harness.status(*jobs) == [Status.SUCCEEDED, expected, Status.SUCCEEDED]
    failed = harness.store.get(jobs[1].id)
    assert failed.attempts == 1
    if failed.error:
        assert failed.error.code == "NUMERICS"
    assert harness.files() == harness.files_of(jobs[0], jobs[2])
    assert sorted((report.job_id, report.images) for report in harness.reports) == sorted(
        (job.id, images) for job, images in zip(jobs, (1, 0, 1), strict=True)
    )


@pytest.mark.parametrize("steps", [2, 4], ids=["among steps", "at the end"])
def test_an_error_in_one_jobs_heartbeat_ends_only_that_job(harness, steps):
    first, second, third = harness.add("a"), harness.add("b"), harness.add("c")
    renew = harness.store.renew

    def fails(job_id, epoch, progress, now, lease_s):
        if job_id == second.id and harness.engine.steps == [steps]:
            raise ZeroDivisionError
        return renew(job_id, epoch, progress, now, lease_s)

    harness.store.renew = fails
    harness.run()
    assert harness.engine.batches == ["a b c"]
    assert harness.status(first, second, third) == [
        Status.SUCCEEDED,
        Status.IN_QUEUE,
        Status.SUCCEEDED,
    ]
    assert harness.store.get(second.id).attempts == 1
    assert harness.files() == harness.files_of(first, third)


def test_jobs_that_wait_after_a_failed_batch_keep_leases_and_can_cancel(harness):
    """Each step is shorter than a lease, but all steps together are longer."""
    harness.limits = replace(harness.limits, lease_s=60, timeout_s=400)
    jobs = [harness.add(prompt) for prompt in ("bad", "b", "c")]
    harness.engine.bad = {"bad": NumericsError()}
    seen = []

    def before_step(batch: int, step: int) -> None:
        harness.clock.seconds += 40
        assert harness.store.abandon_expired(harness.clock.now()) == ()
        if (batch, step) == (2, 1):
            harness.store.cancel(jobs[2].id, harness.clock.now())
        if (batch, step) == (2, 2):
            seen.append(harness.status(jobs[2]))

    harness.engine.before_step = before_step
    harness.run()
    assert harness.engine.batches == ["bad b c", "bad", "b"]
    assert seen == [[Status.CANCELED]]
    assert harness.status(*jobs) == [Status.FAILED, Status.SUCCEEDED, Status.CANCELED]


def test_a_job_of_a_batch_that_another_worker_claimed_is_left_alone(harness):
    first, second = harness.add("a"), harness.add("b")
    theirs = harness.folder / harness.files_of(first)[0]

    def before_step(batch: int, step: int) -> None:
        if step == 2:
            claimed_by_another(harness.store, harness.clock, first.id)
            theirs.write_bytes(b"theirs")

    harness.engine.before_step = before_step
    after = harness.run()
    assert (after.id, after.status, after.worker, after.epoch) == (
        first.id,
        Status.IN_PROGRESS,
        "another",
        2,
    )
    assert harness.status(second) == [Status.SUCCEEDED]
    assert harness.files() == harness.files_of(first, second)
    assert theirs.read_bytes() == b"theirs"
    assert [report.job_id for report in harness.reports] == [second.id]


def test_a_lease_lost_right_before_writing_leaves_the_files_unwritten(harness):
    first, second = harness.add("a"), harness.add("b")
    renew = harness.store.renew

    def lost_at_the_end(job_id, epoch, progress, now, lease_s):
        if job_id == first.id and harness.engine.steps == [4]:
            raise LeaseLostError
        return renew(job_id, epoch, progress, now, lease_s)

    harness.store.renew = lost_at_the_end
    harness.run()
    assert harness.status(second) == [Status.SUCCEEDED]
    assert harness.files() == harness.files_of(second)


def test_a_failed_write_fails_only_its_own_job(harness, monkeypatch):
    first, second = harness.add("a"), harness.add("b")

    def fail_for_the_first(path: Path, content: bytes) -> None:
        if first.id in path.name:
            raise OutputError("There is no space left.")
        write_atomically(path, content)

    monkeypatch.setattr("fidelora.storage.images.write_atomically", fail_for_the_first)
    harness.run()
    assert harness.engine.batches == ["a b"]
    assert harness.status(first, second) == [Status.FAILED, Status.SUCCEEDED]
    assert harness.files() == harness.files_of(second)
