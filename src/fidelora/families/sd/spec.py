"""Stable Diffusion 1.5 and SDXL, as AI Toolkit 0.12 samples them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fidelora.families import latent_formats
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER
from fidelora.families.sd.names import original_names
from fidelora.families.spec import (
    Family,
    NoiseSampler,
    Part,
    Tokenizer,
    TrainerSampling,
    WrongSchedule,
)
from fidelora.sampling.spacings import TimestepSpacing

_LAYOUTS = Path(__file__).parent / "layouts"

# The dictionary `sd_config` of the trainer's `toolkit/sampler.py`.
_TRAINER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "clip_sample": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "interpolation_type": "linear",
}

_KARRAS = {"use_karras_sigmas": True}
# Since diffusers 0.26, `dpmsolver` rejects a final sigma of zero, which is the default, so the
# trainer's `dpmsolver` fails with current releases of diffusers. `sigma_min` restores the earlier
# behaviour.
_DPM_SOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPM_SOLVER_PP = {"algorithm_type": "dpmsolver++"}


# The tables of these schedulers do not depend on `timestep_spacing`.
_FIXED_SPACING = frozenset({"k_dpmsolver", "k_dpmsolver++", "dpmsingle"})
_SGM_UNIFORM = frozenset({"euler", "euler_a", "heun", "dpmsolver++"})
# Defaults of `step` in diffusers' schedulers.
_ETAS = {"ddim": 0.0, "tcd": 0.3}


def _samplers(steps_offset: int) -> Mapping[str, NoiseSampler]:
    """Return the trainer's samplers, and `tcd`, by name."""
    config: dict[str, Any] = {**_TRAINER_CONFIG, "steps_offset": steps_offset}

    def sampler(name: str, scheduler: str, **options: Any) -> NoiseSampler:
        spacings: set[TimestepSpacing] = set() if name in _FIXED_SPACING else {"trailing"}
        return NoiseSampler(
            name,
            scheduler,
            MappingProxyType(config | options),
            # LCM and TCD were distilled with 50 timesteps, and their schedulers select from these.
            max_steps=50 if name in ("lcm", "tcd") else 150,
            spacings=frozenset(spacings | ({"sgm_uniform"} if name in _SGM_UNIFORM else set())),
            eta=_ETAS.get(name),
            in_trainer=name != "tcd",
        )

    found = (
        sampler("ddpm", "DDPMScheduler"),
        sampler("ddim", "DDIMScheduler"),
        sampler("pndm", "PNDMScheduler"),
        sampler("lms", "LMSDiscreteScheduler"),
        sampler("k_lms", "LMSDiscreteScheduler", **_KARRAS),
        sampler("euler", "EulerDiscreteScheduler"),
        sampler("k_euler", "EulerDiscreteScheduler", **_KARRAS),
        sampler("euler_a", "EulerAncestralDiscreteScheduler"),
        sampler("dpmsolver", "DPMSolverMultistepScheduler", **_DPM_SOLVER),
        sampler("dpmsolver++", "DPMSolverMultistepScheduler", **_DPM_SOLVER_PP),
        sampler("k_dpmsolver", "DPMSolverMultistepScheduler", **_DPM_SOLVER, **_KARRAS),
        sampler("k_dpmsolver++", "DPMSolverMultistepScheduler", **_DPM_SOLVER_PP, **_KARRAS),
        sampler("dpmsingle", "DPMSolverSinglestepScheduler"),
        sampler("heun", "HeunDiscreteScheduler"),
        sampler("dpm_2", "KDPM2DiscreteScheduler"),
        sampler("dpm_2_a", "KDPM2AncestralDiscreteScheduler"),
        sampler("lcm", "LCMScheduler"),
        sampler("tcd", "TCDScheduler"),
    )
    return MappingProxyType({one.name: one for one in found})


_UNET = {
    "name": "unet",
    "role": "denoiser",
    "library": "diffusers",
    "class_name": "UNet2DConditionModel",
    "weights": "diffusion_pytorch_model",
    "precision": "dtype",
    "checkpoint_prefix": "model.diffusion_model.",
    "adapter_prefixes": ("lora_unet_", "lycoris_", "oft_unet_", "unet.", "diffusion_model."),
    "other_names": original_names,
    "numbers_blocks": True,
}
_VAE = Part(
    name="vae",
    role="decoder",
    library="diffusers",
    class_name="AutoencoderKL",
    weights="diffusion_pytorch_model",
    precision="vae_dtype",
    checkpoint_prefix="first_stage_model.",
)


def _text_encoder(
    name: str,
    class_name: str,
    checkpoint_prefix: str,
    kohya_prefixes: tuple[str, ...],
    clip_name: str,
    tokenizer: Tokenizer,
    embedding_key: str,
) -> Part:
    return Part(
        name=name,
        role="text_encoder",
        library="transformers",
        class_name=class_name,
        weights="model",
        precision="text_encoder_dtype",
        checkpoint_prefix=checkpoint_prefix,
        adapter_prefixes=(
            *kohya_prefixes,
            f"{name}.",
            f"text_encoders.{clip_name}.transformer.",  # ComfyUI
            f"{clip_name}.",  # OneTrainer's OMI format
        ),
        # Recent versions of transformers, such as 5.23, omit `text_model.` from the module names;
        # files and adapters exist with and without it.
        optional_prefix="text_model.",
        tokenizer=tokenizer,
        embedding_key=embedding_key,
    )


