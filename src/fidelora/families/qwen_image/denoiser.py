"""The transformer of Qwen-Image, with guidance that keeps the norm of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.families.qwen_image.latents import grid_of, pack, unpack
from fidelora.sampling.guidance import guide, match_norm
from fidelora.sampling.loop import Denoise


class QwenImageDenoiser:
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

        It takes latents [images, 1, 16, height / 8, width / 8] and a timestep.

        The transformer evaluates each prompt separately, so texts need neither padding nor a mask.
        Each token of the guided prediction is scaled to the norm of the same token of the
        prediction for the positive prompt.
        """
        transformer, guided = self._transformer, self.uses_negative(guidance)
        grid = grid_of(size)
        texts = [
            (one.positive.to(transformer.dtype), one.negative.to(transformer.dtype))
            if guided
            else (one.positive.to(transformer.dtype), None)
            for one in encoded
        ]

        def predict(tokens: Tensor, time: Tensor, text: Tensor) -> Tensor:
            output: Tensor = transformer(
                hidden_states=tokens,
                timestep=time,
                encoder_hidden_states=text,
                img_shapes=[[(1, *grid)]],
                return_dict=False,
            )[0]
            return output

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            # The schedule multiplied sigma by 1000 in float32; the trainer's pipeline divides the
            # timestep in the dtype of the latents.
            time = t.expand(1).to(latents.dtype) / 1000
            outputs = []
            for row, (positive, negative) in zip(pack(latents), texts, strict=True):
                tokens = row.unsqueeze(0)
                output = predict(tokens, time, positive)
                if negative is not None:
                    other = predict(tokens, time, negative)
                    output = match_norm(guide(other, output, guidance.scale), output)
                outputs.append(output)
            return unpack(torch.cat(outputs), grid)

        return denoise
