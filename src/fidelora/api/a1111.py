"""The bodies of AUTOMATIC1111's API, and what they mean here.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. Its clients send all fields of their settings, wanted or not. So
each is known here, and what cannot be done has to have the value that asks for nothing; anything else is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, Field

from fidelora.api.requests import MAX_LORAS, MAX_PROMPTS, RequestBody
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
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
    MIN_SIZE,
    AdapterRef,
    Recipe,
)

_LITERAL = "None"
"""The value of A1111's setting `emphasis` that means: brackets in prompts are characters, as they are in training."""
FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
"""What its setting `samples_format` calls our formats."""


class Txt2ImgRequest(RequestBody):
    """The body of `POST /sdapi/v1/txt2img`, with A1111's defaults. A prompt names LoRAs by `<lora:name:multiplier>`.

    The fields from `enable_hr` on are there because clients send them; each has to have a value that asks for nothing.
    """

    prompt: str | None = Field("", max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str | None = Field("", max_length=MAX_PROMPT_CHARACTERS)
    seed: int | None = Field(
        -1,
        ge=-1,
        le=MAX_SEED,
        description="Of the first image; the others count up. -1 is a random one.",
    )
    steps: int | None = Field(50, ge=1, le=MAX_STEPS)
    cfg_scale: float | None = Field(7.0, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    width: int | None = Field(512, ge=MIN_SIZE, le=MAX_SIZE)
    height: int | None = Field(512, ge=MIN_SIZE, le=MAX_SIZE)
    sampler_name: str | None = None
    sampler_index: str | None = Field(
        "Euler", description="The older name of sampler_name, which goes before it."
    )
    scheduler: str | None = None
    batch_size: int | None = Field(1, ge=1, le=MAX_PROMPTS)
    n_iter: int | None = Field(1, ge=1, le=MAX_PROMPTS)
    send_images: bool | None = True
    save_images: bool | None = Field(
        False, description="The server keeps images for a time in any case."
    )
    do_not_save_samples: bool | None = False
    do_not_save_grid: bool | None = False
    override_settings: dict[str, Any] | None = Field(
        None, description="sd_model_checkpoint, samples_format, emphasis."
    )
    override_settings_restore_afterwards: bool | None = True
    eta: float | None = Field(None, description="Only the sampler's own.")

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
        """How many are asked for."""
        return (self.batch_size or 1) * (self.n_iter or 1)


_ASKS_FOR_NOTHING: Mapping[str, tuple[object, ...]] = {
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
"""By field, the values besides null that change nothing. What is not here means something only together with one of these
(`hr_scale` with `enable_hr`, `subseed` with `subseed_strength`, ...), or is honoured."""
_ETA = {"euler_a": 1.0, "dpm_2_a": 1.0, "ddim": 0.0}
"""What `eta` is here, for the samplers that have one."""


def options_of(model: str) -> dict[str, Any]:
    """The settings of A1111 that mean something here, as they are."""
    return {
        "sd_model_checkpoint": model,
        "sd_vae": "Automatic",
        "samples_format": "png",
        "emphasis": _LITERAL,
        "CLIP_stop_at_last_layers": 1,
        "eta_noise_seed_delta": 0,
    }


def check_options(changes: Mapping[str, Any], model: str, *, for_one_request: bool = False) -> None:
    """See that each of these settings is what it is anyway, or can be chosen for one request.

    Raises:
        RequestError: one is not, and the message names it.
    """
    for name, value in changes.items():
        place = f"override_settings.{name}" if for_one_request else name
        if name in (now := options_of(model)) and value == now[name]:
            continue
        if for_one_request and name == "sd_model_checkpoint" and value in all_families():
            continue
        if for_one_request and name == "samples_format" and value in FORMATS:
            continue
        known = f"here it is {now[name]!r}" if name in now else f"the settings are {', '.join(now)}"
        raise _unsupported(place, f"cannot be {_shown(value)}: {known}")


@dataclass(frozen=True)
class Txt2ImgPlan:
    """What a request asks for, once all of it is known to be possible. `seed` is that of the first image."""

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
        """One recipe for each image, with seeds that count up, as A1111 counts.

        Args:
            adapters: what each of the LoRAs is, in order.
            base: the recipe fields that the server decides.

        Raises:
            RequestFieldError: a value that only the model's data can refuse.
        """
        asked = self.request
        refs = tuple(
            AdapterRef(ref.sha256, lora.multiplier, ref.name, ref.path)
            for ref, lora in zip(adapters, self.loras, strict=True)
        )
        try:
            first = Recipe(
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                model=self.model,
                width=_given(asked, "width"),
                height=_given(asked, "height"),
                steps=_given(asked, "steps"),
                guidance_scale=_given(asked, "cfg_scale"),
                seed=self.seed,
                sampler=self.sampler,
                adapters=refs,
                **base,
            )
            return tuple(replace(first, seed=first.seed + index) for index in range(asked.images))
        except RecipeError as error:
            raise RequestFieldError(
                str(error), place=(_FIELD_OF.get(error.field, error.field),)
            ) from error


_FIELD_OF = {"guidance_scale": "cfg_scale", "sampler": "sampler_name"}
"""What a field of a recipe is called here, where the names differ."""


def plan_txt2img(request: Txt2ImgRequest, model: str, random_seed: int) -> Txt2ImgPlan:
    """What the request means.

    Args:
        model: that is used if the request chooses none.
        random_seed: if it leaves that to the server.

    Raises:
        RequestError, RequestFieldError, PromptSyntaxError: something in it cannot be done here; the message names it.
    """
    if request.model_extra:
        raise _unsupported(
            next(iter(request.model_extra)), "is no field that is known here; leave it out"
        )
    for name, values in _ASKS_FOR_NOTHING.items():
        value = getattr(request, name)
        if value is not None and value not in values:
            neutral = " or ".join(json.dumps(one) for one in (None, *values))
            raise _unsupported(
                name, f"cannot be {_shown(value)} here; leave it out, or send {neutral}"
            )
    if request.images > MAX_PROMPTS:
        raise RequestFieldError(
            f"batch_size times n_iter is {request.images}; {MAX_PROMPTS} is the most.",
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
            str(error), place=(_FIELD_OF.get(error.field, error.field),)
        ) from error
    if request.eta is not None and request.eta != _ETA.get(sampler, request.eta):
        raise _unsupported(
            "eta", f"is {_ETA[sampler]:g} for {name}, and cannot be {request.eta:g}; leave it out"
        )
    prompt, loras = loras_in(request.prompt or "")
    if len(loras) > MAX_LORAS:
        raise PromptSyntaxError(f"The prompt names {len(loras)} LoRAs; {MAX_LORAS} are the most.")
    negative = request.negative_prompt or ""
    if settings.get("emphasis") != _LITERAL and (mark := marks_in(prompt) or marks_in(negative)):
        raise PromptSyntaxError(
            f"{mark}, and prompts are encoded here as they are written. Take it out, or send "
            'override_settings {"emphasis": "None"} to have it encoded as it is.'
        )
    seed = random_seed if request.seed is None or request.seed == -1 else request.seed
    if seed + request.images - 1 > MAX_SEED:
        raise RequestFieldError(
            f"The last image would have a seed beyond {MAX_SEED}.", place=("seed",)
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
    """The answer to `POST /sdapi/v1/txt2img`: images in base64, the request as it was understood, and JSON about the images."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def info_of(meaning: Txt2ImgPlan, job: Job, infotexts: Sequence[str], version: str) -> str:
    """What A1111 says of the images, as the JSON text that it writes."""
    asked, first = meaning.request, job.recipes[0]
    seeds = [recipe.seed for recipe in job.recipes]
    info = {
        "prompt": asked.prompt or "",
        "all_prompts": [asked.prompt or ""] * len(seeds),
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [first.negative_prompt] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(seeds),
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": asked.sampler_name or asked.sampler_index or "Euler",
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": asked.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": meaning.model,
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
    """The body of errors of these paths but 422, which has FastAPI's own shape, as A1111's has."""

    error: str
    detail: str
    body: str
    errors: str


class SamplerBody(BaseModel):
    """One entry of `GET /sdapi/v1/samplers`; an alias is the name of this server's sampler."""

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
    """One entry of `GET /sdapi/v1/sd-models`: a model family, which `override_settings` can choose by its title."""

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class A1111LoraBody(BaseModel):
    """One entry of `GET /sdapi/v1/loras`; `name` is what prompts call it."""

    name: str
    alias: str
    path: str
    metadata: dict[str, str]


class StateBody(BaseModel):
    """What A1111 would do at this moment."""

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
    """The answer to `GET /sdapi/v1/progress`: of the oldest request that was made with the same API key and is waited for."""

    progress: float
    eta_relative: float
    state: StateBody
    current_image: str | None = None
    textinfo: str | None = None


def progress_of(
    job: Job | None, queue_position: int | None, *, with_image: bool
) -> A1111ProgressBody:
    """How far a job is; without one there is nothing to do."""
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
        textinfo=f"{queue_position} requests are before this one" if waits else None,
    )


def _given(request: Txt2ImgRequest, name: str) -> Any:
    """A field's value, or its default if it is null."""
    value = getattr(request, name)
    return Txt2ImgRequest.model_fields[name].default if value is None else value


def _timestamp(job: Job) -> str:
    return job.created_at.strftime("%Y%m%d%H%M%S")


def _unsupported(name: str, why: str) -> RequestError:
    return RequestError(f"{name} {why}.", code="FIELD_NOT_SUPPORTED", details={"field": name})


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
