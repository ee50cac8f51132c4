"""Prompt embeddings of Z-Image: the penultimate hidden states of Qwen3."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families import qwen
from fidelora.families.protocols import AdapterKey, Encoded, Prompts, Size
from fidelora.families.spec import Family

MAX_TOKENS = 512  # template included; the pipeline's `max_sequence_length`
_MAX_CACHED_PROMPTS = 16  # prompt embeddings to keep; each takes up to 5 MB


class ZImageText:
    """Implements `families.protocols.Text`; embeddings are [tokens, width], without padding."""

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        (part,) = family.text_encoders
        self._encoder: Any = parts[part.name]
        folder = tokenizers[part.name]
        assert folder is not None, "no tokenizer is bundled"
        self._tokenizer = qwen.load_tokenizer(folder)
        self._device = device
        self._cache: OrderedDict[tuple[str, int], tuple[Tensor, str]] = OrderedDict()

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the negative prompt and the prompt, one at a time."""
        warnings = []
        states: list[Tensor | None] = []
        for name, text in (("negative prompt", prompts.negative), ("prompt", prompts.prompt)):
            if text is None:
                states.append(None)
                continue
            embedding, cut = self._embed(text)
            states.append(embedding)
            if cut:
                warnings.append(
                    f'The end of the {name} exceeds {MAX_TOKENS} tokens and has no effect: "{cut}".'
                )
        return Encoded(states[1], states[0], tuple(warnings))

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        row = torch.zeros(1, self._encoder.config.hidden_size, device=self._device)
        return Encoded(row, row if negative else None)

    def _embed(self, text: str) -> tuple[Tensor, str]:
        """Return the hidden states of the real tokens, and the end of the text that was cut off.

        The encoder runs on all 512 tokens, padding included; the padding is dropped afterwards.
        """
        key = (text, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._cache:
            tokens = qwen.tokenize(self._tokenizer, text, enable_thinking=True, length=MAX_TOKENS)
            states = qwen.hidden_states(self._encoder, tokens, self._device)[-2]
            self._cache[key] = (states[0][tokens.mask[0].to(states.device)], tokens.cut)
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]
