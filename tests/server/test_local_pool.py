"""Real worker processes, really killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.support import TINY_BASE

from fidelora import Recipe
from fidelora.jobs.job import Job, Status, new_job
from fidelora.jobs.sql import SqlStore
from fidelora.work.local import LocalPool, WorkerSetup

SHORT = Recipe(prompt="a ball", base_model=str(TINY_BASE), width=64, height=64, steps=2)
LONG = replace(SHORT, width=1024, height=1024, steps=150)
DEADLINE_S = 120.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does, at most until a deadline that only a failure reaches."""
    pause, end = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        pause.wait(0.02)


@pytest.fixture
def store(tmp_path):
    made = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    yield made
    made.close()


@pytest.fixture
def pool(store, tmp_path):
    (tmp_path / "out").mkdir()
    made = LocalPool(store, [WorkerSetup(f"sqlite:///{tmp_path}/jobs.sqlite", tmp_path / "out", device="cpu", warm=SHORT)])
    yield made
    made.stop(0)


def add(store: SqlStore, recipe: Recipe) -> Job:
    return store.add(new_job((recipe,), datetime.now(UTC)))


def test_a_process_that_is_killed_costs_an_attempt_and_not_the_job(pool, store, tmp_path):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, LONG)
    until(lambda: store.get(job.id).progress is not None)
    (first,) = pool.process_ids
    os.kill(first, signal.SIGKILL)
    until(lambda: pool.process_ids == [])
    assert not pool.ready
    (back,) = pool.watch()
    assert (back.id, back.status, back.attempts) == (job.id, Status.IN_QUEUE, 1)

    until(lambda: store.get(job.id).status is Status.IN_PROGRESS)  # another process has it
    (second,) = pool.process_ids
    assert second != first
    assert store.get(job.id).attempts == 2
    assert pool.watch() == []
    store.cancel(job.id, datetime.now(UTC))
    until(lambda: store.get(job.id).status is Status.CANCELED)

    done = add(store, SHORT)
    until(lambda: store.get(done.id).status.final)
    assert store.get(done.id).status is Status.SUCCEEDED
    assert Path(store.get(done.id).outputs[0].file_path).is_file()


def test_a_process_that_hangs_is_killed_when_its_lease_runs_out(pool, store):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, LONG)
    until(lambda: store.get(job.id).status is Status.IN_PROGRESS)
    (first,) = pool.process_ids
    os.kill(first, signal.SIGSTOP)  # it makes no step, and cannot even be asked to leave
    (back,) = pool.watch(datetime.now(UTC) + timedelta(hours=1))
    assert (back.id, back.status) == (job.id, Status.IN_QUEUE)
    assert first not in pool.process_ids


def test_a_pool_that_stops_gives_its_job_back_without_an_attempt(pool, store, tmp_path):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, LONG)
    until(lambda: store.get(job.id).progress is not None)
    pool.stop(0)
    assert pool.process_ids == []
    back = store.get(job.id)
    assert (back.status, back.attempts) == (Status.IN_QUEUE, 0)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_pool_that_stops_lets_a_short_job_finish(pool, store):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, replace(SHORT, steps=40))
    until(lambda: store.get(job.id).status is not Status.IN_QUEUE)
    pool.stop(DEADLINE_S)
    assert pool.process_ids == []
    assert store.get(job.id).status is Status.SUCCEEDED
