"""Reports of a worker to the store: that it is alive, and which adapters it has loaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from operator import attrgetter

from fidelora.errors import JobStoreError
from fidelora.jobs.store import WORKER_ALIVE_S, JobStore, WorkerState

log = logging.getLogger(__name__)

_REPORT_S = WORKER_ALIVE_S / 3
"""Seconds between two reports; two of them may be missed."""


class Presence:
    """Reports the state of a worker on a thread, also while the worker makes an image.

    If the adapters of the worker change, the report follows at once: other workers leave jobs for
    the worker that has their adapters loaded.

    Args:
        name: name of the worker.
        device: device of its model.
        version: version of Fidelora.
    """

    def __init__(self, store: JobStore, name: str, device: str, version: str) -> None:
        self._store = store
        self._state = WorkerState(name, device, version)
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="reports-presence", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def update(
        self,
        loaded: Collection[str],
        merged: Collection[str],
        models: Sequence[str],
        *,
        is_idle: bool,
    ) -> None:
        """Set the state of the worker."""
        before, idle_since = self._state, None
        if is_idle:
            idle_since = before.idle_since or datetime.now(UTC)
        self._state = WorkerState(
            before.name,
            before.device,
            before.version,
            frozenset(loaded),
            frozenset(merged),
            idle_since,
            models=tuple(models),
        )
        reported_at_once = attrgetter("loaded", "merged", "models")
        if reported_at_once(before) != reported_at_once(self._state):
            self._changed.set()

    def close(self) -> None:
        """Remove the worker from the store."""
        self._closed = True
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(_REPORT_S)

    def _run(self) -> None:
        while not self._closed:
            self._changed.clear()
            try:
                self._store.report_worker(self._state)
            except JobStoreError as error:
                log.warning("the worker could not report: %s", error)
            self._changed.wait(_REPORT_S)
        try:
            self._store.remove_worker(self._state.name)
        except JobStoreError as error:
            log.warning("the worker could not be removed from the database: %s", error)
