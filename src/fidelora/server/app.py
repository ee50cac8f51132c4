"""The composition root: builds the request context and the application from the settings."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI, Request, Security
from fastapi.security import HTTPBasic, HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

import fidelora
from fidelora.accel.allocator import return_freed_memory
from fidelora.atomic import make_folder, remove_stale_temporaries
from fidelora.errors import StorageError
from fidelora.jobs.client_state import ClientState, local_state
from fidelora.jobs.job import Status
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import JobStore
from fidelora.jobs.transactions import Database
from fidelora.loras.cache import AdapterCache
from fidelora.loras.download import DownloadRules
from fidelora.loras.folder import UPLOADS
from fidelora.loras.resolve import AdapterResolver
from fidelora.loras.shared import SharedAdapters, SharedLoras
from fidelora.loras.upload_folder import UploadFolder
from fidelora.loras.uploads import UploadQuota, upload_folders
from fidelora.server import api_docs, problems
from fidelora.server.background import run_periodically
from fidelora.server.base_models import BaseModels
from fidelora.server.context import ServerContext
from fidelora.server.key_store import client_state, keys_file
from fidelora.server.login import Login
from fidelora.server.metrics import Metrics
from fidelora.server.middleware import AccessControl, BodyLimitMiddleware, RequestLogMiddleware
from fidelora.server.page.mount import SWITCHED_OFF, Page, make_page
from fidelora.server.public_texts import ROOTS
from fidelora.server.readiness import ReadinessLog
from fidelora.server.routes import (
    a1111,
    explain,
    inference,
    loras,
    openai,
    operations,
    replay,
    requests,
    workers,
)
from fidelora.server.size_limits import SizeLimits
from fidelora.server.worker_host import worker_setups
from fidelora.settings import Settings
from fidelora.storage.bucket import Bucket
from fidelora.storage.images import image_store
from fidelora.workers.pool import WorkerPool

log = structlog.get_logger(__name__)

_WATCH_INTERVAL_S = 0.5
"""Seconds between two checks for dead and hanging workers."""
_CLEAN_INTERVAL_S = 60.0
"""Seconds between two removals of old requests and adapters."""
_REFRESH_INTERVAL_S = 5.0
"""Seconds between two checks for LoRAs that other servers have stored or deleted."""
_CLEAN_OBJECT_STORE_INTERVAL_S = 3600.0
"""Seconds between two removals of unused adapters from the object store."""
_TRIM_INTERVAL_S = 30.0
"""Seconds between two returns of freed memory to the operating system."""

_DESCRIPTION = """Images with LoRAs trained by AI Toolkit, identical to the trainer's samples.

