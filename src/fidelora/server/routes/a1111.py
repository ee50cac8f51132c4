"""Endpoints of AUTOMATIC1111's API, for its existing clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Body, Query, Request
from starlette.concurrency import run_in_threadpool

import fidelora
from fidelora.api import LoraItem
from fidelora.api.a1111 import (
    Txt2ImgPlan,
    Txt2ImgRequest,
    plan_txt2img,
)
from fidelora.api.a1111_options import check_options, options_of
from fidelora.api.a1111_responses import (
    A1111ErrorBody,
    A1111LoraBody,
    A1111ProgressBody,
    EmbeddingsBody,
    PngInfoBody,
    PngInfoRequest,
    SamplerBody,
    SchedulerBody,
    ScriptsBody,
    SdModelBody,
    Txt2ImgBody,
    UpscalerBody,
    info_of,
    png_info_of,
    progress_of,
)
from fidelora.errors import JobNotFoundError, WeightsFileError
from fidelora.families import all_families, get_family
from fidelora.images.a1111_samplers import SCHEDULERS, sampler_names
from fidelora.images.read import read_parameters_text
from fidelora.jobs.job import Job, Status
from fidelora.loras.folder import adapter_named_in_prompt, adapter_path, names_in_prompts
from fidelora.recipe import AdapterRef, Recipe, short_name
from fidelora.safetensors_header import read_file_header
from fidelora.server.access import Caller
from fidelora.server.context import CallerDep, ContextDep, ServerContext
from fidelora.server.outputs import base64_of, content_of
from fidelora.server.submit import (
    cancel_on_exit,
    defaults_for,
    draw_seed,
    enqueue,
    job_updates,
    require_success,
    resolve_adapters,
)
from fidelora.storage.images import ImageStore

_DESCRIPTIONS = {
    400: "The request is not supported or not valid",
    401: "API key missing or unknown; Basic authentication with the key as the password works too",
    403: "Not allowed from another machine",
    409: "The request was interrupted",
    413: "Body too large",
    429: "The queue is full",
    500: "The request failed",
    503: "Temporarily unavailable",
    507: "The disk is full",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": A1111ErrorBody, "description": description}
    for status, description in _DESCRIPTIONS.items()
}

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=_ERRORS)


@router.post("/txt2img")
async def txt2img(
    body: Txt2ImgRequest, context: ContextDep, caller: CallerDep, request: Request
) -> Txt2ImgBody:
    """Generate images and return them. If the client disconnects, its request is canceled."""
    model = await run_in_threadpool(_model_of, caller, context)
    plan = plan_txt2img(body, model, draw_seed(), context.settings.emphasis)
    paths = [
        await run_in_threadpool(
            adapter_named_in_prompt,
            context.settings.loras,
            lora.name,
            context.cache.sha256_of,
            owner=caller.key_id,
        )
        for lora in plan.loras
    ]
    loras = [LoraItem.model_validate({"path": path}) for path in paths]
    adapters = await resolve_adapters(context, caller, loras)
    recipes = await run_in_threadpool(_build_recipes, context, plan, adapters)
    job = await enqueue(context, caller, recipes, plan.image_format)
    async with cancel_on_exit(job, context), _registered(job, context, caller):
        async for update in job_updates(job, context, request):
            job = update
    return await run_in_threadpool(_txt2img_body, context.images, plan, require_success(job))


def _build_recipes(
    context: ServerContext, plan: Txt2ImgPlan, adapters: Sequence[AdapterRef]
) -> tuple[Recipe, ...]:
    return plan.recipes(adapters, defaults_for(context, plan.model, adapters))


def _txt2img_body(images: ImageStore, plan: Txt2ImgPlan, job: Job) -> Txt2ImgBody:
    infotexts = [read_parameters_text(content_of(images, output)) for output in job.outputs]
    send_images = plan.request.send_images is not False
    return Txt2ImgBody(
        images=[base64_of(images, output) for output in job.outputs] if send_images else [],
        parameters=plan.request.model_dump(exclude=set(plan.ignored)),
        info=info_of(plan, job, infotexts, f"Fidelora {fidelora.__version__}"),
    )


@router.get("/progress")
def progress(
    context: ContextDep,
    caller: CallerDep,
    skip_current_image: Annotated[
        bool, Query(description="Omit the preview of the image in progress.")
    ] = False,
) -> A1111ProgressBody:
    """Return the progress of the API key's running `txt2img` request, or of the oldest queued."""
    job = _current_job(context, caller)
    position = (
        context.store.queue_position(job.id) if job and job.status is Status.IN_QUEUE else None
    )
    return progress_of(job, position, with_image=not skip_current_image)


@router.post("/interrupt")
def interrupt(context: ContextDep, caller: CallerDep) -> dict[str, Any]:
    """Cancel the request that `progress` reports; its client receives an error and no image."""
    if (job := _current_job(context, caller)) is not None:
        context.store.cancel(job.id)
    return {}


@router.get("/options")
def options(context: ContextDep, caller: CallerDep) -> dict[str, Any]:
    """Return the supported settings."""
    return options_of(_model_of(caller, context), context.settings.emphasis)


