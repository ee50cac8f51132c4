"""Prompt embeddings of FLUX.2-klein: three hidden states of Qwen3 side by side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.errors import BaseModelFilesError
from fidelora.families import qwen
from fidelora.families.protocols import AdapterKey, Encoded, Prompts, Size
from fidelora.families.spec import Family

MAX_TOKENS = 512  # template included
_LAYERS = (9, 18, 27)  # the hidden states that are used; 0 would be the token embeddings
_MAX_CACHED_PROMPTS = 16  # prompt embeddings to keep; each takes up to 16 MB


class KleinText:
    """Implements `families.protocols.Text`; embeddings are [1, 512, 3 * width], with padding.

    Raises:
        BaseModelFilesError: the text encoder has too few layers.
    """

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        (part,) = family.text_encoders
        encoder: Any = parts[part.name]
        self._encoder = encoder
        layers: int = encoder.config.num_hidden_layers
        if layers <= _LAYERS[-1]:
            raise BaseModelFilesError(
                f"The base model's {part.name} has {layers} layers, but {family.title} uses the "
                f"hidden states of layer {_LAYERS[-1]}. Use a base model of {family.title}."
            )
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
        width = len(_LAYERS) * self._encoder.config.hidden_size
        states = torch.zeros(1, MAX_TOKENS, width, device=self._device)
        return Encoded(states, states if negative else None)

    def _embed(self, text: str) -> tuple[Tensor, str]:
        """Return the hidden states of all 512 tokens, and the end of the text that was cut off."""
        key = (text, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._cache:
            tokens = qwen.tokenize(self._tokenizer, text, enable_thinking=False, length=MAX_TOKENS)
            states = qwen.hidden_states(self._encoder, tokens, self._device)
            chosen = torch.cat([states[layer] for layer in _LAYERS], dim=-1)
            self._cache[key] = (chosen, tokens.cut)
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]
