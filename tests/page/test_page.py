"""The page without a browser: login, routes, policies and escaping."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import structlog
from starlette.testclient import TestClient
from tests.server.http_support import MINIMAL, client_of, context_in

from fidelora.server import app as server_app
from fidelora.server.login import COOKIE
from fidelora.server.logs import configure_logs
from fidelora.server.page import mount
from fidelora.server.page.html import escape

PROTECTED = [
    "/config",
    "/theme.css",
    "/static/img/logo.svg",
    "/gradio_api/heartbeat/x",
    "/reports/" + "a" * 32,
    "/images.zip?image=a.0",
    "/logout",
]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return context_in(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def app(context):
    return server_app.make_app(context, with_page=True)


@pytest.fixture(scope="module")
def client_with_cookies(app):
    with TestClient(
        app,
        base_url="http://127.0.0.1:8000",
        follow_redirects=False,
        client=("127.0.0.1", 50000),
    ) as client:
        yield client


@pytest.fixture
def client(client_with_cookies):
    client_with_cookies.cookies.clear()
    return client_with_cookies


@pytest.fixture
def key(context):
    yield context.keys.add("alice")
    if "alice" in context.keys.names():
        context.keys.remove("alice")


class Links(HTMLParser):
    """Collects the `src`, `href` and `content` attributes of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "content")]


def predict(client, data, **headers):
    """Send an immediate event, as the page does."""
    body = {"data": data, "fn_index": 0, "session_hash": "s", "trigger_id": 1, "event_data": None}
    return client.post("/gradio_api/run/predict", json=body, headers=headers)


def test_the_page_is_at_the_root_and_names_no_other_host(client):
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    parser = Links()
    parser.feed(response.text)
    assert parser.found
    assert not [link for link in parser.found if "://" in link]
    assert client.get("/theme.css").status_code == 200
    assert "://" not in re.sub(r"http://www\.w3\.org\S*", "", client.get("/theme.css").text)


def test_a_server_without_workers_has_the_page(tmp_path):
    context = context_in(tmp_path, device="none")
    with TestClient(
        server_app.make_app(context, with_page=True),
        base_url="http://127.0.0.1:8000",
        client=("127.0.0.1", 50000),
    ) as client:
        assert "gradio" in client.get("/").text


def test_the_policy_allows_only_the_inline_scripts_of_the_page(client):
    response = client.get("/")
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["content-security-policy"].split(";")
    )
    assert "unsafe" not in policy["script-src"]
    assert policy["script-src"].count("'sha256-") >= 5
    assert policy["default-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["object-src"] == "'none'"
    assert len(response.content) == int(response.headers["content-length"])


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/call/generate",
        "/gradio_api/proxy=https://a.hf.space/x",
        "/gradio_api/runs",
        "/monitoring",
        "/gradio_api/deep_link",
        "/svelte/x",
        "/gradio_api/vibe-code",
        "/gradio_api/stream/x/y/z",
        "/nonsense",
        "/gradio_api/mcp/sse",
        "/gradio_api/run/other",
        "/robots.txt",
    ],
)
def test_gradio_routes_that_the_page_does_not_need_return_404(client, path):
    for response in (client.get(path), client.post(path, json={})):
        assert response.status_code == 404
        assert response.json()["detail"]["error"]["code"] == "NOT_FOUND"


def test_no_file_outside_the_page_folder_can_be_read(client, context):
    (context.settings.outputs).mkdir(parents=True, exist_ok=True)
    (context.settings.outputs / "secret.png").write_bytes(b"secret")
    for path in (
        "/etc/passwd",
        str(context.settings.outputs / "secret.png"),
        str(context.settings.data_dir / "jobs.sqlite"),
        __file__,
    ):
        for spelling in (
            path,
            "/" + path,
            path.replace("/", "%2f"),
            f"{context.settings.data_dir}/page/files/../../..{path}",
        ):
            assert client.get(f"/gradio_api/file={spelling}").status_code in (403, 404)
    for run_id in ("../../../etc", "%2e%2e", "a" * 31, "a" * 32):
        assert client.get(f"/reports/{run_id}").status_code == 404


def test_an_event_with_a_file_url_is_refused(client):
    """Gradio would fetch a file that an event names by URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        file = {
            "path": f"http://127.0.0.1:{listener.getsockname()[1]}/x.png",
            "meta": {"_type": "gradio.FileData"},
        }
        for data in ([file], [[{"a": file}]]):
            assert predict(client, data).status_code == 400
            body = {"data": data, "fn_index": 0, "session_hash": "s"}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()
    assert (
        client.post(
            "/gradio_api/run/predict",
            content=b"[" * 100_000,
            headers={"Content-Type": "application/json"},
        ).status_code
        < 500
    )


@pytest.mark.parametrize("up", ["", "./", "../{folder}/", "x/../", "~/"])
def test_an_event_with_a_relative_file_is_refused(client, up, tmp_path, monkeypatch):
    """Gradio would open any file on the machine, relative to the server's working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.safetensors").write_bytes(b"private")
    path = up.format(folder=tmp_path.name) + "private.safetensors"
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for data in ([file], [[file]], [[{"a": file}]]):
        assert predict(client, data).status_code == 404
        body = {"data": data, "fn_index": 0, "session_hash": "s"}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 404
    lora = {"path": path, "network_multiplier": 1}  # in a stored form
    assert predict(client, [lora]).status_code != 404


