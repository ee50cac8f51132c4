"""Latents of Qwen-Image: one frame of the 16 channels of a video VAE, packed into tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.autoencoder import rough_colours, to_pixels
from fidelora.families.protocols import Size
from fidelora.families.spec import Family

_TOKEN_PIXELS = 16  # side of a token: 8 pixels per latent, 2 latents per patch


def grid_of(size: Size) -> tuple[int, int]:
    """Return the rows and columns of tokens of an image."""
    return size.height // _TOKEN_PIXELS, size.width // _TOKEN_PIXELS


def pack(latents: Tensor) -> Tensor:
    """Return latents [images, 1, c, h, w] as tokens [images, h / 2 * w / 2, 4 c].

    A token is a patch of 2x2 latents, ordered by channel, row and column.
    """
    images, _, channels, height, width = latents.shape
    patches = latents.reshape(images, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo `pack`.

    Args:
        grid: rows and columns of tokens.
    """
    rows, columns = grid
    patches = tokens.reshape(len(tokens), rows, columns, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).unsqueeze(1)


class QwenImageLatents:
    """Implements `families.protocols.TiledLatents`: latents [1, 1, 16, height / 8, width / 8]."""

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        self._vae: Any = decoder
        transformer: Any = denoiser
        self._channels = int(transformer.config.in_channels) // 4
        self._colours = family.latent_preview

    def shape(self, size: Size) -> torch.Size:
        """Return [1, 1, 16, height / 8, width / 8]."""
        rows, columns = grid_of(size)
        return torch.Size((1, 1, self._channels, 2 * rows, 2 * columns))

    def tokens(self, size: Size) -> int:
        """Return the number of patches of 2x2 latents."""
        rows, columns = grid_of(size)
        return rows * columns

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return `dtype`: the noise is drawn in the dtype of the transformer."""
        return dtype

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, 1, 16, height / 8, width / 8]."""
        return self._decode(latents, tiled=False)

    def decode_tiled(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents in tiles of 256 pixels, which overlap by 64 pixels."""
        return self._decode(latents, tiled=True)

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview [height / 8, width / 8, 3], uint8 RGB."""
        return rough_colours(latents.squeeze(0), self._colours)

    def _decode(self, latents: Tensor, *, tiled: bool) -> NDArray[np.uint8]:
        self._vae.use_tiling = tiled
        frames = latents.transpose(1, 2).to(self._vae.dtype)  # [1, 16, 1 frame, h, w]
        video = self._vae.decode(self._unscaled(frames), return_dict=False)[0]
        return to_pixels(
            video[:, :, 0], is_float16=torch.float16 in (latents.dtype, self._vae.dtype)
        )

    def _unscaled(self, frames: Tensor) -> Tensor:
        """Undo the normalisation of each channel, in the order and dtype of the trainer."""
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(frames)
            for values in (self._vae.config.latents_mean, self._vae.config.latents_std)
        )
        return frames / (1.0 / deviation) + mean
