"""Noise levels (sigmas) of k-diffusion's schedules, as ComfyUI and AUTOMATIC1111's web UI use them.

diffusers' schedulers select other levels: they begin at the timestep 958 or 999, and the trainer's
configuration spaces them by `leading`.

Sources: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022),
equation 5; https://github.com/crowsonkb/k-diffusion, `k_diffusion/sampling.py` and `external.py`;
https://github.com/comfyanonymous/ComfyUI, `comfy/samplers.py`;
https://github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/sd_schedulers.py` and
`modules/sd_samplers_timesteps.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fidelora.sampling.schedules import sgm_uniform_sigmas

_TIMESTEPS = 1000
_BETA_START, _BETA_END = 0.00085, 0.012
_LCM_SPACING = 20  # timesteps per level of A1111's LCM, whose models are distilled to 50 levels
_RHO = 7.0  # curvature of Karras' schedule


class NoiseLevels(NamedTuple):
    """Noise levels that Stable Diffusion 1.5 and SDXL were trained with.

    Attributes:
        sigmas: float32 [1000], ascending.
        log_sigmas: their logarithms.
        spacing: number of trained timesteps per level, 1 unless only every n-th level is used.
    """

    sigmas: Tensor
    log_sigmas: Tensor
    spacing: int = 1

    @classmethod
    def of_stable_diffusion(cls) -> NoiseLevels:
        """Return the levels of the "scaled linear" schedule of betas."""
        betas = torch.linspace(_BETA_START**0.5, _BETA_END**0.5, _TIMESTEPS, dtype=torch.float64)
        alphas = torch.cumprod(1 - betas**2, 0)
        sigmas = ((1 - alphas) / alphas) ** 0.5
        return cls(sigmas.float(), sigmas.log().float())

    def for_lcm(self) -> NoiseLevels:
        """Return every 20th level, which A1111's sampler LCM uses."""
        first = _LCM_SPACING - 1
        return NoiseLevels(
            self.sigmas[first::_LCM_SPACING], self.log_sigmas[first::_LCM_SPACING], _LCM_SPACING
        )

    @property
    def size(self) -> int:
        """Number of levels."""
        return len(self.sigmas)

    @property
    def smallest(self) -> float:
        """The first level."""
        return float(self.sigmas[0])

    @property
    def largest(self) -> float:
        """The last level, that of timestep 999."""
        return float(self.sigmas[-1])

    def at(self, position: float) -> float:
        """Return the level at a position; the logarithm is interpolated between neighbours."""
        low, high = math.floor(position), math.ceil(position)
        weight = position - low
        log = (1 - weight) * self.log_sigmas[low] + weight * self.log_sigmas[high]
        return float(log.exp())

    def timestep(self, sigma: float, *, whole: bool) -> float:
        """Return the timestep of a level: the nearest one, or a fraction between neighbours."""
        log = math.log(sigma)
        if whole or self.spacing > 1:
            nearest = int((self.log_sigmas - log).abs().argmin())
            return float((nearest + 1) * self.spacing - 1)
        index = int(torch.searchsorted(self.log_sigmas, torch.tensor(log), right=True)) - 1
        low = min(max(index, 0), _TIMESTEPS - 2)
        first, second = float(self.log_sigmas[low]), float(self.log_sigmas[low + 1])
        return low + min(max((log - first) / (second - first), 0.0), 1.0)


Levels = list[float]


def _normal(levels: NoiseLevels, steps: int) -> Levels:
    """Timesteps evenly spaced from 999 to 0: `Uniform` in A1111, `normal` in ComfyUI."""
    timesteps = torch.linspace(levels.size - 1, 0, steps)
    return [levels.at(float(t)) for t in timesteps] + [0.0]


def _karras(levels: NoiseLevels, steps: int) -> Levels:
    ramp = torch.linspace(0, 1, steps)
    low, high = levels.smallest ** (1 / _RHO), levels.largest ** (1 / _RHO)
    spaced: Tensor = (high + ramp * (low - high)) ** _RHO
    return [*spaced.tolist(), 0.0]


