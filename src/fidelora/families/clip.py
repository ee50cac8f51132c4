"""CLIP text encoders: tokenizer, encoder, and a cache of prompt embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from fidelora.errors import BaseModelFilesError
from fidelora.families.spec import Tokenizer

_MAX_CACHED_PROMPTS = 128
"""Number of prompt embeddings to keep per text encoder; each takes about 0.25 MB."""

_TEST_PROMPT = "a photo of a cat"
_TEST_TOKENS = [320, 1125, 539, 320, 2368]
"""The tokens of `_TEST_PROMPT` in CLIP's vocabulary."""


@dataclass(frozen=True)
class PromptEmbedding:
    """Embedding of a prompt by one text encoder.

    Attributes:
        states: hidden states [1, 77, width].
        cut: the end of the prompt that exceeds 77 tokens and has no effect; empty if all fits.
        pooled: projection of the whole prompt [1, width]; None if the encoder has none.
    """

    states: Tensor
    cut: str
    pooled: Tensor | None = None


class ClipEncoder:
    """A CLIP text encoder with its tokenizer and a cache of recent prompt embeddings.

    Consecutive images usually have the same negative prompt, and often the same prompt. The cache
    does not change images: cached embeddings equal newly computed ones in every bit.

    Args:
        device: device of the encoder.
        encode: `last_state` or `penultimate_state`.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        encoder: Any,
        device: torch.device,
        encode: Callable[..., PromptEmbedding],
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self._device = device
        self._encode = encode
        self._cache: OrderedDict[Hashable, PromptEmbedding] = OrderedDict()

    @property
    def length(self) -> int:
        """Number of tokens of every prompt, padding included."""
        return int(self.encoder.config.max_position_embeddings)

    def embed(self, prompt: str, adapters: Hashable) -> PromptEmbedding:
        """Return the embedding of `prompt`, computed unless it is in the cache.

        Args:
            adapters: a key that changes with the adapters applied to the encoder.
        """
        # The last bits of an embedding depend on the number of threads.
        key = (prompt, adapters, torch.get_num_threads())
        if key not in self._cache:
            self._cache[key] = self._encode(self.tokenizer, self.encoder, prompt, self._device)
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


def last_state(
    tokenizer: CLIPTokenizer, encoder: Any, prompt: str, device: torch.device
) -> PromptEmbedding:
    """Encode one prompt to the encoder's last hidden states after its final norm.

    The prompt is padded or truncated to 77 tokens. Clip skip, word weights and attention masks are
    not used. Prompts are encoded one at a time, as in the trainer: a batch of two can differ in the
    last bit.
    """
    ids, cut = _tokens(tokenizer, encoder, prompt)
    return PromptEmbedding(encoder(ids.to(device))[0], cut)


def penultimate_state(
    tokenizer: CLIPTokenizer, encoder: Any, prompt: str, device: torch.device
) -> PromptEmbedding:
    """Encode one prompt like `last_state`, to the hidden states before the last layer.

    The final norm is not applied.
    """
    ids, cut = _tokens(tokenizer, encoder, prompt)
    output = encoder(ids.to(device), output_hidden_states=True)
    return PromptEmbedding(output.hidden_states[-2], cut, getattr(output, "text_embeds", None))


def load_tokenizer(folder: Path | None, spec: Tokenizer, vocabulary: int | None) -> CLIPTokenizer:
    """Load CLIP's tokenizer and check that it works.

    transformers accepts an empty vocabulary or missing merges without an error.

    Args:
        folder: tokenizer folder of the base model; None loads the bundled tokenizer.
        vocabulary: the number of tokens that the text encoder has embeddings for.

    Raises:
        BaseModelFilesError: the tokenizer is incomplete, or is not CLIP's.
    """
    options = dict(spec.options) if folder is None else {}
    if folder is None:
        assert spec.bundled is not None, "CLIP's tokenizer is bundled"
        folder = spec.bundled
    name = spec.folder
    if not (folder / "tokenizer.json").is_file():
        for file in ("vocab.json", "merges.txt"):
            if not (folder / file).is_file():
                raise BaseModelFilesError(
                    f"The base model has no {name}/{file}; download it again."
                )
    try:
        loaded = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
        tokenizer = cast(CLIPTokenizer, loaded)
        tokens = tokenizer(_TEST_PROMPT).input_ids[1:-1]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"The base model's {name} cannot be read: {reason}. Download it again."
        ) from error
    if len(tokenizer) != vocabulary or tokens != _TEST_TOKENS:
        raise BaseModelFilesError(
            f"The base model's {name} does not belong to its text encoder: it has "
            f"{len(tokenizer)} tokens instead of {vocabulary}, or tokenises {_TEST_PROMPT!r} "
            "differently. The files are damaged or belong to another model; download them again."
        )
    return tokenizer


def _tokens(tokenizer: CLIPTokenizer, encoder: Any, prompt: str) -> tuple[Tensor, str]:
    """Return the prompt's tokens [1, 77], and the end of the prompt that did not fit."""
    length = encoder.config.max_position_embeddings
    ids = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, _cut(tokenizer, prompt, length)


def _cut(tokenizer: CLIPTokenizer, prompt: str, length: int) -> str:
    """Return the end of `prompt` that truncation removes.

    Args:
        length: number of tokens that remain, including the start and end tokens.
    """
    offsets = tokenizer(prompt, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(offsets) <= length:
        return ""
    start, _ = offsets[length - 1]  # the first removed token; the end token takes its position
    return prompt[start:].strip()
