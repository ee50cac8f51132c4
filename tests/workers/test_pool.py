"""Real worker processes: start, crash, hang, stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support import TINY_BASE

from fidelora import Recipe
from fidelora.errors import JobStoreError
from fidelora.jobs.job import Job, Status, new_job
from fidelora.jobs.sql import SqlStore
from fidelora.workers.attempt import AttemptReport
from fidelora.workers.pool import WorkerPool
from fidelora.workers.process import WorkerSetup, WorkerSlot, prepare_process

pytestmark = pytest.mark.timeout(600)  # waits up to DEADLINE_S at each step

SHORT = Recipe(prompt="a ball", base_model=str(TINY_BASE), width=64, height=64, steps=2)
LONG = replace(SHORT, width=512, height=512, steps=150)
"""An image that takes far longer than any test waits for its first step."""
DEADLINE_S = 120.0  # reached only by a test that fails


def until(condition: Callable[[], Any]) -> None:
    """Wait until another process has made the condition true."""
    pause, end = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        pause.wait(0.02)


@pytest.fixture
def store(tmp_path):
    made = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    yield made
    made.close()


def setup_in(folder: Path, **given: Any) -> WorkerSetup:
    return replace(
        WorkerSetup(f"sqlite:///{folder}/jobs.sqlite", folder / "out", device="cpu", warm=SHORT),
        **given,
    )


@pytest.fixture
def pool(store, tmp_path):
    (tmp_path / "out").mkdir()
    made = WorkerPool(store, [setup_in(tmp_path)])
    yield made
    made.stop(0)


def add(store: SqlStore, recipe: Recipe) -> Job:
    return store.add(new_job((recipe,), datetime.now(UTC)))


def test_a_killed_process_costs_its_job_an_attempt(pool, store, tmp_path):
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

    until(lambda: store.get(job.id).status is Status.IN_PROGRESS)  # in a new process
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


@pytest.fixture
def hours():
    """Hours that the pool's clock is ahead of that of the workers."""
    return [0.0]


@pytest.fixture
def pool_in_time(store, tmp_path, hours):
    (tmp_path / "out").mkdir()
    made = WorkerPool(
        store, [setup_in(tmp_path)], monotonic=lambda: time.monotonic() + 3600 * hours[0]
    )
    yield made
    made.stop(0)


def test_a_hung_process_is_killed_even_if_the_store_fails(
    pool_in_time, hours, store, tmp_path, monkeypatch
):
    """It may be stopped within a transaction, which keeps the database locked."""
    pool = pool_in_time
    pool.start()
    until(lambda: pool.ready)
    job = add(store, LONG)
    until(lambda: store.get(job.id).status is Status.IN_PROGRESS)
    (first,) = pool.process_ids
    os.kill(first, signal.SIGSTOP)  # it makes no step and handles no SIGTERM
    assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
    with contextlib.suppress(JobStoreError):  # if it was stopped within a transaction
        assert pool.watch() == []
    assert pool.process_ids == [first]  # not yet
    hours[0] = 1.0

    def locked(*args: Any, **kwargs: Any) -> None:
        raise JobStoreError

    with monkeypatch.context() as patch:
        patch.setattr(store, "running", locked)
        with pytest.raises(JobStoreError):
            pool.watch()
    assert pool.process_ids == []
    (back,) = pool.watch()
    assert (back.id, back.status) == (job.id, Status.IN_QUEUE)


def test_a_clock_that_jumps_ahead_takes_no_job_from_a_live_worker(pool, store):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, LONG)
    until(lambda: store.get(job.id).progress is not None)
    processes = pool.process_ids
    assert pool.watch(datetime.now(UTC) + timedelta(days=1)) == []
    assert pool.process_ids == processes
    assert store.get(job.id).status is Status.IN_PROGRESS


def test_a_worker_that_cannot_write_reports_it_until_it_can(pool, store, tmp_path):
    pool.start()
    until(lambda: pool.ready)
    shutil.rmtree(tmp_path / "out")
    job = add(store, SHORT)
    until(lambda: pool.watch() == [] and pool.unready_reason)
    assert not pool.ready
    assert "could not be written: No such file or directory" in pool.unready_reason
    until(lambda: store.get(job.id).status is Status.IN_QUEUE)  # returned after the report
    assert store.get(job.id).attempts == 0
    (tmp_path / "out").mkdir()
    until(lambda: pool.watch() == [] and pool.ready)
    assert pool.unready_reason == ""
    until(lambda: store.get(job.id).status is Status.SUCCEEDED)


def test_a_stopped_pool_releases_its_job_without_an_attempt(pool, store, tmp_path):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, LONG)
    until(lambda: store.get(job.id).progress is not None)
    pool.stop(0)
    assert pool.process_ids == []
    back = store.get(job.id)
    assert (back.status, back.attempts) == (Status.IN_QUEUE, 0)
    assert list((tmp_path / "out").iterdir()) == []


def test_repeated_signals_do_not_interrupt_the_release_of_a_job(pool, store):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, LONG)
    until(lambda: store.get(job.id).progress is not None)
    while processes := pool.process_ids:  # without a pause: the release takes milliseconds
        os.kill(processes[0], signal.SIGTERM)
    after = store.get(job.id)
    assert (after.status, after.attempts) == (Status.IN_QUEUE, 0)


def test_a_stopped_pool_lets_a_short_job_finish(pool, store):
    pool.start()
    until(lambda: pool.ready)
    job = add(store, replace(SHORT, steps=40))
    until(lambda: store.get(job.id).status is not Status.IN_QUEUE)
    pool.stop(DEADLINE_S)
    assert pool.process_ids == []
    assert store.get(job.id).status is Status.SUCCEEDED


