"""Z-Image, as AI Toolkit 0.12.26 samples it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fidelora.families import latent_formats
from fidelora.families.spec import Family, FlowSampler, Part, Tokenizer, TrainerSampling

ZIMAGE = Family(
    id="zimage",
    title="Z-Image",
    base_model="Tongyi-MAI/Z-Image",
    resolution_divisor=16,
    default_size=1024,
    default_steps=30,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    # A static shift from the trainer's own configuration; the base's scheduler file is not used.
    samplers=MappingProxyType(
        {"flowmatch": FlowSampler("flowmatch", MappingProxyType({"shift": 3.0}))}
    ),
    uses=frozenset({"negative_prompt"}),
    parts=(
        Part(
            name="text_encoder",
            role="text_encoder",
            library="transformers",
            class_name="Qwen3Model",
            weights="model",
            precision="text_encoder_dtype",
            optional_prefix="model.",
            tokenizer=Tokenizer("tokenizer"),
            ignored_weights=("lm_head.weight",),  # not needed for hidden states
            # The trainer calls `.to(device, dtype)`, which rounds the rotary tables. In bfloat16,
            # 12 % of the pixels agree without this rounding, 100 % with it.
            rounds_buffers=True,
        ),
        Part(
            name="transformer",
            role="denoiser",
            library="diffusers",
            class_name="ZImageTransformer2DModel",
            weights="diffusion_pytorch_model",
            precision="dtype",
            adapter_prefixes=("diffusion_model.", "transformer."),
        ),
        Part(
            name="vae",
            role="decoder",
            library="diffusers",
            class_name="AutoencoderKL",
            weights="diffusion_pytorch_model",
            precision="vae_dtype",
        ),
    ),
    text="fidelora.families.zimage.text:ZImageText",
    denoiser="fidelora.families.zimage.denoiser:ZImageDenoiser",
    latents="fidelora.families.zimage.latents:ZImageLatents",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=TrainerSampling(archs=("zimage",), ignores_sampler=True),
    adapter_base_versions=("zimage",),
    latent_preview=latent_formats.FLUX1,
)
