"""Tests of the `JobStore` interface for every store, and of the SQL store's durability."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fidelora import AdapterRef, Recipe
from fidelora.errors import (
    CursorError,
    FideloraError,
    IdempotencyConflictError,
    JobError,
    JobNotFoundError,
    JobStoreError,
    LeaseLostError,
    QueueFullError,
    RecipeError,
)
from fidelora.families import all_families
from fidelora.jobs.codec import DOCUMENT_FORMAT, document_of
from fidelora.jobs.database import wal_is_safe
from fidelora.jobs.job import MAX_ATTEMPTS, Failure, Job, JobProgress, Output, Status, new_job
from fidelora.jobs.memory import MemoryStore
from fidelora.jobs.queue_order import MAX_PASSED_OVER
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import (
    WORKER_ALIVE_S,
    WORKER_LOST_S,
    JobChanges,
    JobStore,
    Submission,
    WorkerState,
)

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
LEASE_S = 30.0
A, B = "a" * 64, "b" * 64
OUTPUT = Output("out/x_output_0.png", "png", 512, 512, 42, "c" * 64, 1234)


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def job(*adapters: str, prompt: str = "a ball", owner: str = "", device_kind: str = "") -> Job:
    recipe = Recipe(prompt=prompt, adapters=tuple(AdapterRef(sha256) for sha256 in adapters))
    return new_job((recipe,), NOW, owner=owner, device_kind=device_kind)


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request, tmp_path):
    made: JobStore = MemoryStore()
    if request.param == "sqlite":
        made = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    elif request.param == "postgresql":
        made = SqlStore(request.getfixturevalue("postgres_url"))
    yield made
    made.close()


def running(store: JobStore, *adapters: str) -> Job:
    store.add(job(*adapters))
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed is not None
    return claimed


@pytest.mark.skipif(os.name != "posix", reason="files have no such modes")
def test_only_the_owner_can_read_the_database(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.touch(0o644)  # made by an older version
    made = SqlStore(f"sqlite:///{path}")
    made.add(job())
    modes = {one.name: one.stat().st_mode & 0o777 for one in tmp_path.iterdir()}
    made.close()
    assert "jobs.sqlite" in modes
    assert set(modes.values()) == {0o600}


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


def abandoned(store: JobStore, at: datetime) -> Job:
    """Return a job back in the queue whose attempt failed at this time."""
    claimed = store.claim("worker", at, LEASE_S)
    assert claimed is not None
    return store.abandon(claimed.id, claimed.epoch, "it died", at)


def test_a_job_with_a_failed_attempt_follows_all_others(store):
    failed, *others = [store.add(job()) for _ in range(3)]
    assert abandoned(store, NOW).id == failed.id
    assert [store.queue_position(each.id) for each in (*others, failed)] == [0, 1, 2]
    assert store.peek().id == others[0].id
    claimed = [store.claim("worker", later(1000), LEASE_S).id for _ in range(3)]
    assert claimed == [each.id for each in (*others, failed)]


def test_the_pause_before_a_retry_grows(store):
    store.add(job())
    pauses, now = [], NOW
    for _ in range(MAX_ATTEMPTS - 1):
        back = abandoned(store, now)
        assert back.retry_at is not None
        pauses.append((back.retry_at - now).total_seconds())
        assert store.claim("worker", now + timedelta(seconds=pauses[-1] - 0.1), LEASE_S) is None
        assert store.peek().id == back.id
        now = back.retry_at
    assert pauses == [2, 20]


@pytest.mark.parametrize("matches", [False, True])
def test_a_retry_waits_for_a_limited_number_of_other_jobs(store, matches):
    failed = store.add(job(A))
    abandoned(store, NOW)
    others = [store.add(job(A)).id for _ in range(MAX_PASSED_OVER + 1)]
    claims = [
        store.claim("worker", later(5), LEASE_S, matches=needs(A) if matches else None)
        for _ in range(MAX_PASSED_OVER + 2)
    ]
    expected = [*others[:MAX_PASSED_OVER], failed.id, others[MAX_PASSED_OVER]]
    assert [each.id for each in claims] == expected


def test_many_jobs_that_kill_their_worker_do_not_hide_the_others(store):
    for number in range(120):  # more than a claim reads
        store.add(job(prompt=str(number)))
        abandoned(store, NOW)
    good = store.add(job())
    assert store.claim("worker", later(1), LEASE_S).id == good.id
    assert store.claim("worker", later(1), LEASE_S) is None


def test_a_retry_does_not_wait_for_a_clock_that_was_put_back(store):
    store.add(job())
    back = abandoned(store, later(86_400))
    assert store.claim("worker", NOW, LEASE_S).id == back.id


def test_a_released_retry_is_still_a_retry(store):
    retry = store.add(job())
    abandoned(store, NOW)
    claimed = store.claim("worker", later(2), LEASE_S)
    back = store.release(claimed.id, claimed.epoch, later(3))
    assert (back.attempts, back.retry_at) == (1, None)
    fresh = store.add(job())
    claims = [store.claim("worker", later(3), LEASE_S).id for _ in range(2)]
    assert claims == [fresh.id, retry.id]


def test_positions_agree_for_retries_and_several_owners(store):
    retry, *_ = [store.add(job(owner=owner)) for owner in ("", "a", "a", "b")]
    abandoned(store, NOW)
    ids = [each.id for each in store.list().jobs]
    read = store.read_changes(dict.fromkeys(ids, 0))
    assert read.positions == {each: store.queue_position(each) for each in ids}
    assert sorted(read.positions.values()) == [0, 1, 2, 3]
    assert read.positions[retry.id] == 3
    claims = [store.claim("worker", later(5), LEASE_S) for _ in range(4)]
    assert [read.positions[each.id] for each in claims] == [0, 1, 2, 3]


def test_owners_take_turns(store):
    many = [store.add(job(owner="a")) for _ in range(6)]
    assert store.claim("worker", NOW, LEASE_S).id == many[0].id
    few = [store.add(job(owner="b")) for _ in range(2)]
    claims = [store.claim("worker", NOW, LEASE_S).id for _ in range(7)]
    expected = [many[1], few[0], many[2], few[1], *many[3:]]
    assert claims == [each.id for each in expected]


def test_overdue_jobs_of_a_long_queue_wait_for_their_owners_turn(store):
    """Jobs of the long queue that are over their limit do not go before the turn of others."""
    for _ in range(4 * MAX_PASSED_OVER):
        store.add(job(owner="a"))
    for _ in range(2):
        store.claim("worker", NOW, LEASE_S)
    others = [store.add(job(owner="b")).id for _ in range(2 * MAX_PASSED_OVER)]
    claims = [store.claim("worker", NOW, LEASE_S).id for _ in range(4 * MAX_PASSED_OVER)]
    assert [each in others for each in claims] == [False, True] * (2 * MAX_PASSED_OVER)


def test_the_limit_grows_with_the_number_of_live_workers(store):
    for name in ("w1", "w2", "w3"):
        store.report_worker(WorkerState(name), NOW)
    store.report_worker(WorkerState("dead"), later(-WORKER_ALIVE_S))
    oldest = store.add(job(A), now=NOW)
    for _ in range(4 * MAX_PASSED_OVER):
        store.add(job(B), now=NOW)
    claims = [
        store.claim("w1", NOW, LEASE_S, loaded=[B]).id for _ in range(3 * MAX_PASSED_OVER + 1)
    ]
    assert claims.index(oldest.id) == 3 * MAX_PASSED_OVER


@pytest.mark.parametrize("adapters", [(A,), (A, B)])
def test_a_job_is_held_for_the_worker_that_has_its_adapters(store, adapters):
    store.add(job(*adapters), now=NOW)
    store.report_worker(WorkerState("home", loaded=frozenset(adapters)), NOW)
    store.report_worker(WorkerState("other", loaded=frozenset({"d" * 64})), NOW)
    assert store.claim("other", later(0.4), LEASE_S, hold_s=0.5) is None
    claimed = store.claim("home", later(0.4), LEASE_S, loaded=adapters, hold_s=0.5)
    assert claimed is not None


@pytest.mark.parametrize("why", ["time", "no_home", "home_is_dead", "own_home", "no_hold"])
def test_a_job_is_not_held_longer_or_for_a_dead_worker(store, why):
    store.add(job(A), now=NOW)
    seconds, home = 0.4, "other" if why == "own_home" else "home"
    if why == "time":
        seconds = 0.6
    if why != "no_home":
        at = later(-WORKER_ALIVE_S) if why == "home_is_dead" else NOW
        store.report_worker(WorkerState(home, loaded=frozenset({A})), at)
    hold_s = 0.0 if why == "no_hold" else 0.5
    assert store.claim("other", later(seconds), LEASE_S, hold_s=hold_s) is not None


def test_a_held_job_does_not_hold_the_others(store):
    store.report_worker(WorkerState("home", loaded=frozenset({A})), NOW)
    held, free = store.add(job(A), now=NOW), store.add(job(B), now=NOW)
    assert store.claim("other", NOW, LEASE_S, hold_s=0.5).id == free.id
    assert store.claim("other", NOW, LEASE_S, hold_s=0.5) is None
    assert store.claim("other", later(1), LEASE_S, hold_s=0.5).id == held.id


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


def is_listening(store: JobStore) -> bool:
    """True unless the store is about to connect for notifications."""
    listener = store._notifications._listener if isinstance(store, SqlStore) else None
    return listener is None or listener.listening.is_set()


def until(condition: Callable[[], bool]) -> None:
    """Wait until another thread has made the condition true."""
    pause, end = threading.Event(), time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        pause.wait(0.01)


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


def test_jobs_with_loaded_adapters_go_first_up_to_the_limit(store):
    oldest = store.add(job(A))
    warm = [store.add(job(B)) for _ in range(MAX_PASSED_OVER + 3)]
    claimed = []
    for _ in range(MAX_PASSED_OVER + 2):
        next_job = store.claim("worker", NOW, LEASE_S, loaded=[B])
        assert next_job is not None
        claimed.append(next_job.id)
    expected = [each.id for each in warm[:MAX_PASSED_OVER]] + [oldest.id, warm[MAX_PASSED_OVER].id]
    assert claimed == expected


def test_the_limit_holds_for_jobs_in_between(store):
    first, second = store.add(job(A)), store.add(job("d" * 64))
    warm = [store.add(job(B)) for _ in range(MAX_PASSED_OVER)]
    for each in warm:
        claimed = store.claim("worker", NOW, LEASE_S, loaded=[B])
        assert claimed is not None
        assert claimed.id == each.id
    store.add(job(B))
    for expected in (first, second):
        claimed = store.claim("worker", NOW, LEASE_S, loaded=[B])
        assert claimed is not None
        assert claimed.id == expected.id


def test_a_job_is_preferred_only_if_all_its_adapters_are_loaded(store):
    oldest = store.add(job(A))
    store.add(job(A, B))
    store.add(job())
    claimed = store.claim("worker", NOW, LEASE_S, loaded=[B])
    assert claimed is not None
    assert claimed.id == oldest.id


def test_jobs_for_exactly_the_merged_adapters_go_first(store):
    oldest = store.add(job(B))
    both, one = store.add(job(A, B)), store.add(job(A))
    store.add(job(B))

    def claimed() -> str:
        next_job = store.claim("worker", NOW, LEASE_S, loaded=[A, B], merged=[A])
        assert next_job is not None
        return str(next_job.id)

    assert [claimed() for _ in range(3)] == [one.id, oldest.id, both.id]


def test_jobs_for_merged_adapters_go_first_up_to_the_limit(store):
    oldest = store.add(job(A))
    merged = [store.add(job(B)) for _ in range(MAX_PASSED_OVER + 1)]
    claimed = []
    for _ in range(MAX_PASSED_OVER + 2):
        next_job = store.claim("worker", NOW, LEASE_S, loaded=[A, B], merged=[B])
        assert next_job is not None
        claimed.append(next_job.id)
    assert claimed == [each.id for each in merged[:-1]] + [oldest.id, merged[-1].id]


def needs(sha256: str) -> Callable[[Job], bool]:
    return lambda job: sha256 in job.adapters


def test_the_oldest_wanted_job_is_claimed(store):
    first, oldest, warm = (
        store.add(job(A)),
        store.add(job(B, prompt="the oldest")),
        store.add(job(B)),
    )
    claimed = store.claim("worker", NOW, LEASE_S, matches=needs(B))
    assert claimed is not None
    assert (claimed.id, claimed.status) == (oldest.id, Status.IN_PROGRESS)
    assert [store.get(each.id) for each in (first, warm)] == [first, warm]


def test_loaded_adapters_do_not_affect_the_choice_of_wanted_jobs(store):
    first, wanted = store.add(job(A)), store.add(job(A, B))
    store.add(job(B))
    claimed = store.claim("worker", NOW, LEASE_S, loaded=[B], matches=needs(B))
    assert claimed is not None
    assert claimed.id == wanted.id
    assert store.get(first.id) == first


def test_without_a_wanted_job_nothing_changes(store):
    assert store.claim("worker", NOW, LEASE_S, matches=needs(B)) is None
    added = [store.add(job(A)), store.add(job())]
    assert store.claim("worker", NOW, LEASE_S, loaded=[A], matches=needs(B)) is None
    assert [store.get(each.id) for each in added] == added


def test_the_limit_holds_for_wanted_jobs(store):
    first = store.add(job(A))
    for _ in range(MAX_PASSED_OVER):
        wanted = store.add(job(B))
        claimed = store.claim("worker", NOW, LEASE_S, matches=needs(B))
        assert claimed is not None
        assert claimed.id == wanted.id
    store.add(job(B))
    waiting = store.get(first.id)
    assert store.claim("worker", NOW, LEASE_S, matches=needs(B)) is None
    assert store.get(first.id) == waiting
    # The job at its limit can be claimed itself.
    claimed = store.claim("worker", NOW, LEASE_S, matches=needs(A))
    assert claimed is not None
    assert claimed.id == first.id


def test_peek_does_not_claim(store):
    assert store.peek() is None
    added = [store.add(job(A)), store.add(job(B))]
    for expected in added:
        assert store.peek() == expected == store.get(expected.id)
        store.claim("worker", NOW, LEASE_S)
    assert store.peek() is None


def test_the_same_submission_is_the_same_job(store):
    submission = Submission("key", "1" * 64)
    first = store.add(job(), submission=submission)
    assert store.add(job(), submission=submission) == first
    with pytest.raises(IdempotencyConflictError):
        store.add(job(), submission=Submission("key", "2" * 64))
    assert store.add(job(), submission=Submission("other", "1" * 64)).id != first.id
    assert len(store.list().jobs) == 2


def test_the_same_submission_is_found_in_a_full_queue_and_after_its_end(store):
    submission = Submission("key", "1" * 64)
    first = store.add(job(), submission=submission, capacity=1)
    assert store.add(job(), submission=submission, capacity=1) == first
    ended = store.cancel(first.id, NOW)
    assert store.add(job(), submission=submission, capacity=1) == ended


def test_submitted_finds_the_job_of_a_submission(store):
    submission = Submission("key", "1" * 64)
    assert store.submitted(submission) is None
    added = store.add(job(), submission=submission)
    assert store.submitted(submission) == added
    with pytest.raises(IdempotencyConflictError):
        store.submitted(Submission("key", "2" * 64))


def test_jobs_are_counted_by_status(store):
    for _ in range(3):
        store.add(job())
    store.claim("worker", NOW, LEASE_S)
    assert [
        store.count(status) for status in (Status.IN_QUEUE, Status.IN_PROGRESS, Status.FAILED)
    ] == [2, 1, 0]


def test_jobs_need_their_adapters_until_they_end(store):
    first, second = running(store, A), running(store, A, B)
    assert (store.needs_adapter(A), store.needs_adapter(B), store.needs_adapter("c" * 64)) == (
        True,
        True,
        False,
    )
    store.stop(second.id, second.epoch, NOW)
    assert (store.needs_adapter(A), store.needs_adapter(B)) == (True, False)
    store.succeed(first.id, first.epoch, [OUTPUT], {}, NOW)
    assert not store.needs_adapter(A)


def test_a_full_queue_refuses_jobs(store):
    for _ in range(3):
        store.add(job(), capacity=3)
    with pytest.raises(QueueFullError):
        store.add(job(), capacity=3)
    store.claim("worker", NOW, LEASE_S)
    store.add(job(), capacity=3)  # a running job is not in the queue


def test_lists_are_newest_first_in_pages(store):
    added = [store.add(job(prompt=str(number))) for number in range(5)]
    seen, cursor = [], None
    for size in (2, 2, 1):
        page = store.list(limit=2, cursor=cursor)
        assert len(page.jobs) == size
        seen += [each.id for each in page.jobs]
        cursor = page.next_cursor
        store.add(job(prompt="new ones do not shift the pages"))
    assert cursor is None
    assert seen == [each.id for each in reversed(added)]
    with pytest.raises(JobError, match="begin again without it"):
        store.list(cursor="nonsense")


def test_lists_can_be_filtered_by_status(store):
    claimed = running(store)
    waiting = store.add(job())
    assert [each.id for each in store.list(status=Status.IN_PROGRESS).jobs] == [claimed.id]
    assert [each.id for each in store.list(status=Status.IN_QUEUE).jobs] == [waiting.id]
    assert store.list(status=Status.FAILED).jobs == ()


def test_several_jobs_are_read_at_once(store):
    jobs = [store.add(job(prompt=str(number))) for number in range(4)]
    ids = [one.id for one in jobs]
    claimed = store.claim("worker", NOW, LEASE_S)
    read = store.read_changes({ids[0]: 1, ids[1]: 0, ids[2]: 1, "0" * 32: 7})
    assert read.changed == {ids[0]: claimed, ids[1]: jobs[1]}  # the third is known
    assert read.positions == {ids[1]: 0, ids[2]: 1}
    assert read.missing == {"0" * 32}
    assert store.read_changes({}) == JobChanges({}, {}, frozenset())


def test_more_jobs_than_a_query_may_name_are_read(store):
    jobs = {one.id: one for one in (store.add(job()) for _ in range(3))}
    known = dict.fromkeys(jobs, 0) | {f"{number:032}": 0 for number in range(40_000)}
    read = store.read_changes(known)
    assert read.changed == jobs
    assert len(read.missing) == 40_000


def test_a_list_of_one_owner_has_no_other_jobs(store):
    owners = ["a", "b", "", "a"]
    jobs = [store.add(new_job((Recipe(prompt="a"),), NOW, owner=owner)) for owner in owners]
    assert [job.owner for job in jobs] == owners
    assert store.list(owner="a").jobs == (jobs[3], jobs[0])
    assert store.list(owner="").jobs == (jobs[2],)
    assert store.list(owner="c").jobs == ()
    assert len(store.list(owner=None).jobs) == 4
    first = store.list(owner="a", limit=1)
    assert store.list(owner="a", limit=1, cursor=first.next_cursor).jobs == (jobs[0],)
    with pytest.raises(CursorError):
        store.list(owner="a", cursor=jobs[1].id)  # an existing job of another owner
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed.owner == "a"
    assert store.list(owner="a", status=Status.IN_PROGRESS).jobs == (claimed,)
    assert store.list(owner="b", status=Status.IN_PROGRESS).jobs == ()


def test_old_jobs_are_removed_by_age_and_by_number(store):
    ended = []
    for number in range(5):
        added = store.add(job(), submission=Submission(f"key{number}", "1" * 64))
        ended.append(store.cancel(added.id, later(number)))
    waiting = store.add(job())
    assert [each.id for each in store.remove_finished(before=later(2), keep=100)] == [
        ended[1].id,
        ended[0].id,
    ]
    assert [each.id for each in store.remove_finished(before=NOW, keep=1)] == [
        ended[3].id,
        ended[2].id,
    ]
    assert {each.id for each in store.list().jobs} == {ended[4].id, waiting.id}
    # The keys of removed jobs can be used again.
    assert store.add(job(), submission=Submission("key0", "2" * 64)).status is Status.IN_QUEUE


def test_a_change_that_raises_keeps_the_job(store):
    claimed = running(store)
    with pytest.raises(LeaseLostError):
        store.succeed(claimed.id, 7, [OUTPUT], {}, NOW)
    assert store.get(claimed.id) == claimed


def test_every_change_is_a_new_version(store):
    added = store.add(job())
    versions = [added.version]
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed is not None
    versions += [
        claimed.version,
        store.renew(added.id, 1, None, NOW, LEASE_S).version,
        store.cancel(added.id, NOW).version,
    ]
    assert versions == [1, 2, 3, 4]


def test_concurrent_claims_return_each_job_once(store):
    added = {store.add(job()).id for _ in range(40)}
    got: list[str] = []

    def work() -> None:
        while (claimed := store.claim("worker", NOW, LEASE_S)) is not None:
            got.append(claimed.id)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(got) == 40
    assert set(got) == added


def test_a_job_needs_a_recipe_and_an_aware_time():
    with pytest.raises(RecipeError):
        new_job((), NOW)
    with pytest.raises(FideloraError, match="aware"):
        new_job((Recipe(prompt=""),), datetime(2026, 1, 1))


class SameResultsInBothStores(RuleBasedStateMachine):
    """Any sequence of calls has the same results in the database as in the memory store."""

    @initialize()
    def begin(self) -> None:
        self.memory, self.database = MemoryStore(), SqlStore("sqlite:///:memory:")
        self.ids: list[str] = []
        self.clock = NOW

    def both(self, call):
        answers = []
        for store in (self.memory, self.database):
            try:
                answers.append(call(store))
            except JobError as error:
                answers.append(type(error))
        assert answers[0] == answers[1]
        return answers[0]

    @rule(
        adapters=st.sets(st.sampled_from([A, B])),
        key=st.sampled_from([None, "k1", "k2"]),
        body=st.sampled_from("12"),
        owner=st.sampled_from(["", "a"]),
    )
    def add(self, adapters, key, body, owner):
        new = job(*sorted(adapters), owner=owner)
        submission = Submission(key, body * 64) if key else None
        added = self.both(
            lambda store: store.add(new, submission=submission, capacity=6, now=self.clock)
        )
        if isinstance(added, Job) and added.id not in self.ids:
            self.ids.append(added.id)

    @rule(
        loaded=st.sets(st.sampled_from([A, B])),
        merged=st.sets(st.sampled_from([A, B])),
        matches=st.sampled_from([None, needs(A), needs(B)]),
        hold_s=st.sampled_from([0.0, 2.0]),
    )
    def claim(self, loaded, merged, matches, hold_s):
        self.both(
            lambda store: store.claim(
                "worker", self.clock, LEASE_S, loaded, merged=merged, matches=matches, hold_s=hold_s
            )
        )

    @rule(name=st.sampled_from(["worker", "other"]), loaded=st.sets(st.sampled_from([A, B])))
    def report_worker(self, name, loaded):
        state = WorkerState(name, loaded=frozenset(loaded))
        self.both(lambda store: store.report_worker(state, self.clock))
        self.both(lambda store: store.workers(self.clock))

    @rule(
        which=st.integers(0, 30),
        epoch=st.integers(0, 4),
        what=st.sampled_from(["renew", "succeed", "fail", "stop", "release", "abandon", "cancel"]),
    )
    def report(self, which, epoch, what):
        if not self.ids:
            return
        job_id = self.ids[which % len(self.ids)]
        calls = {
            "renew": lambda store: store.renew(
                job_id, epoch, JobProgress(0, 1, epoch, 5), self.clock, LEASE_S
            ),
            "succeed": lambda store: store.succeed(
                job_id, epoch, [OUTPUT], {"total": 1.0}, self.clock
            ),
            "fail": lambda store: store.fail(job_id, epoch, Failure("X", "x"), self.clock),
            "stop": lambda store: store.stop(job_id, epoch, self.clock),
            "release": lambda store: store.release(job_id, epoch, self.clock),
            "abandon": lambda store: store.abandon(job_id, epoch, "it died", self.clock),
            "cancel": lambda store: store.cancel(job_id, self.clock),
        }
        self.both(calls[what])

    @rule(seconds=st.sampled_from([1, 20, 40]))
    def time_passes(self, seconds):
        self.clock += timedelta(seconds=seconds)
        self.both(lambda store: sorted(each.id for each in store.abandon_expired(self.clock)))

    @rule(keep=st.integers(0, 3))
    def remove(self, keep):
        self.both(lambda store: {each.id for each in store.remove_finished(before=NOW, keep=keep)})

    @invariant()
    def both_list_the_same_jobs(self):
        if not hasattr(self, "ids"):
            return
        listed = self.both(lambda store: store.list(limit=1000).jobs)
        for each in listed:
            assert (
                (each.lease_expires_at is not None)
                == (each.status is Status.IN_PROGRESS)
                == bool(each.worker)
            )
            assert (each.finished_at is not None) == each.status.final
            assert 0 <= each.attempts <= MAX_ATTEMPTS
            self.both(lambda store, job_id=each.id: store.queue_position(job_id))
        known = {each.id: 0 for each in listed}
        positions = self.both(lambda store: store.read_changes(known)).positions
        assert sorted(positions.values()) == list(range(len(positions)))
        first = self.both(lambda store: store.peek())
        assert first is None if not positions else positions[first.id] == 0

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()


TestSameResultsInBothStores = SameResultsInBothStores.TestCase
TestSameResultsInBothStores.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)


def test_jobs_persist_after_the_store_is_closed(tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    first = SqlStore(url)
    claimed = running(first)
    waiting = first.add(job(A), submission=Submission("key", "1" * 64))
    first.close()
    second = SqlStore(url)
    assert second.get(claimed.id) == claimed
    assert second.add(job(), submission=Submission("key", "1" * 64)) == waiting
    second.close()


def old_database(path: Path, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the database of an older version."""
    upgrade = command.upgrade
    with monkeypatch.context() as older:
        older.setattr(command, "upgrade", lambda config, _head: upgrade(config, revision))
        SqlStore(f"sqlite:///{path}").close()