def _exponential(levels: NoiseLevels, steps: int) -> Levels:
    logs = torch.linspace(math.log(levels.largest), math.log(levels.smallest), steps)
    return [*logs.exp().tolist(), 0.0]


def _sgm_uniform(levels: NoiseLevels, steps: int) -> Levels:
    if levels.size == _TIMESTEPS:
        return sgm_uniform_sigmas(1 / (1 + levels.sigmas**2), steps)
    positions = torch.linspace(levels.size - 1, 0, steps + 1)[:-1]
    return [levels.at(float(position)) for position in positions] + [0.0]


def _simple(levels: NoiseLevels, steps: int) -> Levels:
    """Every n-th trained level from the largest down."""
    stride = levels.size / steps
    return [float(levels.sigmas[-(1 + int(step * stride))]) for step in range(steps)] + [0.0]


def _ddim_uniform(levels: NoiseLevels, steps: int) -> Levels:
    """Every n-th trained level from timestep 1 up; may have more steps than requested."""
    indices = range(1, levels.size, max(levels.size // steps, 1))
    return [float(levels.sigmas[index]) for index in reversed(indices)] + [0.0]


def _ddim_timesteps(levels: NoiseLevels, steps: int) -> Levels:
    """The levels of A1111's DDIM, with one step less; the last one is that of timestep 1."""
    indices = range(0, _TIMESTEPS, _TIMESTEPS // steps)
    return [float(levels.sigmas[min(index + 1, 999)]) for index in reversed(indices)]


def _beta(levels: NoiseLevels, steps: int) -> Levels:
    """Timesteps at quantiles of the beta distribution (Lee et al., arXiv:2407.12173)."""
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
    indices = np.rint(quantiles * (_TIMESTEPS - 1)).astype(int).tolist()
    return [float(levels.sigmas[index]) for index in dict.fromkeys(indices)] + [0.0]


def _beta_of_sigmas(levels: NoiseLevels, steps: int) -> Levels:
    """Levels, not timesteps, at quantiles of the beta distribution, as in A1111."""
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)
    low, high = levels.smallest, levels.largest
    return [float(low + quantile * (high - low)) for quantile in quantiles] + [0.0]


def _kl_optimal(levels: NoiseLevels, steps: int) -> Levels:
    """Evenly spaced arc tangents (Sabour et al., "Align Your Steps", 2024)."""
    share = torch.arange(steps) / max(steps - 1, 1)
    low, high = math.atan(levels.smallest), math.atan(levels.largest)
    return [*torch.tan(share * low + (1 - share) * high).tolist(), 0.0]


SCHEDULES: Mapping[str, Callable[[NoiseLevels, int], Levels]] = {
    "normal": _normal,
    "karras": _karras,
    "exponential": _exponential,
    "sgm_uniform": _sgm_uniform,
    "simple": _simple,
    "ddim_uniform": _ddim_uniform,
    "ddim_timesteps": _ddim_timesteps,
    "beta": _beta,
    "beta_of_sigmas": _beta_of_sigmas,
    "kl_optimal": _kl_optimal,
}
"""Function by schedule that returns the levels of all steps, descending, and the last level.

Most names are ComfyUI's. `ddim_timesteps` and `beta_of_sigmas` are A1111's `DDIM` and `Beta`.
"""

_SECOND_ORDER_IN_THE_MIDDLE = frozenset({"dpm_2", "dpm_2_ancestral"})
"""Samplers for which both programs make one step more and skip the last level above zero."""


def sigmas_of(levels: NoiseLevels, sampler: str, schedule: str, steps: int) -> Levels:
    """Return the levels of a sampler, usually `steps` + 1; the last one is usually 0.

    Raises:
        KeyError: `schedule` is not one of `SCHEDULES`.
    """
    if sampler in _SECOND_ORDER_IN_THE_MIDDLE:
        found = SCHEDULES[schedule](levels, steps + 1)
        return [*found[:-2], found[-1]]
    return SCHEDULES[schedule](levels, steps)
