"""Kills of API processes under load: the other process serves all of their requests."""

from __future__ import annotations

import os
import random
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest
from tests.postgres import missing
from tests.server.serve_support import ANSWER_DEADLINE_S, DEADLINE_S, Server, until
from tests.support import LORA

from fidelora.jobs.job import Output, Status
from fidelora.jobs.sql import SqlStore

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=missing() or "PostgreSQL can be started"),
]

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "3"))
REQUESTS = 40  # per round
CLIENTS = 4
BODY = {
    "model": "sd15",
    "loras": [{"path": "sks.safetensors"}],
    "prompts": [{"prompt": "a ball", "width": 64, "height": 64, "sample_steps": 2, "seed": 7}],
}


class Cluster:
    """Two servers without workers on one database."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        names = {
            "WORKFLOWS_BASE_PATH": "loras",
            "OUTPUT_BASE_PATH": "outputs",
            "LORA_DOWNLOAD_CACHE_DIR": "adapters",
        }
        for name in names.values():
            (folder / name).mkdir()
        shutil.copyfile(LORA, folder / "loras" / "sks.safetensors")
        self._settings = {name: str(folder / one) for name, one in names.items()}
        self._settings |= {"FIDELORA_STORE_URL": url, "DEVICE": "none", "FIDELORA_DTYPE": "float32"}
        with ThreadPoolExecutor() as threads:
            self.servers = list(threads.map(self.start, range(2)))

    def start(self, number: int) -> Server:
        data = self._folder / str(number)
        data.mkdir(exist_ok=True)
        return Server(data, **self._settings)

    def submit(self, key: str, first: int) -> str:
        """Submit a request as clients do: again with the same key, at any server, until it works.

        Args:
            first: number of the server to try first.
        """
        for attempt in range(1000):
            server = self.servers[(first + attempt) % 2]
            try:
                answer = server.call(
                    "/v1/inference",
                    BODY,
                    deadline_s=ANSWER_DEADLINE_S,
                    headers={"Idempotency-Key": key},
                )
                return str(answer["request_id"])
            except urllib.error.HTTPError:
                raise
            except (OSError, HTTPException):  # no connection, or a response that was cut off
                continue
        raise AssertionError("no server accepted the request")

    def close(self) -> None:
        for server in self.servers:
            server.close()


@pytest.fixture
def cluster(tmp_path: Path, postgres_url: str) -> Iterator[Cluster]:
    made = Cluster(tmp_path, postgres_url)
    yield made
    made.close()


@pytest.fixture
def store(postgres_url: str) -> Iterator[SqlStore]:
    made = SqlStore(postgres_url)
    yield made
    made.close()


@contextmanager
def working(store: SqlStore, pause_s: float = 0.02) -> Iterator[None]:
    """Finish one request after the other on a thread while the context is open."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(pause_s):
            if (job := store.claim("worker", None, 60)) is not None:
                output = Output(f"{job.id}.png", "png", 64, 64, job.epoch, "0" * 64, 1)
                store.succeed(job.id, job.epoch, [output], {})

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(DEADLINE_S)


def stream(server: Server, request: str) -> str:
    """Return all events of a request, until the server ends the stream."""
    url = f"{server.url}/v1/requests/{request}/events"
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as events:
        return str(events.read().decode())


def test_kills_of_api_processes_under_load_lose_no_request(cluster, store):
    draw = random.Random(7)
    accepted: dict[str, str] = {}
    canceled: set[str] = set()
    for number in range(ROUNDS):
        victim = number % 2
        survivor = cluster.servers[1 - victim]
        keys = [f"{number}-{one}" for one in range(REQUESTS)]
        with ThreadPoolExecutor(CLIENTS + 1) as clients:
            # No worker runs yet: this request is in the queue until its stream is open.
            followed = cluster.submit(f"{number}-followed", victim)
            to_cancel = cluster.submit(f"{number}-canceled", victim)
            accepted |= {f"{number}-followed": followed, f"{number}-canceled": to_cancel}
            events = clients.submit(stream, survivor, followed)
            submitted = [clients.submit(cluster.submit, key, victim) for key in keys]
            until(submitted[draw.randrange(1, REQUESTS // 2)].done)
            cluster.servers[victim].kill()
            survivor.call(f"/v1/requests/{to_cancel}", method="DELETE")
            canceled.add(to_cancel)
            with working(store):
                accepted |= {
                    key: each.result(DEADLINE_S) for key, each in zip(keys, submitted, strict=True)
                }
                assert '"succeeded"' in events.result(DEADLINE_S)
                until(lambda: store.count(Status.IN_QUEUE) == 0)
        cluster.servers[victim] = cluster.start(victim)
    jobs = {job.id: job for job in store.list(limit=100_000).jobs}
    assert set(accepted.values()) == jobs.keys(), "a key has made no request, or several"
    assert len(jobs) == ROUNDS * (REQUESTS + 2)
    for job in jobs.values():
        assert job.status is (Status.CANCELED if job.id in canceled else Status.SUCCEEDED)
        assert job.attempts <= 1
