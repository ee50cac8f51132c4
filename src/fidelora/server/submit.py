"""Queue jobs for requests, and wait for them in routes that respond with images.

A route checks its request and looks up an idempotency key. Then it resolves the LoRAs with
`resolve_adapters`, builds recipes with the fields of `defaults_for`, and queues a job with
`enqueue`. For an `InferenceRequest`, `submit` resolves, builds and queues in one call.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
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
from fidelora.api import InferenceRequest, LoraItem, notes_on, output_format_of, recipes_of
from fidelora.api.requests import DeviceKind
from fidelora.errors import RequestCanceledError, RequestFailedError
from fidelora.families import get_family
from fidelora.jobs.job import Job, Status, new_job
from fidelora.jobs.store import Submission
from fidelora.recipe import AdapterRef, Noise, Recipe
from fidelora.server.access import Caller
from fidelora.server.context import ServerContext
from fidelora.texts import listed

_DISCONNECT_INTERVAL_S = 0.5
"""Seconds between two checks whether a client that waits for its images has disconnected."""


def utc_now() -> datetime:
    """Return the current time in UTC, the time zone of the job store."""
    return datetime.now(UTC)


def draw_seed() -> int:
    """Return a random seed, for requests that leave the seed to the server."""
    return secrets.randbelow(2**32)


async def submit(
    context: ServerContext,
    caller: Caller,
    request: InferenceRequest,
    *,
    image_quality: int | None = None,
    submission: Submission | None = None,
) -> Job:
    """Queue a job for a request that has passed `check_request`.

    Args:
        image_quality: quality of JPEG and WebP files, from 0 to 100; None for the default.
        submission: idempotency key and hash of the request.

    Raises:
        ServerStoppingError, ServerNotReadyError: the server accepts no new requests.
        QueueFullError: the queue is full.
        AdapterError, WeightsFileError: a LoRA was not found or cannot be used.
        RequestFieldError: the model does not support a value of the request, such as the sampler.
    """
    hub_token = request.hf_token.get_secret_value() if request.hf_token else None
    adapters = await resolve_adapters(context, caller, request.loras, hub_token)
    recipes = await run_in_threadpool(build_recipes, context, request, adapters)
    notes = await run_in_threadpool(notes_on, request, adapters, recipes)
    image_format = output_format_of(request.output_format, recipes)
    return await enqueue(
        context, caller, recipes, image_format, image_quality, submission, notes, request.device
    )


async def resolve_adapters(
    context: ServerContext,
    caller: Caller,
    loras: Sequence[LoraItem],
    hub_token: str | None = None,
) -> list[AdapterRef]:
    """Load a request's LoRAs into the adapter cache and return references to them, in order.

    Raises:
        ServerStoppingError, ServerNotReadyError: the server accepts no new requests; nothing was
            fetched.
        AdapterError, WeightsFileError: a LoRA was not found or cannot be used.
    """
    context.refuse_if_unavailable()
    found: dict[tuple[str, str | None], AdapterRef] = {}
    for lora in loras:
        key = (lora.path, lora.sha256)
        if key not in found:  # a request can name one LoRA many times
            found[key] = await context.resolver.resolve(
                lora.path, sha256=lora.sha256, hub_token=hub_token, owner=caller.visible_owner
            )
    return [found[lora.path, lora.sha256] for lora in loras]


def build_recipes(
    context: ServerContext, request: InferenceRequest, adapters: Sequence[AdapterRef]
) -> tuple[Recipe, ...]:
    """Return one recipe per prompt of the request.

    Raises:
        RequestFieldError: the model does not support a value of the request, such as the sampler.
    """
    return recipes_of(
        request,
        adapters,
        defaults_for(context, request.model, adapters),
        draw_seed=draw_seed,
    )


async def enqueue(
    context: ServerContext,
    caller: Caller,
    recipes: tuple[Recipe, ...],
    image_format: str = "png",
    image_quality: int | None = None,
    submission: Submission | None = None,
    notes: tuple[str, ...] = (),
    device: DeviceKind | None = None,
) -> Job:
    """Store and return a job for these recipes, or return the earlier job of the same submission.

    The job is stored on disk before this function returns. Its id is added to the log lines of the
    current HTTP request.

    Args:
        notes: sentences for the client about values that the server chose.
        device: kind of device that makes the images; None for any.

    Raises:
        RequestError: an image is too large, or the images take too long.
        StorageError: the object store cannot be used.
        QueueFullError: the queue is full.
        IdempotencyConflictError: the idempotency key was used for another request.
    """
    context.limits.check(recipes)
    if device is not None:
        notes += await run_in_threadpool(_notes_on_device, context, device)
    job = new_job(
        recipes,
        utc_now(),
        image_format=image_format,
        image_quality=image_quality,
        notes=notes,
        owner=caller.owner,
        device_kind=device or "",
    )
    stored = await run_in_threadpool(_store, context, job, submission)
    structlog.contextvars.bind_contextvars(request_id=stored.id)
    return stored


def _notes_on_device(context: ServerContext, device: DeviceKind) -> tuple[str, ...]:
    """Return a sentence if no live worker has a device of this kind."""
    kinds = {worker.device.partition(":")[0] for worker in context.store.workers()}
    if not kinds or device in kinds:
        return ()
    return (
        f"No worker has a device of the kind {device} at the moment "
        f"(only {listed(sorted(kinds))}), so the request waits for one.",
    )


def _store(context: ServerContext, job: Job, submission: Submission | None) -> Job:
    for sha256 in job.adapters:
        context.cache.publish(sha256)
    return context.store.add(job, submission=submission, capacity=context.settings.queue_size)


def submission_of(caller: Caller, key: str, content: bytes) -> Submission:
    """Return the submission for an idempotency key, which is scoped to the caller's API key.

    Args:
        key: idempotency key.
        content: content of the request.
    """
    return Submission(_sha256(f"{caller.owner}\0{key}".encode()), _sha256(content))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def defaults_for(
    context: ServerContext, model: str, adapters: Sequence[AdapterRef]
) -> dict[str, Any]:
    """Return the recipe fields that the server sets for images with these adapters.

    As on the command line, the trainer version in the first adapter's file determines `noise`.
    """
    noise: Noise = "modern"
    if adapters and "noise" in get_family(model).uses:
        noise = _noise(context.cache.path(adapters[0].sha256))
    return {
        **context.server_defaults.get(model, {}),
        "base_sha256": context.base_models.sha256(model),
        "noise": noise,
    }


@lru_cache(maxsize=1000)
def _noise(path: Path) -> Noise:
    """Return `noise_of_file(path)`, cached because files in the adapter cache never change."""
    return noise_of_file(path)


@asynccontextmanager
async def cancel_on_exit(job: Job, context: ServerContext) -> AsyncIterator[None]:
    """Cancel the job when the block ends for any reason; a finished job stays unchanged."""
    try:
        yield
    finally:
        # The shield lets this call run although the task of a disconnected client is canceled.
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(context.store.cancel, job.id)


async def job_updates(job: Job, context: ServerContext, request: Request) -> AsyncIterator[Job]:
    """Yield the job immediately, and then repeatedly until it has ended.

    It is yielded after each change, and at least every `_DISCONNECT_INTERVAL_S` seconds.

    Raises:
        RequestCanceledError: the client of `request` disconnected.
        ServerStoppingError, ServerNotReadyError: the job is still queued, and the server is
            stopping or cannot make images.
    """
    yield job
    with context.watcher.watch() as watch:
        watch.add(job)
        while not job.status.final:
            if job.status is Status.IN_QUEUE:
                context.refuse_if_unavailable()
            if await request.is_disconnected():
                raise RequestCanceledError("The client disconnected before its images were made.")
            await watch.changed(_DISCONNECT_INTERVAL_S)
            job = watch.state(job.id).job
            yield job


async def wait_until_succeeded(job: Job, context: ServerContext, request: Request) -> Job:
    """Wait until the job has succeeded and return it with its images.

    The job is canceled if the client disconnects, or if the server stops or cannot make images
    while the job is queued.

    Raises:
        RequestFailedError, RequestCanceledError: the job failed or was canceled.
        ServerStoppingError, ServerNotReadyError: the job is still queued, and the server is
            stopping or cannot make images.
    """
    async with cancel_on_exit(job, context):
        async for update in job_updates(job, context, request):
            job = update
    return require_success(job)


def require_success(job: Job) -> Job:
    """Return the job if it has succeeded.

    Raises:
        RequestFailedError, RequestCanceledError: the job failed or was canceled.
    """
    if job.error is not None:
        raise RequestFailedError(job.error.message, code=job.error.code)
    if job.status is not Status.SUCCEEDED:
        raise RequestCanceledError(f"Request {job.id} was canceled.")
    return job
