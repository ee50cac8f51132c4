"""Diffusers' names of the transformer's modules, which adapter files may use.

The modules themselves have the names of the original code. Does not import torch.
Source: `Flux2Transformer2DModel` of diffusers 0.42.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

DOUBLE_BLOCK = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
"""Modules of `transformer_blocks.N` in diffusers, and of `double_blocks.N` in the original code."""

SINGLE_BLOCK = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
"""Modules of `single_transformer_blocks.N` in diffusers, and of `single_blocks.N`."""

STREAMS = ("img_attn", "txt_attn")

FUSED = {
    "attn.to_q": (0, 0), "attn.to_k": (0, 1), "attn.to_v": (0, 2),
    "attn.add_q_proj": (1, 0), "attn.add_k_proj": (1, 1), "attn.add_v_proj": (1, 2),
}  # fmt: skip
"""Projections of `transformer_blocks.N` that the original code stores as the rows of one matrix:
index of the stream in `STREAMS`, and position of the projection in the matrix (0, 1 or 2)."""

_DIFFUSERS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "double": (
        "transformer_blocks",
        {
            **{own: (name,) for name, own in DOUBLE_BLOCK.items()},
            **{
                f"{stream}.qkv": tuple(name for name, (one, _) in FUSED.items() if one == index)
                for index, stream in enumerate(STREAMS)
            },
        },
    ),
    "single": (
        "single_transformer_blocks",
        {own: (name,) for name, own in SINGLE_BLOCK.items()},
    ),
}
"""For each kind of block: its name in diffusers, and the names of its modules in diffusers by their
name in the original code."""


def diffusers_names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map module paths of the original code to those of diffusers (`Part.accepted_names`)."""
    names: dict[str, tuple[str, ...]] = {}
    for path in paths:
        block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", path)
        if block is None:
            continue
        blocks, modules = _DIFFUSERS[block[1]]
        found = modules.get(block[3], ())
        if found:
            names[path] = tuple(f"{blocks}.{block[2]}.{name}" for name in found)
    return names
