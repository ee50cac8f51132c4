"""The transformer of FLUX.1, with embedded or with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families.flux.text import FluxConditioning
from fidelora.families.patches import pack, positions, unpack
from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.sampling.guidance import guide
from fidelora.sampling.loop import Denoise

_MAX_WITHOUT_NEGATIVE = 1.00001
"""Largest guidance scale at which the trainer's pipeline skips the negative prompt."""


class FluxDenoiser:
    """Implements `families.protocols.Denoiser`.

    The guidance scale is an input of the transformer. Transformers without such an input
    (FLUX.1-schnell) ignore it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._transformer: Any = module

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return False: a distilled transformer does not use a negative prompt."""
        return False

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the prediction.

        It takes latents [images, 16, height / 8, width / 8] and a timestep.
        """
        scale = guidance.scale if self._transformer.config.guidance_embeds else None
        return self._pass([one.positive for one in encoded], scale, size)

    def _pass(self, rows: Sequence[FluxConditioning], scale: float | None, size: Size) -> Denoise:
        """Return a function that evaluates the transformer with one text per image.

        Args:
            scale: guidance scale; None if the transformer does not embed it.
        """
        transformer = self._transformer
        dtype: torch.dtype = transformer.dtype
        pooled = torch.cat([row.pooled for row in rows]).to(dtype)
        states = torch.cat([row.states for row in rows]).to(dtype)
        device = states.device
        text_ids = torch.zeros(states.shape[1], 3, device=device, dtype=dtype)
        image_ids = positions(size, device, dtype)
        # Float32, whatever the dtype of the transformer.
        embedded = None if scale is None else torch.full([len(rows)], scale, device=device)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            prediction = transformer(
                hidden_states=pack(latents.to(dtype)),
                # Rounded before the division, as in the trainer's pipeline.
                timestep=t.expand(len(rows)).to(latents.dtype) / 1000,
                guidance=embedded,
                pooled_projections=pooled,
                encoder_hidden_states=states,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
            return unpack(prediction, size).to(latents.dtype)

        return denoise


class FluxCfgDenoiser(FluxDenoiser):
    """Classifier-free guidance, with a transformer that embeds no guidance."""

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return guidance.scale > _MAX_WITHOUT_NEGATIVE

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the guided prediction.

        The prompts and the negative prompts are evaluated in separate calls.
        """
        positive = self._pass([one.positive for one in encoded], None, size)
        if not self.uses_negative(guidance):
            return positive
        negative = self._pass([one.negative for one in encoded], None, size)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            wanted = positive(latents, t)
            return guide(negative(latents, t), wanted, guidance.scale)

        return denoise
