"""The contract of `JobStore` for every store: life cycle of a job, leases and workers."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from tests.jobs.store_support import (
    LEASE_S,
    NOW,
    OUTPUT,
    A,
    B,
    is_listening,
    job,
    later,
    running,
    until,
)

from fidelora import AdapterRef, Recipe
from fidelora.errors import FideloraError, JobNotFoundError, LeaseLostError, RecipeError
from fidelora.families import all_families
from fidelora.jobs.codec import DOCUMENT_FORMAT
from fidelora.jobs.job import MAX_ATTEMPTS, Failure, Job, JobProgress, Status, new_job
from fidelora.jobs.store import WORKER_ALIVE_S, WORKER_LOST_S, WorkerState


def test_a_job_is_stored_as_it_was_added(store):
    recipes = (
        Recipe(prompt="süß 🎉", adapters=(AdapterRef(A, 0.5, name="sks"),), seed=2**63 - 1),
        Recipe(prompt="", guidance_scale=0.1, sampler="lcm"),
    )
    added = store.add(new_job(recipes, NOW, image_format="webp"))
    assert store.get(added.id) == added
    assert store.get(added.id).recipes == recipes
    assert (added.status, added.attempts, added.version) == (Status.IN_QUEUE, 0, 1)


def device_job(kind: str, *adapters: str) -> Job:
    return replace(job(*adapters), device_kind=kind)


def test_jobs_for_another_kind_of_device_are_left(store):
    """They do not delay the others, not even at the head of the queue."""
    cuda, anywhere, cpu = (store.add(device_job(kind, A)) for kind in ("cuda", "", "cpu"))
    assert store.get(cuda.id).device_kind == "cuda"

    def claim(kind: str, **options: Any) -> Any:
        return store.claim("worker", NOW, LEASE_S, device_kind=kind, **options)

    for options in ({}, {"loaded": [A]}, {"merged": [A]}, {"matches": lambda _: True}):
        first = claim("cpu", **options)
        assert first is not None
        assert first.id == anywhere.id
        store.release(first.id, first.epoch, NOW)
    assert [one.id for one in iter(lambda: claim("mps"), None)] == [anywhere.id]
    assert [one.id for one in iter(lambda: claim("cpu"), None)] == [cpu.id]
    assert claim("") is None
    assert [one.id for one in iter(lambda: claim("cuda"), None)] == [cuda.id]


def test_a_retry_stays_with_its_kind_of_device(store):
    store.add(device_job("cuda"))
    first = store.claim("worker", NOW, LEASE_S, device_kind="cuda")
    assert first is not None
    store.abandon(first.id, first.epoch, "of a test", NOW)
    for _ in range(20):  # claims, after which the retry is due
        assert store.claim("worker", later(600), LEASE_S, device_kind="cpu") is None
    again = store.claim("worker", later(600), LEASE_S, device_kind="cuda")
    assert again is not None
    assert again.id == first.id


def test_an_unknown_job_raises(store):
    with pytest.raises(JobNotFoundError):
        store.get("0" * 32)
    with pytest.raises(JobNotFoundError):
        store.cancel("0" * 32, NOW)
    with pytest.raises(JobNotFoundError):
        store.renew("0" * 32, 1, None, NOW, LEASE_S)
    assert store.queue_position("0" * 32) is None


def test_jobs_are_claimed_in_order_of_arrival(store):
    added = [store.add(job()) for _ in range(4)]
    assert [store.queue_position(each.id) for each in added] == [0, 1, 2, 3]
    for place, expected in enumerate(added):
        claimed = store.claim("worker", later(place), LEASE_S)
        assert claimed is not None
        assert claimed.id == expected.id
        assert (claimed.status, claimed.epoch, claimed.attempts, claimed.worker) == (
            Status.IN_PROGRESS,
            1,
            1,
            "worker",
        )
        assert (claimed.started_at, claimed.lease_expires_at) == (
            later(place),
            later(place + LEASE_S),
        )
        assert store.get(claimed.id) == claimed
        assert store.queue_position(claimed.id) is None
    assert store.claim("worker", NOW, LEASE_S) is None


def test_the_notes_of_a_job_are_stored(store):
    added = store.add(new_job((Recipe(prompt="a ball"),), NOW, notes=("a note", "another")))
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed is not None
    assert store.get(added.id).notes == claimed.notes == ("a note", "another")


def test_a_succeeded_job_has_its_outputs(store):
    claimed = running(store)
    done = store.succeed(claimed.id, claimed.epoch, [OUTPUT], {"denoise": 1.5}, later(2))
    assert store.get(claimed.id) == done
    assert (done.status, done.outputs, done.timings, done.finished_at) == (
        Status.SUCCEEDED,
        (OUTPUT,),
        {"denoise": 1.5},
        later(2),
    )
    assert (done.worker, done.lease_expires_at) == ("", None)


def test_a_failed_job_has_its_error(store):
    claimed = running(store)
    failed = store.fail(
        claimed.id, claimed.epoch, Failure("LORA_MISMATCH", "It does not fit."), later(2)
    )
    assert (store.get(claimed.id).status, failed.error) == (
        Status.FAILED,
        Failure("LORA_MISMATCH", "It does not fit."),
    )


def test_a_heartbeat_renews_the_lease_and_keeps_the_last_progress(store):
    claimed = running(store)
    progress = JobProgress(image=1, images=2, step=5, steps=20, eta_s=7.5)
    store.renew(claimed.id, 1, progress, later(10), LEASE_S)
    renewed = store.renew(claimed.id, 1, None, later(20), LEASE_S)
    assert (renewed.progress, renewed.lease_expires_at) == (progress, later(20 + LEASE_S))
    assert renewed.progress is not None
    assert renewed.progress.fraction == (1 + 5 / 20) / 2


def test_a_queued_job_is_canceled_at_once(store):
    added = store.add(job())
    canceled = store.cancel(added.id, later(1))
    assert (canceled.status, canceled.finished_at, canceled.started_at) == (
        Status.CANCELED,
        later(1),
        None,
    )
    assert store.claim("worker", NOW, LEASE_S) is None


def test_a_running_job_stops_after_a_cancel_request(store):
    claimed = running(store)
    assert store.cancel(claimed.id, later(1)).status is Status.IN_PROGRESS
    assert store.renew(claimed.id, 1, None, later(2), LEASE_S).cancel_requested
    assert store.stop(claimed.id, 1, later(3)).status is Status.CANCELED


def test_a_job_can_succeed_after_a_cancel_request(store):
    claimed = running(store)
    store.cancel(claimed.id, later(1))
    assert store.succeed(claimed.id, 1, [OUTPUT], {}, later(2)).status is Status.SUCCEEDED


def test_canceling_twice_or_after_the_end_changes_nothing(store):
    claimed = running(store)
    once = store.cancel(claimed.id, later(1))
    assert store.cancel(claimed.id, later(2)) == once
    done = store.stop(claimed.id, 1, later(3))
    assert store.cancel(claimed.id, later(4)) == done


def test_a_worker_whose_lease_expired_cannot_report(store):
    claimed = running(store)
    assert store.abandon_expired(later(LEASE_S - 1)) == ()
    (back,) = store.abandon_expired(later(LEASE_S))
    assert (back.status, back.attempts, back.progress) == (Status.IN_QUEUE, 1, None)
    assert store.claim("another", later(LEASE_S + 1), LEASE_S) is None  # the pause before a retry
    again = store.claim("another", later(LEASE_S + 2), LEASE_S)
    assert again is not None
    assert (again.id, again.epoch, again.attempts, again.started_at) == (claimed.id, 2, 2, NOW)
    for report in (
        lambda: store.succeed(claimed.id, 1, [OUTPUT], {}, later(40)),
        lambda: store.fail(claimed.id, 1, Failure("X", "x"), later(40)),
        lambda: store.renew(claimed.id, 1, None, later(40), LEASE_S),
        lambda: store.stop(claimed.id, 1, later(40)),
        lambda: store.release(claimed.id, 1, later(40)),
        lambda: store.abandon(claimed.id, 1, "it died", later(40)),
    ):
        with pytest.raises(LeaseLostError):
            report()
    assert store.get(claimed.id) == again
    assert store.succeed(claimed.id, 2, [OUTPUT], {}, later(41)).status is Status.SUCCEEDED


def test_a_job_fails_with_the_reason_after_the_last_attempt(store):
    added = store.add(job())
    for attempt in range(1, MAX_ATTEMPTS + 1):
        now = later(100 * attempt)
        claimed = store.claim("worker", now, LEASE_S)
        assert claimed is not None
        after = store.abandon(added.id, claimed.epoch, "the process was killed by signal 9", now)
        assert after.status is (Status.FAILED if attempt == MAX_ATTEMPTS else Status.IN_QUEUE)
    assert after.error == Failure(
        "WORKER_LOST",
        "Given up after 3 attempts; the last one ended because the process was killed by signal 9.",
    )


def test_a_released_job_keeps_its_attempts(store):
    for _ in range(MAX_ATTEMPTS + 2):
        claimed = store.claim("worker", NOW, LEASE_S) or running(store)
        back = store.release(claimed.id, claimed.epoch, later(1))
        assert (back.status, back.attempts) == (Status.IN_QUEUE, 0)


def test_live_workers_are_listed_with_their_state(store):
    busy = WorkerState("busy", "cuda:0", "1.2", frozenset({A, B}), frozenset({A}))
    busy = replace(busy, models=("sdxl", "sd15"))
    idle = WorkerState("idle", "cpu", "1.1", idle_since=NOW)
    for state in (idle, busy):
        store.report_worker(state, NOW)
    assert store.workers(later(1)) == (
        replace(busy, reported_at=NOW),
        replace(idle, reported_at=NOW),
    )
    changed = replace(busy, loaded=frozenset({B}), merged=frozenset())
    store.report_worker(changed, later(10))
    assert store.workers(later(WORKER_ALIVE_S)) == (replace(changed, reported_at=later(10)),)
    store.remove_worker("busy")
    assert store.workers(later(WORKER_ALIVE_S)) == ()


def test_a_job_of_a_silent_worker_is_abandoned_before_its_lease_ends(store):
    store.add(job())
    store.add(job())
    store.report_worker(WorkerState("silent"), NOW)
    lost = store.claim("silent", NOW, 10 * WORKER_LOST_S)
    never_reported = store.claim("another", NOW, 10 * WORKER_LOST_S)
    assert store.abandon_expired(later(WORKER_LOST_S - 1)) == ()
    assert store.abandon_expired(later(WORKER_LOST_S), spare={"silent"}) == ()
    (back,) = store.abandon_expired(later(WORKER_LOST_S))
    assert (back.id, store.get(never_reported.id)) == (lost.id, never_reported)


def test_running_jobs_are_found_by_the_name_of_their_worker(store):
    first, second, _ = [store.add(job()) for _ in range(3)]
    for name in ("pool_1/0-1", "pool_12/0-1"):
        store.claim(name, NOW, LEASE_S)
    assert [each.id for each in store.running("pool_1/")] == [first.id]
    assert [each.id for each in store.running("pool_12/0-1")] == [second.id]
    assert store.running("pool%") == ()


def test_a_cancel_request_is_noticed(store):
    claimed = running(store)
    assert not store.cancel_requested(claimed.id)
    until(lambda: is_listening(store))
    store.cancel(claimed.id, later(1))
    until(lambda: store.cancel_requested(claimed.id))


def test_a_new_job_wakes_the_workers(store):
    wakes: list[object] = []
    store.on_new_job(wakes.append)
    until(lambda: is_listening(store))
    store.add(job())
    until(lambda: len(wakes) == 1)
    claimed = store.claim("worker", NOW, LEASE_S)
    store.release(claimed.id, claimed.epoch, NOW)
    until(lambda: len(wakes) == 2)


def test_jobs_of_workers_that_are_alive_are_not_abandoned(store):
    store.add(job())
    store.add(job())
    alive, silent = store.claim("a", NOW, LEASE_S), store.claim("b", NOW, LEASE_S)
    (back,) = store.abandon_expired(later(86_400), spare={"a"})
    assert (back.id, store.get(alive.id)) == (silent.id, alive)


@pytest.mark.parametrize("way", ["release", "abandon", "expire"])
def test_a_job_with_a_cancel_request_is_not_retried(store, way):
    claimed = running(store)
    store.cancel(claimed.id, NOW)
    if way == "release":
        after = store.release(claimed.id, 1, later(1))
    elif way == "abandon":
        after = store.abandon(claimed.id, 1, "it died", later(1))
    else:
        (after,) = store.abandon_expired(later(LEASE_S))
    assert after.status is Status.CANCELED


def test_a_job_needs_a_recipe_and_an_aware_time():
    with pytest.raises(RecipeError):
        new_job((), NOW)
    with pytest.raises(FideloraError, match="aware"):
        new_job((Recipe(prompt=""),), datetime(2026, 1, 1))


def test_new_recipe_fields_and_models_need_a_new_document_format():
    """Workers of older versions cannot read a new field of a recipe, or make a new model's images.

    If this fails, increase `DOCUMENT_FORMAT` by one, and put the new digest here.
    """
    fields = sorted({one.name for kind in (Recipe, AdapterRef) for one in dataclasses.fields(kind)})
    words = [*fields, *sorted(all_families())]
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
    assert (DOCUMENT_FORMAT, digest) == (3, "b2e7d83b68f4ae5e")
