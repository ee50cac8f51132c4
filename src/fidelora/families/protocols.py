"""What the engine asks of a model family: three classes, found through `Family`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.spec import Family
from fidelora.sampling.loop import Denoise


class Size(NamedTuple):
    """The size of an image in pixels."""

    width: int
    height: int


class Guidance(NamedTuple):
    """Classifier-free guidance: its scale, and how far a guided prediction is rescaled (0..1)."""

    scale: float
    rescale: float = 0.0


@dataclass(frozen=True)
class Prompts:
    """The texts of one image.

    Attributes:
        negative: None if the denoiser evaluates no negative prompt.
        negative_2: what the second text encoder gets in its place; None for the same.
    """

    prompt: str
    negative: str | None = None
    negative_2: str | None = None


@dataclass(frozen=True, eq=False)
class Encoded:
    """The prompts of one image, encoded.

    Attributes:
        positive, negative: in a form of the family; `negative` is None without one.
        warnings: sentences for the user, such as the end of a prompt that was cut off.
    """

    positive: Any
    negative: Any = None
    warnings: tuple[str, ...] = ()


AdapterState = Callable[[str], Hashable]
"""Maps the name of a text encoder to a key that changes with the adapters applied to it."""


class Text(Protocol):
    """Encodes prompts. Made once per base model."""

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None: ...  # fmt: skip

    def encode(self, prompts: Prompts, size: Size, adapters: AdapterState) -> Encoded:
        """Encode the prompts of one image."""

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return an encoding of the right shapes, to try out the denoiser."""


class Denoiser(Protocol):
    """Predicts, guidance included. Made once per base model."""

    def __init__(self, module: nn.Module) -> None: ...

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if it evaluates a negative prompt at this guidance."""

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return the function that the sampling loop calls, for these images side by side.

        Args:
            dtype: of the recipe; conditioning is rounded to it.
        """


class Latents(Protocol):
    """Shapes of latents, and the way from latents to pixels. Made once per base model."""

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None: ...

    def shape(self, size: Size) -> torch.Size:
        """Return the shape of one image's latents, [1, ...]."""

    def tokens(self, size: Size) -> int:
        """Return the number of tokens that the denoiser sees, on which some schedules depend."""

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the initial noise is drawn, for a recipe of `dtype`."""

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return the image of latents [1, ...]: uint8 RGB [height, width, 3].

        Raises:
            NumericsError: the model produced NaN.
        """

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a rough picture of unfinished latents [...] without the decoder: uint8 RGB."""
