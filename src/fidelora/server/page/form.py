"""Conversion of form values to an API request, and of a recipe to form values.

Fields are named as in `fidelora.api.InferenceRequest` and its prompts. This module does not import
Gradio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError

from fidelora.api import (
    MAX_PROMPTS,
    InferenceRequest,
    PromptItem,
    check_request,
    recipes_of,
    sampler_options,
    video_options,
)
from fidelora.errors import UsageError
from fidelora.families import get_family
from fidelora.field_sentences import field_sentence
from fidelora.images.mp4 import can_write_mp4
from fidelora.loras.trigger import has_placeholder
from fidelora.recipe import LOCATIONS, MAX_SEED, AdapterRef, Recipe, short_name

MAX_LORAS = 8
"""Number of multiplier sliders in the form."""

_RATIOS = ((1, 1), (3, 4), (2, 3), (9, 16))
"""Short and long side of the size presets."""
_PRESET_STEP = 64
"""The sides of presets are multiples of this number of pixels, as in the buckets of trainers. If an
eighth of the base model's size is smaller, they are multiples of that."""

CUSTOM_SIZE = "Custom"
"""Label of sizes that no preset has."""

LABELS = {
    "prompt": "Prompt",
    "trigger_word": "Trigger word",
    "neg": "Negative prompt",
    "emphasis": "Emphasis",
    "model": "Model",
    "sampler": "Sampler",
    "sample_steps": "Steps",
    "guidance_scale": "Guidance",
    "width": "Width",
    "height": "Height",
    "num_frames": "Frames",
    "fps": "Frames per second",
    "fidelity": "Fidelity",
    "output_format": "Format",
}
"""Labels of the request fields that have their own input in the form."""

_ERROR_LABELS = LABELS | {"seed": "Seed", "network_multiplier": "Multiplier", "path": "LoRAs"}


@dataclass(frozen=True)
class Form:
    """Values of the form.

    Attributes:
        loras: path and multiplier of each LoRA, in order.
        seed: seed of the first image, increased by one for each further image; None draws a seed
            for each image.
        images: number of images.
        fields: values of the request fields in `LABELS`, by field name.
    """

    loras: tuple[tuple[str, float], ...]
    seed: int | None
    images: int
    fields: Mapping[str, Any]


def read_seed(text: str) -> int | None:
    """Parse a seed; return None for an empty text and for `-1`.

    Seeds are entered as text, because browsers round numbers above 2**53.

    Raises:
        UsageError: the text is not a whole number from 0 to `MAX_SEED`.
    """
    text = text.strip()
    if text in ("", "-1"):
        return None
    if not (text.isascii() and text.isdigit()) or int(text[:20]) > MAX_SEED:
        raise UsageError(
            f"Seed: {text[:40]!r} is not a whole number from 0 to {MAX_SEED}; "
            "leave the field empty for a random seed."
        )
    return int(text)


def api_range(field: str) -> tuple[float, float]:
    """Return the smallest and largest value that the API accepts for a numeric prompt field."""
    schema = PromptItem.model_json_schema()["properties"][field]
    number = next(one for one in schema.get("anyOf", [schema]) if "maximum" in one)
    return number["minimum"], number["maximum"]


def build_request(form: Form) -> InferenceRequest:
    """Build the request for the form's values, and validate it as the HTTP API does.

    Raises:
        UsageError: a value is missing or out of range; the message is shown to the user.
        RequestError: the model does not exist or does not support a field.
    """
    if not 1 <= form.images <= MAX_PROMPTS:
        raise UsageError(f"Images: choose a number from 1 to {MAX_PROMPTS}, not {form.images}.")
    seeds = [-1 if form.seed is None else form.seed + index for index in range(form.images)]
    of_request = InferenceRequest.model_fields
    prompt = {name: value for name, value in form.fields.items() if name not in of_request}
    if not get_family(form.fields["model"]).makes_videos:
        del prompt["num_frames"], prompt["fps"]  # their inputs are hidden
    body = {name: value for name, value in form.fields.items() if name in of_request}
    # The preselected format is one for images, so videos get a video format. Requests for 2 or 3
    # frames are rounded to one frame, which is an image.
    if prompt.get("num_frames", 1) > 3 and body["output_format"] in ("png", "jpeg"):
        body["output_format"] = "mp4" if can_write_mp4() else "webp"
    body |= {
        "match": "trainer",  # accepts all sizes of recipes
        "loras": [{"path": path, "network_multiplier": number} for path, number in form.loras],
        "prompts": [prompt | {"seed": seed} for seed in seeds],
    }
    try:
        request = InferenceRequest.model_validate(body)
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None
    check_request(request, needs_lora=False)
    return request


def notes_on_form(form: Form) -> list[str]:
    """Return a sentence for each input that was probably left empty by mistake."""
    notes = []
    if not form.fields["prompt"].strip():
        notes.append("The prompt is empty, so the model chooses the content of the image.")
    if has_placeholder(form.fields["prompt"]) and not form.fields["trigger_word"].strip():
        notes.append("[trigger] stays in the prompt as it is, because the trigger word is empty.")
    return notes


