"""Doctor of `fidelora verify`: finds the setting that explains a mismatch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fidelora.engine.engine import Engine
from fidelora.errors import BaseModelError, NumericsError
from fidelora.training import suspects
from fidelora.training.changes import Change, changed_settings
from fidelora.training.compare import Comparison, compare, reencode
from fidelora.training.evidence import Verdict
from fidelora.training.flags import where_to_set
from fidelora.training.judge import Pixels
from fidelora.training.run_folder import TrainingRun
from fidelora.training.run_suspects import run_suspects, trainer_versions
from fidelora.training.suspects import Suspect, UniqueSuspects
from fidelora.training.verify import (
    CheckedSample,
    OnProgress,
    check_sample,
    read_trainer_image,
)

CAUSES = (
    "steps_offset", "noise", "dtype", "sampler", "steps", "guidance", "seed", "trigger",
    "multiplier", "adapter_not_applied", "base_variant", "negative_prompt", "size", "history",
    "quantized", "training_adapter", "trainer_version", "first_sample", "embedding",
    "unload_text_encoder", "unknown",
)  # fmt: skip

_MIN_EXPLAINED = 0.5
"""Share of the mean difference that a suspect must explain to be reported."""

_MAX_NOISE = 1.3
"""Lost information explains a mean difference of at most this many times that of the draws.

If a suspect leaves no larger difference, other causes are not tried any more. Single samples with
right settings had up to 1.67 times the mean difference of the draws; for these, the search
continues.
"""

_SCREENING_STEPS = 6
"""Sampling steps for ranking many values before the attempts with all steps.

Even with these few steps, the right value gives an image closer to the sample than a wrong value.
"""

_SCREENED_SUSPECTS = 16
"""Suspects that are tried with all steps after the ranking.

