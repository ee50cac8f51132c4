"""`fidelora serve` as a process of its own, and the little that is needed to talk to it."""

from __future__ import annotations

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import TINY_BASE

DEADLINE_S = 300.0


def until(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Wait for what another process does, at most until a deadline that only a failure reaches; returns what came true."""
    pause, end = threading.Event(), time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        pause.wait(0.02)
    return value


class Server:
    """A server on a port of its own choice, its data in `data`.

    Args:
        settings: environment variables.
    """

    def __init__(self, data: Path, base: Path | str = TINY_BASE, **settings: str) -> None:
        # Without those of whoever runs the tests, and with threads that do not spin while they wait.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("FIDELORA_")
        }
        environment |= {
            "FIDELORA_DATA_DIR": str(data),
            "DEVICE": "cpu",
            "OMP_WAIT_POLICY": "passive",
            "FIDELORA_LOG_FORMAT": "json",
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
        self.log: list[dict[str, Any]] = []
        self._urls: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self._urls.get(timeout=DEADLINE_S)
        until(self._answers)

    def call(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """The JSON that the server answers with."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, content, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def submit(self, **fields: Any) -> str:
        """Ask for one small image; returns the request's id."""
        prompt = {"prompt": "a [trigger]", "width": 64, "height": 64, "sample_steps": 2} | fields
        body = {
            "model": "sd15",
            "trigger_word": "sks",
            "loras": [{"path": "sks.safetensors"}],
            "prompts": [prompt],
        }
        return self.ask(body)

    def ask(self, body: dict[str, Any]) -> str:
        """Ask for images; returns the request's id."""
        return str(self.call("/v1/inference", body)["request_id"])

    def status(self, request_id: str) -> Any:
        return self.call(f"/v1/requests/{request_id}/status")

    def wait(self, request_id: str, *states: str) -> Any:
        """Poll until the request is in one of these states."""
        return until(lambda: (found := self.status(request_id))["status"] in states and found)

    def ready(self) -> None:
        """Wait until images are made."""
        until(self._is_ready)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """SIGKILL, and nothing else."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it in any case."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": line.strip()}
            self.log.append(entry)
            if entry.get("event") == "listening":
                self._urls.put(entry["url"])

    def _answers(self) -> bool:
        try:
            return bool(self.call("/health") == {"status": "healthy"})
        except OSError:
            return False

    def _is_ready(self) -> bool:
        try:
            return bool(self.call("/ready")["status"] == "ready")
        except urllib.error.HTTPError:
            return False
