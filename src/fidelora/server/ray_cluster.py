"""`fidelora worker --ray`: workers that a Ray cluster places on its machines and restarts.

Ray only keeps processes alive. The queue is the job database: each worker claims jobs from it, and
a job belongs to a worker by its lease, as without Ray. So Ray loses no job when any of its parts
fails. Only this module imports Ray.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import structlog

import fidelora
from fidelora.errors import JobStoreError, SettingsError
from fidelora.jobs.job import Status
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import WorkerState
from fidelora.server.logs import configure_logs
from fidelora.server.stop_signals import STOP_SIGNALS, ignore_stop_signals
from fidelora.server.worker_host import WorkerHost
from fidelora.settings import Settings

log = structlog.get_logger(__name__)

JOBS_PER_WORKER = 4
"""Queued and running jobs for each worker, as in the ScaledObject of `deploy/kubernetes`."""
_INTERVAL_S = 2.0  # time between two polls of the queue
_PARENT_INTERVAL_S = 1.0  # time between two checks whether the raylet is alive
_ANSWER_S = 5.0  # time in which an actor that has started answers
_STOP_MARGIN_S = 30.0  # time that an actor may take beyond `stop_grace_s` before it is killed


class RayWorker:
    """Actor with one worker process. Ray keeps its arguments, and so its name, across restarts."""

    def __init__(self, settings: Settings, name: str) -> None:
        if settings.device != "cpu":
            # Ray sets this variable to 1 for GPU workers. Use as many threads as outside of Ray.
            os.environ.pop("OMP_NUM_THREADS", None)
        configure_logs(settings.log_format, settings.debug)
        # A restarted actor has the same name, so `host.run` returns the jobs of the killed one to
        # the queue.
        host = WorkerHost(settings, name)
        self._stop = threading.Event()
        threading.Thread(target=_exit_with_parent, name="watches-raylet", daemon=True).start()
        self._thread = threading.Thread(
            target=self._run, args=(host,), name="runs-worker", daemon=True
        )
        self._thread.start()

    def _run(self, host: WorkerHost) -> None:
        try:
            host.run(self._stop)
        except Exception:
            log.exception("the worker has ended with an error; Ray starts it again")
            os._exit(1)

    def check(self) -> None:
        """Return once the actor has started. Its errors are raised in the caller."""

    def stop(self) -> None:
        """Finish the running job, or return it to the queue, and end the worker process."""
        self._stop.set()
        self._thread.join()


def _exit_with_parent() -> None:
    """End this process when its raylet is killed, because Ray starts the actor elsewhere then.

    The worker process notices the end of this one, and returns its job to the queue.
    """
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(_PARENT_INTERVAL_S)
    os._exit(1)


_ACTOR = ray.remote(RayWorker)


@dataclass(frozen=True)
class Scale:
    """Number of workers in the cluster.

    Attributes:
        fewest, most: limits of the number of workers.
        idle_s: seconds without a job after which a worker that is not needed ends.
    """

    fewest: int
    most: int
    idle_s: float

    def workers_for(self, jobs: int) -> int:
        """Return the number of workers for a number of queued and running jobs."""
        return min(self.most, max(self.fewest, math.ceil(jobs / JOBS_PER_WORKER)))


class RayLauncher:
    """Keeps as many workers in a Ray cluster as the queue needs.

    The actors are detached: they continue if the launcher ends unexpectedly, and the next launcher
    with the same settings takes them over. A launcher with other settings replaces them.

    Args:
        settings: settings of the workers.
        cpus: number of CPUs of each worker; None for one GPU.
    """

    def __init__(self, settings: Settings, scale: Scale, cpus: int | None) -> None:
        self._settings, self._scale = settings, scale
        self._options = {"num_gpus": 1} if cpus is None else {"num_cpus": cpus}
        self._store = SqlStore(settings.database)
        shown = f"{fidelora.__version__} {self._options} {sorted(settings.model_dump().items())}"
        self._prefix = hashlib.sha256(shown.encode()).hexdigest()[:8]  # secrets are masked
        self._workers: dict[str, Any] = {}
        self._checks: dict[str, Any] = {}
        self._started: set[str] = set()
        self._idle_since: dict[str, float] = {}

    def adopt(self) -> None:
        """Take over the actors of an earlier launcher, and end those with other settings."""
        found = {name: ray.get_actor(name) for name in ray.util.list_named_actors()}
        self._workers = {
            name: actor for name, actor in found.items() if name.startswith(f"{self._prefix}-")
        }
        self._end({name: found[name] for name in found.keys() - self._workers.keys()})

    def scale(self) -> None:
        """Replace workers that could not start, and add or end workers as the queue needs.

        Raises:
            JobStoreError: the job database cannot be used.
        """
        self._forget_dead()
        jobs = self._store.count(Status.IN_QUEUE) + self._store.count(Status.IN_PROGRESS)
        wanted = self._scale.workers_for(jobs)
        while len(self._workers) < wanted:
            name = f"{self._prefix}-{uuid.uuid4().hex[:8]}"
            actor = _ACTOR.options(**self._options, name=name, max_restarts=-1, lifetime="detached")
            self._workers[name] = actor.remote(self._settings, f"ray-{name}")
            log.info("worker requested", name=name, workers=len(self._workers))
        idle = self._longest_idle(self._store.workers())
        if len(self._workers) > wanted:
            # End actors that still wait for a free machine first; otherwise Ray's autoscaler would
            # add machines for them.
            waiting = [name for name in self._workers if name not in self._started]
            if name := next(iter(waiting), idle):
                self._end({name: self._workers.pop(name)})

    def stop(self) -> None:
        """End all workers, as `fidelora worker` ends on SIGTERM."""
        self._end(self._workers)
        self._store.close()

    def _forget_dead(self) -> None:
        """Forget actors that could not start; Ray restarts only those that had started."""
        for name, actor in list(self._workers.items()):
            if name not in self._checks:
                self._checks[name] = actor.check.remote()
            check = self._checks[name]
            if not ray.wait([check], timeout=0)[0]:
                continue  # Ray has no room for it yet, or it is starting
            del self._checks[name]
            try:
                ray.get(check)
                self._started.add(name)
            except ray.exceptions.ActorDiedError as error:
                log.error("a worker could not start", name=name, error=str(error))
                del self._workers[name]
            except ray.exceptions.RayError as error:
                log.warning("Ray restarts a worker", name=name, error=str(error).splitlines()[0])

    def _longest_idle(self, states: Collection[WorkerState]) -> str:
        """Return the name of a worker that has been idle for `Scale.idle_s`; empty for none."""
        idle = {state.name for state in states if state.idle_since is not None}
        now = time.monotonic()
        for name in self._workers:
            if any(one.startswith(f"ray-{name}/") for one in idle):
                self._idle_since.setdefault(name, now)
            else:
                self._idle_since.pop(name, None)
        since = {
            name: self._idle_since[name] for name in self._workers.keys() & self._idle_since.keys()
        }
        name = min(since, key=lambda one: since[one], default="")
        return name if name and now - since[name] >= self._scale.idle_s else ""

    def _end(self, actors: dict[str, Any]) -> None:
        if not actors:
            return
        log.info("ending workers", names=sorted(actors))
        checks = {actor.check.remote(): actor for actor in actors.values()}
        started, _ = ray.wait(list(checks), num_returns=len(checks), timeout=_ANSWER_S)
        stops = [checks[check].stop.remote() for check in started]
        if stops:
            timeout_s = self._settings.stop_grace_s + _STOP_MARGIN_S
            ray.wait(stops, num_returns=len(stops), timeout=timeout_s)
        for actor in actors.values():
            ray.kill(actor)


def run_on_ray(settings: Settings, address: str, scale: Scale, cpus: int | None) -> None:
    """Keep workers in a Ray cluster until SIGTERM or Ctrl-C.

    Args:
        settings: settings of the workers.
        address: address of the cluster's head, `HOST:PORT`, or `auto` on a machine of the cluster.
        cpus: number of CPUs of each worker; None for one GPU.

    Raises:
        FideloraError: the settings cannot be used with Ray, or the cluster or the database cannot
            be reached.
    """
    if scale.fewest > scale.most:
        raise SettingsError("--min-workers is larger than --max-workers. Change one of them.")
    if settings.device != "auto":
        raise SettingsError(
            "A device cannot be set with --ray, because Ray selects the GPU of each worker. Leave "
            "out --device and DEVICE, or use --cpus."
        )
    if settings.worker_port is not None:
        raise SettingsError(
            "FIDELORA_WORKER_PORT cannot be used with --ray, because several workers can run on "
            "one machine. Unset it."
        )
    configure_logs(settings.log_format, settings.debug)
    device = "cuda" if cpus is None else "cpu"
    launcher = RayLauncher(settings.model_copy(update={"device": device}), scale, cpus)
    # One namespace for each database and kind of device, because each can have its own launcher.
    database = settings.database.rpartition("@")[2]  # without the password
    digest = hashlib.sha256(database.encode()).hexdigest()[:12]
    try:
        ray.init(address, namespace=f"fidelora-{device}-{digest}", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SettingsError(
            f"The Ray cluster {address} cannot be reached: {error}. Check the address, and that "
            "`ray start` has run on this machine."
        ) from error
    stop = threading.Event()
    for number in STOP_SIGNALS:  # after `ray.init`, which sets its own handlers
        signal.signal(number, lambda _signal, _frame: stop.set())
    launcher.adopt()
    log.info("launcher started", ray=address)
    while not stop.is_set():
        try:
            launcher.scale()
        except JobStoreError as error:
            log.warning("job store unavailable", error=str(error))
        stop.wait(_INTERVAL_S)
    launcher.stop()
    ray.shutdown()
    log.info("stopped")
    ignore_stop_signals()
