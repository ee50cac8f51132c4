"""Weights of FLUX.2 under the names of the original code, from that code's files or diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fidelora.errors import BaseModelWeightsError
from fidelora.families.flux2_klein.names import (
    DOUBLE_BLOCK,
    FUSED,
    SINGLE_BLOCK,
    STREAMS,
)  # fmt: skip
from fidelora.families.spec import Family
from fidelora.families.transformer_file import transformer_weights

Weights = dict[str, Tensor]
Config = Mapping[str, Any]

_THETA = 2000  # base of the rotary frequencies, which the weights do not contain
_AXES = 4  # number of rotary axes, all of the same width

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
"""Modules outside the blocks: path in diffusers, and path in the original code."""

_DECODER = (
    (r"^post_quant_conv\.", "decoder.post_quant_conv."),
    (r"^decoder\.conv_norm_out\.", "decoder.norm_out."),
    (r"^decoder\.mid_block\.resnets\.0\.", "decoder.mid.block_1."),
    (r"^decoder\.mid_block\.resnets\.1\.", "decoder.mid.block_2."),
    (r"^decoder\.mid_block\.attentions\.0\.group_norm\.", "decoder.mid.attn_1.norm."),
    (r"^decoder\.mid_block\.attentions\.0\.to_([qkv])\.", r"decoder.mid.attn_1.\1."),
    (r"^decoder\.mid_block\.attentions\.0\.to_out\.0\.", "decoder.mid.attn_1.proj_out."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.upsamplers\.0\.", ".upsample."),
)
"""Replacements in the names of the decoder's weights, from diffusers to the original code."""


def transformer(weights: Weights, config: Config | None) -> tuple[Weights, Config]:
    """Return the transformer's weights under the original names, and its configuration.

    Args:
        weights: all tensors of the files, under the names of diffusers or of the original code.
        config: configuration of diffusers; None to derive it from the shapes of the weights.

    Raises:
        BaseModelWeightsError: the sizes cannot be derived, because weights are missing.
    """
    if any(name.startswith(("transformer_blocks.", "x_embedder.")) for name in weights):
        weights = _transformer_from_diffusers(weights)
    return weights, _transformer_config(weights) if config is None else config


def decoder(weights: Weights, config: Config | None) -> tuple[Weights, Config]:
    """Return the decoder's weights under the original names, and its configuration.

    The weights of the encoder are left out, because images are only decoded.

    Args:
        weights, config: as in `transformer`.

    Raises:
        BaseModelWeightsError: the sizes cannot be derived, because weights are missing.
    """
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith(("encoder.", "quant_conv.")) and name != "bn.num_batches_tracked"
    }
    if any(name.startswith("decoder.up_blocks.") for name in kept):
        kept = _decoder_from_diffusers(kept)
    return kept, _decoder_config(kept) if config is None else config


def split(
    weights: Mapping[str, Tensor],
    configs: Mapping[str, Config],
    family: Family,
    others: Iterable[Family],
    name: str,
) -> dict[str, Weights]:
    """Return the weights of a single-file checkpoint by part: all belong to the transformer.

    Args:
        weights: all tensors of the file, with the names of the original code, which ComfyUI uses,
            too, or of diffusers. `transformer` converts them.
        configs, others: not used.
        name: name of the file for messages.

    Raises:
        BaseModelFilesError: the file is not a checkpoint of FLUX.2-klein, or contains other parts.
    """
    blocks = ("double_stream_modulation_img.", "single_stream_modulation.")
    # Other models of FLUX.2 embed the guidance scale.
    foreign = ("guidance_in.", "time_guidance_embed.guidance_embedder.")
    own = transformer_weights(weights, family, name, blocks=blocks, foreign=foreign)
    return {family.part("denoiser").name: own}


def convert_decoder(weights: Weights, config: Config) -> Weights:
    """Return the weights as they are; `decoder` converts them."""
    return weights