@pytest.mark.parametrize(
    "target",
    [
        "http://example.com/x.png",
        "https://example.com/x.svg",
        "http:%2f%2fexample.com/x",
        "%68ttp://example.com/x",
        "//example.com/x",
        "HTTPS://example.com",
        "ftp://example.com/x",
        "file:///etc/passwd",
        "http%253a%252f%252fexample.com",
        "http:example.com",
        "",
        "/http://example.com",
        "{files}/../http://example.com",
        "{files}x/y.png",
    ],
)
def test_the_file_route_fetches_nothing(client, context, monkeypatch, target):
    """Gradio would fetch a URL and serve the response as its own."""

    def fail(*_, **__):
        raise AssertionError("a file was fetched")

    monkeypatch.setattr("gradio.routes.secure_url_stream_response", fail)
    monkeypatch.setattr("gradio.routes.file_fetch", fail)
    for method in ("GET", "HEAD"):
        response = client.request(
            method,
            "/gradio_api/file=" + target.format(files=context.settings.data_dir / "page" / "files"),
        )
        assert response.status_code == 404


def test_an_uploaded_file_is_served_without_permissions(client):
    (path,) = client.post("/gradio_api/upload", files={"files": ("x.svg", b"<svg/>")}).json()
    response = client.get(f"/gradio_api/file={path}")
    assert (response.status_code, response.content) == (200, b"<svg/>")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_other_sites_cannot_act_on_the_page(client):
    assert (
        predict(client, [], Origin="https://evil.example").json()["detail"]["error"]["code"]
        == "OTHER_SITE"
    )
    assert predict(client, [], Origin="null").status_code == 400
    assert predict(client, [], **{"Sec-Fetch-Site": "cross-site"}).status_code == 400
    upload = client.post(
        "/gradio_api/upload", files={"files": b"x"}, headers={"Origin": "http://127.0.0.1:8001"}
    )
    assert upload.json()["detail"]["error"]["code"] == "OTHER_SITE"
    for headers in ({}, {"Origin": "http://127.0.0.1:8000"}, {"Sec-Fetch-Site": "same-origin"}):
        assert (
            client.post("/gradio_api/upload", files={"files": b"x"}, headers=headers).status_code
            == 200
        )


def test_a_foreign_host_name_is_refused(client):
    response = client.get("/", headers={"Host": "evil.example"})
    assert response.json()["detail"]["error"]["code"] == "HOST_NOT_ALLOWED"


def test_uploads_have_the_size_limit_of_loras_and_training_runs(client, context):
    size = max(context.settings.job_max_mb, context.settings.lora_max_mb) * 2**20 + 2**20 + 1
    response = client.post(
        "/gradio_api/upload",
        content=b"x",
        headers={"Content-Length": str(size), "Content-Type": "multipart/form-data"},
    )
    assert response.json()["detail"]["error"]["code"] == "BODY_TOO_LARGE"
    response = client.post("/gradio_api/queue/join", content=b"x" * (2**20 + 1))
    assert response.json()["detail"]["error"]["code"] == "BODY_TOO_LARGE"


@pytest.mark.parametrize("event", [-1, 10**9, 10**400, "-1", "0", 1.5, [], {}])
def test_an_event_that_the_page_does_not_have_is_refused(client, event):
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        body = {"data": [], "fn_index": event, "session_hash": "s"}
        assert client.post(path, json=body).status_code == 400


def test_failed_events_are_logged_briefly_and_once(client, capfd):
    """Gradio would print each error to stderr, with the values of the event."""
    root = logging.getLogger()
    before = (root.handlers, root.level)
    try:
        configure_logs("json")
        for _ in range(3):
            body = {"data": ["A" * 100_000], "fn_index": 0, "session_hash": "s"}
            assert client.post("/gradio_api/run/predict", json=body).status_code == 500
        written = capfd.readouterr().err
    finally:
        root.handlers, root.level = before
        structlog.reset_defaults()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["event"] for line in lines].count("an event of the page failed") == 1
    assert len(written) < 50_000


def test_a_stream_without_a_session_is_refused(client):
    for path in ("/gradio_api/queue/data", "/gradio_api/heartbeat/"):
        assert client.get(path, params={"session_hash": ""}).status_code == 404


