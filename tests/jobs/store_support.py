"""Helpers of the tests of job stores: jobs, times and waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from fidelora import AdapterRef, Recipe
from fidelora.jobs.job import Job, Output, new_job
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import JobStore

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
LEASE_S = 30.0
A, B = "a" * 64, "b" * 64
OUTPUT = Output("out/x_output_0.png", "png", 512, 512, 42, "c" * 64, 1234)


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def job(*adapters: str, prompt: str = "a ball", owner: str = "", device_kind: str = "") -> Job:
    recipe = Recipe(prompt=prompt, adapters=tuple(AdapterRef(sha256) for sha256 in adapters))
    return new_job((recipe,), NOW, owner=owner, device_kind=device_kind)


def running(store: JobStore, *adapters: str) -> Job:
    store.add(job(*adapters))
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed is not None
    return claimed


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


def needs(sha256: str) -> Callable[[Job], bool]:
    return lambda job: sha256 in job.adapters
