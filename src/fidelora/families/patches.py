"""Latents of FLUX.1's VAE and their packing into tokens, for FLUX.1, Flex.1 and Chroma.

A token is a square of 2x2 latents of 16 channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.autoencoder import decode, rough_colours, unscale
from fidelora.families.protocols import Size
from fidelora.families.spec import Family

TOKEN_PIXELS = 16
"""Side of a token in pixels: 8 pixels per latent, 2 latents per token."""


def grid(size: Size) -> tuple[int, int]:
    """Return the numbers of rows and columns of tokens."""
    return size.height // TOKEN_PIXELS, size.width // TOKEN_PIXELS


def pack(latents: Tensor) -> Tensor:
    """Return latents [images, channels, 2 * rows, 2 * columns] as tokens.

    Returns:
        [images, rows * columns, channels * 4]; the values of a channel are adjacent.
    """
    images, channels, height, width = latents.shape
    squares = latents.view(images, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(images, -1, channels * 4)


def unpack(tokens: Tensor, size: Size) -> Tensor:
    """Return tokens [images, rows * columns, channels * 4] as latents; the inverse of `pack`."""
    rows, columns = grid(size)
    squares = tokens.view(tokens.shape[0], rows, columns, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, 2 * rows, 2 * columns)


def positions(size: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the position of each token, [rows * columns, 3]: 0, row, column."""
    rows, columns = grid(size)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.flatten(0, 1).to(device, dtype)


class PatchLatents:
    """Implements `families.protocols.Latents` for latents [1, 16, height / 8, width / 8].

    Latents are packed into tokens only for the transformer: the steps of a schedule do not depend
    on the order of the values.
    """

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None:
        self._vae: Any = decoder
        self._colours = family.latent_preview

    def shape(self, size: Size) -> torch.Size:
        """Return [1, 16, height / 8, width / 8]."""
        rows, columns = grid(size)
        return torch.Size((1, self._vae.config.latent_channels, 2 * rows, 2 * columns))

    def tokens(self, size: Size) -> int:
        """Return the number of tokens."""
        rows, columns = grid(size)
        return rows * columns

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the recipe's dtype."""
        return dtype

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, 16, height / 8, width / 8]; undo their scaling in their own dtype."""
        return decode(self._vae, unscale(latents, self._vae.config))

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview [height / 8, width / 8, 3], uint8 RGB."""
        return rough_colours(latents, self._colours)
