"""Prompts into embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

_KNOWN_TEXTS = 128
"""Of a quarter of a megabyte each."""


@dataclass(frozen=True)
class EncodedText:
    """A prompt as one text encoder sees it.

    Attributes:
        embedding: [1, 77, width].
        cut: the end of the prompt that did not fit into the tokens and has no effect; empty if all of it fits.
        pooled: [1, width], the projection of the whole text; None if the encoder has none.
    """

    embedding: Tensor
    cut: str
    pooled: Tensor | None = None


class TextReader:
    """A text encoder with its tokenizer, and the prompts that it has encoded, those used longest ago dropped first.

    The negative prompt of most images is the one before, and often so is the prompt. What is kept is what was computed, so an
    image does not show where its text came from.

    Args:
        device: where the encoder computes.
        encode: how it is read: `last_state` or `penultimate_state`.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        encoder: Any,
        device: torch.device,
        encode: Callable[..., EncodedText],
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self._device = device
        self._encode = encode
        self._known: OrderedDict[Hashable, EncodedText] = OrderedDict()

    @property
    def length(self) -> int:
        """Tokens of a text, markers and padding included."""
        return int(self.encoder.config.max_position_embeddings)

    def read(self, text: str, adapters: Hashable) -> EncodedText:
        """The encoded `text`, computed if it is not known.

        Args:
            adapters: what tells the encoder with its adapters from the same with others.
        """
        key = (
            text,
            adapters,
            torch.get_num_threads(),
        )  # the last bits depend on the number of threads
        if key not in self._known:
            self._known[key] = self._encode(self.tokenizer, self.encoder, text, self._device)
            if len(self._known) > _KNOWN_TEXTS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def last_state(
    tokenizer: CLIPTokenizer, encoder: Any, text: str, device: torch.device
) -> EncodedText:
    """Encode one prompt to the encoder's last hidden state after its final norm.

    Padded and truncated to 77 tokens, no clip skip, no weighting, no attention mask. Prompts are encoded one
    at a time, as the trainer does it; a batch of two can differ in the last bit.
    """
    ids, cut = _tokens(tokenizer, encoder, text)
    return EncodedText(encoder(ids.to(device))[0], cut)


def penultimate_state(
    tokenizer: CLIPTokenizer, encoder: Any, text: str, device: torch.device
) -> EncodedText:
    """Encode one prompt as `last_state` does, but to the hidden state before the encoder's last layer, without the final norm."""
    ids, cut = _tokens(tokenizer, encoder, text)
    output = encoder(ids.to(device), output_hidden_states=True)
    return EncodedText(output.hidden_states[-2], cut, getattr(output, "text_embeds", None))


def _tokens(tokenizer: CLIPTokenizer, encoder: Any, text: str) -> tuple[Tensor, str]:
    """The text's tokens [1, 77], and its end that did not fit."""
    length = encoder.config.max_position_embeddings
    ids = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, _cut(tokenizer, text, length)


def _cut(tokenizer: CLIPTokenizer, text: str, length: int) -> str:
    """What truncation to `length` tokens, the first and the last of them markers, takes off the end of `text`."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(offsets) <= length:
        return ""
    start, _ = offsets[length - 1]  # the first token whose place the end marker takes
    return text[start:].strip()
