"""Several processes and machines on one PostgreSQL server: the SQL store's guarantees there."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from tests.jobs.store_support import LEASE_S, NOW, A, B, is_listening, job, until
from tests.postgres import PostgresServer, missing, postgres_server

from fidelora.errors import JobStoreError, QueueFullError
from fidelora.jobs import connection_watchdog, database
from fidelora.jobs.codec import DOCUMENT_FORMAT
from fidelora.jobs.database import database_revisions, open_database
from fidelora.jobs.job import Status
from fidelora.jobs.queries import Queries
from fidelora.jobs.rows import JOBS, job_of
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import WorkerState

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "PostgreSQL can be started")

C = "c" * 64
PROCESSES = 4


@pytest.fixture
def store(postgres_url):
    made = SqlStore(postgres_url)
    yield made
    made.close()


def test_processes_can_open_an_empty_database_at_the_same_time(postgres_url):
    code = f"""
        import sys
        from fidelora.jobs.sql import SqlStore
        print("ready", flush=True)
        sys.stdin.readline()
        SqlStore({postgres_url!r}).close()
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", lines],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    ended = [process.communicate("\n", timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, ended


def test_threads_can_open_an_empty_database_at_the_same_time(postgres_url):
    with ThreadPoolExecutor(PROCESSES) as threads:
        stores = list(threads.map(SqlStore, [postgres_url] * PROCESSES, timeout=120))
    for each in stores:
        each.close()
    found, needed = database_revisions(postgres_url)
    assert found == needed


def test_the_revision_of_an_empty_database_is_empty(postgres_url):
    found, needed = database_revisions(postgres_url)
    assert (found, bool(needed)) == ("", True)


def test_the_capacity_holds_for_several_clients(store, postgres_url):
    stores = [SqlStore(postgres_url) for _ in range(12)]
    barrier = threading.Barrier(len(stores))

    def add(client: SqlStore) -> bool:
        barrier.wait(60)
        try:
            client.add(job(), capacity=10)
        except QueueFullError:
            return False
        return True

    with ThreadPoolExecutor(len(stores)) as threads:
        accepted = list(threads.map(add, stores))
    for each in stores:
        each.close()
    assert (sum(accepted), store.count(Status.IN_QUEUE)) == (10, 10)


def test_clients_on_several_connections_claim_each_job_once(store, postgres_url):
    added = {store.add(job(*adapters)).id for adapters in [(A,), (B,), ()] * 30}
    stores = [SqlStore(postgres_url) for _ in range(8)]

    def work(client: SqlStore) -> list[str]:
        got = []
        while (
            claimed := client.claim("worker", None, LEASE_S, loaded=[A], merged=[B])
        ) is not None:
            got.append(claimed.id)
        return got

    with ThreadPoolExecutor(len(stores)) as threads:
        got = Counter(job_id for ids in threads.map(work, stores) for job_id in ids)
    for each in stores:
        each.close()
    assert got == Counter(added)


@pytest.mark.parametrize("is_analyzed", [False, True])
@pytest.mark.parametrize("status", ["in_queue", "succeeded"])
def test_a_claim_reads_few_of_the_jobs(store, postgres_url, status, is_analyzed):
    """This includes claims for adapters that no job needs, and claims from an empty queue."""
    store.add(job(A))
    engine = open_database(postgres_url)
    columns = "epoch, cancel_requested, document_format, document, version, owner, adapters"
    copy = f"""
        INSERT INTO jobs (id, turn, seq, due, attempts, status, {columns})
        SELECT md5(number::text), number, number, number + 99, 0, '{status}', {columns}
        FROM jobs, generate_series(1000, 3000) number
    """
    with engine.begin() as connection:
        connection.exec_driver_sql(copy)
    if is_analyzed:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    store.add(job(B))
    if status == "succeeded":
        assert store.claim("worker", None, LEASE_S) is not None
        assert store.claim("worker", None, LEASE_S) is not None
    for loaded, merged in [((A, B), B), ((B,), A), ((A,), C), ((C,), C)]:
        # Each subquery reads a few jobs: due ones, first ones, and up to eight with the adapters.
        assert rows_of_claim(engine, loaded, merged) < 100
    engine.dispose()


