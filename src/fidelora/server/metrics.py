"""What Prometheus hears. Every name begins with `fidelora_`; `docs/how-to/serve.md` explains them."""

from __future__ import annotations

from collections.abc import Iterator

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
"""Anything can be a method; not anything may become a series."""
_WAITS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_PARTS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_HTTP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """Counters of one server.

    Args:
        store, pool: asked for the length of the queue, and for the workers, whenever somebody reads the metrics.
    """

    def __init__(self, store: JobStore, pool: WorkerPool | None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._queue_wait = self._histogram(
            "queue_wait_seconds", "From acceptance to the first attempt.", _WAITS_S
        )
        self._load = self._histogram(
            "load_seconds", "Base model and LoRAs into memory, for each attempt.", _PARTS_S
        )
        self._switch = self._histogram(
            "adapter_switch_seconds", "Putting LoRAs into the weights, for each attempt.", _PARTS_S
        )
        self._step = self._histogram(
            "step_seconds", "One denoising step, averaged over a request.", _PARTS_S
        )
        self._decode = self._histogram("decode_seconds", "Decoding, for each attempt.", _PARTS_S)
        self._images = Counter("fidelora_images", "Finished images.", registry=self._registry)
        self._attempts = Counter(
            "fidelora_attempts",
            "Attempts, by what the request was then.",
            ["status"],
            registry=self._registry,
        )
        self._failures = Counter(
            "fidelora_failures", "Failed requests, by code.", ["code"], registry=self._registry
        )
        self._cache = Counter(
            "fidelora_adapter_cache", "LoRAs that a request needed, by whether they were in memory.", ["result"],
            registry=self._registry,
        )  # fmt: skip
        self._http = Counter(
            "fidelora_http_requests",
            "Answers.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._http_time = self._histogram(
            "http_request_seconds", "From a request's head to the end of its answer.", _HTTP_S
        )
        self._registry.register(_Now(store, pool))

    def attempt_ended(self, report: AttemptReport) -> None:
        """Count an attempt."""
        if report.wait_s is not None:
            self._queue_wait.observe(report.wait_s)
        for part, histogram in (
            ("load", self._load),
            ("adapters", self._switch),
            ("decode", self._decode),
        ):
            if part in report.timings:
                histogram.observe(report.timings[part])
        if report.steps and "denoise" in report.timings:
            self._step.observe(report.timings["denoise"] / report.steps)
        self._images.inc(report.images)
        self._attempts.labels(report.status).inc()
        if report.code:
            self._failures.labels(report.code).inc()
        self._cache.labels("hit").inc(report.adapters_warm)
        self._cache.labels("miss").inc(report.adapters_cold)

    def lost(self, code: str) -> None:
        """Count a request that failed because its workers died."""
        self._failures.labels(code).inc()

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer; `route` is the path's pattern."""
        self._http.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._http_time.observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fidelora_{name}", help_text, buckets=buckets, registry=self._registry)


class _Now(Collector):
    """What is counted at the moment when somebody asks."""

    def __init__(self, store: JobStore, pool: WorkerPool | None) -> None:
        self._store = store
        self._pool = pool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        requests = GaugeMetricFamily(
            "fidelora_requests", "Requests that have not ended, by state.", labels=["status"]
        )
        for status in (Status.IN_QUEUE, Status.IN_PROGRESS):
            requests.add_metric([status.value], self._store.count(status))
        yield requests
        if self._pool is not None:
            workers = len(self._pool.process_ids)
            yield GaugeMetricFamily(
                "fidelora_workers", "Worker processes that are alive.", value=workers
            )
            yield GaugeMetricFamily(
                "fidelora_worker_restarts",
                "Worker processes that were replaced.",
                value=self._pool.restarts,
            )
            yield GaugeMetricFamily(
                "fidelora_ready", "1 if requests are worked on.", value=int(self._pool.ready)
            )
