"""Latents of FLUX.2: 32 channels of the VAE, packed in blocks of 2x2, so 128 channels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.autoencoder import rough_colours, to_pixels
from fidelora.families.flux2_klein.decoder import Flux2Decoder, unpacked
from fidelora.families.flux2_klein.transformer import Flux2Transformer
from fidelora.families.protocols import Size
from fidelora.families.spec import Family

_TOKEN_PIXELS = 16  # side of a token: 8 pixels per latent of the VAE, 2 of these per token


class KleinLatents:
    """Implements `families.protocols.Latents` for latents [1, 128, height / 16, width / 16]."""

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        assert isinstance(decoder, Flux2Decoder)
        assert isinstance(denoiser, Flux2Transformer)
        self._decoder = decoder
        self._channels = denoiser.config.in_channels
        self._colours = family.latent_preview

    def shape(self, size: Size) -> torch.Size:
        """Return [1, 128, height / 16, width / 16]."""
        rows, columns = size.height // _TOKEN_PIXELS, size.width // _TOKEN_PIXELS
        return torch.Size((1, self._channels, rows, columns))

    def tokens(self, size: Size) -> int:
        """Return the number of tokens of the image."""
        return self.shape(size)[2:].numel()

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the recipe's dtype."""
        return dtype

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, 128, height / 16, width / 16].

        The decoder computes in its own dtype, and the conversion to pixels is in float32.
        """
        dtype = self._decoder.dtype
        image = self._decoder(latents.to(dtype)).float()
        return to_pixels(image, is_float16=torch.float16 in (latents.dtype, dtype))

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview [height / 8, width / 8, 3], uint8 RGB."""
        return rough_colours(unpacked(latents), self._colours)
