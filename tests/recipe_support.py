"""Recipes and values of their fields for several tests."""

from __future__ import annotations

from typing import Any

from fidelora.families import get_family
from fidelora.recipe import AdapterRef

SAMPLERS = list(get_family("sd15").samplers)
STYLE = AdapterRef("0123456789abcdef" * 4, 0.75, name="style")
OTHER = AdapterRef("f" * 64, -2.0)
FULL: dict[str, Any] = {
    "prompt": "süß 🙂, [x]",
    "negative_prompt": "blurry\n",
    "model": "sd15",
    "base_model": "models/base.safetensors",
    "base_sha256": "",
    "variant": "fp16",
    "config": "elsewhere",
    "vae": "own/vae@main",
    "width": 640,
    "height": 456,
    "steps": 12,
    "guidance_scale": 7.25,
    "seed": 2**63 - 1,
    "sampler": "k_dpmsolver++",
    "prediction": "v_prediction",
    "adapters": (STYLE, OTHER),
    "adapter_mode": "live",
    "noise": "legacy",
    "dtype": "bfloat16",
    "vae_dtype": "float32",
    "text_encoder_dtype": "float16",
    "fidelity": "exact",
    "negative_prompt_2": None,
    "guidance_rescale": 0.0,
    "emphasis": "none",
    "timestep_spacing": "default",
    "eta": None,
    "vae_tiling": False,
    "history": (),
}
"""Every field, none with its default except `base_sha256` and the last eight.

Live adapters need `fidelity` "exact", and the others were added later.
"""


SOUND = (2).to_bytes(8, "little") + b"{}"
"""The smallest sound .safetensors file: no tensors."""


OTHER_VALUES = {
    "prompt": "a blue ball",
    "negative_prompt": "blurry",
    "base_model": "another/base",
    "base_sha256": "ab" * 32,
    "variant": "fp16",
    "config": "elsewhere",
    "vae": "another/vae",
    "width": 520,
    "height": 520,
    "steps": 26,
    "guidance_scale": 6.5,
    "seed": 43,
    "sampler": "ddim",
    "prediction": "v_prediction",
    "adapters": (OTHER,),
    "adapter_mode": "live",
    "history": (OTHER,),
    "noise": "legacy",
    "dtype": "float16",
    "vae_dtype": "float16",
    "text_encoder_dtype": "float16",
    "fidelity": "fast",
    "guidance_rescale": 0.5,
    "emphasis": "original",
}
