"""Checkpoints in one file, in the layout of the original Stable Diffusion code (LDM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from fidelora.errors import BaseModelFilesError, BaseModelWeightsError

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_TEXT_MODEL = "cond_stage_model.transformer."

# Left in many checkpoints by their training, and not part of the model that makes images. `model_ema.` is the average of the
# weights; the trainer, like every loader of this layout, takes the weights themselves.
_NOT_WEIGHTS_OF_THE_MODEL = (
    "model_ema.",
    "first_stage_model.loss.",
    "cond_stage_model.logit_scale",
    "cond_stage_model.transformer.logit_scale",
)
_SCHEDULE = {
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
}  # fmt: skip


def split_checkpoint(
    weights: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], name: str
) -> dict[str, dict[str, Tensor]]:
    """The checkpoint's weights by component, under diffusers' names; every key is accounted for.

    Args:
        weights: all tensors of the file.
        configs: the configuration of `unet` and `vae`, which the conversion of names needs.
        name: what messages call the file.

    Raises:
        BaseModelFilesError: not this layout, or a model of another family.
        BaseModelWeightsError: keys that no component has a place for.
    """
    _refuse_other_layouts(weights, name)
    groups: dict[str, dict[str, Tensor]] = {_UNET: {}, _VAE: {}, _TEXT: {}}
    unknown: list[str] = []
    for key, tensor in weights.items():
        if key in _SCHEDULE or key.startswith(_NOT_WEIGHTS_OF_THE_MODEL):
            continue
        prefix = next((prefix for prefix in groups if key.startswith(prefix)), None)
        if prefix is None or (prefix == _TEXT and not key.startswith(_TEXT_MODEL)):
            unknown.append(key)
        else:
            groups[prefix][key] = tensor

    converted = {
        "unet": convert_ldm_unet_checkpoint(groups[_UNET], configs["unet"]),
        "vae": convert_vae(groups[_VAE], configs["vae"]),
        "text_encoder": convert_ldm_clip_checkpoint(groups[_TEXT]),
    }
    for prefix, component in ((_UNET, "unet"), (_VAE, "vae"), (_TEXT, "text_encoder")):
        if len(converted[component]) != len(groups[prefix]):
            kept = {tensor.data_ptr() for tensor in converted[component].values()}  # some are views of other shapes
            unknown += [key for key, tensor in groups[prefix].items() if tensor.data_ptr() not in kept]
    if unknown:
        raise BaseModelWeightsError(
            f"{name} has {len(unknown)} weights that nothing in the model uses ({', '.join(unknown[:3])}): it is a model of "
            "another kind, or a merge that went wrong."
        )
    return converted


def convert_vae(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A VAE in the LDM layout, with or without its prefix, under diffusers' names."""
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dict(weights), config)
    return converted


def _refuse_other_layouts(weights: Mapping[str, Tensor], name: str) -> None:
    if any(key.startswith("conditioner.embedders.") for key in weights):
        raise BaseModelFilesError(f"{name} is an SDXL checkpoint, not one of Stable Diffusion 1.5.")
    if any(key.startswith("cond_stage_model.model.") for key in weights):
        raise BaseModelFilesError(f"{name} is a Stable Diffusion 2 checkpoint, not one of Stable Diffusion 1.5.")
    if not any(key.startswith(_UNET) for key in weights):
        hint = (
            "it is an adapter (give it as a LoRA)"
            if any(".lora_" in key or "lokr_" in key for key in weights)
            else "its keys are of no known layout"
        )
        raise BaseModelFilesError(f"{name} is not a checkpoint with a whole model in it: {hint}.")
