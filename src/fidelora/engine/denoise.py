"""The algorithm: from noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fidelora.engine.noise import NoiseSource
from fidelora.engine.samplers import draws_of_step


def denoise(
    unet: UNet2DConditionModel,
    scheduler: Any,
    text: Tensor,
    shape: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    noise: NoiseSource,
    device: torch.device,
    on_step: Callable[[int, Tensor], None],
) -> Tensor:
    """Sample latents.

    Args:
        text: [2, 77, width], the negative prompt first, with guidance; [1, 77, width] without.
        shape: of the latents: (1, 4, height / 8, width / 8).
        guidance_scale: how far to go beyond the prompt's prediction, away from the negative prompt's.
        noise: where every random number comes from, in this order: the initial latents, then each step's own draws.
        on_step: called after each evaluation of the UNet with the number of steps that are done and the latents as they are, which
            it must not change; may raise to cancel.

    Returns:
        latents in the dtype of the UNet.
    """
    guided = text.shape[0] == 2
    scheduler.set_timesteps(steps, device=device)
    draws = draws_of_step(scheduler, noise)

    latents: Tensor = noise.initial(shape, unet.dtype).to(device) * scheduler.init_noise_sigma
    for evaluation, t in enumerate(scheduler.timesteps, start=1):
        # Both halves go through the UNet in one batch: two batches of one can differ from it in the last bit.
        model_input = torch.cat([latents] * 2) if guided else latents
        model_input = scheduler.scale_model_input(model_input, t)
        prediction = unet(model_input, t, encoder_hidden_states=text, return_dict=False)[0]
        if guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + guidance_scale * (positive - negative)
        with noise.drawing():
            latents = scheduler.step(prediction, t, latents, **draws, return_dict=False)[0]
        # Samplers of second order evaluate twice a step, pndm once more than there are steps.
        on_step(min(-(-evaluation // scheduler.order), steps), latents)
    return latents
