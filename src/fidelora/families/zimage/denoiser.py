"""The transformer of Z-Image, with guidance that is added to the positive prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.sampling.loop import Denoise


class ZImageDenoiser:
    """Implements `families.protocols.Denoiser`.

    Since release 0.10.21, a guidance scale g means `positive + (g - 1) * (positive - negative)` in
    the trainer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._transformer: Any = module

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return guidance.scale > 1

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the guided prediction.

        It takes float32 latents [images, 16, height / 8, width / 8] and a timestep.

        The transformer evaluates positive and negative prompts in one batch, positive first. It
        pads texts of different lengths, so separate calls would differ in the last bits. All
        arithmetic outside the transformer is in float32.
        """
        transformer, guided = self._transformer, self.uses_negative(guidance)
        weight = guidance.scale - 1
        rows = [*(one.positive for one in encoded), *(one.negative for one in encoded if guided)]
        texts = [row.to(transformer.dtype) for row in rows]

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            time = ((1000 - t) / 1000).expand(len(texts))  # 0 is noise, 1 is data
            images = latents.to(transformer.dtype)
            if guided:
                images = images.repeat(2, 1, 1, 1)
            frames = list(images.unsqueeze(2).unbind(0))  # one frame each: [16, 1, h, w]
            predicted = transformer(frames, time, texts, return_dict=False)[0]
            outputs = [output.float() for output in predicted]
            if guided:
                half = len(encoded)
                pairs = zip(outputs[:half], outputs[half:], strict=True)
                outputs = [
                    positive + weight * (positive - negative) for positive, negative in pairs
                ]
            # Negated: the transformer predicts the direction from noise to data.
            return -torch.stack(outputs).squeeze(2)

        return denoise
