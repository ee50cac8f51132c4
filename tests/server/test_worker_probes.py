"""The HTTP server of `fidelora worker` for probes and metrics."""

import http.client
import socket
import urllib.error
import urllib.request

import pytest
import structlog
from tests.server.serve_support import until

from fidelora.errors import SettingsError
from fidelora.server import worker_probes
from fidelora.server.worker_probes import WorkerProbes


@pytest.fixture
def state():
    return {"ready": False}


@pytest.fixture
def probes(state):
    made = WorkerProbes(
        "127.0.0.1", 0, is_ready=lambda: state["ready"], metrics=lambda: b"fidelora_ready 0.0\n"
    )
    yield made
    made.close()


def ask(probes, path, method="GET"):
    request = urllib.request.Request(f"http://127.0.0.1:{probes.port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_readiness_follows_the_workers(probes, state):
    assert ask(probes, "/ready")[0] == 503
    assert ask(probes, "/health") == (200, b'{"status":"healthy"}')
    state["ready"] = True
    assert ask(probes, "/ready") == (200, b'{"status":"ready"}')
    assert ask(probes, "/ready", "HEAD") == (200, b"")


def test_metrics_are_served_and_other_paths_are_not(probes):
    assert ask(probes, "/metrics") == (200, b"fidelora_ready 0.0\n")
    assert ask(probes, "/v1/requests")[0] == 404
    assert ask(probes, "/metrics", "POST")[0] == 501


def test_port_in_use_is_an_error_that_names_the_setting():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match="FIDELORA_WORKER_PORT"):
            WorkerProbes("127.0.0.1", port, is_ready=bool, metrics=bytes)


def connect(probes, sent=b""):
    connection = socket.create_connection(("127.0.0.1", probes.port), timeout=60)
    connection.sendall(sent)
    return connection


def test_a_client_that_sends_slowly_is_disconnected(probes, monkeypatch):
    monkeypatch.setattr(worker_probes, "CONNECTION_S", 0.2)
    with connect(probes, b"GET /health HTTP/1.1\r\n") as slow:
        slow.settimeout(0.01)
        ended = False
        while not ended:
            try:
                slow.sendall(b"a: b\r\n")
                ended = slow.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
    assert ask(probes, "/health")[0] == 200


def test_connections_over_the_limit_are_closed(monkeypatch):
    monkeypatch.setattr(worker_probes, "MAX_CONNECTIONS", 2)
    probes = WorkerProbes("127.0.0.1", 0, is_ready=bool, metrics=bytes)
    held = [connect(probes, b"GET /health") for _ in range(2)]
    with connect(probes) as refused:
        assert refused.recv(1) == b""
    for connection in held:
        connection.sendall(b" HTTP/1.1\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.0 200"
        connection.close()
    until(lambda: answers(probes))  # the threads of the closed connections have ended
    probes.close()


def answers(probes):
    try:
        return ask(probes, "/health")[0] == 200
    except (ConnectionError, urllib.error.URLError):
        return False


def test_an_error_of_the_metrics_is_logged():
    def fail():
        raise ValueError("no metrics")

    probes = WorkerProbes("127.0.0.1", 0, is_ready=bool, metrics=fail)
    with structlog.testing.capture_logs() as logs:
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            ask(probes, "/metrics")
        until(lambda: logs)
        probes.close()
    assert [entry["event"] for entry in logs] == ["probe not answered"]
