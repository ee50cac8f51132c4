"""Chroma, as AI Toolkit 0.12.26 samples it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fidelora.families import latent_formats
from fidelora.families.chroma.names import diffusers_names
from fidelora.families.shared_parts import FLUX_VAE, T5_ENCODER
from fidelora.families.spec import Family, FlowSampler, Part, TrainerSampling

# The trainer takes the text encoder and the VAE from this repository, whatever the base model.
_COMPANION = "ostris/Flex.1-alpha"

CHROMA = Family(
    id="chroma",
    title="Chroma",
    base_model="lodestones/Chroma1-Base",
    resolution_divisor=16,
    api_divisor=32,
    default_size=1024,
    default_steps=25,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    # The trainer's own configuration, the same as for FLUX.1.
    samplers=MappingProxyType(
        {
            # The pipeline computes the sigmas before the shift with numpy in float64.
            "flowmatch": FlowSampler(
                "flowmatch",
                MappingProxyType({"dynamic_shift": (256, 0.5, 4096, 1.15), "linspace": "float64"}),
            )
        }
    ),
    uses=frozenset({"negative_prompt", "noise", "quantization", "text_encoder_quantization"}),
    parts=(
        replace(T5_ENCODER, companion=_COMPANION),
        Part(
            name="transformer",
            role="denoiser",
            library="fidelora.families.chroma.transformer",
            class_name="ChromaTransformer",
            weights="diffusion_pytorch_model",
            precision="dtype",
            adapter_prefixes=(
                "diffusion_model.",  # AI Toolkit and ComfyUI
                "transformer.",  # diffusers
                "lora_unet_",  # kohya
                "lora_transformer_",  # OneTrainer and SimpleTuner
            ),
            accepted_names=diffusers_names,
            is_single_file=True,
            quantization="quantization",
        ),
        replace(FLUX_VAE, companion=_COMPANION),
    ),
    text="fidelora.families.chroma.text:ChromaText",
    denoiser="fidelora.families.chroma.denoiser:ChromaDenoiser",
    latents="fidelora.families.patches:PatchLatents",
    checkpoint="fidelora.families.chroma.checkpoint",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=TrainerSampling(
        archs=("chroma",), text_encoder_qtype="qtype", ignores_sampler=True
    ),
    adapter_base_versions=("chroma",),
    latent_preview=latent_formats.FLUX1,
)
