"""Names of the transformer's modules in the original code of Lumina-Image 2.0.

kohya's trainer and ComfyUI use these names in adapters, for example
`lora_unet_layers_0_attention_qkv`. The original code computes query, key and value in one module.
Source: https://github.com/Alpha-VLLM/Lumina-Image-2.0, `models/model.py`, `NextDiT`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TOP = {
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_BLOCK = {
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}
_FUSED = ("attn.to_q", "attn.to_k", "attn.to_v")
_PATH = re.compile(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)")


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Map diffusers' module paths to the original code's, for modules that are whole in both."""
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
    fused = {}
    for path in paths:
        found = _PATH.fullmatch(path)
        if found is not None and found[2] == _FUSED[0]:
            fused[f"{found[1]}.attention.qkv"] = tuple(f"{found[1]}.{part}" for part in _FUSED)
    return fused
