"""Bodies of AUTOMATIC1111's API, and their conversion to recipes.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. Clients send every field, used or
not, so all fields are declared. An unsupported field must have a neutral value; any other value
is an error that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, Field

from fidelora.api.requests import MAX_LORAS, MAX_PROMPTS, RequestBody
from fidelora.checks import MAX_PROMPT_CHARACTERS
from fidelora.errors import (
    PromptSyntaxError,
    RecipeError,
    RequestError,
    RequestFieldError,
    UnknownSamplerError,
)
from fidelora.families import all_families
from fidelora.images.a1111_prompt import NamedLora, loras_in, marks_in
from fidelora.images.a1111_samplers import AUTOMATIC, sampler_of
from fidelora.jobs.job import Job, Status
from fidelora.recipe import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
    MIN_SIZE,
    AdapterRef,
    Recipe,
)

_NO_EMPHASIS = "None"
"""Value of A1111's setting `emphasis` that treats brackets in prompts as text, as in training."""
FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
"""Image formats by the names of A1111's setting `samples_format`."""


class Txt2ImgRequest(RequestBody):
    """Body of `POST /sdapi/v1/txt2img`, with A1111's defaults.

    Prompts select LoRAs by `<lora:name:multiplier>`. The fields from `enable_hr` on are not
    supported, and must have neutral values; they are declared because clients send them.
    """

    prompt: str | None = Field("", max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str | None = Field("", max_length=MAX_PROMPT_CHARACTERS)
    seed: int | None = Field(
        -1,
        ge=-1,
        le=MAX_SEED,
        description="Seed of the first image; each further image adds 1. -1 for a random seed.",
    )
    steps: int | None = Field(50, ge=1, le=MAX_STEPS)
    cfg_scale: float | None = Field(7.0, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    width: int | None = Field(512, ge=MIN_SIZE, le=MAX_SIZE)
    height: int | None = Field(512, ge=MIN_SIZE, le=MAX_SIZE)
    sampler_name: str | None = None
    sampler_index: str | None = Field(
        "Euler", description="Older name of sampler_name; ignored if sampler_name is set."
    )
    scheduler: str | None = None
    batch_size: int | None = Field(1, ge=1, le=MAX_PROMPTS)
    n_iter: int | None = Field(1, ge=1, le=MAX_PROMPTS)
    send_images: bool | None = True
    save_images: bool | None = Field(
        False, description="Has no effect: the server always keeps images for some time."
    )
    do_not_save_samples: bool | None = False
    do_not_save_grid: bool | None = False
    override_settings: dict[str, Any] | None = Field(
        None, description="Supported: sd_model_checkpoint, samples_format, emphasis."
    )
    override_settings_restore_afterwards: bool | None = True
    eta: float | None = Field(None, description="Only the sampler's default is supported.")

    enable_hr: bool | None = False
    denoising_strength: float | None = None
    hr_scale: float | None = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = 0
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = ""
    hr_negative_prompt: str | None = ""
    firstphase_width: int | None = 0
    firstphase_height: int | None = 0
    subseed: int | None = -1
    subseed_strength: float | None = 0
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    seed_enable_extras: bool | None = True
    styles: list[str] | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = False
    comments: dict[str, Any] | None = None
    script_name: str | None = None
    script_args: list[Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    force_task_id: str | None = None
    infotext: str | None = None

    @property
    def images(self) -> int:
        """Number of requested images."""
        return (self.batch_size or 1) * (self.n_iter or 1)


_NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "enable_hr": (False,),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "styles": ([],),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None"),
    "disable_extra_networks": (False,),
    "comments": ({},),
    "script_name": ("", "None"),
    "script_args": ([],),
    "alwayson_scripts": ({},),
    "force_task_id": (),
    "infotext": ("",),
}
"""Values of unsupported fields that have no effect, besides null. Fields that are not listed are
supported, or have an effect only together with a listed one: `hr_scale` with `enable_hr`, `subseed`
with `subseed_strength`, ..."""
_ETA = {"euler_a": 1.0, "dpm_2_a": 1.0, "ddim": 0.0}
"""Fixed `eta` of the samplers that have one."""


def options_of(model: str) -> dict[str, Any]:
    """Return the supported settings of A1111 with their fixed values."""
    return {
        "sd_model_checkpoint": model,
        "sd_vae": "Automatic",
        "samples_format": "png",
        "emphasis": _NO_EMPHASIS,
        "CLIP_stop_at_last_layers": 1,
        "eta_noise_seed_delta": 0,
    }


def check_options(changes: Mapping[str, Any], model: str, *, for_one_request: bool = False) -> None:
    """Check that each setting has its fixed value, or can be set for one request.

    Raises:
        RequestError: a setting cannot be changed; the message names it.
    """
    for name, value in changes.items():
        field_path = f"override_settings.{name}" if for_one_request else name
        if name in (fixed := options_of(model)) and value == fixed[name]:
            continue
        if for_one_request and name == "sd_model_checkpoint" and value in all_families():
            continue
        if for_one_request and name == "samples_format" and value in FORMATS:
            continue
        if name in fixed:
            raise _unsupported(
                field_path, f"cannot be {_shown(value)}: it is always {fixed[name]!r}"
            )
        settings = ", ".join(fixed)
        raise _unsupported(
            field_path, f"cannot be {_shown(value)}: the supported settings are {settings}"
        )


@dataclass(frozen=True)
class Txt2ImgPlan:
    """A txt2img request whose fields were checked. `seed` is the seed of the first image."""

    model: str
    prompt: str
    negative_prompt: str
    loras: tuple[NamedLora, ...]
    sampler: str
    image_format: str
    seed: int
    request: Txt2ImgRequest

    def recipes(
        self, adapters: Sequence[AdapterRef], base: Mapping[str, Any]
    ) -> tuple[Recipe, ...]:
        """Return one recipe for each image; the seed increases by 1 per image, as in A1111.

        Args:
            adapters: the adapters of the LoRAs, in order.
            base: the recipe fields that the server sets.

        Raises:
            RequestFieldError: the model does not support a value.
        """
        request = self.request
        refs = tuple(
            replace(ref, multiplier=lora.multiplier)
            for ref, lora in zip(adapters, self.loras, strict=True)
        )
        try:
            first = Recipe(
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                model=self.model,
                width=_value_or_default(request, "width"),
                height=_value_or_default(request, "height"),
                steps=_value_or_default(request, "steps"),
                guidance_scale=_value_or_default(request, "cfg_scale"),
                seed=self.seed,
                sampler=self.sampler,
                adapters=refs,
                **base,
            )
            return tuple(replace(first, seed=first.seed + index) for index in range(request.images))
        except RecipeError as error:
            raise RequestFieldError(
                str(error), place=(_REQUEST_FIELDS.get(error.field, error.field),)
            ) from error


_REQUEST_FIELDS = {"guidance_scale": "cfg_scale", "sampler": "sampler_name"}
"""Names of recipe fields in this API, where they differ."""


def plan_txt2img(request: Txt2ImgRequest, model: str, random_seed: int) -> Txt2ImgPlan:
    """Check a request and resolve its settings, LoRAs, sampler and seed.

    Args:
        model: the model of requests that do not choose one.
        random_seed: the seed of requests that do not set one.

    Raises:
        RequestError, RequestFieldError, PromptSyntaxError: a field or a part of the prompt is not
            supported; the message names it.
    """
    if request.model_extra:
        raise _unsupported(
            next(iter(request.model_extra)), "is not a field of txt2img; leave it out"
        )
    for name, values in _NEUTRAL_VALUES.items():
        value = getattr(request, name)
        if value is not None and value not in values:
            neutral = " or ".join(json.dumps(each) for each in (None, *values))
            raise _unsupported(name, f"cannot be {_shown(value)}; leave it out, or send {neutral}")
    if request.images > MAX_PROMPTS:
        raise RequestFieldError(
            f"batch_size times n_iter is {request.images}; the maximum is {MAX_PROMPTS}.",
            place=("n_iter",),
        )
    settings = request.override_settings or {}
    check_options(settings, model, for_one_request=True)
    model = settings.get("sd_model_checkpoint", model)
    name, scheduler = (
        request.sampler_name or request.sampler_index or "Euler",
        request.scheduler or AUTOMATIC,
    )
    try:
        sampler = sampler_of(name, scheduler, all_families()[model])
    except UnknownSamplerError as error:
        raise RequestFieldError(
            str(error), place=(_REQUEST_FIELDS.get(error.field, error.field),)
        ) from error
    if request.eta is not None and request.eta != _ETA.get(sampler, request.eta):
        raise _unsupported(
            "eta", f"is {_ETA[sampler]:g} for {name}, and cannot be {request.eta:g}; leave it out"
        )
    prompt, loras = loras_in(request.prompt or "")
    if len(loras) > MAX_LORAS:
        raise PromptSyntaxError(f"The prompt names {len(loras)} LoRAs; the maximum is {MAX_LORAS}.")
    negative = request.negative_prompt or ""
    if settings.get("emphasis") != _NO_EMPHASIS and (
        mark := marks_in(prompt) or marks_in(negative)
    ):
        raise PromptSyntaxError(
            f"{mark}, and emphasis in prompts is not supported. Remove it, or send "
            'override_settings {"emphasis": "None"} to encode it as plain text.'
        )
    seed = random_seed if request.seed is None or request.seed == -1 else request.seed
    if seed + request.images - 1 > MAX_SEED:
        raise RequestFieldError(
            f"The last image's seed would exceed {MAX_SEED}; choose a smaller seed.",
            place=("seed",),
        )
    return Txt2ImgPlan(
        model=model,
        prompt=prompt,
        negative_prompt=negative,
        loras=loras,
        sampler=sampler,
        image_format=FORMATS[settings.get("samples_format", "png")],
        seed=seed,
        request=request,
    )


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
    }
    return json.dumps(info)


class A1111ErrorBody(BaseModel):
    """Error body of A1111's paths, except for 422, which has FastAPI's shape as in A1111."""

    error: str
    detail: str
    body: str
    errors: str


class SamplerBody(BaseModel):
    """One entry of `GET /sdapi/v1/samplers`; its alias is the sampler's name in this server."""

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

    It describes the oldest request with the same API key whose client is still waiting.
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


def _value_or_default(request: Txt2ImgRequest, name: str) -> Any:
    value = getattr(request, name)
    return Txt2ImgRequest.model_fields[name].default if value is None else value


def _timestamp(job: Job) -> str:
    return job.created_at.strftime("%Y%m%d%H%M%S")


def _unsupported(name: str, why: str) -> RequestError:
    return RequestError(f"{name} {why}.", code="FIELD_NOT_SUPPORTED", details={"field": name})


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
