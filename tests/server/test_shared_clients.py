"""Several servers on one PostgreSQL database share API keys, logins and A1111's state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from tests.jobs.store_support import is_listening
from tests.postgres import PostgresServer
from tests.server.http_support import SERVER_DEFAULTS, client_of, in_thread, settings_for
from tests.server.serve_support import ANSWER_DEADLINE_S, DEADLINE_S, Server, until

from fidelora.families import all_families
from fidelora.jobs.api_keys import FileKeys
from fidelora.jobs.client_tables import database_state
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.transactions import Database
from fidelora.server.app import context_with_store
from fidelora.server.context import ServerContext
from fidelora.server.login import COOKIE, Login
from fidelora.server.middleware import AccessControl

OTHER_MACHINE = ("203.0.113.7", 50000)


@pytest.fixture
def contexts(tmp_path: Path, postgres_url: str) -> Iterator[list[ServerContext]]:
    """Two servers in this process, whose connections for notifications are open."""
    databases = [Database(postgres_url) for _ in range(2)]
    made, stores = [], []
    for number, database in enumerate(databases):
        store = SqlStore(database)
        made.append(
            context_with_store(
                store,
                settings_for(tmp_path / str(number)),
                dict.fromkeys(all_families(), SERVER_DEFAULTS),
                "https://images.example.com",
                clients=database_state(database),
            )
        )
        stores.append(store)
    until(lambda: all(map(is_listening, stores)))
    yield made
    for database in databases:
        database.close()


def test_a_key_is_valid_at_each_server_until_it_is_revoked(contexts):
    first, second = contexts
    first.keys.add("of another client")
    bearer = {"Authorization": f"Bearer {first.keys.add('alice')}"}
    with client_of(second, client=OTHER_MACHINE) as client:
        until(lambda: client.get("/v1/requests", headers=bearer).status_code == 200)
        assert client.get("/v1/requests").status_code == 401
        first.keys.remove("alice")
        until(lambda: client.get("/v1/requests", headers=bearer).status_code == 401)


def test_other_machines_are_refused_after_the_last_key_is_revoked(contexts):
    first, second = contexts
    bearer = {"Authorization": f"Bearer {first.keys.add('alice')}"}
    spoofed = bearer | {"Host": "localhost"}
    with client_of(second, client=OTHER_MACHINE) as client:
        until(lambda: client.get("/v1/requests", headers=bearer).status_code == 200)
        first.keys.remove("alice")
        until(lambda: client.get("/v1/requests", headers=bearer).status_code != 200)
        for headers in (bearer, spoofed, {}):
            response = client.get("/v1/requests", headers=headers)
            assert response.status_code == 403
            assert response.json()["detail"]["error"]["code"] == "CALLER_NOT_ALLOWED"


def test_without_the_database_no_key_is_accepted(contexts, postgres: PostgresServer):
    first, _ = contexts
    bearer = {"Authorization": f"Bearer {first.keys.add('alice')}"}
    with client_of(first, client=OTHER_MACHINE) as client:
        assert client.get("/v1/requests", headers=bearer).status_code == 200
        postgres.query("ALTER TABLE api_keys RENAME TO gone")
        until(lambda: client.get("/v1/requests", headers=bearer).status_code == 503)
        assert client.get("/health").status_code == 200


def test_a_login_without_the_database_is_a_temporary_error(contexts, postgres: PostgresServer):
    context, _ = contexts
    keys, sessions = context.keys, context.clients.sessions
    secret = keys.add("alice")
    app = AccessControl(
        PlainTextResponse("the page"), keys, "http://testserver", Login(keys, sessions, secure=True)
    )
    client = TestClient(app, raise_server_exceptions=True)
    postgres.query("ALTER TABLE sessions RENAME TO gone")
    response = client.post("/login", data={"key": secret})
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert "gone" not in response.text


# --- the command line ---------------------------------------------------------------------------


def test_keys_of_the_database_are_managed_on_the_command_line(
    fidelora, postgres_url, tmp_path, monkeypatch
):
    monkeypatch.setenv("FIDELORA_DATA_DIR", str(tmp_path))
    store = ("--store", postgres_url)
    code, key, _ = fidelora("keys", "add", "web", *store)
    assert (code, key[:3]) == (0, "fl_")
    assert fidelora("keys", "list", *store)[:2] == (0, "web\n")
    fidelora("keys", "admin", "web", *store)
    assert fidelora("keys", "list", *store)[1] == "web (admin)\n"
    file = FileKeys(tmp_path / "others.json")
    file.add("shop")
    assert fidelora("keys", "import", str(tmp_path / "others.json"), *store)[:2] == (0, "shop\n")
    code, _, err = fidelora("keys", "remove", "web", *store)
    assert (code, err) == (0, "")
    assert "the last key" in fidelora("keys", "remove", "shop", *store)[2]
    code, _, err = fidelora("keys", "remove", "shop", *store)
    assert (code, "shop does not exist" in err) == (2, True)
    assert not (tmp_path / "api_keys.json").exists()
    code, _, err = fidelora("keys", "list", "--store", f"sqlite:///{tmp_path}/jobs.sqlite")
    assert (code, "omit --store" in err) == (2, True)


def test_a_server_does_not_start_without_its_former_keys(
    fidelora, postgres_url, tmp_path, monkeypatch
):
    monkeypatch.setenv("FIDELORA_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FIDELORA_STORE_URL", postgres_url)
    file = tmp_path / "api_keys.json"
    FileKeys(file).add("web")
    code, _, err = fidelora("serve", "--port", "0", "--device", "none")
    message = " ".join(err.split())
    assert (code, "of an older version, contains 1. Import them" in message) == (2, True)
    file.unlink()
    code, _, err = fidelora("serve", "--port", "0", "--device", "none", "--host", "0.0.0.0")
    assert (code, "the server needs an API key" in " ".join(err.split())) == (2, True)


# --- real processes -----------------------------------------------------------------------------


@pytest.fixture
def servers(tmp_path: Path, postgres_url: str) -> Iterator[list[Server]]:
    folders = {
        "WORKFLOWS_BASE_PATH": "loras",
        "OUTPUT_BASE_PATH": "outputs",
        "LORA_DOWNLOAD_CACHE_DIR": "adapters",
    }
    settings = {name: str(tmp_path / folder) for name, folder in folders.items()}
    settings |= {"FIDELORA_STORE_URL": postgres_url, "DEVICE": "none"}
    settings |= {"FIDELORA_DTYPE": "float32", "FIDELORA_PAGE": "true"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor() as threads:
        made = list(threads.map(lambda name: Server(tmp_path / name, **settings), ("one", "two")))
    yield made
    for server in made:
        server.close()


@pytest.mark.timeout(600)  # waits up to DEADLINE_S at each step
def test_any_process_serves_any_client(servers, fidelora, postgres_url):
    pytest.importorskip("gradio")
    first, second = servers
    for name in ("alice", "bob"):
        code, out, _ = fidelora("keys", "add", name, "--store", postgres_url)
        assert code == 0
        if name == "alice":
            bearer = {"Authorization": f"Bearer {out.strip()}"}
    until(lambda: status(second, "/v1/requests") == 401)

    # A login at one server opens the page of the other, until the logout at either.
    form = {"key": bearer["Authorization"].removeprefix("Bearer ")}
    login = httpx2.post(f"{first.url}/login", data=form, timeout=ANSWER_DEADLINE_S)
    cookie = {"Cookie": f"{COOKIE}={cookie_of(login)}"}
    assert status(second, "/theme.css", headers=cookie) == 200
    assert status(first, "/theme.css", headers=cookie) == 200
    assert status(second, "/logout", "POST", headers=cookie) == 303
    until(lambda: status(first, "/theme.css", headers=cookie) == 401)

    # AUTOMATIC1111's API: any server reports the settings and the progress, and interrupts.
    model = {"sd_model_checkpoint": "sdxl"}
    assert status(first, "/sdapi/v1/options", "POST", headers=bearer, json=model) == 200
    options = second.call("/sdapi/v1/options", headers=bearer)
    assert options["sd_model_checkpoint"] == "sdxl"
    body = {"prompt": "a ball", "steps": 1, "width": 64, "height": 64}
    body["override_settings"] = {"sd_model_checkpoint": "sd15"}
    waiting = in_thread(lambda: call(first, "/sdapi/v1/txt2img", "POST", headers=bearer, json=body))
    until(lambda: progress(second, bearer)["job_count"] == 1)
    assert status(second, "/sdapi/v1/interrupt", "POST", headers=bearer) == 200
    assert waiting.result(DEADLINE_S).json()["error"] == "REQUEST_CANCELED"
    assert progress(second, bearer)["job_count"] == 0

    # The job of a server that was killed goes on, and the other server interrupts it.
    in_thread(lambda: call(first, "/sdapi/v1/txt2img", "POST", headers=bearer, json=body))
    until(lambda: progress(second, bearer)["job_count"] == 1)
    first.kill()
    assert progress(second, bearer)["job_count"] == 1
    assert status(second, "/sdapi/v1/skip", "POST", headers=bearer) == 200
    until(lambda: progress(second, bearer)["job_count"] == 0)

    assert fidelora("keys", "remove", "alice", "--store", postgres_url)[0] == 0
    until(lambda: status(second, "/v1/requests", headers=bearer) == 401)


def call(server: Server, path: str, method: str = "GET", **given: Any) -> httpx2.Response:
    return httpx2.request(method, server.url + path, timeout=DEADLINE_S, **given)


def status(server: Server, path: str, method: str = "GET", **given: Any) -> int:
    return call(server, path, method, **given).status_code


def progress(server: Server, bearer: dict[str, str]) -> Any:
    return server.call("/sdapi/v1/progress", headers=bearer)["state"]


def cookie_of(response: httpx2.Response) -> str:
    found = re.search(rf"{COOKIE}=([^;]+)", response.headers["set-cookie"])
    assert found is not None
    return found[1]
