"""Qwen as a text encoder: chat template, tokens, hidden states.

Z-Image and FLUX.2-klein use Qwen3. They differ in the template's `enable_thinking` and in the
hidden states that they use, so each family makes these choices in its own `text.py`. Qwen-Image
uses Qwen2.5-VL with a template of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fidelora.errors import BaseModelFilesError


@dataclass(frozen=True)
class Tokens:
    """A prompt in the chat template, padded and truncated to a fixed length.

    Attributes:
        ids: int64 [1, length].
        mask: bool [1, length]; True for real tokens, False for padding.
        cut: end of the prompt that was truncated and has no effect; empty if all of it fits.
    """

    ids: Tensor
    mask: Tensor
    cut: str


def load_tokenizer(folder: Path, *, needs_template: bool = True) -> Any:
    """Load the fast tokenizer in `folder` and check that it has a chat template.

    Args:
        needs_template: False if the family does not use the chat template.

    Raises:
        BaseModelFilesError: it cannot be read, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"The base model's {folder.name} cannot be read: {reason}. Download it again."
        ) from error
    if not tokenizer.is_fast or (needs_template and not tokenizer.chat_template):
        raise BaseModelFilesError(
            f"The base model's {folder.name} has no chat template; download it again."
        )
    return tokenizer


def tokenize(tokenizer: Any, prompt: str, *, enable_thinking: bool, length: int) -> Tokens:
    """Return the tokens of `prompt` as the only user message of a conversation.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        enable_thinking: if False, the template ends with an empty think block.
        length: number of tokens, template and padding included. Longer texts lose their end: first
            the template's closing markers, then the end of the prompt.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    encoded = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    cut = truncated_end(tokenizer, text, prompt.strip(), length)
    return Tokens(encoded.input_ids, encoded.attention_mask.bool(), cut)


def hidden_states(encoder: nn.Module, tokens: Tokens, device: torch.device) -> tuple[Tensor, ...]:
    """Return the encoder's hidden states, each [1, length, width].

    The first are the token embeddings, and only the last are normalised (by the final norm).
    Padding is encoded, too, because the last bits would differ without it.
    """
    output = encoder(
        input_ids=tokens.ids.to(device),
        attention_mask=tokens.mask.to(device),
        output_hidden_states=True,
        use_cache=False,
    )
    states: tuple[Tensor, ...] = output.hidden_states
    return states


def truncated_end(tokenizer: Any, text: str, prompt: str, length: int) -> str:
    """Return the end of `prompt` that is lost when `text`, which contains it, is truncated.

    Args:
        length: number of tokens of `text` that are kept.
    """
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(offsets) <= length:
        return ""
    end = text.rindex(prompt) + len(prompt)
    first_lost, _ = offsets[length]
    return str(text[first_lost:end]).strip()
