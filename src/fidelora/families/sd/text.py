"""Conversion of prompts to conditioning inputs of the UNet, for Stable Diffusion 1.5 and SDXL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families.clip import (
    ClipEncoder,
    PromptEmbedding,
    RunEncoder,
    last_state,
    load_tokenizer,
    penultimate_state,
)
from fidelora.families.emphasis import Emphasis
from fidelora.families.protocols import AdapterKey, Embedding, Encoded, Prompts, Size
from fidelora.families.spec import Family


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Conditioning inputs of the UNet, one row per image.

    Attributes:
        text: prompt embeddings [batch, 77, width]; with emphasis, a multiple of 77 tokens.
        added: `added_cond_kwargs` of the UNet, each [batch, ...]; empty for SD 1.5.
    """

    text: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Return the conditioning on this device, in this dtype."""
        return self._map([self], lambda tensors: tensors[0].to(device, dtype))

    @classmethod
    def concatenate(cls, rows: Sequence[Conditioning]) -> Conditioning:
        """Return one conditioning with all rows, in this order."""
        return cls._map(rows, torch.cat)

    @classmethod
    def _map(
        cls, rows: Sequence[Conditioning], join: Callable[[list[Tensor]], Tensor]
    ) -> Conditioning:
        added = {name: join([one.added[name] for one in rows]) for name in rows[0].added}
        return cls(join([one.text for one in rows]), added)


class SDText(ABC):
    """Base class for both families; implements `families.protocols.ExtendableText`."""

    run_encoder: RunEncoder

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Path | None],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.encoders: dict[str, ClipEncoder] = {}
        for part in family.text_encoders:
            assert part.tokenizer is not None, "a text encoder has a tokenizer"
            encoder: Any = parts[part.name]
            vocabulary = encoder.config.vocab_size
            tokenizer = load_tokenizer(tokenizers[part.name], part.tokenizer, vocabulary)
            run_encoder = type(self).run_encoder
            self.encoders[part.name] = ClipEncoder(tokenizer, encoder, device, run_encoder)
        self._unet_config: Any = parts[family.part("denoiser").name].config
        self._device = device

    def encode(self, prompts: Prompts, size: Size, adapter_key: AdapterKey) -> Encoded:
        """Encode the prompts of one image, the negative prompt first."""
        negative, negative_warnings = (
            (None, ())
            if prompts.negative is None
            else self._row(self._negative_texts(prompts), prompts.emphasis, size, adapter_key)
        )
        texts = dict.fromkeys(self.encoders, ("prompt", prompts.prompt))
        positive, warnings = self._row(texts, prompts.emphasis, size, adapter_key)
        both = tuple(dict.fromkeys((*negative_warnings, *warnings)))
        return Encoded(positive, negative, both)

    def blank(self, size: Size, *, negative: bool) -> Encoded:
        """Return conditioning of float32 zeros."""
        row = self._blank_row()
        return Encoded(row, row if negative else None)

    @contextmanager
    def extended(self, embeddings: Sequence[Embedding]) -> Iterator[None]:
        """Add the tokens of embeddings to all text encoders until the block ends."""
        with ExitStack() as stack:
            for name, encoder in self.encoders.items():
                added = [(one.word, one.vectors[name]) for one in embeddings]
                stack.enter_context(encoder.extended(added))
            yield

    def initial_vectors(self, words: str, tokens: int) -> dict[str, Tensor]:
        """Return the vectors from which the trainer starts an embedding, by text encoder."""
        return {
            name: encoder.initial_vectors(words, tokens) for name, encoder in self.encoders.items()
        }

    def _row(
        self,
        texts: Mapping[str, tuple[str, str]],
        emphasis: Emphasis,
        size: Size,
        adapter_key: AdapterKey,
    ) -> tuple[Conditioning, tuple[str, ...]]:
        """Encode one text per encoder; `texts` maps encoders to (name in messages, text)."""
        embedded = {
            name: self.encoders[name].embed(text, adapter_key(name), emphasis)
            for name, (_, text) in texts.items()
        }
        warnings = _cut_warnings((texts[name][0], one.cut) for name, one in embedded.items())
        return self.condition(embedded, size), tuple(warnings)

    def _negative_texts(self, prompts: Prompts) -> dict[str, tuple[str, str]]:
        assert prompts.negative is not None
        return dict.fromkeys(self.encoders, ("negative prompt", prompts.negative))

    def _blank_row(self) -> Conditioning:
        length = next(iter(self.encoders.values())).length
        width = self._unet_config.cross_attention_dim
        return Conditioning(torch.zeros(1, length, width, device=self._device))

    @abstractmethod
    def condition(self, embedded: Mapping[str, PromptEmbedding], size: Size) -> Conditioning:
        """Combine the embeddings of all text encoders into one row."""


class PlainText(SDText):
    """Stable Diffusion 1.5: the last hidden states of its only text encoder."""

    run_encoder = staticmethod(last_state)

    def condition(self, embedded: Mapping[str, PromptEmbedding], size: Size) -> Conditioning:
        (text,) = embedded.values()
        return Conditioning(text.states)


class PooledText(SDText):
    """SDXL: penultimate states of both text encoders, pooled embedding of the second, size ids.

    As in the trainer, original and target size are the image's size, and the crop starts at 0, 0.
    Empty prompts are encoded like all others, not replaced by zeros.
    """

    run_encoder = staticmethod(penultimate_state)

    def _negative_texts(self, prompts: Prompts) -> dict[str, tuple[str, str]]:
        texts = super()._negative_texts(prompts)
        if prompts.negative_2 is not None:
            texts["text_encoder_2"] = ("second negative prompt", prompts.negative_2)
        return texts

    def condition(self, embedded: Mapping[str, PromptEmbedding], size: Size) -> Conditioning:
        first, second = embedded["text_encoder"], embedded["text_encoder_2"]
        assert second.pooled is not None, "the second encoder has a projection"
        height_width = (size.height, size.width)
        # original size, corner of the crop, target size
        ids = [[*height_width, 0, 0, *height_width]]
        time_ids = torch.tensor(ids, device=second.states.device)
        text = torch.cat([first.states, second.states.to(first.states.dtype)], dim=-1)
        return Conditioning(text, {"text_embeds": second.pooled, "time_ids": time_ids})

    def _blank_row(self) -> Conditioning:
        config, count = self._unet_config, 6
        pooled = (
            config.projection_class_embeddings_input_dim - count * config.addition_time_embed_dim
        )
        shapes = {"text_embeds": pooled, "time_ids": count}
        added = {name: torch.zeros(1, n, device=self._device) for name, n in shapes.items()}
        return Conditioning(super()._blank_row().text, added)


def _cut_warnings(texts: Iterator[tuple[str, str]]) -> Iterator[str]:
    for name, cut in texts:
        if cut:
            yield f'The end of the {name} exceeds 77 tokens and has no effect: "{cut}".'
