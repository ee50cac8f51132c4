"""One poll of the job store for all streams and calls that wait for jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import structlog
from starlette.concurrency import run_in_threadpool

from fidelora.errors import JobNotFoundError, JobStoreError, StreamsFullError
from fidelora.jobs.job import Job
from fidelora.jobs.store import JobChanges
from fidelora.server.connections import LimitedProtocol

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 0.2
"""Seconds between two reads of the watched jobs."""
MAX_STREAMS = 2000
"""Maximum number of event streams of one server. At most half of its connections can be streams, so
that streams alone cannot keep other calls out."""


class _Store(Protocol):
    def read_changes(self, known: Mapping[str, int]) -> JobChanges: ...


@dataclass(frozen=True)
class JobState:
    """A job, and the number of queued jobs before it; None if the job is not in the queue."""

    job: Job
    position: int | None


class Watch:
    """Latest states of watched jobs, updated while the watch is open."""

    def __init__(self, poll: _Poll) -> None:
        self._poll = poll
        self._states: dict[str, JobState] = {}
        self._changed = asyncio.Event()
        self._error: JobStoreError | None = None

    def add(self, job: Job, position: int | None = None) -> None:
        """Add a job to this watch.

        Args:
            job: the job as it was last read.
            position: its last known position in the queue.
        """
        if job.id not in self._states:
            self._states[job.id] = JobState(job, position)
            self._poll.add(self, job.id)

    def has(self, job_id: str) -> bool:
        """True if a job is watched and was not removed."""
        return job_id in self._states

    def state(self, job_id: str) -> JobState:
        """Return the latest state of a watched job.

        Raises:
            JobNotFoundError: the job was removed.
        """
        try:
            return self._states[job_id]
        except KeyError:
            raise JobNotFoundError from None

    async def changed(self, timeout_s: float | None = None) -> None:
        """Wait until a job or the state of the server changes, or until the timeout.

        Changes between two calls are not lost, but several of them can be reported as one.

        Raises:
            JobStoreError: the store could not be read.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def update(self, job_id: str, state: JobState | None) -> None:
        """Replace the state of a job, None if it was removed, and wake the waiting task."""
        if state == self._states.get(job_id):
            return
        if state is None:
            del self._states[job_id]
        else:
            self._states[job_id] = state
        self._changed.set()

    def wake(self, error: JobStoreError | None = None) -> None:
        """Wake the waiting task, with an error if one is given."""
        self._error = error
        self._changed.set()


class _Poll:
    """Reads all watched jobs of one event loop with one call of the store, while there are any."""

    def __init__(self, store: _Store, server_state: Callable[[], object]) -> None:
        self._store = store
        self._server_state = server_state
        self._watches: dict[str, set[Watch]] = {}
        self._states: dict[str, JobState] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, watch: Watch, job_id: str) -> None:
        """Read a job for a watch from now on."""
        self._watches.setdefault(job_id, set()).add(watch)
        if job_id in self._states:  # another watch has the job, and its state may be newer
            watch.update(job_id, self._states[job_id])
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def remove(self, watch: Watch) -> None:
        """Remove a watch; the last one ends the task."""
        for job_id in [one for one, watches in self._watches.items() if watch in watches]:
            self._watches[job_id].discard(watch)
            if not self._watches[job_id]:
                del self._watches[job_id]
                self._states.pop(job_id, None)
        if not self._watches and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        server_state = self._server_state()
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            known = dict.fromkeys(self._watches, 0)
            known |= {job_id: state.job.version for job_id, state in self._states.items()}
            try:
                changes = await run_in_threadpool(self._store.read_changes, known)
            except JobStoreError as error:
                self._wake_all(error)
                continue
            except Exception:  # for example one job that this version cannot read
                log.exception("watched jobs not read, retrying")
                self._wake_all(JobStoreError())
                continue
            self._apply(known, changes)
            if server_state != (server_state := self._server_state()):
                self._wake_all()

    def _apply(self, known: Mapping[str, int], changes: JobChanges) -> None:
        for job_id in known.keys() & self._watches.keys():  # watches may have ended meanwhile
            job = changes.changed.get(job_id)
            if job is None and job_id in self._states:
                job = self._states[job_id].job
            if job is None or job_id in changes.missing:
                self._states.pop(job_id, None)
                state = None
            else:
                state = self._states[job_id] = JobState(job, changes.positions.get(job_id))
            for watch in self._watches[job_id]:
                watch.update(job_id, state)

    def _wake_all(self, error: JobStoreError | None = None) -> None:
        for watch in {watch for watches in self._watches.values() for watch in watches}:
            watch.wake(error)


class JobWatcher:
    """Creates watches, which share one poll of the store.

    Args:
        store: the job store.
        server_state: returns a value whose change wakes every watch, such as the reason why no
            worker is ready.
    """

    def __init__(self, store: _Store, server_state: Callable[[], object]) -> None:
        self._store = store
        self._server_state = server_state
        # A server has one event loop. Tests have several, which cannot share events.
        self._polls: WeakKeyDictionary[asyncio.AbstractEventLoop, _Poll] = WeakKeyDictionary()
        self._streams = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count an event stream while the context is open.

        Raises:
            StreamsFullError: there are too many already.
        """
        if self._streams >= min(MAX_STREAMS, LimitedProtocol.max_connections // 2):
            raise StreamsFullError
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Open a watch without jobs, in the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._polls:
            self._polls[loop] = _Poll(self._store, self._server_state)
        watch = Watch(self._polls[loop])
        try:
            yield watch
        finally:
            self._polls[loop].remove(watch)
