"""A real server with the tiny base, for all tests that need real images and leave it as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from tests.server.serve_support import Server
from tests.support import LORA, LORA_CONV


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run `fidelora serve` with the LoRAs `sks` and `people/conv`; it loads in the background."""
    data = tmp_path_factory.mktemp("tiny-server")
    (data / "loras" / "people").mkdir(parents=True)
    shutil.copyfile(LORA, data / "loras" / "sks.safetensors")
    shutil.copyfile(LORA_CONV, data / "loras" / "people" / "conv.safetensors")
    server = Server(data)
    yield server
    server.close()
