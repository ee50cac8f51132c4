"""Textual-inversion embeddings in adapter files: tensors, word and tokens. Does not import torch.

AI Toolkit and AUTOMATIC1111 store one tensor per text encoder: `emb_params` if the model has one,
`clip_l` and `clip_g` if it has two. diffusers stores one tensor that is named after the token
(`<sks>`), or `text_encoders_0` and `text_encoders_1`. ComfyUI stores `clip_l` for models with one
text encoder, too. Each has the shape [tokens, width], or [width] for one token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath

from fidelora.safetensors_header import Header
from fidelora.texts import read_json

EMBEDDING_KEYS = frozenset({"emb_params", "clip_l", "clip_g"})
MAX_TOKENS = 75
"""Maximum number of tokens of an embedding: as many as a prompt has between start and end token."""

_DIFFUSERS_KEYS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
"""Tensor keys of diffusers' training script for new tokens in the text encoders of SDXL."""
_MAX_WORD_LENGTH = 200  # characters
_CONVERTED_KEYS = frozenset({"*", "string_to_param", "string_to_param.*"})
"""Tensor keys in files converted from AUTOMATIC1111's `.pt` embeddings; they are not the word."""


_COUNTERS = frozenset({
    "step", "steps", "global_step", "num_steps", "iteration", "epoch", "epochs",
})  # fmt: skip
"""Keys of counters that training scripts store beside the weights."""


def embedding_tensors(header: Header) -> dict[str, str]:
    """Map AI Toolkit's names of an embedding's tensors to the keys in this file.

    If the file has only one tensor, the tensor is read as an embedding, as in diffusers,
    AUTOMATIC1111 and ComfyUI. Keys with a dot are excluded, because modules have such keys; those
    of converted `.pt` files are not.
    """
    if header.tensors.keys() == _DIFFUSERS_KEYS.keys():
        return {name: key for key, name in _DIFFUSERS_KEYS.items()}
    if header.tensors.keys() == {"clip_l"}:
        return {"emb_params": "clip_l"}
    found = {key: key for key in header.tensors if key in EMBEDDING_KEYS}
    if not found and len(header.tensors) == 1:
        key, info = next(iter(header.tensors.items()))
        if ("." not in key or key in _CONVERTED_KEYS) and 1 <= len(info.shape) <= 2:
            return {"emb_params": key}
    return found


def is_counter(key: str, header: Header) -> bool:
    """Return True if a tensor is a counter of the training, such as its step, and has no effect."""
    return key in _COUNTERS and math.prod(header.tensors[key].shape) == 1


def is_embedding(header: Header) -> bool:
    """Return True if the file contains only an embedding.

    The LoRA of a training run with an embedding also contains a copy of the embedding.
    """
    counters = sum(is_counter(key, header) for key in header.tensors)
    found = len(embedding_tensors(header))
    return found > 0 and found == len(header.tensors) - counters


def embedding_word(header: Header, name: str) -> str | None:
    """Return the word that stands for an embedding in prompts; None for a file of another kind.

    The trainer stores the word in the metadata, and diffusers as the name of the tensor. For files
    of other programs, the word is the name of the file.

    Args:
        name: name of the file.
    """
    if not is_embedding(header):
        return None
    if word := _stored_word(header.metadata):
        return word
    key = next(iter(header.tensors))
    if (
        key not in EMBEDDING_KEYS | _CONVERTED_KEYS | _DIFFUSERS_KEYS.keys()
        and key.strip()
        and len(key) <= _MAX_WORD_LENGTH
    ):
        return key.encode("utf-8", "ignore").decode()
    return PurePath(name).stem.encode("utf-8", "replace").decode()


def token_count(header: Header) -> int:
    """Return the number of tokens of the embedding in a file; 0 if it has none."""
    shapes = [header.tensors[key].shape for key in embedding_tensors(header).values()]
    return max((shape[0] if len(shape) > 1 else 1 for shape in shapes), default=0)


def tokens_of(word: str, count: int) -> list[str]:
    """Return the names of an embedding's tokens, as in the trainer: `word word_1 word_2`."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def _stored_word(metadata: Mapping[str, str]) -> str:
    text = metadata.get("name", "")
    try:
        word = read_json(text)
    except ValueError:
        word = text  # not encoded as JSON
    is_valid = isinstance(word, str) and word.strip() and len(word) <= _MAX_WORD_LENGTH
    return word.encode("utf-8", "ignore").decode() if is_valid else ""
