"""Workers on this machine: one process for each device, watched from outside.

A crash, a kill for lack of memory or a poisoned CUDA context ends one process, and costs the job that it had one attempt.
Everything else goes on: the jobs are in the store, and the pool starts another process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from fidelora.errors import LeaseLostError
from fidelora.jobs.job import Job, Status
from fidelora.jobs.store import JobStore
from fidelora.workers.process import WorkerSetup, WorkerSlot
from fidelora.workers.worker import AttemptReport

log = logging.getLogger(__name__)

_MANY = 1000


class WorkerPool:
    """Keeps one worker process alive for each setup.

    Args:
        store: the same database that the setups name, for the pool's own use.
        name: of this pool, the same after a restart and of no other pool on the same store; its jobs are known by it.
        on_report: called by `watch` with what workers report of finished attempts.
    """

    def __init__(
        self,
        store: JobStore,
        setups: Sequence[WorkerSetup],
        *,
        name: str = "local",
        on_report: Callable[[AttemptReport], None] = lambda report: None,
    ) -> None:
        self._store = store
        self._name = name
        self._on_report = on_report
        self._lock = threading.Lock()  # nobody starts a process while another ends them all
        self._stopped = False
        self._places = [WorkerSlot(f"{name}/{index}", setup) for index, setup in enumerate(setups)]
        self.restarts = 0

    def start(self) -> None:
        """Take back what an earlier pool of this name left when it was killed, and start processes; they load in the background."""
        for job in self._running():
            self._take_back(job, "the server was killed", datetime.now(UTC))
        for place in self._places:
            place.start()

    @property
    def ready(self) -> bool:
        """Whether any worker has loaded what it needs and takes jobs."""
        return any(place.ready for place in self._places)

    @property
    def trouble(self) -> str:
        """Why a worker could not start the last time, in a sentence; empty if none had trouble."""
        return next(
            (place.trouble for place in self._places if place.trouble and not place.ready), ""
        )

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that are alive."""
        return [
            place.process.pid
            for place in self._places
            if place.process and place.process.is_alive() and place.process.pid
        ]

    def wake(self) -> None:
        """There is a new job: idle workers look for it now."""
        for place in self._places:
            place.wake()

    def watch(self, now: datetime | None = None) -> list[Job]:
        """One look at everything, every second or so: replaces dead processes, ends silent ones, takes their jobs back.

        A worker reports while it makes steps. One whose lease has run out hangs in a step, and is killed.

        Returns:
            the jobs that were taken back, as they are now.
        """
        with self._lock:
            return [] if self._stopped else self._watch(now or datetime.now(UTC))

    def stop(self, grace_s: float) -> None:
        """Let running jobs finish for `grace_s` seconds, then have them given back to the queue, and end all processes for good."""
        with self._lock:
            self._stopped = True
        for place in self._places:
            place.finish()
        deadline = time.monotonic() + grace_s  # one for all: they finish side by side
        for place in self._places:
            place.end(max(0.0, deadline - time.monotonic()))
            for report in place.reports():
                self._on_report(report)
        for job in self._running():  # killed before it could give the job back
            self._take_back(job, "the server stopped", datetime.now(UTC))

    def hurry(self) -> None:
        """While `stop` waits: have all jobs given back now."""
        for place in self._places:
            place.ask_to_leave()

    def _watch(self, now: datetime) -> list[Job]:
        taken: list[Job] = []
        running = self._running()
        for place in self._places:
            for report in place.reports():
                self._on_report(report)
            jobs = [job for job in running if job.worker == place.name]
            if any(
                job.lease_expires_at is not None and job.lease_expires_at <= now for job in jobs
            ):
                log.error("%s made no step until its lease ran out, and is killed", place.name)
                place.kill()
            if place.process is not None and not place.alive:
                reason = place.reason
                taken += [after for job in jobs if (after := self._take_back(job, reason, now))]
                log.error("%s is gone: %s", place.name, place.trouble or reason)
                place.bury()
            if place.process is None and place.may_start:
                self.restarts += 1
                place.start()
        return taken + list(self._store.abandon_expired(now))  # those of other pools, too

    def _running(self) -> list[Job]:
        jobs = self._store.list(status=Status.IN_PROGRESS, limit=_MANY).jobs
        return [job for job in jobs if job.worker.startswith(f"{self._name}/")]

    def _take_back(self, job: Job, reason: str, now: datetime) -> Job | None:
        try:
            return self._store.abandon(job.id, job.epoch, reason, now)
        except LeaseLostError:
            return None  # it came to an end in the meantime
