"""Recipes of the samples of a training run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fidelora.adapters.tensor_names import noise_of_adapter, noise_of_file
from fidelora.errors import JobFolderError
from fidelora.families import get_family
from fidelora.recipe import Noise, Recipe, replace_trigger
from fidelora.training.flags import split_flags
from fidelora.training.run_folder import TrainingRun


@dataclass(frozen=True)
class PlannedSample:
    """A sample of a training run with the recipe that replays it.

    Attributes:
        step: training step of the checkpoint; 0 for the base model.
        index: position in the sample block, from 0.
        trainer_image: the trainer's image file; None if it is missing.
    """

    step: int
    index: int
    recipe: Recipe
    trainer_image: Path | None


def plan_samples(
    run: TrainingRun, step: int, *, base_model: str | None = None
) -> list[PlannedSample]:
    """Return the recipes of all samples of one step, in the order of the sample block.

    Args:
        step: 0 for the base model; any other step needs a checkpoint.
        base_model: replaces the base model in the configuration, for example if it is stored
            elsewhere.

    Raises:
        JobFolderError: there is no checkpoint of this step, or a flag is invalid.
        RecipeError: a setting is invalid in a recipe (unknown sampler, size, ...).
    """
    if step != 0 and step not in run.checkpoints:
        available = ", ".join(map(str, sorted(run.checkpoints))) or "none"
        raise JobFolderError(
            f"The training run {run.name} has no checkpoint of step {step}; "
            f"available steps: {available}."
        )

    settings = _resolved_settings(run)
    # If all samples have the same multiplier, the trainer merges the adapter. Otherwise it keeps
    # the adapter unmerged.
    unmerged = len({values["network_multiplier"] for values in settings}) > 1
    adapter = None if step == 0 else run.adapter(step)
    # Step 0 has no checkpoint, but any file of the run contains the trainer's version, which
    # determines the noise.
    checkpoint = run.checkpoints.get(step) or next(iter(run.checkpoints.values()), None)
    family = get_family(run.model)
    noise: Noise = "modern"
    if "noise" in family.uses and adapter is not None:
        noise = noise_of_adapter(adapter)
    elif "noise" in family.uses and checkpoint is not None:
        noise = noise_of_file(checkpoint)
    planned = []
    for index, values in enumerate(settings):
        multiplier = values["network_multiplier"]
        adapters = (replace(adapter, multiplier=multiplier),) if adapter else ()
        recipe = Recipe(
            prompt=values["prompt"],
            negative_prompt=values["neg"],
            # The flag --n sets the negative prompt of the first text encoder only; no flag sets
            # that of the second one.
            negative_prompt_2=(
                run.samples[index].neg if "negative_prompt_2" in family.uses else None
            ),
            model=run.model,
            base_model=base_model or run.base_model,
            vae=run.vae,
            width=values["width"],
            height=values["height"],
            steps=values["sample_steps"],
            guidance_scale=values["guidance_scale"],
            guidance_rescale=(
                values["guidance_rescale"] if family.samples.rescales_guidance else 0.0
            ),
            seed=values["seed"],
            sampler=family.default_sampler if family.samples.ignores_sampler else run.sampler,
            prediction=run.prediction,
            adapters=adapters,
            adapter_mode="live" if unmerged else "merged",
            noise=noise,
            dtype=run.dtype,
            vae_dtype=run.vae_dtype,
            text_encoder_dtype=run.text_encoder_dtype,
        )
        planned.append(PlannedSample(step, index, recipe, run.images.get((step, index))))
    return planned


def _resolved_settings(run: TrainingRun) -> list[dict[str, Any]]:
    """Return each sample's settings with seed, trigger word and flags applied as in the trainer."""
    resolved = []
    seed = run.seed
    for index, item in enumerate(run.samples):
        if run.walk_seed:
            seed = run.seed + index
        if item.seed is not None:
            seed = item.seed  # without walk_seed, also the seed of the following items
        prompt, flags = split_flags(replace_trigger(item.prompt, run.trigger_word))
        values = {**vars(item), "seed": seed} | flags | {"prompt": prompt}
        for side in ("width", "height"):
            values[side] = max(64, values[side] - values[side] % 8)
        resolved.append(values)
    return resolved
