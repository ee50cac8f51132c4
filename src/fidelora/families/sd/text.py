"""What a UNet is told of an image besides its latents and the time: made from the recipe's texts, in the way of the model family.

A family names its way in `Family.conditioning`; a new way is one class here and one entry in `_WAYS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.accel.device import TORCH_DTYPES
from fidelora.families import Family
from fidelora.families.clip import EncodedText, TextReader, last_state, penultimate_state
from fidelora.recipe import Recipe

AdaptersOf = Callable[[str], Hashable]
"""For a text encoder's name: what tells it with its adapters from the same encoder with others."""


@dataclass(frozen=True, eq=False)
class Condition:
    """What the UNet is told, with as many rows as there are latents.

    Attributes:
        text: [batch, 77, width].
        added: what else the family's UNet takes as `added_cond_kwargs`, each [batch, ...].
    """

    text: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        """The same on this device in this dtype."""
        return self._each([self], lambda tensors: tensors[0].to(device, dtype))

    @classmethod
    def after_another(cls, conditions: Sequence[Condition]) -> Condition:
        """All rows of the first, then all of the second, and so on."""
        return cls._each(conditions, torch.cat)

    @classmethod
    def side_by_side(cls, conditions: Sequence[Condition]) -> Condition:
        """The first rows of all, then the second rows of all, and so on."""
        return cls._each(conditions, lambda tensors: torch.stack(tensors, dim=1).flatten(0, 1))

    @classmethod
    def _each(
        cls, conditions: Sequence[Condition], join: Callable[[list[Tensor]], Tensor]
    ) -> Condition:
        added = {
            name: join([one.added[name] for one in conditions]) for name in conditions[0].added
        }
        return cls(join([one.text for one in conditions]), added)


class Conditioning(ABC):
    """A family's way from a recipe to a `Condition`.

    Args:
        readers: the base model's text encoders by name.
        unet: what will be told; its configuration says the sizes.
    """

    encode: Callable[..., EncodedText]
    """How the text encoders of this way are read."""

    def __init__(self, readers: Mapping[str, TextReader], unet: nn.Module) -> None:
        self.readers = readers
        self._unet_config: Any = unet.config

    def of(
        self, recipe: Recipe, adapters: AdaptersOf, device: torch.device
    ) -> tuple[Condition, tuple[str, ...]]:
        """The condition of one image, and warnings of texts that do not fit.

        Returns:
            two rows, the negative prompt's first, or the prompt's alone without guidance; on `device` in the recipe's dtype.
        """
        texts = self._texts(recipe, negative=False)
        halves = (
            [texts] if recipe.guidance_scale <= 1 else [self._texts(recipe, negative=True), texts]
        )
        read = [
            {
                name: (what, self.readers[name].read(text, adapters(name)))
                for name, (what, text) in half.items()
            }
            for half in halves
        ]
        rows = [
            self._row(recipe, {name: encoded for name, (_, encoded) in half.items()})
            for half in read
        ]
        condition = Condition.after_another(
            [row.to(device, TORCH_DTYPES[recipe.dtype]) for row in rows]
        )
        return condition, tuple(dict.fromkeys(_too_long(read)))

    def blank(self, rows: int, device: torch.device) -> Condition:
        """A condition of the right shapes that says nothing, for trying out the UNet; float32."""
        length = next(iter(self.readers.values())).length
        return Condition(
            torch.zeros(rows, length, self._unet_config.cross_attention_dim, device=device)
        )

    def _texts(self, recipe: Recipe, *, negative: bool) -> dict[str, tuple[str, str]]:
        """For each text encoder what its text is called, and the text."""
        text = (
            ("negative prompt", recipe.negative_prompt) if negative else ("prompt", recipe.prompt)
        )
        return dict.fromkeys(self.readers, text)

    @abstractmethod
    def _row(self, recipe: Recipe, encoded: Mapping[str, EncodedText]) -> Condition:
        """One row, from what each text encoder made of its text."""


class TextAlone(Conditioning):
    """Stable Diffusion 1.5: the last state of its one text encoder."""

    encode = staticmethod(last_state)

    def _row(self, recipe: Recipe, encoded: Mapping[str, EncodedText]) -> Condition:
        (text,) = encoded.values()
        return Condition(text.embedding)


class TextPooledAndSize(Conditioning):
    """SDXL: the states before the last of both text encoders, the projection of the second one's whole text, and the image's size.

    Original and target size are the image's own, and nothing is cropped, as in the trainer. Empty texts are encoded like any other.
    """

    encode = staticmethod(penultimate_state)

    def _texts(self, recipe: Recipe, *, negative: bool) -> dict[str, tuple[str, str]]:
        texts = super()._texts(recipe, negative=negative)
        if negative and recipe.negative_prompt_2 is not None:
            texts["text_encoder_2"] = ("second negative prompt", recipe.negative_prompt_2)
        return texts

    def _row(self, recipe: Recipe, encoded: Mapping[str, EncodedText]) -> Condition:
        first, second = encoded["text_encoder"], encoded["text_encoder_2"]
        assert second.pooled is not None, "the second encoder has a projection"
        size = (recipe.height, recipe.width)
        sizes = torch.tensor(
            [[*size, 0, 0, *size]], device=second.embedding.device
        )  # original size, corner of the crop, target size
        text = torch.cat([first.embedding, second.embedding.to(first.embedding.dtype)], dim=-1)
        return Condition(text, {"text_embeds": second.pooled, "time_ids": sizes})

    def blank(self, rows: int, device: torch.device) -> Condition:
        config, numbers = self._unet_config, 6
        pooled = (
            config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
        )
        shapes = {"text_embeds": pooled, "time_ids": numbers}
        added = {name: torch.zeros(rows, width, device=device) for name, width in shapes.items()}
        return Condition(super().blank(rows, device).text, added)


_WAYS: Mapping[str, type[Conditioning]] = {"text": TextAlone, "text_pooled_size": TextPooledAndSize}


def conditioning_of(spec: Family) -> type[Conditioning]:
    """The way of a family."""
    return _WAYS[spec.conditioning]


def _too_long(read: Sequence[Mapping[str, tuple[str, EncodedText]]]) -> Iterator[str]:
    for half in read:
        for what, encoded in half.values():
            if encoded.cut:
                yield f'The end of the {what} does not fit into 77 tokens and has no effect: "{encoded.cut}".'
