"""Single-file checkpoints of FLUX.1 with the names of its original code.

Black Forest Labs publishes the transformer in this form, and ComfyUI and kohya's programs read and
write it. The other parts come from elsewhere (`Part.companion`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fidelora.families.flux.names import fused_names, original_names
from fidelora.families.spec import Family
from fidelora.families.transformer_file import convert_decoder as convert_decoder
from fidelora.families.transformer_file import split_rows, transformer_weights

_OTHER_FAMILIES = ("distilled_guidance_layer.", "double_stream_modulation_img.")
"""Prefixes of weights of Chroma and of FLUX.2, whose other names are the same."""
_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
_LAST_MODULATION = "final_layer.adaLN_modulation.1"


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
        configs: configurations by part.
        others: not used.
        name: name of the file for messages.

    Raises:
        BaseModelFilesError: the file is not a checkpoint of FLUX.1, or contains other parts.
    """
    part = family.part("denoiser").name
    blocks = ("double_blocks.", "single_blocks.")
    own = transformer_weights(weights, family, name, blocks=blocks, foreign=_OTHER_FAMILIES)
    return {part: _converted(own, configs[part], name)}


def _converted(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> dict[str, Tensor]:
    """Return the transformer's weights under diffusers' names.

    Unknown names are kept, so that the error of the loader lists them.
    """
    paths = _paths(config)
    whole = {original: path for path, original in original_names(paths).items()}
    fused = fused_names(paths)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        if module == _LAST_MODULATION:
            # The original code stores the shift first, diffusers the scale.
            shift, scale = value.chunk(2)
            found[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        elif module in whole:
            found[f"{whole[module]}.{kind}"] = value
        elif module in fused and kind in ("weight", "bias"):
            # Queries, keys and values have `width` rows each. The rest is the MLP's.
            parts = fused[module]
            rows = [width] * 3 + [len(value) - 3 * width] * (len(parts) - 3)
            pieces = split_rows(value, rows, key, name)
            found |= {f"{path}.{kind}": one for path, one in zip(parts, pieces, strict=True)}
        else:
            found[_norm(key) or key] = value
    return found


def _paths(config: Mapping[str, Any]) -> list[str]:
    """Return diffusers' paths of all modules that have a name in the original code."""
    double = [f"transformer_blocks.{n}." for n in range(config["num_layers"])]
    single = [f"single_transformer_blocks.{n}." for n in range(config["num_single_layers"])]
    inside = (
        "norm1.linear", "norm1_context.linear", "norm.linear", "proj_out", "proj_mlp",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    )  # fmt: skip
    embedders = [
        f"time_text_embed.{one}_embedder.linear_{number}"
        for one in ("timestep", "guidance", "text")
        for number in (1, 2)
    ]
    blocks = [block + one for block in (*double, *single) for one in inside]
    return [*blocks, *embedders, "x_embedder", "context_embedder", "proj_out"]


def _norm(key: str) -> str:
    """Return diffusers' name of the weight of a norm of queries or keys; empty for others."""
    found = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", key)
    if found is None or found[3] not in _NORMS:
        return ""
    kind = "single_transformer_blocks" if found[1] == "single" else "transformer_blocks"
    return f"{kind}.{found[2]}.{_NORMS[found[3]]}"
