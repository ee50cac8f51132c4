"""Two servers and a worker without a common folder: a database, and a bucket for files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from tests.object_store import ObjectStore
from tests.postgres import free_port
from tests.server.serve_support import DEADLINE_S, Server, until
from tests.support import LORA, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe
from fidelora.storage.bucket import Bucket

pytestmark = pytest.mark.timeout(900)  # waits up to DEADLINE_S at each step

PROMPT = {"prompt": "a ball", "width": 64, "height": 64, "sample_steps": 2, "seed": 7}
LONG = PROMPT | {"width": 256, "height": 256, "sample_steps": 50}


class Cluster:
    """Servers and workers that share a database and a bucket, each with folders of its own."""

    def __init__(self, folder: Path, database: str, store: ObjectStore) -> None:
        self.folder = folder
        self.bucket = f"{store.make_bucket('images')}/test"
        self._settings = {
            "FIDELORA_STORE_URL": database,
            "FIDELORA_OBJECT_STORE": self.bucket,
            "FIDELORA_DTYPE": "float32",
            **store.environment,
        }
        self.servers: list[Server] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []

    def start_server(self) -> Server:
        data = self.folder / f"server-{len(self.servers)}"
        data.mkdir()
        self.servers.append(Server(data, **(self._settings | {"DEVICE": "none"})))
        return self.servers[-1]

    def start_worker(self) -> subprocess.Popen[bytes]:
        data = self.folder / f"worker-{len(self.workers)}"
        data.mkdir()
        own = {name: value for name, value in os.environ.items() if "FIDELORA_" not in name}
        self.ports.append(free_port())
        settings = {
            "FIDELORA_DATA_DIR": str(data),
            "DEVICE": "cpu",
            "OMP_WAIT_POLICY": "passive",
            "FIDELORA_WORKER_PORT": str(self.ports[-1]),
        }
        self.workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "fidelora", "worker", "--base-model", str(TINY_BASE)],
                env=own | self._settings | settings,
                stderr=subprocess.DEVNULL,
                cwd=data,
            )
        )
        return self.workers[-1]

    def worker_is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.ports[-1]}/ready"
        try:
            return httpx2.get(url, timeout=DEADLINE_S).status_code == 200
        except httpx2.TransportError:
            return False

    def close(self) -> None:
        for process in self.workers:
            if process.poll() is None:
                process.kill()
            process.wait(DEADLINE_S)
        for server in self.servers:
            server.close()


@pytest.fixture
def cluster(tmp_path: Path, postgres_url: str, own_object_store: ObjectStore) -> Iterator[Cluster]:
    made = Cluster(tmp_path, postgres_url, own_object_store)
    yield made
    made.close()


def upload(server: Server, name: str) -> Any:
    files = {"file": (name, LORA.read_bytes())}
    return httpx2.post(f"{server.url}/v1/loras", files=files, timeout=DEADLINE_S).json()


def image_of(server: Server, request: str) -> bytes:
    url = f"{server.url}/v1/requests/{request}/images/0"
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        return bytes(answer.read())


def test_machines_without_a_common_folder_share_images_and_loras(cluster):
    first, second = cluster.start_server(), cluster.start_server()
    worker = cluster.start_worker()
    loras = [{"path": upload(first, "sks.safetensors")["path"]}]
    request = second.ask({"model": "sd15", "loras": loras, "prompts": [PROMPT]})
    until(lambda: first.status(request)["status"] == "succeeded")
    (image,) = first.call(f"/v1/requests/{request}/result")["outputs"]["images"]
    assert image["file_path"] == f"{cluster.bucket}/outputs/{request}_output_0.png"
    content = image_of(first, request)
    assert content == image_of(second, request)
    recipe = Recipe(
        prompt="a ball",
        base_model=str(TINY_BASE),
        width=64,
        height=64,
        steps=2,
        seed=7,
        adapters=(AdapterRef.from_file(LORA),),
    )
    made = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(made, Engine(device="cpu").generate(recipe).pixels)
    for server in (first, second):  # neither has the images in a folder
        assert not list((server.data / "outputs").iterdir())

    # A worker that is killed in the middle of a job, and another on a new machine.
    busy = first.ask({"model": "sd15", "loras": loras, "prompts": [LONG]})
    until(lambda: first.status(busy)["status"] == "in_progress")
    worker.kill()
    cluster.start_worker()
    until(lambda: second.status(busy)["status"] == "succeeded")
    assert len(image_of(first, busy)) > 1000
    keys = [one.key for one in Bucket(cluster.bucket).list("outputs")]
    path = loras[0]["path"]
    assert httpx2.delete(f"{second.url}/v1/loras/{path}").status_code == 204
    until(lambda: first.call("/v1/loras")["loras"] == [])
    assert sorted(keys) == sorted(f"outputs/{one}_output_0.png" for one in (request, busy))


def test_jobs_wait_while_the_object_store_is_away(cluster, own_object_store):
    server = cluster.start_server()
    cluster.start_worker()
    loras = [{"path": upload(server, "sks.safetensors")["path"]}]
    request = server.ask({"model": "sd15", "loras": loras, "prompts": [LONG]})
    # The worker has fetched the LoRA, which the restarted store does not have.
    until(lambda: list(cluster.folder.glob("worker-0/adapters/*.safetensors")))
    own_object_store.stop()
    until(lambda: not cluster.worker_is_ready())  # the image could not be stored
    state = server.status(request)
    assert (state["status"], state.get("error")) == ("in_queue", None)
    body = {"model": "sd15", "loras": loras, "prompts": [PROMPT]}
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.ask(body)
    assert refused.value.code == 503
    own_object_store.start()  # it has forgotten everything
    own_object_store.make_bucket("images")
    until(lambda: server.status(request)["status"] == "succeeded")
    assert len(image_of(server, request)) > 1000


def test_a_worker_does_not_start_without_its_bucket(fidelora, object_store_server, monkeypatch):
    monkeypatch.setenv("FIDELORA_OBJECT_STORE", "s3://no-such-bucket")
    monkeypatch.setenv("FIDELORA_STORE_URL", "sqlite:///missing/jobs.sqlite")
    code, _, err = fidelora("worker", "--device", "cpu")
    assert code != 0
    assert "the bucket does not exist; check FIDELORA_OBJECT_STORE" in " ".join(err.split())


def test_a_server_in_the_same_process_as_its_workers_can_use_a_bucket(
    tmp_path, object_store_server, bucket_url
):
    environment = dict(object_store_server.environment)
    server = Server(tmp_path, FIDELORA_OBJECT_STORE=bucket_url, **environment)
    try:
        path = upload(server, "sks.safetensors")["path"]
        body = {"model": "sd15", "loras": [{"path": path}], "prompts": [PROMPT]}
        request = server.ask(body)
        server.wait(request, "succeeded")
        assert len(image_of(server, request)) > 1000
    finally:
        server.close()
    assert {one.key.split("/")[0] for one in Bucket(bucket_url).list("")} == {
        "adapters",
        "loras",
        "outputs",
    }
