"""Many clients at once: streams that vanish, a full queue, a stop under load, a stopped worker."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import urllib.error
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.faults.answers import try_submit
from tests.faults.rounds import REQUESTS, ROUNDS
from tests.faults.test_kills import LONG, is_gone, workers_of
from tests.server.serve_support import ANSWER_DEADLINE_S, Server, until

pytestmark = pytest.mark.timeout(1200)

STREAMS = 500
CLIENTS = 16
QUEUE_SIZE = 12
CLOSE_WITH_RESET = struct.pack("ii", 1, 0)


@contextmanager
def event_stream(server: Server, request_id: str) -> Iterator[None]:
    """Open a stream of events and read its first bytes; close it with a TCP reset."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_WITH_RESET)
        head = f"GET /v1/requests/{request_id}/events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_streams_that_vanish_leave_nothing(start):
    """The server answers meanwhile, and closes the connections of all streams."""
    server = start()
    server.ready()
    running = server.submit(**LONG)
    server.wait(running, "in_progress")
    before = open_files(server)
    for _ in range(ROUNDS):
        with ExitStack() as streams:
            for _ in range(STREAMS):
                streams.enter_context(event_stream(server, running))
            assert server.call("/health", deadline_s=ANSWER_DEADLINE_S) == {"status": "healthy"}
            assert open_files(server) >= STREAMS
        until(lambda: open_files(server) <= before + 5)
    server.call(f"/v1/requests/{running}", method="DELETE")
    server.wait(running, "canceled")
    server.wait(server.submit(seed=1), "succeeded")


def test_a_full_queue_refuses_requests_and_drops_none(start):
    server = start(FIDELORA_QUEUE_SIZE=str(QUEUE_SIZE))
    server.ready()
    for round_number in range(ROUNDS):
        running = server.submit(**LONG)
        server.wait(running, "in_progress")
        with ThreadPoolExecutor(CLIENTS) as clients:
            seeds = [round_number] * 4 * QUEUE_SIZE
            answers = list(clients.map(lambda seed: try_submit(server, seed=seed), seeds))
        accepted = [answer.request_id for answer in answers if answer.request_id]
        refused = [answer for answer in answers if not answer.request_id]
        assert QUEUE_SIZE - 1 <= len(accepted) <= QUEUE_SIZE
        assert {answer.status for answer in refused} == {429}
        assert all(int(answer.retry_after) > 0 for answer in refused)
        server.call(f"/v1/requests/{running}", method="DELETE")
        for request_id in accepted:
            assert server.wait(request_id, "succeeded", "failed")["status"] == "succeeded"


def submit_until_refused(server: Server, number: int) -> list[str]:
    """Submit until the server refuses or ends; return the ids of accepted requests."""
    accepted: list[str] = []
    while True:
        try:
            answer = try_submit(server, seed=number)
        except (urllib.error.URLError, OSError):  # the connection or the server ended
            return accepted
        if not answer.request_id:
            assert answer.status == 503, answer.message
            return accepted
        accepted.append(answer.request_id)


def has_requests(server: Server) -> bool:
    return bool(server.call("/v1/requests?limit=1")["requests"])


def test_a_stop_under_load_loses_no_accepted_request(start):
    """SIGTERM comes while clients submit; the next server finishes what was accepted."""
    accepted: list[str] = []
    for _ in range(max(1, ROUNDS // 2)):
        server = start()
        server.ready()
        with ThreadPoolExecutor(CLIENTS) as clients:
            submitting = [
                clients.submit(submit_until_refused, server, number) for number in range(CLIENTS)
            ]
            until(partial(has_requests, server))
            assert server.terminate() == 0
            accepted += [request_id for each in submitting for request_id in each.result()]
    server = start(FIDELORA_KEEP_REQUESTS="100000")
    for request_id in accepted:
        assert server.wait(request_id, "succeeded", "failed", "canceled")["status"] == "succeeded"


def test_a_stopped_worker_is_replaced(start):
    """A worker that SIGSTOP stops between transactions is killed; its request is retried."""
    server = start(FIDELORA_STEP_TIMEOUT="5")
    server.ready()
    chance = random.Random(11)
    for _ in range(ROUNDS):
        running = server.submit(width=256, height=256, sample_steps=40)
        queued = [server.submit(seed=chance.randrange(4)) for _ in range(3)]
        server.wait(running, "in_progress")
        (worker,) = workers_of(server)
        os.kill(worker, signal.SIGSTOP)
        until(partial(is_gone, worker))
        for request_id in (running, *queued):
            assert server.wait(request_id, "succeeded", "failed")["status"] == "succeeded"


def test_duplicates_at_once_make_one_request(start):
    """One idempotency key gives one request, also if every client repeats it at once."""
    server = start()
    body = {
        "model": "sd15",
        "loras": [{"path": "sks.safetensors"}],
        "prompts": [{"prompt": "a star", "width": 64, "height": 64, "sample_steps": 1}],
    }

    def ask(key: str) -> str:
        answer = server.call("/v1/inference", body, headers={"Idempotency-Key": key})
        return str(answer["request_id"])

    for round_number in range(ROUNDS):
        with ThreadPoolExecutor(CLIENTS) as clients:
            ids = Counter(clients.map(ask, [f"key-{round_number}"] * min(100, 2 * REQUESTS)))
        assert len(ids) == 1
    found = server.call("/v1/requests?limit=100")["requests"]
    assert len(found) == min(ROUNDS, 100)
