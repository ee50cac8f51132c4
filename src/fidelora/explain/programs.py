"""Defaults of other programs, their names of samplers and schedules, and where settings are found.

The modules that simulate a part of A1111 or ComfyUI name the source files that they follow. Forge,
Fooocus, SwarmUI, SD.Next, InvokeAI and NovelAI are described by the program or library that they
are built on, so their defaults are less certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fidelora.errors import UnknownSamplerError
from fidelora.explain.k_samplers import SAMPLERS
from fidelora.explain.noise import StepNoise
from fidelora.explain.reading import Program, Reading
from fidelora.explain.sigmas import SCHEDULES
from fidelora.explain.simulation import Library
from fidelora.families import Family
from fidelora.images.a1111_samplers import sampler_of
from fidelora.images.other_programs import INVOKEAI_SAMPLERS


class Sampling(NamedTuple):
    """A sampler and its schedule; see `Simulation`."""

    library: Library
    sampler: str
    schedule: str = ""


@dataclass(frozen=True)
class Behaviour:
    """Defaults of a program that its pictures do not contain.

    Attributes:
        fields: fields of `Simulation` that are the same in all pictures of the program.
        step_noises: possible sources of the numbers in the sampling steps, the usual one first.
        devices: possible sources of the initial noise, the usual one first.
        text_rules: possible rules for brackets in prompts, the default first.
        zeroes_empty_negative: True if SDXL gets zeros for an empty negative prompt.
    """

    library: Library
    fields: Mapping[str, Any]
    devices: tuple[str, ...] = ("cpu", "gpu")
    step_noises: tuple[StepNoise, ...] = ("continued",)
    text_rules: tuple[str, ...] = ("plain",)
    zeroes_empty_negative: bool = False
    where: Mapping[str, str] = field(default_factory=dict)


_WEB_UI_RULES = ("original", "no_norm", "ignore", "plain")
_IN_A1111 = {
    "prompt": "the prompt field",
    "trigger": "the prompt field",
    "negative_prompt": "the negative prompt field",
    "lora": "the tag <lora:{lora}:{strength}> in the prompt",
    "sampler": "Sampling method and Schedule type",
    "schedule": "Schedule type",
    "steps": "Sampling steps",
    "guidance": "CFG Scale",
    "clip_skip": "Settings > Stable Diffusion > Clip skip",
    "emphasis": "Settings > Stable Diffusion > Emphasis mode",
    "seed": "Seed",
    "noise": "Settings > Stable Diffusion > Random number generator source",
    "size": "Width and Height",
    "precision": "the command line options --no-half and --no-half-vae",
    "negative_zeros": "the negative prompt field (a space instead of nothing)",
    "upsampling": "Width and Height",
    "base_model": "Stable Diffusion checkpoint",
    "vae": "Settings > VAE > SD VAE",
}
_IN_COMFYUI = {
    "prompt": "CLIP Text Encode (text)",
    "trigger": "CLIP Text Encode (text)",
    "negative_prompt": "CLIP Text Encode (text) of the input negative",
    "lora": "Load LoRA (strength_model, strength_clip)",
    "sampler": "KSampler (sampler_name, scheduler)",
    "schedule": "KSampler (scheduler)",
    "steps": "KSampler (steps)",
    "guidance": "KSampler (cfg)",
    "clip_skip": "CLIP Set Last Layer (stop_at_clip_layer)",
    "emphasis": "CLIP Text Encode (text)",
    "seed": "KSampler (seed)",
    "noise": "the device on which ComfyUI runs",
    "size": "Empty Latent Image (width, height)",
    "precision": "the command line option --force-fp32 or --bf16-unet",
    "negative_zeros": "ConditioningZeroOut",
    "base_model": "Load Checkpoint (ckpt_name)",
    "vae": "Load VAE (vae_name)",
}
_IN_DIFFUSERS = {
    "prompt": "prompt",
    "trigger": "prompt",
    "negative_prompt": "negative_prompt",
    "lora": "pipe.load_lora_weights and pipe.set_adapters",
    "sampler": "pipe.scheduler",
    "schedule": "the configuration of pipe.scheduler (timestep_spacing, steps_offset)",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "clip_skip": "clip_skip",
    "emphasis": "prompt",
    "seed": "generator",
    "noise": "generator=torch.Generator('cpu')",
    "size": "width and height",
    "precision": "torch_dtype",
    "negative_zeros": "force_zeros_for_empty_prompt",
    "base_model": "from_pretrained",
    "vae": "vae",
}

_PIXELS_ROUNDED_DOWN = {"truncates": True}
_COMFYUI = Behaviour(
    "k-diffusion",
    {"whole_timesteps": True, "scales_start": True, **_PIXELS_ROUNDED_DOWN},
    devices=("cpu",),
    step_noises=("gpu", "cpu_next_seed", "cpu_same_seed", "continued"),
    text_rules=("comfyui", "original", "plain"),
    where=_IN_COMFYUI,
)
_A1111 = Behaviour(
    "k-diffusion",
    {"doubles_sizes": True, **_PIXELS_ROUNDED_DOWN},
    devices=("gpu", "cpu"),
    text_rules=_WEB_UI_RULES,
    zeroes_empty_negative=True,
    where=_IN_A1111,
)
_DIFFUSERS = Behaviour(
    "diffusers",
    {"rounds_noise": True, "skips_in_negative": False},
    zeroes_empty_negative=True,
    where=_IN_DIFFUSERS,
)
BEHAVIOURS: Mapping[Program, Behaviour] = {
    "A1111": _A1111,
    "Forge": Behaviour(
        "k-diffusion",
        {"whole_timesteps": True, **_PIXELS_ROUNDED_DOWN},
        devices=("gpu", "cpu"),
        text_rules=_WEB_UI_RULES,
        zeroes_empty_negative=True,
        where=_IN_A1111,
    ),
    "SD.Next": Behaviour(
        "diffusers",
        {"rounds_noise": True},
        devices=("gpu", "cpu"),
        text_rules=("original", "plain", "ignore"),
        where=_IN_A1111,
    ),
    "ComfyUI": _COMFYUI,
    "SwarmUI": _COMFYUI,
    "Fooocus": Behaviour(
        "k-diffusion",
        {"whole_timesteps": True, "scales_start": True, **_PIXELS_ROUNDED_DOWN},
        devices=("cpu",),
        step_noises=("gpu", "cpu_next_seed", "cpu_same_seed", "continued"),
        text_rules=("original", "no_norm", "comfyui"),
        where=_IN_COMFYUI,
    ),
    "InvokeAI": Behaviour("diffusers", {"rounds_noise": True}, where=_IN_DIFFUSERS),
    "NovelAI": Behaviour(
        "k-diffusion", _PIXELS_ROUNDED_DOWN, ("gpu", "cpu"), text_rules=("original",)
    ),
    "diffusers": _DIFFUSERS,
    "Fidelora": Behaviour("diffusers", {"rounds_noise": True}, ("cpu",), where=_IN_DIFFUSERS),
    "unknown": _DIFFUSERS,
}

# k-diffusion's samplers by lower-case name in A1111.
_A1111_SAMPLERS = {
    "euler a": "euler_ancestral",
    "euler": "euler",
    "lms": "lms",
    "heun": "heun",
    "dpm2": "dpm_2",
    "dpm2 a": "dpm_2_ancestral",
    "dpm++ 2m": "dpmpp_2m",
    "dpm++ 2s a": "dpmpp_2s_ancestral",
    "dpm++ sde": "dpmpp_sde",
    "dpm++ 2m sde": "dpmpp_2m_sde",
    "dpm++ 2m sde heun": "dpmpp_2m_sde_heun",
    "ddpm": "ddpm",
    "lcm": "lcm",
}
_A1111_SCHEDULES = {
    "uniform": "normal",
    "normal": "normal",
    "karras": "karras",
    "exponential": "exponential",
    "polyexponential": "exponential",  # equal with its default exponent, 1
    "sgm uniform": "sgm_uniform",
    "simple": "simple",
    "ddim": "ddim_uniform",
    "beta": "beta_of_sigmas",
}
_AUTOMATIC_SCHEDULES = {
    **dict.fromkeys(("dpm++ 2m", "dpm++ sde", "dpm++ 2s a", "dpm2", "dpm2 a"), "karras"),
    **dict.fromkeys(("dpm++ 2m sde", "dpm++ 2m sde heun"), "exponential"),
}
"""Schedules of A1111's samplers for `Automatic` since version 1.9; `uniform` for the others."""

