"""Schedules: the same sigmas and steps as diffusers' schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from fidelora.families import get_family
from fidelora.sampling.schedules import FlowSchedule

CPU = torch.device("cpu")


def diffusers_scheduler(steps: int, *, mu: float | None = None, shift: float = 1.0):
    """Return diffusers' scheduler with the sigmas that pipelines pass."""
    options = {"use_dynamic_shifting": True} if mu is not None else {"shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        {"num_train_timesteps": 1000, "time_shift_type": "exponential", **options}
    )
    sigmas = torch.linspace(1.0, 1 / steps, steps).numpy()
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 9, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_static_shift_has_the_bits_of_diffusers(steps, shift):
    ours, other = (
        FlowSchedule({"shift": shift}, steps, 64, CPU),
        diffusers_scheduler(steps, shift=shift),
    )
    assert torch.equal(ours.timesteps, other.timesteps)
    torch.manual_seed(1)
    mine = yours = torch.randn(1, 16, 8, 8)
    for t in ours.timesteps:
        prediction = torch.randn(1, 16, 8, 8)
        mine = ours.step(prediction, t, ours.scale(mine, t))
        yours = other.step(prediction, t, yours, return_dict=False)[0]
        assert torch.equal(mine, yours)
    assert ours.steps_done(steps) == steps


@pytest.mark.parametrize("steps", [1, 6, 12])
def test_sigmas_can_be_spaced_in_float64(steps):
    other = FlowMatchEulerDiscreteScheduler(shift=1.0)
    other.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    ours = FlowSchedule({"shift": 1.0, "linspace": "float64"}, steps, 64, CPU)
    assert torch.equal(ours.timesteps, other.timesteps)
    default = FlowSchedule({"shift": 1.0}, steps, 64, CPU)
    assert torch.equal(ours.timesteps, default.timesteps) == (steps == 1)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
def test_a_dynamic_shift_grows_with_the_tokens(tokens):
    line = (256, 0.5, 4096, 1.15)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    ours = FlowSchedule({"dynamic_shift": line}, 7, tokens, CPU)
    torch.testing.assert_close(ours.timesteps, diffusers_scheduler(7, mu=mu).timesteps)
    assert not torch.equal(ours.timesteps, FlowSchedule({"shift": 1.0}, 7, tokens, CPU).timesteps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_scheduler_steps_are_in_the_dtype_of_the_latents(dtype):
    line = (256, 0.5, 4096, 1.15)
    ours = FlowSchedule({"dynamic_shift": line, "scheduler": False}, 4, 256, CPU)
    factor = math.exp(0.5)
    shifted = [factor / (factor + 1 / sigma - 1) for sigma in (1.0, 0.75, 0.5, 0.25)]
    assert ours.timesteps.tolist() == pytest.approx(shifted)
    sigmas = [*ours.timesteps.tolist(), 0.0]
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 8, 8).to(dtype)
    for index, t in enumerate(ours.timesteps):
        prediction = torch.randn(1, 4, 8, 8).to(dtype)
        expected = latents + (sigmas[index + 1] - sigmas[index]) * prediction
        latents = ours.step(prediction, t, latents)
        assert latents.dtype == dtype
        assert torch.equal(latents, expected)
    assert ours.steps_done(4) == 4


@pytest.mark.parametrize("steps", [2, 6, 25])
@pytest.mark.parametrize("tokens", [24, 4096])
def test_the_sigmas_of_qwen_image_have_the_bits_of_diffusers(steps, tokens):
    """Its pipeline computes them with numpy, and its scheduler stretches them to 0.02."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    config = {"dynamic_shift": (256, 0.5, 8192, 0.9), "terminal": 0.02, "linspace": "float64"}
    ours = FlowSchedule(config, steps, tokens, CPU)
    assert torch.equal(ours.timesteps, scheduler.timesteps)
    assert float(ours.timesteps[-1]) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("model", ["flux", "flex1", "flux_cfg", "chroma"])
@pytest.mark.parametrize("tokens", [20, 24, 32, 4096])
def test_the_sigmas_of_flux_have_the_bits_of_diffusers(model, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    config = get_family(model).samplers["flowmatch"].config
    for steps in range(1, 51):
        mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        ours = FlowSchedule(config, steps, tokens, CPU)
        assert torch.equal(ours.timesteps, scheduler.timesteps), steps


def test_the_precision_of_the_even_spacing_changes_the_last_bit():
    one, other = (
        FlowSchedule({"shift": 1.0, "linspace": precision}, 25, 64, CPU).timesteps
        for precision in ("float32", "float64")
    )
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other)


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="steps_offset"):
        FlowSchedule({"shift": 3.0, "steps_offset": 1}, 4, 64, CPU)
