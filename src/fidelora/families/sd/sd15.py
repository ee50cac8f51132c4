"""Stable Diffusion 1.5, as AI Toolkit 0.12 samples it."""

from __future__ import annotations

from types import MappingProxyType

from fidelora.families.sd.samplers import SAMPLERS, SCHEDULER_CONFIG
from fidelora.families.spec import Component, Family

# The trainer's configuration says `steps_offset: 0`, but the diffusers pipeline that the sampler is then handed to rewrites that
# to 1 in its constructor, so every preview was made with 1. Measured on the golden jobs: with 0, at least 30 % of the pixels
# differ.
_SCHEDULER_CONFIG = MappingProxyType({**SCHEDULER_CONFIG, "steps_offset": 1})

SD15 = Family(
    id="sd15",
    title="Stable Diffusion 1.5",
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    base_aliases=("runwayml/stable-diffusion-v1-5",),
    resolution_divisor=8,
    default_size=512,
    default_steps=25,
    default_guidance_scale=6.0,
    default_seed=42,
    default_sampler="ddpm",
    samplers=SAMPLERS,
    scheduler_config=_SCHEDULER_CONFIG,
    components=(
        # transformers 5.2x dropped the level `text_model` from the module names; files and adapters exist with and without.
        Component(
            "text_encoder",
            "transformers",
            "CLIPTextModel",
            "model",
            "text_encoder_dtype",
            "cond_stage_model.transformer.",
            adapter_prefixes=("lora_te_", "text_encoder."),
            optional_prefix="text_model.",
            tokenizer="tokenizer",
        ),
        Component(
            "unet",
            "diffusers",
            "UNet2DConditionModel",
            "diffusion_pytorch_model",
            "dtype",
            "model.diffusion_model.",
            adapter_prefixes=("lora_unet_", "lycoris_", "unet."),
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
    conditioning="text",
    trainer_archs=(None, "sd", "sd1", "sd15"),
    trainer_flags=(),
    guidance_rescale_in_previews=False,
    upcasts_vae=False,
    adapter_base_versions=("sd_1.5", "sd_v1"),
    # A linear fit to the VAE: https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204
    latent_colours=(
        (0.298, 0.207, 0.208),
        (0.187, 0.286, 0.173),
        (-0.158, 0.189, 0.264),
        (-0.184, -0.271, -0.473),
    ),
)