_FIRST_TOKENIZER = Tokenizer("tokenizer", CLIP_TOKENIZER)
# The second text encoder of SDXL uses a different padding token.
_SECOND_TOKENIZER = Tokenizer("tokenizer_2", CLIP_TOKENIZER, MappingProxyType({"pad_token": "!"}))
_COMMON_USES = frozenset({"negative_prompt", "emphasis", "guidance_rescale", "prediction", "noise"})


def _wrong_offset(right: int, reason: str) -> WrongSchedule:
    wrong = 1 - right
    return WrongSchedule(
        "steps_offset",
        MappingProxyType({"steps_offset": wrong}),
        f"The sample was made with steps_offset {wrong} instead of {right}, for example because "
        f"{reason}. Set steps_offset to {right} in the program that made the sample.",
    )


SD15 = Family(
    id="sd15",
    title="Stable Diffusion 1.5",
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    base_aliases=("runwayml/stable-diffusion-v1-5",),
    base_sizes=MappingProxyType({"fidelora:miniature": 128}),
    resolution_divisor=8,
    default_size=512,
    default_steps=25,
    default_guidance_scale=6.0,
    default_seed=42,
    default_sampler="ddpm",
    # The trainer's configuration has `steps_offset: 0`, but the diffusers pipeline that it passes
    # the sampler to rewrites that to 1 in its constructor, so every sample was made with 1.
    # Measured on the golden runs: with 0, at least 30 % of the pixels differ.
    samplers=_samplers(steps_offset=1),
    uses=_COMMON_USES,
    parts=(
        _text_encoder(
            "text_encoder", "CLIPTextModel", "cond_stage_model.transformer.",
            ("lora_te_", "lora_te1_"), "clip_l", _FIRST_TOKENIZER, "emb_params",
        ),
        Part(**_UNET),  # type: ignore[arg-type]
        _VAE,
    ),
    text="fidelora.families.sd.text:PlainText",
    denoiser="fidelora.families.sd.denoiser:UNetDenoiser",
    latents="fidelora.families.sd.latents:SDLatents",
    checkpoint="fidelora.families.sd.checkpoint",
    layout=_LAYOUTS / "sd15",
    accelerations=frozenset({"prepacked", "packed", "compiled"}),
    trainer_sampling=TrainerSampling(
        archs=(None, "sd", "sd1", "sd15"),
        wrong_schedules=(
            _wrong_offset(
                1, "the program replaced the pipeline's scheduler after it created the pipeline"
            ),
        ),
    ),
    adapter_base_versions=("sd_1.5", "sd_v1"),
    latent_preview=latent_formats.SD15,
)  # fmt: skip

SDXL = Family(
    id="sdxl",
    title="Stable Diffusion XL",
    base_model="stabilityai/stable-diffusion-xl-base-1.0",
    resolution_divisor=8,
    default_size=1024,
    default_steps=25,
    default_guidance_scale=6.0,
    default_seed=42,
    default_sampler="ddpm",
    # Unlike that of Stable Diffusion 1.5, the pipeline of SDXL leaves `steps_offset: 0` unchanged.
    samplers=_samplers(steps_offset=0),
    uses=_COMMON_USES | {"negative_prompt_2"},
    parts=(
        _text_encoder(
            "text_encoder", "CLIPTextModel", "conditioner.embedders.0.transformer.",
            ("lora_te1_", "lora_te_"), "clip_l", _FIRST_TOKENIZER, "clip_l",
        ),
        _text_encoder(
            "text_encoder_2", "CLIPTextModelWithProjection", "conditioner.embedders.1.model.",
            ("lora_te2_",), "clip_g", _SECOND_TOKENIZER, "clip_g",
        ),
        Part(**_UNET),  # type: ignore[arg-type]
        _VAE,
    ),
    text="fidelora.families.sd.text:PooledText",
    denoiser="fidelora.families.sd.denoiser:UNetDenoiser",
    latents="fidelora.families.sd.latents:SDXLLatents",
    checkpoint="fidelora.families.sd.checkpoint",
    layout=_LAYOUTS / "sdxl",
    accelerations=frozenset({"prepacked", "packed", "compiled"}),
    trainer_sampling=TrainerSampling(
        archs=("sdxl",),
        flags=("is_xl",),
        rescales_guidance=True,
        wrong_schedules=(
            _wrong_offset(
                0, "the program used the scheduler configuration of the base model"
            ),
        ),
    ),
    adapter_base_versions=("sdxl_1.0", "sdxl_base_v1-0"),
    latent_preview=latent_formats.SDXL,
)  # fmt: skip
