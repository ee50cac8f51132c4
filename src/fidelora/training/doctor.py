"""Why a preview came out different: the usual suspects, tried one at a time, until one explains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from fidelora.engine.engine import Engine
from fidelora.errors import BaseModelError, NumericsError, RecipeError
from fidelora.families import get_family
from fidelora.loras.describe import describe_adapter
from fidelora.recipe import Recipe, replace_trigger
from fidelora.training.compare import Comparison, compare, reencoded
from fidelora.training.flags import split_flags
from fidelora.training.run_folder import SampleItem, TrainingRun
from fidelora.training.verify import MACHINE, CheckedSample, Verdict, read_preview

CAUSES = (
    "steps_offset", "noise", "dtype", "sampler", "steps", "guidance", "seed", "trigger", "multiplier", "adapter_not_applied",
    "base_variant", "size", "unknown",
)  # fmt: skip

_GUIDANCE = [7, 6, 7.5, 5, 4, 8, 1, 3.5, 4.5, 5.5, 6.5, 3, 9, 10, 2, 12, 2.5, 15, 1.5, 8.5, 20]
_RESCALES = [0.0, 0.7, 0.5, 0.75, 1.0]
_STEPS = [20, 25, 30, 28, 50, 40, 15, 10, 12, 8, 4, 35, 60, 9, 11, 6, 7, 5, 16, 18, 22, 24, 3, 2, 1]
_MULTIPLIERS = [
    1,
    0.5,
    0.8,
    0.75,
    0.7,
    0.6,
    0.9,
    0.25,
    1.2,
    1.5,
    2,
    -1,
    0.4,
    0.3,
    0.2,
    -0.5,
    -0.75,
    1.25,
]
_SAMPLERS_FIRST = ["ddpm", "ddim", "euler_a", "euler", "dpmsolver++", "k_dpmsolver++"]
_NEARBY_SEEDS = 5


@dataclass(frozen=True)
class Diagnosis:
    """What explains a difference best.

    Attributes:
        cause: one of `CAUSES`.
        explains: how much of the mean difference goes away with it, 0..1; 1 if the preview is met to the bit or within rounding.
        fix: what to do, in a sentence.
    """

    cause: str
    explains: float
    fix: str


@dataclass(frozen=True)
class Suspect:
    """One other way in which the preview may have been made."""

    cause: str
    recipe: Recipe
    fix: str
    scheduler_options: dict[str, Any] = field(default_factory=dict)

    def named(self, explains: float) -> Diagnosis:
        """What is said if this one is it."""
        return Diagnosis(self.cause, round(explains, 4), self.fix)


_ENOUGH = 0.5
"""A suspect that leaves more than half of the difference explains nothing."""

_FEW_STEPS = 6
"""Where many values are possible, each is tried at this many steps first, only to find the order in which to try them in earnest:
an unfinished image already lies nearer to the preview with the right value than with a wrong one."""

_IN_EARNEST = 16
"""How many of those are then tried in earnest: with the right value among the many, it came among the first."""


class _Search:
    """The tries so far, on one sample."""

    def __init__(
        self, sample: CheckedSample, engine: Engine, on_try: Callable[[Suspect], None] | None
    ) -> None:
        assert sample.comparison is not None
        assert sample.plan.preview is not None
        self._sample = sample
        self._engine = engine
        self._on_try = on_try
        self._before = sample.comparison.mean_difference
        self._bound = sample.bound or MACHINE
        self._image_format = read_preview(sample.plan.preview)[1]
        self._within_bound = False
        self.best: Diagnosis | None = None
        self.is_over = False

    def attempt(self, suspect: Suspect) -> None:
        """Try a suspect, unless the search is over or another cause already comes as near as rounding does."""
        if self.is_over or (
            self._within_bound and self.best is not None and suspect.cause != self.best.cause
        ):
            return
        found = self._compared(suspect)
        if found is None:
            return
        explains = 1 - found.mean_difference / self._before
        if found.identical or explains > max(_ENOUGH, self.best.explains if self.best else 0):
            self.best, self._within_bound, self.is_over = (
                suspect.named(explains),
                self._bound.allows(found),
                found.identical,
            )

    def at_few_steps_first(self, suspects: Iterable[Suspect]) -> list[Suspect]:
        """The suspects in the order in which their unfinished images are near to the preview; the far ones are left out."""
        if self._within_bound or self.is_over or self._sample.plan.recipe.steps <= 2 * _FEW_STEPS:
            return list(suspects)
        distances: list[tuple[float, int, Suspect]] = []
        for suspect in suspects:
            found = self._compared(
                replace(suspect, recipe=replace(suspect.recipe, steps=_FEW_STEPS))
            )
            distances.append(
                (found.mean_difference if found else math.inf, len(distances), suspect)
            )
        return [
            suspect for _, _, suspect in sorted(distances, key=lambda one: one[:2])[:_IN_EARNEST]
        ]

    def result(self) -> Diagnosis:
        """The best explanation there is."""
        if self.best is None:
            return Diagnosis("unknown", 0.0, _UNKNOWN)
        if self.is_over or self._within_bound:
            return replace(self.best, explains=1.0)
        return replace(self.best, fix=f"{self.best.fix} That explains most of it, not all.")

    def _compared(self, suspect: Suspect) -> Comparison | None:
        if self._on_try is not None:
            self._on_try(suspect)
        try:
            image = self._engine.generate(
                suspect.recipe, scheduler_options=suspect.scheduler_options
            )
        except (BaseModelError, NumericsError):
            return None  # a variant of the base that is not there, or a precision in which the model overflows
        return compare(reencoded(image.pixels, self._image_format), self._sample.theirs)


_UNKNOWN = (
    "None of the usual reasons explains it: see that the previews, the weights and the base model belong to this job, and that the "
    "machine is of the kind that painted them."
)


def diagnose(
    job: TrainingRun,
    samples: Sequence[CheckedSample],
    engine: Engine,
    on_try: Callable[[Suspect], None] | None = None,
) -> Diagnosis:
    """Find out why previews came out different.

    The mismatched sample with the least work is tried with the suspects in turn: first those with one or two ways to be wrong,
    then those with many values, of which few steps tell the nearest, then the numbers of steps. One that makes the same image
    ends the search; one that comes as near as rounding does ends it after the others of its cause, which may come nearer.

    Args:
        samples: those that were checked; at least one is a mismatch.
        on_try: called before each try.
    """
    mismatched = [sample for sample in samples if sample.verdict is Verdict.MISMATCH]
    wrong_size = next((sample for sample in mismatched if sample.comparison is None), None)
    if wrong_size is not None:
        height, width = wrong_size.theirs.shape[:2]
        fix = f"The preview is {width}x{height}: set the sample's width and height to that (--w {width} --h {height})."
        return Diagnosis("size", 1.0, fix)
    sample = min(mismatched, key=lambda one: one.plan.recipe.steps * one.theirs.size)
    search = _Search(sample, engine, on_try)
    recipe, item = sample.plan.recipe, job.samples[sample.plan.index]
    new = _Unseen(recipe)
    for suspect in new(
        _offsets(recipe),
        _applied(recipe),
        _triggers(job, recipe, item),
        _precisions(recipe),
        _variants(recipe),
    ):
        search.attempt(suspect)
    many = new(
        _multipliers(recipe), _seeds(job, sample, recipe), _samplers(recipe), _guidance(recipe)
    )
    for suspect in search.at_few_steps_first(many):
        search.attempt(suspect)
    for suspect in new(_steps(recipe)):
        search.attempt(suspect)
    return search.result()


class _Unseen:
    """Leaves out what was tried before, the job's own recipe first of all."""

    def __init__(self, recipe: Recipe) -> None:
        self._seen = {recipe}

    def __call__(self, *groups: Iterable[Suspect]) -> Iterator[Suspect]:
        for suspect in chain(*groups):
            if suspect.scheduler_options or suspect.recipe not in self._seen:
                self._seen.add(suspect.recipe)
                yield suspect


