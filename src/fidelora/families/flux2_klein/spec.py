"""FLUX.2-klein 4B, as AI Toolkit 0.12.26 samples it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fidelora.families.flux2_klein.names import diffusers_names
from fidelora.families.shared_parts import with_companion
from fidelora.families.spec import Family, FlowSampler, Part, Tokenizer, TrainerSampling

# Linear fit of FLUX.2's VAE. Source: `Flux2.latent_rgb_factors` in
# https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py
_COLOURS = (
    (0.0058, 0.0113, 0.0073), (0.0495, 0.0443, 0.0836), (-0.0099, 0.0096, 0.0644),
    (0.2144, 0.3009, 0.3652), (0.0166, -0.0039, -0.0054), (0.0157, 0.0103, -0.0160),
    (-0.0398, 0.0902, -0.0235), (-0.0052, 0.0095, 0.0109), (-0.3527, -0.2712, -0.1666),
    (-0.0301, -0.0356, -0.0180), (-0.0107, 0.0078, 0.0013), (0.0746, 0.0090, -0.0941),
    (0.0156, 0.0169, 0.0070), (-0.0034, -0.0040, -0.0114), (0.0032, 0.0181, 0.0080),
    (-0.0939, -0.0008, 0.0186), (0.0018, 0.0043, 0.0104), (0.0284, 0.0056, -0.0127),
    (-0.0024, -0.0022, -0.0030), (0.1207, -0.0026, 0.0065), (0.0128, 0.0101, 0.0142),
    (0.0137, -0.0072, -0.0007), (0.0095, 0.0092, -0.0059), (0.0000, -0.0077, -0.0049),
    (-0.0465, -0.0204, -0.0312), (0.0095, 0.0012, -0.0066), (0.0290, -0.0034, 0.0025),
    (0.0220, 0.0169, -0.0048), (-0.0332, -0.0457, -0.0468), (-0.0085, 0.0389, 0.0609),
    (-0.0076, 0.0003, -0.0043), (-0.0111, -0.0460, -0.0614),
)  # fmt: skip

FLUX2_KLEIN_4B = Family(
    id="flux2_klein_4b",
    title="FLUX.2-klein 4B",
    base_model="black-forest-labs/FLUX.2-klein-base-4B",
    resolution_divisor=16,
    default_size=1024,
    default_steps=25,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    # The shift of FLUX.1, from the trainer's own code; the base's scheduler file is not used.
    samplers=MappingProxyType(
        {
            "flowmatch": FlowSampler(
                "flowmatch",
                MappingProxyType({"dynamic_shift": (256, 0.5, 4096, 1.15), "scheduler": False}),
            )
        }
    ),
    uses=frozenset({"negative_prompt", "noise", "quantization", "text_encoder_quantization"}),
    parts=with_companion(
        (
            Part(
                name="text_encoder",
                role="text_encoder",
                library="transformers",
                class_name="Qwen3ForCausalLM",
                implementation="transformers:Qwen3Model",  # only hidden states are needed
                weights="model",
                original="qwen3",
                precision="text_encoder_dtype",
                optional_prefix="model.",
                tokenizer=Tokenizer("tokenizer"),
                ignored_weights=("lm_head.weight",),  # not needed for hidden states
                # The trainer calls `.to(dtype)` unless it quantises this encoder or saves memory.
                rounds_buffers=True,
                rounds_quantized_buffers=False,
                quantization="text_encoder_quantization",
            ),
            Part(
                name="transformer",
                role="denoiser",
                library="diffusers",
                class_name="Flux2Transformer2DModel",
                implementation="fidelora.families.flux2_klein.transformer:Flux2Transformer",
                weights="diffusion_pytorch_model",
                original="flux-2-klein-base-4b.safetensors",
                convert="fidelora.families.flux2_klein.checkpoint:transformer",
                precision="dtype",
                adapter_prefixes=("diffusion_model.", "transformer.", "lora_unet_"),
                accepted_names=diffusers_names,
                quantization="quantization",
            ),
            Part(
                name="vae",
                role="decoder",
                library="diffusers",
                class_name="AutoencoderKLFlux2",
                implementation="fidelora.families.flux2_klein.decoder:Flux2Decoder",
                weights="diffusion_pytorch_model",
                original="ae.safetensors",
                convert="fidelora.families.flux2_klein.checkpoint:decoder",
                precision="vae_dtype",
            ),
        ),
        "black-forest-labs/FLUX.2-klein-base-4B",
    ),
    text="fidelora.families.flux2_klein.text:KleinText",
    denoiser="fidelora.families.flux2_klein.denoiser:KleinDenoiser",
    latents="fidelora.families.flux2_klein.latents:KleinLatents",
    checkpoint="fidelora.families.flux2_klein.checkpoint",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=TrainerSampling(
        archs=("flux2_klein_4b",), text_encoder_qtype="qtype_te", ignores_sampler=True
    ),
    adapter_base_versions=("flux2_klein_4b",),
    latent_preview=_COLOURS,
)
