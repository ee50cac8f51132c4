"""Stable Diffusion 1.5, as AI Toolkit 0.12 samples it."""

from __future__ import annotations

from types import MappingProxyType

from fidelora.models.spec import Component, ModelSpec, Sampler

# The dictionary that the trainer builds its sampler from (`toolkit/sampler.py`, `sd_config`) with one change. It says
# `steps_offset: 0`, but the diffusers pipeline that the sampler is then handed to rewrites that to 1 in its constructor, so
# every preview was made with 1. Measured on the golden jobs: with 0, at least 30 % of the pixels differ.
_SCHEDULER_CONFIG = MappingProxyType(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "interpolation_type": "linear",
    }
)

_KARRAS = {"use_karras_sigmas": True}
# Since diffusers 0.26 the first-order-in-noise variant refuses a last sigma of zero, its default, and so the trainer cannot
# use it with a current diffusers. `sigma_min` is what it did before that release, so what previews of that sampler show.
_DPM_SOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPM_SOLVER_PP = {"algorithm_type": "dpmsolver++"}

_SAMPLERS = (
    Sampler("ddpm", "DDPMScheduler"),
    Sampler("ddim", "DDIMScheduler"),
    Sampler("pndm", "PNDMScheduler"),
    Sampler("lms", "LMSDiscreteScheduler"),
    Sampler("k_lms", "LMSDiscreteScheduler", _KARRAS),
    Sampler("euler", "EulerDiscreteScheduler"),
    Sampler("k_euler", "EulerDiscreteScheduler", _KARRAS),
    Sampler("euler_a", "EulerAncestralDiscreteScheduler"),
    Sampler("dpmsolver", "DPMSolverMultistepScheduler", _DPM_SOLVER),
    Sampler("dpmsolver++", "DPMSolverMultistepScheduler", _DPM_SOLVER_PP),
    Sampler("k_dpmsolver", "DPMSolverMultistepScheduler", _DPM_SOLVER | _KARRAS),
    Sampler("k_dpmsolver++", "DPMSolverMultistepScheduler", _DPM_SOLVER_PP | _KARRAS),
    Sampler("dpmsingle", "DPMSolverSinglestepScheduler"),
    Sampler("heun", "HeunDiscreteScheduler"),
    Sampler("dpm_2", "KDPM2DiscreteScheduler"),
    Sampler("dpm_2_a", "KDPM2AncestralDiscreteScheduler"),
    # Distilled for 50 steps in all: the scheduler picks its steps among those (`original_inference_steps`).
    Sampler("lcm", "LCMScheduler", max_steps=50),
)

SD15 = ModelSpec(
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
    samplers=MappingProxyType({sampler.name: sampler for sampler in _SAMPLERS}),
    scheduler_config=_SCHEDULER_CONFIG,
    components=(
        # transformers 5.2x dropped the level `text_model` from the module names; files and adapters exist with and without.
        Component(
            "text_encoder",
            "transformers",
            "CLIPTextModel",
            "model",
            adapter_prefixes=("lora_te_", "text_encoder."),
            optional_prefix="text_model.",
        ),
        Component(
            "unet",
            "diffusers",
            "UNet2DConditionModel",
            "diffusion_pytorch_model",
            adapter_prefixes=("lora_unet_", "lycoris_", "unet."),
        ),
        Component("vae", "diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
    ),
    adapter_base_versions=("sd_1.5", "sd_v1"),
    # A linear fit to the VAE: https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204
    latent_colours=((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)),
)
