"""Single-file checkpoints of Chroma, which contain only the transformer, under its own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fidelora.errors import BaseModelFilesError
from fidelora.families.spec import Family

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
        BaseModelFilesError: the file is not a checkpoint of Chroma.
    """
    if not any(key.startswith(_MARK) for key in weights):
        raise BaseModelFilesError(
            f"{name} is not a checkpoint of {family.title}: it has no weights that begin with "
            f"{_MARK} Use a checkpoint with the original names."
        )
    return {family.part("denoiser").name: dict(weights)}


def convert_decoder(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a VAE, which have diffusers' names already."""
    return dict(weights)
