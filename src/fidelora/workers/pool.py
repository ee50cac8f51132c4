"""Workers on this machine: one process per device, supervised by the server.

A crash, the out-of-memory killer or a broken CUDA context ends one process, and its job is retried.
The other workers continue, because the jobs are in the store and the pool starts a new process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from fidelora.errors import LeaseLostError
from fidelora.jobs.job import Job
from fidelora.jobs.store import JobStore
from fidelora.workers.attempt import AttemptReport
from fidelora.workers.process import WorkerSetup, WorkerSlot

log = logging.getLogger(__name__)


class WorkerPool:
    """Keeps one worker process running for each setup.

    Args:
        store: store on the same database as the setups' `store_url`, for the pool's own use.
        name: name of this pool, which marks its jobs in the store. It must stay the same across
            restarts and differ from the names of other pools on the same store.
        monotonic: clock, replaced in tests.

    Attributes:
        on_report: called by `watch` with the workers' reports of finished attempts.
        restarts: number of processes that were started in place of others.
    """

    def __init__(
        self,
        store: JobStore,
        setups: Sequence[WorkerSetup],
        *,
        name: str = "local",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._name = name
        self.on_report: Callable[[AttemptReport], None] = lambda report: None
        self._monotonic = monotonic
        self._lock = threading.Lock()  # `watch` must not start processes after `stop` began
        self._stopped = False
        self._slots = [WorkerSlot(f"{name}/{index}", setup) for index, setup in enumerate(setups)]
        self.restarts = 0

    def start(self) -> None:
        """Requeue jobs that a killed server left under this pool's name, and start the processes.

        The processes load their models in the background.
        """
        for job in self._running_jobs():
            self._abandon(job, "the server was killed")
        for slot in self._slots:
            slot.start()
        self._store.on_new_job(self.wake)

    @property
    def ready(self) -> bool:
        """True if any worker has loaded its model and is not paused.

        A pool without workers is always ready, because other machines run the jobs. They may start
        only when there are jobs.
        """
        return not self._slots or any(slot.ready for slot in self._slots)

    @property
    def unready_reason(self) -> str:
        """Reason of the first worker that failed to start or pauses; empty if no worker did."""
        return next((slot.unready_reason for slot in self._slots if slot.unready_reason), "")

    @property
    def process_ids(self) -> list[int]:
        """Ids of the running processes."""
        return [
            slot.process.pid
            for slot in self._slots
            if slot.process and slot.process.is_alive() and slot.process.pid
        ]

    def wake(self, names: Collection[str] | None = None) -> None:
        """Make idle workers look for a new job now.

        Args:
            names: names of these workers; those of other pools are ignored. None for all.
        """
        for slot in self._slots:
            if names is None or slot.name in names:
                slot.wake()

    def watch(self, now: datetime | None = None) -> list[Job]:
        """Replace dead processes, kill hung ones and requeue their jobs.

        Call this method at least every second. Hung processes are killed before the store is used,
        because one of them may keep the database locked.

        Returns:
            the jobs that were taken from workers, as stored afterwards.

        Raises:
            JobStoreError: the store failed; hung processes were killed, and the next call does the
                rest.
        """
        with self._lock:
            return [] if self._stopped else self._watch(now)

    def stop(self, grace_s: float) -> None:
        """End all processes; `watch` does not replace them.

        Running jobs have `grace_s` seconds to finish; after that, they are returned to the queue.
        """
        with self._lock:
            self._stopped = True
        for slot in self._slots:
            slot.finish()
        deadline = time.monotonic() + grace_s  # shared, because the processes finish in parallel
        for slot in self._slots:
            slot.end(max(0.0, deadline - time.monotonic()))
            for report in slot.reports():
                self.on_report(report)
        # Jobs of processes that were killed before they could release them.
        for job in self._running_jobs():
            self._abandon(job, "the server stopped")
        for slot in self._slots:
            if slot.name:  # else it has never been started
                self._store.remove_worker(slot.name)  # no effect if the process did this itself

    def skip_grace_period(self) -> None:
        """End the grace period of a running `stop`: the workers release their jobs now."""
        for slot in self._slots:
            slot.terminate()

    def _watch(self, now: datetime | None) -> list[Job]:
        for slot in self._slots:
            if slot.is_hung(self._monotonic()):
                log.error("killing %s: it has stopped making progress", slot.name)
                slot.kill()
        abandoned: list[Job] = []
        for slot in self._slots:
            for report in slot.reports():
                self.on_report(report)
            if slot.process is not None and not slot.alive:
                jobs = [job for job in self._store.running(slot.name) if job.worker == slot.name]
                for report in slot.reports():  # sent since the last read
                    self.on_report(report)
                reason = slot.exit_reason
                abandoned += [after for job in jobs if (after := self._abandon(job, reason, now))]
                self._store.remove_worker(slot.name)
                slot.forget_process()
                log.error("%s has ended: %s", slot.name, slot.unready_reason or reason)
            if slot.process is None and slot.may_start:
                self.restarts += 1
                slot.start()
        # Leases are needed only for the jobs of other pools. For its own workers, the pool checks
        # the processes, which is independent of the system's date.
        alive = {slot.name for slot in self._slots if slot.alive}
        return abandoned + list(self._store.abandon_expired(now, spare=alive))

    def _running_jobs(self) -> list[Job]:
        return list(self._store.running(f"{self._name}/"))

    def _abandon(self, job: Job, reason: str, now: datetime | None = None) -> Job | None:
        try:
            return self._store.abandon(job.id, job.epoch, reason, now)
        except LeaseLostError:
            return None  # the job has ended in the meantime
