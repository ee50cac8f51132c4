"""Prompts into embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

_KNOWN_TEXTS = 128
"""Of a quarter of a megabyte each."""


@dataclass(frozen=True)
class EncodedText:
    """A prompt as the UNet sees it.

    Attributes:
        embedding: [1, 77, width]: the text encoder's last hidden state after its final norm.
        cut: the end of the prompt that did not fit into the tokens and has no effect; empty if all of it fits.
    """

    embedding: Tensor
    cut: str


class EncodedTexts:
    """Prompts that one text encoder has encoded, those used longest ago dropped first.

    The negative prompt of most images is the one before, and often so is the prompt. What is kept is what was computed, so an
    image does not show where its text came from.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, EncodedText] = OrderedDict()

    def get(self, text: str, adapters: Hashable, encode: Callable[[], EncodedText]) -> EncodedText:
        """The encoded `text`, from `encode` if it is not known.

        Args:
            adapters: what tells the text encoder with its adapters from the same with others.
        """
        key = (text, adapters, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._known:
            self._known[key] = encode()
            if len(self._known) > _KNOWN_TEXTS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def encode_text(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, text: str, device: torch.device) -> EncodedText:
    """Encode one prompt: padded and truncated to 77 tokens, no clip skip, no weighting, no attention mask.

    Prompts are encoded one at a time, as the trainer does it; a batch of two can differ in the last bit.
    """
    length = encoder.config.max_position_embeddings
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    embedding = encoder(ids.to(device))[0]
    return EncodedText(embedding, _cut(tokenizer, text, length))


def _cut(tokenizer: CLIPTokenizer, text: str, length: int) -> str:
    """What truncation to `length` tokens, the first and the last of them markers, takes off the end of `text`."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(offsets) <= length:
        return ""
    start, _ = offsets[length - 1]  # the first token whose place the end marker takes
    return text[start:].strip()