def _offsets(recipe: Recipe) -> Iterator[Suspect]:
    for wrong in get_family(recipe.model).samples.wrong_schedules:
        yield Suspect(wrong.cause, recipe, wrong.fix, dict(wrong.options))


def _applied(recipe: Recipe) -> Iterator[Suspect]:
    if not recipe.adapters:
        return
    fix = "The image is the base model's alone: the adapter was not applied; load it where it was made."
    yield Suspect("adapter_not_applied", replace(recipe, adapters=()), fix)
    other = "live" if recipe.adapter_mode == "merged" else "merged"
    how = "different multipliers" if other == "live" else "one multiplier"
    fix = f"The adapter was applied {other}: give the samples of the job {how}."
    yield Suspect("multiplier", replace(recipe, adapter_mode=other), fix)  # type: ignore[arg-type]


def _multipliers(recipe: Recipe) -> Iterator[Suspect]:
    for adapter in recipe.adapters:
        for value in _MULTIPLIERS:
            fix = f"The multiplier was {value:g}: set network_multiplier to {value:g} (--m {value:g})."
            yield Suspect(
                "multiplier", replace(recipe, adapters=(replace(adapter, multiplier=value),)), fix
            )


def _triggers(job: TrainingRun, recipe: Recipe, item: SampleItem) -> Iterator[Suspect]:
    path = next((ref.path for ref in recipe.adapters if ref.path), None) or next(
        iter(job.checkpoints.values()), None
    )
    of_file = describe_adapter(path).trigger if path else ""
    literal = _prompt(item.prompt)
    if of_file:
        yield Suspect(
            "trigger", _prompted(recipe, _prompt(replace_trigger(item.prompt, of_file))),
            f"The trigger word was {of_file!r}, as the adapter's file says: set trigger_word to it.",
        )  # fmt: skip
    yield Suspect(
        "trigger",
        _prompted(recipe, literal),
        "The trigger was left as it is written: set no trigger_word.",
    )
    for word in dict.fromkeys(filter(None, (job.trigger_word, of_file))):
        for text in (f"{word} {recipe.prompt}", f"{word}, {recipe.prompt}"):
            fix = f"The trigger word {word!r} was put in front of the prompt; write [trigger] where it belongs."
            yield Suspect("trigger", _prompted(recipe, text), fix)
    yield Suspect(
        "trigger",
        _prompted(recipe, _prompt(item.prompt.replace("[trigger]", ""))),
        "The trigger word was left out.",
    )


