"""Latents of Lumina-Image 2.0: the 16 channels of FLUX.1's VAE, not packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.autoencoder import decode, rough_colours, unscale
from fidelora.families.protocols import Size
from fidelora.families.spec import Family

_LATENT_PIXELS = 8  # side of a latent
_TOKEN_PIXELS = 16  # side of a token: 2x2 latents per patch


class Lumina2Latents:
    """Implements `families.protocols.Latents` for latents [1, 16, height / 8, width / 8]."""

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        self._vae: Any = decoder
        transformer: Any = denoiser
        self._channels = int(transformer.config.in_channels)
        self._colours = family.latent_preview

    def shape(self, size: Size) -> torch.Size:
        """Return [1, 16, height / 8, width / 8]."""
        rows, columns = size.height // _LATENT_PIXELS, size.width // _LATENT_PIXELS
        return torch.Size((1, self._channels, rows, columns))

    def tokens(self, size: Size) -> int:
        """Return the number of patches of 2x2 latents."""
        return (size.height // _TOKEN_PIXELS) * (size.width // _TOKEN_PIXELS)

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return `dtype`: the trainer draws the noise in the dtype of the transformer."""
        return dtype

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, 16, height / 8, width / 8]; undo their scaling in their own dtype."""
        return decode(self._vae, unscale(latents, self._vae.config))

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview [height / 8, width / 8, 3], uint8 RGB."""
        return rough_colours(latents, self._colours)
