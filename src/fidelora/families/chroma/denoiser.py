"""The transformer of Chroma, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families.chroma.text import ChromaConditioning
from fidelora.families.patches import pack, positions, unpack
from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.sampling.guidance import guide
from fidelora.sampling.loop import Denoise

_MAX_WITHOUT_NEGATIVE = 1.00001
"""Largest guidance scale at which the trainer's pipeline skips the negative prompt."""


class ChromaDenoiser:
    """Implements `families.protocols.Denoiser`."""

    def __init__(self, module: nn.Module) -> None:
        self._transformer: Any = module

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return guidance.scale > _MAX_WITHOUT_NEGATIVE

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the guided prediction.

        It takes latents [images, 16, height / 8, width / 8] and a timestep. The prompts and the
        negative prompts are evaluated in separate calls.
        """
        positive = self._pass([one.positive for one in encoded], size)
        if not self.uses_negative(guidance):
            return positive
        negative = self._pass([one.negative for one in encoded], size)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            wanted = positive(latents, t)
            return guide(negative(latents, t), wanted, guidance.scale)

        return denoise

    def _pass(self, rows: Sequence[ChromaConditioning], size: Size) -> Denoise:
        """Return a function that evaluates the transformer with one text per image."""
        transformer = self._transformer
        dtype: torch.dtype = transformer.dtype
        states = torch.cat([row.states for row in rows]).to(dtype)
        mask = torch.cat([row.mask for row in rows]).to(states.device, dtype)
        text_ids = torch.zeros(states.shape[1], 3, device=states.device, dtype=dtype)
        image_ids = positions(size, states.device, dtype)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            prediction = transformer(
                img=pack(latents.to(dtype)),
                img_ids=image_ids,
                txt=states,
                txt_ids=text_ids,
                txt_mask=mask,
                # Rounded before the division, as in the trainer's pipeline.
                timesteps=t.expand(len(rows)).to(dtype) / 1000,
            )
            return unpack(prediction, size).to(latents.dtype)

        return denoise