def _prompt(text: str) -> str:
    return split_flags(text)[0]


def _prompted(recipe: Recipe, prompt: str) -> Recipe:
    return replace(recipe, prompt=prompt)


def _seeds(job: TrainingRun, sample: CheckedSample, recipe: Recipe) -> Iterator[Suspect]:
    index = sample.plan.index
    walked, fixed = job.seed + index, job.seed
    rules = {
        walked: f"The seed was {walked}, the job's seed and the sample's number: set walk_seed to true.",
        fixed: f"The seed was {fixed} as for the first sample: set walk_seed to false.",
    }
    before = [item.seed for item in job.samples[:index] if item.seed is not None]
    if before:
        rules[before[-1]] = (
            f"The seed was {before[-1]}, carried on from an earlier sample: set walk_seed to false."
        )
    nearby = [recipe.seed + step * sign for step in range(1, _NEARBY_SEEDS + 1) for sign in (1, -1)]
    usual = [42 + index, 42, index, 0, 1, *nearby]
    for seed in dict.fromkeys([*rules, *usual]):
        if seed >= 0:
            yield Suspect(
                "seed",
                replace(recipe, seed=seed),
                rules.get(seed, f"The seed was {seed}: set it (--seed {seed})."),
            )


def _precisions(recipe: Recipe) -> Iterator[Suspect]:
    if recipe.dtype != "float32":
        other = "legacy" if recipe.noise == "modern" else "modern"
        fix = f"The noise was drawn the {other} way, by another version of torch: use --noise {other}."
        yield Suspect("noise", replace(recipe, noise=other), fix)  # type: ignore[arg-type]
    for dtype in ("float32", "bfloat16", "float16"):
        for noise in ("modern", "legacy") if dtype != "float32" else (recipe.noise,):
            other_dtype: dict[str, Any] = {
                "dtype": dtype,
                "vae_dtype": dtype,
                "text_encoder_dtype": dtype,
                "noise": noise,
            }
            yield Suspect(
                "dtype",
                replace(recipe, **other_dtype),
                f"The images were made in {dtype}: use --dtype {dtype}.",
            )


def _variants(recipe: Recipe) -> Iterator[Suspect]:
    for variant in ("fp16", ""):
        what = f"the {variant} variant" if variant else "the plain files"
        yield Suspect(
            "base_variant",
            replace(recipe, variant=variant),
            f"The base model was {what}: use --variant {variant or repr('')}.",
        )


def _samplers(recipe: Recipe) -> Iterator[Suspect]:
    names = [*_SAMPLERS_FIRST, *get_family(recipe.model).samplers]
    yield from _changed(
        recipe,
        "sampler",
        "sampler",
        names,
        "The sampler was {value}: set sample.sampler to {value}.",
    )


def _guidance(recipe: Recipe) -> Iterator[Suspect]:
    fix = "The guidance scale was {value}: set guidance_scale to {value} (--cfg {value})."
    yield from _changed(recipe, "guidance", "guidance_scale", _GUIDANCE, fix)
    if get_family(recipe.model).samples.rescales_guidance:
        fix = (
            "The guidance was rescaled by {value} (0: not at all): set guidance_rescale to {value}."
        )
        yield from _changed(recipe, "guidance", "guidance_rescale", _RESCALES, fix)


def _steps(recipe: Recipe) -> Iterator[Suspect]:
    fix = "The sample had {value} steps: set sample_steps to {value} (--steps {value})."
    yield from _changed(recipe, "steps", "steps", _STEPS, fix)


def _changed(
    recipe: Recipe, cause: str, name: str, values: Sequence[Any], fix: str
) -> Iterator[Suspect]:
    for value in values:
        try:
            other: Recipe = replace(recipe, **{name: value})
        except RecipeError:
            continue  # a sampler with fewer steps
        yield Suspect(
            cause, other, fix.format(value=f"{value:g}" if isinstance(value, float) else value)
        )
