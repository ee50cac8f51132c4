"""Lumina-Image 2.0, as AI Toolkit 0.12.26 samples it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fidelora.families import latent_formats
from fidelora.families.lumina2.names import fused_names, original_names
from fidelora.families.shared_parts import with_companion
from fidelora.families.spec import Family, FlowSampler, Part, Tokenizer, TrainerSampling

_PARTS = (
    Part(
        name="text_encoder",
        role="text_encoder",
        library="transformers",
        class_name="Gemma2Model",
        weights="model",
        precision="text_encoder_dtype",
        optional_prefix="model.",
        tokenizer=Tokenizer("tokenizer"),
        ignored_weights=("lm_head.weight",),  # not needed for hidden states
        # transformers 5.5.3, the trainer's version, left out the soft cap of the attention
        # scores; see also `Lumina2Text`. Without the cap, 100 % of the pixels match the trainer's
        # in bfloat16; with it, only 10 %.
        config=MappingProxyType({"attn_logit_softcapping": None}),
        # The trainer calls `.to(device, dtype)`, which rounds the rotary tables. In bfloat16,
        # 10 % of the pixels agree without this rounding, 100 % with it.
        rounds_buffers=True,
        quantization="text_encoder_quantization",
    ),
    Part(
        name="transformer",
        role="denoiser",
        library="diffusers",
        class_name="Lumina2Transformer2DModel",
        weights="diffusion_pytorch_model",
        precision="dtype",
        adapter_prefixes=("transformer.", "diffusion_model.", "lora_unet_"),
        other_names=original_names,
        fused_names=fused_names,
        quantization="quantization",
    ),
    Part(
        name="vae",
        role="decoder",
        library="diffusers",
        class_name="AutoencoderKL",
        weights="diffusion_pytorch_model",
        precision="vae_dtype",
    ),
)

LUMINA2 = Family(
    id="lumina2",
    title="Lumina-Image 2.0",
    base_model="Alpha-VLLM/Lumina-Image-2.0",
    resolution_divisor=16,
    api_divisor=32,
    default_size=1024,
    default_steps=25,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    # The base's scheduler file and the trainer's configuration have a shift of 6, but the trainer's
    # scheduler ignores it. With 6, about 1 % of the pixels agree.
    samplers=MappingProxyType(
        {
            "flowmatch": FlowSampler(
                "flowmatch", MappingProxyType({"shift": 1.0, "linspace": "float64"})
            )
        }
    ),
    uses=frozenset({"negative_prompt", "noise", "quantization", "text_encoder_quantization"}),
    parts=with_companion(_PARTS, "Alpha-VLLM/Lumina-Image-2.0"),
    text="fidelora.families.lumina2.text:Lumina2Text",
    denoiser="fidelora.families.lumina2.denoiser:Lumina2Denoiser",
    latents="fidelora.families.lumina2.latents:Lumina2Latents",
    checkpoint="fidelora.families.lumina2.checkpoint",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=TrainerSampling(
        archs=("lumina2",), text_encoder_qtype="qtype", size_multiple=16
    ),
    adapter_base_versions=("lumina2",),
    latent_preview=latent_formats.FLUX1,
)
