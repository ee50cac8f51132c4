"""From a request to a job in the store, and for clients that wait in the same call, to the job's end."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import anyio
import structlog
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from fidelora.adapters.tensor_names import noise_of_file
from fidelora.api import LoraItem
from fidelora.errors import RequestCanceledError, RequestFailedError, ServerStoppingError
from fidelora.jobs.job import Job, Status, new_job
from fidelora.jobs.store import Submission
from fidelora.recipe import AdapterRef, Noise, Recipe
from fidelora.server.context import ServerContext

LOOK_EVERY_S = 0.2
"""How often a store is asked for what is new."""

Recipes = Callable[[Sequence[AdapterRef], Mapping[str, Any]], tuple[Recipe, ...]]
"""Makes the recipes of a request from its adapters, in order, and the recipe fields that the server decides."""


def utc_now() -> datetime:
    """The time of what happens to a job."""
    return datetime.now(UTC)


def draw_seed() -> int:
    """A seed for who leaves it to the server; it is told in the answer and in the image."""
    return secrets.randbelow(2**32)


async def submit(
    context: ServerContext,
    model: str,
    loras: Sequence[LoraItem],
    recipes: Recipes,
    *,
    hub_token: str | None = None,
    image_format: str = "png",
    image_quality: int | None = None,
    submission: Submission | None = None,
) -> Job:
    """Find the LoRAs, and put a job for the recipes into the queue; it is on disk when this returns.

    Raises:
        ServerStoppingError, QueueFullError: it is not taken.
        AdapterError, WeightsFileError: a LoRA cannot be found or used.
        what `recipes` raises.
    """
    context.refuse_if_stopping()
    adapters = [
        await context.sources.resolve(lora.path, sha256=lora.sha256, hub_token=hub_token)
        for lora in loras
    ]

    def make() -> Job:
        return enqueue(
            context,
            recipes(adapters, defaults_for(context, model, adapters)),
            image_format,
            image_quality,
            submission,
        )

    job = await run_in_threadpool(make)
    structlog.contextvars.bind_contextvars(request_id=job.id)  # in what is logged of this call
    return job


def enqueue(
    context: ServerContext,
    recipes: tuple[Recipe, ...],
    image_format: str = "png",
    image_quality: int | None = None,
    submission: Submission | None = None,
) -> Job:
    """Put a job for these recipes into the queue, or find the one that the same submission made before.

    Raises:
        QueueFullError: it is not taken.
    """
    job = new_job(recipes, utc_now(), image_format=image_format, image_quality=image_quality)
    stored = context.store.add(job, submission=submission, capacity=context.settings.queue_size)
    if context.pool is not None:
        context.pool.wake()
    return stored


def submission_of(owner: str, key: str, content: bytes) -> Submission:
    """What a client asked for under an idempotency key. Keys of different clients are different keys."""
    return Submission(_sha256(f"{owner}\0{key}".encode()), _sha256(content))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def defaults_for(
    context: ServerContext, model: str, adapters: Sequence[AdapterRef]
) -> dict[str, Any]:
    """The recipe fields that the server decides for images with these adapters.

    As on the command line, the first adapter's file says which trainer, and so which noise, its previews were made with.
    """
    noise: Noise = _noise(context.cache.path(adapters[0].sha256)) if adapters else "modern"
    return {**context.server_defaults.get(model, {}), "noise": noise}


@lru_cache(maxsize=1000)
def _noise(path: Path) -> Noise:
    """`noise_of_file` of a file in the cache, whose name is its content."""
    return noise_of_file(path)


@asynccontextmanager
async def canceled_on_exit(job: Job, context: ServerContext) -> AsyncIterator[None]:
    """Whoever leaves the block, for whatever reason, wants the job no longer; one that has ended stays as it is."""
    try:
        yield
    finally:
        with anyio.CancelScope(
            shield=True
        ):  # the client that went away has canceled everything else here
            await run_in_threadpool(context.store.cancel, job.id, utc_now())


async def job_updates(job: Job, context: ServerContext, request: Request) -> AsyncIterator[Job]:
    """The job as it is now, again and again, the last time when it has ended.

    Raises:
        RequestCanceledError: the client of `request` went away.
        ServerStoppingError: the server is about to stop, and the job's turn did not come.
    """
    yield job
    while not job.status.final:
        if context.stopping.is_set() and job.status is Status.IN_QUEUE:
            raise ServerStoppingError
        if await request.is_disconnected():
            raise RequestCanceledError("The client went away before its images were made.")
        await asyncio.sleep(LOOK_EVERY_S)
        job = await run_in_threadpool(context.store.get, job.id)
        yield job


async def finished(job: Job, context: ServerContext, request: Request) -> Job:
    """The job once it has succeeded. If the client goes away, or the server stops before the job's turn, it is canceled.

    Raises:
        RequestFailedError, RequestCanceledError, ServerStoppingError: there are no images.
    """
    async with canceled_on_exit(job, context):
        async for now in job_updates(job, context, request):
            job = now
    return succeeded(job)


def succeeded(job: Job) -> Job:
    """The job, if it has images.

    Raises:
        RequestFailedError, RequestCanceledError: it has none.
    """
    if job.error is not None:
        raise RequestFailedError(job.error.message, code=job.error.code)
    if job.status is not Status.SUCCEEDED:
        raise RequestCanceledError(f"Request {job.id} was canceled.")
    return job
