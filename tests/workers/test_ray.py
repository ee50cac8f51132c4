"""`fidelora worker --ray` on a real Ray cluster: a head and two raylets, started by the test."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.postgres import PostgresServer
from tests.server.serve_support import until
from tests.support import TINY_BASE

from fidelora import Engine, Recipe
from fidelora.jobs.job import Status, new_job
from fidelora.jobs.sql import SqlStore

SCRIPT = Path(__file__).with_name("ray_cluster.py")
RAYLET_KILLS = int(os.environ.get("FAULT_ROUNDS", "1"))
NAMESPACE = ["unshare", "--map-root-user", "--net"]
SHORT = Recipe(prompt="a ball", base_model=str(TINY_BASE), width=64, height=64, steps=2, seed=7)
LONG = Recipe(prompt="a ball", base_model=str(TINY_BASE), width=256, height=256, steps=60, seed=7)


def missing() -> str:
    """Return the reason why no Ray cluster can be started here; empty if one can."""
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed (pip install --editable '.[ray]')"
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "needs unshare and ip, of Linux"
    made = subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True)
    return "" if made.returncode == 0 else "network namespaces are not allowed here"


class Cluster:
    """The cluster of `ray_cluster.py`, and the launchers that run in its network namespace."""

    def __init__(self, folder: Path) -> None:
        read, write = os.pipe()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("FIDELORA_")
        }
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3>&{write}',
                "bash",
                *NAMESPACE,
                sys.executable,
                str(SCRIPT),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            pass_fds=[write],
            cwd=folder,
            env=environment
            | {
                "OMP_WAIT_POLICY": "passive",
                "RAY_USAGE_STATS_ENABLED": "0",
                # A dead raylet is noticed after 2 seconds instead of 14.
                "RAY_health_check_initial_delay_ms": "1000",
                "RAY_health_check_period_ms": "500",
                "RAY_health_check_failure_threshold": "4",
            },
        )
        os.close(write)
        self._answers = os.fdopen(read)
        self.raylets: list[int] = self._answer()["raylets"]

    def start(self, *arguments: str) -> int:
        """Start `fidelora worker --ray` with these arguments, and return its process id."""
        return int(self._ask("start", *arguments)["pid"])

    def add_raylet(self) -> int:
        """Add a raylet, and return its process id."""
        return int(self._ask("raylet")["pid"])

    def stop(self, pid: int, *, kill: bool = False) -> int:
        """Send SIGTERM or SIGKILL to a launcher, and return its exit code."""
        return int(self._ask("kill" if kill else "stop", str(pid))["code"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._answers.close()

    def _ask(self, *command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        assert line, "the cluster has ended"
        return dict(json.loads(line))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


@pytest.fixture
def store(postgres: PostgresServer) -> Iterator[SqlStore]:
    postgres.clear()
    made = SqlStore(postgres.socket_url)
    yield made
    made.close()


@pytest.mark.timeout(600 + 60 * RAYLET_KILLS)
@pytest.mark.skipif(bool(missing()), reason=missing() or "Ray can be started")
def test_ray_runs_the_workers_and_loses_no_job(cluster, store, postgres, tmp_path):
    outputs = tmp_path / "outputs"
    adapters = tmp_path / "adapters"
    outputs.mkdir()
    adapters.mkdir()
    options = [
        *("--store", postgres.socket_url, "--base-model", str(TINY_BASE)),
        *("--outputs", str(outputs), "--adapters", str(adapters)),
        *("--cpus", "1", "--max-workers", "2", "--idle-seconds", "3"),
    ]
    launcher = cluster.start(*options)
    short = add(store, SHORT, 8)
    until(lambda: len(store.workers()) == 2)  # scaled up
    until(lambda: all_succeeded(store, short))
    until(lambda: len(store.workers()) == 1)  # scaled down
    expected = Engine(device="cpu").generate(SHORT).pixels
    for job_id in short:
        (output,) = store.get(job_id).outputs
        with Image.open(output.file_path) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), expected)

    # An actor is killed: Ray starts it again, which queues its job again.
    victim = only_actor()
    long = add(store, LONG, 6)
    until(lambda: store.running("ray-"))
    os.kill(victim, signal.SIGKILL)

    # The launcher is killed: the workers continue, and another launcher takes them over.
    until(lambda: len(names_of_workers(store)) == 2)
    taken_over = names_of_workers(store)
    cluster.stop(launcher, kill=True)
    launcher = cluster.start(*options)
    until(lambda: all_succeeded(store, long))
    assert names_of_workers(store) <= taken_over

    # A raylet is killed under its jobs: Ray starts its actors on the other one.
    for number in range(RAYLET_KILLS):
        if number:
            cluster.add_raylet()
        kill_raylet_of_running_jobs(store)

    # A launcher with other settings replaces the workers.
    cluster.stop(launcher, kill=True)
    names = names_of_workers(store)
    other = tmp_path / "other"
    other.mkdir()
    launcher = cluster.start(*options, "--adapters", str(other))
    until(lambda: names_of_workers(store) - names)

    assert cluster.stop(launcher) == 0
    assert actors() == {}
    until(lambda: store.workers() == ())  # those of the killed raylet count for some seconds
    assert len(list(outputs.glob("*.png"))) == 8 + 6 + 6 * RAYLET_KILLS


def test_without_ray_the_error_names_the_extra(fidelora, monkeypatch):
    monkeypatch.delitem(sys.modules, "fidelora.server.ray_cluster", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = fidelora("worker", "--ray", "auto")
    assert code == 1
    assert "pip install '.[postgres,ray]' (ray is missing)" in " ".join(err.split())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-workers", "3", "--max-workers", "2"], "--min-workers is larger"),
        (["--device", "cuda:1"], "Ray selects the GPU of each worker"),
    ],
)
def test_options_that_do_not_suit_ray_are_refused(fidelora, options, message):
    code, _, err = fidelora("worker", "--ray", "auto", *options)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_the_number_of_workers_follows_the_queue():
    from fidelora.server.ray_cluster import Scale

    scale = Scale(fewest=1, most=5, idle_s=1.0)
    assert [scale.workers_for(jobs) for jobs in (0, 1, 4, 5, 8, 100)] == [1, 1, 1, 2, 2, 5]
    assert Scale(fewest=0, most=5, idle_s=1.0).workers_for(0) == 0


def add(store: SqlStore, recipe: Recipe, count: int) -> list[str]:
    return [store.add(new_job((recipe,), datetime.now(UTC))).id for _ in range(count)]


def kill_raylet_of_running_jobs(store: SqlStore) -> None:
    """Kill the raylet of the last actor while it makes images, and wait for all of them."""
    victim = only_actor()
    ids = add(store, LONG, 6)
    until(lambda: store.running("ray-"))
    os.kill(actors()[victim], signal.SIGKILL)
    until(lambda: all_succeeded(store, ids))
    until(lambda: victim not in actors())


def all_succeeded(store: SqlStore, ids: list[str]) -> bool:
    jobs = [store.get(job_id) for job_id in ids]
    assert not [job.error for job in jobs if job.status is Status.FAILED]
    return all(job.status is Status.SUCCEEDED for job in jobs)


def names_of_workers(store: SqlStore) -> set[str]:
    """Return the names of the actors whose workers have reported lately; a restart keeps them."""
    return {worker.name.partition("/")[0] for worker in store.workers()}


def only_actor() -> int:
    """Wait until the cluster has scaled down, and return the process id of the last actor."""
    until(lambda: len(actors()) == 1)
    return next(iter(actors()))


def actors() -> dict[int, int]:
    """Return the process ids of the actors, and of the raylet of each."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # the process has ended
        if title.startswith(b"ray::RayWorker"):
            found[int(folder.name)] = int(parent)
    return found
