"""Single-file checkpoints in the layout of the original Stable Diffusion code (LDM)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from fidelora.errors import BaseModelFilesError, BaseModelWeightsError
from fidelora.families.spec import Family, Part

_ADAPTER_MARKS = (".lora_", "lokr_", "hada_")
# Prefixes of text encoders in models that are recognised but not supported.
_STABLE_DIFFUSION_2 = "cond_stage_model.model."
_SDXL_REFINER = "conditioner.embedders.0.model."

# Keys left over from training. `model_ema.` is a moving average of the weights; the trainer and all
# loaders of this layout use the weights themselves.
_IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.")
# Temperature of CLIP's contrastive loss, which is used in training only.
_LOGIT_SCALE = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.\d)\.(transformer\.|model\.)?logit_scale"
)
_SCHEDULE = {
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "posterior_variance", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar", "denoiser.sigmas",
}  # fmt: skip


def split(
    weights: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    family: Family,
    others: Iterable[Family],
    name: str,
) -> dict[str, dict[str, Tensor]]:
    """Return the checkpoint's weights by part, under diffusers' names.

    Known keys that are left over from training are dropped; any other unused key is an error.

    Args:
        weights: all tensors of the file.
        configs: configurations of the parts, which the conversion of names needs.
        others: families whose checkpoints are recognised, so that the error names the right model.
        name: name of the file for messages.

    Raises:
        BaseModelFilesError: the file has another layout, or belongs to another family.
        BaseModelWeightsError: the file has weights that no part uses.
    """
    _refuse_other_layouts(weights, family, others, name)
    groups: dict[str, dict[str, Tensor]] = {part.name: {} for part in family.parts}
    unknown: list[str] = []
    for key, tensor in weights.items():
        ignored = key in _SCHEDULE or key.startswith(_IGNORED_PREFIXES)
        if ignored or _LOGIT_SCALE.fullmatch(key):
            continue
        part = next((one for one in family.parts if key.startswith(one.checkpoint_prefix)), None)
        if part is None:
            unknown.append(key)
        else:
            groups[part.name][key] = tensor

    converted: dict[str, dict[str, Tensor]] = {}
    for part in family.parts:
        converted[part.name], left_over = _converted(part, groups[part.name], configs[part.name])
        unknown += left_over
    if unknown:
        raise BaseModelWeightsError(
            f"{name} has {len(unknown)} weights that the model does not use "
            f"({', '.join(unknown[:3])}). It is another kind of model, or a broken merge. Use "
            "another checkpoint."
        )
    return converted


def convert_decoder(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a VAE under diffusers' names.

    Names of LDM, with or without a checkpoint's prefix, are converted; diffusers' names are kept.
    """
    if not any(name.endswith("decoder.mid.attn_1.q.weight") for name in weights):
        return dict(weights)
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dict(weights), config)
    return converted


def _converted(
    part: Part, group: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return one part's weights under diffusers' names, and the keys without such a name."""
    if part.role == "denoiser":
        converted = convert_ldm_unet_checkpoint(dict(group), config)
    elif part.role == "decoder":
        converted = convert_ldm_vae_checkpoint(dict(group), config)
    else:
        bare = {key.removeprefix(part.checkpoint_prefix): tensor for key, tensor in group.items()}
        if not any(key.startswith("transformer.resblocks.") for key in bare):
            # transformers' names; `build_part` reports left-over keys.
            return bare, []
        return _from_open_clip(bare, part.checkpoint_prefix)
    if len(converted) == len(group):
        return converted, []
    # Compare addresses, because some converted tensors are views in another shape.
    kept = {tensor.data_ptr() for tensor in converted.values()}
    return converted, [key for key, tensor in group.items() if tensor.data_ptr() not in kept]


_OPEN_CLIP_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


def _from_open_clip(
    weights: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return OpenCLIP's text encoder under transformers' names, and the keys without such a name.

    OpenCLIP stores query, key and value in one matrix, in this order, and stores its projection
    transposed.
    Source: https://github.com/mlfoundations/open_clip, `src/open_clip/transformer.py`,
    `TextTransformer`.
    """
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in weights.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)(?:_proj_|\.)(weight|bias)", key)
        if key in _OPEN_CLIP_TOP:
            converted[_OPEN_CLIP_TOP[key]] = tensor
        elif key == "text_projection" and tensor.dim() == 2:
            converted["text_projection.weight"] = tensor.t().contiguous()
        elif layer and layer[2] == "attn.in" and tensor.dim() > 0:
            for part, rows in zip("qkv", tensor.tensor_split(3), strict=True):
                converted[f"encoder.layers.{layer[1]}.self_attn.{part}_proj.{layer[3]}"] = rows
        elif layer and layer[2] in _OPEN_CLIP_LAYER:
            converted[f"encoder.layers.{layer[1]}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"] = tensor
        else:
            unknown.append(prefix + key)
    return converted, unknown


def _refuse_other_layouts(
    weights: Mapping[str, Tensor], family: Family, others: Iterable[Family], name: str
) -> None:
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in weights)

    if has(_STABLE_DIFFUSION_2):
        raise BaseModelFilesError(
            f"{name} is a checkpoint of Stable Diffusion 2, which is not supported."
        )
    if has(_SDXL_REFINER):
        raise BaseModelFilesError(
            f"{name} is the refiner of Stable Diffusion XL, which is not supported; use the base."
        )
    for other in others:
        prefixes = [
            part.checkpoint_prefix for part in other.text_encoders if part.checkpoint_prefix
        ]
        if other is not family and any(map(has, prefixes)):
            raise BaseModelFilesError(
                f"{name} is a checkpoint of {other.title}, not of {family.title}: "
                f"use it as model {other.id}."
            )
    if not has(family.part("denoiser").checkpoint_prefix):
        hint = (
            "it is an adapter. Use it as a LoRA"
            if any(mark in key for key in weights for mark in _ADAPTER_MARKS)
            else "the layout of its keys is unknown. Use a checkpoint in the original layout, or a "
            "diffusers folder"
        )
        raise BaseModelFilesError(f"{name} is not a checkpoint of a whole model: {hint}.")
