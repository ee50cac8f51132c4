"""Wrong settings that can explain why a sample differs, one at a time."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from fidelora.errors import RecipeError
from fidelora.families import get_family
from fidelora.loras.describe import describe_adapter
from fidelora.recipe import MAX_MULTIPLIER, Recipe, replace_trigger
from fidelora.training.flags import TRIGGER_OFF, split_flags, where_to_set
from fidelora.training.plan import with_multiplier
from fidelora.training.run_folder import TrainingRun
from fidelora.training.sample_block import SampleItem

# Values to try, the most common ones first.
_GUIDANCE_SCALES = [
    7, 6, 7.5, 5, 4, 8, 1, 3.5, 4.5, 5.5, 6.5, 3, 9, 10, 2, 12, 2.5, 15, 1.5, 8.5, 20,
]  # fmt: skip
_GUIDANCE_RESCALES = [0.0, 0.7, 0.5, 0.75, 1.0]
_STEPS = [
    20, 25, 30, 28, 50, 40, 15, 10, 12, 8, 4, 35, 60, 9, 11, 6, 7, 5, 16, 18, 22, 24, 3, 2, 1,
]  # fmt: skip
_MULTIPLIERS = [
    1, 0.5, 0.8, 0.75, 0.7, 0.6, 0.9, 0.25, 1.2, 1.5, 2, -1, 0.4, 0.3, 0.2, -0.5, -0.75, 1.25,
]  # fmt: skip
_COMMON_SAMPLERS = ["ddpm", "ddim", "euler_a", "euler", "dpmsolver++", "k_dpmsolver++"]
_NEARBY_SEEDS = 5  # below and above the recipe's seed


@dataclass(frozen=True)
class Suspect:
    """A recipe that differs from the planned one in one setting.

    Attributes:
        cause: one of `doctor.CAUSES`.
        recipe: the changed recipe.
        fix: what was different and how to correct it.
        scheduler_options: options that override the scheduler's configuration.
    """

    cause: str
    recipe: Recipe
    fix: str
    scheduler_options: dict[str, Any] = field(default_factory=dict)


class UniqueSuspects:
    """Filter that drops suspects with the planned recipe or with a recipe yielded before.

    Suspects with `scheduler_options` are never dropped.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._seen = {recipe}

    def __call__(self, *groups: Iterable[Suspect]) -> Iterator[Suspect]:
        """Yield the new suspects of all groups."""
        for suspect in chain(*groups):
            if suspect.scheduler_options or suspect.recipe not in self._seen:
                self._seen.add(suspect.recipe)
                yield suspect


