"""Single-file checkpoints of Wan 2.1, which contain only the transformer.

The original code and ComfyUI use the same names.
Source: https://github.com/Wan-Video/Wan2.1, `wan/modules/model.py`, `WanModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fidelora.errors import BaseModelFilesError
from fidelora.families.spec import Family
from fidelora.families.transformer_file import convert_decoder as convert_decoder
from fidelora.families.transformer_file import transformer_weights
from fidelora.families.wan.names import original_names

_FOREIGN = ("img_emb.", "vace_blocks.", "condition_embedder.image_embedder.")
"""Prefixes of weights of models that make videos from images."""

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_MODULES = (
    *(f"attn{number}.{one}" for number in (1, 2) for one in _PROJECTIONS),
    "ffn.net.0.proj",
    "ffn.net.2",
)
"""Diffusers' paths of the linear layers in a block."""

_TOP = (
    *(f"condition_embedder.{one}_embedder.linear_{n}" for one in ("text", "time") for n in (1, 2)),
    "condition_embedder.time_proj",
    "proj_out",
)
"""Diffusers' paths of the linear layers outside the blocks."""

_OTHERS = (
    # The original code calls the norms in the order norm1, norm3, norm2.
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.self_attn\.(norm_[qk])\.", r"\1.attn1.\2."),
    (r"(blocks\.\d+)\.cross_attn\.(norm_[qk])\.", r"\1.attn2.\2."),
    (r"((?:blocks\.\d+\.)?)(?:head\.)?modulation$", r"\1scale_shift_table"),
)
"""Names of the weights of other modules: pattern of the original name, and diffusers' name."""


def split(
    weights: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    family: Family,
    others: Iterable[Family],
    name: str,
) -> dict[str, dict[str, Tensor]]:
    """Return the checkpoint's weights by part: all belong to the transformer.

    Args:
        weights: all tensors of the file, with the names of the original code or of diffusers.
        configs: configurations by part.
        others: not used.
        name: name of the file for messages.

    Raises:
        BaseModelFilesError: the file is not a checkpoint of Wan 2.1 for text to video, or contains
            other parts, or the family has more than one transformer.
    """
    parts = [part.name for part in family.parts if part.role == "denoiser"]
    if len(parts) > 1:
        raise BaseModelFilesError(
            f"{name} is a single file, but {family.title} has {len(parts)} transformers. Use a "
            "diffusers folder."
        )
    blocks = ("blocks.0.", "patch_embedding.")
    own = transformer_weights(weights, family, name, blocks=blocks, foreign=_FOREIGN)
    paths = [
        *(f"blocks.{n}.{one}" for n in range(configs[parts[0]]["num_layers"]) for one in _MODULES),
        *_TOP,
    ]
    whole = {original: path for path, original in original_names(paths).items()}
    found: dict[str, Tensor] = {}
    for key, value in own.items():
        module, _, kind = key.rpartition(".")
        if module in whole:
            found[f"{whole[module]}.{kind}"] = value
        else:
            found[_diffusers_name(key)] = value
    return {parts[0]: found}


def _diffusers_name(key: str) -> str:
    """Return diffusers' name of a weight that is not in a linear layer."""
    for pattern, replacement in _OTHERS:
        found = re.match(pattern, key)
        if found is not None:
            return found.expand(replacement) + key[found.end() :]
    return key
