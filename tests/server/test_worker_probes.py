"""The HTTP server of `fidelora worker` for probes and metrics."""

import socket
import urllib.error
import urllib.request

import pytest

from fidelora.errors import SettingsError
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
