"""The UNet of Stable Diffusion 1.5 and SDXL, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.families.sd.text import Conditioning
from fidelora.sampling.guidance import guide
from fidelora.sampling.loop import Denoise


class UNetDenoiser:
    """Implements `families.protocols.Denoiser`."""

    def __init__(self, module: nn.Module) -> None:
        self._unet: Any = module

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return guidance.scale > 1

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the guided prediction.

        It takes latents [images, 4, height / 8, width / 8] and a timestep.
        """
        unet, guided = self._unet, self.uses_negative(guidance)
        # All negative prompts first, then all prompts.
        rows = [*(one.negative for one in encoded if guided), *(one.positive for one in encoded)]
        conditioning = Conditioning.concatenate([row.to(row.text.device, dtype) for row in rows])
        # `text` is the same tensor at every step, so that its projections can be cached on the CPU.
        # Its dtype differs from the recipe's only in `fast`.
        text = conditioning.text.to(unet.dtype)
        # Not cast to the UNet's dtype here: the UNet does it, after it has embedded the size in
        # pixels, which needs more bits than bfloat16 has (8).
        added = dict(conditioning.added) or None

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            prediction = unet(
                latents.to(unet.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added,
                return_dict=False,
            )[0]  # fmt: skip
            return cast(Tensor, prediction.to(latents.dtype))

        def predict_guided(latents: Tensor, t: Tensor) -> Tensor:
            # Computed in one batch, because separate batches can differ in the last bit.
            negative, positive = predict(torch.cat([latents] * 2), t).chunk(2)
            return guide(negative, positive, guidance.scale, guidance.rescale)

        return predict_guided if guided else predict
