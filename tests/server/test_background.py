"""Background tasks of the server continue after errors; if one ends, the server stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from tests.server.http_support import context_in

from fidelora import Recipe
from fidelora.errors import JobStoreError
from fidelora.jobs.job import Status, new_job
from fidelora.server import background
from fidelora.server.app import _stop_server_on_failure, clean
from fidelora.server.background import run_periodically
from fidelora.server.logs import REPEAT_S, LibraryRepeats
from fidelora.server.retention_clock import RetentionClock

TIMEOUT_S = 20.0


class LastCallError(BaseException):
    """Ends the task; no code of the server catches it."""


def run_with(monkeypatch: Any, *results: BaseException | None) -> list[str]:
    """Run a task whose calls have these results; return what was logged as an error."""
    logged: list[str] = []
    left = [*results, LastCallError()]

    class Log:
        def error(self, event: str, reason: str) -> None:
            logged.append(f"{event}: {reason}")

        exception = error

    async def action() -> None:
        if (result := left.pop(0)) is not None:
            raise result

    monkeypatch.setattr(background, "log", Log())
    with pytest.raises(LastCallError):
        asyncio.run(asyncio.wait_for(run_periodically(0, action), TIMEOUT_S))
    return logged


def test_a_task_goes_on_after_any_error(monkeypatch):
    errors = (OSError(24, "Too many open files"), TypeError("a"), JobStoreError("b"), None)
    logged = run_with(monkeypatch, *errors)
    assert [line.split(":")[0] for line in logged] == [
        "background task failed, retrying",
        "background task failed, retrying",
        "job store unavailable, retrying",
    ]


def test_an_error_that_repeats_is_logged_once(monkeypatch):
    again = [OSError(24, "Too many open files") for _ in range(5)]
    assert len(run_with(monkeypatch, *again)) == 1
    assert len(run_with(monkeypatch, again[0], None, again[1])) == 2
    assert len(run_with(monkeypatch, *(JobStoreError("locked") for _ in range(5)))) == 1


def test_the_end_of_a_task_stops_the_server_as_a_failure(tmp_path, monkeypatch):
    context = context_in(tmp_path)
    sent: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", sent.append)

    async def end_with(error: Exception | None) -> None:
        async def task() -> None:
            if error is not None:
                raise error

        running = asyncio.create_task(task())
        running.add_done_callback(partial(_stop_server_on_failure, context))
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(end_with(None))
    assert (sent, context.failed.is_set()) == ([], False)
    asyncio.run(end_with(RuntimeError("a")))
    assert (sent, context.failed.is_set()) == ([signal.SIGTERM], True)


def test_repeated_warnings_of_libraries_are_dropped(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    filtered = LibraryRepeats()

    def passes(name: str, level: int, message: str) -> bool:
        return filtered.filter(logging.LogRecord(name, level, "", 1, message, (), None))

    assert passes("uvicorn.error", logging.WARNING, "Invalid HTTP request received.")
    assert not passes("uvicorn.error", logging.WARNING, "Invalid HTTP request received.")
    assert passes("uvicorn.error", logging.WARNING, "another")
    assert passes("asyncio", logging.ERROR, "socket.accept() out of system resource")
    assert all(passes("uvicorn.error", logging.INFO, "started") for _ in range(3))
    assert all(passes("fidelora.http", logging.WARNING, "a") for _ in range(3))
    now = REPEAT_S
    assert passes("uvicorn.error", logging.WARNING, "Invalid HTTP request received.")


def test_cleaning_ignores_links_to_files_that_are_gone(tmp_path):
    context = context_in(tmp_path)
    link = context.cache.path("0" * 64)
    link.symlink_to(tmp_path / "gone")
    clean(context)
    assert link.is_symlink()


def test_nothing_is_removed_because_the_date_was_set_forward(tmp_path):
    wall, elapsed = [1e9], [50.0]
    clock = RetentionClock(lambda: wall[0], lambda: elapsed[0])
    assert clock.now() == 1e9
    wall[0] += 3600
    elapsed[0] += 3600
    assert clock.now() == 1e9 + 3600
    wall[0] += 86_400  # set forward
    assert clock.now() == 1e9 + 3600
    wall[0] -= 3 * 86_400  # and back
    assert clock.now() == wall[0]
    elapsed[0] += 30 * 86_400
    assert clock.now() == wall[0]


def test_a_fresh_result_outlives_a_date_that_is_a_day_ahead(tmp_path):
    wall = [time.time()]
    context = replace(
        context_in(tmp_path, keep_days=1),
        retention_clock=RetentionClock(lambda: wall[0], lambda: 0.0),
    )
    job = context.store.add(new_job((Recipe(prompt="a ball"),), datetime.now(UTC)))
    context.store.cancel(job.id, datetime.now(UTC))
    wall[0] += 2 * 86_400
    clean(context)
    assert context.store.get(job.id).status is Status.CANCELED