def test_a_pool_wakes_only_its_workers_with_these_names(store, tmp_path, monkeypatch):
    woken: list[str] = []
    monkeypatch.setattr(WorkerSlot, "wake", lambda slot: woken.append(slot.name))
    pool = WorkerPool(store, [setup_in(tmp_path)] * 3)
    for number, slot in enumerate(pool._slots):
        slot.name = f"local/{number}"
    pool.wake(["other/0", "local/1"])
    assert woken == ["local/1"]
    pool.wake()
    assert woken[1:] == ["local/0", "local/1", "local/2"]


def test_workers_report_their_attempts(store, tmp_path):
    (tmp_path / "out").mkdir()
    reports: list[AttemptReport] = []
    pool = WorkerPool(store, [setup_in(tmp_path)])
    pool.on_report = reports.append
    pool.start()
    done = add(store, SHORT)
    pool.wake()
    failed = add(store, replace(SHORT, base_model="/nowhere"))
    until(lambda: store.get(failed.id).status.final)
    until(lambda: pool.watch() == [] and len(reports) == 2)
    pool.stop(0)
    first, second = reports
    assert (first.job_id, first.status, first.code, first.images, first.steps) == (
        done.id,
        "succeeded",
        "",
        1,
        2,
    )
    assert first.wait_s is not None
    assert set(first.timings) >= {"load", "adapters", "text", "denoise", "decode"}
    assert (second.job_id, second.status, second.code, second.images) == (
        failed.id,
        "failed",
        "BASE_MODEL_NOT_FOUND",
        0,
    )


def test_a_worker_that_cannot_start_reports_why_and_restarts_later(store, tmp_path):
    (tmp_path / "out").mkdir()
    pool = WorkerPool(store, [setup_in(tmp_path, warm=replace(SHORT, base_model="/nowhere"))])
    pool.start()
    until(lambda: pool.watch() == [] and pool.unready_reason)
    assert pool.unready_reason.startswith("The base model /nowhere was not found")
    assert not pool.ready
    until(lambda: pool.process_ids == [])
    pool.watch()
    assert pool.process_ids == []  # not without a delay
    until(lambda: pool.watch() == [] and pool.restarts == 1)
    pool.stop(0)


def test_a_worker_that_is_killed_while_it_starts_is_reported(pool):
    pool.start()
    os.kill(pool.process_ids[0], signal.SIGKILL)
    until(lambda: pool.watch() == [] and pool.unready_reason)
    assert "its process was killed by signal 9" in pool.unready_reason
    assert not pool.ready
    until(lambda: pool.watch() == [] and pool.ready)
    assert pool.unready_reason == ""


def test_an_unexpected_error_at_the_start_is_reported(store, tmp_path):
    (tmp_path / "out").mkdir()
    warm = replace(SHORT, width=64)
    object.__setattr__(warm, "base_model", 7)  # a bug: no recipe can have this
    pool = WorkerPool(store, [setup_in(tmp_path, warm=warm)])
    pool.start()
    until(lambda: pool.watch() == [] and pool.unready_reason)
    assert pool.unready_reason.startswith("A worker failed to start with an unexpected TypeError")
    pool.stop(0)


def test_the_process_is_prepared_before_libraries_are_loaded(tmp_path, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "HF_TOKEN"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    seen: list[tuple[str, str]] = []

    def prepare() -> None:
        seen.append((os.environ["GOMP_SPINCOUNT"], os.environ["HF_TOKEN"]))

    setup = setup_in(tmp_path, hub_token="hf_x", prepare=prepare)
    prepare_process(setup)
    assert seen == [("30000", "hf_x")]
    assert "hf_x" not in repr(setup)


def test_a_pool_requeues_its_jobs_after_the_server_was_killed(store, tmp_path):
    """Jobs of other pools are left alone."""
    mine, other = add(store, SHORT), add(store, SHORT)
    store.claim("mine/0-1-x", datetime.now(UTC), 1000)
    store.claim("other/0-1-x", datetime.now(UTC), 1000)
    pool = WorkerPool(store, [], name="mine")
    pool.start()
    assert (store.get(mine.id).status, store.get(mine.id).attempts) == (Status.IN_QUEUE, 1)
    assert store.get(other.id).status is Status.IN_PROGRESS


@pytest.mark.parametrize("is_stopped", [False, True])
def test_workers_exit_when_their_server_is_killed(store, tmp_path, is_stopped):
    """They release their jobs without counting the attempt."""
    (tmp_path / "out").mkdir()
    code = f"""
        import threading
        from tests.workers.test_pool import setup_in
        from fidelora.jobs.sql import SqlStore
        from fidelora.workers.pool import WorkerPool
        from pathlib import Path

        if __name__ == "__main__":
            store = SqlStore("sqlite:///{tmp_path}/jobs.sqlite")
            pool = WorkerPool(store, [setup_in(Path("{tmp_path}"))])
            pool.start()
            print(*pool.process_ids, flush=True)
            threading.Event().wait()
    """
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(code))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout is not None
    worker = int(server.stdout.readline())
    job = add(store, LONG)
    until(lambda: store.get(job.id).progress is not None)
    if is_stopped:
        os.kill(worker, signal.SIGSTOP)
        until(lambda: state_of(worker) == "T")
    server.kill()
    server.wait()
    until(lambda: store.get(job.id).status is Status.IN_QUEUE)
    assert store.get(job.id).attempts == 0
    until(lambda: state_of(worker) == "Z")


def state_of(process_id: int) -> str:
    """Return the state of a process, which may be no child of the test; Z if it has ended."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"
