"""Names of the transformer's modules in ComfyUI.

Adapters that ComfyUI saves, or that were trained on its checkpoints, have these names, for example
`diffusion_model.layers.0.attention.qkv`: query, key and value are one module, as in Lumina-Image
2.0, whose class ComfyUI uses. The output of the attention, the image embedder and the final layer
also have other names than in diffusers.
Source: https://github.com/comfyanonymous/ComfyUI, `comfy/ldm/lumina/model.py`, and the names in its
checkpoints of Z-Image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUTPUT = "attention.to_out.0"
_QUERY = "attention.to_q"
_EMBEDDER = re.compile(r"all_(x_embedder|final_layer)\.2-1(\..+)?")


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Map diffusers' module paths to ComfyUI's, for modules that are not fused there."""
    names = {}
    for path in paths:
        if path.endswith(_OUTPUT):
            names[path] = path.removesuffix(_OUTPUT) + "attention.out"
        elif found := _EMBEDDER.fullmatch(path):
            names[path] = found[1] + (found[2] or "")
    return names


def fused_names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map ComfyUI's fused modules to diffusers' paths, in the order of output rows."""
    blocks = [path.removesuffix(_QUERY) for path in paths if path.endswith(_QUERY)]
    return {
        f"{block}attention.qkv": tuple(f"{block}attention.to_{one}" for one in "qkv")
        for block in blocks
    }
