"""Prompt embeddings of Wan: the hidden states of UMT5, with zeros after the end of the text."""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.errors import RecipeError
from fidelora.families.protocols import AdapterKey, Encoded, Prompts, Size
from fidelora.families.spec import Family
from fidelora.families.t5 import load_tokenizer

MAX_TOKENS = 512  # end token and padding included
_MAX_CACHED_PROMPTS = 16  # prompt embeddings to keep; each takes 4 MB in bfloat16
_PLAIN = re.compile(r"[\x20-\x7e\n]*")


class WanText:
    """Implements `families.protocols.Text`; embeddings are [1, 512, width]."""

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        (part,) = family.text_encoders
        encoder: Any = parts[part.name]
        self._encoder = encoder
        folder = tokenizers[part.name]
        assert folder is not None, "no tokenizer is bundled"
        self._tokenizer = load_tokenizer(folder, encoder.config.vocab_size, "UMT5")
        self._device = device
        self._cache: OrderedDict[tuple[str, int], tuple[Tensor, str]] = OrderedDict()

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the prompt and the negative prompt, one at a time.

        Raises:
            RecipeError: a prompt has characters for which ftfy is needed, but it is not installed.
        """
        warnings = []
        rows: list[Tensor | None] = []
        for name, text in (("prompt", prompts.prompt), ("negative prompt", prompts.negative)):
            if text is None:
                rows.append(None)
                continue
            states, cut = self._embed(cleaned(text))
            rows.append(states)
            if cut:
                warnings.append(
                    f'The end of the {name} exceeds {MAX_TOKENS} tokens and has no effect: "{cut}".'
                )
        return Encoded(rows[0], rows[1], tuple(warnings))

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        row = torch.zeros(1, MAX_TOKENS, self._encoder.config.d_model, device=self._device)
        return Encoded(row, row if negative else None)

    def _embed(self, text: str) -> tuple[Tensor, str]:
        """Return the hidden states of a text, and the end of the text that was cut off.

        The encoder gets the attention mask. Its states for the padding are replaced by zeros.
        """
        key = (text, torch.get_num_threads())  # the last bits depend on the number of threads
        if key not in self._cache:
            tokens = self._tokenizer(
                text,
                padding="max_length",
                max_length=MAX_TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            mask = tokens.attention_mask.to(self._device)
            states = self._encoder(tokens.input_ids.to(self._device), mask)[0]
            length = int(mask.sum())
            zeros = states.new_zeros(1, MAX_TOKENS - length, states.shape[-1])
            states = torch.cat([states[:, :length], zeros], dim=1)
            self._cache[key] = (states, self._cut(text))
            if len(self._cache) > _MAX_CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _cut(self, text: str) -> str:
        """Return the end of `text` that truncation removes."""
        encoded = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        offsets = encoded.offset_mapping
        if len(offsets) <= MAX_TOKENS:
            return ""
        # The end token takes the position of the first removed token.
        start, _ = offsets[MAX_TOKENS - 1]
        return text[start:].strip()


def cleaned(text: str) -> str:
    """Return a prompt as the pipeline of diffusers cleans it.

    It applies `ftfy.fix_text`, replaces HTML entities twice, and joins lines and spaces. For
    printable ASCII, `fix_text` replaces at most HTML entities, which the next step does anyway.

    Raises:
        RecipeError: the text has other characters, and ftfy is not installed.
    """
    if not _PLAIN.fullmatch(text):
        try:
            import ftfy
        except ModuleNotFoundError as error:
            raise RecipeError(
                "For prompts with characters beyond ASCII, Wan needs the package ftfy: "
                "pip install ftfy.",
                field="prompt",
            ) from error
        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip()
