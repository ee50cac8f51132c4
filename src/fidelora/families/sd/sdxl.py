"""Stable Diffusion XL, as AI Toolkit 0.12 samples it."""

from __future__ import annotations

from fidelora.families.sd.samplers import SAMPLERS, SCHEDULER_CONFIG
from fidelora.families.spec import Component, Family

SDXL = Family(
    id="sdxl",
    title="Stable Diffusion XL",
    base_model="stabilityai/stable-diffusion-xl-base-1.0",
    base_aliases=(),
    resolution_divisor=8,
    default_size=1024,
    default_steps=25,
    default_guidance_scale=6.0,
    default_seed=42,
    default_sampler="ddpm",
    samplers=SAMPLERS,
    # Unlike that of Stable Diffusion 1.5, the pipeline of SDXL leaves `steps_offset: 0` as it is.
    scheduler_config=SCHEDULER_CONFIG,
    components=(
        Component(
            "text_encoder",
            "transformers",
            "CLIPTextModel",
            "model",
            "text_encoder_dtype",
            "conditioner.embedders.0.transformer.",
            adapter_prefixes=("lora_te1_", "text_encoder."),
            optional_prefix="text_model.",
            tokenizer="tokenizer",
        ),
        Component(
            "text_encoder_2",
            "transformers",
            "CLIPTextModelWithProjection",
            "model",
            "text_encoder_dtype",
            "conditioner.embedders.1.model.",
            adapter_prefixes=("lora_te2_", "text_encoder_2."),
            optional_prefix="text_model.",
            tokenizer="tokenizer_2",
        ),
        Component(
            "unet",
            "diffusers",
            "UNet2DConditionModel",
            "diffusion_pytorch_model",
            "dtype",
            "model.diffusion_model.",
            adapter_prefixes=("lora_unet_", "lycoris_", "unet."),
            original_names=True,
        ),
        Component(
            "vae",
            "diffusers",
            "AutoencoderKL",
            "diffusion_pytorch_model",
            "vae_dtype",
            "first_stage_model.",
        ),
    ),
    conditioning="text_pooled_size",
    trainer_archs=("sdxl",),
    trainer_flags=("is_xl",),
    guidance_rescale_in_previews=True,
    upcasts_vae=True,
    adapter_base_versions=("sdxl_1.0", "sdxl_base_v1-0"),
    # A linear fit to the VAE: `latent_rgb_factors` of SDXL in https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py
    latent_colours=(
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
    ),
)
