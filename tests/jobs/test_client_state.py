"""Contract of the state of clients: in memory, in SQLite, and in PostgreSQL for several servers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from tests.jobs.store_support import LEASE_S, NOW, is_listening, job, until

from fidelora.errors import SettingsError
from fidelora.jobs.api_keys import FileKeys, hash_of
from fidelora.jobs.client_state import ClientState, local_state
from fidelora.jobs.client_tables import MAX_AGE_S, DatabaseKeys, database_state
from fidelora.jobs.memory import MemoryStore
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import JobStore
from fidelora.jobs.transactions import Database


@dataclass
class StateAndStore:
    state: ClientState
    store: JobStore


@pytest.fixture(params=["local", "sqlite", "postgresql"])
def made(request, tmp_path):
    if request.param == "local":
        yield StateAndStore(local_state(tmp_path / "api_keys.json"), MemoryStore())
        return
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    database = Database(url)
    yield StateAndStore(database_state(database), SqlStore(database))
    database.close()


@pytest.fixture
def servers(postgres_url):
    """The state of two servers with one database, which have connected for notifications."""
    databases = [Database(postgres_url) for _ in range(2)]
    states = [database_state(database) for database in databases]
    stores = [SqlStore(database) for database in databases]
    until(lambda: all(map(is_listening, stores)))
    yield [StateAndStore(state, store) for state, store in zip(states, stores, strict=True)]
    for database in databases:
        database.close()


# --- keys ---------------------------------------------------------------------------------------


def test_keys_are_added_found_changed_and_removed(made):
    keys = made.state.keys
    assert (keys.all(), keys.by_hash()) == ([], {})
    secrets = {name: keys.add(name, is_admin=name == "boss") for name in ("web", "boss")}
    assert keys.names() == ["boss", "web"]
    found = keys.find(secrets["web"])
    assert (found.name, found.is_admin, found.sha256) == ("web", False, hash_of(secrets["web"]))
    assert keys.find("fl_wrong") is None
    keys.set_admin("web", True)
    assert keys.find(secrets["web"]).is_admin
    assert keys.find(secrets["boss"]).is_admin
    keys.remove("web")
    assert keys.find(secrets["web"]) is None
    assert keys.names() == ["boss"]


def test_wrong_names_are_refused(made):
    keys = made.state.keys
    secret = keys.add("web")
    with pytest.raises(SettingsError, match="named web exists already"):
        keys.add("web")
    for name in ("", "a\nb", "a" * 101):
        with pytest.raises(SettingsError, match="1 to 100 printable"):
            keys.add(name)
    for call in (keys.remove, lambda name: keys.set_admin(name, True)):
        with pytest.raises(SettingsError, match="nobody does not exist"):
            call("nobody")
    assert [key.sha256 for key in keys.all()] == [hash_of(secret)]


def test_keys_of_a_file_are_imported_once(made, tmp_path):
    file = FileKeys(tmp_path / "others.json")
    secret = file.add("web", is_admin=True)
    file.add("shop")
    keys = made.state.keys
    assert keys.add_existing(file.all()) == ["shop", "web"]
    assert keys.find(secret) == file.find(secret)
    assert keys.add_existing(file.all()) == []


def test_an_import_with_a_taken_name_adds_nothing(made, tmp_path):
    file = FileKeys(tmp_path / "others.json")
    for name in ("a new one", "web"):
        file.add(name)
    made.state.keys.add("web")
    with pytest.raises(SettingsError, match="named web exists already"):
        made.state.keys.add_existing(file.all())
    assert made.state.keys.names() == ["web"]


def test_a_change_is_seen_at_once_by_the_process_that_made_it(made):
    keys = made.state.keys
    assert keys.by_hash() == {}
    secret = keys.add("web")
    assert hash_of(secret) in keys.by_hash()
    keys.remove("web")
    assert keys.by_hash() == {}


def test_the_database_stores_keys_as_hashes_only(servers, postgres):
    secret = servers[0].state.keys.add("web")
    rows = postgres.query("SELECT * FROM api_keys")
    assert hash_of(secret) in rows
    assert secret.removeprefix("fl_") not in rows


def test_other_servers_are_notified_of_changed_keys(servers, clock):
    first, second = (server.state.keys for server in servers)
    assert (first.names(), second.names()) == ([], [])
    secret = first.add("web")
    until(lambda: second.in_memory() is None)
    assert second.find(secret) is not None
    first.set_admin("web", True)
    until(lambda: second.in_memory() is None)
    assert second.find(secret).is_admin
    first.remove("web")
    until(lambda: second.in_memory() is None)
    assert second.by_hash() == {}


@pytest.fixture
def clock(monkeypatch):
    """Stop the clock that ages keys and sessions; return a list with its time in seconds."""
    time_s = [1000.0]
    stopped = SimpleNamespace(monotonic=lambda: time_s[0])
    monkeypatch.setattr("fidelora.jobs.client_tables.time", stopped)
    return time_s


def test_without_notifications_keys_are_read_again_in_time(postgres_url, monkeypatch, clock):
    databases = [Database(postgres_url) for _ in range(2)]
    for database in databases:  # as if the connections were lost
        monkeypatch.setattr(database.notifications, "on_clients_changed", lambda call: None)
    first, second = (database_state(database) for database in databases)
    secret = first.keys.add("web")
    first.sessions.start(hash_of("cookie"), hash_of(secret))
    assert second.keys.find(secret) is not None
    assert second.sessions.key_of(hash_of("cookie")) == hash_of(secret)
    first.keys.remove("web")
    clock[0] += 0.99 * MAX_AGE_S
    assert second.keys.in_memory() is not None
    clock[0] += 0.02 * MAX_AGE_S
    assert second.keys.by_hash() == {}
    assert second.sessions.key_of(hash_of("cookie")) is None
    for database in databases:
        database.close()


def test_keys_in_memory_need_no_query(postgres_url, monkeypatch, clock):
    database = Database(postgres_url)
    DatabaseKeys(database).add("web")
    keys = DatabaseKeys(database, max_age_s=MAX_AGE_S)
    keys.by_hash()
    monkeypatch.setattr(database, "reading", None)
    assert [key.name for key in keys.by_hash().values()] == ["web"]
    database.close()


def test_a_change_during_a_read_is_not_missed(postgres_url, monkeypatch):
    database = Database(postgres_url)
    keys, other = DatabaseKeys(database, max_age_s=MAX_AGE_S), DatabaseKeys(database)
    reading = database.reading

    def reading_and_then_changed():
        other.add("web")
        keys._freshness.invalidate()  # the notification
        monkeypatch.setattr(database, "reading", reading)
        return reading()

    monkeypatch.setattr(database, "reading", reading_and_then_changed)
    keys.by_hash()
    assert keys.in_memory() is None
    database.close()


# --- sessions -----------------------------------------------------------------------------------


def test_sessions_start_and_end(made):
    sessions = made.state.sessions
    key = made.state.keys.add("web")
    assert sessions.key_of(hash_of("cookie")) is None
    sessions.start(hash_of("cookie"), hash_of(key))
    sessions.start(hash_of("other"), hash_of(key))
    for _ in range(2):
        assert sessions.key_of(hash_of("cookie")) == hash_of(key)
    sessions.end(hash_of("cookie"))
    sessions.end(hash_of("unknown"))
    assert sessions.key_of(hash_of("cookie")) is None
    assert sessions.key_of(hash_of("other")) == hash_of(key)


def test_sessions_expire(made, monkeypatch):
    monkeypatch.setattr("fidelora.jobs.client_state.SESSION_S", 0.0)
    monkeypatch.setattr("fidelora.jobs.client_tables.SESSION_S", 0.0)
    made.state.sessions.start(hash_of("cookie"), "k")
    assert made.state.sessions.key_of(hash_of("cookie")) is None


def test_the_oldest_sessions_are_dropped(made, monkeypatch):
    monkeypatch.setattr("fidelora.jobs.client_state.MAX_SESSIONS", 2)
    monkeypatch.setattr("fidelora.jobs.client_tables.MAX_SESSIONS", 2)
    for token in ("a", "b", "c"):
        made.state.sessions.start(hash_of(token), "k")
    found = [made.state.sessions.key_of(hash_of(token)) for token in ("a", "b", "c")]
    assert found == [None, "k", "k"]


def test_sessions_are_valid_at_all_servers(servers, clock):
    first, second = (server.state for server in servers)
    key = first.keys.add("web")
    first.sessions.start(hash_of("cookie"), hash_of(key))
    assert second.sessions.key_of(hash_of("cookie")) == hash_of(key)
    first.sessions.end(hash_of("cookie"))
    until(lambda: second.sessions.key_of(hash_of("cookie")) is None)
    second.sessions.start(hash_of("cookie"), hash_of(key))
    assert first.sessions.key_of(hash_of("cookie")) == hash_of(key)
    second.keys.remove("web")
    until(lambda: first.sessions.key_of(hash_of("cookie")) is None)


# --- AUTOMATIC1111 ------------------------------------------------------------------------------


def test_models_and_jobs_belong_to_owners(made):
    a1111, store = made.state.a1111, made.store
    ids = [store.add(job(owner=owner)).id for owner in ("me", "me", "you")]
    assert a1111.model("me") is None
    a1111.set_model("me", "sdxl")
    a1111.set_model("me", "sd15")
    assert (a1111.model("me"), a1111.model("you")) == ("sd15", None)
    for job_id, owner in zip(ids, ("me", "me", "you"), strict=True):
        a1111.begin(job_id, owner)
    assert (a1111.jobs("me"), a1111.jobs("you"), a1111.jobs("")) == (ids[:2], ids[2:], [])
    a1111.end(ids[0])
    a1111.end(ids[0])
    assert a1111.jobs("me") == ids[1:2]


def test_all_servers_read_the_jobs_and_models_of_clients(servers):
    first, second = servers
    added = first.store.add(job(owner="me"))
    first.state.a1111.begin(added.id, "me")
    first.state.a1111.set_model("me", "sdxl")
    assert second.state.a1111.jobs("me") == [added.id]
    assert second.state.a1111.model("me") == "sdxl"


def test_jobs_of_a_lost_server_are_forgotten_when_they_end(servers, postgres):
    first, second = servers
    lost = first.store.add(job(owner="me"))
    first.state.a1111.begin(lost.id, "me")
    claimed = second.store.claim("worker", NOW, LEASE_S)
    second.store.succeed(claimed.id, claimed.epoch, [], {})
    assert second.state.a1111.jobs("me") == []
    another = second.store.add(job(owner="you"))
    second.state.a1111.begin(another.id, "you")
    assert postgres.query("SELECT job_id FROM a1111_jobs").split() == [another.id]


def test_a_removed_key_leaves_no_model(servers):
    state = servers[0].state
    key = state.keys.find(state.keys.add("web"))
    state.a1111.set_model(key.id, "sdxl")
    state.keys.remove("web")
    assert state.a1111.model(key.id) is None


def test_the_file_stores_keys_as_hashes_only(tmp_path):
    secret = FileKeys(tmp_path / "api_keys.json").add("web")
    (entry,) = json.loads((tmp_path / "api_keys.json").read_text())["keys"]
    assert entry == {"name": "web", "sha256": hash_of(secret), "admin": False}
