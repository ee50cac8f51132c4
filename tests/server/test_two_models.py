"""A server with both models: each has its own base, and they alternate in a worker's memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.serve_support import Server
from tests.support import LORA, SDXL_LORA, TINY_BASE, TINY_SDXL

pytestmark = pytest.mark.timeout(600)  # waits up to `DEADLINE_S` at each step

ALTERNATIONS = 12
LEVEL_BYTES = 64 * 2**20
"""Largest allowed growth of memory, 64 MiB.

Each base that is not freed would add 11 or 22 MiB, eight of them 130 MiB; the memory that the
allocator keeps varies by some MiB."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("two-models")
    (data / "loras").mkdir()
    for name, path in (("sks.safetensors", LORA), ("xl.safetensors", SDXL_LORA)):
        shutil.copyfile(path, data / "loras" / name)
    server = Server(data, base=f"sdxl={TINY_SDXL},sd15={TINY_BASE}", FIDELORA_BASES_GB="0.025")
    yield server
    server.close()


def request(model: str) -> dict[str, Any]:
    lora = {"sd15": "sks.safetensors", "sdxl": "xl.safetensors"}[model]
    prompt = {"prompt": "a [trigger]", "width": 64, "height": 64, "sample_steps": 2}
    return {"model": model, "trigger_word": "sks", "loras": [{"path": lora}], "prompts": [prompt]}


def worker_bytes(server: Server) -> int:
    """Return the private dirty memory of the server's child processes, without mapped files."""
    pid = server.process.pid
    children = [
        child
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    lines = [
        line.split()
        for child in children
        for line in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
    ]
    return sum(int(line[1]) * 1024 for line in lines if line[0] == "Private_Dirty:")


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(),
    reason="reads the memory of a process from Linux's /proc",
)
def test_memory_stays_level_while_models_alternate(server: Server):
    server.ready()
    images: dict[str, set[str]] = {"sd15": set(), "sdxl": set()}
    before = 0
    for turn in range(ALTERNATIONS):
        model = ("sd15", "sdxl")[turn % 2]
        request_id = server.ask(request(model))
        status = server.wait(request_id, "succeeded", "failed")
        assert status["status"] == "succeeded", status["error"]
        result = server.call(f"/v1/requests/{request_id}/result")
        (image,) = result["outputs"]["images"]
        assert (image["recipe"]["model"], image["recipe"]["base_model"]) == (
            model,
            {"sd15": TINY_BASE, "sdxl": TINY_SDXL}[model].name,
        )
        images[model].add(image["sha256"])
        if turn == 3:
            before = worker_bytes(server)
    assert before > 0
    assert worker_bytes(server) - before < LEVEL_BYTES
    # The same request gives the same file each time.
    assert [len(hashes) for hashes in images.values()] == [1, 1]


def test_an_adapter_of_the_other_model_fails_and_is_named(server: Server):
    for model, lora, right in (
        ("sdxl", "sks.safetensors", "sd15"),
        ("sd15", "xl.safetensors", "sdxl"),
    ):
        request_id = server.ask(request(model) | {"loras": [{"path": lora}]})
        status = server.wait(request_id, "succeeded", "failed")
        assert (status["status"], status["error_code"]) == ("failed", "ADAPTER_MISMATCH")
        assert f"Use the adapter with model {right}." in status["error"]