In the measured cases, the right value was among the best-ranked ones.
"""

_UNKNOWN_FIX = (
    "None of the usual causes explains the difference. Check that the samples, the weights and the "
    "base model belong to this training run."
)


@dataclass(frozen=True)
class Diagnosis:
    """The best explanation of a difference.

    Attributes:
        cause: one of `CAUSES`.
        explains: share of the mean difference that the cause explains, 0..1; 1 if correcting it
            makes the images identical or equal within rounding.
        fix: what was different and how to correct it.
    """

    cause: str
    explains: float
    fix: str


def diagnose(
    run: TrainingRun,
    samples: Sequence[CheckedSample],
    engine: Engine,
    on_progress: OnProgress | None = None,
) -> Diagnosis:
    """Find the setting that explains why samples differ.

    The search uses the mismatched sample that is fastest to generate. It tries suspects in this
    order: settings with one or two alternatives; values of guidance, steps and multiplier that are
    estimated from a small change; settings with many values, ranked at few steps; numbers of steps.
    An identical image ends the search. If an image differs only by rounding, or by no more than
    lost information explains, only the remaining suspects of the same cause are tried, because one
    of them may be closer.

    Args:
        samples: checked samples, at least one of them a mismatch.
        on_progress: called before each attempt with the kind of work, the number of finished
            attempts, and the maximum number of attempts.
    """
    mismatched = [sample for sample in samples if sample.verdict is Verdict.MISMATCH]
    wrong_size = next((sample for sample in mismatched if sample.comparison is None), None)
    if wrong_size is not None:
        return _diagnose_size(run, wrong_size, engine)
    evidence = mismatched[0].evidence
    if evidence is not None and evidence.found is not None:
        return Diagnosis(evidence.found.change.cause, 1.0, evidence.found.fix)
    sample = min(mismatched, key=lambda checked: checked.plan.recipe.steps * checked.trainer.size)
    other_runs = run_suspects(run, sample.plan)
    if sample.plan.is_first_round and run.first_round is not None:
        run = run.first_round
    recipe, item = sample.plan.recipe, run.samples[sample.plan.index]
    unique = UniqueSuspects(recipe)
    few_values = list(
        unique(
            suspects.wrong_schedules(recipe),
            suspects.missing_adapters(recipe),
            other_runs,
            suspects.triggers(run, recipe, item),
            suspects.precisions(recipe),
            suspects.variants(recipe),
        )
    )
    many_values = list(
        unique(
            suspects.multipliers(recipe),
            suspects.seeds(run, recipe, sample.plan.index),
            suspects.samplers(recipe),
            suspects.guidance_scales(recipe),
            suspects.guidance_rescales(recipe),
        )
    )
    step_counts = list(unique(suspects.step_counts(recipe)))
    changes = [one for one in changed_settings(run, sample.plan) if one.size is not None]
    most = len(few_values) + len(many_values) + _SCREENED_SUSPECTS + len(step_counts)
    search = _Search(sample, engine, most + 4 * len(changes), on_progress)
    for suspect in few_values:
        search.attempt(suspect)
    for change in changes:
        for suspect in search.estimate(change):
            search.attempt(suspect)
    for suspect in search.rank(many_values):
        search.attempt(suspect)
    for suspect in step_counts:
        search.attempt(suspect)
    return search.result()


def _diagnose_size(run: TrainingRun, sample: CheckedSample, engine: Engine) -> Diagnosis:
    """Return why a sample has another size or number of frames than its settings give."""
    height, width = sample.trainer.shape[-3:-1]
    for suspect in trainer_versions(run, sample.plan):
        plan = replace(sample.plan, recipe=suspect.recipe)
        if (suspect.recipe.width, suspect.recipe.height) == (width, height) and (
            check_sample(plan, engine).verdict is not Verdict.MISMATCH
        ):
            return Diagnosis(suspect.cause, 1.0, suspect.fix)
    frames = len(sample.trainer) if sample.trainer.ndim == 4 else 1
    recipe = sample.plan.recipe
    if (recipe.width, recipe.height) == (width, height):
        option = f"--frames {frames}"
        fix = (
            f"The sample has {frames} frames: set its num_frames to {frames}"
            f"{where_to_set(option, option)}"
        )
        return Diagnosis("size", 1.0, fix)
    fix = (
        f"The sample is {width}x{height}: set its width to {width} and its height to {height}"
        f"{where_to_set(f'--size {width}x{height}', f'--w {width} --h {height}')}"
    )
    return Diagnosis("size", 1.0, fix)


def explained_share(before: float, after: float, noise: float) -> float:
    """Return the share of a mean difference that a setting explains.

    The share is relative to the part of the difference that exceeds the noise, because lost
    information causes the noise, and no setting can explain it. The share exceeds 1 if the setting
    brings the difference below the noise. The part is taken to be at least a quarter of the
    difference; otherwise small changes would give a large share if the difference is near the
    noise.

    Args:
        before, after: mean differences without and with the setting, in levels.
        noise: mean difference of the draws.
    """
    return (before - after) / max(before - noise, 0.25 * before)


class _Search:
    """State of the search on one sample."""

    def __init__(
        self,
        sample: CheckedSample,
        engine: Engine,
        most_attempts: int,
        on_progress: OnProgress | None,
    ) -> None:
        assert sample.comparison is not None
        assert sample.plan.trainer_image is not None
        self._sample = sample
        self._engine = engine
        self._most_attempts = most_attempts
        self._attempts = 0
        self._on_progress = on_progress
        self._mean_before = sample.comparison.mean_difference
        evidence = sample.evidence
        self._noise = evidence.noise[sample.plan.index] if evidence is not None else 0.0
        self._image_format = read_trainer_image(sample.plan.trainer_image)[1]
        self._within_noise = False
        self._identical = False
        self._best: Diagnosis | None = None

    def attempt(self, suspect: Suspect) -> None:
        """Try a suspect, unless the search has ended or another cause explains the difference."""
        if self._identical or (
            self._within_noise and self._best is not None and suspect.cause != self._best.cause
        ):
            return
        comparison = self._compare(suspect)
        if comparison is None:
            return
        explains = explained_share(self._mean_before, comparison.mean_difference, self._noise)
        threshold = max(_MIN_EXPLAINED, self._best.explains if self._best else 0)
        if comparison.identical or explains > threshold:
            self._best = Diagnosis(suspect.cause, round(explains, 4), suspect.fix)
            self._within_noise = (
                comparison.within_rounding or comparison.mean_difference <= _MAX_NOISE * self._noise
            )
            self._identical = comparison.identical

    def estimate(self, change: Change) -> Iterator[Suspect]:
        """Yield suspects with an estimated value of one setting.

        The estimate comes from a small change of the setting: the difference of the sample is
        projected on the difference that the change makes, as in `consistency.direction_test`. It is
        wrong if a different setting is the cause, so the caller tries it like other suspects.
        """
        if self._identical or self._within_noise:
            return
        suspect = Suspect(change.cause, change.recipe, change.fix, change.scheduler_options)
        image = self._generate(suspect)
        if image is None:
            return
        center = self._sample.replayed.astype(np.float64)
        effect = image - center
        power = float(np.vdot(effect, effect))
        if power > 0:
            amount = float(np.vdot(self._sample.trainer - center, effect)) / power
            estimate = change.value + amount * (change.size or 0)
            recipe = self._sample.plan.recipe
            yield from suspects.near_estimate(recipe, change.cause, change.value, estimate)

    def rank(self, candidates: Iterable[Suspect]) -> list[Suspect]:
        """Return the candidates whose images at few steps are closest to the sample, best first."""
        steps = self._sample.plan.recipe.steps
        if self._within_noise or self._identical or steps <= 2 * _SCREENING_STEPS:
            return list(candidates)
        distances: list[tuple[float, int, Suspect]] = []
        for suspect in candidates:
            unfinished = replace(suspect, recipe=replace(suspect.recipe, steps=_SCREENING_STEPS))
            comparison = self._compare(unfinished)
            distance = comparison.mean_difference if comparison else math.inf
            distances.append((distance, len(distances), suspect))
        distances.sort(key=lambda entry: entry[:2])
        return [suspect for _, _, suspect in distances[:_SCREENED_SUSPECTS]]

    def result(self) -> Diagnosis:
        """Return the best explanation so far."""
        if self._best is None:
            return Diagnosis("unknown", 0.0, _UNKNOWN_FIX)
        if self._identical or self._within_noise:
            return replace(self._best, explains=1.0)
        return replace(
            self._best,
            explains=min(1.0, self._best.explains),
            fix=f"{self._best.fix} This explains most of the difference, not all.",
        )

    def _compare(self, suspect: Suspect) -> Comparison | None:
        image = self._generate(suspect)
        return None if image is None else compare(image, self._sample.trainer)

    def _generate(self, suspect: Suspect) -> Pixels | None:
        """Return the image of a suspect in the trainer's format; None if there cannot be one."""
        if self._on_progress is not None:
            self._on_progress("searching for the cause", self._attempts, self._most_attempts)
        self._attempts += 1
        recipe = suspect.recipe
        if (recipe.height, recipe.width) != self._sample.trainer.shape[-3:-1]:
            return None
        try:
            image = self._engine.generate(recipe, scheduler_options=suspect.scheduler_options)
        except (BaseModelError, NumericsError):
            return None  # the base model lacks this variant, or overflows in this precision
        pixels = reencode(image.all_pixels, self._image_format, recipe.fps)
        return pixels if pixels.shape == self._sample.trainer.shape else None
