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
        # Rows with the same number of tokens are evaluated in one batch. Without emphasis, all rows
        # have the same number.
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_length.setdefault(row.text.shape[1], []).append(index)
        batches = [
            _Batch([rows[index].to(rows[index].text.device, dtype) for index in indices], unet)
            for indices in by_length.values()
        ]

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            if len(batches) == 1:
                return batches[0].predict(latents, t)
            prediction = torch.empty_like(latents)
            for indices, batch in zip(by_length.values(), batches, strict=True):
                prediction[indices] = batch.predict(latents[indices], t)
            return prediction

        def predict_guided(latents: Tensor, t: Tensor) -> Tensor:
            # Computed in one batch, because separate batches can differ in the last bit.
            negative, positive = predict(torch.cat([latents] * 2), t).chunk(2)
            return guide(negative, positive, guidance.scale, guidance.rescale)

        return predict_guided if guided else predict


class _Batch:
    """Conditioning whose rows have the same number of tokens, and the UNet that evaluates them."""

    def __init__(self, rows: Sequence[Conditioning], unet: Any) -> None:
        self._unet = unet
        conditioning = Conditioning.concatenate(rows)
        # `_text` is the same tensor at every step, so that denoisers on the CPU can cache its
        # projections (`CachedTextProjection`). Its dtype differs from the recipe's only in `fast`.
        self._text = conditioning.text.to(unet.dtype)
        # `_added` keeps the recipe's dtype, because `fast` would otherwise round sizes in pixels to
        # the 8 bits of bfloat16. The UNet casts the embeddings of the sizes to its own dtype.
        self._added = dict(conditioning.added) or None

    def predict(self, latents: Tensor, t: Tensor) -> Tensor:
        """Return the UNet's output for latents [rows, 4, height / 8, width / 8]."""
        prediction = self._unet(
            latents.to(self._unet.dtype), t, encoder_hidden_states=self._text,
            added_cond_kwargs=self._added, return_dict=False,
        )[0]  # fmt: skip
        return cast(Tensor, prediction.to(latents.dtype))
