"""The trainer's samplers, as the schedulers of diffusers with the configuration that previews were really made with."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import schedulers

from fidelora.families import get_family
from fidelora.recipe import Recipe
from fidelora.sampling.noise import NoiseSource

# Schedulers log about every key of the shared configuration that their class does not use (the trainer passes it to all alike), and
# about corrections that they make to it; both are part of what previews show, and nothing that a user could change.
for _name in ("diffusers.configuration_utils", "diffusers.schedulers"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def make_scheduler(
    recipe: Recipe, device: torch.device, options: Mapping[str, Any] | None = None
) -> Any:
    """A scheduler at the beginning of the recipe's steps; a new one for each image, because they keep state between steps.

    Args:
        device: where the latents are.
        options: of the configuration, in place of the trainer's.
    """
    changes = tuple(sorted((options or {}).items()))
    return copy.deepcopy(
        _prepared(recipe.model, recipe.sampler, recipe.prediction, changes, recipe.steps, device)
    )


@lru_cache(maxsize=64)
def _prepared(
    model: str,
    sampler: str,
    prediction: str,
    options: tuple[tuple[str, Any], ...],
    steps: int,
    device: torch.device,
) -> Any:
    """A scheduler with its tables, which take some samplers (`dpm_2`) a fifth of a second to make."""
    spec = get_family(model)
    entry = spec.samplers[sampler]
    config = {
        **spec.scheduler_config,
        **entry.options,
        "prediction_type": prediction,
        **dict(options),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `dpmsolver` is called deprecated
        scheduler = getattr(schedulers, entry.scheduler).from_config(config)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def draws_of_step(scheduler: Any, noise: NoiseSource) -> dict[str, Any]:
    """What `scheduler.step` has to be given to draw its noise; empty for a sampler that draws none."""
    return (
        {"generator": noise.generators}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