`POST /v1/inference` creates a request; its status, progress and images are at
`/v1/requests/{request_id}`."""


def make_context(
    settings: Settings,
    server_defaults: Mapping[str, Mapping[str, Any]],
    base_url: str,
    server_id: str,
) -> ServerContext:
    """Return the context of a production server, with a database, a cache and worker processes.

    Args:
        server_defaults: recipe fields that the server sets, by model id.
        server_id: id that survives restarts; identifies the server's unfinished jobs.

    Raises:
        FideloraError: a folder or the database cannot be used.
    """
    for folder in (settings.loras, settings.loras / UPLOADS, settings.outputs):
        make_folder(folder)
    for folder in (settings.loras, *upload_folders(settings.loras), settings.outputs):
        remove_stale_temporaries(folder)
    database = Database(settings.database)
    store, state = SqlStore(database), client_state(settings, database)
    pool = WorkerPool(store, worker_setups(settings, server_defaults), name=server_id)
    context = context_with_store(store, settings, server_defaults, base_url, pool, state)
    pool.on_report = context.attempt_ended
    context.uploads.refresh()
    return context


def context_with_store(
    store: JobStore,
    settings: Settings,
    server_defaults: Mapping[str, Mapping[str, Any]],
    base_url: str,
    pool: WorkerPool | None = None,
    clients: ClientState | None = None,
) -> ServerContext:
    """Return a context that uses this store; without a pool, other processes run its jobs.

    Args:
        clients: state of the clients; by default, it is kept in the data folder and in memory.

    Raises:
        OutputError: the adapter cache is not writable.
    """
    ROOTS.set(_private_paths(settings, server_defaults))
    shared_adapters, shared_loras = None, None
    if settings.object_store:
        bucket = Bucket(settings.object_store)
        shared_adapters = SharedAdapters(bucket, timedelta(days=settings.keep_days))
        shared_loras = SharedLoras(bucket, settings.loras)
    cache = AdapterCache(settings.adapters, _bytes(settings.lora_cache_gb) or 0, shared_adapters)
    rules = DownloadRules(
        hosts=settings.lora_hosts,
        max_bytes=settings.lora_max_mb * 2**20,
        timeout_s=settings.lora_timeout_s,
    )
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    return ServerContext(
        settings=settings,
        store=store,
        cache=cache,
        resolver=AdapterResolver(settings.loras, cache, rules, token, shared_loras),
        uploads=UploadFolder(
            settings.loras,
            UploadQuota(
                settings.loras,
                _bytes(settings.uploads_gb) or 0,
                _bytes(settings.uploads_per_key_gb),
            ),
            shared_loras,
        ),
        images=image_store(settings.outputs, settings.object_store),
        clients=clients or local_state(keys_file(settings)),
        metrics=Metrics(
            store,
            pool,
            {
                "data": settings.data_dir,
                "outputs": settings.outputs,
                "adapters": settings.adapters,
            },
        ),
        base_url=base_url,
        server_defaults=server_defaults,
        base_models=BaseModels(server_defaults),
        limits=SizeLimits(
            settings.max_pixels, settings.max_video_pixels, settings.inference_timeout_s
        ),
        pool=pool,
    )


def _private_paths(
    settings: Settings, server_defaults: Mapping[str, Mapping[str, Any]]
) -> list[Path]:
    """Return the paths that error messages can contain but clients must not see."""
    paths = [
        settings.data_dir,
        settings.loras,
        settings.outputs,
        settings.adapters,
        settings.jobs,
        settings.model_cache_dir,
        Path(tempfile.gettempdir()),
    ]
    with suppress(RuntimeError, OSError):  # a user without a home folder
        paths += [Path.cwd(), Path.home()]
    bases = [str(one.get("base_model", "")) for one in server_defaults.values()]
    paths += [Path(base) for base in bases if Path(base).is_absolute()]
    return [path for path in paths if path is not None]


class _DocumentedBasic(HTTPBasic):
    """Basic authentication in the OpenAPI document; only `AccessControl` checks credentials.

    FastAPI's class refuses empty credentials, which clients send to servers without keys.
    """

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        """Accept everything."""


def make_app(context: ServerContext, *, with_page: bool = False) -> FastAPI:
    """Return the application; its lifespan starts and stops the workers.

    Args:
        with_page: True to serve the web page, if it is enabled and its packages are installed.
    """
    # The security schemes only document the API; the middleware checks keys before a body is read.
    bearer = Security(
        HTTPBearer(
            auto_error=False,
            description="A key from `fidelora keys add`; required if the server has any keys.",
        )
    )
    app = FastAPI(
        title="Fidelora",
        version=fidelora.__version__,
        description=_DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,  # FastAPI's page loads its scripts from another host
        redoc_url=None,
    )
    api_docs.install(app)
    app.state.context = context
    problems.install(app)
    app.include_router(operations.router)
    for router in (
        inference.router, replay.router, explain.router, requests.router, loras.router,
        openai.router, workers.router,
    ):  # fmt: skip
        app.include_router(router, dependencies=[bearer])
    basic = Security(
        _DocumentedBasic(
            auto_error=False,
            description="For clients without bearer tokens: the key is the password.",
        )
    )
    app.include_router(a1111.router, dependencies=[bearer, basic])
    login = Login(
        context.keys, context.clients.sessions, secure=context.base_url.startswith("https://")
    )
    page = make_page(context, login) if with_page else SWITCHED_OFF
    if isinstance(page, Page):
        app.state.page = page
        app.router.routes.append(page)
    else:
        app.add_route("/", lambda _request: PlainTextResponse(page), include_in_schema=False)
    app.add_middleware(
        BodyLimitMiddleware,
        max_lora_bytes=context.settings.lora_max_mb * 2**20,
        max_job_bytes=context.settings.job_max_mb * 2**20,
    )
    app.add_middleware(
        AccessControl,
        keys=context.keys,
        base_url=context.base_url,
        login=login if isinstance(page, Page) else None,
        origins=context.settings.cors_origins,
    )
    if context.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(context.settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID"],
        )
    app.add_middleware(RequestLogMiddleware, metrics=context.metrics)  # added last: outermost
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: ServerContext = app.state.context
    running = [
        asyncio.create_task(
            run_periodically(_CLEAN_INTERVAL_S, partial(asyncio.to_thread, clean, context))
        ),
        asyncio.create_task(
            run_periodically(_TRIM_INTERVAL_S, partial(asyncio.to_thread, return_freed_memory))
        ),
    ]
    if context.settings.object_store:
        running += [
            asyncio.create_task(
                run_periodically(
                    _REFRESH_INTERVAL_S, partial(asyncio.to_thread, context.uploads.refresh)
                )
            ),
            asyncio.create_task(
                run_periodically(
                    _CLEAN_OBJECT_STORE_INTERVAL_S,
                    partial(asyncio.to_thread, _clean_object_store, context),
                )
            ),
        ]
    if context.pool is not None:
        await asyncio.to_thread(context.pool.start)
        running.append(
            asyncio.create_task(
                run_periodically(
                    _WATCH_INTERVAL_S,
                    partial(
                        asyncio.to_thread, _watch, context, context.pool, ReadinessLog(context)
                    ),
                )
            )
        )
    for task in running:
        task.add_done_callback(partial(_stop_server_on_failure, context))
    page: Page | None = getattr(app.state, "page", None)
    async with page.running() if page is not None else nullcontext():
        yield
    context.stopping.set()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    if context.pool is not None:
        await asyncio.to_thread(context.pool.stop, 0.0)  # the grace period is over already
    await asyncio.to_thread(context.store.close)


def _stop_server_on_failure(context: ServerContext, task: asyncio.Task[None]) -> None:
    """End the server if a background task ended, so that a supervisor can restart it.

    Otherwise the server would appear healthy although it no longer watches its workers.
    """
    if not task.cancelled() and (error := task.exception()):
        log.critical("background task ended, stopping the server", exc_info=error)
        context.failed.set()
        signal.raise_signal(signal.SIGTERM)


def _watch(context: ServerContext, pool: WorkerPool, readiness: ReadinessLog) -> None:
    if context.stopping.is_set():
        return  # the workers are being stopped on purpose
    for job in pool.watch():
        log.warning(
            "job reclaimed from its worker",
            request_id=job.id,
            status=job.status.value,
            attempts=job.attempts,
        )
        if job.status is Status.FAILED and job.error:
            context.metrics.lost(job.error.code)
    readiness.update()


def clean(context: ServerContext) -> None:
    """Remove requests over the age or count limit with their images, and trim the adapter cache."""
    now = datetime.fromtimestamp(context.retention_clock.now(), UTC)
    before = now - timedelta(days=context.settings.keep_days)
    removed = context.store.remove_finished(before=before, keep=context.settings.keep_requests)
    locations = [output.file_path for job in removed for output in job.outputs]
    try:
        context.images.remove(locations)
    except StorageError as error:
        log.warning("images were left behind", count=len(locations), reason=str(error))
    if removed:
        log.info("old requests removed", count=len(removed))
    if trimmed := context.cache.trim(context.store.needs_adapter):
        log.info("adapters removed from cache", count=len(trimmed))


def _clean_object_store(context: ServerContext) -> None:
    if removed := context.cache.trim_shared(context.store.needs_adapter):
        log.info("adapters removed from the object store", count=len(removed))


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 2**30)
