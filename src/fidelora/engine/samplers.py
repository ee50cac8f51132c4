"""The trainer's samplers, as the schedulers of diffusers with the configuration that previews were really made with."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from typing import Any

from diffusers import schedulers

from fidelora.engine.noise import NoiseSource
from fidelora.models import ModelSpec
from fidelora.recipe import Prediction

# Schedulers log about every key of the shared configuration that their class does not use (the trainer passes it to all alike), and
# about corrections that they make to it; both are part of what previews show, and nothing that a user could change.
for _name in ("diffusers.configuration_utils", "diffusers.schedulers"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def make_scheduler(spec: ModelSpec, sampler: str, prediction: Prediction, options: Mapping[str, Any] | None = None) -> Any:
    """A new scheduler; one is made for each image, because they keep state between steps.

    Args:
        options: of the configuration, in place of the trainer's.
    """
    entry = spec.samplers[sampler]
    config = {**spec.scheduler_config, **entry.options, "prediction_type": prediction, **(options or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `dpmsolver` is called deprecated
        return getattr(schedulers, entry.scheduler).from_config(config)


def draws_of_step(scheduler: Any, noise: NoiseSource) -> dict[str, Any]:
    """What `scheduler.step` has to be given to draw its noise; empty for a sampler that draws none."""
    return {"generator": noise.generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
