"""Qwen-Image and Qwen-Image-2512, as AI Toolkit 0.12.26 samples them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fidelora.families.spec import Family, FlowSampler, Part, Tokenizer, TrainerSampling

# Linear fit of the VAE of Wan 2.1, whose latents Qwen-Image uses. Source:
# `Wan21.latent_rgb_factors` in https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py
_COLOURS = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420), (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975), (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)  # fmt: skip

# From the trainer's own configuration; the base's scheduler file is not used. The stretch to the
# terminal sigma divides 0 by 0 if there is only one step.
_FLOWMATCH = FlowSampler(
    "flowmatch",
    MappingProxyType(
        {"dynamic_shift": (256, 0.5, 8192, 0.9), "terminal": 0.02, "linspace": "float64"}
    ),
    min_steps=2,
)

QWEN_IMAGE = Family(
    id="qwen_image",
    title="Qwen-Image",
    base_model="Qwen/Qwen-Image",
    resolution_divisor=32,
    default_size=1024,
    default_steps=25,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    samplers=MappingProxyType({"flowmatch": _FLOWMATCH}),
    uses=frozenset(
        ("negative_prompt", "noise", "vae_tiling", "quantization", "text_encoder_quantization")
    ),
    parts=(
        Part(
            name="text_encoder",
            role="text_encoder",
            library="transformers",
            class_name="Qwen2_5_VLForConditionalGeneration",
            weights="model",
            precision="text_encoder_dtype",
            # Prompts have no images and only hidden states are needed.
            submodule="model.language_model",
            optional_prefix="model.",
            ignored_weights=("lm_head.weight",),
            ignored_prefixes=("visual.", "model.visual."),
            tokenizer=Tokenizer("tokenizer"),
            # The trainer calls `.to(device, dtype)`, which rounds the rotary tables. In bfloat16,
            # 3 % of the pixels agree without this rounding, 100 % with it.
            rounds_buffers=True,
            quantization="text_encoder_quantization",
        ),
        Part(
            name="transformer",
            role="denoiser",
            library="diffusers",
            class_name="QwenImageTransformer2DModel",
            weights="diffusion_pytorch_model",
            precision="dtype",
            # Of AI Toolkit, diffusers, kohya's programs and LyCORIS; Qwen-Image-Lightning has none.
            adapter_prefixes=("diffusion_model.", "transformer.", "lora_unet_", "lycoris_", ""),
            quantization="quantization",
        ),
        Part(
            name="vae",
            role="decoder",
            library="diffusers",
            class_name="AutoencoderKLQwenImage",
            weights="diffusion_pytorch_model",
            precision="vae_dtype",
        ),
    ),
    text="fidelora.families.qwen_image.text:QwenImageText",
    denoiser="fidelora.families.qwen_image.denoiser:QwenImageDenoiser",
    latents="fidelora.families.qwen_image.latents:QwenImageLatents",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=TrainerSampling(
        archs=("qwen_image",),
        text_encoder_qtype="qtype_te",
        ignores_sampler=True,
        tiles_since=(0, 10, 22),
    ),
    adapter_base_versions=("qwen_image",),
    latent_preview=_COLOURS,
)

QWEN_IMAGE_2512 = replace(
    QWEN_IMAGE,
    id="qwen_image_2512",
    title="Qwen-Image-2512",
    base_model="Qwen/Qwen-Image-2512",
    trainer_sampling=replace(QWEN_IMAGE.trainer_sampling, archs=("qwen_image:2512",)),
)