USUAL_LAYERS: Mapping[str, int] = {"sdxl": 2}
"""Layer of the text encoders that a model uses, from the last one (1); 1 for other models."""

ALGORITHMS: Mapping[str, str] = {
    "euler": "euler",
    "k_euler": "euler",
    "euler_a": "euler_ancestral",
    "lms": "lms",
    "k_lms": "lms",
    "heun": "heun",
    "dpm_2": "dpm_2",
    "dpm_2_a": "dpm_2_ancestral",
    "dpmsolver++": "dpmpp_2m",
    "k_dpmsolver++": "dpmpp_2m",
    "ddpm": "ddpm",
    "ddim": "ddim",
    "pndm": "pndm",
    "lcm": "lcm",
}
"""Name of the algorithm in ComfyUI's spelling by name of a sampler of diffusers."""

# Samplers whose scheduler class in diffusers uses the spacing `linspace` if the configuration names
# no spacing, as in SD 1.5's folder.
_LINSPACE_BY_DEFAULT = frozenset(
    {
        "euler", "k_euler", "euler_a", "lms", "k_lms", "heun", "dpm_2", "dpm_2_a", "dpmsolver++",
        "k_dpmsolver++", "dpmsolver", "k_dpmsolver", "dpmsingle",
    }
)  # fmt: skip


