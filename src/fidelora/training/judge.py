"""Judgement of the samples of one step: identical, rounding, undecided or mismatch.

Samples that are not identical are compared with draws (`draws.py`) by the tests of
`consistency.py`. The probability of calling right settings a mismatch is at most `FALSE_ALARMS` per
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fidelora.engine.engine import Engine
from fidelora.images.write import GeneratedImage
from fidelora.recipe import Recipe, differ_in_prompts_and_seed
from fidelora.training.changes import Change, changed_settings, grouped_by_setting
from fidelora.training.compare import (
    ROUNDING_MAX_DIFFERENCE,
    ROUNDING_MIN_IDENTICAL_PERCENT,
    reencode,
)
from fidelora.training.consistency import (
    DifferenceImage,
    Differences,
    direction_test,
    size_test,
)
from fidelora.training.draws import Draws, lost_information
from fidelora.training.evidence import MAX_DETECTABLE, Evidence, TriedChange, Verdict
from fidelora.training.plan import PlannedSample
from fidelora.training.run_folder import TrainingRun

Pixels = NDArray[np.uint8]
OnImage = Callable[[int, int], None]
"""Called after each image of a judgement with the number of finished images and the total."""

FALSE_ALARMS = 0.005
"""Probability of calling samples with right settings a mismatch, according to the tests.

The tests assume normally distributed numbers. In simulated runs (`benchmarks/verdicts.py`), 2 of
180 verdicts were false alarms at 0.01, and 0 of 216 at 0.005.
"""
_SIZE_LIMIT = 0.6 * FALSE_ALARMS  # p value below which the sizes show a mismatch
_DIRECTIONS_LIMIT = 0.4 * FALSE_ALARMS
"""Sum of the limits of all tried changes. A change shows a mismatch if its p value is below this
value divided by the number of tried changes."""

DRAWS = 8  # draws of each sample before the first judgement; each needs an image
_MORE_DRAWS = 16
"""Further draws of each sample if the evidence for a mismatch is not clear
(`Evidence.is_clear`).

With eight draws, the tail of the distribution is an extrapolation. Some samples are close to a
tipping point, so that a few draws are much farther away than the others.
"""

_CHANGED_SAMPLES = 2
"""Number of samples on which a changed setting is tried; each needs an image."""

_CHANGED_VALUES = 3
"""Number of values of one setting (guidance 6 and guidance 2.5, ...) that are changed in turn."""

_MIN_SIGNAL = 0.5
"""If a smaller share of a change is due to its setting (`DirectionTest.signal`), the change is
measured again on `DRAWS` other draws, and averaged. Rounding errors are as large as the change
itself if the setting has little effect on a model in half precision."""

_MIN_AMOUNT = 0.1
"""Smallest amount of a tried change (see `DirectionTest`) that counts, whatever its p value.

