"""Differences between two simulations, each with its cause and in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fidelora.explain.programs import ALGORITHMS, BEHAVIOURS, Sampling, words_for
from fidelora.explain.reading import Program, Reading
from fidelora.explain.simulation import Simulation

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "lora": ("strength", "text_strength"),
    "sampler": (
        "library", "sampler", "schedule", "steps_offset", "eta", "whole_timesteps", "scales_start",
    ),
    "steps": ("steps",),
    "guidance": ("guidance_scale", "guidance_rescale"),
    "clip_skip": ("clip_skip",),
    "emphasis": ("text_rule",),
    "negative_zeros": ("zero_negative",),
    "upsampling": ("doubles_sizes",),
    "seed": ("seed",),
    "noise": ("device", "step_noise", "seed_delta", "batch", "index"),
    "size": ("width", "height"),
    "precision": ("dtype", "rounds_noise"),
}  # fmt: skip
"""Fields of `Simulation` by cause. Rounding of pixel values is not listed, because it changes them
by less than a level."""

_READING_FIELDS: Mapping[str, str] = {
    "trigger": "prompt", "schedule": "scheduler", "lora": "loras", "guidance": "guidance_scale",
    "noise": "noise_source", "size": "width", "precision": "dtype", "negative_zeros": "",
    "upsampling": "",
}  # fmt: skip
"""Fields of `Reading` by cause, where the names differ; empty if no file contains the setting."""
_FIELDS_OF_STEP_NOISE = ("step_noise", "seed_delta")
"""Fields of the cause `noise` that are not compared if the trainer's sampler draws no random
numbers in its steps."""

CAUSES = (
    "prompt", "trigger", "negative_prompt", "lora", "sampler", "schedule", "steps", "guidance",
    "clip_skip", "emphasis", "negative_zeros", "upsampling", "seed", "noise", "size", "precision",
    "base_model", "vae",
)  # fmt: skip
"""Causes of differences. `trigger`: the prompts differ in the trigger word only. `schedule`: the
noise levels of the same sampler. `upsampling`: the UNet at sizes that are not multiples of 64.
`noise`: other random numbers from the same seed."""


@dataclass(frozen=True)
class Difference:
    """A setting in which a picture differs from the trainer's sample.

    Attributes:
        cause: one of `CAUSES`.
        theirs, ours: the setting in the other program and in training, in words.
        effect: by how many levels the nearest simulated image would differ more from the picture
            with the trainer's setting (mean difference); None if it was not measured.
        advice: what to set in the other program; empty if nothing can be set.
        is_in_file: True if the picture's file names the setting.
        is_always: True if the program always does this, whatever its user sets.
    """

    cause: str
    theirs: str
    ours: str
    effect: float | None
    advice: str
    is_in_file: bool = False
    is_always: bool = False


def reverted(simulation: Simulation, trainer: Simulation, cause: str) -> Simulation:
    """Return the simulation with the trainer's setting for one cause of `changed_causes`."""
    names = _FIELDS[{"trigger": "prompt", "schedule": "sampler"}.get(cause, cause)]
    return replace(simulation, **{name: getattr(trainer, name) for name in names})


def changed_causes(theirs: Simulation, trainer: Simulation, trigger_word: str) -> list[str]:
    """Return the causes in which two simulations differ."""
    causes = []
    for cause, names in _FIELDS.items():
        if cause == "noise" and not trainer.draws_in_steps:
            names = tuple(name for name in names if name not in _FIELDS_OF_STEP_NOISE)
        if all(getattr(theirs, name) == getattr(trainer, name) for name in names):
            continue
        if cause == "prompt" and _differ_in_trigger(theirs.prompt, trainer.prompt, trigger_word):
            cause = "trigger"
        if cause == "sampler" and algorithm(theirs) == algorithm(trainer):
            cause = "schedule"
        causes.append(cause)
    return causes


def algorithm(simulation: Simulation) -> str:
    """Return the name of the sampling algorithm in ComfyUI's spelling."""
    if simulation.library == "diffusers":
        return ALGORITHMS.get(simulation.sampler, simulation.sampler)
    # In terms of sigma, DDIM without noise is Euler's method.
    is_ddim = simulation.sampler == "euler" and simulation.schedule.startswith("ddim")
    return "ddim" if is_ddim else simulation.sampler


def described(simulation: Simulation, cause: str, program: Program) -> str:
    """Return a setting in words, with the program's names of samplers."""
    return _WORDS[cause](simulation, program)


def _differ_in_trigger(theirs: str, ours: str, trigger_word: str) -> bool:
    def without(prompt: str) -> str:
        for word in filter(None, ("[trigger]", "[name]", trigger_word)):
            prompt = prompt.replace(word, " ")
        return " ".join(prompt.replace(",", " ").split())

    return bool(trigger_word) and without(theirs) == without(ours)


