"""A server without workers, and `fidelora worker` processes, on one PostgreSQL database."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.postgres import free_port
from tests.server.serve_support import DEADLINE_S, Server, terminate_repeatedly, until
from tests.support import LORA, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe
from fidelora.jobs.sql import SqlStore

pytestmark = pytest.mark.timeout(600)  # waits up to DEADLINE_S at each step

PROMPT = {"prompt": "a ball", "width": 64, "height": 64, "sample_steps": 2, "seed": 7}
BODY = {"loras": [{"path": "sks.safetensors"}], "prompts": [PROMPT]}
LONG = BODY | {"prompts": [PROMPT | {"width": 512, "height": 512, "sample_steps": 100}]}


class WorkerHost:
    """A `fidelora worker` process with one worker."""

    def __init__(self, data: Path, url: str) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("FIDELORA_")
        }
        options = ["--store", url, "--device", "cpu", "--base-model", str(TINY_BASE)]
        folders = ["--outputs", str(data / "outputs"), "--adapters", str(data / "adapters")]
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fidelora", "worker", *options, *folders],
            env=environment
            | {"OMP_WAIT_POLICY": "passive", "FIDELORA_LOG_FORMAT": "json"}
            | {"FIDELORA_WORKER_PORT": str(self.port)},
            stderr=subprocess.DEVNULL,
            cwd=data,
        )

    def get(self, path: str) -> str:
        """Return the response of the worker's own port."""
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)


@pytest.fixture
def server(tmp_path: Path, postgres_url: str) -> Iterator[Server]:
    (tmp_path / "loras").mkdir()
    shutil.copyfile(LORA, tmp_path / "loras" / "sks.safetensors")
    settings = {"FIDELORA_STORE_URL": postgres_url, "DEVICE": "none", "FIDELORA_DTYPE": "float32"}
    made = Server(tmp_path, **settings)
    yield made
    made.close()


@pytest.fixture
def hosts() -> Iterator[list[WorkerHost]]:
    started: list[WorkerHost] = []
    yield started
    for host in started:
        host.close()


@pytest.fixture
def store(postgres_url: str) -> Iterator[SqlStore]:
    made = SqlStore(postgres_url)
    yield made
    made.close()


def submit(server: Server, body: Any) -> str:
    return server.ask({"model": "sd15"} | body)


def status(server: Server, request: str) -> str:
    return str(server.status(request)["status"])


def test_workers_on_other_machines_make_the_images(server, hosts, store, tmp_path, postgres_url):
    waiting = submit(server, BODY)
    assert server.call("/ready")["status"] == "ready"
    assert status(server, waiting) == "in_queue"
    hosts += [WorkerHost(tmp_path, postgres_url) for _ in range(2)]
    until(lambda: status(server, waiting) == "succeeded")
    until(lambda: len(store.workers()) == 2)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=DEADLINE_S) as answer:
        assert b"fidelora_live_workers 2.0" in answer.read()
    (output,) = server.call(f"/v1/requests/{waiting}/result")["outputs"]["images"]
    recipe = Recipe(
        prompt="a ball",
        base_model=str(TINY_BASE),
        width=64,
        height=64,
        steps=2,
        seed=7,
        adapters=(AdapterRef.from_file(LORA),),
    )
    with Image.open(output["file_path"]) as image:
        made = np.asarray(image.convert("RGB"))
    assert np.array_equal(made, Engine(device="cpu").generate(recipe).pixels)
    assert all(host.get("/ready") for host in hosts)
    metrics = [host.get("/metrics") for host in hosts]
    assert sum(text.count("fidelora_images_total 1.0") for text in metrics) == 1
    assert sum(text.count("fidelora_claim_seconds_count 1.0") for text in metrics) == 1

    running = submit(server, LONG)
    until(lambda: store.get(running).progress is not None)
    server.call(f"/v1/requests/{running}", method="DELETE")
    until(lambda: status(server, running) == "canceled")

    busy = submit(server, LONG)
    until(lambda: store.get(busy).progress is not None)
    (before,) = store.running("")
    first, second = hosts
    for host in hosts:
        host.process.send_signal(signal.SIGTERM)
    assert [terminate_repeatedly(host.process) for host in (first, second)] == [0, 0]
    after = store.get(busy)
    assert (after.status.value, after.attempts, after.epoch) == ("in_queue", 0, before.epoch)
    assert store.workers() == ()


def test_a_worker_needs_the_shared_folder(fidelora, tmp_path):
    code, _, err = fidelora("worker", "--outputs", str(tmp_path / "missing"), "--device", "cpu")
    assert code == 2
    assert "does not exist. Mount the folder that the servers use" in err


def test_the_database_is_migrated_by_a_command(fidelora, postgres_url):
    code, out, _ = fidelora("db", "upgrade", "--store", postgres_url)
    assert (code, out) == (0, "The job database was migrated from revision none to 0009.\n")
    code, out, _ = fidelora("db", "upgrade", "--store", postgres_url)
    assert (code, out) == (0, "The job database is up to date (revision 0009).\n")
    code, out, _ = fidelora("workers", "--store", postgres_url)
    assert (code, out) == (0, "")
