"""Z-Image, as AI Toolkit 0.12.26 samples it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fidelora.families import latent_formats
from fidelora.families.shared_parts import with_companion
from fidelora.families.spec import (
    Family,
    FlowSampler,
    OlderTrainer,
    Part,
    Tokenizer,
    TrainerSampling,
)
from fidelora.families.zimage.names import fused_names, original_names

# A static shift from the trainer's own configuration; the base's scheduler file is not used.
_FLOWMATCH = FlowSampler("flowmatch", MappingProxyType({"shift": 3.0}))
_FLOWMATCH_TO_ZERO = FlowSampler(
    "flowmatch_to_zero", MappingProxyType({"shift": 3.0, "ends_at_zero": True})
)

_TRAINER_SAMPLING = TrainerSampling(
    archs=("zimage",),
    text_encoder_qtype="qtype_te",
    ignores_sampler=True,
    whole_layers_since=(0, 10, 24),
    assistant_float8=True,
    older=(
        OlderTrainer((0, 10, 25), sampler=_FLOWMATCH_TO_ZERO.name),
        # As in diffusers, a guidance scale above 0 enabled guidance.
        OlderTrainer((0, 10, 21), guidance_offset=1.0),
        OlderTrainer((0, 9, 14), divisor=32),
    ),
)


_PARTS = (
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
        quantization="text_encoder_quantization",
    ),
    Part(
        name="transformer",
        role="denoiser",
        library="diffusers",
        class_name="ZImageTransformer2DModel",
        weights="diffusion_pytorch_model",
        precision="dtype",
        adapter_prefixes=("diffusion_model.", "transformer.", "lora_unet_"),
        other_names=original_names,
        fused_names=fused_names,
        quantization="quantization",
        whole_layers=(
            "t_embedder*",
            "cap_embedder*",
            "all_x_embedder*",
            "all_final_layer*",
        ),
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

ZIMAGE = Family(
    id="zimage",
    title="Z-Image",
    base_model="Tongyi-MAI/Z-Image",
    resolution_divisor=16,
    api_divisor=32,
    default_size=1024,
    default_steps=30,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    samplers=MappingProxyType({one.name: one for one in (_FLOWMATCH, _FLOWMATCH_TO_ZERO)}),
    uses=frozenset(
        {"negative_prompt", "quantization", "text_encoder_quantization", "training_adapters"}
    ),
    parts=with_companion(_PARTS, "Tongyi-MAI/Z-Image"),
    text="fidelora.families.zimage.text:ZImageText",
    denoiser="fidelora.families.zimage.denoiser:ZImageDenoiser",
    latents="fidelora.families.zimage.latents:ZImageLatents",
    checkpoint="fidelora.families.zimage.checkpoint",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=_TRAINER_SAMPLING,
    adapter_base_versions=("zimage",),
    latent_preview=latent_formats.FLUX1,
)

ZIMAGE_TURBO = replace(
    ZIMAGE,
    id="zimage_turbo",
    title="Z-Image Turbo",
    base_model="Tongyi-MAI/Z-Image-Turbo",
    parts=with_companion(ZIMAGE.parts, "Tongyi-MAI/Z-Image-Turbo"),
    default_steps=8,
    default_guidance_scale=1.0,
    trainer_sampling=replace(_TRAINER_SAMPLING, archs=("zimage:turbo",), default_steps=9),
)

ZIMAGE_DETURBO = replace(
    ZIMAGE,
    id="zimage_deturbo",
    title="Z-Image De-Turbo",
    base_model="ostris/Z-Image-De-Turbo",  # has only the transformer
    extras=ZIMAGE_TURBO.base_model,
    parts=ZIMAGE_TURBO.parts,
    default_steps=25,
    default_guidance_scale=3.0,
    trainer_sampling=replace(_TRAINER_SAMPLING, archs=("zimage:deturbo",), default_steps=25),
)
