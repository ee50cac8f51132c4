"""Steps before and after the sampling loop that depend on a recipe: prompts, schedule, decoding."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fidelora.accel.device import TORCH_DTYPES
from fidelora.engine.binding import Bound
from fidelora.engine.model import LoadedModel
from fidelora.families import FlowSampler, get_family
from fidelora.families.protocols import Encoded, Guidance, Prompts, Size, TiledLatents
from fidelora.recipe import Recipe
from fidelora.sampling.noise import NoiseSource
from fidelora.sampling.schedules import FlowSchedule, NoiseSchedule, Schedule


def size_of(recipe: Recipe) -> Size:
    """Return the size of the image or video of a recipe."""
    return Size(recipe.width, recipe.height, recipe.frames)


def denoiser_settings(recipe: Recipe) -> tuple[Guidance, Size, torch.dtype]:
    """Return the arguments of `Denoiser.prepare` that all images of a batch share."""
    guidance = Guidance(recipe.guidance_scale, recipe.guidance_rescale)
    return guidance, size_of(recipe), TORCH_DTYPES[recipe.dtype]


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
        tokens = model.latents.tokens(size_of(recipe))
        return FlowSchedule(config, recipe.steps, tokens, model.device)
    if "prediction" in get_family(recipe.model).uses:
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


def decode(model: LoadedModel, recipe: Recipe, latents: Tensor) -> NDArray[np.uint8]:
    """Decode the latents [1, ...] of one image to uint8 RGB [height, width, 3].

    Those of a video are decoded to [frames, height, width, 3].

    Raises:
        NumericsError: the model produced NaN.
    """
    size = size_of(recipe)
    if recipe.vae_tiling:
        return cast(TiledLatents, model.latents).decode_tiled(latents, size)
    return model.latents.decode(latents, size)
