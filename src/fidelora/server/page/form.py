"""What the page's form means: its values as a request, and a recipe as values of the form. Knows no Gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError

from fidelora.api import MAX_PROMPTS, InferenceRequest, check_request, recipes_of
from fidelora.errors import WrongUseError
from fidelora.families import get_family
from fidelora.recipe import MAX_SEED, AdapterRef, Recipe

MAX_LORAS = 8
"""Sliders that the form has."""

_LABELS = {
    "guidance_scale": "Guidance scale", "sample_steps": "Steps", "width": "Width", "height": "Height", "seed": "Seed",
    "network_multiplier": "Multiplier", "sampler": "Sampler", "fidelity": "Fidelity", "output_format": "Format",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """The values of the form.

    Attributes:
        loras: name and multiplier of each, in order.
        seed: of the first image, the others count up; None draws one for each.
        number: how many images.
    """

    loras: tuple[tuple[str, float], ...]
    trigger: str
    prompt: str
    negative: str
    model: str
    sampler: str
    steps: int
    guidance: float
    width: int
    height: int
    seed: int | None
    number: int
    fidelity: str
    image_format: str


def read_seed(text: str) -> int | None:
    """A seed as people write it. Text, because browsers' numbers end at 2**53.

    Raises:
        WrongUseError: no whole number from -1 on, or too large.
    """
    text = text.strip()
    if text in ("", "-1"):
        return None
    if not (text.isascii() and text.isdigit()) or int(text[:20]) > MAX_SEED:
        raise WrongUseError(
            f"Seed: {text[:40]!r} is no whole number from 0 to {MAX_SEED}; leave it empty for a random one."
        )
    return int(text)


def request_of(form: Form) -> InferenceRequest:
    """The request that the form means, with the ranges that the HTTP API has.

    Raises:
        WrongUseError: a value that no request can have, in a sentence for people.
    """
    if not form.loras:
        raise WrongUseError(
            "Choose at least one LoRA; with multiplier 0 it leaves the base model as it is."
        )
    if not 1 <= form.number <= MAX_PROMPTS:
        raise WrongUseError(f"Images: {form.number} is not from 1 to {MAX_PROMPTS}.")
    seeds = [-1 if form.seed is None else form.seed + index for index in range(form.number)]
    prompt = {
        "prompt": form.prompt,
        "neg": form.negative,
        "width": form.width,
        "height": form.height,
        "guidance_scale": form.guidance,
        "sample_steps": form.steps,
        "sampler": form.sampler,
    }
    body = {
        "model": form.model,
        "trigger_word": form.trigger or None,
        "loras": [
            {"path": name, "network_multiplier": multiplier} for name, multiplier in form.loras
        ],
        "prompts": [prompt | {"seed": seed} for seed in seeds],
        "output_format": form.image_format,
        "fidelity": form.fidelity,
    }
    try:
        request = InferenceRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][-1])
        raise WrongUseError(
            f"{_LABELS.get(field, field)}: {first['msg']}, not {str(first['input'])[:60]}."
        ) from None
    check_request(request)
    return request


def defaults(model: str) -> dict[str, Any]:
    """The form's values that a model brings along."""
    spec = get_family(model)
    return {
        "sampler": spec.default_sampler,
        "steps": spec.default_steps,
        "guidance": spec.default_guidance_scale,
        "width": spec.default_size,
        "height": spec.default_size,
    }


def form_of(recipe: Recipe, names: Sequence[str], image_format: str) -> Form:
    """The values that make a recipe's image again.

    Args:
        names: what the server calls each of the recipe's adapters.
    """
    multipliers = (adapter.multiplier for adapter in recipe.adapters)
    return Form(
        loras=tuple(zip(names, multipliers, strict=True)),
        trigger="",  # it stands in the prompt already
        prompt=recipe.prompt,
        negative=recipe.negative_prompt,
        model=recipe.model,
        sampler=recipe.sampler,
        steps=recipe.steps,
        guidance=recipe.guidance_scale,
        width=recipe.width,
        height=recipe.height,
        seed=recipe.seed,
        number=1,
        fidelity=recipe.fidelity,
        image_format=image_format,
    )


def recipe_again(
    form: Form, adapters: Sequence[AdapterRef], server_defaults: Mapping[str, Any]
) -> Recipe:
    """The recipe of the first image that the form would make on this server.

    Raises:
        WrongUseError: the form's values are none that a request can have.
    """
    return recipes_of(request_of(form), adapters, server_defaults, draw_seed=lambda: 0)[0]


def differences(recipe: Recipe, again: Recipe) -> list[str]:
    """What defines the first image and would be otherwise in the second: one phrase for each; empty if they are the same image."""
    if recipe.digest == again.digest:
        return []
    return [
        f"{entry.name} is {getattr(again, entry.name)} here and was {getattr(recipe, entry.name)}"
        for entry in fields(Recipe)
        if getattr(recipe, entry.name) != getattr(again, entry.name)
    ]
