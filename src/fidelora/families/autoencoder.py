"""Convert latents to pixels with diffusers' `AutoencoderKL`, or to previews without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fidelora.errors import NumericsError


def unscale(latents: Tensor, config: Any) -> Tensor:
    """Undo the scaling that the decoder's configuration defines, in the dtype of `latents`."""
    latents = latents / config.scaling_factor
    shift = getattr(config, "shift_factor", None)
    return latents + shift if shift else latents


def decode(vae: Any, latents: Tensor) -> NDArray[np.uint8]:
    """Decode unscaled `latents` [1, channels, h, w] to uint8 RGB [8h, 8w, 3].

    Raises:
        NumericsError: the model produced NaN.
    """
    image = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return to_pixels(image, is_float16=torch.float16 in (latents.dtype, vae.dtype))


def to_pixels(image: Tensor, *, is_float16: bool) -> NDArray[np.uint8]:
    """Convert a decoded image [1, 3, height, width], -1..1, to uint8 RGB [height, width, 3].

    As in the trainer, values are mapped to [0, 1] in the dtype of `image`; later steps are computed
    in float32.

    Args:
        is_float16: True if a part of the model computed in float16.

    Raises:
        NumericsError: the model produced NaN.
    """
    image = (image * 0.5 + 0.5).clamp(0, 1)
    values = image.cpu().permute(0, 2, 3, 1).float().numpy()[0]
    if not np.isfinite(values).all():
        advice = (
            "float16 overflows with some models: use bfloat16 or float32"
            if is_float16
            else "try it without adapters, and with default settings"
        )
        raise NumericsError(f"The model produced NaN instead of an image; {advice}.")
    pixels: NDArray[np.uint8] = (values * 255).round().astype(np.uint8)
    return pixels


def rough_colours(latents: Tensor, colours: Sequence[Sequence[float]]) -> NDArray[np.uint8]:
    """Return a preview of unfinished `latents` [channels, h, w] as uint8 RGB [h, w, 3].

    Args:
        colours: see `Family.latent_preview`.
    """
    values = latents.detach().float().cpu()
    # Scale down: some samplers begin with noise whose standard deviation is above 10.
    values = values / values.std().clamp(min=1.0)
    image = torch.einsum("chw,cr->hwr", values, torch.tensor(colours))
    scaled = (image.clamp(-1, 1) + 1) * 127.5
    picture: NDArray[np.uint8] = scaled.nan_to_num(0).to(torch.uint8).numpy()
    return picture
