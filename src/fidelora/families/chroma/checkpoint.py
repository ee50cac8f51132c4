"""Single-file checkpoints of Chroma, which contain only the transformer, under its own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fidelora.families.spec import Family
from fidelora.families.transformer_file import convert_decoder as convert_decoder
from fidelora.families.transformer_file import transformer_weights

_MARK = "distilled_guidance_layer."
"""Prefix of weights that only Chroma has."""


def split(
    weights: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    family: Family,
    others: Iterable[Family],
    name: str,
) -> dict[str, dict[str, Tensor]]:
    """Return the checkpoint's weights by part: all of them belong to the transformer.

    Args:
        weights: all tensors of the file.
        configs, others: not used.
        name: name of the file for messages.

    Raises:
        BaseModelFilesError: the file is not a checkpoint of Chroma, or contains other parts.
    """
    blocks = ("double_blocks.", "single_blocks.", _MARK)
    own = transformer_weights(weights, family, name, blocks=blocks)
    return {family.part("denoiser").name: own}
