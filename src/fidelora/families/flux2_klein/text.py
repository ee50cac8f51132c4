"""Prompt embeddings of FLUX.2-klein: three hidden states of Qwen3 side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fidelora.errors import BaseModelFilesError
from fidelora.families.protocols import Encoded, Size
from fidelora.families.qwen import MAX_TOKENS, QwenText, Tokens
from fidelora.families.spec import Family

_LAYERS = (9, 18, 27)  # the hidden states that are used; 0 would be the token embeddings


class KleinText(QwenText):
    """Implements `families.protocols.Text`; embeddings are [1, 512, 3 * width], with padding.

    Raises:
        BaseModelFilesError: the text encoder has too few layers.
    """

    enable_thinking = False

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(family, parts, tokenizers, device)
        layers: int = self.encoder.config.num_hidden_layers
        if layers <= _LAYERS[-1]:
            raise BaseModelFilesError(
                f"The base model's text encoder has {layers} layers, but {family.title} uses the "
                f"hidden states after layer {_LAYERS[-1]}, before the final norm. Use a base model "
                f"of {family.title}."
            )

    def select(self, states: tuple[Tensor, ...], tokens: Tokens) -> Tensor:
        """Return the hidden states of all 512 tokens; the transformer attends to the padding."""
        return torch.cat([states[layer] for layer in _LAYERS], dim=-1)

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        width = len(_LAYERS) * self.encoder.config.hidden_size
        states = torch.zeros(1, MAX_TOKENS, width, device=self.device)
        return Encoded(states, states if negative else None)
