"""Single-file checkpoints of Lumina-Image 2.0, which contain only the transformer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fidelora.families.lumina2.names import fused_names, original_names
from fidelora.families.spec import Family
from fidelora.families.transformer_file import convert_decoder as convert_decoder
from fidelora.families.transformer_file import split_rows, transformer_weights

_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)\.(\d+)\.(.+)")
_UNUSED = "norm_final.weight"
_STACKS = {
    "layers": "num_layers",
    "noise_refiner": "num_refiner_layers",
    "context_refiner": "num_refiner_layers",
}


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
        BaseModelFilesError: the file is not a checkpoint of Lumina-Image 2.0, or contains other
            parts.
    """
    part = family.part("denoiser").name
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    own = transformer_weights(weights, family, name, blocks=blocks, foreign=("cap_pad_token",))
    config = configs[part]
    head = config["hidden_size"] // config["num_attention_heads"]
    rows = [head * config[f"num_{kind}_heads"] for kind in ("attention", "kv", "kv")]
    paths = _paths(config)
    whole = {original: path for path, original in original_names(paths).items()}
    fused = fused_names(paths)
    found: dict[str, Tensor] = {}
    for key, value in own.items():
        module, _, kind = key.rpartition(".")
        if key == _UNUSED:
            continue
        if module in fused and kind in ("weight", "bias"):
            pieces = split_rows(value, rows, key, name)
            for path, piece in zip(fused[module], pieces, strict=True):
                found[f"{path}.{kind}"] = piece
        elif module in whole:
            found[f"{whole[module]}.{kind}"] = value
        else:
            found[_norm(key)] = value
    return {part: found}


def _paths(config: Mapping[str, Any]) -> list[str]:
    """Return diffusers' paths of all modules that have another name in the original code."""
    inside = (
        "attn.to_q", "attn.to_out.0", "feed_forward.linear_1", "feed_forward.linear_2",
        "feed_forward.linear_3", "norm1.linear",
    )  # fmt: skip
    embedders = (
        "time_caption_embed.caption_embedder.1",
        "time_caption_embed.timestep_embedder.linear_1",
        "time_caption_embed.timestep_embedder.linear_2",
        "norm_out.linear_1",
        "norm_out.linear_2",
        "x_embedder",
    )
    blocks = [
        f"{stack}.{number}.{one}"
        for stack, count in _STACKS.items()
        for number in range(config[count])
        for one in inside
    ]
    return [*blocks, *embedders]


def _norm(key: str) -> str:
    """Return diffusers' name of a norm's weight; other names are returned as they are."""
    if key.startswith("cap_embedder.0."):
        return f"time_caption_embed.caption_embedder.0.{key.removeprefix('cap_embedder.0.')}"
    found = _BLOCK.fullmatch(key)
    if found is None:
        return key
    # The modulated norm of the other stacks is inside the module that modulates it.
    first = "norm1" if found[1] == "context_refiner" else "norm1.norm"
    names = {
        "attention_norm1.weight": f"{first}.weight",
        "attention_norm2.weight": "norm2.weight",
        "attention.q_norm.weight": "attn.norm_q.weight",
        "attention.k_norm.weight": "attn.norm_k.weight",
    }
    return f"{found[1]}.{found[2]}.{names.get(found[3], found[3])}"
