"""The requests of one visitor of the *Make* tab: those that have not ended, and their images.

Does not import Gradio.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from fidelora.errors import JobNotFoundError
from fidelora.jobs.job import Job, Status
from fidelora.jobs.store import JobStore
from fidelora.server.job_watcher import JobWatcher, Watch
from fidelora.server.page.html import (
    button_number,
    job_preview,
    job_progress,
    prompt_line,
    waiting_jobs,
)
from fidelora.server.page.pictures import ImageId
from fidelora.server.page.visitor import visitor

_NEW_REQUESTS_INTERVAL_S = 0.2
"""Seconds between two checks for requests that were sent meanwhile."""
_JOB_ID = re.compile("[0-9a-f]{32}")
_T = TypeVar("_T")


MAX_RESTORED = 200
"""Maximum number of requests, and of images, that a browser can bring back after a reload; each
request is read from the store several times a second."""


@dataclass
class Session:
    """State of an open page. Event handlers share it and change it in place.

    No handler awaits between reading and writing a value, so that no change is lost.

    Attributes:
        pending: ids of the requests that have not ended, in the order in which they were sent.
        shown: images in the gallery, newest first.
        selected: index of the selected image in `shown`.
        ended: HTML of the notes on sent requests, of failed and canceled requests, and of the last
            successful one.
        followed: True while a handler follows the requests.
        current: id of the request that the page shows as running, or as the next one; empty before
            the first update.
    """

    pending: list[str] = field(default_factory=list)
    shown: list[ImageId] = field(default_factory=list)
    selected: int = 0
    ended: list[str] = field(default_factory=list)
    followed: bool = False
    current: str = ""

    def remembered(self) -> list[ImageId]:
        """Return the entries to store in the browser: pending requests with index -1, and images.

        After a reload, `restore` reads them.
        """
        return [*((job_id, -1) for job_id in self.pending), *self.shown]

    def restore(self, remembered: object) -> None:
        """Add the entries that a browser returned; invalid ones are ignored."""
        entries = [
            (entry[0], entry[1])
            for entry in (remembered if isinstance(remembered, list) else [])
            if isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], int)
            and _JOB_ID.fullmatch(entry[0])
        ]
        pending = [one for one, index in entries if index < 0][:MAX_RESTORED]
        shown = [entry for entry in entries if entry[1] >= 0][:MAX_RESTORED]
        # Requests may have been sent since the reload, before the browser returned the entries.
        self.pending = _distinct([*pending, *self.pending])
        self.shown = _distinct([*self.shown, *shown])


@dataclass(frozen=True)
class Update:
    """A change of a session's requests.

    Attributes:
        progress: HTML of ended and running requests.
        waiting: HTML of the requests that wait; empty if there are none.
        previews: HTML with the previews of the running requests; empty if there are none.
        succeeded: jobs whose images are new.
    """

    progress: str
    waiting: str = ""
    previews: str = ""
    succeeded: tuple[Job, ...] = ()


@dataclass(frozen=True)
class RequestQueue:
    """Follows and cancels the requests of sessions."""

    store: JobStore
    watcher: JobWatcher

    async def follow(self, session: Session) -> AsyncIterator[Update]:
        """Yield an update for every change until no request is pending.

        Yields nothing if another handler follows the session.
        """
        if session.followed:
            return
        session.followed = True
        last: object = None
        try:
            with self.watcher.watch() as watch:
                while session.pending:
                    read = list(session.pending)
                    await self._watch(watch, read)
                    jobs = self._latest(watch, read)
                    state = [(job.id, job.version, position) for job, position in jobs]
                    if state != last:
                        last = state
                        ended = {*read} - {job.id for job, _ in jobs if not job.status.final}
                        session.pending = [one for one in session.pending if one not in ended]
                        succeeded = [job for job, _ in jobs if job.status is Status.SUCCEEDED]
                        session.ended += [
                            job_progress(job, None)
                            for job, _ in jobs
                            if job.status.final and job.status is not Status.SUCCEEDED
                        ]
                        if succeeded and not session.pending:
                            session.ended.append(job_progress(succeeded[-1], None))
                        previews = "".join(job_preview(job) for job, _ in jobs)
                        session.current = _current(job for job, _ in jobs)
                        yield Update(*self._progress(session, jobs), previews, tuple(succeeded))
                    if session.pending:
                        await watch.changed(_NEW_REQUESTS_INTERVAL_S)
        finally:
            session.followed = False

    def cancel(self, session: Session) -> None:
        """Cancel the request that the page shows as running, or as the next one if none is.

        If it has ended in the meantime, the next one is not canceled in its place.
        """
        current = session.current or _current(job for job, _ in self._read(session.pending))
        self._cancel([current] if current else [])

    def cancel_one(self, session: Session, number: int | None) -> None:
        """Cancel the pending request with this `button_number`."""
        self._cancel(one for one in session.pending if button_number(one) == number)

    def cancel_all(self, session: Session) -> None:
        """Cancel all requests of a session, the last one first, so that none starts meanwhile."""
        self._cancel(reversed(session.pending))

    async def _watch(self, watch: Watch, job_ids: Iterable[str]) -> None:
        """Add those of the jobs that belong to the visitor and are not watched yet."""
        new = [job_id for job_id in job_ids if not watch.has(job_id)]
        for job, position in await run_in_threadpool(self._read, new) if new else ():
            watch.add(job, position)

    def _latest(self, watch: Watch, job_ids: Iterable[str]) -> list[tuple[Job, int | None]]:
        """Return the watched jobs that still exist, and the positions of those in the queue."""
        states = [watch.state(job_id) for job_id in job_ids if watch.has(job_id)]
        return [(state.job, state.position) for state in states]

    def _cancel(self, job_ids: Iterable[str]) -> None:
        for job_id in list(job_ids):
            try:
                if visitor().can_access(self.store.get(job_id)):
                    self.store.cancel(job_id)
            except JobNotFoundError:  # removed in the meantime
                continue

    def _read(self, job_ids: Iterable[str]) -> list[tuple[Job, int | None]]:
        """Return the visitor's jobs that exist, and the positions of those in the queue."""
        found = []
        for job_id in job_ids:
            try:
                job = self.store.get(job_id)
            except JobNotFoundError:  # removed in the meantime
                continue
            if not visitor().can_access(job):
                continue
            queued = job.status is Status.IN_QUEUE
            found.append((job, self.store.queue_position(job_id) if queued else None))
        return found

    def _progress(self, session: Session, jobs: list[tuple[Job, int | None]]) -> tuple[str, str]:
        """Return `progress` and `waiting` of an update."""
        pending = [(job, position) for job, position in jobs if not job.status.final]
        running = [job for job, _ in pending if job.status is Status.IN_PROGRESS]
        waiting = [(job, position) for job, position in pending if job not in running]
        parts = list(session.ended)
        for job in running:
            if len(pending) > 1:
                parts.append(f'<div class="message">{prompt_line(job)}</div>')
            parts.append(job_progress(job, None))
        if len(pending) == len(waiting) == 1:
            parts.append(job_progress(*waiting.pop()))
        return "".join(parts), waiting_jobs(waiting) if waiting else ""


def _current(jobs: Iterable[Job]) -> str:
    """Return the id of the first running job, or else of the first queued one; "" without any."""
    pending = [job for job in jobs if not job.status.final]
    running = [job for job in pending if job.status is Status.IN_PROGRESS]
    return next((job.id for job in [*running, *pending]), "")


def _distinct(entries: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(entries))
