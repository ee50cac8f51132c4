"""Conversion of request bodies to complete recipes, and of recipes to a request body."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from fidelora.api.requests import InferenceRequest, LoraItem, PromptItem, RequestBody
from fidelora.errors import (
    ImageFormatError,
    RecipeError,
    RequestError,
    RequestFieldError,
    UnknownModelError,
)
from fidelora.families import Family, all_families, get_family
from fidelora.field_sentences import similar_name
from fidelora.images.formats import check_format
from fidelora.images.mp4 import can_write_mp4
from fidelora.loras.trigger import has_placeholder, trigger_of
from fidelora.recipe import AdapterRef, Recipe

DEFAULT_SIZE = 1024
"""Width and height in pixels of a request without a size, as in `ai-toolkit-inference`."""

MAX_LORAS_TIMES_PROMPTS = 1024
"""Maximum of LoRAs times prompts in one request, because each recipe contains all LoRAs."""

# Fields of the API that only models of other kinds (image editing) support.
_UNSUPPORTED_FIELDS = ("resolution", "ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3")

_ITEM_FIELDS = {
    "steps": "sample_steps", "negative_prompt": "neg", "negative_prompt_2": "neg_2",
    "frames": "num_frames",
}  # fmt: skip
"""Names of recipe fields in a prompt item, where they differ."""


def check_request(request: InferenceRequest, *, needs_lora: bool = True) -> Family:
    """Check that the model exists and supports every field of the request; return its family.

    Args:
        needs_lora: True to require at least one LoRA, as the `ai-toolkit-inference` API does. For
            models with two transformers, `transformer` of each LoRA is then required, too.

    Raises:
        RequestError: the request is not supported; the error has the API's code and details.
    """
    try:
        spec = get_family(request.model)
    except UnknownModelError as error:
        supported = list(all_families())
        raise RequestError(
            str(error), code="MODEL_NOT_FOUND", details={"supported_models": supported}
        ) from error
    if needs_lora and not request.loras:
        raise RequestError(
            "At least one LoRA is required. POST /v1/images/generations needs none.",
            code="LORA_FILE_REQUIRED",
        )
    if len(request.loras) * len(request.prompts) > MAX_LORAS_TIMES_PROMPTS:
        raise RequestFieldError(
            f"The request has {len(request.loras)} LoRAs and {len(request.prompts)} prompts; LoRAs "
            f"times prompts must be at most {MAX_LORAS_TIMES_PROMPTS:,}. Use several requests.",
            loc=("loras",),
        )
    _check_transformers(request, spec, is_required=needs_lora)
    for field_path in _unsupported_fields(request, spec):
        message = _unsupported_message(field_path, spec)
        raise RequestError(message, code="FIELD_NOT_SUPPORTED", details={"field": field_path})
    for index, item in enumerate(request.prompts):
        multipliers, loras = item.network_multiplier, request.loras
        if isinstance(multipliers, list) and len(multipliers) != len(loras):
            field_path = f"prompts[{index}].network_multiplier"
            raise RequestError(
                f"{field_path} has {len(multipliers)} numbers for {len(loras)} LoRAs; "
                "give one for each.",
                code="MULTIPLIERS_DO_NOT_MATCH",
                details={"field": field_path},
            )
    return spec


def _check_transformers(request: InferenceRequest, spec: Family, *, is_required: bool) -> None:
    """Check the field `transformer` of all LoRAs. Only families with stages support it.

    Args:
        is_required: False if the file names may contain the stage instead
            (`AdapterRef.named_stage`).
    """
    if spec.stages and is_required and not all(lora.transformer for lora in request.loras):
        raise RequestError(
            f"{spec.id} has a transformer for high noise and one for low noise. Set `transformer` "
            "of each LoRA to high or low.",
            code="MOE_FORMAT_REQUIRED",
            details={"field": "transformer"},
        )
    if not spec.stages and any(lora.transformer for lora in request.loras):
        message = f"{spec.id} has one denoiser; leave out `transformer` of its LoRAs."
        raise RequestError(
            message, code="MOE_FORMAT_NOT_SUPPORTED", details={"field": "transformer"}
        )


def recipes_of(
    request: InferenceRequest,
    adapters: Sequence[AdapterRef],
    base: Mapping[str, Any],
    draw_seed: Callable[[], int],
) -> tuple[Recipe, ...]:
    """Return one complete recipe for each prompt.

    Args:
        request: a request that passed `check_request`.
        adapters: the adapters of its LoRAs, in order; their multipliers are not used.
        base: the recipe fields that the server sets: `base_model`, dtypes, `noise`, ..., and the
            `fidelity` of requests that omit it.
        draw_seed: called for each prompt whose seed is -1.

    Raises:
        RequestFieldError: the model does not support a value, such as an unknown sampler.
    """
    multipliers = [_multipliers(request, item) for item in request.prompts]
    base = {**base, "fidelity": request.fidelity or base.get("fidelity", "exact")}
    # Like the trainer: adapters are merged if all images have the same multipliers and the weights
    # are not quantised; otherwise they stay unmerged (live).
    is_quantized = base.get("quantization", "none") != "none"
    is_uniform = len(set(multipliers)) == 1
    mode = "merged" if base["fidelity"] == "fast" or (is_uniform and not is_quantized) else "live"
    family = get_family(request.model)
    divisor = _divisor(request)
    recipes = []
    for index, item in enumerate(request.prompts):
        given = {
            "negative_prompt_2": item.neg_2,
            "guidance_scale": item.guidance_scale,
            "guidance_rescale": item.guidance_rescale,
            "emphasis": item.emphasis,
            "steps": item.sample_steps,
            "sampler": item.sampler,
            "timestep_spacing": item.timestep_spacing,
            "eta": item.eta,
            "vae_tiling": item.vae_tiling,
            "frames": item.num_frames,
            "fps": item.fps,
            "seed": draw_seed() if item.seed == -1 else item.seed,
        }
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if family.makes_videos:
            fields.setdefault("frames", family.default_frames)
            fields.setdefault("fps", family.default_fps)
        if item.seed is None:
            fields["seed"] = family.default_seed + index
        if request.match == "trainer":
            fields.setdefault("steps", family.trainer_sampling.default_steps)
        width, height = item.width or DEFAULT_SIZE, item.height or DEFAULT_SIZE
        try:
            recipe = Recipe(
                prompt=trigger_of(adapters, _trigger_word(request, item)).fill(item.prompt),
                negative_prompt=(item.neg or "") if family.uses_negative_prompt else "",
                model=request.model,
                width=width - width % divisor,
                height=height - height % divisor,
                adapters=tuple(
                    replace(
                        ref,
                        multiplier=multiplier,
                        alpha=lora.alpha,
                        stage=lora.transformer or ref.stage,
                    )
                    for ref, lora, multiplier in zip(
                        adapters, request.loras, multipliers[index], strict=True
                    )
                ),
                adapter_mode=mode,  # type: ignore[arg-type]
                **fields,
                **base,
            )
        except RecipeError as error:
            loc = ("prompts", index, _ITEM_FIELDS.get(error.field, error.field))
            raise RequestFieldError(str(error), loc=loc) from error
        recipes.append(recipe)
    return tuple(recipes)


def notes_on(
    request: InferenceRequest, adapters: Sequence[AdapterRef], recipes: Sequence[Recipe]
) -> tuple[str, ...]:
    """Return a sentence for each value that the server chose or changed.

    These are trigger words from the LoRAs' metadata, default and rounded sizes, rounded numbers of
    frames, and negative prompts for a family that does not use them.

    Args:
        recipes: result of `recipes_of`.
    """
    notes = []
    for item, recipe in zip(request.prompts, recipes, strict=True):
        notes.append(trigger_of(adapters, _trigger_word(request, item)).note([item.prompt]))
        family = get_family(recipe.model)
        if item.neg:
            notes.append(family.negative_prompt_note)
        if item.num_frames not in (None, recipe.frames):
            notes.append(
                f"num_frames {item.num_frames} was rounded to {recipe.frames}; the numbers of "
                f"frames of {family.title} are 1, {1 + family.frames_per_latent}, "
                f"{1 + 2 * family.frames_per_latent}, ..."
            )
        notes.append(_size_note(item, family, family.size_of(recipe.base_model)))
        width, height = item.width or DEFAULT_SIZE, item.height or DEFAULT_SIZE
        if (width, height) != (recipe.width, recipe.height):
            notes.append(
                f"The size {width} x {height} was rounded down to {recipe.width} x "
                f"{recipe.height}; sides of {family.title} images are multiples of "
                f"{_divisor(request)}."
            )
    return tuple(dict.fromkeys(filter(None, notes)))


def _size_note(item: PromptItem, family: Family, trained_side: int) -> str:
    """Return a note on a prompt without a size if the base model was trained at a smaller size.

    Smaller means smaller than the family's default size. Otherwise the text is empty.
    """
    if item.width or item.height or trained_side >= family.default_size:
        return ""
    return (
        f"The prompt has no size, so the image has the API's default, {DEFAULT_SIZE} x "
        f"{DEFAULT_SIZE}; the base model was trained at {trained_side} x {trained_side}."
    )


def _trigger_word(request: InferenceRequest, item: PromptItem) -> str | None:
    """Return the trigger word of a prompt; None if neither it nor the request sets one.

    An empty trigger word leaves `[trigger]` in the prompt. If the prompt's trigger word is empty,
    the one of the request is used, as in `ai-toolkit-inference`.
    """
    given = (item.trigger_word, request.trigger_word)
    return next(filter(None, given), None if given == (None, None) else "")


def request_for(recipes: Sequence[Recipe], lora_paths: Sequence[str]) -> dict[str, Any]:
    """Return the request body for these recipes, which all use the same adapters.

    It does not contain the fields that the server sets (base model, precision, VAE).

    Args:
        lora_paths: paths of the adapters on the server, in order.

    Raises:
        RequestFieldError: a value is out of the API's range, such as a guidance scale above 20.
    """
    different = {
        tuple((ref.sha256, ref.alpha, ref.stage) for ref in recipe.adapters) for recipe in recipes
    }
    assert len(different) == 1, "the same adapters in every recipe"
    (adapters,) = different
    divisor = get_family(recipes[0].model).request_divisor
    has_trainer_size = any(one.width % divisor or one.height % divisor for one in recipes)
    body = {
        "model": recipes[0].model,
        **({"match": "trainer"} if has_trainer_size else {}),
        "fidelity": recipes[0].fidelity,
        "loras": [
            {"path": path, "sha256": sha256}
            | ({} if alpha is None else {"alpha": alpha})
            | ({} if stage is None else {"transformer": stage})
            for path, (sha256, alpha, stage) in zip(lora_paths, adapters, strict=True)
        ],
        "prompts": [
            {
                "prompt": recipe.prompt,
                "neg": recipe.negative_prompt,
                "width": recipe.width,
                "height": recipe.height,
                "guidance_scale": recipe.guidance_scale,
                "sample_steps": recipe.steps,
                "sampler": recipe.sampler,
                "seed": recipe.seed,
                "network_multiplier": (
                    recipe.adapters[0].multiplier
                    if len(adapters) == 1
                    else [ref.multiplier for ref in recipe.adapters]
                ),
            }
            # A placeholder in a recipe is plain text, which a trigger word must not replace.
            | ({"trigger_word": ""} if has_placeholder(recipe.prompt) else {})
            | ({} if recipe.negative_prompt_2 is None else {"neg_2": recipe.negative_prompt_2})
            | (
                {}
                if recipe.guidance_rescale == 0
                else {"guidance_rescale": recipe.guidance_rescale}
            )
            | ({} if recipe.emphasis == "none" else {"emphasis": recipe.emphasis})
            | sampler_options(recipe)
            | ({"vae_tiling": True} if recipe.vae_tiling else {})
            | video_options(recipe)
            for recipe in recipes
        ],
    }
    try:
        InferenceRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field_path = ".".join(map(str, first["loc"]))
        raise RequestFieldError(
            f"The HTTP API does not accept {field_path} {first['input']!r}: {first['msg']}.",
            loc=first["loc"],
        ) from None
    return body


def sampler_options(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a prompt item for the sampler's options; empty if none is set."""
    spacing = recipe.timestep_spacing
    return ({} if spacing == "default" else {"timestep_spacing": spacing}) | (
        {} if recipe.eta is None else {"eta": recipe.eta}
    )


