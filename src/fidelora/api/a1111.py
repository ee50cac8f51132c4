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

from pydantic import Field

from fidelora.api.a1111_options import (
    FORMATS,
    check_options,
    is_neutral,
    options_of,
    shown,
    unsupported,
)
from fidelora.api.requests import MAX_LORAS, MAX_PROMPTS, RequestBody
from fidelora.checks import MAX_PROMPT_CHARACTERS
from fidelora.errors import (
    PromptSyntaxError,
    RecipeError,
    RequestFieldError,
    UnknownSamplerError,
)
from fidelora.families import all_families
from fidelora.families.emphasis import Emphasis
from fidelora.images.a1111_prompt import (
    EMPHASIS,
    NamedLora,
    describe_syntax,
    loras_in,
    unescaped,
)
from fidelora.images.a1111_samplers import AUTOMATIC, SamplerChoice, sampler_of
from fidelora.recipe import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
    MIN_SIZE,
    AdapterRef,
    Recipe,
)


class Txt2ImgRequest(RequestBody):
    """Body of `POST /sdapi/v1/txt2img`, with A1111's defaults.

    Prompts select LoRAs by `<lora:name:multiplier>`. The fields from `enable_hr` on are not
    supported. They are declared because clients send them, and values that would change the image
    are refused.
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
    eta: float | None = Field(
        None,
        description="0..1 for DDIM and tcd, only 1 for Euler a and DPM2 a; without effect for "
        "other samplers.",
        allow_inf_nan=False,
    )

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
"""Values without effect, by unsupported field; null has no effect either. Fields that are not
listed are supported, or have an effect only together with a listed one: `hr_scale` with
`enable_hr`, `subseed` with `subseed_strength`, ..."""
_NEUTRAL_EXTRAS: Mapping[str, tuple[object, ...]] = {"clip_skip": (0, 1)}
"""Values without effect, by unsupported field that only some clients send."""
_IGNORED_EXTRAS = frozenset(
    {
        "url", "auth",  # address and credentials of the server, from SillyTavern
        "save_image", "firstpass_image", "hr_additional_modules", "hr_cfg", "hr_distilled_cfg",
        "distilled_cfg_scale",
    }
)  # fmt: skip
"""Fields that some clients send and that are ignored, whatever their value: the client's own
records, settings of `enable_hr`, which is not supported, and settings of models with distilled
guidance."""
_FIXED_ETA = {"euler_a": 1.0, "dpm_2_a": 1.0}
"""`eta` of the samplers for which it is fixed; other values are not supported."""


@dataclass(frozen=True)
class Txt2ImgPlan:
    """A txt2img request whose fields were checked.

    Attributes:
        eta: eta of the recipes; None if the sampler has none that can be set.
        seed: seed of the first image.
        ignored: names of fields in the request that A1111 does not have; they have no effect.
    """

    model: str
    prompt: str
    negative_prompt: str
    loras: tuple[NamedLora, ...]
    sampler: SamplerChoice
    eta: float | None
    image_format: str
    seed: int
    request: Txt2ImgRequest
    emphasis: Emphasis = "none"
    ignored: tuple[str, ...] = ()

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
                sampler=self.sampler.sampler,
                timestep_spacing=self.sampler.timestep_spacing,
                eta=self.eta,
                emphasis=self.emphasis,
                adapters=refs,
                **base,
            )
            return tuple(replace(first, seed=first.seed + index) for index in range(request.images))
        except RecipeError as error:
            raise RequestFieldError(
                str(error), loc=(_REQUEST_FIELDS.get(error.field, error.field),)
            ) from error


_REQUEST_FIELDS = {
    "guidance_scale": "cfg_scale",
    "sampler": "sampler_name",
    "timestep_spacing": "scheduler",
}
"""Names of recipe fields in this API, where they differ."""


def plan_txt2img(
    request: Txt2ImgRequest, model: str, random_seed: int, emphasis: Emphasis = "none"
) -> Txt2ImgPlan:
    """Check a request and resolve its settings, LoRAs, sampler and seed.

    Args:
        model: the model of requests that do not choose one.
        random_seed: the seed of requests that do not set one.
        emphasis: emphasis for requests that do not set it.

    Raises:
        RequestError, RequestFieldError, PromptSyntaxError: a field or a part of the prompt is not
            supported; the message names it.
    """
    extras = request.model_extra or {}
    _check_unsupported(request, extras)
    if request.images > MAX_PROMPTS:
        raise RequestFieldError(
            f"batch_size times n_iter is {request.images}; the maximum is {MAX_PROMPTS}.",
            loc=("n_iter",),
        )
    settings = request.override_settings or {}
    check_options(settings, options_of(model, emphasis), for_one_request=True)
    # Accepted values of other types, such as an empty list, have no effect.
    settings = {name: value for name, value in settings.items() if isinstance(value, str)}
    model = settings.get("sd_model_checkpoint") or model
    name, scheduler = (
        request.sampler_name or request.sampler_index or "Euler",
        request.scheduler or AUTOMATIC,
    )
    try:
        sampler = sampler_of(name, scheduler, all_families()[model])
    except UnknownSamplerError as error:
        raise RequestFieldError(
            str(error), loc=(_REQUEST_FIELDS.get(error.field, error.field),)
        ) from error
    if request.eta is not None and request.eta != _FIXED_ETA.get(sampler.sampler, request.eta):
        raise unsupported(
            "eta",
            f"must be {_FIXED_ETA[sampler.sampler]:g} for {name}, not {request.eta:g}; leave "
            "it out",
        )
    has_eta = all_families()[model].samplers[sampler.sampler].eta is not None
    prompt, loras = loras_in(request.prompt or "")
    if len(loras) > MAX_LORAS:
        raise PromptSyntaxError(f"The prompt names {len(loras)} LoRAs; the maximum is {MAX_LORAS}.")
    negative = request.negative_prompt or ""
    if settings.get("emphasis") is not None:
        emphasis = EMPHASIS[settings["emphasis"]]
    elif emphasis == "none":
        if mark := describe_syntax(prompt) or describe_syntax(negative):
            raise PromptSyntaxError(
                f"{mark} in A1111, but not by default here. Send override_settings "
                '{"emphasis": "Original"} to weight words as A1111 does, or {"emphasis": "None"} '
                "to encode the prompt as plain text."
            )
        prompt, negative = unescaped(prompt), unescaped(negative)
    seed = random_seed if request.seed is None or request.seed == -1 else request.seed
    if seed + request.images - 1 > MAX_SEED:
        raise RequestFieldError(
            f"The last image's seed would exceed {MAX_SEED}; choose a smaller seed.",
            loc=("seed",),
        )
    return Txt2ImgPlan(
        model=model,
        prompt=prompt,
        negative_prompt=negative,
        loras=loras,
        sampler=sampler,
        eta=request.eta if has_eta else None,
        image_format=FORMATS[settings.get("samples_format") or "png"],
        seed=seed,
        request=request,
        emphasis=emphasis,
        ignored=tuple(extras),
    )


def _check_unsupported(request: Txt2ImgRequest, extras: Mapping[str, Any]) -> None:
    """Check that unsupported and unknown fields have neutral values.

    Args:
        extras: fields that A1111 does not have.

    Raises:
        RequestError: a field has another value.
    """
    for name, value in extras.items():
        neutral_values = (*_NEUTRAL_EXTRAS.get(name, ()), "", [], {})
        if name in _IGNORED_EXTRAS or value is False or is_neutral(value, neutral_values):
            continue
        if name in _NEUTRAL_EXTRAS:
            neutral = " or ".join(json.dumps(each) for each in _NEUTRAL_EXTRAS[name])
            raise unsupported(name, f"cannot be {shown(value)}; leave it out, or send {neutral}")
        raise unsupported(name, "is not a field of txt2img; leave it out")
    for name, values in _NEUTRAL_VALUES.items():
        value = getattr(request, name)
        if name == "styles" and value:
            value = [style for style in value if style != "None"]  # A1111's name of no style
        if not is_neutral(value, values):
            neutral = " or ".join(json.dumps(each) for each in (None, *values))
            raise unsupported(name, f"cannot be {shown(value)}; leave it out, or send {neutral}")


def _value_or_default(request: Txt2ImgRequest, name: str) -> Any:
    value = getattr(request, name)
    return Txt2ImgRequest.model_fields[name].default if value is None else value