def sampling_of(reading: Reading, spec: Family) -> Sampling | None:
    """Return the sampler and schedule of a reading; None if they cannot be simulated."""
    if not reading.sampler:
        return None
    program = reading.program
    if program in ("diffusers", "unknown", "Fidelora", "SD.Next", "InvokeAI"):
        return _of_diffusers(reading, spec)
    if program in ("A1111", "Forge"):
        return _of_web_ui(reading.sampler, reading.scheduler or "")
    return _of_comfyui(reading.sampler, reading.scheduler or "normal")


def _of_web_ui(name: str, schedule: str) -> Sampling | None:
    wanted, chosen = name.lower(), schedule.lower()
    if wanted == "ddim":
        return Sampling("k-diffusion", "euler", "ddim_timesteps")
    if wanted == "plms":
        return Sampling("diffusers", "pndm", "leading")
    for suffix in _A1111_SCHEDULES:  # names of versions before 1.9, such as "DPM++ 2M Karras"
        if wanted.endswith(f" {suffix}"):
            wanted, chosen = wanted.removesuffix(f" {suffix}"), suffix
            break
    if chosen == "automatic":
        chosen = _AUTOMATIC_SCHEDULES.get(wanted, "uniform")
    sampler, levels = _A1111_SAMPLERS.get(wanted), _A1111_SCHEDULES.get(chosen or "uniform")
    return Sampling("k-diffusion", sampler, levels) if sampler and levels else None


def _of_comfyui(name: str, schedule: str) -> Sampling | None:
    sampler = {"ddim": "euler"}.get(name, name)  # without an initial image, both are the same
    if sampler not in SAMPLERS or schedule not in SCHEDULES:
        return None
    return Sampling("k-diffusion", sampler, schedule)


def _of_diffusers(reading: Reading, spec: Family) -> Sampling | None:
    name = str(reading.sampler)
    if reading.program == "InvokeAI":
        name = INVOKEAI_SAMPLERS.get(name, "")
    elif name not in spec.samplers:
        try:
            name = sampler_of(name, reading.scheduler or "Automatic", spec).sampler
        except UnknownSamplerError:
            return None
    if name not in spec.samplers:
        return None
    if reading.program == "Fidelora":
        spacing = reading.scheduler or ""
        return Sampling("diffusers", name, "" if spacing == "default" else spacing)
    return Sampling("diffusers", name, usual_spacing(name, spec))


