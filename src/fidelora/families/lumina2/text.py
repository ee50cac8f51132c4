"""Prompt embeddings of Lumina-Image 2.0: the penultimate hidden states of Gemma 2."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fidelora.errors import BaseModelFilesError
from fidelora.families.lumina2.denoiser import Conditioning
from fidelora.families.protocols import AdapterKey, Encoded, Prompts, Size
from fidelora.families.spec import Family

MAX_TOKENS = 256  # system prompt and padding included; the pipeline's `max_sequence_length`
_MAX_CACHED_PROMPTS = 16  # prompt embeddings to keep; each takes up to 2.4 MB

# The default of the pipeline. The model was trained with it, so its words must not change.
_SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> "
)


class Lumina2Text:
    """Implements `families.protocols.Text`.

    The trainer puts the system prompt before the negative prompt, too; diffusers' pipeline does
    not.
    """

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        (part,) = family.text_encoders
        encoder: Any = parts[part.name]
        # The trainer's version of the library transformers used scaled dot product attention for
        # Gemma 2, and ignored the soft cap, which this attention does not support. Newer versions
        # therefore do not select it.
        encoder.config._attn_implementation = "sdpa"
        self._encoder = encoder
        folder = tokenizers[part.name]
        assert folder is not None, "no tokenizer is bundled"
        self._tokenizer = _load_tokenizer(folder)
        self._device = device
        self._cache: OrderedDict[tuple[str, int], tuple[Conditioning, str]] = OrderedDict()

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the negative prompt and the prompt, one at a time."""
        warnings = []
        rows: list[Conditioning | None] = []
        for name, text in (("negative prompt", prompts.negative), ("prompt", prompts.prompt)):
            if text is None:
                rows.append(None)
                continue
            row, cut = self._embed(text)
            rows.append(row)
            if cut:
                warnings.append(
                    f"The end of the {name} exceeds {MAX_TOKENS} tokens (with the system prompt) "
                    f'and has no effect: "{cut}".'
                )
        return Encoded(rows[1], rows[0], tuple(warnings))

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        states = torch.zeros(1, MAX_TOKENS, self._encoder.config.hidden_size, device=self._device)
        row = Conditioning(states, torch.ones(1, MAX_TOKENS, dtype=torch.bool, device=self._device))
        return Encoded(row, row if negative else None)

    def _embed(self, prompt: str) -> tuple[Conditioning, str]:
        """Return the hidden states of a prompt, and the end of the prompt that was cut off."""
        key = (prompt, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._cache:
            text = _SYSTEM_PROMPT + prompt
            tokens = self._tokenizer(
                text,
                padding="max_length",
                max_length=MAX_TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            mask: Tensor = tokens.attention_mask.bool().to(self._device)
            output = self._encoder(
                input_ids=tokens.input_ids.to(self._device),
                attention_mask=mask,
                output_hidden_states=True,
                use_cache=False,
            )
            self._cache[key] = (Conditioning(output.hidden_states[-2], mask), self._cut(text))
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _cut(self, text: str) -> str:
        """Return the end of `text` that does not fit into `MAX_TOKENS`."""
        encoded = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        if len(encoded.offset_mapping) <= MAX_TOKENS:
            return ""
        first_lost, _ = encoded.offset_mapping[MAX_TOKENS]
        return text[first_lost:].strip()


def _load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`; it pads at the end.

    Raises:
        BaseModelFilesError: it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, padding_side="right"
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"The base model's {folder.name} cannot be read: {reason}. Download it again."
        ) from error
    if not tokenizer.is_fast:
        raise BaseModelFilesError(
            f"The base model's {folder.name} has no tokenizer.json; download it again."
        )
    return tokenizer
