"""From latents to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from fidelora.errors import NumericsError


def decode(vae: AutoencoderKL, latents: Tensor, *, upcast: bool = False) -> NDArray[np.uint8]:
    """The image of `latents` [1, 4, h, w]: uint8 RGB [8h, 8w, 3].

    Args:
        upcast: whether the VAE was made wider than the dtype that was asked for; then its pipeline makes the latents wider first.

    Raises:
        NumericsError: the model produced NaN.
    """
    # In the trainer's order: the division in the latents' dtype, [-1, 1] to [0, 1] in the VAE's, the rest in float32.
    if upcast:
        latents = latents.to(vae.dtype)
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    image = vae.decode(scaled, return_dict=False)[0]
    image = (image * 0.5 + 0.5).clamp(0, 1)
    values = image.cpu().permute(0, 2, 3, 1).float().numpy()[0]
    if not np.isfinite(values).all():
        narrow = torch.float16 in (latents.dtype, vae.dtype)
        advice = (
            "float16 overflows with some models: use bfloat16 or float32"
            if narrow
            else "look for an adapter or settings that break it"
        )
        raise NumericsError(f"The model produced NaN, so there is no image; {advice}.")
    pixels: NDArray[np.uint8] = (values * 255).round().astype(np.uint8)
    return pixels


def rough_colours(latents: Tensor, colours: Sequence[Sequence[float]]) -> NDArray[np.uint8]:
    """What unfinished `latents` [4, h, w] look like, without the VAE: uint8 RGB [h, w, 3]. For the eye only.

    Args:
        colours: see `Family.latent_colours`.
    """
    values = latents.detach().float().cpu()
    values = values / values.std().clamp(
        min=1.0
    )  # some samplers begin with noise of more than ten times the usual size
    image = torch.einsum("chw,cr->hwr", values, torch.tensor(colours))
    shown: NDArray[np.uint8] = (
        ((image.clamp(-1, 1) + 1) * 127.5).nan_to_num(0).to(torch.uint8).numpy()
    )
    return shown
