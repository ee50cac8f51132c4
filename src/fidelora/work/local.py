"""Workers on this machine: one process for each device, watched from outside.

A crash, a kill for lack of memory or a poisoned CUDA context ends one process, and costs the job that it had one attempt.
Everything else goes on: the jobs are in the store, and the pool starts another process.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

from fidelora.engine.base import Offload
from fidelora.errors import LeaseLostError
from fidelora.jobs.job import Job, Status
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import JobStore
from fidelora.recipe import Recipe
from fidelora.work.worker import WorkerLimits

log = logging.getLogger(__name__)

_processes = multiprocessing.get_context("spawn")  # a forked child cannot use CUDA, and inherits every open connection
_IDLE_S = 0.2
_KILL_WAIT_S = 10.0


@dataclass(frozen=True)
class WorkerSetup:
    """What one worker process needs to know.

    Attributes:
        store_url: of the jobs' database.
        outputs: the folder for images.
        adapters: the folder of adapters by hash, if there is one.
        warm: a recipe whose base model is loaded before the worker says that it is ready.
    """

    store_url: str
    outputs: Path
    device: str = "auto"
    offload: Offload = "none"
    adapters: Path | None = None
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    warm: Recipe | None = None


class LocalPool:
    """Keeps one worker process alive for each setup.

    Args:
        store: the same database that the setups name, for the pool's own use.
    """

    def __init__(self, store: JobStore, setups: Sequence[WorkerSetup]) -> None:
        self._store = store
        self._places = [_Place(index, setup) for index, setup in enumerate(setups)]

    def start(self) -> None:
        """Start every process; they load in the background."""
        for place in self._places:
            place.start()

    @property
    def ready(self) -> bool:
        """Whether any worker has loaded what it needs and takes jobs."""
        return any(place.ready for place in self._places)

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that are alive."""
        return [place.process.pid for place in self._places if place.process and place.process.is_alive() and place.process.pid]

    def watch(self, now: datetime | None = None) -> list[Job]:
        """One look at everything, every second or so: replaces dead processes, ends silent ones, takes their jobs back.

        A worker reports while it makes steps. One whose lease has run out hangs in a step, and is killed.

        Returns:
            the jobs that were taken back, as they are now.
        """
        now = now or datetime.now(UTC)
        taken: list[Job] = []
        running = self._store.list(status=Status.IN_PROGRESS, limit=1000).jobs
        for place in self._places:
            jobs = [job for job in running if job.worker == place.name]
            if any(job.lease_expires_at is not None and job.lease_expires_at <= now for job in jobs):
                log.error("%s made no step until its lease ran out, and is killed", place.name)
                place.kill()
            if not place.alive:
                reason = place.reason
                taken += [after for job in jobs if (after := self._take_back(job, reason, now))]
                log.error("%s is gone: %s", place.name, reason)
                place.start()
        return taken + list(self._store.abandon_expired(now))  # those of processes of an earlier server, too

    def stop(self, grace_s: float) -> None:
        """Let running jobs finish for `grace_s` seconds, then have them given back to the queue, and end all processes."""
        for place in self._places:
            place.finish.set()
        deadline = time.monotonic() + grace_s  # one for all: they finish side by side
        for place in self._places:
            place.end(max(0.0, deadline - time.monotonic()))
        now = datetime.now(UTC)
        for job in self._store.list(status=Status.IN_PROGRESS, limit=1000).jobs:
            if job.worker in {place.name for place in self._places}:  # killed before it could give the job back
                self._take_back(job, "the server stopped", now)

    def _take_back(self, job: Job, reason: str, now: datetime) -> Job | None:
        try:
            return self._store.abandon(job.id, job.epoch, reason, now)
        except LeaseLostError:
            return None  # it came to an end in the meantime


class _Place:
    """Where one worker process after the other lives."""

    def __init__(self, index: int, setup: WorkerSetup) -> None:
        self._index = index
        self._setup = setup
        self._count = 0
        self.process: BaseProcess | None = None
        self.name = ""
        self.finish: Event = _processes.Event()
        self._ready: Event = _processes.Event()

    def start(self) -> None:
        self._count += 1
        self.name = f"worker-{self._index}-{self._count}-{datetime.now(UTC):%Y%m%d%H%M%S%f}"
        self.finish, self._ready = _processes.Event(), _processes.Event()
        arguments = (self.name, self._setup, self._ready, self.finish)
        self.process = _processes.Process(target=worker_process, args=arguments, name=self.name, daemon=True)
        self.process.start()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def ready(self) -> bool:
        return self.alive and self._ready.is_set()

    @property
    def reason(self) -> str:
        """Why the process is gone, to be said after 'because'."""
        code = self.process.exitcode if self.process else None
        if code is not None and code < 0:
            return f"its process was killed by signal {-code}"
        return f"its process ended with exit code {code}"

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join(_KILL_WAIT_S)

    def end(self, grace_s: float) -> None:
        """Wait, then ask, then kill."""
        if self.process:
            self.process.join(grace_s)
            if self.process.is_alive():
                self.process.terminate()
                self.process.join(_KILL_WAIT_S)
            if self.process.is_alive():
                self.kill()


def worker_process(name: str, setup: WorkerSetup, ready: Event, finish: Event) -> None:
    """The life of one process: load, say so, and work on jobs until told to finish. SIGTERM gives the running job back at once."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the pool decides what it means

    from fidelora.adapters.library import AdapterLibrary
    from fidelora.engine.engine import Engine
    from fidelora.work.worker import Worker

    engine = Engine(device=setup.device, offload=setup.offload, adapters=AdapterLibrary(folder=setup.adapters))
    worker = Worker(name, SqlStore(setup.store_url), engine, setup.outputs, setup.limits)
    if setup.warm is not None:
        engine.load(setup.warm)
    ready.set()
    while not finish.is_set():
        if worker.run_next() is None:
            finish.wait(_IDLE_S)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
