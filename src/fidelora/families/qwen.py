"""Qwen as a text encoder: chat template, tokens, hidden states.

Z-Image and FLUX.2-klein use Qwen3. They differ in the template's `enable_thinking` and in the
hidden states that they use, so each family makes these choices in its own `text.py`, in a subclass
of `QwenText`. Qwen-Image uses Qwen2.5-VL with a template of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fidelora.errors import BaseModelFilesError
from fidelora.families.protocols import AdapterKey, Encoded, Prompts, Size
from fidelora.families.spec import Family

MAX_TOKENS = 512  # template included; the pipelines' `max_sequence_length`
_MAX_CACHED_PROMPTS = 16  # prompt embeddings to keep; each takes up to 16 MB


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


class QwenText(ABC):
    """Implements `families.protocols.Text` for families whose only text encoder is Qwen3.

    Attributes:
        enable_thinking: see `tokenize`.
    """

    enable_thinking: ClassVar[bool]

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        (part,) = family.text_encoders
        self.encoder: Any = parts[part.name]
        folder = tokenizers[part.name]
        assert folder is not None, "no tokenizer is bundled"
        self._tokenizer = load_tokenizer(folder)
        self.device = device
        self._cache: OrderedDict[tuple[str, int], tuple[Tensor, str]] = OrderedDict()

    @abstractmethod
    def select(self, states: tuple[Tensor, ...], tokens: Tokens) -> Tensor:
        """Return the prompt embedding, given all hidden states of a prompt."""

    @abstractmethod
    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the negative prompt and the prompt, one at a time."""
        warnings = []
        embeddings: list[Tensor | None] = []
        for name, text in (("negative prompt", prompts.negative), ("prompt", prompts.prompt)):
            if text is None:
                embeddings.append(None)
                continue
            embedding, cut = self._embed(text)
            embeddings.append(embedding)
            if cut:
                warnings.append(
                    f'The end of the {name} exceeds {MAX_TOKENS} tokens and has no effect: "{cut}".'
                )
        return Encoded(embeddings[1], embeddings[0], tuple(warnings))

    def _embed(self, text: str) -> tuple[Tensor, str]:
        """Return the prompt embedding, and the end of the text that was cut off."""
        key = (text, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._cache:
            tokens = tokenize(
                self._tokenizer, text, enable_thinking=self.enable_thinking, length=MAX_TOKENS
            )
            states = hidden_states(self.encoder, tokens, self.device)
            self._cache[key] = (self.select(states, tokens), tokens.cut)
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


def load_tokenizer(folder: Path, *, needs_template: bool = True) -> Any:
    """Load the fast tokenizer in `folder` and check that it has a chat template.

    Args:
        needs_template: False if the family does not use the chat template.

    Raises:
        BaseModelFilesError: it cannot be read, is not a fast tokenizer, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"The base model's {folder.name} cannot be read: {reason}. Download it again."
        ) from error
    if not tokenizer.is_fast or (needs_template and not tokenizer.chat_template):
        lacks = "chat template" if tokenizer.is_fast else "tokenizer.json"
        raise BaseModelFilesError(
            f"The base model's {folder.name} has no {lacks}; download it again."
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