def _sentence(error: ValidationError) -> str:
    """Return a sentence about the first invalid input, with its label and range."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][-1])
    label, given = _ERROR_LABELS.get(field, field), str(first["input"])[:60]
    if first.get("ctx", {}).keys() & {"le", "ge"} and field in PromptItem.model_fields:
        lowest, highest = api_range(field)
        return f"{label} is {given}; enter a number from {lowest:g} to {highest:g}."
    if first["type"] in ("int_from_float", "int_type", "int_parsing"):
        return f"{label} is {given}; enter a whole number."
    return f"{label} is {given}. {field_sentence(first)}"


def family_defaults(model: str, side: int) -> dict[str, Any]:
    """Return a model family's default values, by request field.

    Args:
        side: width and height, in pixels, that the base model was trained at.
    """
    spec = get_family(model)
    return {
        "sampler": spec.default_sampler,
        "sample_steps": spec.default_steps,
        "guidance_scale": spec.default_guidance_scale,
        "width": side,
        "height": side,
        "num_frames": 1,
        "fps": spec.default_fps or 16,
    }


def size_presets(side: int) -> dict[str, tuple[int, int]]:
    """Return sizes (width, height) with about as many pixels as the square, by label.

    Square, then portrait and landscape of each ratio. Sides are multiples of 64 pixels, or of
    `side / 8` if that is smaller.

    Args:
        side: width and height, in pixels, that the base model was trained at.
    """
    step = min(_PRESET_STEP, side // 8)
    presets = {}
    for short, long in _RATIOS:
        lower, upper = (
            round(side * math.sqrt(ratio) / step) * step for ratio in (short / long, long / short)
        )
        presets[f"{lower} x {upper} ({short}:{long})"] = (lower, upper)
        presets[f"{upper} x {lower} ({long}:{short})"] = (upper, lower)
    return presets


def preset_choices(side: int) -> list[str]:
    """Return the labels of `size_presets`, and one for other sizes."""
    return [*size_presets(side), CUSTOM_SIZE]


def preset_of(side: int, width: int | None, height: int | None) -> str:
    """Return the label of the preset with this size, or `CUSTOM_SIZE`."""
    presets = size_presets(side).items()
    return next((label for label, size in presets if size == (width, height)), CUSTOM_SIZE)


def request_body(recipe: Recipe, paths: Sequence[str], image_format: str) -> dict[str, Any]:
    """Return the body of `POST /v1/inference` that reproduces a recipe's image.

    It contains the sha256 of each LoRA, so the server rejects other files. It does not contain the
    base model, VAE and dtypes, which the server sets.

    Args:
        paths: path of each of the recipe's adapters in API requests.
    """
    loras = [
        {"path": path, "network_multiplier": adapter.multiplier, "sha256": adapter.sha256}
        | ({} if adapter.alpha is None else {"alpha": adapter.alpha})
        | ({} if adapter.stage is None else {"transformer": adapter.stage})
        for path, adapter in zip(paths, recipe.adapters, strict=True)
    ]
    prompt: dict[str, Any] = {
        "prompt": recipe.prompt,
        "neg": recipe.negative_prompt,
        "width": recipe.width,
        "height": recipe.height,
        "guidance_scale": recipe.guidance_scale,
        "sample_steps": recipe.steps,
        "sampler": recipe.sampler,
        "seed": recipe.seed,
    }
    if has_placeholder(recipe.prompt):
        prompt["trigger_word"] = ""  # the placeholder is plain text here
    if recipe.negative_prompt_2 is not None:
        prompt["neg_2"] = recipe.negative_prompt_2
    if recipe.guidance_rescale:
        prompt["guidance_rescale"] = recipe.guidance_rescale
    if recipe.emphasis != "none":
        prompt["emphasis"] = recipe.emphasis
    prompt |= sampler_options(recipe) | video_options(recipe)
    if recipe.vae_tiling:
        prompt["vae_tiling"] = True
    return {
        "model": recipe.model,
        "match": "trainer",  # accepts all sizes of recipes
        "fidelity": recipe.fidelity,
        "output_format": image_format,
        "loras": loras,
        "prompts": [prompt],
    }


def form_for_recipe(recipe: Recipe, paths: Sequence[str], image_format: str) -> Form:
    """Return the form values that reproduce a recipe's image, as far as the form supports them.

    Args:
        paths: path of each of the recipe's adapters in API requests.
    """
    body = request_body(recipe, paths, image_format)
    values = {"num_frames": recipe.frames, "fps": recipe.fps} | body["prompts"][0] | body
    values["trigger_word"] = ""  # the recipe's prompt already contains it
    values["emphasis"] = recipe.emphasis
    return Form(
        loras=tuple((lora["path"], lora["network_multiplier"]) for lora in body["loras"]),
        seed=values["seed"],
        images=1,
        fields={name: values[name] for name in LABELS},
    )


def first_recipe(
    form: Form, adapters: Sequence[AdapterRef], server_defaults: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of the first image that the form makes on this server.

    Raises:
        FideloraError: as in `build_request`.
    """
    return recipes_of(build_request(form), adapters, server_defaults, draw_seed=lambda: 0)[0]


def differences(recipe: Recipe, here: Recipe) -> list[str]:
    """Describe each field in which two recipes differ; empty if they define the same image.

    Args:
        recipe: recipe of an image.
        here: recipe that this server would use.
    """
    names = [entry.name for entry in fields(Recipe)]
    # Unless both have a hash, the short names are compared here, and a worker compares the hash.
    known = bool(recipe.base_sha256 and here.base_sha256)
    unused = LOCATIONS if known else ("base_sha256",)
    values = [(name, _shown(here, name), _shown(recipe, name)) for name in names]
    return [
        f"{name} is {ours} here but {theirs} in the image"
        for name, ours, theirs in values
        if name not in unused and ours != theirs
    ]


def _shown(recipe: Recipe, name: str) -> Any:
    value = getattr(recipe, name)
    return short_name(value) if name in LOCATIONS else value
