"""Recipes of the samples of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fidelora.adapters.tensor_names import noise_of_trainer, trainer_version
from fidelora.errors import TrainingRunError
from fidelora.families import Family, OlderTrainer, get_family
from fidelora.recipe import MAX_SEED, AdapterRef, Noise, Recipe, replace_trigger
from fidelora.training.flags import split_flags
from fidelora.training.history import NO_HISTORY, History, full_history, refs_of
from fidelora.training.model_block import find_training_adapter
from fidelora.training.run_files import checkpoint_metadata
from fidelora.training.run_folder import TrainingRun

RANDOM_SEED = -1
"""Seed of a sample for which the trainer draws a seed that it does not save."""


@dataclass(frozen=True)
class PlannedSample:
    """A sample of a training run with the recipe that replays it.

    Attributes:
        step: training step of the checkpoint; 0 for the base model.
        index: position in the sample block, from 0.
        trainer_image: the trainer's image file; None if it is missing or cannot be replayed,
            because the trainer drew its seed at random or its schedule is not defined.
        history: earlier rounds of samples that the recipe contains.
        has_random_seed: True if the trainer drew the seed at random; the recipe has seed 0.
        is_undefined: True if the sampler's schedule is not defined for the number of steps, so that
            the trainer's image is black; the recipe has the smallest number of steps.
        is_first_round: True for a sample of the `first_sample` block.
        is_full_model: True if the base model is the checkpoint of this step.
    """

    step: int
    index: int
    recipe: Recipe
    trainer_image: Path | None
    history: History = NO_HISTORY
    has_random_seed: bool = False
    is_undefined: bool = False
    is_first_round: bool = False
    is_full_model: bool = False

    @property
    def round(self) -> str:
        """Name of the round of samples: the step, or `first` for the `first_sample` block."""
        return "first" if self.is_first_round else str(self.step)


def plan_samples(
    run: TrainingRun,
    step: int,
    *,
    base_model: str | None = None,
    history: History | None = None,
) -> list[PlannedSample]:
    """Return the recipes of all samples of one step, in the order of the sample block.

    For the samples of the `first_sample` block, pass `run.first_round` and step 0.

    Args:
        step: 0 for the base model; any other step needs a checkpoint.
        base_model: replaces the base model in the configuration, for example if it is stored
            elsewhere. Checkpoints that are base models are not replaced.
        history: earlier rounds of samples; by default all rounds since step 0.

    Raises:
        TrainingRunError: the step has no checkpoint, a flag is invalid, the trainer fails with the
            size of a sample.
        RecipeError: a setting is invalid in a recipe (unknown sampler, size, ...).
    """
    if step != 0 and step not in run.checkpoints:
        available = ", ".join(map(str, sorted(run.checkpoints))) or "none"
        raise TrainingRunError(
            f"The training run {run.name} has no checkpoint of step {step}; "
            f"available steps: {available}."
        )

    settings = _resolved_settings(run)
    _check_sizes(run, settings)
    is_full_model = run.full_models and step != 0
    # If all samples have the same multiplier, the trainer merges the adapter. Otherwise it keeps
    # the adapter unmerged.
    multipliers = {values["network_multiplier"] for values in settings}
    has_network = run.has_network and not is_full_model
    unmerged = has_network and (run.stays_live or len(multipliers) > 1)
    merges = has_network and not unmerged and run.network_type != "dora"
    if step == 0 or not merges:
        history = NO_HISTORY
    elif history is None:
        history = full_history(run, step)
    earlier = refs_of(run, history, *multipliers) if history.rounds else ()
    adapters = () if is_full_model else run.adapters(step)
    family = get_family(run.model)
    metadata = _metadata_of(run, step, adapters)
    noise: Noise = noise_of_trainer(metadata) if "noise" in family.uses else "modern"
    sampling = family.trainer_sampling
    version = run.trainer_version or trainer_version(metadata)
    older = [one for one in sampling.older if version is not None and version < one.before]
    training = (find_training_adapter(run.training_adapter),) if run.training_adapter else ()
    shared = {
        "base_model": str(run.checkpoints[step]) if is_full_model else base_model or run.base_model,
        "vae": "" if is_full_model else run.vae,  # a full model contains its VAE
        "adapter_mode": "live" if unmerged else "merged",
        "history": earlier,
        "noise": noise,
        "training_adapters": training,
        "vae_tiling": run.low_vram and _decodes_in_tiles(family, version),
    }
    planned = []
    for index, values in enumerate(settings):
        values = _as_older_trainer(values, older)
        recipe = _recipe_of(run, family, values, adapters, shared)
        is_random, is_undefined = values["has_random_seed"], values["is_undefined"]
        image = None if is_random or is_undefined else run.images.get((step, index))
        planned.append(
            PlannedSample(
                step,
                index,
                recipe,
                image,
                history,
                is_random,
                is_undefined,
                run.is_first_round,
                is_full_model,
            )
        )
    return planned


def _metadata_of(run: TrainingRun, step: int, adapters: Sequence[AdapterRef]) -> Mapping[str, str]:
    """Return the metadata of a step's adapters or model; empty if the run has no such files.

    Step 0 has no checkpoint, but every file of the run contains the trainer's version, which
    determines the noise.
    """
    if adapters and adapters[0].file is not None:  # it is open already
        return adapters[0].file.header.metadata
    checkpoint = run.checkpoints.get(step) or next(iter(run.checkpoints.values()), None)
    return {} if checkpoint is None else checkpoint_metadata(checkpoint)


def _recipe_of(
    run: TrainingRun,
    family: Family,
    values: Mapping[str, Any],
    adapters: Sequence[AdapterRef],
    shared: Mapping[str, Any],
) -> Recipe:
    """Return the recipe of one sample.

    Args:
        values: settings of the sample.
        adapters: adapters of the step.
        shared: recipe fields that all samples of the step share.
    """
    return Recipe(
        prompt=values["prompt"],
        negative_prompt=values["neg"] if "negative_prompt" in family.uses else "",
        negative_prompt_2=values["neg_2"] if "negative_prompt_2" in family.uses else None,
        model=run.model,
        width=values["width"],
        height=values["height"],
        frames=values["num_frames"] if family.makes_videos else 1,
        fps=values["fps"] if family.makes_videos else 16,
        steps=values["sample_steps"],
        guidance_scale=values["guidance_scale"],
        guidance_rescale=(
            values["guidance_rescale"] if family.trainer_sampling.rescales_guidance else 0.0
        ),
        seed=values["seed"],
        sampler=values["sampler"] or _sampler_name(run),
        prediction=run.prediction,
        adapters=with_multiplier(adapters, values["network_multiplier"]),
        dtype=run.dtype,
        vae_dtype=run.vae_dtype,
        text_encoder_dtype=run.text_encoder_dtype,
        quantization=run.quantization,
        text_encoder_quantization=run.text_encoder_quantization,
        **shared,
    )


def _as_older_trainer(values: Mapping[str, Any], older: Sequence[OlderTrainer]) -> dict[str, Any]:
    """Return a sample's settings with the differences of older releases applied."""
    changed = {**values, "sampler": next((one.sampler for one in older if one.sampler), "")}
    for one in older:
        changed["guidance_scale"] += one.guidance_offset
        for side in ("width", "height") if one.divisor else ():
            changed[side] -= changed[side] % one.divisor
    return changed


