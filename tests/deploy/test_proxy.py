"""The proxy of the compose file: a real nginx with its configuration in front of two servers."""

from __future__ import annotations

import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.deploy.deploy_support import DEPLOY, program
from tests.postgres import free_port
from tests.server.serve_support import ANSWER_DEADLINE_S, until

from fidelora.server.login import COOKIE

MAIN = """
daemon off; worker_processes 1; error_log stderr; pid {folder}/pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    include {folder}/default.conf;
}}
"""


class _PortHandler(BaseHTTPRequestHandler):
    """Answers with the port of its server, which tells the backends apart."""

    def do_GET(self) -> None:
        name = str(self.connection.getsockname()[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(name)))
        self.end_headers()
        self.wfile.write(name)

    def log_message(self, *_: object) -> None:
        """Write no log."""


@pytest.fixture
def backends() -> Iterator[list[ThreadingHTTPServer]]:
    made = [ThreadingHTTPServer(("127.0.0.1", 0), _PortHandler) for _ in range(2)]
    for server in made:
        options = {"poll_interval": 0.01}
        threading.Thread(target=server.serve_forever, kwargs=options, daemon=True).start()
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxy(backends: list[ThreadingHTTPServer], tmp_path: Path) -> Iterator[str]:
    """URL of nginx in front of the backends."""
    binary = program("nginx", "apt-get install nginx-light")
    port = free_port()
    config = (DEPLOY / "compose" / "nginx.conf").read_text()
    config = config.replace("listen 8080", f"listen 127.0.0.1:{port}")
    for name, server in zip(("api-1", "api-2"), backends, strict=True):
        config = config.replace(f"{name}:8000", f"127.0.0.1:{server.server_address[1]}")
    (tmp_path / "default.conf").write_text(config)
    main = tmp_path / "nginx.conf"
    main.write_text(MAIN.format(folder=tmp_path))
    process = subprocess.Popen(
        [binary, "-p", str(tmp_path), "-c", str(main)], stderr=subprocess.PIPE, text=True
    )

    def answers() -> bool:
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
        try:
            return bool(backend(f"http://127.0.0.1:{port}/"))
        except OSError:
            return False

    try:
        until(answers, ANSWER_DEADLINE_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(ANSWER_DEADLINE_S)
        assert process.stderr is not None
        process.stderr.close()


def backend(url: str, cookie: str = "") -> str:
    """Return the name of the server that answers a call."""
    headers = {"Cookie": f"{COOKIE}={cookie}"} if cookie else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=ANSWER_DEADLINE_S) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("path", ["/v1/requests", "/sdapi/v1/progress"])
def test_calls_of_the_apis_go_to_both_servers(proxy, path):
    assert len({backend(proxy + path, "a session") for _ in range(20)}) == 2


def test_a_browser_stays_with_one_server(proxy):
    paths = ("/", "/gradio_api/queue/join", "/gradio_api/queue/data", "/reports/1")
    sessions = [f"session{number}" for number in range(20)]
    of_session = [{backend(proxy + path, one) for path in paths} for one in sessions]
    assert {len(names) for names in of_session} == {1}
    assert len(set().union(*of_session)) == 2


def test_the_other_server_takes_over(proxy, backends):
    backends[0].shutdown()
    backends[0].server_close()
    left = str(backends[1].server_address[1])
    for path in ("/", "/v1/requests"):
        assert {backend(proxy + path, f"session{number}") for number in range(20)} == {left}
