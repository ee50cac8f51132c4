"""Databases of older and newer versions."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from tests.jobs.store_support import LEASE_S, NOW, OUTPUT, A, B, job, later

from fidelora.errors import JobStoreError
from fidelora.jobs.codec import DOCUMENT_FORMAT, document_of
from fidelora.jobs.job import Job, JobProgress, Status
from fidelora.jobs.queue_order import MAX_PASSED_OVER
from fidelora.jobs.sql import SqlStore


def old_database(path: Path, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the database of an older version."""
    upgrade = command.upgrade
    with monkeypatch.context() as older:
        older.setattr(command, "upgrade", lambda config, _head: upgrade(config, revision))
        SqlStore(f"sqlite:///{path}").close()


def old_document(of: Job, **state: Any) -> str:
    """Return the document of a job in a version that kept the whole job in it."""
    plain = document_of(of) | {
        "status": "in_queue",
        "started_at": None,
        "finished_at": None,
        "attempts": 0,
        "epoch": 0,
        "worker": "",
        "lease_expires_at": None,
        "retry_at": None,
        "cancel_requested": False,
        "passed_over": 0,
        "progress": None,
        "outputs": [],
        "error": None,
        "timings": {},
        "version": 1,
    }
    return json.dumps(plain | state)


def test_attempts_of_an_older_database_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    old_database(path, "0002", monkeypatch)
    retry, fresh = job(), job()
    with sqlite3.connect(path) as database:
        database.executemany(
            "INSERT INTO jobs (id, status, version, document) VALUES (?, 'in_queue', 1, ?)",
            [
                (retry.id, old_document(retry, attempts=1, retry_at=later(2).isoformat())),
                (fresh.id, old_document(fresh)),
            ],
        )
    store = SqlStore(f"sqlite:///{path}")
    claims = [store.claim("worker", later(5), LEASE_S) for _ in range(2)]
    store.close()
    assert [each and (each.id, each.attempts) for each in claims] == [(fresh.id, 1), (retry.id, 2)]


def test_the_state_of_an_older_database_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    old_database(path, "0003", monkeypatch)
    done, active, waiting = job(), job(A), job(A, B)
    progress = {"image": 0, "images": 1, "step": 2, "steps": 4, "eta_s": 1.5, "preview": "x"}
    rows = [
        (
            done,
            {
                "status": "succeeded",
                "attempts": 1,
                "epoch": 1,
                "started_at": NOW.isoformat(),
                "finished_at": later(3).isoformat(),
                "outputs": [asdict(OUTPUT)],
                "timings": {"denoise": 1.5},
                "version": 3,
            },
        ),
        (
            active,
            {
                "status": "in_progress",
                "attempts": 1,
                "epoch": 1,
                "worker": "worker",
                "started_at": NOW.isoformat(),
                "lease_expires_at": later(LEASE_S).isoformat(),
                "progress": progress,
                "cancel_requested": True,
                "version": 4,
            },
        ),
        (waiting, {}),
    ]
    with sqlite3.connect(path) as database:
        for each, state in rows:
            database.execute(
                "INSERT INTO jobs (id, status, version, attempts, lease_expires_at_s,"
                " finished_at_s, document) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    each.id,
                    state.get("status", "in_queue"),
                    state.get("version", 1),
                    state.get("attempts", 0),
                    later(LEASE_S).timestamp() if each is active else None,
                    later(3).timestamp() if each is done else None,
                    old_document(each, **state),
                ),
            )
    store = SqlStore(f"sqlite:///{path}")
    assert store.get(waiting.id) == waiting
    assert store.get(done.id) == replace(
        done,
        status=Status.SUCCEEDED,
        attempts=1,
        epoch=1,
        started_at=NOW,
        finished_at=later(3),
        outputs=(OUTPUT,),
        timings={"denoise": 1.5},
        version=3,
    )
    running_job = store.get(active.id)
    assert running_job.progress == JobProgress(0, 1, 2, 4, 1.5)
    assert (running_job.cancel_requested, running_job.worker) == (True, "worker")
    assert store.stop(active.id, 1, later(4)).status is Status.CANCELED
    assert (store.needs_adapter(B), store.needs_adapter("c" * 64)) == (True, False)
    claimed = store.claim("worker", NOW, LEASE_S, loaded=[A, B])
    assert claimed is not None
    assert claimed.id == waiting.id
    store.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    path = Path(tmp_path) / "jobs.sqlite"
    SqlStore(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(JobStoreError, match="by another version"):
        SqlStore(f"sqlite:///{path}")


@pytest.mark.parametrize("server", ["sqlite", "postgresql"])
def test_workers_leave_jobs_of_newer_versions(server, request, tmp_path):
    """Each rule of the queue skips them: loaded adapters, matching jobs, retries, the head."""
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    if server == "postgresql":
        url = request.getfixturevalue("postgres_url")
    older, newer = SqlStore(url), SqlStore(url, document_format=DOCUMENT_FORMAT + 1)
    with closing(older), closing(newer):
        new = newer.add(job(A))
        claimed = newer.claim("new", NOW, LEASE_S)
        assert claimed == newer.get(new.id)
        newer.abandon(new.id, claimed.epoch, "the worker was killed", NOW)
        newer.add(job(A))
        much_later = later(10_000)
        for _ in range(2 * MAX_PASSED_OVER):  # until the newer jobs have been skipped too often
            own = older.add(job(B))
            assert getattr(older.claim("old", much_later, LEASE_S), "id", None) == own.id
        own = older.add(job(B))
        assert older.claim("old", much_later, LEASE_S, [A], matches=lambda one: one != own) is None
        found = [older.claim("old", much_later, LEASE_S, [A], merged=[A]) for _ in range(2)]
        assert [one and one.id for one in found] == [own.id, None]
        assert older.count(Status.IN_QUEUE) == 2
        left = [newer.claim("new", much_later, LEASE_S) for _ in range(3)]
        assert [one is None for one in left] == [False, False, True]
        # Servers and workers of the older version only handle jobs that they can read.
        assert {one.id for one in older.list().jobs}.isdisjoint({new.id})
        assert [one.worker for one in older.running("")] == [
            one.worker for one in older.running("o")
        ]
        assert older.read_changes({new.id: 0}).changed == {}
        assert older.abandon_expired(later(30_000)) != ()
        assert newer.get(new.id).status is Status.IN_PROGRESS
        for call in (older.get, older.cancel):
            with pytest.raises(JobStoreError, match="newer version"):
                call(new.id)


def test_jobs_of_an_older_database_have_no_owner(tmp_path, monkeypatch):
    path = Path(tmp_path) / "jobs.sqlite"
    old_database(path, "0001", monkeypatch)
    old = job()
    document = json.loads(old_document(old))
    del document["owner"]
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO jobs (id, status, version, document) VALUES (?, ?, ?, ?)",
            (old.id, old.status.value, old.version, json.dumps(document)),
        )
    store = SqlStore(f"sqlite:///{path}")
    assert store.get(old.id) == old
    assert store.list(owner="").jobs == (old,)
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed is not None
    assert claimed.owner == ""
    store.close()


def test_a_failed_migration_is_rolled_back(tmp_path, monkeypatch):
    """The tables and the record of their version are created in one transaction."""
    from alembic import op

    path = Path(tmp_path) / "jobs.sqlite"

    def fails(*args, **kwargs):
        raise OSError("the machine stops here")

    monkeypatch.setattr(op, "create_index", fails)
    with pytest.raises(JobStoreError):
        SqlStore(f"sqlite:///{path}")
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    monkeypatch.undo()
    SqlStore(f"sqlite:///{path}").close()
