"""Diffusers' names of the transformer's modules, which adapter files may use.

The modules themselves have the names of the original code. Does not import torch.
Source: `ChromaTransformer2DModel` of diffusers 0.42.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    # The first layer of the MLP is four times as wide as each of query, key and value.
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", *["proj_mlp"] * 4),
    "linear2": ("proj_out",),
}
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}
_APPROXIMATOR = re.compile(r"(distilled_guidance_layer\.layers\.\d+)\.(in|out)_layer")


def diffusers_names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map module paths of the original code to those of diffusers (`Part.accepted_names`)."""
    names: dict[str, tuple[str, ...]] = {}
    for path in paths:
        if path in _TOP:
            names[path] = (_TOP[path],)
        elif layer := _APPROXIMATOR.fullmatch(path):
            names[path] = (f"{layer[1]}.linear_{1 if layer[2] == 'in' else 2}",)
        elif block := re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", path):
            inside = (_DOUBLE if block[1] == "double" else _SINGLE).get(block[3], ())
            blocks = "transformer_blocks" if block[1] == "double" else "single_transformer_blocks"
            names[path] = tuple(f"{blocks}.{block[2]}.{name}" for name in inside)
    return names