def old_document(of: Job, **state: Any) -> str:
    """Return the document of a job in a version that kept the whole job in it."""
    plain = document_of(of) | {
        "status": "in_queue",
        "started_at": None,
        "finished_at": None,
        "attempts": 0,
        "epoch": 0,
        "worker": "",
        "lease_expires_at": None,
        "retry_at": None,
        "cancel_requested": False,
        "passed_over": 0,
        "progress": None,
        "outputs": [],
        "error": None,
        "timings": {},
        "version": 1,
    }
    return json.dumps(plain | state)


def test_attempts_of_an_older_database_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    old_database(path, "0002", monkeypatch)
    retry, fresh = job(), job()
    with sqlite3.connect(path) as database:
        database.executemany(
            "INSERT INTO jobs (id, status, version, document) VALUES (?, 'in_queue', 1, ?)",
            [
                (retry.id, old_document(retry, attempts=1, retry_at=later(2).isoformat())),
                (fresh.id, old_document(fresh)),
            ],
        )
    store = SqlStore(f"sqlite:///{path}")
    claims = [store.claim("worker", later(5), LEASE_S) for _ in range(2)]
    store.close()
    assert [each and (each.id, each.attempts) for each in claims] == [(fresh.id, 1), (retry.id, 2)]


def test_the_state_of_an_older_database_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    old_database(path, "0003", monkeypatch)
    done, active, waiting = job(), job(A), job(A, B)
    progress = {"image": 0, "images": 1, "step": 2, "steps": 4, "eta_s": 1.5, "preview": "x"}
    rows = [
        (
            done,
            {
                "status": "succeeded",
                "attempts": 1,
                "epoch": 1,
                "started_at": NOW.isoformat(),
                "finished_at": later(3).isoformat(),
                "outputs": [asdict(OUTPUT)],
                "timings": {"denoise": 1.5},
                "version": 3,
            },
        ),
        (
            active,
            {
                "status": "in_progress",
                "attempts": 1,
                "epoch": 1,
                "worker": "worker",
                "started_at": NOW.isoformat(),
                "lease_expires_at": later(LEASE_S).isoformat(),
                "progress": progress,
                "cancel_requested": True,
                "version": 4,
            },
        ),
        (waiting, {}),
    ]
    with sqlite3.connect(path) as database:
        for each, state in rows:
            database.execute(
                "INSERT INTO jobs (id, status, version, attempts, lease_expires_at_s,"
                " finished_at_s, document) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    each.id,
                    state.get("status", "in_queue"),
                    state.get("version", 1),
                    state.get("attempts", 0),
                    later(LEASE_S).timestamp() if each is active else None,
                    later(3).timestamp() if each is done else None,
                    old_document(each, **state),
                ),
            )
    store = SqlStore(f"sqlite:///{path}")
    assert store.get(waiting.id) == waiting
    assert store.get(done.id) == replace(
        done,
        status=Status.SUCCEEDED,
        attempts=1,
        epoch=1,
        started_at=NOW,
        finished_at=later(3),
        outputs=(OUTPUT,),
        timings={"denoise": 1.5},
        version=3,
    )
    running_job = store.get(active.id)
    assert running_job.progress == JobProgress(0, 1, 2, 4, 1.5)
    assert (running_job.cancel_requested, running_job.worker) == (True, "worker")
    assert store.stop(active.id, 1, later(4)).status is Status.CANCELED
    assert (store.needs_adapter(B), store.needs_adapter("c" * 64)) == (True, False)
    claimed = store.claim("worker", NOW, LEASE_S, loaded=[A, B])
    assert claimed is not None
    assert claimed.id == waiting.id
    store.close()


