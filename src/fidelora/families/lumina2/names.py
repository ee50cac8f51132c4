"""Names of the transformer's modules in the original code of Lumina-Image 2.0.

ComfyUI and kohya's trainer use these names in adapters, for example
`diffusion_model.layers.0.attention.qkv`. The original code computes query, key and value in one
module.
Source: https://github.com/Alpha-VLLM/Lumina-Image-2.0, `models/model.py`, `NextDiT`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = {
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}
_TOP = {
    "x_embedder": "x_embedder",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_PATH = re.compile(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)")


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Map diffusers' module paths to the original code's, for modules that are not fused there."""
    names = {}
    for path in paths:
        found = _PATH.fullmatch(path)
        if found is None:
            name = _TOP.get(path)
        else:
            inside = _BLOCK.get(found[2])
            name = inside and f"{found[1]}.{inside}"
        if name:
            names[path] = name
    return names


def fused_names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map the original code's fused modules to diffusers' paths, in the order of output rows."""
    matches = filter(None, map(_PATH.fullmatch, paths))
    blocks = [found[1] for found in matches if found[2] == "attn.to_q"]
    return {
        f"{block}.attention.qkv": tuple(f"{block}.attn.to_{one}" for one in "qkv")
        for block in blocks
    }
