"""Environment of all tests, and fixtures used in several folders."""

from __future__ import annotations

import gc
import os
import sys
import tempfile

# The suite runs in several processes, and small models are not faster with several threads. This
# is set before torch is loaded, and child processes inherit it, because images that are compared
# need the same number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Hashes and locations of base models must not come from, or be written to, the user's cache folder.
_CACHE = tempfile.TemporaryDirectory(prefix="fidelora-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["FIDELORA_KEEP_ENGINE"] = "0"  # commands must not find an engine of the user

import uuid
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from tests import object_store as object_stores
from tests.object_store import ObjectStore
from tests.postgres import PostgresServer, missing, postgres_server

from fidelora.cli import console, main

Run = Callable[..., tuple[int, str, str]]

# Hypothesis allows 200 ms for an example by default, which a busy machine can exceed.
hypothesis.settings.register_profile("fidelora", deadline=None)
hypothesis.settings.load_profile("fidelora")


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which runs whenever a model is loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden_threads() -> Iterator[None]:
    """Use as many threads as the goldens were made with: the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fidelora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_debug", False)
        monkeypatch.setattr(sys, "argv", ["fidelora", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        code = exit_info.value.code
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running PostgreSQL server, which all tests of this process share."""
    if reason := missing():
        pytest.skip(reason)
    with postgres_server() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """URL of an empty database."""
    postgres.clear()
    return postgres.url


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    if reason := object_stores.missing():
        pytest.skip(reason)
    with object_stores.object_store() as server:
        yield server


@pytest.fixture
def object_store_server(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A running S3 server, which all tests of this process share, with its variables set."""
    for name, value in _object_store.environment.items():
        monkeypatch.setenv(name, value)
    return _object_store


@pytest.fixture
def bucket_url(object_store_server: ObjectStore) -> str:
    """URL of an empty bucket."""
    return object_store_server.make_bucket(f"bucket-{uuid.uuid4().hex}")


@pytest.fixture
def own_object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A running S3 server for one test, with its variables set."""
    if reason := object_stores.missing():
        pytest.skip(reason)
    with object_stores.object_store() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
