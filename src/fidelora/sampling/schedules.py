"""Noise and flow schedules, with the interface that the sampling loop uses."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from diffusers import schedulers
from torch import Tensor

from fidelora.sampling.noise import NoiseSource

# The trainer passes one configuration to all schedulers. Schedulers warn about every key that they
# do not use and every correction that they make; these warnings are expected and suppressed.
for _name in ("diffusers.configuration_utils", "diffusers.schedulers"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Schedule(Protocol):
    """Timesteps and update rule of a sampler. Has state, so each image needs a new one.

    Attributes:
        timesteps: one per evaluation of the denoiser, in the denoiser's scale.
    """

    timesteps: Tensor

    def start(self, latents: Tensor) -> Tensor:
        """Return the initial latents for standard normal noise."""

    def scale(self, latents: Tensor, t: Tensor) -> Tensor:
        """Return the latents scaled for the denoiser's input at `t`."""

    def step(self, prediction: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """Return the latents after the step that begins at `t`."""

    def steps_done(self, evaluations: int) -> int:
        """Return the number of finished steps after this many evaluations of the denoiser."""


class NoiseSchedule:
    """A schedule of noise levels, computed by a scheduler of diffusers.

    Args:
        scheduler: the class in `diffusers.schedulers`.
        config: the scheduler's configuration.
        steps: the number of steps.
        device: device of the latents.
        noise: the source of the random numbers that some samplers draw in their steps.
    """

    def __init__(
        self,
        scheduler: str,
        config: Mapping[str, Any],
        steps: int,
        device: torch.device,
        noise: NoiseSource,
    ) -> None:
        prepared = _prepared(scheduler, tuple(sorted(config.items())), steps, device)
        self._scheduler: Any = copy.deepcopy(prepared)
        self._steps = steps
        self.timesteps: Tensor = self._scheduler.timesteps
        draws = "generator" in inspect.signature(self._scheduler.step).parameters
        self._draws = {"generator": noise.generators} if draws else {}

    def start(self, latents: Tensor) -> Tensor:
        return cast(Tensor, latents * self._scheduler.init_noise_sigma)

    def scale(self, latents: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, self._scheduler.scale_model_input(latents, t))

    def step(self, prediction: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        step = self._scheduler.step
        return cast(Tensor, step(prediction, t, latents, **self._draws, return_dict=False)[0])

    def steps_done(self, evaluations: int) -> int:
        # Second-order samplers need two evaluations per step; pndm needs steps + 1 evaluations.
        order: int = self._scheduler.order
        return min(-(-evaluations // order), self._steps)


@lru_cache(maxsize=64)
def _prepared(
    scheduler: str, config: tuple[tuple[str, Any], ...], steps: int, device: torch.device
) -> Any:
    """Return a scheduler with its tables. Cached, because `dpm_2` takes 0.2 s to compute them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `dpmsolver` is deprecated
        made = getattr(schedulers, scheduler).from_config(dict(config))
    made.set_timesteps(steps, device=device)
    return made


class FlowSchedule:
    """Euler steps along a flow, from noise (sigma 1) to data (sigma 0).

    The order of operations and the dtypes are those of `FlowMatchEulerDiscreteScheduler` of
    diffusers: the shift is computed in numpy's float32, everything after it in torch's float32.

    Args:
        config: either `shift` (the shift factor) or `dynamic_shift` (the argument `line` of
            `_shift_for`).
        steps: the number of steps.
        tokens: the number of tokens of the image, which a dynamic shift depends on.
        device: device of the latents.

    Raises:
        ValueError: `config` has an unknown option.
    """

    def __init__(
        self, config: Mapping[str, Any], steps: int, tokens: int, device: torch.device
    ) -> None:
        if unknown := config.keys() - {"shift", "dynamic_shift"}:
            raise ValueError(f"FlowSchedule has no options {sorted(unknown)}.")
        # Sigmas before the shift, evenly spaced from 1 to 1 / steps. Computed with torch as in the
        # pipelines, because numpy's linspace differs in the last bit.
        sigmas = torch.linspace(1.0, 1 / steps, steps).numpy()
        if "dynamic_shift" in config:
            factor = math.exp(_shift_for(tokens, config["dynamic_shift"]))
            shifted = factor / (factor + (1 / sigmas - 1) ** 1.0)
        else:
            shift = config["shift"]
            shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
        steps_sigmas = torch.from_numpy(shifted).to(dtype=torch.float32, device=device)
        self.timesteps = steps_sigmas * 1000
        self._sigmas = torch.cat([steps_sigmas, torch.zeros(1, device=device)])
        self._index = 0

    def start(self, latents: Tensor) -> Tensor:
        return latents

    def scale(self, latents: Tensor, t: Tensor) -> Tensor:
        return latents

    def step(self, prediction: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        sigma, sigma_next = self._sigmas[self._index], self._sigmas[self._index + 1]
        self._index += 1
        moved = latents.to(torch.float32) + (sigma_next - sigma) * prediction
        return moved.to(prediction.dtype)

    def steps_done(self, evaluations: int) -> int:
        return evaluations


def _shift_for(tokens: int, line: tuple[float, float, float, float]) -> float:
    """Return the natural logarithm of the shift factor of an image (`mu` in diffusers).

    Args:
        tokens: number of tokens of the image.
        line: two points of a straight line: (tokens, result, tokens, result). For FLUX.1, it is
            (256, 0.5, 4096, 1.15).
    """
    few, low, many, high = line
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)
