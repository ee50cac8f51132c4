"""The transformer of FLUX.2-klein, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fidelora.families.flux2_klein.transformer import Flux2Transformer, rotary_tables
from fidelora.families.protocols import Encoded, Guidance, Size
from fidelora.sampling.guidance import guide
from fidelora.sampling.loop import Denoise


class KleinDenoiser:
    """Implements `families.protocols.Denoiser`."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, Flux2Transformer)
        self._transformer = module

    def uses_negative(self, guidance: Guidance) -> bool:
        """Return True if the guidance scale is above 1."""
        return guidance.scale > 1

    def prepare(
        self, encoded: Sequence[Encoded], guidance: Guidance, size: Size, dtype: torch.dtype
    ) -> Denoise:
        """Return a function that computes the guided prediction.

        It takes latents [images, 128, height / 16, width / 16] and a timestep from 1 to 0.

        As in the trainer, positive and negative prompts are evaluated one after the other, because
        a batch of both would differ in the last bits.
        """
        transformer = self._transformer
        compute = transformer.dtype
        positive = torch.cat([one.positive for one in encoded]).to(compute)
        negative = None
        if self.uses_negative(guidance):
            negative = torch.cat([one.negative for one in encoded]).to(compute)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            rows, columns = latents.shape[-2:]
            device = latents.device
            tables = rotary_tables(positive.shape[1], rows, columns, transformer.config, device)
            tokens = latents.to(compute).flatten(2).transpose(1, 2).contiguous()
            time = t.to(compute).expand(len(tokens))
            predicted = transformer(tokens, positive, time, tables)
            if negative is not None:
                without = transformer(tokens, negative, time, tables)
                predicted = guide(without, predicted, guidance.scale)
            image: Tensor = predicted.transpose(1, 2).unflatten(2, (rows, columns))
            return image.to(latents.dtype)

        return denoise