def test_with_api_keys_nothing_is_shown_without_one(client, key):
    response = client.get("/")
    assert "API key" in response.text
    assert "gradio" not in response.text
    assert "script" not in response.text.replace("description", "")
    for path in PROTECTED:
        assert client.get(path).status_code == 401
    for path in (
        "/gradio_api/queue/join",
        "/gradio_api/upload",
        "/gradio_api/run/predict",
        "/logout",
    ):
        assert client.post(path, json={}).status_code == 401
    wrong = client.post("/login", data={"key": "fl_wrong"})
    assert wrong.status_code == 403
    assert COOKIE not in wrong.cookies
    assert client.post("/login", content=b"key=" + b"x" * 500_000).status_code == 403


def test_the_session_cookie_opens_the_page_but_not_the_api(client, context, key):
    response = client.post("/login", data={"key": f" {key} "})
    assert response.status_code == 303
    assert {"HttpOnly", "SameSite=strict"} <= set(response.headers["set-cookie"].split("; "))
    assert key not in response.headers["set-cookie"]
    assert "gradio" in client.get("/").text
    assert "Log out" in client.get("/logout").text
    for method, path in (("GET", "/v1/requests"), ("GET", "/v1/loras"), ("GET", "/metrics")):
        assert client.request(method, path).status_code == 401
    assert client.post("/v1/inference", json=MINIMAL).status_code == 401
    assert client.get("/theme.css", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_session_ends_at_logout_and_with_its_key(client, context, key):
    client.post("/login", data={"key": key})
    before = client.cookies[COOKIE]
    assert client.post("/logout").status_code == 303
    client.cookies.set(COOKIE, before)
    assert client.get("/theme.css").status_code == 401
    client.cookies.clear()
    other = context.keys.add("bob")
    try:
        client.post("/login", data={"key": key})
        assert client.get("/theme.css").status_code == 200
        context.keys.remove("alice")
        assert client.get("/theme.css").status_code == 401
        context.keys.add("alice")  # another key of the same name
        assert client.get("/theme.css").status_code == 401
    finally:
        context.keys.remove("bob")
    assert other


def test_without_gradio_the_root_explains_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    context = context_in(tmp_path)
    context.keys.add("alice")
    with TestClient(
        server_app.make_app(context, with_page=True), base_url="http://127.0.0.1:8000"
    ) as client:
        assert "pip install '.[ui]'" in client.get("/").text
        assert client.get("/theme.css").status_code == 401
        assert client.get("/health").status_code == 200


def test_the_page_can_be_switched_off(tmp_path):
    context = context_in(tmp_path, page=False)
    assert isinstance(mount.make_page(context, None), str)  # type: ignore[arg-type]
    with client_of(context) as client:
        assert "switched off" in client.get("/").text
        assert client.get("/gradio_api/queue/data").status_code == 404


def test_behind_a_proxy_the_page_uses_the_public_path(tmp_path):
    context = context_in(tmp_path)
    object.__setattr__(context, "base_url", "https://images.example.com/fidelora")
    headers = {"Host": "images.example.com", "X-Forwarded-Proto": "https"}
    with TestClient(
        server_app.make_app(context, with_page=True),
        base_url="http://127.0.0.1:8000",
        client=("127.0.0.1", 50000),
    ) as client:
        page = client.get("/", headers=headers).text
        root = re.search(r'"root":("[^"]*")', page)
        assert root
        assert json.loads(root[1]) == "https://images.example.com/fidelora"
        assert (
            predict(
                client, [], Origin="https://images.example.com", Host="127.0.0.1:8000"
            ).status_code
            != 400
        )


def test_the_page_does_not_import_torch(tmp_path):
    """Builds the page in a process of its own, which must not open a connection."""
    code = f"""
import socket, sys
def refuse(*_): raise AssertionError("a connection was opened")
socket.socket.connect = refuse
from pathlib import Path
from fidelora.jobs.memory import MemoryStore
from fidelora.server.app import make_app, context_with_store
from fidelora.settings import Settings
assert "gradio" not in sys.modules
settings = Settings(data_dir=Path({str(tmp_path)!r}))
context = context_with_store(MemoryStore(), settings, {{}}, "http://127.0.0.1:1")
make_app(context, with_page=True)
assert "gradio" in sys.modules
heavy = ("torch", "diffusers", "transformers", "safetensors")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "value",
    [
        "<b>&amp;\"'",
        "**a** _b_ [c](d) `e` $f$ #g",
        "a\n\n# b",
        "{{c}} ${d} ~x~ |y|",
        "https://a.b c@d.e",
    ],
)
def test_escaped_text_has_no_special_character(value):
    import html

    assert html.unescape(escape(value)) == value
    assert not set(re.sub(r"&#\d+;", "", escape(value))) & set("<>\"'`*_~[]{}()$|\\#!:@\n")
