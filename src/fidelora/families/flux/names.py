"""Names of the transformer's modules in the original code of FLUX.1.

kohya's trainer and ComfyUI use these names in adapters, for example
`lora_unet_double_blocks_0_img_attn_qkv`. The original code computes query, key and value, and in
single blocks also the first layer of the MLP, in one module.
Source: https://github.com/black-forest-labs/flux, `src/flux/modules/layers.py`, `DoubleStreamBlock`
and `SingleStreamBlock`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
# The modulation of the final layer is left out: the original code has its halves in reverse order.
_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
_DOUBLE_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Map diffusers' module paths to the original code's, for modules that are not fused there."""
    names = {}
    for path in paths:
        found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", path)
        if found is None:
            name = _TOP.get(path)
        else:
            inside = (_SINGLE if found[1] else _DOUBLE).get(found[3])
            kind = "single" if found[1] else "double"
            name = inside and f"{kind}_blocks.{found[2]}.{inside}"
        if name:
            names[path] = name
    return names


def fused_names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map the original code's fused modules to diffusers' paths, in the order of output rows."""
    fused: dict[str, tuple[str, ...]] = {}
    for path in paths:
        if found := re.fullmatch(r"((single_)?transformer_blocks\.(\d+))\.attn\.to_q", path):
            kind, inside = ("single", _SINGLE_FUSED) if found[2] else ("double", _DOUBLE_FUSED)
            for name, parts in inside.items():
                fused[f"{kind}_blocks.{found[3]}.{name}"] = tuple(
                    f"{found[1]}.{part}" for part in parts
                )
    return fused


def fused_names_of_adapters(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return `fused_names` and XLabs' name for the first rows of `linear1`, `single_blocks.N.qkv`.

    XLabs' LoRAs change only these rows: query, key and value.
    """
    fused = fused_names(paths)
    attention = {
        f"{name.removesuffix('linear1')}qkv": parts[:3]
        for name, parts in fused.items()
        if name.endswith(".linear1")
    }
    return fused | attention
