"""From a training job to the recipes of its previews."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fidelora.adapters.tensor_names import noise_of_file
from fidelora.errors import JobFolderError
from fidelora.families import get_family
from fidelora.recipe import Recipe, replace_trigger
from fidelora.training.flags import split_flags
from fidelora.training.run_folder import TrainingRun


@dataclass(frozen=True)
class PlannedSample:
    """One preview: where it stands in the job, what makes it again, and the trainer's own image if it is there."""

    step: int
    index: int
    recipe: Recipe
    preview: Path | None


def plan_samples(
    job: TrainingRun, step: int, *, base_model: str | None = None
) -> list[PlannedSample]:
    """The recipes of all samples of one step, in the order of the sample block.

    Args:
        step: 0 for the base model; else there has to be a checkpoint of this step.
        base_model: in place of the one that the job names, when that is somewhere else here.

    Raises:
        JobFolderError: no checkpoint of this step, or a flag that cannot be read.
        RecipeError: a setting that no recipe can have (unknown sampler, size, ...).
    """
    if step != 0 and step not in job.checkpoints:
        there_are = ", ".join(str(known) for known in sorted(job.checkpoints)) or "none"
        raise JobFolderError(
            f"The job {job.name} has no checkpoint of step {step}; there are: {there_are}."
        )

    settings = _resolved_settings(job)
    # One multiplier for all samples: the trainer merges the adapter for the whole run. Several: it runs beside the model.
    live = len({values["network_multiplier"] for values in settings}) > 1
    adapter = None if step == 0 else job.adapter(step)
    # Step 0 has no file of its own, but every file of the job tells which trainer, and so which noise, made it.
    checkpoint = job.checkpoints.get(step) or next(iter(job.checkpoints.values()), None)
    noise = noise_of_file(checkpoint) if checkpoint else "modern"
    spec = get_family(job.model)
    planned = []
    for index, values in enumerate(settings):
        multiplier = values["network_multiplier"]
        adapters = (replace(adapter, multiplier=multiplier),) if adapter else ()
        recipe = Recipe(
            prompt=values["prompt"],
            negative_prompt=values["neg"],
            # The flag --n changes what the first text encoder gets, and nothing changes what the second one does.
            negative_prompt_2=job.samples[index].neg if "negative_prompt_2" in spec.uses else None,
            model=job.model,
            base_model=base_model or job.base_model,
            vae=job.vae,
            width=values["width"],
            height=values["height"],
            steps=values["sample_steps"],
            guidance_scale=values["guidance_scale"],
            guidance_rescale=values["guidance_rescale"] if spec.samples.rescales_guidance else 0.0,
            seed=values["seed"],
            sampler=job.sampler,
            prediction=job.prediction,
            adapters=adapters,
            adapter_mode="live" if live else "merged",
            noise=noise,
            dtype=job.dtype,
            vae_dtype=job.vae_dtype,
            text_encoder_dtype=job.text_encoder_dtype,
        )
        planned.append(PlannedSample(step, index, recipe, job.images.get((step, index))))
    return planned


def _resolved_settings(job: TrainingRun) -> list[dict[str, Any]]:
    """Each sample's settings after seeds, trigger and flags are settled, in the trainer's order."""
    resolved = []
    seed = job.seed
    for index, item in enumerate(job.samples):
        if job.walk_seed:
            seed = job.seed + index
        if item.seed is not None:
            seed = item.seed  # without walk_seed it stays for the items after this one
        prompt, flags = split_flags(replace_trigger(item.prompt, job.trigger_word))
        values = {**vars(item), "seed": seed} | flags | {"prompt": prompt}
        for side in ("width", "height"):
            values[side] = max(64, values[side] - values[side] % 8)
        resolved.append(values)
    return resolved
