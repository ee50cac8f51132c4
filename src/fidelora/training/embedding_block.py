"""Textual-inversion embedding that a training run trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fidelora.embedding_file import MAX_TOKENS, tokens_of
from fidelora.errors import TrainingRunError
from fidelora.training.config_file import MAX_NAME_LENGTH, block_of, number_of
from fidelora.training.run_files import find_checkpoints


@dataclass(frozen=True)
class TrainedEmbedding:
    """The `embedding` block of a configuration, and the files of the embedding.

    Attributes:
        word: the block's `trigger`: name of the first token, and of the files.
        tokens: number of tokens.
        init_words: words whose tokens the embedding is initialised with.
        has_lora: True if the run trains a LoRA beside the embedding.
        files: by step; the file of the last step has no number in its name.
    """

    word: str
    tokens: int
    init_words: str
    has_lora: bool
    files: Mapping[int, Path]

    @property
    def text(self) -> str:
        """All tokens, which replace `[trigger]` in prompts."""
        return " ".join(tokens_of(self.word, self.tokens))


def read_embedding(process: Mapping[str, Any], folder: Path, steps: int) -> TrainedEmbedding | None:
    """Return the embedding that a run trains, with the trainer's defaults; None if there is none.

    Args:
        process: the training process of the configuration.
        folder: the run folder.
        steps: step of the file without a number in its name, unless its metadata contains a step.

    Raises:
        TrainingRunError: the block is invalid, or the embedding is saved as a pickle.
    """
    if process.get("embedding") is None:
        return None
    block = block_of(process, "embedding")
    word = block.get("trigger", "custom_embedding")
    if not isinstance(word, str) or not word.strip() or len(word) > MAX_NAME_LENGTH:
        raise TrainingRunError(
            "The configuration has an embedding without a usable trigger; set embedding.trigger."
        )
    tokens = number_of(int, block.get("tokens", 4), "embedding.tokens")
    if not 1 <= tokens <= MAX_TOKENS:
        raise TrainingRunError(
            f"The configuration has embedding.tokens {tokens}; it must be from 1 to {MAX_TOKENS}."
        )
    if block.get("save_format", "safetensors") == "pt":
        raise TrainingRunError(
            "The training run saves its embedding as a Python pickle (embedding.save_format pt), "
            "which can run code when it is opened; save it as safetensors."
        )
    return TrainedEmbedding(
        word,
        tokens,
        str(block.get("init_words", "*")),
        bool(process.get("network")),
        find_checkpoints(folder, word, steps),
    )