def _lora(simulation: Simulation, program: Program) -> str:
    strength, text = simulation.strength, simulation.text_strength
    if strength == text:
        return f"strength {strength:g}" if strength else "not applied"
    if not text:
        return f"strength {strength:g}, in the denoiser only"
    if not strength:
        return f"strength {text:g}, in the text encoder only"
    return f"strength {strength:g} in the denoiser and {text:g} in the text encoder"


def _sampling(simulation: Simulation, program: Program) -> str:
    sampling = Sampling(simulation.library, simulation.sampler, simulation.schedule)
    words = words_for(program, sampling)
    if simulation.steps_offset is not None:
        words += f", steps_offset {simulation.steps_offset}"
    return words


def _guidance(simulation: Simulation, program: Program) -> str:
    rescale = simulation.guidance_rescale
    return f"{simulation.guidance_scale:g}" + (f", rescaled by {rescale:g}" if rescale else "")


def _emphasis(simulation: Simulation, program: Program) -> str:
    return {
        "plain": "brackets are text, and prompts end after 77 tokens",
        "original": "brackets weight words, as in A1111",
        "no_norm": "brackets weight words, as in A1111 with 'No norm'",
        "ignore": "brackets are removed, as in A1111 with 'Ignore'",
        "comfyui": "brackets weight words, as in ComfyUI",
    }[simulation.text_rule]


def _noise(simulation: Simulation, program: Program) -> str:
    words = "drawn on the GPU" if simulation.device == "gpu" else "drawn on the CPU"
    if simulation.draws_in_steps:
        words += {
            "continued": "",
            "gpu": ", in the steps on the GPU",
            "cpu_next_seed": ", in the steps with the next seed",
            "cpu_same_seed": ", in the steps the same numbers again",
        }[simulation.step_noise]
    if simulation.seed_delta:
        words += f", in the steps with the seed plus {simulation.seed_delta}"
    if simulation.index:
        words += f", picture {simulation.index + 1} of a batch with one seed"
    return words


_WORDS: Mapping[str, Callable[[Simulation, Program], str]] = {
    "prompt": lambda one, _: one.prompt,
    "trigger": lambda one, _: one.prompt,
    "negative_prompt": lambda one, _: one.negative_prompt or "empty",
    "lora": _lora,
    "sampler": _sampling,
    "schedule": _sampling,
    "steps": lambda one, _: str(one.steps),
    "guidance": _guidance,
    "clip_skip": lambda one, _: (
        f"layer {one.clip_skip} from the end" if one.clip_skip else "the model's usual layer"
    ),
    "emphasis": _emphasis,
    "negative_zeros": lambda one, _: "zeros" if one.zero_negative else "encoded like other prompts",
    "upsampling": lambda one, _: (
        "the UNet doubles the size, then resizes to the nearest pixels"
        if one.doubles_sizes
        else "the UNet resizes to the nearest pixels once"
    ),
    "seed": lambda one, _: str(one.seed),
    "noise": _noise,
    "size": lambda one, _: f"{one.width}x{one.height}",
    "precision": lambda one, _: one.dtype,
}


def advice_for(cause: str, trainer: Simulation, program: Program, lora: str) -> str:
    """Return what to set in a program to get the trainer's setting, in its words.

    Args:
        trainer: the trainer's settings.
        lora: name of the LoRA's file in the program.
    """
    where = BEHAVIOURS[program].where.get(cause, "")
    where = where.replace("{lora}", lora).replace("{strength}", f"{trainer.strength:g}")
    is_web_ui = program in ("A1111", "Forge", "SD.Next")
    is_comfyui = program in ("ComfyUI", "SwarmUI", "Fooocus")
    if not where:
        return ""
    if cause == "noise":
        if is_web_ui:
            return f"{where}: CPU."
        if is_comfyui:
            return (
                f"{program} draws the initial noise on the CPU from the seed of the first picture "
                "of a batch: set batch_size to 1. The numbers of the sampling steps depend on "
                f"{where} and cannot be those of training."
            )
        return f"{where}.manual_seed({trainer.seed})."
    if cause == "emphasis":
        if is_web_ui:
            return f"{where}: None."
        return rf"{where}: write \( and \) for brackets, and at most 75 tokens."
    if cause == "lora" and is_web_ui:
        return f"Write {where}."
    if cause == "clip_skip":
        usual = "-1" if is_comfyui else "1" if is_web_ui else "None"
        return f"{where}: {usual}."
    if cause == "upsampling":
        return f"{where}: multiples of 64, in training as well; other sizes always differ."
    if cause in ("sampler", "schedule"):
        return ""  # `explain` adds the nearest sampler of the program
    return f"{where}: {described(trainer, cause, program)}."


def is_in_file(cause: str, reading: Reading) -> bool:
    """True if a picture's file, or its user, names the setting of a cause."""
    name = _READING_FIELDS.get(cause, cause)
    return bool(name) and getattr(reading, name) is not None
