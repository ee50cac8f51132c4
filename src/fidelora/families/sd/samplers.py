"""How AI Toolkit 0.12 builds its samplers (`toolkit/sampler.py`): alike for every family with a noise schedule."""

from __future__ import annotations

from types import MappingProxyType

from fidelora.families.spec import Sampler

SCHEDULER_CONFIG = MappingProxyType(
    {
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
)
"""The dictionary `sd_config`, as it stands there; the pipeline of a family may correct it."""

_KARRAS = {"use_karras_sigmas": True}
# Since diffusers 0.26 the first-order-in-noise variant refuses a last sigma of zero, its default, and so the trainer cannot
# use it with a current diffusers. `sigma_min` is what it did before that release, so what previews of that sampler show.
_DPM_SOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPM_SOLVER_PP = {"algorithm_type": "dpmsolver++"}

_ALL = (
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

SAMPLERS = MappingProxyType({sampler.name: sampler for sampler in _ALL})
"""By the names in training configurations."""
