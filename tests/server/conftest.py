"""Contexts, clients and workers of the API, and a real server with the tiny base.

Tests that need real images share the real server, and leave it as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from tests.server.http_support import ManualWorker, client_of, context_in, listening
from tests.server.openai_support import official_client
from tests.server.serve_support import Server
from tests.support import LORA, LORA_CONV

from fidelora.server import job_watcher
from fidelora.server.context import ServerContext


@pytest.fixture
def context_settings() -> dict[str, Any]:
    """Settings of `context`; none by default."""
    return {}


@pytest.fixture
def context(tmp_path: Path, context_settings: dict[str, Any]) -> ServerContext:
    return context_in(tmp_path, **context_settings)


@pytest.fixture
def client(context: ServerContext) -> Iterator[TestClient]:
    with client_of(context) as made:
        yield made


@pytest.fixture
def url(context: ServerContext) -> Iterator[str]:
    """Address of a server on a real socket."""
    with listening(context) as found:
        yield found


@pytest.fixture
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a server on a real socket; the test acts as its worker."""
    with official_client(openai.OpenAI, url) as made:
        yield made


@pytest.fixture
def worker(context: ServerContext) -> ManualWorker:
    return ManualWorker(context)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server poll jobs without a pause."""
    monkeypatch.setattr(job_watcher, "POLL_INTERVAL_S", 0.005)


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
