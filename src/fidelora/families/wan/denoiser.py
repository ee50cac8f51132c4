"""The transformers of Wan 2.1 and 2.2 with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.sampling.guidance import guide
from fidelora.sampling.loop import Denoise


class WanDenoiser:
    """Implements `families.protocols.Denoiser`."""

    def __init__(self, module: nn.Module) -> None:
        self._transformer: Any = module

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return guidance.scale > 1

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the guided prediction, one image at a time.

        It takes latents [images, 16, latent frames, height / 8, width / 8], in float32 at the first
        step, and a float32 timestep of 0 to 1000. The prediction has the dtype of the transformer.
        """
        transformer, guided = self._transformer, self.uses_negative(guidance)
        texts = [
            (one.positive.to(transformer.dtype), one.negative.to(transformer.dtype))
            if guided
            else (one.positive.to(transformer.dtype), None)
            for one in encoded
        ]

        def predict(latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
            output: Tensor = transformer(
                hidden_states=latents,
                timestep=t,
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
            return output

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            rounded, time = latents.to(transformer.dtype), t.expand(1)
            outputs = []
            for row, (positive, negative) in zip(rounded, texts, strict=True):
                output = predict(row.unsqueeze(0), time, positive)
                if negative is not None:
                    other = predict(row.unsqueeze(0), time, negative)
                    output = guide(other, output, guidance.scale)
                outputs.append(output)
            return torch.cat(outputs)

        return denoise


_BOUNDARY = 875  # the smallest timestep of the transformer for high noise; 0.875 of 1000


class TwoStageWanDenoiser:
    """Implements `families.protocols.Denoiser` for Wan 2.2: one transformer for each stage.

    Both stages have the same guidance scale, as in the trainer.
    """

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module) -> None:
        self._high, self._low = WanDenoiser(high_noise), WanDenoiser(low_noise)

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return self._high.uses_negative(guidance)

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function like `WanDenoiser`'s that selects the transformer by the timestep."""
        high = self._high.prepare(encoded, guidance, size, dtype)
        low = self._low.prepare(encoded, guidance, size, dtype)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            return high(latents, t) if t >= _BOUNDARY else low(latents, t)

        return denoise