def rows_of_claim(engine: sa.Engine, loaded: tuple[str, ...], merged: str) -> int:
    """Return the number of rows that the query of a claim reads."""
    executed: list[tuple[str, Any]] = []
    given = {"worker": "worker", "loaded": loaded, "merged": merged, "hold_s": 0.5, "now_s": None}

    def on_execute(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        executed.append((statement, values))

    sa.event.listen(engine, "before_cursor_execute", on_execute)
    with engine.connect() as connection:
        connection.execute(Queries("postgresql", DOCUMENT_FORMAT).claim, given)
        connection.rollback()
        statement, values = executed[-1]
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
        (plan,) = connection.exec_driver_sql(explain, values).scalar_one()
        connection.rollback()
    sa.event.remove(engine, "before_cursor_execute", on_execute)
    return rows_read(plan["Plan"])


def rows_read(node: dict[str, Any]) -> int:
    """Return the number of rows that a node of a plan and its children read from tables."""
    rows = sum(map(rows_read, node.get("Plans", ())))
    if "Scan" in node["Node Type"] and node.get("Relation Name") == "jobs":
        per_loop = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        rows += int(per_loop * node["Actual Loops"])
    return rows


def test_leases_use_the_clock_of_the_database(store, monkeypatch):
    """The clock of a worker's machine has no effect."""
    monkeypatch.setattr("fidelora.jobs.transactions.time.time", lambda: 0.0)
    before = datetime.now(UTC)
    store.add(job())
    claimed = store.claim("worker", None, LEASE_S)
    assert claimed is not None
    assert claimed.lease_expires_at is not None
    ahead = claimed.lease_expires_at - before
    assert timedelta(seconds=LEASE_S) <= ahead <= timedelta(seconds=LEASE_S + 60)
    assert store.abandon_expired() == ()
    store.renew(claimed.id, claimed.epoch, None, None, -1.0)
    assert [each.id for each in store.abandon_expired()] == [claimed.id]


def test_a_check_for_cancellation_sends_no_query(store):
    store.add(job())
    claimed = store.claim("worker", None, LEASE_S)
    assert claimed is not None
    store.cancel_requested(claimed.id)
    until(lambda: is_listening(store))
    statements: list[str] = []
    sa.event.listen(
        store._database.engine, "before_cursor_execute", lambda *given: statements.append(given[2])
    )
    for _ in range(100):
        assert not store.cancel_requested(claimed.id)
    assert statements == []


def test_other_processes_are_notified_of_new_and_canceled_jobs(store, postgres_url):
    other = SqlStore(postgres_url)
    wakes: list[object] = []
    other.on_new_job(wakes.append)
    until(lambda: is_listening(other))
    added = store.add(job())
    until(lambda: len(wakes) == 1)
    store.claim("worker", None, LEASE_S)
    store.cancel(added.id)
    until(lambda: other.cancel_requested(added.id))
    other.close()


def test_a_new_job_wakes_as_many_idle_workers_as_there_are_jobs(store):
    wakes: list[Collection[str] | None] = []
    store.on_new_job(wakes.append)
    until(lambda: is_listening(store))
    store.report_worker(WorkerState("dead"), datetime.now(UTC) - timedelta(hours=1))
    for name, device, loaded in (
        ("empty", "cuda:1", set()),
        ("home", "cpu", {A, B}),
        ("other", "cuda:0", {C}),
    ):
        store.report_worker(WorkerState(name, device, loaded=frozenset(loaded)))
    added = [store.add(job(A))]
    added += [store.add(job()), store.add(job(A)), store.add(job(device_kind="cuda"))]
    until(lambda: len(wakes) == 4)
    assert wakes == [["home"], ["empty", "other"], ["home", "empty", "other"], ["empty", "other"]]
    assert store.claim("home", None, LEASE_S, loaded={A, B}).id == added[0].id
    store.add(job(A, B))
    until(lambda: len(wakes) == 5)
    assert wakes[4] == ["empty", "other"], "a worker with a job was woken"
    for name in ("empty", "other"):
        store.claim(name, None, LEASE_S)
    store.add(job(A))
    until(lambda: len(wakes) == 6)
    assert wakes[5] is None, "workers were woken by name although none is idle"


def test_a_new_job_wakes_all_workers_if_their_names_are_too_long(store):
    wakes: list[Collection[str] | None] = []
    store.on_new_job(wakes.append)
    until(lambda: is_listening(store))
    names = [f"{number}-{'n' * 90}" for number in range(80)]
    for name in names:
        store.report_worker(WorkerState(name))
    for _ in names:
        store.add(job())
    until(lambda: len(wakes) == len(names))
    assert wakes[0] == [min(names)]
    assert wakes[-1] is None


def test_lost_notifications_return_with_the_connection(store):
    wakes: list[object] = []
    store.on_new_job(wakes.append)
    until(lambda: is_listening(store))
    with store._database.engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'"
        )
    until(lambda: not is_listening(store))
    until(lambda: is_listening(store))
    store.add(job())
    until(lambda: len(wakes) >= 1)


