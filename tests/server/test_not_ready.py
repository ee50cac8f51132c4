"""A server none of whose workers can start: requests, clients and the log get the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import structlog
from starlette.testclient import TestClient
from tests.server.http_support import (
    DEADLINE_S,
    MINIMAL,
    client_of,
    context_in,
    in_thread,
    only_job,
)

from fidelora.server.app import make_app
from fidelora.server.context import ServerContext
from fidelora.server.readiness import ReadinessLog
from fidelora.workers.pool import WorkerPool

REASON = "There is no base model at /bases/a on this machine."
# The reason as clients receive it, without paths of the server.
SHOWN = "There is no base model at a on this machine."


class Pool:
    """Fake pool of worker processes; tests set its state."""

    def __init__(self) -> None:
        self.ready = False
        self.unready_reason = ""

    def start(self) -> None:
        """Start nothing."""

    def watch(self) -> list[Any]:
        """Return no jobs."""
        return []

    def wake(self) -> None:
        """Wake nothing."""

    def stop(self, grace_s: float) -> None:
        """Stop nothing."""


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def context(tmp_path, pool) -> ServerContext:
    return replace(context_in(tmp_path), pool=cast(WorkerPool, pool))


@pytest.fixture
def client(context) -> Iterator[TestClient]:
    with client_of(context) as made:
        yield made


OPENAI = {"prompt": "a ball", "model": "sd15", "size": "64x64"}
CALLS = {"/v1/inference": MINIMAL, "/v1/images/generations": OPENAI, "/sdapi/v1/txt2img": OPENAI}


@pytest.mark.parametrize("path", CALLS)
def test_new_requests_are_refused_with_the_reason(client, pool, path):
    pool.unready_reason = REASON
    body = {"prompt": "a ball"} if path.startswith("/sdapi") else CALLS[path]
    answer = client.post(path, json=body)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "10"
    assert "SERVER_NOT_READY" in answer.text
    assert SHOWN in answer.text


def test_a_replay_is_refused_with_the_reason(client, pool):
    pool.unready_reason = REASON
    answer = client.post("/v1/replay", json={"recipe": {"prompt": "a ball"}})
    assert (answer.status_code, SHOWN in answer.text) == (503, True)


def test_ready_returns_the_reason(client, pool):
    assert client.get("/ready").json() == {"status": "starting", "reason": ""}
    pool.unready_reason = REASON
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, SHOWN)
    pool.ready = True  # another worker started
    assert client.get("/ready").json() == {"status": "ready", "reason": ""}


def test_a_repeated_call_returns_the_queued_request(client, pool):
    first = client.post("/v1/inference", json=MINIMAL, headers={"Idempotency-Key": "a"})
    pool.unready_reason = REASON
    again = client.post("/v1/inference", json=MINIMAL, headers={"Idempotency-Key": "a"})
    assert first.json()["request_id"] == again.json()["request_id"]


def test_the_status_of_a_queued_request_has_the_reason(client, pool):
    request_id = client.post("/v1/inference", json=MINIMAL).json()["request_id"]
    path = f"/v1/requests/{request_id}/status"
    assert client.get(path).json()["waiting_reason"] is None
    pool.unready_reason = REASON
    assert client.get(path).json()["waiting_reason"] == SHOWN
    pool.ready = True
    assert client.get(path).json()["waiting_reason"] is None


def test_the_events_of_a_queued_request_have_the_reason(client, context, pool):
    request_id = client.post("/v1/inference", json=MINIMAL).json()["request_id"]
    pool.unready_reason = REASON
    context.stopping.set()  # ends the stream after the first event
    answer = client.get(f"/v1/requests/{request_id}/events")
    (data,) = [line[5:] for line in answer.text.splitlines() if line.startswith("data:")]
    assert json.loads(data)["waiting_reason"] == SHOWN


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_waiting_call_ends_with_the_reason(client, context, pool, path):
    body = {"prompt": "a ball"} if path.startswith("/sdapi") else CALLS[path]
    call = in_thread(lambda: client.post(path, json=body))
    job = only_job(context)
    pool.unready_reason = REASON
    answer = call.result(DEADLINE_S)
    assert (answer.status_code, SHOWN in answer.text) == (503, True)
    assert context.store.get(job.id).status.value == "canceled"


def test_each_change_is_logged_once(context, pool):
    log = ReadinessLog(context)

    def events() -> list[str]:
        with structlog.testing.capture_logs() as entries:
            log.update()
            log.update()
        return [f"{entry['event']} {entry.get('reason', '')}".strip() for entry in entries]

    assert events() == []
    pool.unready_reason = REASON
    assert events() == [f"not ready, trying again {REASON}"]
    pool.ready = True
    assert events() == ["ready"]
    pool.ready, pool.unready_reason = False, ""
    assert events() == ["not ready, a worker is starting"]


def test_the_server_without_its_own_workers_is_ready(tmp_path):
    with TestClient(make_app(context_in(tmp_path)), base_url="http://127.0.0.1:8000") as client:
        assert client.get("/ready").json()["status"] == "ready"
