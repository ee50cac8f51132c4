"""The sampling loop that every model family shares."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fidelora.sampling.noise import NoiseSource
from fidelora.sampling.schedules import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Maps latents and a timestep to the guided prediction, which has the shape of the latents."""


def sample(
    denoise: Denoise,
    schedule: Schedule,
    latents: Tensor,
    noise: NoiseSource,
    on_step: Callable[[int, Tensor], None],
) -> Tensor:
    """Run all steps of a schedule on the initial noise.

    Args:
        denoise: the family's denoiser with conditioning and guidance.
        schedule: a new schedule, at its first step.
        latents: the initial noise [images, ...], the first draw from `noise`.
        noise: source of the random numbers that the sampler draws in its steps.
        on_step: called after each evaluation of the denoiser with `schedule.steps_done` and the
            latents, which it must not change; may raise to cancel.

    Returns:
        the denoised latents, in the shape of the initial noise.
    """
    latents = schedule.start(latents)
    for evaluation, t in enumerate(schedule.timesteps, start=1):
        prediction = denoise(schedule.scale(latents, t), t)
        with noise.drawing():
            latents = schedule.step(prediction, t, latents)
        on_step(schedule.steps_done(evaluation), latents)
    return latents
