"""Inputs of the sampling loop that come from a recipe: encoded prompts and the schedule."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fidelora.accel.device import TORCH_DTYPES
from fidelora.engine.binding import Bound
from fidelora.engine.model import LoadedModel
from fidelora.families import FlowSampler, get_family
from fidelora.families.protocols import Encoded, Guidance, Prompts, Size
from fidelora.recipe import Recipe
from fidelora.sampling.noise import NoiseSource
from fidelora.sampling.schedules import FlowSchedule, NoiseSchedule, Schedule


def denoiser_settings(recipe: Recipe) -> tuple[Guidance, Size, torch.dtype]:
    """Return the arguments of `Denoiser.prepare` that all images of a batch share."""
    guidance = Guidance(recipe.guidance_scale, recipe.guidance_rescale)
    return guidance, Size(recipe.width, recipe.height), TORCH_DTYPES[recipe.dtype]


def encode(model: LoadedModel, recipe: Recipe, bound: Bound) -> Encoded:
    """Encode the prompts of one image.

    The warnings of the result include those of `bound`.
    """

    def adapter_key(part: str) -> Hashable:
        return tuple(
            (one.identity, multiplier, mode)
            for pairs, mode in (
                (bound.training, "training"),
                (bound.history, "history"),
                (bound.adapters, recipe.adapter_mode),
            )
            for one, multiplier in pairs
            if part in one.components
        )

    guidance, size, _ = denoiser_settings(recipe)
    negative = recipe.negative_prompt if model.denoiser.uses_negative(guidance) else None
    prompts = Prompts(recipe.prompt, negative, recipe.negative_prompt_2, recipe.emphasis)
    encoded = model.text.encode(prompts, size, adapter_key)
    return replace(encoded, warnings=(*bound.warnings, *encoded.warnings))


def schedule(
    recipe: Recipe, model: LoadedModel, noise: NoiseSource, options: Mapping[str, Any]
) -> Schedule:
    """Return the recipe's schedule at its first step."""
    sampler = get_family(recipe.model).samplers[recipe.sampler]
    config = {**sampler.config, **options}
    if isinstance(sampler, FlowSampler):
        tokens = model.latents.tokens(Size(recipe.width, recipe.height))
        return FlowSchedule(config, recipe.steps, tokens, model.device)
    config["prediction_type"] = options.get("prediction_type", recipe.prediction)
    return NoiseSchedule(
        sampler.scheduler,
        config,
        recipe.steps,
        model.device,
        noise,
        recipe.timestep_spacing,
        sampler.eta if recipe.eta is None else recipe.eta,
    )
