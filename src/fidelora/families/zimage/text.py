"""Prompt embeddings of Z-Image: the penultimate hidden states of Qwen3."""

from __future__ import annotations

import torch
from torch import Tensor

from fidelora.families.protocols import Encoded, Size
from fidelora.families.qwen import QwenText, Tokens


class ZImageText(QwenText):
    """Implements `families.protocols.Text`; embeddings are [tokens, width], without padding."""

    enable_thinking = True

    def select(self, states: tuple[Tensor, ...], tokens: Tokens) -> Tensor:
        """Return the hidden states of the real tokens.

        The encoder runs on all 512 tokens, padding included; the padding is dropped afterwards.
        """
        chosen = states[-2]
        return chosen[0][tokens.mask[0].to(chosen.device)]

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        row = torch.zeros(1, self.encoder.config.hidden_size, device=self.device)
        return Encoded(row, row if negative else None)