@router.post("/options")
def set_options(
    changes: Annotated[dict[str, Any], Body()], context: ContextDep, caller: CallerDep
) -> None:
    """Set `sd_model_checkpoint` for later requests with the same API key, until the server stops.

    Servers that share a database store the model there, until it is changed or the key is removed.
    Other settings are accepted only with values that change nothing.
    """
    check_options(changes, options(context, caller))
    if isinstance(model := changes.get("sd_model_checkpoint"), str):
        context.clients.a1111.set_model(caller.owner, model)


@router.get("/samplers")
def samplers(context: ContextDep, caller: CallerDep) -> list[SamplerBody]:
    """List the supported samplers."""
    names = sampler_names(get_family(_model_of(caller, context)))
    return [SamplerBody(name=name, aliases=aliases, options={}) for name, aliases in names.items()]


@router.get("/schedulers")
def schedulers() -> list[SchedulerBody]:
    """List the schedulers that at least one sampler supports."""
    return [
        SchedulerBody(name=label.lower().replace(" ", "_"), label=label) for label in SCHEDULERS
    ]


@router.get("/sd-models")
def sd_models(context: ContextDep) -> list[SdModelBody]:
    """List the models that the server was started with.

    `sd_model_checkpoint` in the options is the current one.
    """
    return [
        SdModelBody(
            title=model,
            model_name=model,
            filename=short_name(
                str(context.server_defaults[model].get("base_model", ""))
                or get_family(model).base_model
            ),
        )
        for model in context.configured_models
    ]


@router.get("/loras")
def a1111_loras(context: ContextDep, caller: CallerDep) -> list[A1111LoraBody]:
    """List the LoRAs that prompts can name."""
    return [
        _lora_body(name, path, context)
        for name, path in names_in_prompts(context.settings.loras, owner=caller.key_id).items()
    ]


@router.post("/refresh-loras")
def refresh_loras() -> None:
    """Do nothing, because the server reads the LoRA folder at each request."""


@router.get("/upscalers")
def upscalers() -> list[UpscalerBody]:
    """List the upscalers: only `None`, because images are not upscaled."""
    return [UpscalerBody(name="None")]


@router.get("/embeddings")
def embeddings() -> EmbeddingsBody:
    """List no embeddings, because prompts name them as LoRAs: `<lora:NAME:1>`."""
    return EmbeddingsBody()


@router.get("/scripts")
def scripts() -> ScriptsBody:
    """List the scripts: always an empty list, because scripts are not supported."""
    return ScriptsBody()


@router.get("/latent-upscale-modes", include_in_schema=False)
@router.get("/sd-vae", include_in_schema=False)
@router.get("/sd-modules", include_in_schema=False)
@router.get("/hypernetworks", include_in_schema=False)
@router.get("/face-restorers", include_in_schema=False)
@router.get("/realesrgan-models", include_in_schema=False)
@router.get("/prompt-styles", include_in_schema=False)
@router.get("/script-info", include_in_schema=False)
@router.get("/extensions", include_in_schema=False)
def nothing() -> list[dict[str, Any]]:
    """List nothing: this server has no entries of these kinds."""
    return []


@router.get("/cmd-flags")
def command_line_flags() -> dict[str, Any]:
    """Return an empty object, because this server does not have A1111's flags."""
    return {}


@router.post("/refresh-checkpoints", include_in_schema=False)
@router.post("/refresh-vae", include_in_schema=False)
@router.post("/refresh-embeddings", include_in_schema=False)
def refresh() -> None:
    """Do nothing: models are set when the server starts."""


@router.post("/skip")
def skip(context: ContextDep, caller: CallerDep) -> None:
    """Cancel the request that `progress` reports, as `interrupt` does."""
    interrupt(context, caller)


@router.post("/png-info")
def png_info(body: PngInfoRequest) -> PngInfoBody:
    """Return the generation parameters that are stored in an image; empty if it has none."""
    return png_info_of(body)


def _lora_body(name: str, path: str, context: ServerContext) -> A1111LoraBody:
    try:
        metadata = dict(read_file_header(adapter_path(context.settings.loras, path)).metadata)
    except WeightsFileError:
        metadata = {}  # a request for this LoRA reports the error
    return A1111LoraBody(
        name=name, alias=metadata.get("ss_output_name") or name, path=path, metadata=metadata
    )


def _model_of(caller: Caller, context: ServerContext) -> str:
    """Return the model of requests that do not choose one."""
    model = context.clients.a1111.model(caller.owner)
    # A newer version of the server may have set a model that this version does not support.
    return model if model and model in all_families() else context.default_model


@asynccontextmanager
async def _registered(job: Job, context: ServerContext, caller: Caller) -> AsyncIterator[None]:
    """Register the job for `progress` and `interrupt`, which ignore jobs of the other APIs."""
    await run_in_threadpool(context.clients.a1111.begin, job.id, caller.owner)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):  # see `cancel_on_exit`
            await run_in_threadpool(context.clients.a1111.end, job.id)


def _current_job(context: ServerContext, caller: Caller) -> Job | None:
    """Return the API key's oldest registered job, preferring a running one to a queued one."""
    jobs = []
    for job_id in context.clients.a1111.jobs(caller.owner):
        with suppress(JobNotFoundError):  # removed in the meantime
            jobs.append(context.store.get(job_id))
    unfinished = [job for job in jobs if not job.status.final]
    return min(unfinished, key=lambda job: job.status is Status.IN_QUEUE, default=None)
