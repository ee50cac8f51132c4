"""Fixtures of the tests of job stores."""

from __future__ import annotations

import pytest

from fidelora.jobs.memory import MemoryStore
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import JobStore


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request, tmp_path):
    made: JobStore = MemoryStore()
    if request.param == "sqlite":
        made = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    elif request.param == "postgresql":
        made = SqlStore(request.getfixturevalue("postgres_url"))
    yield made
    made.close()