@pytest.mark.parametrize("call", ["add", "get"])
def test_a_locked_database_is_a_store_error(tmp_path, monkeypatch, call):
    """Calls neither wait for a process that keeps the database locked nor for each other."""
    monkeypatch.setattr("fidelora.jobs.database.BUSY_TIMEOUT_S", 0.01)
    monkeypatch.setattr("fidelora.jobs.transactions.BUSY_TIMEOUT_S", 0.01)
    monkeypatch.setattr("fidelora.jobs.database.wal_is_safe", lambda version: False)
    path = tmp_path / "jobs.sqlite"
    store = SqlStore(f"sqlite:///{path}")
    added = store.add(job())
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JobStoreError, match="locked"):
            store.add(job()) if call == "add" else store.get(added.id)
        assert store._database._write_lock is not None
        with store._database._write_lock, pytest.raises(JobStoreError, match="locked"):
            store.add(job())
    assert store.get(added.id) == added
    store.close()


def test_a_used_up_connection_pool_is_a_store_error(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    store._database.engine.pool = sa.pool.QueuePool(
        store._database.engine.pool._creator, pool_size=1, max_overflow=0, timeout=0.01
    )
    with store._database.engine.connect(), pytest.raises(JobStoreError, match="QueuePool limit"):
        store.peek()
    store.close()


def test_a_killed_process_loses_no_job_that_was_added(tmp_path):
    """A separate process is killed by SIGKILL between or during its writes."""
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    SqlStore(url).close()
    writer = textwrap.dedent(f"""
        from datetime import UTC, datetime
        from fidelora import Recipe
        from fidelora.jobs.job import new_job
        from fidelora.jobs.sql import SqlStore
        store = SqlStore({url!r})
        while True:
            job = store.add(new_job((Recipe(prompt="a ball"),), datetime.now(UTC)))
            print(job.id, flush=True)
            store.claim("doomed", datetime.now(UTC), 30.0)
    """)
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    killer = threading.Timer(60, process.kill)  # ends the reads below if the writer hangs
    killer.start()
    try:
        assert process.stdout is not None
        added = [process.stdout.readline().strip() for _ in range(25)]
        os.kill(process.pid, signal.SIGKILL)
        added += [line.strip() for line in process.stdout if len(line.strip()) == 32]
        process.wait(30)
    finally:
        killer.cancel()
        process.kill()
    store = SqlStore(url)
    kept = {each.id: each for each in store.list(limit=10_000).jobs}
    assert set(added) <= kept.keys()
    assert len(store.abandon_expired(datetime.now(UTC) + timedelta(hours=1))) == sum(
        each.status is Status.IN_PROGRESS for each in kept.values()
    )
    store.close()


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ("3.6.23", False),
        ("3.7.0", False),
        ("3.40.1", False),
        ("3.51.2", False),
        ("3.51.3", True),
        ("3.53.0", True),
        ("4.0.0", True),
    ],
)
def test_wal_is_used_only_with_fixed_sqlite_releases(version, safe):
    assert wal_is_safe(version) is safe


