"""Overhead of the server: submission with a long queue, and time of a job besides its image.

    python benchmarks/server.py [--jobs 30] [--submits 500] [--queue 10000]

Starts `fidelora serve` with the tiny base model of the demo on this machine. Prints:

* submit: time of a POST /v1/inference with a long queue, in sequence and from four clients at once
* overhead: from the POST to the first `succeeded` status, minus the engine's seconds for the image
* requeue: from the kill (SIGKILL) of a worker during an image until its job is queued again
* cancel: time for a queued job, and number of steps for a running one
* claim: time of a worker's claim with a long queue, while no other process uses the database
* restart: from the kill (SIGKILL) of the server to a ready one, and a first start for comparison
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Findings, Row, Settings
from tests.server.serve_support import Server, until
from tests.support import LORA

from fidelora import AdapterRef, Recipe
from fidelora.jobs.job import new_job
from fidelora.jobs.sql import SqlStore

BODY = {
    "model": "sd15",
    "trigger_word": "sks",
    "loras": [{"path": "sks.safetensors"}],
    "prompts": [{"prompt": "a [trigger]", "width": 64, "height": 64, "sample_steps": 4}],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--submits", type=int, default=500)
    parser.add_argument("--queue", type=int, default=10_000)
    options = parser.parse_args()
    queue_size = str(options.queue + 10 * options.submits)
    with (
        tempfile.TemporaryDirectory() as folder,
        _server(data := Path(folder), FIDELORA_QUEUE_SIZE=queue_size) as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        _print(
            "overhead of a job (wall minus engine)",
            [wall - engine for wall, engine in _jobs(client, options.jobs)],
        )
        _cancel_running(client, server)
        _requeue(client, server)
        _submit(client, server, data, options.queue, options.submits)
        server.kill()
        _claim(data, options.submits)
        _restart(data)


def measure(settings: Settings) -> Findings:
    """Return the findings of this part: the overhead of a job, and the engine's seconds."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _server(Path(folder)) as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        jobs = _jobs(client, 10 if settings.quick else 40)
    walls, engines = zip(*jobs, strict=True)
    own = [wall - engine for wall, engine in jobs]
    found = Findings(raw={"walls": walls, "engines": engines})
    middle, most = statistics.median(own) * 1000, _p99(own) * 1000
    whole = statistics.median(engines) * 1000
    figures = (
        f"{whole:.1f} ms in the engine",
        f"{middle:.1f} ms in addition (p99 {most:.1f})",
        f"{middle / whole:.0%} on top",
    )
    found.rows.append(
        Row("server: a job of the tiny base model, 64x64, 4 steps", *figures, len(own))
    )
    found.notes.append(
        "Server: from the POST to the first `succeeded` status, minus the seconds that the engine "
        "measured."
    )
    return found


@contextmanager
def _server(data: Path, **settings: str) -> Iterator[Server]:
    (data / "loras").mkdir()
    shutil.copyfile(LORA, data / "loras" / "sks.safetensors")
    server = Server(data, **settings)
    try:
        server.ready()
        yield server
    finally:
        server.close()


def _jobs(client: httpx2.Client, jobs: int) -> list[tuple[float, float]]:
    """Return for each job the seconds until `succeeded`, and the seconds measured by the engine."""
    seconds = []
    for _ in range(jobs + 3):
        start = time.perf_counter()
        request_id = client.post("/v1/inference", json=BODY).raise_for_status().json()["request_id"]
        while (status := client.get(f"/v1/requests/{request_id}/status").json())[
            "status"
        ] != "succeeded":
            assert status["status"] in ("in_queue", "in_progress"), status
            time.sleep(0.002)
        wall = time.perf_counter() - start
        timings = client.get(f"/v1/requests/{request_id}/result").json()["metadata"]["timings"]
        seconds.append((wall, sum(timings.values())))
    return seconds[3:]  # warm-up


