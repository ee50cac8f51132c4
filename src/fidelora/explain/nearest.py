"""Settings with which another program comes nearest to a sample of the trainer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fidelora.errors import RecipeError
from fidelora.explain.differences import Difference
from fidelora.explain.picture import Picture
from fidelora.explain.programs import BEHAVIOURS, Sampling, equivalents, words_for
from fidelora.explain.reading import Program
from fidelora.explain.search import Search
from fidelora.explain.simulation import FAMILIES, Pixels, Simulation, Simulator
from fidelora.families import get_family
from fidelora.images.a1111_prompt import describe_syntax
from fidelora.training.plan import PlannedSample
from fidelora.training.verify import read_trainer_image

Target = Literal["A1111", "ComfyUI", "diffusers"]
"""Programs for which settings can be written."""

_A1111_SPECIAL = re.compile(r"[\\()\[\]]")
_COMFYUI_SPECIAL = re.compile(r"[()]")
_COMBINING = re.compile(r"\b(AND|BREAK)\b")
_AS_NEAR = 0.1  # levels, which are not visible; the order of such samplings changes by sample
_NO_LIMIT = 10**12  # evaluations of the denoiser


@dataclass(frozen=True)
class NearestThere:
    """Settings with which the program comes nearest to the trainer's sample.

    Attributes:
        sampling: names of sampler and schedule in the program.
        distance: mean difference from the trainer's sample in levels, if all other settings are
            those of training.
        as_near: names of all samplings whose distance is at most `_AS_NEAR` larger.
    """

    sampling: str
    distance: float
    as_near: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class NearestPicture:
    """The nearest picture that a program can make of one sample.

    Attributes:
        program: the program.
        plan: the sample.
        simulation: all settings, with the prompts as they are written in the program.
        there: names of the sampler, and the distance from the trainer's sample.
        pixels: the simulated picture, uint8 RGB [height, width, 3].
        notes: sentences about settings that the written file cannot contain.
    """

    program: Target
    plan: PlannedSample
    simulation: Simulation
    there: NearestThere
    pixels: Pixels
    notes: tuple[str, ...]


def nearest_sampling(
    program: Program, sampler: str, base: Simulation, trainer: Pixels, simulator: Simulator
) -> tuple[Simulation, NearestThere] | None:
    """Return the program's sampling that comes nearest to the trainer's sample.

    Args:
        sampler: Fidelora's name of the trainer's sampler.
        base: settings of the program, whose sampler and schedule are replaced.
        trainer: pixels of the sample, uint8 RGB [height, width, 3].

    Returns:
        the settings and their names; None if no similar sampler is simulated.
    """
    search = Search(simulator, Picture("sample", trainer), _NO_LIMIT)
    tried = []
    for one in equivalents(program, sampler):
        settings = _with_sampling(base, one)
        if not settings.draws_in_steps:
            settings = replace(settings, step_noise="continued", seed_delta=0)
        tried.append((search.distance(settings), settings, one))
    tried = [entry for entry in tried if math.isfinite(entry[0])]
    if not tried:
        return None
    distance, settings, sampling = min(tried, key=lambda entry: entry[0])
    as_near = tuple(words_for(program, one) for d, _, one in tried if d <= distance + _AS_NEAR)
    there = NearestThere(words_for(program, sampling), round(distance, 4), as_near)
    return settings, there


def with_sampler_advice(
    difference: Difference, there: NearestThere | None, program: Program
) -> Difference:
    """Return a difference of the sampler or schedule with the nearest sampler as its advice.

    The schedule of the nearest sampler, or of one that is as near, is marked as `is_always`: the
    program has no visibly nearer one. Other differences are returned unchanged.
    """
    if there is None or difference.cause not in ("sampler", "schedule"):
        return difference
    nearest = (there.sampling, *there.as_near)
    is_nearest = difference.cause == "schedule" and difference.theirs in nearest
    advice = (
        f"The nearest sampler of {program} is {there.sampling}: with all other settings as in "
        f"training, the mean difference from the sample is {there.distance:.2f} levels."
    )
    return replace(difference, advice=advice, is_always=is_nearest)


def nearest_picture(plan: PlannedSample, program: Target, simulator: Simulator) -> NearestPicture:
    """Find the settings with which a program comes nearest to a sample, and measure the distance.

    Args:
        plan: a sample whose file exists.
        simulator: made with the recipe of `plan`.

    Raises:
        RecipeError: the model family, or an adapter of this kind, is not supported.
        FideloraError: a file cannot be used.
    """
    recipe = plan.recipe
    check_is_supported(plan)
    assert plan.trainer_image is not None
    trainer = read_trainer_image(plan.trainer_image)[0]
    base, notes = _settings_there(plan, program, simulator)
    found = nearest_sampling(program, recipe.sampler, base, trainer, simulator)
    if found is None:
        raise RecipeError(
            f"No sampler of {program} that is similar to {recipe.sampler} is simulated.",
            field="sampler",
        )
    simulation, there = found
    pixels = simulator.image(simulation)
    return NearestPicture(program, plan, simulation, there, pixels, tuple(notes))


def check_is_supported(plan: PlannedSample) -> None:
    """Raise if the settings of a sample cannot be written for other programs.

    Raises:
        RecipeError: the model family, or an adapter of this kind, is not supported.
    """
    recipe = plan.recipe
    if recipe.model not in FAMILIES:
        titles = " and ".join(get_family(one).title for one in FAMILIES)
        raise RecipeError(
            f"Settings of {get_family(recipe.model).title} cannot be written for other programs; "
            f"only those of {titles} can.",
            field="model",
        )
    if any(ref.word is not None for ref in recipe.adapters) or len(recipe.adapters) > 1:
        raise RecipeError(
            "Settings of embeddings cannot be written for other programs; only those of LoRAs can.",
            field="adapters",
        )


def written_prompt(program: Target, prompt: str) -> str:
    """Return a prompt in which the program treats brackets as text, as training does.

    A1111's words AND and BREAK are written in lower case, which CLIP encodes in the same way.
    """
    if program == "A1111":
        escaped = _A1111_SPECIAL.sub(lambda match: "\\" + match[0], prompt)
        return _COMBINING.sub(lambda match: match[0].lower(), escaped)
    if program == "ComfyUI":
        return _COMFYUI_SPECIAL.sub(lambda match: "\\" + match[0], prompt)
    return prompt


def _settings_there(
    plan: PlannedSample, program: Target, simulator: Simulator
) -> tuple[Simulation, list[str]]:
    """Return the program's settings with the trainer's values, and notes on what differs."""
    recipe, behaviour = plan.recipe, BEHAVIOURS[program]
    trainer = Simulation.of_recipe(recipe)
    values: dict[str, object] = {**behaviour.fields, "device": "cpu"}
    notes: list[str] = []
    if program == "diffusers":
        return replace(trainer, **values), notes  # type: ignore[arg-type]
    values |= {
        "step_noise": behaviour.step_noises[0],
        "text_rule": "original" if program == "A1111" else "comfyui",
        "dtype": "float32",
        "rounds_noise": False,
        "guidance_rescale": 0.0,
        "eta": None,
    }
    for name in ("prompt", "negative_prompt"):
        text = getattr(trainer, name)
        fitting = simulator.fitting_prompt(text)
        if fitting != text:
            notes.append(
                f"The {name.replace('_', ' ')} is shortened to the words that fit in 75 tokens, "
                f"because training cuts off the rest and {program} does not."
            )
        values[name] = written_prompt(program, fitting)
    if program == "A1111":
        notes += _notes_on_a1111(plan, values)
    if recipe.guidance_rescale:
        notes.append(
            f"The trainer rescales the guidance by {recipe.guidance_rescale:g}, which {program} "
            "does not."
        )
    options = {"A1111": "--no-half --no-half-vae", "ComfyUI": "--force-fp32"}[program]
    notes.append(
        f"The distance is that of float32; start {program} with {options}, or expect up to one "
        "level more."
    )
    return replace(trainer, **values), notes  # type: ignore[arg-type]


def _notes_on_a1111(plan: PlannedSample, values: Mapping[str, object]) -> list[str]:
    recipe = plan.recipe
    notes = [
        "Set Settings > Stable Diffusion > Random number generator source to CPU, if pasting the "
        "text does not."
    ]
    if describe_syntax(str(values["prompt"])):
        notes.append("The prompt contains syntax of A1111; write it in other words.")
    if recipe.model == "sdxl" and not recipe.negative_prompt:
        notes.append(
            "Write a space into the negative prompt: A1111 replaces an empty one by zeros."
        )
    if recipe.prediction == "v_prediction":
        notes.append(
            "The base model predicts v; put a .yaml file with parameterization: v beside it."
        )
    return notes


def _with_sampling(settings: Simulation, sampling: Sampling) -> Simulation:
    return replace(
        settings,
        library=sampling.library,
        sampler=sampling.sampler,
        schedule=sampling.schedule,
        steps_offset=None,
    )