def _transformer_from_diffusers(weights: Weights) -> Weights:
    """Rename weights, and join those that the original code stores in one matrix.

    Names without a counterpart are kept, so that `build_part` reports them.
    """
    converted: Weights = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        path, _, parameter = name.rpartition(".")
        block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", path)
        if path in _TOP:
            if path == "norm_out.linear":  # diffusers stores the scale before the shift
                tensor = torch.cat(tensor.chunk(2)[::-1])
            converted[f"{_TOP[path]}.{parameter}"] = tensor
        elif block is None:
            converted[name] = tensor
        elif block[1] and block[3] in SINGLE_BLOCK:
            original = f"single_blocks.{block[2]}.{SINGLE_BLOCK[block[3]]}"
            converted[f"{original}.{_parameter(original, parameter)}"] = tensor
        elif not block[1] and block[3] in DOUBLE_BLOCK:
            original = f"double_blocks.{block[2]}.{DOUBLE_BLOCK[block[3]]}"
            converted[f"{original}.{_parameter(original, parameter)}"] = tensor
        elif not block[1] and block[3] in FUSED:
            stream, index = FUSED[block[3]]
            original = f"double_blocks.{block[2]}.{STREAMS[stream]}.qkv.{parameter}"
            fused.setdefault(original, {})[index] = tensor
        else:
            converted[name] = tensor
    for name, thirds in fused.items():
        if thirds.keys() == {0, 1, 2}:  # else `build_part` reports that the matrix is missing
            converted[name] = torch.cat([thirds[index] for index in range(3)])
    return converted


def _parameter(path: str, parameter: str) -> str:
    """Return the original name of a parameter; norms of heads have a `scale`, not a `weight`."""
    return "scale" if path.endswith("_norm") else parameter


def _decoder_from_diffusers(weights: Weights) -> Weights:
    levels = 1 + max(
        int(found[1]) for name in weights if (found := re.match(r"decoder\.up_blocks\.(\d+)", name))
    )
    converted: Weights = {}
    for name, tensor in weights.items():
        # diffusers counts the levels from the latents to the image, the original code backwards.
        name = re.sub(
            r"^decoder\.up_blocks\.(\d+)\.",
            lambda found: f"decoder.up.{levels - 1 - int(found[1])}.",
            name,
        )
        for pattern, replacement in _DECODER:
            name = re.sub(pattern, replacement, name)
        is_projection = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name)
        if is_projection and tensor.dim() == 2:  # a 1x1 convolution in the original code
            tensor = tensor[:, :, None, None]
        converted[name] = tensor
    return converted


def _transformer_config(weights: Weights) -> Config:
    """Derive a configuration of diffusers from weights under the original names."""
    try:
        width, channels = weights["img_in.weight"].shape
        head_width = len(weights["double_blocks.0.img_attn.norm.query_norm.scale"])
        mlp_width = weights["double_blocks.0.img_mlp.2.weight"].shape[1]
        text_width = weights["txt_in.weight"].shape[1]
    except (KeyError, ValueError, IndexError, TypeError):
        raise _not_derivable("transformer") from None
    return {
        "in_channels": channels,
        "joint_attention_dim": text_width,
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "mlp_ratio": mlp_width / width,
        "num_layers": _count(weights, "double_blocks"),
        "num_single_layers": _count(weights, "single_blocks"),
        "axes_dims_rope": [head_width // _AXES] * _AXES,
        "rope_theta": _THETA,
        "guidance_embeds": "guidance_in.in_layer.weight" in weights,
    }


def _decoder_config(weights: Weights) -> Config:
    """Derive a configuration of diffusers from weights under the original names."""
    levels = _count(weights, "decoder.up")
    try:
        channels = [len(weights[f"decoder.up.{n}.block.0.conv1.weight"]) for n in range(levels)]
        latent_channels = weights["decoder.conv_in.weight"].shape[1]
    except (KeyError, IndexError, TypeError):
        raise _not_derivable("vae") from None
    return {
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "layers_per_block": _count(weights, "decoder.up.0.block") - 1,
    }


def _count(weights: Weights, blocks: str) -> int:
    """Return the number of blocks whose names begin with `blocks` and their index."""
    pattern = re.compile(re.escape(blocks) + r"\.(\d+)\.")
    return 1 + max((int(one[1]) for name in weights if (one := pattern.match(name))), default=-1)


def _not_derivable(part: str) -> BaseModelWeightsError:
    return BaseModelWeightsError(
        f"The base model's {part} lacks weights, or has unknown names: its sizes cannot be derived "
        "from them. Use a file in the original layout of FLUX.2, or a diffusers folder."
    )
