"""Samplers of k-diffusion, as ComfyUI and AUTOMATIC1111's web UI use them.

The formulas are those of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
Models" (2022), of Lu et al., "DPM-Solver++" (2022), and of Ho et al., "Denoising Diffusion
Probabilistic Models" (2020) in terms of sigma. Order of evaluations and of random draws:
https://github.com/crowsonkb/k-diffusion, `k_diffusion/sampling.py`, and
https://github.com/comfyanonymous/ComfyUI, `comfy/k_diffusion/sampling.py`.

The samplers with `sde` in their name draw increments of a Brownian path (`brownian.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from scipy import integrate
from torch import Tensor

Denoised = Callable[[Tensor, float], Tensor]
"""Denoiser: returns the denoised latents for latents and their noise level."""
Draw = Callable[[float, float], Tensor]
"""Returns standard normal numbers in the shape of the latents, for a step between two levels."""

_LMS_ORDER = 4


def _ancestral(sigma: float, following: float) -> tuple[float, float]:
    """Return the level to step down to, and the level of the noise that is added after it."""
    added = following * math.sqrt(1 - (following / sigma) ** 2)
    added = min(following, added)
    return math.sqrt(following**2 - added**2), added


def _slope(latents: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    return (latents - denoised) / sigma


def _euler(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x = x + _slope(x, model(x, sigma), sigma) * (following - sigma)
    return x


def _euler_ancestral(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        down, added = _ancestral(sigma, following)
        x = x + _slope(x, model(x, sigma), sigma) * (down - sigma)
        if following > 0:
            x = x + draw(sigma, following) * added
    return x


def _heun(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        slope = _slope(x, model(x, sigma), sigma)
        if following > 0:
            ahead = x + slope * (following - sigma)
            slope = (slope + _slope(ahead, model(ahead, following), following)) / 2
        x = x + slope * (following - sigma)
    return x


def _midpoint(model: Denoised, x: Tensor, sigma: float, target: float) -> Tensor:
    """Step to the level `target` with the slope at the geometric mean of both levels."""
    slope = _slope(x, model(x, sigma), sigma)
    if target > 0:
        middle = math.sqrt(sigma * target)
        halfway = x + slope * (middle - sigma)
        slope = _slope(halfway, model(halfway, middle), middle)
    return x + slope * (target - sigma)


def _dpm_2(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x = _midpoint(model, x, sigma, following)
    return x


def _dpm_2_ancestral(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        down, added = _ancestral(sigma, following)
        x = _midpoint(model, x, sigma, down)
        if following > 0:
            x = x + draw(sigma, following) * added
    return x


def _lms(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    slopes: list[Tensor] = []
    for index, sigma in enumerate(sigmas[:-1]):
        slopes = [_slope(x, model(x, sigma), sigma), *slopes][:_LMS_ORDER]
        known = [sigmas[index - back] for back in range(len(slopes))]
        for number, slope in enumerate(slopes):
            x = x + slope * _lagrange_integral(known, number, sigma, sigmas[index + 1])
    return x


def _lagrange_integral(nodes: Sequence[float], number: int, start: float, end: float) -> float:
    """Integrate the Lagrange polynomial that is 1 at one node and 0 at the others."""
    others = [node for index, node in enumerate(nodes) if index != number]

    def polynomial(at: float) -> float:
        return math.prod((at - node) / (nodes[number] - node) for node in others)

    return float(integrate.quad(polynomial, start, end, epsrel=1e-4)[0])


def _exponential_step(x: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """Step to the level `target`; exact if `denoised` does not change during the step."""
    ratio = target / sigma
    return ratio * x + (1 - ratio) * denoised


def _dpmpp_2m(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    previous: Tensor | None = None
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma)
        estimate = denoised
        if previous is not None and following > 0:
            ratio = math.log(sigmas[index - 1] / sigma) / math.log(sigma / following)
            estimate = denoised + (denoised - previous) / (2 * ratio)
        x = _exponential_step(x, estimate, sigma, following)
        previous = denoised
    return x


def _dpmpp_2s_ancestral(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        down, added = _ancestral(sigma, following)
        denoised = model(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            denoised = model(_exponential_step(x, denoised, sigma, middle), middle)
        x = _exponential_step(x, denoised, sigma, down)
        if following > 0:
            x = x + draw(sigma, following) * added
    return x


def _dpmpp_sde(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        middle = math.sqrt(sigma * following)
        down, added = _ancestral(sigma, middle)
        halfway = _exponential_step(x, denoised, sigma, down) + draw(sigma, middle) * added
        denoised = model(halfway, middle)
        down, added = _ancestral(sigma, following)
        x = _exponential_step(x, denoised, sigma, down) + draw(sigma, following) * added
    return x


def _dpmpp_2m_sde(
    model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw, *, is_heun: bool = False
) -> Tensor:
    previous: Tensor | None = None
    last = 0.0
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        width = math.log(sigma / following)
        share = -math.expm1(-2 * width)
        x = (following / sigma) ** 2 * x + share * denoised
        if previous is not None:
            factor = 1 - share / (2 * width) if is_heun else share / 2
            x = x + factor * (width / last) * (denoised - previous)
        x = x + draw(sigma, following) * (following * math.sqrt(share))
        previous, last = denoised, width
    return x


def _ddpm(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    """Sample from the posterior of Ho et al., equation 7, with the smaller variance."""
    for sigma, following in pairwise(sigmas):
        noise = _slope(x, model(x, sigma), sigma)
        share, next_share = 1 / (sigma**2 + 1), 1 / (following**2 + 1)
        alpha = share / next_share
        scaled = x * math.sqrt(share)
        mean = (scaled - noise * ((1 - alpha) / math.sqrt(1 - share))) / math.sqrt(alpha)
        if following > 0:
            mean = mean + draw(sigma, following) * math.sqrt(
                (1 - alpha) * (1 - next_share) / (1 - share)
            )
            mean = mean / math.sqrt(next_share)
        x = mean
    return x


def _lcm(model: Denoised, x: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x = model(x, sigma)
        if following > 0:
            x = x + draw(sigma, following) * following
    return x


SAMPLERS: Mapping[str, Callable[[Denoised, Tensor, Sequence[float], Draw], Tensor]] = {
    "euler": _euler,
    "euler_ancestral": _euler_ancestral,
    "heun": _heun,
    "dpm_2": _dpm_2,
    "dpm_2_ancestral": _dpm_2_ancestral,
    "lms": _lms,
    "dpmpp_2m": _dpmpp_2m,
    "dpmpp_2s_ancestral": _dpmpp_2s_ancestral,
    "dpmpp_sde": _dpmpp_sde,
    "dpmpp_2m_sde": _dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": partial(_dpmpp_2m_sde, is_heun=True),
    "dpmpp_sde_gpu": _dpmpp_sde,
    "dpmpp_2m_sde_gpu": _dpmpp_2m_sde,
    "dpmpp_2m_sde_heun_gpu": partial(_dpmpp_2m_sde, is_heun=True),
    "ddpm": _ddpm,
    "lcm": _lcm,
}
"""Function by sampler, in ComfyUI's spelling, that returns the latents of the last level."""

BROWNIAN = frozenset(name for name in SAMPLERS if "sde" in name)
"""Samplers that draw increments of a Brownian path."""
DRAWING = BROWNIAN | {"euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "ddpm", "lcm"}
"""Samplers that draw random numbers in their steps."""
TWO_EVALUATIONS = frozenset(
    {"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_sde_gpu"}
)
"""Samplers that evaluate the denoiser twice per step."""


def sample(
    sampler: str, model: Denoised, latents: Tensor, sigmas: Sequence[float], draw: Draw
) -> Tensor:
    """Run all steps of a sampler.

    Args:
        sampler: one of `SAMPLERS`.
        latents: initial latents [1, 4, height / 8, width / 8], at the first level.
        sigmas: result of `sigmas_of`.
        draw: returns new random numbers at each call.

    Returns:
        latents, scaled to unit variance if the last level is above 0, as in A1111's DDIM.
    """
    result = SAMPLERS[sampler](model, latents, sigmas, draw)
    return result / math.sqrt(1 + sigmas[-1] ** 2)