def test_commits_are_synced_to_disk(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    assert store.journal_mode == ("wal" if wal_is_safe(sqlite3.sqlite_version) else "delete")
    with store._database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
    store.close()


def test_an_unusable_database_raises(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(
        b"this is not a database, but a text of some length" * 50
    )
    with pytest.raises(JobStoreError, match="file is not a database"):
        SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    with pytest.raises(JobStoreError, match="cannot be used"):
        SqlStore(f"sqlite:///{tmp_path}/no/such/folder/jobs.sqlite")


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    path = Path(tmp_path) / "jobs.sqlite"
    SqlStore(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(JobStoreError, match="by another version"):
        SqlStore(f"sqlite:///{path}")


@pytest.mark.parametrize("server", ["sqlite", "postgresql"])
def test_workers_leave_jobs_of_newer_versions(server, request, tmp_path):
    """In each order of preference: loaded adapters, matching jobs, retries, the head."""
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    if server == "postgresql":
        url = request.getfixturevalue("postgres_url")
    older, newer = SqlStore(url), SqlStore(url, document_format=DOCUMENT_FORMAT + 1)
    with closing(older), closing(newer):
        new = newer.add(job(A))
        claimed = newer.claim("new", NOW, LEASE_S)
        assert claimed == newer.get(new.id)
        newer.abandon(new.id, claimed.epoch, "the worker was killed", NOW)
        newer.add(job(A))
        much_later = later(10_000)
        for _ in range(2 * MAX_PASSED_OVER):  # until the newer jobs have been skipped too often
            own = older.add(job(B))
            assert getattr(older.claim("old", much_later, LEASE_S), "id", None) == own.id
        own = older.add(job(B))
        assert older.claim("old", much_later, LEASE_S, [A], matches=lambda one: one != own) is None
        found = [older.claim("old", much_later, LEASE_S, [A], merged=[A]) for _ in range(2)]
        assert [one and one.id for one in found] == [own.id, None]
        assert older.count(Status.IN_QUEUE) == 2
        left = [newer.claim("new", much_later, LEASE_S) for _ in range(3)]
        assert [one is None for one in left] == [False, False, True]
        # Servers and workers of the older version only handle jobs that they can read.
        assert {one.id for one in older.list().jobs}.isdisjoint({new.id})
        assert [one.worker for one in older.running("")] == [
            one.worker for one in older.running("o")
        ]
        assert older.read_changes({new.id: 0}).changed == {}
        assert older.abandon_expired(later(30_000)) != ()
        assert newer.get(new.id).status is Status.IN_PROGRESS
        for call in (older.get, older.cancel):
            with pytest.raises(JobStoreError, match="newer version"):
                call(new.id)


def test_the_format_is_raised_with_new_fields_and_models():
    """Workers of older versions cannot read a new field of a recipe, or make a new model's images.

    If this fails, raise `DOCUMENT_FORMAT` and write the new digest down here.
    """
    fields = sorted({one.name for kind in (Recipe, AdapterRef) for one in dataclasses.fields(kind)})
    words = [*fields, *sorted(all_families())]
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
    assert (DOCUMENT_FORMAT, digest) == (3, "b2e7d83b68f4ae5e")


def test_jobs_of_an_older_database_have_no_owner(tmp_path, monkeypatch):
    path = Path(tmp_path) / "jobs.sqlite"
    old_database(path, "0001", monkeypatch)
    old = job()
    document = json.loads(old_document(old))
    del document["owner"]
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO jobs (id, status, version, document) VALUES (?, ?, ?, ?)",
            (old.id, old.status.value, old.version, json.dumps(document)),
        )
    store = SqlStore(f"sqlite:///{path}")
    assert store.get(old.id) == old
    assert store.list(owner="").jobs == (old,)
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed is not None
    assert claimed.owner == ""
    store.close()


def test_a_failed_migration_is_rolled_back(tmp_path, monkeypatch):
    """The tables and the record of their version are created in one transaction."""
    from alembic import op

    path = Path(tmp_path) / "jobs.sqlite"

    def fails(*args, **kwargs):
        raise OSError("the machine stops here")

    monkeypatch.setattr(op, "create_index", fails)
    with pytest.raises(JobStoreError):
        SqlStore(f"sqlite:///{path}")
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    monkeypatch.undo()
    SqlStore(f"sqlite:///{path}").close()
