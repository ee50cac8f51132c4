"""Fixtures of the tests with faults."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.server.serve_support import Server
from tests.support import LORA, TINY_BASE


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    shutil.copyfile(LORA, tmp_path / "loras" / "sks.safetensors")
    return tmp_path


@pytest.fixture
def start(data):
    """Start a server on the test's data folder; all servers end with the test."""
    started: list[Server] = []

    def begin(base: Path | str = TINY_BASE, **settings: str) -> Server:
        started.append(Server(data, base, **settings))
        return started[-1]

    yield begin
    for server in started:
        server.close()