def clip_skip_layer(program: Program, model: str, clip_skip: int | None) -> int | None:
    """Return the layer of the text encoder, from the last one (1), for a program's clip skip.

    Args:
        clip_skip: as the program counts: from the model's usual layer in diffusers, elsewhere from
            the last one. None if it is not known.
    """
    if clip_skip is None or program not in ("diffusers", "unknown", "InvokeAI"):
        return clip_skip
    return clip_skip + USUAL_LAYERS.get(model, 1)


def usual_spacing(sampler: str, spec: Family) -> str:
    """Return the spacing of a diffusers sampler with the configuration of the base model."""
    return "linspace" if sampler in _LINSPACE_BY_DEFAULT and spec.id == "sd15" else "leading"


def usual_offset(library: Library, schedule: str) -> int | None:
    """Return `steps_offset` of the base models' own configurations; None for the trainer's."""
    return 1 if library == "diffusers" and schedule == "leading" else None


_A1111_NAMES = {
    "euler": "Euler", "euler_ancestral": "Euler a", "lms": "LMS", "heun": "Heun", "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE", "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "lcm": "LCM", "ddpm": "DDPM",
}  # fmt: skip
_A1111_SCHEDULE_NAMES = {
    "normal": "Uniform", "karras": "Karras", "exponential": "Exponential", "simple": "Simple",
    "sgm_uniform": "SGM Uniform", "ddim_uniform": "DDIM", "beta_of_sigmas": "Beta",
}  # fmt: skip


def a1111_names(sampling: Sampling) -> tuple[str, str]:
    """Return the names of a sampler and its schedule type in A1111."""
    if sampling.schedule == "ddim_timesteps":
        return "DDIM", "Automatic"
    if sampling.library == "diffusers":
        return {"pndm": "PLMS"}.get(sampling.sampler, sampling.sampler), "Automatic"
    name = _A1111_NAMES.get(sampling.sampler, sampling.sampler)
    return name, _A1111_SCHEDULE_NAMES.get(sampling.schedule, sampling.schedule)


def words_for(program: Program, sampling: Sampling) -> str:
    """Return the names of a sampler and schedule in a program."""
    if sampling.library == "diffusers":
        spacing = f" with timestep_spacing {sampling.schedule}" if sampling.schedule else ""
        return f"{sampling.sampler}{spacing}"
    if program in ("A1111", "Forge", "SD.Next"):
        if sampling.schedule == "ddim_timesteps":
            return "DDIM"
        name = _A1111_NAMES.get(sampling.sampler, sampling.sampler)
        return f"{name}, {_A1111_SCHEDULE_NAMES.get(sampling.schedule, sampling.schedule)}"
    return f"{sampling.sampler}, {sampling.schedule}"


def equivalents(program: Program, sampler: str) -> list[Sampling]:
    """Return samplings of a program that may come near to the trainer's sampler, likely ones first.

    Args:
        sampler: Fidelora's name of the trainer's sampler.
    """
    behaviour = BEHAVIOURS[program]
    if behaviour.library == "diffusers":
        return [Sampling("diffusers", sampler)]
    algorithm = ALGORITHMS.get(sampler, "")
    is_web_ui = program in ("A1111", "Forge")
    if algorithm == "ddim":
        schedules = ("ddim_uniform", "ddim_timesteps") if is_web_ui else ("ddim_uniform",)
        return [Sampling("k-diffusion", "euler", schedule) for schedule in schedules]
    if algorithm == "pndm" and is_web_ui:
        return [Sampling("diffusers", "pndm", "leading")]
    if sampler.startswith("k_"):
        return [Sampling("k-diffusion", algorithm, "karras")]
    # The trainer's timesteps, with `leading` and an offset of 1, are those of `ddim_uniform` if the
    # number of steps divides 1000. With these, DDPM is the ancestral version of Euler's method.
    if program == "A1111" and algorithm == "ddpm":
        algorithm = "euler_ancestral"
    algorithms = [algorithm] if algorithm in SAMPLERS else ["euler", "dpmpp_2m"]
    found = [
        Sampling("k-diffusion", one, schedule)
        for one in algorithms
        for schedule in ("ddim_uniform", "normal")
    ]
    # If the program draws other random numbers in the steps, a sampler that draws none is nearer.
    return list(dict.fromkeys([*found, Sampling("k-diffusion", "euler", "normal")]))
