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


def run_workers(settings: Settings) -> None:
    """Run one worker per device until SIGTERM or Ctrl-C.

    Raises:
        FideloraError: the workers cannot start with these settings on this machine.
    """
    configure_logs(settings.log_format, settings.debug)
    if not settings.devices:
        raise SettingsError("DEVICE is none, so there is nothing to run; name a device.")
    cache = _adapter_cache(settings)
    store = SqlStore(settings.database)
    setups = worker_setups(settings, server_defaults_of(settings))
    # Each start has a new name. Jobs of a killed process return to the queue after a minute.
    name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    pool = WorkerPool(store, setups, name=name)
    metrics = Metrics(None, pool, {"outputs": settings.outputs, "adapters": settings.adapters})

    def on_report(report: AttemptReport) -> None:
        metrics.attempt_ended(report)
        _log_report(report)

    pool.on_report = on_report
    stop = threading.Event()
    probes: WorkerProbes | None = None
    if settings.worker_port is not None:
        probes = WorkerProbes(
            settings.host,
            settings.worker_port,
            is_ready=lambda: pool.ready and not stop.is_set(),
            metrics=metrics.text,
        )
        log.info("serving probes and metrics", host=settings.host, port=probes.port)

    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            pool.skip_grace_period()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    pool.start()
    log.info("worker started", name=name, devices=settings.devices)
    was_ready = False
    next_trim = time.monotonic()
    while not stop.wait(_WATCH_INTERVAL_S):
        try:
            if cache is not None and time.monotonic() >= next_trim:
                next_trim = time.monotonic() + _TRIM_INTERVAL_S
                cache.trim(store.needs_adapter)
            for job in pool.watch():
                if job.status is Status.FAILED and job.error:
                    metrics.lost(job.error.code)
        except JobStoreError as error:
            log.warning("job store unavailable", error=str(error))
        if pool.ready != was_ready:
            was_ready = pool.ready
            log.info("ready" if was_ready else "not ready", reason=pool.unready_reason)
    log.info("stopping", grace_s=settings.stop_grace_s)
    try:
        pool.stop(settings.stop_grace_s)
    except JobStoreError as error:
        log.warning("job store unavailable", error=str(error))
    store.close()
    if probes is not None:
        probes.close()
    log.info("stopped")


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


def _log_report(report: AttemptReport) -> None:
    log.info(
        "attempt ended",
        request_id=report.job_id,
        status=report.status,
        code=report.code,
        adapters_cold=report.adapters_cold,
    )


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 2**30)
