"""`fidelora serve` as a separate process, and a small client for it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.support import TINY_BASE

DEADLINE_S = 300.0
"""Seconds to wait for a server's start or its images; only a failure takes that long."""
ANSWER_DEADLINE_S = 60.0
"""Seconds to wait for one HTTP response that does not depend on an image."""
IMAGES_DEADLINE_S = 180.0
"""Seconds to wait for one HTTP response that carries images, on a busy machine.

`DEADLINE_S` plus either of these two is less than pytest's `faulthandler_timeout`, so that a
hanging test fails by itself."""


def until(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Wait until the condition returns a true value, and return that value."""
    pause, end = threading.Event(), time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"the condition was not met within {deadline_s:g} s"
        pause.wait(0.02)
    return value


def terminate_repeatedly(process: subprocess.Popen[Any]) -> int:
    """Send SIGTERM until the process ends, as some supervisors do; returns the exit code."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.005)
    raise AssertionError("the process has not ended")


class Server:
    """A server on a free port, with its data in `data`.

    Args:
        settings: environment variables. The page is switched off unless `FIDELORA_PAGE` is given,
            because its packages take seconds to load.

    Attributes:
        data: the data folder.
    """

    def __init__(self, data: Path, base: Path | str = TINY_BASE, **settings: str) -> None:
        # Without the caller's own settings, and with threads that do not spin while they wait.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("FIDELORA_")
        }
        environment |= {
            "FIDELORA_DATA_DIR": str(data),
            "DEVICE": "cpu",
            "OMP_WAIT_POLICY": "passive",
            "FIDELORA_LOG_FORMAT": "json",
            "FIDELORA_PAGE": "false",
        }
        command = [
            sys.executable,
            "-m",
            "fidelora",
            "serve",
            "--base-model",
            str(base),
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment | settings, cwd=data
        )
        self.data = data
        self.log: list[dict[str, Any]] = []
        self._urls: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read_log, daemon=True).start()
        try:
            url = self._urls.get(timeout=DEADLINE_S)
            assert url is not None, f"the server ended before it listened: {self.log[-5:]}"
            self.url = url
            until(self._is_healthy)
        except BaseException:
            self.close()
            raise

    def call(
        self,
        path: str,
        body: Any = None,
        method: str | None = None,
        deadline_s: float = IMAGES_DEADLINE_S,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """Return the JSON of the server's response."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        with urllib.request.urlopen(request, timeout=deadline_s) as answer:
            return json.load(answer)

    def submit(self, **fields: Any) -> str:
        """Request one small image; returns the request's id."""
        prompt = {"prompt": "a [trigger]", "width": 64, "height": 64, "sample_steps": 2} | fields
        body = {
            "model": "sd15",
            "trigger_word": "sks",
            "loras": [{"path": "sks.safetensors"}],
            "prompts": [prompt],
        }
        return self.ask(body)

    def ask(self, body: dict[str, Any]) -> str:
        """Request images; returns the request's id."""
        return str(self.call("/v1/inference", body, deadline_s=ANSWER_DEADLINE_S)["request_id"])

    def status(self, request_id: str) -> Any:
        return self.call(f"/v1/requests/{request_id}/status", deadline_s=ANSWER_DEADLINE_S)

    def wait(self, request_id: str, *states: str) -> Any:
        """Poll until the request is in one of these states."""
        return until(lambda: (found := self.status(request_id))["status"] in states and found)

    def ready(self) -> None:
        """Wait until a worker is ready."""
        until(self._is_ready)

    def terminate(self) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def terminate_repeatedly(self) -> int:
        """Send SIGTERM until the process ends; returns the exit code."""
        return terminate_repeatedly(self.process)

    def kill(self) -> None:
        """Send SIGKILL, and nothing else."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": line.strip()}
            self.log.append(entry)
            if entry.get("event") == "listening":
                self._urls.put(entry["url"])
        self._urls.put(None)

    def _is_healthy(self) -> bool:
        assert self.process.poll() is None, f"the server ended: {self.log[-5:]}"
        try:
            return bool(self.call("/health", deadline_s=ANSWER_DEADLINE_S) == {"status": "healthy"})
        except OSError:
            return False

    def _is_ready(self) -> bool:
        try:
            return bool(self.call("/ready", deadline_s=ANSWER_DEADLINE_S)["status"] == "ready")
        except urllib.error.HTTPError:
            return False
