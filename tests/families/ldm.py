"""Conversion of a diffusers folder to a checkpoint in the layout of the original code.

The names are written down here again, independently of the library that reads them. Source:
https://github.com/CompVis/stable-diffusion, `configs/stable-diffusion/v1-inference.yaml`.
"""

from __future__ import annotations

import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def as_ldm_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a diffusers folder with one layer per block, under checkpoint names."""
    unet = safetensors.torch.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    text = safetensors.torch.load_file(folder / "text_encoder" / "model.safetensors")
    vae = safetensors.torch.load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    return (
        {f"model.diffusion_model.{ldm_unet_name(name)}": tensor for name, tensor in unet.items()}
        | {f"first_stage_model.{name}": tensor for name, tensor in as_ldm_vae(vae).items()}
        | {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()}
    )


def as_sdxl_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the same for an SDXL folder.

    Source: https://github.com/Stability-AI/generative-models, `configs/inference/sd_xl_base.yaml`.
    """
    unet = safetensors.torch.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    first = safetensors.torch.load_file(folder / "text_encoder" / "model.safetensors")
    second = safetensors.torch.load_file(folder / "text_encoder_2" / "model.safetensors")
    vae = safetensors.torch.load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    return (
        {
            f"model.diffusion_model.{ldm_unet_name(name, plain_block=2)}": tensor
            for name, tensor in unet.items()
        }
        | {f"first_stage_model.{name}": tensor for name, tensor in as_ldm_vae(vae).items()}
        | {
            f"conditioner.embedders.0.transformer.text_model.{_without_level(name)}": tensor
            for name, tensor in first.items()
        }
        | {
            f"conditioner.embedders.1.model.{name}": tensor
            for name, tensor in as_open_clip(second).items()
        }
    )


def as_open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder with a projection under OpenCLIP's names.

    Query, key and value are one matrix there.
    """
    text = {_without_level(name): tensor for name, tensor in text.items()}
    converted = {
        "text_projection": text.pop("text_projection.weight").t().contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for name, tensor in text.items():
        if name in _OPEN_CLIP:
            converted[_OPEN_CLIP[name]] = tensor
            continue
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        assert match, name
        layer = f"transformer.resblocks.{match[1]}"
        if match[2] in _OPEN_CLIP_LAYER:
            converted[f"{layer}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}"] = tensor
        elif match[2] == "self_attn.q_proj":
            parts = [text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            converted[f"{layer}.attn.in_proj_{match[3]}"] = torch.cat(parts)
    return converted


def _without_level(name: str) -> str:
    return name.removeprefix("text_model.")


def as_ldm_vae(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a VAE of four blocks under LDM's names.

    Its attention consists of 1x1 convolutions there.
    """
    converted = {}
    for name, tensor in vae.items():
        is_matrix = ".attentions." in name and name.endswith("weight") and "group_norm" not in name
        converted[_vae_name(name)] = tensor[:, :, None, None].contiguous() if is_matrix else tensor
    return converted


def ldm_unet_name(name: str, plain_block: int = 0) -> str:
    """Return the LDM name of a weight of a UNet with one layer per block.

    `plain_block` is the index of the up block without attention.
    """
    for diffusers, ldm in _UNET_TOP.items():
        if name.startswith(diffusers + "."):
            return ldm + name.removeprefix(diffusers)
    if match := re.fullmatch(r"down_blocks\.(\d)\.(resnets|attentions)\.0\.(.*)", name):
        position = 0 if match[2] == "resnets" else 1
        return f"input_blocks.{1 + 2 * int(match[1])}.{position}.{_inner(match[2], match[3])}"
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{2 + 2 * int(match[1])}.0.op.{match[2]}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        position = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{position}.{_inner(match[1], match[3])}"
    if match := re.fullmatch(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        block, position = 2 * int(match[1]) + int(match[3]), 0 if match[2] == "resnets" else 1
        return f"output_blocks.{block}.{position}.{_inner(match[2], match[4])}"
    match = re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name)
    assert match, name
    block = int(match[1])
    return f"output_blocks.{2 * block + 1}.{1 if block == plain_block else 2}.conv.{match[2]}"


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, parameter = rest.rpartition(".")
    return f"{_RESNET[layer]}.{parameter}"


def _vae_name(name: str) -> str:
    name = re.sub(
        r"\bmid_block\.attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0)",
        lambda m: f"mid.attn_1.{_VAE_ATTENTION[m[1]]}",
        name,
    )
    name = re.sub(r"\bmid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"\bdown_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"\bdown_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(
        r"\bup_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name
    )
    name = re.sub(
        r"\bup_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name
    )
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
