"""The transformer of Lumina-Image 2.0, with guidance that keeps the norm of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.sampling.guidance import guide, match_norm
from fidelora.sampling.loop import Denoise


class Conditioning(NamedTuple):
    """An encoded prompt.

    Attributes:
        states: [1, tokens, width].
        mask: bool [1, tokens]; True for real tokens, False for padding.
    """

    states: Tensor
    mask: Tensor


class Lumina2Denoiser:
    """Implements `families.protocols.Denoiser`."""

    def __init__(self, module: nn.Module) -> None:
        self._transformer: Any = module

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return guidance.scale > 1

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the guided prediction.

        It takes latents [images, 16, height / 8, width / 8] and a timestep.

        As in the trainer, the transformer evaluates the prompts first and the negative prompts in a
        second pass. Guidance is computed in the dtype of the prediction.
        """
        positive = self._stacked([one.positive for one in encoded])
        negative = None
        if self.uses_negative(guidance):
            negative = self._stacked([one.negative for one in encoded])

        def predict(latents: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            time = (1 - t / 1000).expand(len(latents))  # 0 is noise, 1 is data
            prediction: Tensor = self._transformer(
                hidden_states=latents.to(self._transformer.dtype),
                timestep=time,
                encoder_hidden_states=text.states,
                encoder_attention_mask=text.mask,
                return_dict=False,
            )[0]
            return prediction.to(latents.dtype)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            prediction = predict(latents, t, positive)
            if negative is not None:
                guided = guide(predict(latents, t, negative), prediction, guidance.scale)
                prediction = match_norm(guided, prediction)
            return -prediction  # the transformer predicts the direction from noise to data

        return denoise

    def _stacked(self, rows: Sequence[Conditioning]) -> Conditioning:
        """Return the conditioning of several images, states in the dtype of the transformer."""
        states = torch.cat([row.states for row in rows]).to(self._transformer.dtype)
        return Conditioning(states, torch.cat([row.mask for row in rows]))
