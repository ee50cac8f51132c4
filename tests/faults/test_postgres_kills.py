"""Kills of PostgreSQL and of workers under load: no accepted job is lost or done twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from tests.postgres import PostgresServer, missing, postgres_server

from fidelora import Recipe
from fidelora.errors import JobStoreError
from fidelora.jobs.job import MAX_ATTEMPTS, Status, new_job
from fidelora.jobs.sql import SqlStore

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=missing() or "PostgreSQL can be started"),
]

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "3"))
OUTAGE_S = float(os.environ.get("FAULT_OUTAGE_S", "0"))
"""Seconds until a killed database is started again; 0 for a random time of at most one second."""
JOBS = 60  # per round
WORKERS = 3
LEASE_S = 1.0
WORKER = """
    import sys, time
    from fidelora.errors import JobStoreError, LeaseLostError
    from fidelora.jobs.job import Output
    from fidelora.jobs.sql import SqlStore

    def until_it_works(call):
        while True:
            try:
                return call()
            except JobStoreError:
                time.sleep(0.05)

    store = until_it_works(lambda: SqlStore(sys.argv[1]))
    print("ready", flush=True)
    while True:
        job = until_it_works(lambda: store.claim(sys.argv[2], None, {lease}))
        if job is None:
            time.sleep(0.02)
            continue
        time.sleep(0.01)
        output = Output(f"{{job.id}}.png", "png", 64, 64, job.epoch, "0" * 64, 1)
        try:
            until_it_works(lambda: store.succeed(job.id, job.epoch, [output], {{}}))
        except LeaseLostError:
            pass
"""


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with postgres_server(is_synced=True) as made:
        yield made


def test_kills_of_the_database_and_of_workers_lose_no_job(server):
    store = SqlStore(server.url)
    code = textwrap.dedent(WORKER.format(lease=LEASE_S))
    draw = random.Random(7)
    started = 0

    def start() -> subprocess.Popen[str]:
        nonlocal started
        started += 1
        process = subprocess.Popen(
            [sys.executable, "-c", code, server.url, f"worker-{started}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    workers = [start() for _ in range(WORKERS)]
    pause = threading.Event()
    accepted: set[str] = set()
    try:
        for number in range(ROUNDS):
            for _ in range(JOBS):
                accepted.add(add(store))
            pause.wait(draw.random())
            if number % 2 == 0:
                server.stop(kill=True)
                pause.wait(OUTAGE_S or draw.random())
                start_again(server, pause)
            else:
                victim = draw.randrange(WORKERS)
                workers[victim].kill()
                workers[victim].wait(60)
                workers[victim] = start()
            while unfinished := retry(lambda: count_unfinished(store)):
                assert unfinished <= len(accepted)
                retry(lambda: store.abandon_expired())
                pause.wait(0.1)
        jobs = {job.id: job for job in store.list(limit=100_000).jobs}
        assert accepted <= jobs.keys()
        for job_id in accepted:
            job = jobs[job_id]
            assert job.status is Status.SUCCEEDED
            assert job.attempts <= MAX_ATTEMPTS
            assert [output.seed for output in job.outputs] == [job.epoch]
    finally:
        for process in workers:
            process.kill()
            process.wait(60)
        store.close()


def add(store: SqlStore) -> str:
    """Add a job, and return its id once it is accepted."""
    job = new_job((Recipe(prompt="a ball"),), datetime.now(UTC))
    return str(retry(lambda: store.add(job, capacity=100_000)).id)


def count_unfinished(store: SqlStore) -> int:
    return store.count(Status.IN_QUEUE) + store.count(Status.IN_PROGRESS)


def retry(call):
    """Return the result of the call, which is repeated while the database is away."""
    pause = threading.Event()
    while True:
        try:
            return call()
        except JobStoreError:
            pause.wait(0.05)


def start_again(server: PostgresServer, pause: threading.Event) -> None:
    """Start a killed server; its remaining processes may need a moment to end."""
    for _ in range(100):
        try:
            return server.start()
        except AssertionError:
            pause.wait(0.1)
    raise AssertionError("the server did not start again")
