"""Single-file checkpoints of Qwen-Image, which contain only the transformer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fidelora.families.spec import Family
from fidelora.families.transformer_file import convert_decoder as convert_decoder
from fidelora.families.transformer_file import transformer_weights


def split(
    weights: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    family: Family,
    others: Iterable[Family],
    name: str,
) -> dict[str, dict[str, Tensor]]:
    """Return the checkpoint's weights by part: all belong to the transformer.

    Args:
        weights: all tensors of the file. Their names are those of diffusers.
        configs, others: not used.
        name: name of the file for messages.

    Raises:
        BaseModelFilesError: the file is not a checkpoint of Qwen-Image, or contains other parts.
    """
    blocks = ("transformer_blocks.", "txt_norm.", "img_in.")
    own = transformer_weights(weights, family, name, blocks=blocks)
    return {family.part("denoiser").name: own}
