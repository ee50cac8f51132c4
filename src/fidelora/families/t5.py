"""T5 as a text encoder: tokenizer, encoder, and a cache of prompt embeddings.

FLUX.1 and Chroma use it. Both encode the padding, too; they differ in what they do with the mask.
Wan shares only the loading of the tokenizer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from fidelora.errors import BaseModelFilesError

MAX_TOKENS = 512  # end token and padding included
_MAX_CACHED_PROMPTS = 16  # prompt embeddings to keep; each takes 4 MB in bfloat16


@dataclass(frozen=True, eq=False)
class T5Embedding:
    """Embedding of a prompt.

    Attributes:
        states: hidden states after the final norm [1, 512, width], padding included.
        mask: int64 [1, 512]; 1 for real tokens, 0 for padding.
        cut: the end of the prompt that exceeds 512 tokens and has no effect; empty if all fits.
    """

    states: Tensor
    mask: Tensor
    cut: str

    def warnings(self, name: str) -> tuple[str, ...]:
        """Return a sentence for the user if the end of the prompt was cut off.

        Args:
            name: name of the prompt in the sentence.
        """
        if not self.cut:
            return ()
        return (
            f'The end of the {name} exceeds {MAX_TOKENS} tokens and has no effect: "{self.cut}".',
        )


class T5Encoder:
    """A T5 encoder with its tokenizer and a cache of recent prompt embeddings.

    Args:
        encoder: `T5EncoderModel` of transformers.
        folder: folder of the tokenizer.
        device: device of the encoder.

    Raises:
        BaseModelFilesError: the tokenizer cannot be read, or does not belong to the encoder.
    """

    def __init__(self, encoder: Any, folder: Path, device: torch.device) -> None:
        self._encoder = encoder
        self._tokenizer = load_tokenizer(folder, encoder.config.vocab_size, "T5")
        self._device = device
        self._cache: OrderedDict[tuple[str, int], T5Embedding] = OrderedDict()

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self._encoder.config.d_model)

    def embed(self, prompt: str) -> T5Embedding:
        """Return the embedding of `prompt`, computed unless it is in the cache.

        The encoder gets no attention mask, so that the padding is attended to, as in the trainer.
        """
        key = (prompt, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._cache:
            self._cache[key] = self._embed(prompt)
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _embed(self, prompt: str) -> T5Embedding:
        tokens = self._tokenizer(
            prompt,
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        states = self._encoder(input_ids=tokens.input_ids.to(self._device))[0]
        return T5Embedding(states, tokens.attention_mask, self._cut(prompt))

    def _cut(self, prompt: str) -> str:
        """Return the end of `prompt` that truncation removes."""
        encoded = self._tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        offsets = encoded.offset_mapping
        if len(offsets) <= MAX_TOKENS:
            return ""
        # The end token takes the position of the first removed token.
        start, _ = offsets[MAX_TOKENS - 1]
        return prompt[start:].strip()


def load_tokenizer(folder: Path, vocabulary: int, model: str) -> Any:
    """Load the tokenizer of T5 or UMT5, and check that it works.

    Args:
        vocabulary: the number of tokens that the encoder has embeddings for.
        model: name of the text encoder for messages.

    Raises:
        BaseModelFilesError: it cannot be read, or does not belong to the encoder.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer("a").input_ids
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"The base model's {folder.name} cannot be read: {reason}. Download it again."
        ) from error
    # The encoder has more embeddings than the tokenizer has tokens (32128 and 32100 in T5).
    if not tokenizer.is_fast or len(tokenizer) > vocabulary or ids[-1:] != [tokenizer.eos_token_id]:
        raise BaseModelFilesError(
            f"The base model's {folder.name} does not belong to its text encoder: it is not "
            f"{model}'s, or has more than {vocabulary} tokens. The files are damaged or belong to "
            "another model; download them again."
        )
    return tokenizer