def wrong_schedules(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the recipe with each schedule that other programs use by mistake."""
    for wrong in get_family(recipe.model).trainer_sampling.wrong_schedules:
        yield Suspect(wrong.cause, recipe, wrong.fix, dict(wrong.options))


def missing_adapters(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the recipe without adapters."""
    if not recipe.adapters:
        return
    fix = (
        "The sample was made without the adapter. Load the adapter in the program that made the "
        "sample."
    )
    yield Suspect("adapter_not_applied", replace(recipe, adapters=()), fix)


def multipliers(recipe: Recipe, values: Sequence[float] = _MULTIPLIERS) -> Iterator[Suspect]:
    """Yield the recipe with other multipliers."""
    if any(adapter.word is None for adapter in recipe.adapters):  # others have no multiplier
        for value in values:
            changed = replace(recipe, adapters=with_multiplier(recipe.adapters, value))
            fix = (
                f"The multiplier was {value:g}: set network_multiplier to {value:g}"
                f"{where_to_set(f'--lora FILE:{value:g}', f'--m {value:g}')}"
            )
            yield Suspect("multiplier", changed, fix)


def triggers(run: TrainingRun, recipe: Recipe, item: SampleItem) -> Iterator[Suspect]:
    """Yield the recipe with the trigger word replaced, moved or removed."""
    path = next((ref.path for ref in recipe.adapters if ref.path), None)
    if path is None and not run.full_models:
        path = next(iter(run.checkpoints.values()), None)
    file_trigger = describe_adapter(path).trigger if path else ""
    if file_trigger:
        where = where_to_set(f"--trigger {shlex.quote(file_trigger)}")
        yield _with_prompt(
            recipe,
            _without_flags(replace_trigger(item.prompt, file_trigger)),
            f"The trigger word was {file_trigger!r}, which is stored in the adapter's file: "
            f"set trigger_word to {file_trigger!r}{where}",
        )
    yield _with_prompt(
        recipe,
        _without_flags(item.prompt),
        f"[trigger] in the prompt was not replaced: remove trigger_word{where_to_set(TRIGGER_OFF)}",
    )
    for word in dict.fromkeys(filter(None, (run.trigger_word, file_trigger))):
        for text in (f"{word} {recipe.prompt}", f"{word}, {recipe.prompt}"):
            yield _with_prompt(
                recipe,
                text,
                f"The trigger word {word!r} was put before the prompt: write [trigger] at the "
                "right position of the prompt.",
            )
    yield _with_prompt(
        recipe,
        _without_flags(item.prompt.replace("[trigger]", "")),
        "The trigger word was left out: remove [trigger] from the prompt.",
    )


def seeds(run: TrainingRun, recipe: Recipe, index: int) -> Iterator[Suspect]:
    """Yield the recipe with other seeds: those of other seed rules, common ones, nearby ones."""
    walked, fixed = run.seed + index, run.seed
    fixes = {
        walked: f"The seed was {walked}, the run's seed plus the sample's index: "
        f"set walk_seed to true{where_to_set(f'--seed {walked}')}",
        fixed: f"The seed was {fixed}, as for the first sample: set walk_seed to false"
        f"{where_to_set(f'--seed {fixed}')}",
    }
    earlier = [item.seed for item in run.samples[:index] if item.seed is not None]
    if earlier:
        fixes[earlier[-1]] = (
            f"The seed was {earlier[-1]}, as for an earlier sample: set walk_seed to false"
            f"{where_to_set(f'--seed {earlier[-1]}')}"
        )
    nearby = [recipe.seed + step * sign for step in range(1, _NEARBY_SEEDS + 1) for sign in (1, -1)]
    common = [42 + index, 42, index, 0, 1, *nearby]
    for seed in dict.fromkeys([*fixes, *common]):
        if seed >= 0:
            where = where_to_set(f"--seed {seed}", f"--seed {seed}")
            fix = fixes.get(seed, f"The seed was {seed}: set seed to {seed}{where}")
            yield Suspect("seed", replace(recipe, seed=seed), fix)


def precisions(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the recipe with other dtypes, and with the other `noise` if the family uses it."""
    uses_noise = "noise" in get_family(recipe.model).uses
    if recipe.dtype != "float32" and uses_noise:
        other = "legacy" if recipe.noise == "modern" else "modern"
        fix = (
            f"The noise was drawn by a different version of torch: use --noise {other} in "
            "fidelora verify and generate."
        )
        yield Suspect("noise", replace(recipe, noise=other), fix)  # type: ignore[arg-type]
    for dtype in ("float32", "bfloat16", "float16"):
        both = dtype != "float32" and uses_noise
        for noise in ("modern", "legacy") if both else (recipe.noise,):
            changes: dict[str, Any] = {
                "dtype": dtype,
                "vae_dtype": dtype,
                "text_encoder_dtype": dtype,
                "noise": noise,
            }
            fix = (
                f"The samples were made in {dtype}: use --dtype {dtype} in fidelora verify and "
                "generate."
            )
            yield Suspect("dtype", replace(recipe, **changes), fix)


def variants(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the recipe with other variants of the base model's files."""
    for variant in ("fp16", ""):
        files = f"the {variant} files" if variant else "the files without a variant"
        fix = (
            f"The base model was loaded from {files}: use --variant {variant or repr('')} in "
            "fidelora verify and generate."
        )
        yield Suspect("base_variant", replace(recipe, variant=variant), fix)


def samplers(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the recipe with the trainer's other samplers of its family."""
    known = get_family(recipe.model).samplers
    names = [*_COMMON_SAMPLERS, *(name for name, one in known.items() if one.in_trainer)]
    where = where_to_set("--sampler {value}")
    fix = f"The sampler was {{value}}: set sample.sampler to {{value}}{where}"
    yield from _with_values(recipe, "sampler", "sampler", names, fix)


def guidance_scales(
    recipe: Recipe, values: Sequence[float] = _GUIDANCE_SCALES
) -> Iterator[Suspect]:
    """Yield the recipe with other guidance scales."""
    where = where_to_set("--guidance {value}", "--cfg {value}")
    fix = f"The guidance scale was {{value}}: set guidance_scale to {{value}}{where}"
    yield from _with_values(recipe, "guidance", "guidance_scale", values, fix)


def guidance_rescales(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the recipe with other guidance rescales, if its family supports them."""
    if get_family(recipe.model).trainer_sampling.rescales_guidance:
        where = where_to_set("--guidance-rescale {value}")
        fix = (
            "The guidance rescale was {value} (0: none): set guidance_rescale to {value}"
            f"{where}"
        )
        yield from _with_values(recipe, "guidance", "guidance_rescale", _GUIDANCE_RESCALES, fix)


def step_counts(recipe: Recipe, values: Sequence[int] = _STEPS) -> Iterator[Suspect]:
    """Yield the recipe with other numbers of sampling steps."""
    where = where_to_set("--steps {value}", "--steps {value}")
    fix = f"The sample had {{value}} steps: set sample_steps to {{value}}{where}"
    yield from _with_values(recipe, "steps", "steps", values, fix)


def near_estimate(
    recipe: Recipe, cause: str, configured: float, estimate: float
) -> Iterator[Suspect]:
    """Yield the recipe with round values of a setting near an estimated value.

    Estimates are often too close to the configured value, because the effect of a setting is not
    proportional to it. The next two round values beyond the estimate are therefore yielded, too.
    """
    if cause == "guidance":
        values = [round(estimate, 1), *_beyond(configured, estimate, 0.5)]
        yield from guidance_scales(recipe, values)
    elif cause == "steps":
        yield from step_counts(recipe, [int(n) for n in _beyond(configured, estimate, 1)])
    elif cause == "multiplier":
        values = [round(20 * estimate) / 20, *_beyond(configured, estimate, 0.1)]
        yield from multipliers(recipe, [v for v in values if abs(v) <= MAX_MULTIPLIER])


def _beyond(configured: float, estimate: float, unit: float) -> list[float]:
    """Return the next two multiples of `unit` from the estimate on, away from `configured`."""
    sign = math.copysign(1, estimate - configured)
    first = math.ceil(round(sign * estimate / unit, 3))
    return [round(sign * (first + more) * unit, 3) for more in range(2)]


def _without_flags(text: str) -> str:
    return split_flags(text)[0]


def _with_prompt(recipe: Recipe, prompt: str, fix: str) -> Suspect:
    return Suspect("trigger", replace(recipe, prompt=prompt), fix)


def _with_values(
    recipe: Recipe, cause: str, name: str, values: Sequence[Any], fix: str
) -> Iterator[Suspect]:
    for value in values:
        try:
            changed: Recipe = replace(recipe, **{name: value})
        except RecipeError:
            continue  # some samplers have a smaller maximum of steps
        text = f"{value:g}" if isinstance(value, float) else str(value)
        yield Suspect(cause, changed, fix.format(value=text))
