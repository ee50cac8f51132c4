"""Names of the UNet's modules in the original code of Stable Diffusion.

kohya's trainer and compatible tools use these names in SDXL adapters, for example
`lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`, and ComfyUI and OneTrainer also in
adapters of Stable Diffusion 1.5.
Source: https://github.com/Stability-AI/generative-models,
`sgm/modules/diffusionmodules/openaimodel.py`, `UNetModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Map diffusers' module paths of a UNet to the original code's paths, where one exists.

    The original code numbers its blocks consecutively: each resnet with its attention is a block,
    and so is each downsampler; an upsampler is the last part of its block.
    """
    paths = list(paths)
    first_block_resnets = [
        found[1] for path in paths if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)", path))
    ]
    layers = 1 + max(map(int, first_block_resnets), default=0)
    with_attention = {
        found[1] for path in paths if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", path))
    }
    names = {path: _original(path, layers, with_attention) for path in paths}
    return {path: name for path, name in names.items() if name}


def _original(path: str, layers: int, with_attention: set[str]) -> str:
    if path in _TOP:
        return _TOP[path]
    if found := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        block = 1 + int(found[1]) * (layers + 1) + int(found[3])
        return f"input_blocks.{block}.{_part(found[2], found[4])}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{(1 + int(found[1])) * (layers + 1)}.0.op"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        index = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{index}.{_part(found[1], found[3]).partition('.')[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        block = int(found[1]) * (layers + 1) + int(found[3])
        return f"output_blocks.{block}.{_part(found[2], found[4])}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", path):
        block = int(found[1]) * (layers + 1) + layers
        return f"output_blocks.{block}.{2 if found[1] in with_attention else 1}.conv"
    return ""


def _part(kind: str, rest: str) -> str:
    """Return the name within a block, where the resnet has the index 0 and the attention 1."""
    return f"1.{rest}" if kind == "attentions" else f"0.{_RESNET.get(rest, rest)}"
