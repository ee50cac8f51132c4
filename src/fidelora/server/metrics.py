"""Prometheus metrics. Every name begins with `fidelora_`; see `docs/how-to/serve.md`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fidelora.jobs.job import Status
from fidelora.jobs.store import JobStore
from fidelora.workers.attempt import AttemptReport
from fidelora.workers.pool import WorkerPool

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
"""Methods counted separately. Clients can send any method, so all others share one label."""
# Upper bounds of the histogram buckets, in seconds.
_CLAIM_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_QUEUE_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_PHASE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_HTTP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """Metrics of one server, or of one `fidelora worker`.

    Args:
        store: queried for the queue and all live workers at each scrape; None leaves them out.
        pool: queried for the workers of this process at each scrape; None leaves them out.
        folders: folders by label, for the space on their disks. Those that do not exist are left
            out.
    """

    def __init__(
        self,
        store: JobStore | None,
        pool: WorkerPool | None,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._queue_wait = self._histogram(
            "queue_wait_seconds", "Time from acceptance to the first attempt.", _QUEUE_BUCKETS_S
        )
        self._claim = self._histogram(
            "claim_seconds", "Time of a claim that returned a request.", _CLAIM_BUCKETS_S
        )
        self._load = self._histogram(
            "load_seconds", "Time to load the base model and LoRAs, per attempt.", _PHASE_BUCKETS_S
        )
        self._switch = self._histogram(
            "adapter_switch_seconds", "Time to merge the LoRAs, per attempt.", _PHASE_BUCKETS_S
        )
        self._step = self._histogram(
            "step_seconds", "Time of a denoising step, averaged over a request.", _PHASE_BUCKETS_S
        )
        self._decode = self._histogram(
            "decode_seconds", "Time to decode the latents, per attempt.", _PHASE_BUCKETS_S
        )
        self._images = Counter("fidelora_images", "Finished images.", registry=self._registry)
        self._attempts = Counter(
            "fidelora_attempts",
            "Attempts, by resulting status of the request.",
            ["status"],
            registry=self._registry,
        )
        self._failures = Counter(
            "fidelora_failures", "Failed requests, by code.", ["code"], registry=self._registry
        )
        self._cache = Counter(
            "fidelora_adapter_cache",
            "LoRAs needed by requests, by cache result.",
            ["result"],
            registry=self._registry,
        )
        self._http = Counter(
            "fidelora_http_requests",
            "HTTP responses.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._http_time = self._histogram(
            "http_request_seconds", "Time from request headers to end of response.", _HTTP_BUCKETS_S
        )
        if store is not None:
            self._registry.register(_QueueCollector(store))
        if pool is not None:
            self._registry.register(_PoolCollector(pool))
        self._registry.register(_DiskCollector(folders or {}))

    def attempt_ended(self, report: AttemptReport) -> None:
        """Count an attempt that ended."""
        if report.wait_s is not None:
            self._queue_wait.observe(report.wait_s)
        if report.claim_s is not None:
            self._claim.observe(report.claim_s)
        for parts, histogram in (
            (("load", "read"), self._load),
            (("adapters",), self._switch),
            (("decode",), self._decode),
        ):
            if parts[0] in report.timings:
                histogram.observe(sum(report.timings.get(part, 0.0) for part in parts))
        if report.steps and "denoise" in report.timings:
            self._step.observe(report.timings["denoise"] / report.steps)
        self._images.inc(report.images)
        self._attempts.labels(report.status).inc()
        if report.code:
            self._failures.labels(report.code).inc()
        self._cache.labels("hit").inc(report.adapters_warm)
        self._cache.labels("miss").inc(report.adapters_cold)

    def lost(self, code: str) -> None:
        """Count a request that failed because its worker processes died."""
        self._failures.labels(code).inc()

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an HTTP response; `route` is the pattern of the path."""
        self._http.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._http_time.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fidelora_{name}", help_text, buckets=buckets, registry=self._registry)


class _QueueCollector(Collector):
    """Gauges of the job database, computed at each scrape."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        requests = GaugeMetricFamily(
            "fidelora_requests", "Unfinished requests, by status.", labels=["status"]
        )
        for status in (Status.IN_QUEUE, Status.IN_PROGRESS):
            requests.add_metric([status.value], self._store.count(status))
        yield requests
        head = self._store.peek()
        age = (datetime.now(UTC) - head.created_at).total_seconds() if head else 0.0
        yield GaugeMetricFamily(
            "fidelora_queue_age_seconds",
            "Age of the request at the head of the queue; 0 if the queue is empty.",
            value=max(0.0, age),  # the times may be those of two clocks
        )
        yield GaugeMetricFamily(
            "fidelora_live_workers",
            "Workers of all machines that have recently reported to the job database.",
            value=len(self._store.workers()),
        )


class _PoolCollector(Collector):
    """Gauges of the workers of this process, computed at each scrape."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(
            "fidelora_workers",
            "Worker processes of this server.",
            value=len(self._pool.process_ids),
        )
        yield GaugeMetricFamily(
            "fidelora_worker_restarts", "Replaced worker processes.", value=self._pool.restarts
        )
        yield GaugeMetricFamily(
            "fidelora_ready", "1 if a worker is ready.", value=int(self._pool.ready)
        )


class _DiskCollector(Collector):
    """Space on the disks of the folders, in bytes."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    def collect(self) -> Iterator[GaugeMetricFamily]:
        size = GaugeMetricFamily(
            "fidelora_disk_size_bytes", "Size of the folder's disk.", labels=["folder"]
        )
        free = GaugeMetricFamily(
            "fidelora_disk_free_bytes", "Free space on the folder's disk.", labels=["folder"]
        )
        for name, folder in self._folders.items():
            with suppress(OSError):  # a folder that is not created yet, or not mounted
                usage = shutil.disk_usage(folder)
                size.add_metric([name], usage.total)
                free.add_metric([name], usage.free)
        yield size
        yield free
