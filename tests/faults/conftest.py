"""Fixtures of the tests with faults."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.fault_support import FaultServer, recorded_logs
from tests.server.serve_support import Server
from tests.support import LORA, TINY_BASE


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    shutil.copyfile(LORA, tmp_path / "loras" / "sks.safetensors")
    return tmp_path


@pytest.fixture
def start(data):
    """Return a function that starts a server on the test's data folder; all end with the test."""
    started: list[Server] = []

    def begin(base: Path | str = TINY_BASE, **settings: str) -> Server:
        started.append(Server(data, base, **settings))
        return started[-1]

    yield begin
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """One server for all hostile requests of a module; its secrets must not leak."""
    server = FaultServer(tmp_path_factory.mktemp("faults"))
    with recorded_logs(server.logs):
        yield server
    server.close()
    server.check_secrets()
