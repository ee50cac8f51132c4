"""Prompt embeddings of FLUX.1: CLIP's pooled output and the hidden states of T5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families.clip import ClipEncoder, load_tokenizer, pooled_output
from fidelora.families.protocols import AdapterKey, Encoded, Prompts, Size
from fidelora.families.spec import Family
from fidelora.families.t5 import MAX_TOKENS, T5Encoder


@dataclass(frozen=True, eq=False)
class FluxConditioning:
    """Conditioning inputs of the transformer for one prompt.

    Attributes:
        pooled: CLIP's pooled output [1, width].
        states: hidden states of T5 [1, 512, width].
    """

    pooled: Tensor
    states: Tensor


class FluxText:
    """Implements `families.protocols.Text`.

    CLIP reads the first 77 tokens of a prompt and T5 the first 512. Only the end that T5 does not
    read is reported.
    """

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        first, second = family.text_encoders
        clip: Any = parts[first.name]
        assert first.tokenizer is not None, "a text encoder has a tokenizer"
        tokenizer = load_tokenizer(tokenizers[first.name], first.tokenizer, clip.config.vocab_size)
        folder = tokenizers[second.name]
        assert folder is not None, "no tokenizer of T5 is bundled"
        self._clip = ClipEncoder(tokenizer, clip, device, pooled_output)
        self._clip_name = first.name
        self._t5 = T5Encoder(parts[second.name], folder, device)
        self._device = device

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the negative prompt, if there is one, and then the prompt."""
        key = adapter_key(self._clip_name)
        warnings: list[str] = []
        rows: list[FluxConditioning | None] = []
        for name, text in (("negative prompt", prompts.negative), ("prompt", prompts.prompt)):
            if text is None:
                rows.append(None)
                continue
            pooled = self._clip.embed(text, key).pooled
            assert pooled is not None, "`pooled_output` returns it"
            t5 = self._t5.embed(text)
            rows.append(FluxConditioning(pooled, t5.states))
            warnings += t5.warnings(name)
        return Encoded(rows[1], rows[0], tuple(warnings))

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        row = FluxConditioning(
            torch.zeros(1, self._clip.encoder.config.hidden_size, device=self._device),
            torch.zeros(1, MAX_TOKENS, self._t5.width, device=self._device),
        )
        return Encoded(row, row if negative else None)
