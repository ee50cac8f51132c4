"""Latents of Wan: the 16 channels of a video VAE, one latent frame for four frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.autoencoder import rough_colours, to_pixels
from fidelora.families.protocols import Size
from fidelora.families.spec import Family

_LATENT_PIXELS = 8
_PATCH = 2  # latents per side of a token


class WanLatents:
    """Implements `families.protocols.TiledLatents`.

    Latents are [1, 16, (frames - 1) / 4 + 1, height / 8, width / 8].
    """

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        self._vae: Any = decoder
        transformer: Any = denoiser
        self._channels = int(transformer.config.in_channels)
        self._colours = family.latent_preview
        self._frames_per_latent = family.frames_per_latent

    def shape(self, size: Size) -> torch.Size:
        """Return [1, 16, (frames - 1) / 4 + 1, height / 8, width / 8]."""
        rows, columns = size.height // _LATENT_PIXELS, size.width // _LATENT_PIXELS
        return torch.Size((1, self._channels, self._latent_frames(size), rows, columns))

    def tokens(self, size: Size) -> int:
        """Return the number of patches of 2x2 latents, in all latent frames."""
        side = _LATENT_PIXELS * _PATCH
        return (size.height // side) * (size.width // side) * self._latent_frames(size)

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float32, whatever the dtype of the transformer."""
        return torch.float32

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents; uint8 RGB [height, width, 3], or [frames, ...] for a video."""
        return self._decode(latents, size, tiled=False)

    def decode_tiled(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents in tiles of 256 pixels, which overlap by 64 pixels."""
        return self._decode(latents, size, tiled=True)

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview of the first frame, uint8 RGB [height / 8, width / 8, 3]."""
        return rough_colours(latents[:, 0], self._colours)

    def _latent_frames(self, size: Size) -> int:
        return (size.frames - 1) // self._frames_per_latent + 1

    def _decode(self, latents: Tensor, size: Size, *, tiled: bool) -> NDArray[np.uint8]:
        self._vae.use_tiling = tiled
        video = self._vae.decode(self._unscaled(latents.to(self._vae.dtype)), return_dict=False)[0]
        is_float16 = torch.float16 in (latents.dtype, self._vae.dtype)
        frames = [
            to_pixels(video[:, :, frame], is_float16=is_float16) for frame in range(size.frames)
        ]
        return frames[0] if size.frames == 1 else np.stack(frames)

    def _unscaled(self, frames: Tensor) -> Tensor:
        """Undo the normalisation of each channel, in the order and dtype of the trainer."""
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(frames)
            for values in (self._vae.config.latents_mean, self._vae.config.latents_std)
        )
        return frames / (1.0 / deviation) + mean
