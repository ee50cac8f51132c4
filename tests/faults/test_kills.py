"""A server and workers that are killed, stopped or run out of memory lose no request."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.faults.answers import try_submit
from tests.faults.rounds import REQUESTS, ROUNDS
from tests.server.serve_support import Server, until
from tests.support import LORA, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe
from fidelora.images.read import read_record

pytestmark = pytest.mark.timeout(1200)

SEEDS = 4
LONG = {"width": 512, "height": 512, "sample_steps": 150}


@cache
def pixels_of(recipe: Recipe) -> np.ndarray:
    """Return the image of a recipe, made without a server."""
    lora = AdapterRef.from_file(LORA)
    local = replace(recipe, base_model=str(TINY_BASE), adapters=(lora,))
    return Engine(device="cpu").generate(local).pixels


def result(server: Server, request_id: str) -> Any:
    return server.call(f"/v1/requests/{request_id}/result")


def workers_of(server: Server) -> list[int]:
    """Return the process ids of the server's workers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent == server.process.pid and b"spawn_main" in command:
            found.append(int(entry.name))
    return found


def test_no_accepted_request_is_lost_when_the_server_is_killed(start, data):
    """Each accepted request is done exactly once, with the same image as without a server."""
    chance = random.Random(3)
    accepted: dict[str, int] = {}
    done: dict[str, str] = {}

    def are_done(server: Server, wanted: int) -> bool:
        for request_id in accepted.keys() - done.keys():
            answer = result(server, request_id)
            if answer["status"] == "succeeded":
                done[request_id] = answer["outputs"]["images"][0]["sha256"]
            if len(done) >= wanted:
                break
        return len(done) >= wanted

    server = start()
    for _ in range(REQUESTS):
        seed = chance.randrange(SEEDS)
        accepted[server.submit(seed=seed)] = seed
    for _ in range(ROUNDS):
        until(partial(are_done, server, len(done) + chance.randrange(4)))
        server.kill()
        server = start()
    for request_id in accepted:
        assert server.wait(request_id, "succeeded", "failed", "canceled")["status"] == "succeeded"
    files = sorted((data / "outputs").iterdir())
    assert [file.name for file in files] == sorted(f"{each}_output_0.png" for each in accepted)
    for request_id, seed in accepted.items():
        (image,) = result(server, request_id)["outputs"]["images"]
        assert image["sha256"] == done.get(request_id, image["sha256"]), "an image was made twice"
        file = data / "outputs" / f"{request_id}_output_0.png"
        recipe = Recipe.from_dict(read_record(file)["recipe"])
        assert recipe.seed == seed
        assert np.array_equal(np.asarray(Image.open(file)), pixels_of(recipe))


def is_locked(database: Path) -> bool:
    """True if a process has been inside a writing transaction for half a second."""
    try:
        with closing(sqlite3.connect(database, timeout=0.5, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return True
    return False


def stop_inside_transaction(server: Server, chance: random.Random) -> int:
    """Stop a busy worker while it has the database locked; return its process id."""
    (worker,) = workers_of(server)

    def is_stopped_there() -> bool:
        if not server.call("/v1/requests?status=in_queue&limit=1")["requests"]:
            for _ in range(20):
                server.submit(seed=0)
        time.sleep(chance.random() / 50)  # another moment each time
        os.kill(worker, signal.SIGSTOP)
        if is_locked(server.data / "jobs.sqlite"):
            return True
        os.kill(worker, signal.SIGCONT)
        return False

    until(is_stopped_there)
    return worker


def test_a_worker_stopped_inside_a_transaction_is_replaced(start, data):
    """Calls answer meanwhile, with 503 where they need the database, and no request is lost."""
    server = start(FIDELORA_STEP_TIMEOUT="5")
    server.ready()
    chance = random.Random(5)
    for _ in range(ROUNDS):
        answers = [try_submit(server) for _ in range(5)]
        stopped = stop_inside_transaction(server, chance)
        while stopped in workers_of(server):  # at most three step limits
            assert server.call("/health") == {"status": "healthy"}
            answers.append(try_submit(server, seed=1))
        assert {(answer.status, answer.retry_after) for answer in answers} <= {
            (200, ""),
            (503, "10"),
        }
        for answer in answers:
            if answer.request_id:
                ended = server.wait(answer.request_id, "succeeded", "failed")
                assert ended["status"] == "succeeded"
    assert server.process.poll() is None


def is_gone(process_id: int) -> bool:
    """True if a process has ended; it may not have been waited for."""
    try:
        return "Z" in Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1]
    except FileNotFoundError:
        return True


def test_a_request_that_kills_its_worker_does_not_hold_up_others(start):
    server = start()
    server.ready()
    poison = server.submit(**LONG)
    others: list[str] = []
    done: list[str] = []
    for attempt in range(3):
        server.wait(poison, "in_progress")
        others += [server.submit(seed=seed) for seed in range(SEEDS)]
        (worker,) = workers_of(server)
        os.kill(worker, signal.SIGKILL)
        until(partial(is_gone, worker))
        for request_id in others[len(done) :]:
            assert server.wait(request_id, "succeeded", "failed")["status"] == "succeeded"
            done.append(request_id)
            if attempt < 2:
                assert server.status(poison)["status"] in ("in_queue", "in_progress")
    failed = server.wait(poison, "failed")
    assert failed["error_code"] == "WORKER_LOST"
    assert "3 attempts" in failed["error"]


def test_a_request_that_does_not_fit_in_memory_fails_alone(start):
    server = start()
    server.ready()
    server.wait(server.submit(seed=0), "succeeded")
    (worker,) = workers_of(server)
    mapped = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(worker, resource.RLIMIT_AS, (mapped + 2**26, mapped + 2**26))
    large = server.submit(width=1536, height=1536, sample_steps=1)
    small = server.submit(seed=1)
    assert server.wait(small, "succeeded", "failed")["status"] == "succeeded"
    ended = server.wait(large, "failed", "succeeded")
    assert (ended["status"], ended["error_code"]) == ("failed", "MEMORY_EXHAUSTED")
