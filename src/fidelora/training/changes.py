"""Small changes of a sample's settings, which the tests of `judge.py` should detect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fidelora.errors import RecipeError
from fidelora.families import get_family
from fidelora.recipe import MAX_MULTIPLIER, Recipe
from fidelora.training.flags import TRIGGER_OFF, split_flags, where_to_set
from fidelora.training.plan import PlannedSample, with_multiplier
from fidelora.training.run_folder import TrainingRun


@dataclass(frozen=True)
class Change:
    """A change of one setting, which the tests look for.

    Attributes:
        cause: the setting, one of `doctor.CAUSES`.
        size: the change in the unit of the setting; None for a change without a size.
        recipe: the recipe with the change.
        fix: how to correct the setting if the samples were made with this change; `{value}` stands
            for the estimated value.
        value: the setting's value in the configuration, for changes with a size.
        scheduler_options: see `Engine.generate`.
        opposite: the recipe with the opposite change; None without a size, and where the setting
            has no value on the other side.
    """

    cause: str
    size: float | None
    recipe: Recipe
    fix: str
    value: float = 0.0
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    opposite: Recipe | None = None


def changed_settings(run: TrainingRun, plan: PlannedSample) -> Iterator[Change]:
    """Yield small changes of the settings, which the tests should detect."""
    recipe, item = plan.recipe, run.samples[plan.index]
    family = get_family(recipe.model)
    if recipe.guidance_scale > 1:
        scale = recipe.guidance_scale
        where = where_to_set("--guidance {value}", "--cfg {value}")
        fix = (
            f"The guidance scale was about {{value}}, not {scale:g}: correct guidance_scale{where}"
        )
        changed = replace(recipe, guidance_scale=scale + 0.5)
        opposite = replace(recipe, guidance_scale=scale - 0.5) if scale > 1.5 else None
        yield Change("guidance", 0.5, changed, fix, scale, opposite=opposite)
    where = where_to_set("--steps", "--steps")
    fix = f"The sample had about {{value}} steps, not {recipe.steps}: correct sample_steps{where}"
    sizes = [more for more in (1, -1) if _is_valid_step_count(recipe, recipe.steps + more)]
    if sizes:
        changed, *others = (replace(recipe, steps=recipe.steps + more) for more in sizes)
        opposite = others[0] if others else None
        yield Change("steps", sizes[0], changed, fix, recipe.steps, opposite=opposite)
    if recipe.dtype != "float32":
        float32 = replace(
            recipe, dtype="float32", vae_dtype="float32", text_encoder_dtype="float32"
        )
        fix = (
            "The samples were made in float32: use --dtype float32 in fidelora verify and generate."
        )
        yield Change("dtype", None, float32, fix)
    if recipe.adapters and recipe.adapters[0].word is None:  # an embedding has no multiplier
        multiplier = recipe.adapters[0].multiplier
        size = 0.1 if multiplier + 0.1 <= MAX_MULTIPLIER else -0.1
        where = where_to_set("--lora FILE:{value}", "--m {value}")
        fix = (
            f"The multiplier was about {{value}}, not {multiplier:g}: correct network_multiplier"
            f"{where}"
        )
        changed, opposite = (
            replace(recipe, adapters=with_multiplier(recipe.adapters, value))
            for value in (multiplier + size, max(multiplier - size, -MAX_MULTIPLIER))
        )
        yield Change("multiplier", size, changed, fix, multiplier, opposite=opposite)
    for wrong in family.trainer_sampling.wrong_schedules:
        yield Change(wrong.cause, None, recipe, wrong.fix, scheduler_options=dict(wrong.options))
    if recipe.negative_prompt:
        fix = (
            "The sample was made without its negative prompt: remove neg. In fidelora generate: "
            "leave out `--negative`."
        )
        changed = replace(recipe, negative_prompt="", negative_prompt_2=None)
        yield Change("negative_prompt", None, changed, fix)
    if run.trigger_text and "[trigger]" in item.prompt:
        fix = (
            "[trigger] in the prompt was not replaced: remove trigger_word"
            f"{where_to_set(TRIGGER_OFF)}"
        )
        # Parse the original prompt again: in the recipe, the trigger may also occur in other words.
        prompt = split_flags(item.prompt)[0]
        yield Change("trigger", None, replace(recipe, prompt=prompt), fix)


def _is_valid_step_count(recipe: Recipe, steps: int) -> bool:
    try:  # some samplers have a maximum number of steps
        replace(recipe, steps=steps)
    except RecipeError:
        return False
    return True


def grouped_by_setting(
    changes: Sequence[Sequence[Change]], max_samples: int, max_values: int
) -> list[dict[int, Change]]:
    """Group the changes by cause and by value of the setting.

    Samples with the same value probably take it from the same place, such as the sample block, and
    a mistake there changes exactly these samples.

    Args:
        changes: the changes of each sample. Not every sample has every change: some have no
            guidance, and some no trigger word.
        max_samples: use the first samples of a group only, at most this many.
        max_values: use the largest groups of each cause only, at most this many.

    Returns:
        groups, each with the changes by index of the sample.
    """
    by_cause: dict[str, dict[float, dict[int, Change]]] = {}
    for index, sample_changes in enumerate(changes):
        for change in sample_changes:
            by_value = by_cause.setdefault(change.cause, {})
            by_value.setdefault(change.value, {})[index] = change
    groups = []
    for by_value in by_cause.values():
        largest = sorted(by_value.values(), key=len, reverse=True)[:max_values]
        groups += [dict(list(group.items())[:max_samples]) for group in largest]
    return groups