@pytest.fixture
def proxy(postgres_url):
    made = HangingProxy(int(postgres_url.rpartition(":")[2].partition("/")[0]))
    yield made
    made.close()


class HangingProxy:
    """Forwards connections to PostgreSQL, and can stop forwarding while they stay open.

    Attributes:
        port: port on 127.0.0.1.
        passes: cleared while nothing is forwarded.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passes = threading.Event()
        self.passes.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.passes.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with source, sink, suppress(OSError):
            while part := source.recv(65_536):
                self.passes.wait()
                sink.sendall(part)


@pytest.mark.parametrize("is_idle", [False, True])
def test_a_database_that_hangs_is_an_error(postgres_url, proxy, monkeypatch, is_idle):
    monkeypatch.setattr(connection_watchdog, "MAX_TRANSACTION_S", 0.3)
    if is_idle:  # the connection is tested before its use
        monkeypatch.setattr(database, "_TEST_AFTER_IDLE_S", 0)
    port = postgres_url.rpartition(":")[2].partition("/")[0]
    store = SqlStore(postgres_url.replace(f":{port}/", f":{proxy.port}/"))
    added = store.add(job())
    proxy.passes.clear()
    with pytest.raises(JobStoreError):
        store.get(added.id)
    proxy.passes.set()
    assert store.get(added.id) == added
    store.close()


def test_connections_detect_that_the_database_machine_has_vanished(postgres_url):
    for url, idle_s in ((postgres_url, "10"), (f"{postgres_url}?keepalives_idle=77", "77")):
        engine = open_database(url)
        with engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            parameters = driver.info.get_parameters()
        engine.dispose()
        assert parameters["keepalives_idle"] == idle_s
        assert parameters["tcp_user_timeout"] == "20000"


def test_a_killed_database_loses_no_accepted_job():
    with postgres_server() as server:
        store = SqlStore(server.url)
        added = [store.add(job()).id for _ in range(5)]
        claimed = store.claim("worker", None, LEASE_S)
        assert claimed is not None
        server.stop(kill=True)
        for _ in range(2):
            with pytest.raises(JobStoreError, match="cannot be used at the moment"):
                store.get(claimed.id)
        until_it_starts(server)
        assert store.get(claimed.id) == claimed
        assert {each.id for each in store.list().jobs} == set(added)
        assert store.succeed(claimed.id, claimed.epoch, [], {}).status is Status.SUCCEEDED
        store.close()


def until_it_starts(server: PostgresServer) -> None:
    """Start a server after it was killed; its remaining processes may need a moment to end."""
    for _ in range(100):
        try:
            return server.start()
        except AssertionError:
            threading.Event().wait(0.1)
    raise AssertionError("the server did not start again")


def test_only_sqlite_and_postgresql_are_supported():
    with pytest.raises(JobStoreError, match="mysql is not supported"):
        open_database("mysql://localhost/fidelora")


def test_a_missing_server_is_a_store_error_without_the_password():
    with pytest.raises(JobStoreError, match="cannot be used") as refused:
        open_database("postgresql://me:hunter2@127.0.0.1:1/fidelora")
    assert "hunter2" not in str(refused.value)


def test_the_state_of_a_worker_survives_a_report_of_another_process(store, postgres_url):
    other = SqlStore(postgres_url)
    for each, name in ((store, "a"), (other, "b"), (store, "a")):
        each.report_worker(WorkerState(name, loaded=frozenset({A, B})))
    assert [each.name for each in store.workers()] == ["a", "b"]
    other.close()


def test_a_claim_locks_one_job(store):
    """Claims at the same time take different jobs, and leave all others to further claims."""
    added = [store.add(job(A), now=NOW).id for _ in range(5)]
    given = {"now_s": None, "worker": "w", "loaded": [A], "merged": A, "hold_s": 0.0}
    free = sa.select(JOBS.c.id).with_for_update(skip_locked=True)
    with (
        store._database.engine.connect() as first,
        store._database.engine.connect() as second,
        store._database.engine.connect() as third,
    ):
        rows = [each.execute(store._queries.claim, given).one() for each in (first, second)]
        assert [job_of(row).id for row in rows] == added[:2]
        assert set(third.execute(free).scalars()) == set(added[2:])
