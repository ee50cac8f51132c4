"""Prompts into embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class EncodedText:
    """A prompt as the UNet sees it.

    Attributes:
        embedding: [1, 77, width]: the text encoder's last hidden state after its final norm.
        cut: the end of the prompt that did not fit into the tokens and has no effect; empty if all of it fits.
    """

    embedding: Tensor
    cut: str


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
