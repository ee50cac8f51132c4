"""AUTOMATIC1111's API, for clients that speak it already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from starlette.concurrency import run_in_threadpool

import fidelora
from fidelora.api import LoraItem
from fidelora.api.a1111 import (
    A1111ErrorBody,
    A1111LoraBody,
    A1111ProgressBody,
    SamplerBody,
    SchedulerBody,
    SdModelBody,
    Txt2ImgBody,
    Txt2ImgPlan,
    Txt2ImgRequest,
    check_options,
    info_of,
    options_of,
    plan_txt2img,
    progress_of,
)
from fidelora.errors import JobNotFoundError, WeightsFileError
from fidelora.families import get_family
from fidelora.images.a1111_samplers import SCHEDULERS, sampler_names
from fidelora.images.read import read_parameters_text
from fidelora.jobs.job import Job, Status
from fidelora.loras.folder import adapter_named_in_prompt, adapter_path, names_in_prompts
from fidelora.safetensors_header import read_file_header
from fidelora.server.context import ContextDep, Owner, ServerContext
from fidelora.server.outputs import base64_of, content_of
from fidelora.server.submit import draw_seed, finished, submit, utc_now

_DESCRIPTIONS = {
    400: "Cannot be done as it is written",
    401: "No API key, or an unknown one; Basic authentication with the key as the password will do",
    409: "Somebody interrupted it",
    413: "Body too large",
    429: "The queue is full",
    500: "It failed",
    503: "Not now",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": A1111ErrorBody, "description": description}
    for status, description in _DESCRIPTIONS.items()
}

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=_ERRORS)


@router.post("/txt2img")
async def txt2img(
    body: Txt2ImgRequest, context: ContextDep, owner: Owner, request: Request
) -> Txt2ImgBody:
    """Ask for images, and wait for them. A client that goes away cancels its request."""
    meaning = plan_txt2img(body, _model(context), draw_seed())
    paths = [
        await run_in_threadpool(adapter_named_in_prompt, context.settings.loras, lora.name)
        for lora in meaning.loras
    ]
    loras = [LoraItem.model_validate({"path": path}) for path in paths]
    job = await submit(
        context, meaning.model, loras, meaning.recipes, image_format=meaning.image_format
    )
    with _waited_for(job, context, owner):
        job = await finished(job, context, request)
    return await run_in_threadpool(_answer, meaning, job)


def _answer(meaning: Txt2ImgPlan, job: Job) -> Txt2ImgBody:
    infotexts = [read_parameters_text(content_of(output)) for output in job.outputs]
    wanted = meaning.request.send_images is not False
    return Txt2ImgBody(
        images=[base64_of(output) for output in job.outputs] if wanted else [],
        parameters=meaning.request.model_dump(),
        info=info_of(meaning, job, infotexts, f"Fidelora {fidelora.__version__}"),
    )


@router.get("/progress")
def progress(
    context: ContextDep,
    owner: Owner,
    skip_current_image: Annotated[
        bool, Query(description="Without the rough picture of what is being made.")
    ] = False,
) -> A1111ProgressBody:
    """How far the oldest request is that was made here with the same API key and is waited for."""
    job = _oldest(context, owner)
    position = (
        context.store.queue_position(job.id) if job and job.status is Status.IN_QUEUE else None
    )
    return progress_of(job, position, with_image=not skip_current_image)


@router.post("/interrupt")
def interrupt(context: ContextDep, owner: Owner) -> dict[str, Any]:
    """Cancel the request that `progress` tells of; whoever waits for it gets an error, and no unfinished image."""
    if (job := _oldest(context, owner)) is not None:
        context.store.cancel(job.id, utc_now())
    return {}


@router.get("/options")
def options(context: ContextDep) -> dict[str, Any]:
    """The settings that mean something here. None of them can be changed but for one request."""
    return options_of(_model(context))


@router.post("/options")
def set_options(changes: Annotated[dict[str, Any], Body()], context: ContextDep) -> None:
    """Take settings that are what they are anyway, and refuse all others by name."""
    check_options(changes, _model(context))


@router.get("/samplers")
def samplers(context: ContextDep) -> list[SamplerBody]:
    """The samplers that can be asked for."""
    names = sampler_names(get_family(_model(context)))
    return [SamplerBody(name=name, aliases=aliases, options={}) for name, aliases in names.items()]


@router.get("/schedulers")
def schedulers() -> list[SchedulerBody]:
    """The schedulers that some sampler can be asked for with."""
    return [SchedulerBody(name=name.lower(), label=name) for name in SCHEDULERS]


@router.get("/sd-models")
def sd_models(context: ContextDep) -> list[SdModelBody]:
    """The model families, the one that is used by default first."""
    return [
        SdModelBody(
            title=model,
            model_name=model,
            filename=str(server_defaults.get("base_model") or get_family(model).base_model),
        )
        for model, server_defaults in context.server_defaults.items()
    ]


@router.get("/loras")
def a1111_loras(context: ContextDep) -> list[A1111LoraBody]:
    """The LoRAs that prompts can name."""
    return [
        _lora(name, path, context)
        for name, path in names_in_prompts(context.settings.loras).items()
    ]


@router.post("/refresh-loras")
def refresh_loras() -> None:
    """Nothing has to be done: the folder is looked at for each request."""


def _lora(name: str, path: str, context: ServerContext) -> A1111LoraBody:
    try:
        metadata = dict(read_file_header(adapter_path(context.settings.loras, path)).metadata)
    except WeightsFileError:
        metadata = {}  # whoever asks for it will hear why
    return A1111LoraBody(
        name=name, alias=metadata.get("ss_output_name") or name, path=path, metadata=metadata
    )


def _model(context: ServerContext) -> str:
    return next(iter(context.server_defaults))


@contextmanager
def _waited_for(job: Job, context: ServerContext, owner: str) -> Iterator[None]:
    """Let `progress` and `interrupt` know of the job, which are no concern of jobs that came in other ways."""
    context.waited_for[job.id] = owner
    try:
        yield
    finally:
        del context.waited_for[job.id]


def _oldest(context: ServerContext, owner: str) -> Job | None:
    """The oldest job of this owner that is waited for, a running one before one in the queue."""
    jobs = []
    for job_id, whose in list(context.waited_for.items()):
        if whose == owner:
            try:
                jobs.append(context.store.get(job_id))
            except JobNotFoundError:
                continue  # it ended, and was removed at once
    going = [job for job in jobs if not job.status.final]
    return min(going, key=lambda job: job.status is Status.IN_QUEUE, default=None)
