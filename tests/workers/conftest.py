"""Fixtures of the worker's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.workers.worker_support import Clock, Harness, Recorder, SlowDisk

from fidelora import Engine
from fidelora.storage.images import FolderImages
from fidelora.workers.attempt import WorkerLimits
from fidelora.workers.worker import Worker


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
def worker(store: Recorder, engine: Engine, clock: Clock, tmp_path: Path) -> Worker:
    limits = WorkerLimits(lease_s=1000, report_every_s=0, timeout_s=1000)
    return Worker(
        "worker",
        store,
        engine,
        FolderImages(tmp_path),
        limits,
        now=clock.now,
        monotonic=clock.monotonic,
    )


@pytest.fixture
def harness(store: Recorder, clock: Clock, tmp_path: Path) -> Harness:
    return Harness(store, clock, tmp_path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    disk = SlowDisk()
    monkeypatch.setattr("fidelora.storage.images.write_atomically", disk)
    return disk
