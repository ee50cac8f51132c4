"""Response bodies of AUTOMATIC1111's API."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from fidelora.api.a1111 import Txt2ImgPlan
from fidelora.errors import ImageRecordError, RequestFieldError
from fidelora.images.read import read_parameters_text
from fidelora.jobs.job import Job, Status


class Txt2ImgBody(BaseModel):
    """Response of `POST /sdapi/v1/txt2img`: images in base64, the request, and `info` as JSON."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def info_of(plan: Txt2ImgPlan, job: Job, infotexts: Sequence[str], version: str) -> str:
    """Return A1111's description of the images, as JSON text."""
    request, first = plan.request, job.recipes[0]
    seeds = [recipe.seed for recipe in job.recipes]
    info = {
        "prompt": request.prompt or "",
        "all_prompts": [request.prompt or ""] * len(seeds),
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [first.negative_prompt] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(seeds),
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": request.sampler_name or request.sampler_index or "Euler",
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": request.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": plan.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": list(infotexts),
        "styles": [],
        "job_timestamp": _timestamp(job),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": version,
        "request_id": job.id,
        "ignored_fields": list(plan.ignored),
    }
    return json.dumps(info)


class A1111ErrorBody(BaseModel):
    """Error body of A1111's paths, except for 422, which has FastAPI's shape as in A1111."""

    error: str
    detail: str
    body: str
    errors: str


class SamplerBody(BaseModel):
    """One entry of `GET /sdapi/v1/samplers`; the aliases are other names that it accepts."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class SchedulerBody(BaseModel):
    """One entry of `GET /sdapi/v1/schedulers`."""

    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1.0
    need_inner_model: bool = False


class SdModelBody(BaseModel):
    """One entry of `GET /sdapi/v1/sd-models`: a model family.

    `override_settings` selects it by its title.
    """

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class A1111LoraBody(BaseModel):
    """One entry of `GET /sdapi/v1/loras`; prompts refer to it by `name`."""

    name: str
    alias: str
    path: str
    metadata: dict[str, str]


class StateBody(BaseModel):
    """Current activity, in A1111's terms."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class A1111ProgressBody(BaseModel):
    """Response of `GET /sdapi/v1/progress`.

    It describes the API key's oldest running request whose client is still waiting, or else the
    oldest queued one.
    """

    progress: float
    eta_relative: float
    state: StateBody
    current_image: str | None = None
    textinfo: str | None = None


def progress_of(
    job: Job | None, queue_position: int | None, *, with_image: bool
) -> A1111ProgressBody:
    """Return the progress of a job, or that of an idle server."""
    if job is None:
        return A1111ProgressBody(progress=0, eta_relative=0, state=StateBody())
    progress = job.progress
    state = StateBody(
        interrupted=job.cancel_requested,
        job="txt2img",
        job_count=len(job.recipes),
        job_timestamp=_timestamp(job),
        job_no=progress.image if progress else 0,
        sampling_step=progress.step if progress else 0,
        sampling_steps=progress.steps if progress else job.recipes[0].steps,
    )
    waits = job.status is Status.IN_QUEUE and queue_position is not None
    return A1111ProgressBody(
        progress=progress.fraction if progress else 0,
        eta_relative=(progress.eta_s or 0) if progress else 0,
        state=state,
        current_image=(progress.preview or None) if progress and with_image else None,
        textinfo=f"{queue_position} requests are ahead of this one" if waits else None,
    )


def _timestamp(job: Job) -> str:
    return job.created_at.strftime("%Y%m%d%H%M%S")


class UpscalerBody(BaseModel):
    """One entry of `GET /sdapi/v1/upscalers`."""

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float | None = None


class EmbeddingsBody(BaseModel):
    """Response of `GET /sdapi/v1/embeddings`."""

    loaded: dict[str, Any] = Field(default_factory=dict)
    skipped: dict[str, Any] = Field(default_factory=dict)


class ScriptsBody(BaseModel):
    """Response of `GET /sdapi/v1/scripts`."""

    txt2img: list[str] = Field(default_factory=list)
    img2img: list[str] = Field(default_factory=list)


class PngInfoRequest(BaseModel):
    """Body of `POST /sdapi/v1/png-info`: an image in base64, with or without a `data:` prefix."""

    image: str


class PngInfoBody(BaseModel):
    """Generation parameters of an image as text, in `info` and again in `items`."""

    info: str
    items: dict[str, str]
    parameters: dict[str, Any] = Field(default_factory=dict)


def png_info_of(request: PngInfoRequest) -> PngInfoBody:
    """Return the parameters text of an image.

    Raises:
        RequestFieldError: it is not base64, or not an image.
    """
    encoded = request.image
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        text = read_parameters_text(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError, ImageRecordError) as error:
        raise RequestFieldError(
            "image is not a PNG, JPEG or WebP image in base64.", loc=("image",)
        ) from error
    return PngInfoBody(info=text, items={"parameters": text} if text else {})
