"""FLUX.1 and Flex.1, as AI Toolkit 0.12.26 samples them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fidelora.families import latent_formats
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER
from fidelora.families.flux.names import fused_names_of_adapters, original_names
from fidelora.families.shared_parts import FLUX_VAE, T5_ENCODER, with_companion
from fidelora.families.spec import Family, FlowSampler, Part, Tokenizer, TrainerSampling

_FOLDER = Path(__file__).parent

_CLIP = Part(
    name="text_encoder",
    role="text_encoder",
    library="transformers",
    class_name="CLIPTextModel",
    weights="model",
    precision="text_encoder_dtype",
    optional_prefix="text_model.",
    tokenizer=Tokenizer("tokenizer", CLIP_TOKENIZER),
)
_TRANSFORMER = Part(
    name="transformer",
    role="denoiser",
    library="diffusers",
    class_name="FluxTransformer2DModel",
    weights="diffusion_pytorch_model",
    precision="dtype",
    # `lora_unet_` is kohya's prefix, `lora_transformer_` that of OneTrainer and SimpleTuner.
    adapter_prefixes=("transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_"),
    other_names=original_names,
    fused_names=fused_names_of_adapters,
    quantization="quantization",
)


_COMPANION = "black-forest-labs/FLUX.1-dev"
"""Hub id of the other parts, for checkpoints that contain only the transformer."""

FLUX = Family(
    id="flux",
    title="FLUX.1",
    base_model="black-forest-labs/FLUX.1-dev",
    resolution_divisor=16,
    default_size=1024,
    default_steps=25,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    # The trainer's own configuration; the base's scheduler file is not used.
    samplers=MappingProxyType(
        {
            # The pipeline computes the sigmas before the shift with numpy in float64.
            "flowmatch": FlowSampler(
                "flowmatch",
                MappingProxyType({"dynamic_shift": (256, 0.5, 4096, 1.15), "linspace": "float64"}),
            )
        }
    ),
    uses=frozenset({"noise", "quantization", "text_encoder_quantization", "training_adapters"}),
    rounds_training_changes=True,  # the trainer merges the assistant LoRA with PEFT
    parts=with_companion((_CLIP, T5_ENCODER, _TRANSFORMER, FLUX_VAE), _COMPANION),
    text="fidelora.families.flux.text:FluxText",
    denoiser="fidelora.families.flux.denoiser:FluxDenoiser",
    latents="fidelora.families.patches:PatchLatents",
    checkpoint="fidelora.families.flux.checkpoint",
    layout=_FOLDER / "layout",
    trainer_sampling=TrainerSampling(
        archs=("flux",), flags=("is_flux",), text_encoder_qtype="qtype"
    ),
    adapter_base_versions=("flux.1", "flux1"),
    latent_preview=latent_formats.FLUX1,
)

FLEX1 = replace(
    FLUX,
    id="flex1",
    title="Flex.1",
    base_model="ostris/Flex.1-alpha",
    parts=with_companion(FLUX.parts, "ostris/Flex.1-alpha"),
    layout=_FOLDER / "layout_flex1",
    trainer_sampling=TrainerSampling(archs=("flex1",), text_encoder_qtype="qtype"),
)

# `model.use_flux_cfg` of the trainer: classifier-free guidance instead of the embedded guidance.
FLUX_CFG = replace(
    FLUX,
    id="flux_cfg",
    title="FLUX.1 with CFG",
    uses=FLUX.uses | {"negative_prompt"},
    parts=(
        *FLUX.parts[:2],
        replace(
            _TRANSFORMER,
            # The time and the pooled text are embedded without the guidance.
            config=MappingProxyType({"guidance_embeds": False}),
            ignored_weights=tuple(
                f"time_text_embed.guidance_embedder.linear_{number}.{kind}"
                for number in (1, 2)
                for kind in ("weight", "bias")
            ),
        ),
        FLUX.parts[3],
    ),
    denoiser="fidelora.families.flux.denoiser:FluxCfgDenoiser",
    trainer_sampling=TrainerSampling(
        archs=("flux", "flex1"),
        flags=("is_flux",),
        text_encoder_qtype="qtype",
        option="use_flux_cfg",
    ),
)