The draws do not reproduce everything, and an error of a few percent must not become a mismatch.
"""


def judge(
    run: TrainingRun,
    engine: Engine,
    plans: Sequence[PlannedSample],
    replayed: Sequence[Pixels],
    trainer: Sequence[Pixels],
    formats: Sequence[str],
    on_image: OnImage | None = None,
) -> Evidence | None:
    """Judge the samples of one step, at least one of which differs from the replayed image.

    Args:
        replayed: pixels of the replayed images after encoding in the trainer's format, one per
            plan.
        trainer: pixels of the trainer's images, of the same sizes.
        formats: Pillow's names of the trainer's file formats.

    Returns:
        None if no information was lost, so that any difference is a mismatch.
    """
    lost = tuple(dict.fromkeys(clause for plan in plans for clause in lost_information(plan)))
    if not lost:
        return None
    experiment = Experiment(run, engine, plans, replayed, formats, on_image)
    return experiment.conclude(experiment.differences(trainer), lost)


class Experiment:
    """Images with which the samples of one step are compared: draws, and changed settings.

    Attributes:
        draws: differences of the draws from the replayed images, by sample and by number of the
            draw.
    """

    def __init__(
        self,
        run: TrainingRun,
        engine: Engine,
        plans: Sequence[PlannedSample],
        replayed: Sequence[Pixels],
        formats: Sequence[str],
        on_image: OnImage | None = None,
    ) -> None:
        """Make the draws; the arguments are those of `judge`."""
        self._run = run
        self._engine = engine
        self._plans = plans
        self._replayed = replayed
        self._formats = formats
        self._on_image = on_image
        changes = [list(changed_settings(run, plan)) for plan in plans]
        self._changes = grouped_by_setting(changes, _CHANGED_SAMPLES, _CHANGED_VALUES)
        self._total = DRAWS * len(plans) + sum(map(len, self._changes))
        self._done = 0
        self._effects: dict[tuple[str, int], DifferenceImage] = {}
        self._centers: dict[int, list[Pixels]] = {}
        self._means: dict[tuple[str, int], tuple[DifferenceImage, float]] = {}
        self.draws: list[list[DifferenceImage]] = [[] for _ in plans]
        self._make_draws(range(DRAWS))

    def differences(self, trainer: Sequence[Pixels]) -> list[Differences]:
        """Return the differences of these samples and of the draws from the replayed images."""
        return [
            Differences(_difference(pixels, center), tuple(draws[:DRAWS]))
            for pixels, center, draws in zip(trainer, self._replayed, self.draws, strict=True)
        ]

    def conclude(self, samples: Sequence[Differences], lost: tuple[str, ...]) -> Evidence:
        """Judge samples by their differences.

        Images of changed settings are made if the sizes of the differences show no mismatch, and
        more draws if there is a mismatch that is not clear.

        Args:
            samples: result of `differences`, also with another number of draws.
            lost: information that was lost, as clauses.
        """
        evidence = self._conclude(samples, lost)
        if evidence.verdict is not Verdict.MISMATCH or evidence.is_clear:
            return evidence
        if len(self.draws[0]) == DRAWS:
            self._total += _MORE_DRAWS * len(self._plans)
            # `_mean_effect` uses the draws from DRAWS to 2 * DRAWS.
            self._make_draws(range(2 * DRAWS, 2 * DRAWS + _MORE_DRAWS))
        more = [
            replace(sample, draws=(*sample.draws, *draws[DRAWS:]))
            for sample, draws in zip(samples, self.draws, strict=True)
        ]
        return self._conclude(more, lost)

    def _conclude(self, samples: Sequence[Differences], lost: tuple[str, ...]) -> Evidence:
        noise = {
            plan.index: float(np.mean([np.abs(one).mean() for one in sample.draws]))
            for plan, sample in zip(self._plans, samples, strict=True)
        }
        size = size_test(samples)
        if size.p_value < _SIZE_LIMIT:
            return Evidence(Verdict.MISMATCH, lost, noise, size)
        tried = []
        limit = _DIRECTIONS_LIMIT / max(1, len(self._changes))
        for group in self._changes:
            every_effect = {index: self._effect(index, change) for index, change in group.items()}
            # Leave out identical samples: they were made without the change, and do not have the
            # rounding errors of the draws.
            differing = [index for index in group if samples[index].trainer.any()]
            if not differing:
                continue
            effects = [every_effect[index] for index in differing]
            changed = [samples[index] for index in differing]
            test = direction_test(changed, effects, limit)
            change = group[differing[0]]
            if all(map(_reproduces, effects, changed)):
                test = replace(test, amount=1.0, p_value=0.0)
            elif test.signal < _MIN_SIGNAL and change.cause != "dtype":
                # The decision depends on the draws only, so it does not make false alarms likelier.
                means = [self._mean_effect(index, group[index]) for index in differing]
                test = direction_test(
                    changed, [mean for mean, _ in means], limit, [error for _, error in means]
                )
            tried.append(TriedChange(change, test))
        found = [
            one for one in tried if one.test.p_value < limit and abs(one.test.amount) >= _MIN_AMOUNT
        ]
        if found:
            best = min(found, key=lambda one: one.test.p_value)
            return Evidence(Verdict.MISMATCH, lost, noise, size, tuple(tried), best)
        best_detectable: dict[str, float] = {}  # by setting; some values may have little effect
        for one in tried:
            if one.change.size:
                known = best_detectable.get(one.change.cause, math.inf)
                best_detectable[one.change.cause] = min(known, one.test.detectable)
        blind = any(detectable > MAX_DETECTABLE for detectable in best_detectable.values())
        verdict = Verdict.UNDECIDED if blind else Verdict.ROUNDING
        return Evidence(verdict, lost, noise, size, tuple(tried))

    def _make_draws(self, numbers: range) -> None:
        with Draws.of(self._run, self._engine) as maker:
            for number in numbers:  # one change of the weights for all samples
                self._draw([maker.recipe(plan, number) for plan in self._plans], number)

    def _draw(self, recipes: Sequence[Recipe], number: int) -> None:
        """Make one draw of each sample, in batches where that changes only rounding errors."""
        left = list(range(len(recipes)))
        while left:
            batch = self._batch(recipes, left)
            left = [sample for sample in left if sample not in batch]
            if len(batch) == 1:
                images = [self._engine.generate(recipes[batch[0]], jitter=number)]
            else:
                images = self._engine.generate_jittered([recipes[i] for i in batch], number)
            for sample, image in zip(batch, images, strict=True):
                self.draws[sample].append(self._difference(sample, image))

    def _batch(self, recipes: Sequence[Recipe], samples: Sequence[int]) -> list[int]:
        """Return the first of the samples, and others that can be drawn in the same batch."""
        first = recipes[samples[0]]
        if first.dtype == "float32":
            return [samples[0]]
        alike = [one for one in samples if differ_in_prompts_and_seed(first, recipes[one])]
        return alike[: self._engine.max_jittered_batch(first)]

    def _effect(self, sample: int, change: Change) -> DifferenceImage:
        """Return the difference that a changed setting makes to the replayed image of a sample."""
        key = (change.cause, sample)
        if key not in self._effects:
            # Not in batches: a changed setting may reproduce the sample to the bit.
            image = self._engine.generate(change.recipe, scheduler_options=change.scheduler_options)
            self._effects[key] = self._difference(sample, image)
        return self._effects[key]

    def _mean_effect(self, sample: int, change: Change) -> tuple[DifferenceImage, float]:
        """Return the mean effect of a changed setting on draws, and its rounding errors.

        Each draw is made with and without the change, with the same random values. These draws are
        not those that the trainer's sample is compared with. For a change with an opposite, the
        effect is half of the difference between the images with the change and those with the
        opposite change. A sample made with one of these changes then contains the effect once, or
        -1 times, even if the effect is not proportional to the change.

        Returns:
            The mean of the `DRAWS` differences, and the mean square of its errors, which is their
            variance divided by their number.
        """
        key = (change.cause, sample)
        if key not in self._means:
            images = self._images(sample, change.recipe, change.scheduler_options)
            if change.opposite is not None:
                others, factor = self._images(sample, change.opposite, {}), 0.5
            else:
                if sample not in self._centers:
                    self._centers[sample] = self._images(sample, self._plans[sample].recipe, {})
                others, factor = self._centers[sample], 1.0
            pairs = zip(images, others, strict=True)
            effects = np.stack([factor * _difference(image, other) for image, other in pairs])
            error = float(effects.var(axis=0, ddof=1).mean()) / len(effects)
            self._means[key] = (effects.mean(axis=0), error)
        return self._means[key]

    def _images(
        self, sample: int, recipe: Recipe, scheduler_options: dict[str, Any]
    ) -> list[Pixels]:
        """Return the draws `DRAWS` to 2 * `DRAWS` - 1 of a sample with this recipe.

        These are not among `self.draws`.
        """
        plan = replace(self._plans[sample], recipe=recipe)
        self._total += DRAWS
        images = []
        with Draws.of(self._run, self._engine) as maker:
            for number in range(DRAWS, 2 * DRAWS):
                image = self._engine.generate(
                    maker.recipe(plan, number), jitter=number, scheduler_options=scheduler_options
                )
                images.append(self._encoded(sample, image))
        return images

    def _difference(self, sample: int, image: GeneratedImage) -> DifferenceImage:
        """Return the difference of a new image from the replayed image of the sample."""
        return _difference(self._encoded(sample, image), self._replayed[sample])

    def _encoded(self, sample: int, image: GeneratedImage) -> Pixels:
        """Return the pixels of a new image of the sample after encoding as the trainer does."""
        self._done += 1
        if self._on_image is not None:
            self._on_image(self._done, self._total)
        return reencode(image.all_pixels, self._formats[sample], image.recipe.fps)


def _reproduces(effect: DifferenceImage, sample: Differences) -> bool:
    """Return True if the changed setting gives the trainer's image, except for float32 rounding."""
    rest = np.abs(sample.trainer - effect)
    same = float((rest == 0).all(axis=-1).mean() * 100)
    return float(rest.max()) <= ROUNDING_MAX_DIFFERENCE and same >= ROUNDING_MIN_IDENTICAL_PERCENT


def _difference(pixels: Pixels, center: Pixels) -> DifferenceImage:
    difference: DifferenceImage = pixels.astype(np.float32) - center.astype(np.float32)
    return difference
