"""Single-file checkpoints that contain only a transformer, as ComfyUI uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fidelora.errors import BaseModelFilesError
from fidelora.families.spec import Family

_PREFIX = "model.diffusion_model."
"""Prefix of the transformer in some of ComfyUI's checkpoints."""


def transformer_weights(
    weights: Mapping[str, Tensor],
    family: Family,
    name: str,
    *,
    blocks: Sequence[str],
    foreign: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the weights of a file without ComfyUI's prefix.

    Args:
        weights: all tensors of the file.
        name: name of the file for messages.
        blocks: prefixes of weights; every transformer of the family has all of them.
        foreign: prefixes of weights that only other families have.

    Raises:
        BaseModelFilesError: the file belongs to another family, or contains other parts.
    """
    inside = [key for key in weights if key.startswith(_PREFIX)]
    if inside and len(inside) < len(weights):
        other = next(key for key in weights if not key.startswith(_PREFIX))
        raise BaseModelFilesError(
            f"{name} also contains other parts, such as {other!r}. Use a file with the transformer "
            f"only, and set config to a folder with the other parts of {family.title}."
        )
    own = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    missing = [block for block in blocks if not any(key.startswith(block) for key in own)]
    others = [key for key in own if key.startswith(tuple(foreign))]
    if missing or others:
        reason = f"has no weight {missing[0]}*" if missing else f"has the weight {others[0]:.200}"
        raise BaseModelFilesError(
            f"{name} is not a checkpoint of {family.title}: it {reason}. Use a file with the "
            "transformer under its original names, or a diffusers folder."
        )
    return own


def split_rows(value: Tensor, rows: Sequence[int], key: str, name: str) -> tuple[Tensor, ...]:
    """Return the rows of a fused weight by module.

    Raises:
        BaseModelFilesError: the weight has another number of rows.
    """
    if sum(rows) != len(value) or min(rows) <= 0:
        raise BaseModelFilesError(
            f"{key} in {name} has {len(value)} rows, which do not fit the configuration. Set "
            "config to the folder with the model's configurations."
        )
    return tuple(piece.contiguous() for piece in torch.split(value, list(rows)))


def convert_decoder(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a separate VAE, which have diffusers' names already."""
    return dict(weights)
