"""Prompt embeddings of Chroma: the hidden states of T5, and the mask of its real tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fidelora.families.protocols import AdapterKey, Encoded, Prompts, Size
from fidelora.families.spec import Family
from fidelora.families.t5 import MAX_TOKENS, T5Encoder


@dataclass(frozen=True, eq=False)
class ChromaConditioning:
    """Conditioning inputs of the transformer for one prompt.

    Attributes:
        states: hidden states of T5 [1, 512, width].
        mask: 1 for real tokens, 0 for padding [1, 512].
    """

    states: Tensor
    mask: Tensor


class ChromaText:
    """Implements `families.protocols.Text`."""

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        (part,) = family.text_encoders
        folder = tokenizers[part.name]
        assert folder is not None, "no tokenizer of T5 is bundled"
        self._t5 = T5Encoder(parts[part.name], folder, device)
        self._device = device

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the negative prompt and the prompt, one at a time."""
        warnings: list[str] = []
        rows: list[ChromaConditioning | None] = []
        for name, text in (("negative prompt", prompts.negative), ("prompt", prompts.prompt)):
            if text is None:
                rows.append(None)
                continue
            embedding = self._t5.embed(text)
            rows.append(ChromaConditioning(embedding.states, embedding.mask))
            warnings += embedding.warnings(name)
        return Encoded(rows[1], rows[0], tuple(warnings))

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        row = ChromaConditioning(
            torch.zeros(1, MAX_TOKENS, self._t5.width, device=self._device),
            torch.zeros(1, MAX_TOKENS, device=self._device),
        )
        return Encoded(row, row if negative else None)
