"""The SQL store: durability, locks, and databases that cannot be used."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from tests.jobs.store_support import A, job, running

from fidelora.errors import JobStoreError
from fidelora.jobs.database import wal_is_safe
from fidelora.jobs.job import Status
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import Submission


@pytest.mark.skipif(os.name != "posix", reason="files have no such modes")
def test_only_the_owner_can_read_the_database(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.touch(0o644)  # made by an older version
    made = SqlStore(f"sqlite:///{path}")
    made.add(job())
    modes = {one.name: one.stat().st_mode & 0o777 for one in tmp_path.iterdir()}
    made.close()
    assert "jobs.sqlite" in modes
    assert set(modes.values()) == {0o600}


def test_jobs_persist_after_the_store_is_closed(tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    first = SqlStore(url)
    claimed = running(first)
    waiting = first.add(job(A), submission=Submission("key", "1" * 64))
    first.close()
    second = SqlStore(url)
    assert second.get(claimed.id) == claimed
    assert second.add(job(), submission=Submission("key", "1" * 64)) == waiting
    second.close()


@pytest.mark.parametrize("call", ["add", "get"])
def test_a_locked_database_is_a_store_error(tmp_path, monkeypatch, call):
    """Calls neither wait for a process that keeps the database locked nor for each other."""
    monkeypatch.setattr("fidelora.jobs.database.BUSY_TIMEOUT_S", 0.01)
    monkeypatch.setattr("fidelora.jobs.transactions.BUSY_TIMEOUT_S", 0.01)
    monkeypatch.setattr("fidelora.jobs.database.wal_is_safe", lambda version: False)
    path = tmp_path / "jobs.sqlite"
    store = SqlStore(f"sqlite:///{path}")
    added = store.add(job())
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JobStoreError, match="locked"):
            store.add(job()) if call == "add" else store.get(added.id)
        assert store._database._write_lock is not None
        with store._database._write_lock, pytest.raises(JobStoreError, match="locked"):
            store.add(job())
    assert store.get(added.id) == added
    store.close()


def test_a_used_up_connection_pool_is_a_store_error(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    store._database.engine.pool = sa.pool.QueuePool(
        store._database.engine.pool._creator, pool_size=1, max_overflow=0, timeout=0.01
    )
    with store._database.engine.connect(), pytest.raises(JobStoreError, match="QueuePool limit"):
        store.peek()
    store.close()


def test_a_killed_process_loses_no_job_that_was_added(tmp_path):
    """A separate process is killed by SIGKILL between or during its writes."""
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    SqlStore(url).close()
    writer = textwrap.dedent(f"""
        from datetime import UTC, datetime
        from fidelora import Recipe
        from fidelora.jobs.job import new_job
        from fidelora.jobs.sql import SqlStore
        store = SqlStore({url!r})
        while True:
            job = store.add(new_job((Recipe(prompt="a ball"),), datetime.now(UTC)))
            print(job.id, flush=True)
            store.claim("doomed", datetime.now(UTC), 30.0)
    """)
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    killer = threading.Timer(60, process.kill)  # ends the reads below if the writer hangs
    killer.start()
    try:
        assert process.stdout is not None
        added = [process.stdout.readline().strip() for _ in range(25)]
        os.kill(process.pid, signal.SIGKILL)
        added += [line.strip() for line in process.stdout if len(line.strip()) == 32]
        process.wait(30)
    finally:
        killer.cancel()
        process.kill()
    store = SqlStore(url)
    kept = {each.id: each for each in store.list(limit=10_000).jobs}
    assert set(added) <= kept.keys()
    assert len(store.abandon_expired(datetime.now(UTC) + timedelta(hours=1))) == sum(
        each.status is Status.IN_PROGRESS for each in kept.values()
    )
    store.close()


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ("3.6.23", False),
        ("3.7.0", False),
        ("3.40.1", False),
        ("3.51.2", False),
        ("3.51.3", True),
        ("3.53.0", True),
        ("4.0.0", True),
    ],
)
def test_wal_is_used_only_with_fixed_sqlite_releases(version, safe):
    assert wal_is_safe(version) is safe


def test_commits_are_synced_to_disk(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    assert store.journal_mode == ("wal" if wal_is_safe(sqlite3.sqlite_version) else "delete")
    with store._database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
    store.close()


def test_an_unusable_database_raises(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(
        b"this is not a database, but a text of some length" * 50
    )
    with pytest.raises(JobStoreError, match="file is not a database"):
        SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    with pytest.raises(JobStoreError, match="cannot be used"):
        SqlStore(f"sqlite:///{tmp_path}/no/such/folder/jobs.sqlite")
