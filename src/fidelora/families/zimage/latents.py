"""Latents of Z-Image: the 16 channels of FLUX.1's VAE, not packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.autoencoder import decode, rough_colours, unscale
from fidelora.families.protocols import Size
from fidelora.families.spec import Family

_TOKEN_PIXELS = 16  # side of a token: 8 pixels per latent, 2 latents per patch


class ZImageLatents:
    """Implements `families.protocols.Latents` for latents [1, 16, height / 8, width / 8]."""

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        self._vae: Any = decoder
        transformer: Any = denoiser
        self._channels = int(transformer.config.in_channels)
        self._colours = family.latent_preview

    def shape(self, size: Size) -> torch.Size:
        """Return [1, 16, height / 8, width / 8]."""
        rows, columns = size.height // _TOKEN_PIXELS, size.width // _TOKEN_PIXELS
        return torch.Size((1, self._channels, 2 * rows, 2 * columns))

    def tokens(self, size: Size) -> int:
        """Return the number of patches of 2x2 latents."""
        return (size.height // _TOKEN_PIXELS) * (size.width // _TOKEN_PIXELS)

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float32, the dtype of noise and latents for every dtype of the transformer."""
        return torch.float32

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, 16, height / 8, width / 8].

        They are cast to the decoder's dtype before their scaling is undone; in Stable Diffusion
        1.5, the order is the opposite.
        """
        return decode(self._vae, unscale(latents.to(self._vae.dtype), self._vae.config))

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview [height / 8, width / 8, 3], uint8 RGB."""
        return rough_colours(latents, self._colours)
