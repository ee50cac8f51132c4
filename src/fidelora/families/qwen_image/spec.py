"""Qwen-Image and Qwen-Image-2512, as AI Toolkit 0.12.26 samples them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fidelora.families import latent_formats
from fidelora.families.shared_parts import with_companion
from fidelora.families.spec import Family, FlowSampler, Part, Tokenizer, TrainerSampling

# From the trainer's own configuration; the base's scheduler file is not used. The stretch to the
# terminal sigma divides 0 by 0 if there is only one step.
_FLOWMATCH = FlowSampler(
    "flowmatch",
    MappingProxyType(
        {"dynamic_shift": (256, 0.5, 8192, 0.9), "terminal": 0.02, "linspace": "float64"}
    ),
    min_steps=2,
)


_PARTS = (
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
        # Written by AI Toolkit, diffusers, kohya's programs and LyCORIS. Qwen-Image-Lightning has
        # no prefix.
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
    parts=with_companion(_PARTS, "Qwen/Qwen-Image"),
    text="fidelora.families.qwen_image.text:QwenImageText",
    denoiser="fidelora.families.qwen_image.denoiser:QwenImageDenoiser",
    latents="fidelora.families.qwen_image.latents:QwenImageLatents",
    checkpoint="fidelora.families.qwen_image.checkpoint",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=TrainerSampling(
        archs=("qwen_image",),
        text_encoder_qtype="qtype_te",
        ignores_sampler=True,
        tiles_since=(0, 10, 22),
    ),
    adapter_base_versions=("qwen_image",),
    latent_preview=latent_formats.WAN21,
)

QWEN_IMAGE_2512 = replace(
    QWEN_IMAGE,
    id="qwen_image_2512",
    title="Qwen-Image-2512",
    base_model="Qwen/Qwen-Image-2512",
    parts=with_companion(QWEN_IMAGE.parts, "Qwen/Qwen-Image-2512"),
    trainer_sampling=replace(QWEN_IMAGE.trainer_sampling, archs=("qwen_image:2512",)),
)
