"""Prompts with emphasis as chunks of 77 tokens for CLIP, as AUTOMATIC1111's web UI makes them.

Source: `sd_hijack_clip.py` and `sd_emphasis.py` of the web UI 1.10, with its default settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from fidelora.errors import RecipeError
from fidelora.families.emphasis import BREAK, Emphasis, spans_of

MAX_CHUNKS = 16  # chunks of a prompt; each is encoded separately
_COMMA = ",</w>"
_MAX_MOVED = 20
"""Maximum number of tokens after the last comma of a full chunk that are moved to the next chunk
(`comma_padding_backtrack`)."""


@dataclass
class Chunk:
    """Tokens of a part of a prompt, and their weights."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, tokens: list[int], weight: float) -> None:
        """Add tokens of the same weight."""
        self.tokens += tokens
        self.weights += [weight] * len(tokens)

    def split(self, index: int) -> Chunk:
        """Remove everything from `index` on, and return it."""
        rest = Chunk(self.tokens[index:], self.weights[index:])
        del self.tokens[index:], self.weights[index:]
        return rest


def chunks_of(tokenizer: CLIPTokenizer, prompt: str, length: int) -> list[Chunk]:
    """Return the chunks of a prompt, each without start, end and padding; at least one.

    Args:
        length: maximum number of tokens of a chunk: 75.

    Raises:
        RecipeError: there are more than `MAX_CHUNKS`.
    """
    comma = tokenizer.convert_tokens_to_ids(_COMMA)
    chunks = [Chunk()]
    last_comma: int | None = None

    def new_chunk(chunk: Chunk | None = None) -> None:
        nonlocal last_comma
        chunks.append(chunk or Chunk())
        last_comma = None

    for span in spans_of(prompt):
        if span == BREAK:
            new_chunk()
            continue
        ids = tokenizer(span.text, add_special_tokens=False, verbose=False).input_ids
        for word in _words_of(tokenizer, ids):
            if word == [comma]:
                last_comma = len(chunks[-1])
            elif (
                len(chunks[-1]) == length
                and last_comma is not None
                and length - last_comma <= _MAX_MOVED
            ):
                new_chunk(chunks[-1].split(last_comma + 1))
            if len(chunks[-1]) + len(word) > length:
                new_chunk()
            chunks[-1].append(word, span.weight)
    if len(chunks) > 1 and not chunks[-1].tokens:  # BREAK at the end
        chunks.pop()
    if len(chunks) > MAX_CHUNKS:
        raise RecipeError(
            f"A prompt with emphasis has {len(chunks)} parts of {length} tokens; the maximum is "
            f"{MAX_CHUNKS}. Shorten the prompt.",
            field="prompt",
        )
    return chunks


def padded(tokenizer: CLIPTokenizer, chunk: Chunk, length: int) -> tuple[Tensor, Tensor]:
    """Return token ids, int64 [1, length], and weights, float32 [1, length], with start and end.

    Args:
        length: number of tokens with start, end and padding: 77.
    """
    start, end, padding = (
        cast(int, one)
        for one in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )
    rest = length - len(chunk) - 2
    ids = [start, *chunk.tokens, end, *[padding] * rest]
    weights = [1.0, *chunk.weights, *[1.0] * (rest + 1)]
    return torch.tensor([ids]), torch.tensor([weights])


def weighted(states: Tensor, weights: Tensor, emphasis: Emphasis) -> Tensor:
    """Apply the weights of a chunk's tokens to its hidden states.

    Args:
        states: [1, 77, width].
        weights: float32 [1, 77].
    """
    if emphasis == "ignore":
        return states
    mean = states.mean()
    # The product is float32, even if the states are in half precision.
    states = states * weights.unsqueeze(-1)
    if emphasis == "no_norm":
        return states
    weighted_mean = states.mean()
    # A mean of zero, as a final layer norm without weights gives, cannot be restored. The web UI
    # divides by it and gets NaN.
    return states if weighted_mean == 0 else states * (mean / weighted_mean)


def _words_of(tokenizer: CLIPTokenizer, ids: list[int]) -> list[list[int]]:
    """Group token ids into units that must not be split between chunks.

    A unit is one token, or all tokens of an embedding: `word`, `word_1`, `word_2`, ...
    """
    words: list[list[int]] = []
    added = tokenizer.get_added_vocab()
    names = {token: name for name, token in added.items()}
    for token in ids:
        first = names.get(words[-1][0]) if words else None
        if first is not None and names.get(token) == f"{first}_{len(words[-1])}":
            words[-1].append(token)
        else:
            words.append([token])
    return words
