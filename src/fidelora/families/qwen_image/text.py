"""Prompt embeddings of Qwen-Image: the last hidden states of Qwen2.5-VL after a fixed template."""

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

MAX_TOKENS = 512  # the pipeline's `max_sequence_length`: tokens that the transformer receives
_MAX_ENCODED_TOKENS = 1024  # tokens that the encoder receives after the start of the template
_TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_START_TOKENS = 34  # tokens of the template before the prompt, whose states are dropped
_MAX_CACHED_PROMPTS = 16  # prompt embeddings to keep; each takes up to 7 MB


class QwenImageText:
    """Implements `families.protocols.Text`; embeddings are [1, tokens, width]."""

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        (part,) = family.text_encoders
        self._encoder: Any = parts[part.name]
        folder = tokenizers[part.name]
        assert folder is not None, "no tokenizer is bundled"
        self._tokenizer = qwen.load_tokenizer(folder, needs_template=False)
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
        row = torch.zeros(1, 1, self._encoder.config.hidden_size, device=self._device)
        return Encoded(row, row if negative else None)

    def _embed(self, text: str) -> tuple[Tensor, str]:
        """Return the hidden states of the prompt, and the end of the prompt that was cut off.

        The encoder runs on up to 1024 tokens of the prompt, because the number of tokens changes
        the last bits of all states. The states after the first 512 are dropped afterwards.
        """
        key = (text, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._cache:
            filled = _TEMPLATE.format(text)
            encoded = self._tokenizer(
                filled,
                max_length=_MAX_ENCODED_TOKENS + _START_TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            cut = qwen.truncated_end(self._tokenizer, filled, text, MAX_TOKENS + _START_TOKENS)
            tokens = qwen.Tokens(encoded.input_ids, encoded.attention_mask.bool(), cut)
            states = qwen.hidden_states(self._encoder, tokens, self._device)[-1]
            self._cache[key] = (states[:, _START_TOKENS:][:, :MAX_TOKENS], cut)
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]