def _submit(client: httpx2.Client, server: Server, data: Path, queue: int, submits: int) -> None:
    # A long job keeps the worker busy, so that the length of the queue is constant.
    long = {
        **BODY,
        "prompts": [{"prompt": "x", "width": 1024, "height": 1024, "sample_steps": 150}],
    }
    busy = client.post("/v1/inference", json=long).json()["request_id"]
    until(lambda: server.status(busy)["status"] == "in_progress")
    store = SqlStore(f"sqlite:///{data}/jobs.sqlite")
    recipe = Recipe(prompt="a sks", width=64, height=64, adapters=(AdapterRef.from_file(LORA),))
    for _ in range(queue):
        store.add(new_job((recipe,), datetime.now(UTC)))

    def once(_number: int) -> float:
        start = time.perf_counter()
        client.post("/v1/inference", json=BODY).raise_for_status()
        return time.perf_counter() - start

    _print(f"submit with {queue} queued", [once(number) for number in range(submits)])
    with ThreadPoolExecutor(4) as threads:
        _print(f"submit with {queue} queued, four at once", list(threads.map(once, range(submits))))
    waiting = client.post("/v1/inference", json=BODY).json()["request_id"]
    start = time.perf_counter()
    assert client.delete(f"/v1/requests/{waiting}").json()["status"] == "canceled"
    _print("cancel a queued job", [time.perf_counter() - start])
    client.delete(f"/v1/requests/{busy}")
    store.close()


def _claim(data: Path, claims: int) -> None:
    """Claim jobs of the queue that `_submit` has left."""
    store = SqlStore(f"sqlite:///{data}/jobs.sqlite")
    seconds = []
    for _ in range(claims):
        start = time.perf_counter()
        assert store.claim("benchmark", datetime.now(UTC), 60.0) is not None
        seconds.append(time.perf_counter() - start)
    _print("claim with a long queue", seconds)
    store.close()


def _restart(data: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with _server(Path(folder)):
            _print("first start until ready", [time.perf_counter() - start])
    start = time.perf_counter()
    server = Server(data)
    try:
        server.ready()
        _print("start after the kill until ready", [time.perf_counter() - start])
    finally:
        server.close()


def _cancel_running(client: httpx2.Client, server: Server) -> None:
    body = {**BODY, "prompts": [{"prompt": "x", "width": 768, "height": 768, "sample_steps": 100}]}
    request_id = client.post("/v1/inference", json=body).json()["request_id"]
    until(lambda: (server.status(request_id)["progress"] or {}).get("step", 0) >= 3)
    progress = server.status(request_id)["progress"]
    start = time.perf_counter()
    client.delete(f"/v1/requests/{request_id}")
    until(lambda: server.status(request_id)["status"] == "canceled")
    seconds = time.perf_counter() - start
    step_s = progress["eta_s"] / (progress["steps"] - progress["step"])
    print(
        f"{'cancel a running job':44} {seconds * 1000:8.1f} ms = "
        f"{seconds / step_s:.1f} steps of {step_s * 1000:.0f} ms"
    )


def _requeue(client: httpx2.Client, server: Server) -> None:
    body = {**BODY, "prompts": [{"prompt": "x", "width": 768, "height": 768, "sample_steps": 100}]}
    request_id = client.post("/v1/inference", json=body).json()["request_id"]
    until(lambda: server.status(request_id)["progress"])
    found = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "-f", "spawn_main"],
        capture_output=True,
        text=True,
        check=True,
    )
    start = time.perf_counter()
    for worker in found.stdout.split():
        os.kill(int(worker), signal.SIGKILL)
    until(lambda: server.status(request_id)["status"] == "in_queue")
    _print("from the kill of a worker to its job being queued", [time.perf_counter() - start])
    client.delete(f"/v1/requests/{request_id}")
    server.ready()


def _print(what: str, seconds: list[float]) -> None:
    median = statistics.median(seconds) * 1000
    print(
        f"{what:44} median {median:8.1f} ms   p99 {_p99(seconds) * 1000:8.1f} ms   n={len(seconds)}"
    )


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * 0.99))]


if __name__ == "__main__":
    main()
