"""Prefetch of the adapters of the next job, on a thread, while the current job runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from fidelora.jobs.job import Job
from fidelora.recipe import AdapterRef

if TYPE_CHECKING:  # the server imports this module and must not load torch
    from fidelora.adapters.library import AdapterLibrary

log = logging.getLogger(__name__)


class AdapterPrefetcher:
    """Reads adapters into the worker's adapter library on one thread."""

    def __init__(self, library: AdapterLibrary) -> None:
        self._library = library
        self._thread = ThreadPoolExecutor(1, "reads-adapters")
        self._prefetches: list[Future[None]] = []

    def start(self, job: Job) -> None:
        """Read the adapters of a job; returns at once."""
        self._prefetches = [self._thread.submit(self._prefetch, ref) for ref in adapters_of(job)]

    def cancel(self) -> None:
        """Cancel the prefetches that have not started."""
        for future in self._prefetches:
            future.cancel()

    def _prefetch(self, ref: AdapterRef) -> None:
        try:
            self._library.prefetch(ref)
        except Exception:  # the job that needs the adapter reads it again and reports the error
            log.exception("prefetching the adapter %s failed", ref.sha256)


def adapters_of(job: Job) -> Sequence[AdapterRef]:
    """Return the adapters of all images of a job, without duplicates."""
    return list({ref.sha256: ref for recipe in job.recipes for ref in recipe.files}.values())
