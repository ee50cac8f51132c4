"""`fidelora worker`: worker processes on a machine without a server, on a shared database."""

from __future__ import annotations

import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import Any

import structlog

from fidelora.atomic import remove_stale_temporaries
from fidelora.errors import JobStoreError, SettingsError
from fidelora.families import all_families
from fidelora.jobs.job import Status
from fidelora.jobs.sql import SqlStore
from fidelora.loras.cache import AdapterCache
from fidelora.recipe import Recipe
from fidelora.server.defaults import server_defaults_of
from fidelora.server.logs import configure_logs
from fidelora.server.metrics import Metrics
from fidelora.server.stop_signals import STOP_SIGNALS, ignore_stop_signals
from fidelora.server.worker_probes import WorkerProbes
from fidelora.settings import Settings
from fidelora.storage.bucket import Bucket
from fidelora.workers.attempt import AttemptReport, WorkerLimits
from fidelora.workers.pool import WorkerPool
from fidelora.workers.process import WorkerSetup

log = structlog.get_logger(__name__)

_WATCH_INTERVAL_S = 0.5
"""Seconds between two checks for dead and hanging workers."""
_TRIM_INTERVAL_S = 60.0
"""Seconds between two removals of old adapters from the cache of this machine."""


def worker_setups(
    settings: Settings, server_defaults: Mapping[str, Mapping[str, Any]]
) -> list[WorkerSetup]:
    """Return the configuration of one worker per device.

    Args:
        server_defaults: recipe fields that the server sets, by model id.
    """
    warm_model = next(iter(settings.base_models or all_families()))
    setup = partial(
        WorkerSetup,
        settings.database,
        settings.outputs,
        offload=settings.offload,
        object_store=settings.object_store,
        adapters=settings.adapters,
        model_cache=settings.model_cache_dir,
        hub_token=settings.hf_token.get_secret_value() if settings.hf_token else None,
        base_budget_bytes=_bytes(settings.bases_gb),
        adapter_budget_bytes=_bytes(settings.adapters_gb),
        limits=WorkerLimits(
            lease_s=settings.step_timeout_s,
            timeout_s=settings.inference_timeout_s,
            batch_wait_s=settings.batch_wait_s,
        ),
        warm=Recipe(prompt="", model=warm_model, **server_defaults[warm_model]),
        prepare=partial(configure_logs, settings.log_format, settings.debug),
    )
    return [setup(device=device) for device in settings.devices]


class WorkerHost:
    """Worker processes on this machine, one per device, without a server.

    Args:
        name: name of the processes' pool. Jobs that an earlier pool of this name left behind are
            queued again at the start.

    Raises:
        FideloraError: the workers cannot start with these settings on this machine.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        if not settings.devices:
            raise SettingsError("DEVICE is none, so there is nothing to run; name a device.")
        self._cache = _adapter_cache(settings)
        self._next_trim = time.monotonic()
        self._settings = settings
        self._store = SqlStore(settings.database)
        setups = worker_setups(settings, server_defaults_of(settings))
        self.pool = WorkerPool(self._store, setups, name=name)
        folders = {"outputs": settings.outputs, "adapters": settings.adapters}
        self.metrics = Metrics(None, self.pool, folders)
        self.pool.on_report = self._on_report
        self._name = name
        self._was_ready = False

    def run(self, stop: threading.Event) -> None:
        """Start the processes and replace dead ones until `stop` is set, then end them all.

        Running jobs have `stop_grace_s` seconds to finish; after that, they return to the queue.
        """
        self.pool.start()
        log.info("worker started", name=self._name, devices=self._settings.devices)
        while not stop.wait(_WATCH_INTERVAL_S):
            self._watch()
        log.info("stopping", grace_s=self._settings.stop_grace_s)
        try:
            self.pool.stop(self._settings.stop_grace_s)
        except JobStoreError as error:
            log.warning("job store unavailable", error=str(error))
        self._store.close()

    def _watch(self) -> None:
        try:
            if self._cache is not None and time.monotonic() >= self._next_trim:
                self._next_trim = time.monotonic() + _TRIM_INTERVAL_S
                self._cache.trim(self._store.needs_adapter)
            for job in self.pool.watch():
                if job.status is Status.FAILED and job.error:
                    self.metrics.lost(job.error.code)
        except JobStoreError as error:
            log.warning("job store unavailable", error=str(error))
        if self.pool.ready != self._was_ready:
            self._was_ready = self.pool.ready
            log.info("ready" if self._was_ready else "not ready", reason=self.pool.unready_reason)

    def _on_report(self, report: AttemptReport) -> None:
        self.metrics.attempt_ended(report)
        log.info(
            "attempt ended",
            request_id=report.job_id,
            status=report.status,
            code=report.code,
            adapters_cold=report.adapters_cold,
        )


def new_host_name() -> str:
    """Return a name for a `WorkerHost` that no other one has.

    Each start has a new name. Jobs of a killed process return to the queue after a minute.
    """
    return f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"


def run_workers(settings: Settings) -> None:
    """Run one worker per device until SIGTERM or Ctrl-C.

    Raises:
        FideloraError: the workers cannot start with these settings on this machine.
    """
    configure_logs(settings.log_format, settings.debug)
    host = WorkerHost(settings, new_host_name())
    stop = threading.Event()
    probes: WorkerProbes | None = None
    if settings.worker_port is not None:
        probes = WorkerProbes(
            settings.host,
            settings.worker_port,
            is_ready=lambda: host.pool.ready and not stop.is_set(),
            metrics=host.metrics.text,
        )
        log.info("serving probes and metrics", host=settings.host, port=probes.port)

    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            host.pool.skip_grace_period()
        stop.set()

    for number in STOP_SIGNALS:
        signal.signal(number, request_stop)
    host.run(stop)
    if probes is not None:
        probes.close()
    log.info("stopped")
    ignore_stop_signals()


def _adapter_cache(settings: Settings) -> AdapterCache | None:
    """Check the folders, and return the cache of this machine if there is an object store.

    Raises:
        SettingsError: a folder that the servers use, too, does not exist.
        FideloraError: the object store or the cache folder cannot be used.
    """
    if settings.object_store:
        Bucket(settings.object_store).check()
        return AdapterCache(settings.adapters, _bytes(settings.lora_cache_gb) or 0)
    for folder, name in (
        (settings.outputs, "OUTPUT_BASE_PATH"),
        (settings.adapters, "LORA_DOWNLOAD_CACHE_DIR"),
    ):
        # Do not create it: images in a folder that is not mounted would be lost to the servers.
        if not folder.is_dir():
            raise SettingsError(
                f"The folder {folder} does not exist. Mount the folder that the servers use, set "
                f"{name}, or use an object store (FIDELORA_OBJECT_STORE)."
            )
    remove_stale_temporaries(settings.outputs)
    return None


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 2**30)
