"""Spellings of module names in adapter files. Does not import torch."""

from __future__ import annotations

import re

_UNET_MODULES = frozenset({
    "conv_in", "conv_norm_out", "conv_out", "time_embedding", "add_embedding",
    "down_blocks", "mid_block", "up_blocks",
    "time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out",
})  # fmt: skip
"""First components of the module paths of a UNet, in diffusers and in the original code."""

_ORIGINAL = re.compile(r"(?:^|[._])(?:input_blocks|middle_block|output_blocks)[._]\d")

_PIPELINE = re.compile(r"^(?:model\.diffusion_model|pipe\.dit|dit)\.")
"""Other names of the denoiser: in checkpoints, and in pipelines of DiffSynth-Studio."""

# diffusers before 0.19 named the projections of the text encoder like those of the UNet.
_TEXT_PROJECTION = re.compile(r"(self_attn\.)to_(q|k|v|out)$")


def canonical_name(module: str) -> str:
    """Return the name of a module as current releases of diffusers and PEFT spell it.

    * PEFT writes `base_model.model.` before the path: `base_model.model.conv_in`, or with the name
      of the part `unet.base_model.model.conv_in`.
    * diffusers in 2023 wrote attention modules as `attn1.processor.to_out`.
    * Files with only the UNet may have paths without the name of the part.
    """
    if "." not in module:  # flattened with underscores
        return module
    name = module.replace("base_model.model.", "", 1).replace(".processor.", ".")
    name = _PIPELINE.sub("diffusion_model.", name)
    name = _TEXT_PROJECTION.sub(r"\1\2_proj", name)
    # `to_out` is a list of modules, except in the single blocks of FLUX.2.
    if name.endswith(".to_out") and "single_transformer_blocks." not in name:
        name += ".0"
    first = name.partition(".")[0]
    if first in _UNET_MODULES:
        return f"unet.{name}"
    return f"text_encoder.{name}" if first == "text_model" else name


def is_original_name(module: str) -> bool:
    """Return True if a UNet's module is named as in the original code of Stable Diffusion.

    Stable Diffusion 1.5 and 2, SDXL, its refiner and distilled variants share these names.
    """
    return bool(_ORIGINAL.search(module))
