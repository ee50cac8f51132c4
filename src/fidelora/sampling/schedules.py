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

import numpy as np
import torch
from diffusers import schedulers
from numpy.typing import NDArray
from torch import Tensor

from fidelora.sampling.noise import NoiseSource
from fidelora.sampling.spacings import TimestepSpacing

_TRAINING_TIMESTEPS = 1000

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
        """Return the number of steps begun with this many evaluations of the denoiser.

        With one evaluation per step, this is the number of finished steps.
        """


class NoiseSchedule:
    """A schedule of noise levels, computed by a scheduler of diffusers.

    Args:
        scheduler: the class in `diffusers.schedulers`.
        config: the scheduler's configuration.
        steps: the number of steps.
        device: device of the latents.
        noise: the source of the random numbers that some samplers draw in their steps.
        spacing: rule by which the timesteps are chosen; `default` uses `config`.
        eta: strength (0..1) of the noise that the sampler adds in each step; None for samplers
            without this option. At 0, the sampler draws no noise.
    """

    def __init__(
        self,
        scheduler: str,
        config: Mapping[str, Any],
        steps: int,
        device: torch.device,
        noise: NoiseSource,
        spacing: TimestepSpacing = "default",
        eta: float | None = None,
    ) -> None:
        prepared = _prepared(scheduler, tuple(sorted(config.items())), steps, device, spacing)
        self._scheduler: Any = copy.deepcopy(prepared)
        self._steps = steps
        self.timesteps: Tensor = self._scheduler.timesteps
        draws = "generator" in inspect.signature(self._scheduler.step).parameters
        self._options: dict[str, Any] = {"generator": noise.generators} if draws else {}
        if eta is not None:
            self._options["eta"] = eta

    def start(self, latents: Tensor) -> Tensor:
        return cast(Tensor, latents * self._scheduler.init_noise_sigma)

    def scale(self, latents: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, self._scheduler.scale_model_input(latents, t))

    def step(self, prediction: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        step = self._scheduler.step
        return cast(Tensor, step(prediction, t, latents, **self._options, return_dict=False)[0])

    def steps_done(self, evaluations: int) -> int:
        # Second-order samplers need two evaluations per step, but only one for the last step, so
        # the result is rounded up. pndm needs steps + 1 evaluations.
        order: int = self._scheduler.order
        return min(-(-evaluations // order), self._steps)


@lru_cache(maxsize=64)
def _prepared(
    scheduler: str,
    config: tuple[tuple[str, Any], ...],
    steps: int,
    device: torch.device,
    spacing: TimestepSpacing,
) -> Any:
    """Return a scheduler with its timesteps set. Cached, because `dpm_2` takes 0.2 s for them."""
    # `trailing` is also set for SGM Uniform, because it makes sigma-based schedulers scale the
    # initial noise by the largest sigma, as AUTOMATIC1111 does.
    chosen = {} if spacing == "default" else {"timestep_spacing": "trailing"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `dpmsolver` is deprecated
        made = getattr(schedulers, scheduler).from_config(dict(config) | chosen)
    if spacing == "trailing" and "original_inference_steps" in made.config:
        # The schedulers of distilled models (LCM, TCD) ignore `timestep_spacing`.
        made.set_timesteps(timesteps=trailing_timesteps(steps), device=device)
        return made
    made.set_timesteps(steps, device=device)
    if spacing == "sgm_uniform":
        _set_sgm_uniform(made, steps, device)
    return made


def trailing_timesteps(steps: int) -> list[int]:
    """Return the timesteps of `trailing`, descending from 999, with the roundings of diffusers.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023),
    table 2.
    """
    # `np.arange` adds multiples of a rounded step. With 48 steps, it gives 937.4999... instead of
    # 937.5, which rounds to another integer.
    spaced = np.arange(_TRAINING_TIMESTEPS, 0, -_TRAINING_TIMESTEPS / steps)
    return [int(timestep) - 1 for timestep in spaced.round()]


def _set_sgm_uniform(scheduler: Any, steps: int, device: torch.device) -> None:
    """Replace the timesteps and sigmas of a scheduler by those of SGM Uniform.

    diffusers' Euler scheduler computes the timesteps from the sigmas of `sgm_uniform_sigmas`. These
    timesteps are fractions, as in AUTOMATIC1111; ComfyUI and Forge round them to whole numbers for
    the denoiser.
    """
    table: Any = schedulers.EulerDiscreteScheduler.from_config(
        {**scheduler.config, "use_karras_sigmas": False, "final_sigmas_type": "zero"}
    )
    table.set_timesteps(sigmas=sgm_uniform_sigmas(table.alphas_cumprod, steps), device=device)
    # Second-order schedulers have one entry for each evaluation of the denoiser: two for each step
    # but the last.
    evaluations = scheduler.order
    first, between, last = table.sigmas[:1], table.sigmas[1:-1], table.sigmas[-1:]
    scheduler.sigmas = torch.cat([first, between.repeat_interleave(evaluations), last])
    scheduler.timesteps = torch.cat(
        [table.timesteps[:1], table.timesteps[1:].repeat_interleave(evaluations)]
    )


def sgm_uniform_sigmas(alphas_cumprod: Tensor, steps: int) -> list[float]:
    """Return the `steps` + 1 sigmas of SGM Uniform, descending to 0.

    The timesteps are evenly spaced from 999 down, without 0. The sigma of a fractional timestep is
    interpolated between the logarithms of its neighbours, in float32. Source: `sgm_uniform` in
    https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/sd_schedulers.py

    Args:
        alphas_cumprod: cumulative products of alpha, float32 [1000].
    """
    log_sigmas = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).log()
    timesteps = torch.linspace(_TRAINING_TIMESTEPS - 1, 0, steps + 1)[:-1]
    low, high, weight = timesteps.floor().long(), timesteps.ceil().long(), timesteps.frac()
    sigmas = ((1 - weight) * log_sigmas[low] + weight * log_sigmas[high]).exp()
    return [*sigmas.tolist(), 0.0]


class FlowSchedule:
    """Euler steps along a flow, from noise (sigma 1) to data (sigma 0).

    The order of operations and the dtypes are those of `FlowMatchEulerDiscreteScheduler` of
    diffusers: the shift is computed in numpy's float32 (float64 with `ends_at_zero` or
    `ends_at_shifted_table`), everything after it in torch's float32. Timesteps are 1000 times the
    sigmas.

    If the option `scheduler` is False, the order and the dtypes are those of pipelines without a
    scheduler: the shift is computed in torch's float32, each step in the dtype of the latents, and
    the timesteps are the sigmas themselves.

    Args:
        config: options. One of the first two is required.

            * `shift`: the shift factor.
            * `dynamic_shift`: a straight line from the number of tokens to the logarithm of the
              shift factor, as two points (tokens, logarithm, tokens, logarithm).
            * `scheduler`: see above; by default True.
            * `linspace`: dtype in which the sigmas before the shift are computed, `float32` (the
              default) or `float64`.
            * `ends_at_zero`: if True, the last sigma is 0 before the shift. The last step then goes
              from 0 to 0.
            * `ends_at_shifted_table`: if True, the last sigma before the shift is the smallest
              sigma of the scheduler's training table. The table is shifted, so this sigma is
              shifted twice.
            * `terminal`: last sigma. The sigmas are stretched to it after the shift.
        steps: the number of steps; at least 2 with `terminal`.
        tokens: the number of tokens of the image, which a dynamic shift depends on.
        device: device of the latents.

    Raises:
        ValueError: `config` has an unknown option.
    """

    def __init__(
        self, config: Mapping[str, Any], steps: int, tokens: int, device: torch.device
    ) -> None:
        if unknown := config.keys() - _FLOW_OPTIONS:
            raise ValueError(f"FlowSchedule has no options {sorted(unknown)}.")
        self._has_scheduler = config.get("scheduler", True)
        sigmas: Any  # a numpy array, or a tensor without a scheduler
        if self._has_scheduler:
            sigmas = _evenly_spaced(config, steps)
        else:
            sigmas = torch.linspace(1.0, 0.0, steps + 1)
        if "dynamic_shift" in config:
            factor = math.exp(_shift_for(tokens, config["dynamic_shift"]))
            # torch computes number / tensor as number * reciprocal, which rounds twice.
            shifted = factor / (factor + (1 / sigmas - 1) ** 1.0)
        else:
            shift = config["shift"]
            shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
        if "terminal" in config:
            shifted = _stretched(shifted, config["terminal"])
        if self._has_scheduler:
            steps_sigmas = torch.from_numpy(shifted).to(dtype=torch.float32, device=device)
            self.timesteps = steps_sigmas * 1000
            self._sigmas = torch.cat([steps_sigmas, torch.zeros(1, device=device)])
        else:
            self._sigmas = shifted
            self.timesteps = shifted[:-1].to(device)
        self._index = 0

    def start(self, latents: Tensor) -> Tensor:
        return latents

    def scale(self, latents: Tensor, t: Tensor) -> Tensor:
        return latents

    def step(self, prediction: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        sigma, sigma_next = self._sigmas[self._index], self._sigmas[self._index + 1]
        self._index += 1
        if not self._has_scheduler:
            # As a Python number: a tensor would first be rounded to the dtype of the latents.
            return latents + (sigma_next - sigma).item() * prediction
        moved = latents.to(torch.float32) + (sigma_next - sigma) * prediction
        return moved.to(prediction.dtype)

    def steps_done(self, evaluations: int) -> int:
        return evaluations


_FLOW_OPTIONS = {
    "shift", "dynamic_shift", "scheduler", "linspace", "ends_at_zero", "ends_at_shifted_table",
    "terminal",
}  # fmt: skip


def _evenly_spaced(config: Mapping[str, Any], steps: int) -> NDArray[Any]:
    """Return the sigmas before the shift, evenly spaced from 1.

    The last one is 1 / steps, 0 or the smallest of the shifted training table, depending on
    `config`.

    The pipelines of diffusers compute them with torch in float32, or with numpy in float64. The
    results differ in the last bit. With `ends_at_zero` or `ends_at_shifted_table`, the scheduler
    computes them in float64.
    """
    if config.get("ends_at_zero"):
        to_zero = np.linspace(_TRAINING_TIMESTEPS, 0, steps)
        return to_zero / _TRAINING_TIMESTEPS
    if config.get("ends_at_shifted_table"):
        shift = config["shift"]
        smallest = torch.tensor(1.0) / _TRAINING_TIMESTEPS
        last = (shift * smallest / (1 + (shift - 1) * smallest)).item()
        ends = (1.0 * _TRAINING_TIMESTEPS, last * _TRAINING_TIMESTEPS)
        return np.linspace(*ends, steps) / _TRAINING_TIMESTEPS
    if config.get("linspace", "float32") == "float64":
        return np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas: NDArray[Any] = torch.linspace(1.0, 1 / steps, steps).numpy()
    return sigmas


def _stretched(sigmas: NDArray[Any], terminal: float) -> NDArray[Any]:
    """Return the sigmas stretched away from 1 so that the last one is `terminal`.

    A single sigma of 1 cannot be stretched and becomes NaN.
    """
    from_one = 1 - sigmas
    stretched: NDArray[Any] = 1 - from_one / (from_one[-1] / (1 - terminal))
    return stretched


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
