"""Protocols of model families: text, denoiser and latents. A `Family` names its implementations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fidelora.families.emphasis import Emphasis
from fidelora.families.spec import Family
from fidelora.sampling.loop import Denoise


class Size(NamedTuple):
    """The size of an image or video: width and height in pixels, and its number of frames."""

    width: int
    height: int
    frames: int = 1


class Guidance(NamedTuple):
    """Classifier-free guidance: its scale, and the strength of its rescaling (0..1)."""

    scale: float
    rescale: float = 0.0


@dataclass(frozen=True)
class Prompts:
    """The prompts of one image.

    Attributes:
        negative: negative prompt; None if the denoiser does not evaluate one.
        negative_2: negative prompt of the second text encoder; None to use `negative`.
        emphasis: how emphasis is computed, for families that use it.
    """

    prompt: str
    negative: str | None = None
    negative_2: str | None = None
    emphasis: Emphasis = "none"


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded prompts of one image.

    Attributes:
        positive, negative: conditioning in the family's own form; `negative` is None if there is no
            negative prompt.
        warnings: sentences for the user, for example that the end of a prompt was cut off.
    """

    positive: Any
    negative: Any = None
    warnings: tuple[str, ...] = ()


AdapterKey = Callable[[str], Hashable]
"""Function that returns, for the name of a text encoder, a cache key that changes with the adapters
applied to it."""


class Text(Protocol):
    """Encodes prompts. Created once per base model."""

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None: ...  # fmt: skip

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the prompts of one image."""

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of zeros, for warming up the denoiser."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A textual-inversion embedding.

    Attributes:
        word: name of its first token; the others are `word_1`, `word_2`, ...
        vectors: float32 [tokens, width] by text encoder.
    """

    word: str
    vectors: Mapping[str, Tensor]


class ExtendableText(Text, Protocol):
    """Text of a family that supports embeddings (`Part.embedding_key`)."""

    def extended(self, embeddings: Sequence[Embedding]) -> AbstractContextManager[None]:
        """Add the tokens of embeddings, in order, until the block ends.

        Raises:
            AdapterMismatchError: a token exists already.
        """

    def initial_vectors(self, words: str, tokens: int) -> Mapping[str, Tensor]:
        """Return the vectors from which the trainer starts an embedding, by text encoder.

        Args:
            words: `init_words` of the training run.
            tokens: number of tokens of the embedding.

        Returns:
            [tokens, width] in the dtype of the text encoder.
        """


class Denoiser(Protocol):
    """Denoiser with guidance. Created once per base model, with the module of each denoiser."""

    def __init__(self, module: nn.Module, /, *others: nn.Module) -> None: ...

    def uses_negative(self, guidance: Guidance) -> bool:
        """True if the denoiser evaluates a negative prompt at this guidance."""

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return the function that the sampling loop calls for a batch of these images.

        Args:
            dtype: the recipe's dtype; conditioning is rounded to it.
        """


class Latents(Protocol):
    """Shapes of latents, and conversion to pixels. Created once per base model."""

    def __init__(self, family: Family, denoiser: nn.Module, decoder: nn.Module) -> None: ...

    def shape(self, size: Size) -> torch.Size:
        """Return the shape of one image's latents, [1, ...]."""

    def tokens(self, size: Size) -> int:
        """Return the denoiser's number of tokens, on which some schedules depend."""

    def noise_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the initial noise for a recipe of `dtype`."""

    def decode(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode latents [1, ...] to an image, uint8 RGB [height, width, 3].

        Latents of a video are decoded to [frames, height, width, 3].

        Raises:
            NumericsError: the model produced NaN.
        """

    def preview(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Return a preview as uint8 RGB, without using the decoder.

        Args:
            latents: unfinished latents of one image, without the batch dimension.
        """


class TiledLatents(Latents, Protocol):
    """Latents of a family that uses the recipe field `vae_tiling`."""

    def decode_tiled(self, latents: Tensor, size: Size) -> NDArray[np.uint8]:
        """Decode as `decode` does, in overlapping tiles whose seams are blended."""
