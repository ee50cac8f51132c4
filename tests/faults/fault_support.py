"""A server in this process with a database, an engine and secrets, for hostile requests."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import random
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from tests.faults.fuzz.targets import MAX_MESSAGE_BYTES
from tests.server.http_support import ClientWithDeadline, in_thread, settings_for
from tests.support import TINY_BASE

from fidelora import Engine
from fidelora.adapters.library import AdapterLibrary
from fidelora.families import all_families
from fidelora.jobs.job import Job
from fidelora.jobs.sql import SqlStore
from fidelora.server.app import context_with_store
from fidelora.server.page.pictures import PageFiles
from fidelora.storage.images import FolderImages
from fidelora.workers.worker import Worker

DEADLINE_S = 60.0
"""Seconds that one call may take; only a failure takes that long."""
MAX_GROWTH_BYTES = 64 * 2**20
"""Memory that a process may keep after a series of hostile inputs."""
MAX_ADAPTERS_BYTES = 2**20  # of loaded adapters, which are not part of a growth
HUB_TOKEN = "hf_CanaryTokenOfTheServer"
REQUEST_TOKEN = "hf_CanaryTokenOfARequest"
TINY = {
    "base_model": str(TINY_BASE),
    "dtype": "float32",
    "vae_dtype": "float32",
    "text_encoder_dtype": "float32",
}
SMALL = {"width": 64, "height": 64, "sample_steps": 1, "seed": 7}


class FaultServer:
    """A server with an API key and a hub token, and one worker that runs in `run_jobs`.

    Attributes:
        secrets: texts that must not appear in any response, log, file or database row.
        logs: all log events, with tracebacks.
        worker: takes jobs from the store when `run_jobs` is called.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = settings_for(folder, hf_token=HUB_TOKEN, host="0.0.0.0")
        for created in (settings.outputs, settings.loras / "uploads"):
            created.mkdir(parents=True, exist_ok=True)
        self.context = context_with_store(
            SqlStore(settings.database),
            settings,
            {model: {} for model in all_families()} | {"sd15": TINY},
            "http://127.0.0.1:8000",
        )
        self.page_files = PageFiles(settings.data_dir / "page")
        self.page_files.empty()
        self.key = self.context.keys.add("canary")
        self.secrets = [self.key, HUB_TOKEN, REQUEST_TOKEN]
        self.logs: list[str] = []
        library = AdapterLibrary(MAX_ADAPTERS_BYTES, folder=settings.adapters)
        engine = Engine(device="cpu", adapters=library)
        self.worker = Worker("worker", self.context.store, engine, FolderImages(settings.outputs))
        self._client = ClientWithDeadline(
            self.context, headers={"Authorization": f"Bearer {self.key}"}
        )

    @property
    def loras(self) -> Path:
        return self.context.settings.loras

    def call(self, method: str, path: str, **given: Any) -> Any:
        """Send a request; fail if the server fails, or its response contains a secret."""
        response = self._client.request(method, path, **given)
        self.assert_without_secrets(f"{path}: {response.headers} {response.text}")
        assert response.status_code < 500, f"{path}: {response.text[:300]}"
        if response.status_code >= 400:
            check_refusal(response)
        return response

    def post(self, path: str, body: Any = None, **given: Any) -> Any:
        """Send a POST request with JSON or, with `content` or `files`, another body."""
        if body is not None:  # lone surrogates become escapes
            given["content"] = json.dumps(body)
            given["headers"] = {"Content-Type": "application/json"}
        return self.call("POST", path, **given)

    def run_jobs(self) -> list[Job]:
        """Run all queued jobs, and return them."""
        done = []
        while (job := in_thread(self.worker.run_next).result(DEADLINE_S)) is not None:
            done.append(job)
            assert job.status.final, f"the worker raised an unexpected error: {self.logs[-1][:500]}"
        return done

    def newest_id(self) -> str:
        """Return the id of the newest job; empty without jobs."""
        return next((job.id for job in self.context.store.list(limit=1).jobs), "")

    def files(self) -> set[Path]:
        """Return all files of the server, except for the database."""
        return {
            path
            for path in self.context.settings.data_dir.rglob("*")
            if not path.name.startswith("jobs.sqlite") and (path.is_symlink() or not path.is_dir())
        }

    def assert_without_secrets(self, text: str) -> None:
        for secret in self.secrets:
            assert secret not in text, f"a secret is in {text[:300]}"

    def check_secrets(self) -> None:
        """Fail if a secret is in a log, the database, an image or another file of the server."""
        self.assert_without_secrets("\n".join(self.logs))
        for path in self.context.settings.data_dir.rglob("*"):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                for secret in self.secrets:
                    assert secret.encode() not in content, f"a secret is in {path.name}"

    def close(self) -> None:
        self.context.store.close()


def check_refusal(response: Any) -> None:
    """Check that an error response has a message for people, which is short and printable."""
    body = response.json()
    assert_is_message(message_of(body))
    assert len(response.content) <= 64 * 1024, "the response is long"


def message_of(body: Any) -> str:
    """Return the message of an error body in any of the server's formats."""
    if "errors" in body:
        return str(body["errors"])
    if "error" in body:
        return str(body["error"]["message"])
    if isinstance(body["detail"], list):
        return "; ".join(one["msg"] for one in body["detail"])
    return str(body["detail"]["error"]["message"])


def assert_is_message(message: str) -> None:
    assert message.strip(), "the message is empty"
    assert message.isprintable(), f"control characters in {message[:300]!r}"
    size = len(message.encode())
    assert size <= MAX_MESSAGE_BYTES + 100, f"{size:,} bytes: {message[:300]!r}"


@contextmanager
def recorded_logs(logs: list[str]) -> Iterator[None]:
    """Append every log event of this process to a list, with its traceback."""

    def record(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
        logs.append(repr(structlog.processors.format_exc_info(_logger, _method, event)))
        raise structlog.DropEvent

    class Recorder(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            logs.append(f"{logging.Formatter().format(entry)} {vars(entry)}")

    before, handler, root = structlog.get_config(), Recorder(), logging.getLogger()
    level = root.level
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, record])
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        structlog.configure(**before)


def memory_bytes() -> int:
    """Return the memory that this process uses; 0 where the system does not report it.

    Memory that is free but not yet returned to the system is returned first.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_time(call: Any) -> Any:
    """Return the result of a call; fail if it takes longer than `DEADLINE_S`."""
    return in_thread(call).result(DEADLINE_S)


def random_of(*parts: object) -> random.Random:
    """Return a random generator with a fixed seed."""
    return random.Random(repr(parts))