def video_options(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a prompt item for frames; empty if the family makes only images."""
    if not get_family(recipe.model).makes_videos:
        return {}
    return {"num_frames": recipe.frames, "fps": recipe.fps}


def output_format_of(requested: str | None, recipes: Sequence[Recipe]) -> str:
    """Return the format of the files of a request.

    Without a requested format, it is png for images, mp4 for videos, and webp for both together.

    Raises:
        RequestFieldError: the requested format does not support one of the images or videos, or
            MP4 files cannot be written here.
    """
    videos = [recipe.frames > 1 for recipe in recipes]
    format_ = requested or ("mp4" if all(videos) else "webp" if any(videos) else "png")
    try:
        for recipe in recipes:
            check_format(format_, recipe.frames)
    except ImageFormatError as error:
        raise RequestFieldError(str(error), loc=("output_format",)) from error
    if format_ == "mp4" and not can_write_mp4():
        raise RequestFieldError(
            "This server cannot write mp4 files, because the package av is not installed "
            "(the extra video). Set output_format to webp.",
            loc=("output_format",),
        )
    return format_


def _divisor(request: InferenceRequest) -> int:
    """Return the number of pixels of which width and height are multiples."""
    family = get_family(request.model)
    return family.resolution_divisor if request.match == "trainer" else family.request_divisor


def _multipliers(request: InferenceRequest, item: PromptItem) -> tuple[float, ...]:
    """Return the multiplier of each LoRA: the prompt's, else the LoRA's, else 1."""
    own = item.network_multiplier
    if isinstance(own, list):
        return tuple(own)
    return tuple(
        own
        if own is not None
        else lora.network_multiplier
        if lora.network_multiplier is not None
        else 1.0
        for lora in request.loras
    )


def _unsupported_message(field_path: str, spec: Family) -> str:
    """Return the error message for a path of `_unsupported_fields`; it corrects a typing error."""
    container, _, name = field_path.rpartition(".")
    bodies: Mapping[str, type[RequestBody]] = {"loras": LoraItem, "prompts": PromptItem}
    fields = bodies.get(container.split("[")[0], InferenceRequest).model_fields
    meant = None if name in fields else similar_name(name, fields)
    if meant is not None:
        return f"{field_path} does not exist; the field is called {meant}."
    return f"{spec.id} does not support {field_path}; leave it out."


def _unsupported_fields(request: InferenceRequest, spec: Family) -> Iterator[str]:
    """Yield the paths of unknown fields, and of fields that only other models support."""
    yield from request.model_extra or {}
    for index, lora in enumerate(request.loras):
        yield from (f"loras[{index}].{name}" for name in lora.model_extra or {})
    for index, item in enumerate(request.prompts):
        names = [*(item.model_extra or {})]
        names += [name for name in _UNSUPPORTED_FIELDS if getattr(item, name) is not None]
        if not spec.makes_videos:
            names += ["num_frames"] if item.num_frames not in (None, 1) else []
            names += ["fps"] if item.fps is not None else []
        yield from (f"prompts[{index}].{name}" for name in names)
