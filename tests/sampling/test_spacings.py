"""Timestep spacings: the timesteps of diffusers, and SGM Uniform as its authors define it.

The steps of diffusers' schedulers are compared with the formulas of k-diffusion, computed here in
float64, on a small function instead of a denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from fidelora.families import get_family
from fidelora.families.spec import NoiseSampler
from fidelora.sampling.noise import NoiseSource
from fidelora.sampling.schedules import NoiseSchedule, sgm_uniform_sigmas, trailing_timesteps
from fidelora.sampling.spacings import TimestepSpacing

CPU = torch.device("cpu")
SHAPE = (1, 4, 8, 8)
SD15 = get_family("sd15")
ALPHAS = EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
).alphas_cumprod


def schedule_of(sampler: str, steps: int, spacing: TimestepSpacing, seed: int = 3) -> NoiseSchedule:
    spec = SD15.samplers[sampler]
    assert isinstance(spec, NoiseSampler)
    noise = NoiseSource([seed], "modern")
    return NoiseSchedule(spec.scheduler, spec.config, steps, CPU, noise, spacing, spec.eta)


def prediction(scaled: Tensor, t: Tensor | float) -> Tensor:
    """Return a noise prediction that depends on the latents and the timestep."""
    return torch.tanh(scaled * 0.8 + 0.1) * (0.9 + float(t) / 10_000)


def run(schedule: NoiseSchedule) -> Tensor:
    latents = schedule.start(start())
    for t in schedule.timesteps:
        latents = schedule.step(prediction(schedule.scale(latents, t), t), t, latents)
    return latents


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


# --- timesteps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 51))
def test_trailing_timesteps_are_those_of_diffusers(steps):
    theirs = EulerDiscreteScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert trailing_timesteps(steps) == theirs.timesteps.tolist()


def test_dmd2_gets_the_timesteps_of_its_model_card():
    assert schedule_of("lcm", 4, "trailing").timesteps.tolist() == [999, 749, 499, 249]
    assert schedule_of("lcm", 4, "default").timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 30])
@pytest.mark.parametrize("sampler", [name for name, one in SD15.samplers.items() if one.spacings])
def test_trailing_schedules_have_valid_timesteps(sampler, steps):
    schedule = schedule_of(sampler, steps, "trailing")
    assert schedule.timesteps[0].round() == 999
    assert schedule.timesteps.min() >= 0
    assert schedule.steps_done(len(schedule.timesteps)) == steps
    assert run(schedule).isfinite().all()


@pytest.mark.parametrize("sampler", [name for name, one in SD15.samplers.items() if one.spacings])
def test_every_spacing_changes_the_schedule(sampler):
    default = run(schedule_of(sampler, 6, "default"))
    for spacing in SD15.samplers[sampler].spacings:
        assert not torch.equal(run(schedule_of(sampler, 6, spacing)), default)


# --- SGM Uniform --------------------------------------------------------------------------------


def sigma_at(t: float) -> float:
    """Return the sigma of a fractional timestep in float64, interpolated between logarithms."""
    logs = np.log(np.sqrt((1 - ALPHAS.double().numpy()) / ALPHAS.double().numpy()))
    return float(np.exp(np.interp(t, np.arange(1000), logs)))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25, 150])
def test_sgm_uniform_spaces_timesteps_evenly_without_0(steps):
    expected = [sigma_at(999 * (1 - step / steps)) for step in range(steps)]
    sigmas = sgm_uniform_sigmas(ALPHAS, steps)
    assert sigmas[-1] == 0
    np.testing.assert_allclose(sigmas[:-1], expected, rtol=2e-5)
    schedule = schedule_of("euler", steps, "sgm_uniform")
    np.testing.assert_allclose(
        schedule.timesteps, [999 * (1 - step / steps) for step in range(steps)], atol=0.01
    )
    # As in AUTOMATIC1111, the initial noise is multiplied by the first sigma.
    torch.testing.assert_close(schedule.start(torch.ones(1)), torch.tensor([sigma_at(999)]))


def denoised(x: Tensor, sigma: float, t: float) -> Tensor:
    return x - sigma * prediction(x / math.sqrt(1 + sigma**2), t)


def euler(x: Tensor, sigmas: list[float], times: list[float], noise: NoiseSource) -> Tensor:
    for index, t in enumerate(times):
        slope = (x - denoised(x, sigmas[index], t)) / sigmas[index]
        x = x + slope * (sigmas[index + 1] - sigmas[index])
    return x


def ancestral(x: Tensor, sigmas: list[float], times: list[float], noise: NoiseSource) -> Tensor:
    for index, t in enumerate(times):
        here, there = sigmas[index], sigmas[index + 1]
        up = math.sqrt(there**2 * (here**2 - there**2) / here**2)
        down = math.sqrt(there**2 - up**2)
        x = x + (x - denoised(x, here, t)) / here * (down - here)
        # diffusers also draws in the last step, where `up` is 0.
        x = x + torch.randn(SHAPE, generator=noise.generators[0]).double() * up
    return x


def heun(x: Tensor, sigmas: list[float], times: list[float], noise: NoiseSource) -> Tensor:
    for index, t in enumerate(times):
        here, there = sigmas[index], sigmas[index + 1]
        slope = (x - denoised(x, here, t)) / here
        moved = x + slope * (there - here)
        if there > 0:
            second = (moved - denoised(moved, there, times[index + 1])) / there
            moved = x + (slope + second) / 2 * (there - here)
        x = moved
    return x


def dpmpp_2m(x: Tensor, sigmas: list[float], times: list[float], noise: NoiseSource) -> Tensor:
    old: Tensor | None = None
    for index, t in enumerate(times):
        here, there = sigmas[index], sigmas[index + 1]
        result = denoised(x, here, t)
        if old is None or there == 0:
            used = result
        else:
            ratio = math.log(sigmas[index - 1] / here) / math.log(here / there)
            used = (1 + 1 / (2 * ratio)) * result - 1 / (2 * ratio) * old
        x = (there / here) * x + (1 - there / here) * used
        old = result
    return x


Formula = Callable[[Tensor, list[float], list[float], NoiseSource], Tensor]
FORMULAS: dict[str, Formula] = {
    "euler": euler, "euler_a": ancestral, "heun": heun, "dpmsolver++": dpmpp_2m,
}  # fmt: skip


def test_every_sampler_with_sgm_uniform_is_compared_here():
    listed = {name for name, one in SD15.samplers.items() if "sgm_uniform" in one.spacings}
    assert FORMULAS.keys() == listed


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("sampler", FORMULAS)
def test_sgm_uniform_follows_the_formulas_of_k_diffusion(sampler, steps):
    sigmas = [*(sigma_at(999 * (1 - step / steps)) for step in range(steps)), 0.0]
    times = [999 * (1 - step / steps) for step in range(steps)]
    schedule = schedule_of(sampler, steps, "sgm_uniform")
    x = schedule.start(start()).double()
    if sampler == "dpmsolver++":  # diffusers' latents have variance 1 here
        x = x * math.sqrt(1 + sigmas[0] ** 2)
    expected = FORMULAS[sampler](x, sigmas, times, NoiseSource([3], "modern"))
    torch.testing.assert_close(run(schedule).double(), expected, rtol=2e-3, atol=2e-3)


# --- TCD ----------------------------------------------------------------------------------------


def test_tcd_draws_once_in_each_step_but_the_last():
    """The order of the draws: the initial noise first, then one draw per step."""
    noise = NoiseSource([9], "modern")
    spec = SD15.samplers["tcd"]
    assert isinstance(spec, NoiseSampler)
    schedule = NoiseSchedule(spec.scheduler, spec.config, 4, CPU, noise, "default", spec.eta)
    run(schedule)
    after = torch.randn(SHAPE, generator=noise.generators[0])
    expected = torch.Generator().manual_seed(9)
    draws = [torch.randn(SHAPE, generator=expected) for _ in range(4)]
    assert torch.equal(after, draws[3])


def test_tcd_draws_nothing_at_eta_0():
    noise = NoiseSource([9], "modern")
    spec = SD15.samplers["tcd"]
    assert isinstance(spec, NoiseSampler)
    run(NoiseSchedule(spec.scheduler, spec.config, 4, CPU, noise, "default", 0.0))
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    assert torch.equal(torch.randn(SHAPE, generator=noise.generators[0]), first)
