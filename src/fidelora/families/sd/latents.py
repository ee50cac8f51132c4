"""Latents of Stable Diffusion 1.5 and SDXL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.errors import BaseModelFilesError
from fidelora.families.autoencoder import decode, decode_values, rough_colours, unscale
from fidelora.families.protocols import Size
from fidelora.families.spec import Family


class SDLatents:
    """Implements `families.protocols.Latents` for latents [1, 4, height / 8, width / 8].

    Raises:
        BaseModelFilesError: the VAE's configuration scales latents in an unsupported way.
    """

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        self._vae: Any = decoder
        config: Any = self._vae.config
        for name in ("latents_mean", "latents_std", "shift_factor"):
            if config.get(name):
                raise BaseModelFilesError(
                    f"The VAE's configuration sets {name}, which {family.title} does not support. "
                    "Use another VAE."
                )
        self._channels: int = self._unet_channels(denoiser)
        # The VAE halves the size after every block except the last.
        self._scale = 2 ** (len(config.block_out_channels) - 1)
        self._colours = family.latent_preview

    @staticmethod
    def _unet_channels(denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def shape(self, size: Size) -> torch.Size:
        """Return [1, 4, height / 8, width / 8]."""
        rows, columns = size.height // self._scale, size.width // self._scale
        return torch.Size((1, self._channels, rows, columns))

    def tokens(self, size: Size) -> int:
        """Return the number of latent pixels."""
        return self.shape(size)[2:].numel()

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the recipe's dtype."""
        return dtype

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, 4, height / 8, width / 8]; undo their scaling in their own dtype."""
        return decode(self._vae, unscale(latents, self._vae.config))

    def values(self, latents: Tensor) -> NDArray[np.float32]:
        """Decode latents [1, 4, height / 8, width / 8] to RGB from 0 to 1, not rounded to levels.

        Raises:
            NumericsError: the model produced NaN.
        """
        return decode_values(self._vae, unscale(latents, self._vae.config))

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview [height / 8, width / 8, 3], uint8 RGB."""
        return rough_colours(latents, self._colours)


class SDXLLatents(SDLatents):
    """Latents of SDXL. A float16 VAE with `force_upcast` in its configuration computes in float32.

    The weights of such a VAE stay rounded to float16, because the trainer's pipeline loads them in
    float16 and then upcasts them. As in that pipeline, latents are cast before their scaling is
    undone.
    """

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        super().__init__(family, denoiser, decoder)
        self._upcasts = self._vae.dtype == torch.float16 and self._vae.config.force_upcast
        if self._upcasts:
            self._vae.to(torch.float32)

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, 4, height / 8, width / 8]."""
        return super().decode(latents.to(self._vae.dtype) if self._upcasts else latents, size)

    def values(self, latents: Tensor) -> NDArray[np.float32]:
        """Decode latents [1, 4, height / 8, width / 8]."""
        return super().values(latents.to(self._vae.dtype) if self._upcasts else latents)
