"""Background tasks of the server survive what they meet; an end that nobody asked for is one."""

from __future__ import annotations

import asyncio
import logging
import signal
from functools import partial
from typing import Any

import pytest
from tests.server.http_support import context_in

from fidelora.errors import JobStoreError
from fidelora.server import app
from fidelora.server.app import _run_periodically, _stop_server_on_failure, clean
from fidelora.server.logs import REPEAT_S, LibraryRepeats

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

    monkeypatch.setattr(app, "log", Log())
    with pytest.raises(LastCallError):
        asyncio.run(asyncio.wait_for(_run_periodically(0, action), TIMEOUT_S))
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
