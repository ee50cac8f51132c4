"""Checkpoints in one file, in the layout of the original Stable Diffusion code (LDM)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from fidelora.errors import BaseModelFilesError, BaseModelWeightsError
from fidelora.families import Component, Family, all_families

_ADAPTER_MARKS = (".lora_", "lokr_", "hada_")
# How the names of text encoders begin in models that are only recognised.
_STABLE_DIFFUSION_2 = "cond_stage_model.model."
_SDXL_REFINER = "conditioner.embedders.0.model."

# Left in many checkpoints by their training, and not part of the model that makes images. `model_ema.` is the average of the
# weights; the trainer, like every loader of this layout, takes the weights themselves.
_NOT_WEIGHTS_OF_THE_MODEL = ("model_ema.", "first_stage_model.loss.")
# Of CLIP as a whole: it weighs pictures against texts.
_LOGIT_SCALE = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.\d)\.(transformer\.|model\.)?logit_scale"
)
_SCHEDULE = {
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar", "denoiser.sigmas",
}  # fmt: skip


def split_checkpoint(
    weights: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], spec: Family, name: str
) -> dict[str, dict[str, Tensor]]:
    """The checkpoint's weights by component, under diffusers' names; every key is accounted for.

    Args:
        weights: all tensors of the file.
        configs: of the components, which the conversion of names needs.
        name: what messages call the file.

    Raises:
        BaseModelFilesError: not this layout, or a model of another family.
        BaseModelWeightsError: keys that no component has a place for.
    """
    _refuse_other_layouts(weights, spec, name)
    groups: dict[str, dict[str, Tensor]] = {component.name: {} for component in spec.components}
    unknown: list[str] = []
    for key, tensor in weights.items():
        if (
            key in _SCHEDULE
            or key.startswith(_NOT_WEIGHTS_OF_THE_MODEL)
            or _LOGIT_SCALE.fullmatch(key)
        ):
            continue
        component = next(
            (
                component
                for component in spec.components
                if key.startswith(component.checkpoint_prefix)
            ),
            None,
        )
        if component is None:
            unknown.append(key)
        else:
            groups[component.name][key] = tensor

    converted: dict[str, dict[str, Tensor]] = {}
    for component in spec.components:
        group = groups[component.name]
        converted[component.name], left_over = _converted(component, group, configs[component.name])
        unknown += left_over
    if unknown:
        raise BaseModelWeightsError(
            f"{name} has {len(unknown)} weights that nothing in the model uses ({', '.join(unknown[:3])}): it is a model of "
            "another kind, or a merge that went wrong."
        )
    return converted


def _converted(
    component: Component, group: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """One component's weights under diffusers' names, and the keys that it has no name for."""
    if component.name == "unet":
        converted = convert_ldm_unet_checkpoint(dict(group), config)
    elif component.name == "vae":
        converted = convert_vae(group, config)
    else:
        bare = {
            key.removeprefix(component.checkpoint_prefix): tensor for key, tensor in group.items()
        }
        if not any(key.startswith("transformer.resblocks.") for key in bare):
            return (
                bare,
                [],
            )  # as transformers names them; what is too much there is found when they are put into the module
        return _from_open_clip(bare, component.checkpoint_prefix)
    if len(converted) == len(group):
        return converted, []
    kept = {tensor.data_ptr() for tensor in converted.values()}  # some are views of other shapes
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
    """A text encoder as OpenCLIP names its weights, under the names of transformers, and the keys that it has no name for.

    OpenCLIP has one matrix for query, key and value, in this order, and multiplies with the projection from the other side.
    Source: https://github.com/mlfoundations/open_clip, `src/open_clip/transformer.py`, `TextTransformer`.
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


def convert_vae(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A VAE in the LDM layout, with or without its prefix, under diffusers' names."""
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dict(weights), config)
    return converted


def _refuse_other_layouts(weights: Mapping[str, Tensor], spec: Family, name: str) -> None:
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in weights)

    if has(_STABLE_DIFFUSION_2):
        raise BaseModelFilesError(
            f"{name} is a Stable Diffusion 2 checkpoint, not one of {spec.title}."
        )
    if has(_SDXL_REFINER):
        raise BaseModelFilesError(
            f"{name} is the refiner of Stable Diffusion XL, which makes no images of its own."
        )
    for other in all_families().values():
        if other is not spec and any(
            has(component.checkpoint_prefix) for component in other.text_encoders
        ):
            raise BaseModelFilesError(
                f"{name} is a checkpoint of {other.title}, not of {spec.title}: use it as model {other.id}."
            )
    if not all(
        has(component.checkpoint_prefix)
        for component in spec.components
        if component.name == "unet"
    ):
        hint = (
            "it is an adapter (give it as a LoRA)"
            if any(mark in key for key in weights for mark in _ADAPTER_MARKS)
            else "its keys are of no known layout"
        )
        raise BaseModelFilesError(f"{name} is not a checkpoint with a whole model in it: {hint}.")
