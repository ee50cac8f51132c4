"""The algorithm: from noise to latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fidelora.sampling.noise import NoiseSource
from fidelora.sampling.schedules import draws_of_step

Predict = Callable[[Tensor, Tensor], Tensor]
"""The UNet with its text: latents [batch, 4, height / 8, width / 8] and a timestep to a prediction like the latents."""


def denoise(
    predict: Predict,
    scheduler: Any,
    latents: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    noise: NoiseSource,
    on_step: Callable[[int, Tensor], None],
) -> Tensor:
    """Sample latents.

    Args:
        predict: with guidance (`guidance_scale` > 1) it is given the latents twice, and predicts for the negative prompts first.
        scheduler: at the beginning of its steps.
        guidance_rescale: 0..1; how far the guided prediction is brought back to the spread of the prompt's own.
        latents: the initial noise [images, 4, height / 8, width / 8], the first draw from `noise`.
        noise: where all other random numbers come from: each step's own draws.
        on_step: called after each evaluation of the UNet with the number of steps that are done and the latents as they are, which
            it must not change; may raise to cancel.

    Returns:
        latents like the initial ones.
    """
    guided = guidance_scale > 1
    draws = draws_of_step(scheduler, noise)

    latents = latents * scheduler.init_noise_sigma
    for evaluation, t in enumerate(scheduler.timesteps, start=1):
        # Both halves go through the UNet in one batch: two batches of one can differ from it in the last bit.
        model_input = torch.cat([latents] * 2) if guided else latents
        model_input = scheduler.scale_model_input(model_input, t)
        prediction = predict(model_input, t)
        if guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + guidance_scale * (positive - negative)
            if guidance_rescale > 0:
                prediction = _rescaled(prediction, positive, guidance_rescale)
        with noise.drawing():
            latents = scheduler.step(prediction, t, latents, **draws, return_dict=False)[0]
        # Samplers of second order evaluate twice a step, pndm once more than there are steps.
        on_step(min(-(-evaluation // scheduler.order), steps), latents)
    return latents


def _rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Guidance widens the spread of a prediction, which overexposes; `share` of that is mended, in diffusers' order of operations.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), section 3.4.
    """
    each = list(range(1, guided.dim()))  # of one image: the spread is not shared within a batch
    spread = guided * (positive.std(dim=each, keepdim=True) / guided.std(dim=each, keepdim=True))
    return share * spread + (1 - share) * guided
