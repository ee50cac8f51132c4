"""Names of the transformer's modules in the original code of Wan 2.1.

AI Toolkit, ComfyUI and kohya's musubi-tuner use these names in adapters, for example
`diffusion_model.blocks.0.self_attn.q`.
Source: https://github.com/Wan-Video/Wan2.1, `wan/modules/model.py`, `WanModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_BLOCK = {
    **{f"attn1.{path}": f"self_attn.{name}" for path, name in _ATTENTION.items()},
    **{f"attn2.{path}": f"cross_attn.{name}" for path, name in _ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Map diffusers' module paths to the original code's."""
    names = {}
    for path in paths:
        found = re.fullmatch(r"(blocks\.\d+)\.(.+)", path)
        if found is None:
            name = _TOP.get(path)
        else:
            inside = _BLOCK.get(found[2])
            name = inside and f"{found[1]}.{inside}"
        if name:
            names[path] = name
    return names