def with_multiplier(adapters: Sequence[AdapterRef], multiplier: float) -> tuple[AdapterRef, ...]:
    """Return the adapters with this multiplier, which the trainer does not apply to embeddings."""
    return tuple(
        ref if ref.word is not None else replace(ref, multiplier=multiplier) for ref in adapters
    )


def random_samples(run: TrainingRun) -> list[int]:
    """Return the indices of the samples whose seed the trainer drew at random.

    Raises:
        TrainingRunError: a flag is invalid.
    """
    settings = _resolved_settings(run)
    return [index for index, values in enumerate(settings) if values["has_random_seed"]]


def undefined_samples(run: TrainingRun) -> list[int]:
    """Return the indices of the samples that are black because their schedule is not defined.

    Raises:
        TrainingRunError: a flag is invalid.
    """
    settings = _resolved_settings(run)
    return [index for index, values in enumerate(settings) if values["is_undefined"]]


def _sampler_name(run: TrainingRun) -> str:
    family = get_family(run.model)
    return family.default_sampler if family.trainer_sampling.ignores_sampler else run.sampler


def _decodes_in_tiles(family: Family, version: tuple[int, ...] | None) -> bool:
    """Return True if this release of the trainer (None: unknown) tiles with `low_vram`."""
    since = family.trainer_sampling.tiles_since
    return since is not None and (version is None or version >= since)


def _resolved_settings(run: TrainingRun) -> list[dict[str, Any]]:
    """Return each sample's settings with seed, trigger word and flags applied as in the trainer."""
    resolved = []
    seed = run.seed
    sampler = get_family(run.model).samplers.get(_sampler_name(run))
    min_steps = 1 if sampler is None else sampler.min_steps
    for index, item in enumerate(run.samples):
        if run.walk_seed:
            seed = run.seed + index
        if item.seed is not None:
            seed = item.seed  # without walk_seed, also the seed of the following items
        prompt, flags = split_flags(replace_trigger(item.prompt, run.trigger_text))
        values = {**vars(item), "seed": seed} | flags | {"prompt": prompt}
        # The trainer replaces a random seed (-1) before it parses the flags, so the flag --seed -1
        # sets the fixed seed -1.
        values["has_random_seed"] = "seed" not in flags and seed == RANDOM_SEED
        values["seed"] = 0 if values["has_random_seed"] else _usable_seed(values["seed"])
        values["is_undefined"] = 1 <= values["sample_steps"] < min_steps
        if values["is_undefined"]:
            values["sample_steps"] = min_steps
        # The flag --n sets the negative prompt of the first text encoder only, and no flag sets
        # that of the second one, unless the trainer encodes all prompts once before training.
        values["neg_2"] = None if run.encodes_prompts_once else item.neg
        for side in ("width", "height"):
            values[side] = max(64, values[side] - values[side] % 8)
        resolved.append(values)
    if run.is_first_round and run.encoded_block is not None:
        for values, encoded in zip(resolved, _resolved_settings(run.encoded_block), strict=False):
            values.update({key: encoded[key] for key in ("prompt", "neg", "neg_2")})
    return resolved


def _check_sizes(run: TrainingRun, settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise `TrainingRunError` for a size with which the trainer fails."""
    family = get_family(run.model)
    multiple = family.trainer_sampling.size_multiple
    for index, values in enumerate(settings):
        width, height = values["width"], values["height"]
        if width % multiple or height % multiple:
            raise TrainingRunError(
                f"Sample {index} of the training run {run.name} has the size {width}x{height}. "
                f"The trainer fails with such samples of {family.title}: their sides must be "
                f"multiples of {multiple}. Correct the size in the configuration."
            )


def _usable_seed(seed: int) -> int:
    """Return a seed that a recipe accepts and that gives the same numbers.

    torch accepts -2**63 to 2**64 - 1, but its generator on the CPU uses only the lowest 32 bits.
    """
    is_recipe_seed = 0 <= seed <= MAX_SEED
    return seed % 2**32 if not is_recipe_seed and -(2**63) <= seed < 2**64 else seed
