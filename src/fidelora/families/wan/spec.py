"""Wan 2.1 and 2.2, text to video, as AI Toolkit 0.12.26 samples them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fidelora.families import latent_formats
from fidelora.families.spec import (
    Family,
    FlowSampler,
    NoiseSampler,
    OlderTrainer,
    Part,
    Tokenizer,
    TrainerSampling,
)
from fidelora.families.wan.names import original_names

# Both sizes of Wan 2.1 have the same text encoder and VAE.
_COMPANION = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"

# The trainer's own configuration; the base's UniPC is not used. The pipeline passes no sigmas,
# so the scheduler shifts twice: first the ends of its table, then all values between them.
_FLOWMATCH = FlowSampler(
    "flowmatch", MappingProxyType({"shift": 3.0, "ends_at_shifted_table": True})
)
# The sampler of the base model's file, with which the trainer sampled before 0.9.3.
_UNIPC = NoiseSampler(
    "unipc",
    "UniPCMultistepScheduler",
    MappingProxyType(
        {
            "flow_shift": 3.0,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
    ),
)
_FLOWMATCH_22 = FlowSampler(
    "flowmatch", MappingProxyType({"shift": 5.0, "ends_at_shifted_table": True})
)

WAN21_1B = Family(
    id="wan21_1b",
    title="Wan 2.1 1.3B",
    base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    resolution_divisor=16,
    default_size=512,
    default_steps=25,
    default_guidance_scale=4.0,
    default_seed=42,
    default_sampler="flowmatch",
    samplers=MappingProxyType({"flowmatch": _FLOWMATCH, "unipc": _UNIPC}),
    frames_per_latent=4,
    default_frames=41,
    default_fps=16,
    uses=frozenset(
        {
            "negative_prompt",
            "vae_tiling",
            "quantization",
            "text_encoder_quantization",
            "frames",
            "fps",
        }
    ),
    parts=(
        Part(
            name="text_encoder",
            role="text_encoder",
            library="transformers",
            class_name="UMT5EncoderModel",
            weights="model",
            companion=_COMPANION,
            precision="text_encoder_dtype",
            tokenizer=Tokenizer("tokenizer"),
            # As for T5: the trainer's transformers computes attention with matrix products only.
            config=MappingProxyType({"attn_implementation": "eager"}),
            quantization="text_encoder_quantization",
        ),
        Part(
            name="transformer",
            role="denoiser",
            library="diffusers",
            class_name="WanTransformer3DModel",
            weights="diffusion_pytorch_model",
            precision="dtype",
            adapter_prefixes=("diffusion_model.", "transformer.", "lora_unet_"),
            other_names=original_names,
            # The trainer calls `.to(dtype)`, which rounds the rotary tables.
            rounds_buffers=True,
            quantization="quantization",
        ),
        Part(
            name="vae",
            role="decoder",
            library="diffusers",
            class_name="AutoencoderKLWan",
            weights="diffusion_pytorch_model",
            companion=_COMPANION,
            precision="vae_dtype",
        ),
    ),
    text="fidelora.families.wan.text:WanText",
    denoiser="fidelora.families.wan.denoiser:WanDenoiser",
    latents="fidelora.families.wan.latents:WanLatents",
    checkpoint="fidelora.families.wan.checkpoint",
    layout=Path(__file__).parent / "layout",
    trainer_sampling=TrainerSampling(
        archs=("wan21:1b", "wan21"),
        text_encoder_qtype="qtype",
        ignores_sampler=True,
        size_multiple=16,
        tiles_since=(0, 10, 22),
        older=(OlderTrainer((0, 9, 3), sampler="unipc"),),
    ),
    adapter_base_versions=("wan_2.1",),
    latent_preview=latent_formats.WAN21,
)

WAN21_14B = replace(
    WAN21_1B,
    id="wan21_14b",
    title="Wan 2.1 14B",
    base_model="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    layout=Path(__file__).parent / "layout_14b",
    trainer_sampling=replace(WAN21_1B.trainer_sampling, archs=("wan21:14b",)),
)

# The trainer quantises neither the embeddings of time and text nor the last layer of Wan 2.2.
# Those of Wan 2.1 are quantised.
_TRANSFORMER = replace(WAN21_1B.part("denoiser"), whole_layers=("condition_embedder*", "proj_out*"))

WAN22_14B_T2V = replace(
    WAN21_14B,
    id="wan22_14b_t2v",
    title="Wan 2.2 14B",
    base_model="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    api_divisor=32,
    samplers=MappingProxyType({"flowmatch": _FLOWMATCH_22, "unipc": _UNIPC}),
    parts=(
        *WAN21_1B.text_encoders,
        replace(_TRANSFORMER, stage="high"),
        replace(_TRANSFORMER, name="transformer_2", stage="low"),
        WAN21_1B.part("decoder"),
    ),
    denoiser="fidelora.families.wan.denoiser:TwoStageWanDenoiser",
    checkpoint="",  # a file has only one of the two transformers
    # Sizes that are not multiples of 16 are rounded down, where Wan 2.1 fails.
    trainer_sampling=replace(
        WAN21_1B.trainer_sampling,
        archs=("wan22_14b:t2v", "wan22_14b"),
        size_multiple=8,
        whole_layers_since=(0, 10, 22),
    ),
    adapter_base_versions=("wan_2.2_14b",),
)
