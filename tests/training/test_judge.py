"""Changed settings and draws of a judgement, with engines that make gray images."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import GOLDEN_JOBS, TINY_BASE

from fidelora.training.changes import changed_settings, grouped_by_setting
from fidelora.training.evidence import Verdict
from fidelora.training.judge import DRAWS, Experiment
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run


def test_samples_with_other_settings_are_grouped_by_the_changed_one():
    """The first sample has no guidance, and the second no trigger word."""
    run = read_run(GOLDEN_JOBS / "checkpoints_jpg")
    items = (
        replace(run.samples[0], prompt="[trigger] a ball", guidance_scale=1.0),
        replace(run.samples[1], prompt="a ball", guidance_scale=6.0),
    )
    run = replace(run, samples=items, trigger_word="sks")
    plans = plan_samples(run, 8, base_model=str(TINY_BASE))
    changes = [list(changed_settings(run, plan)) for plan in plans]
    groups = grouped_by_setting(changes, max_samples=2, max_values=3)
    grouped = {next(iter(group.values())).cause: group for group in groups}
    assert len(grouped) == len(groups)
    assert list(grouped["guidance"]) == [1]
    assert list(grouped["trigger"]) == [0]
    assert list(grouped["steps"]) == list(grouped["multiplier"]) == [0, 1]
    for cause, group in grouped.items():
        assert {change.cause for change in group.values()} == {cause}
    assert grouped["guidance"][1].recipe.guidance_scale == 6.5
    assert "[trigger]" in grouped["trigger"][0].recipe.prompt


def test_each_value_of_a_setting_is_changed_separately():
    """A mistake in the sample block affects only the samples without a value of their own."""
    run = read_run(GOLDEN_JOBS / "checkpoints_jpg")
    scales = [2.5, 6.0, 3.5, 6.0, 4.5, 6.0]
    items = tuple(replace(run.samples[0], guidance_scale=scale) for scale in scales)
    run = replace(run, samples=items)
    plans = plan_samples(run, 8, base_model=str(TINY_BASE))
    changes = [list(changed_settings(run, plan)) for plan in plans]
    groups = grouped_by_setting(changes, max_samples=2, max_values=3)
    guidance = [list(group) for group in groups if next(iter(group.values())).cause == "guidance"]
    assert guidance == [[1, 3], [0], [2]]  # the most frequent value first


class RecordingEngine:
    """Makes gray images, and records the sizes of the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def max_jittered_batch(self, _recipe):
        return 2

    def generate(self, recipe, **_options):
        return self._images([recipe])[0]

    def generate_jittered(self, recipes, _jitter):
        return self._images(recipes)

    def _images(self, recipes):
        self.batches.append(len(recipes))
        return [
            SimpleNamespace(
                all_pixels=np.full((one.height, one.width, 3), 128, np.uint8), recipe=one
            )
            for one in recipes
        ]


@pytest.mark.parametrize(
    ("dtype", "widths", "batches"),
    [
        ("bfloat16", (64, 64, 64), [2, 1]),
        ("bfloat16", (64, 80, 64), [2, 1]),
        ("bfloat16", (64, 80, 96), [1, 1, 1]),
        ("float32", (64, 64, 64), [1, 1, 1]),
    ],
)
def test_draws_in_half_precision_share_batches(dtype, widths, batches):
    """In float32, the rounding errors are not replaced by random ones, so batches would matter.

    The adapter has all its digits, so that its draws need no files.
    """
    run = read_run(GOLDEN_JOBS / "lora_linear_f32")
    run = replace(run, samples=tuple(replace(run.samples[0], width=width) for width in widths))
    plans = [
        replace(plan, recipe=replace(plan.recipe, dtype=dtype))
        for plan in plan_samples(run, 6, base_model=str(TINY_BASE))
    ]
    replayed = [np.zeros((one.recipe.height, one.recipe.width, 3), np.uint8) for one in plans]
    engine: Any = RecordingEngine()
    experiment = Experiment(run, engine, plans, replayed, ["PNG"] * len(plans))
    assert engine.batches == DRAWS * batches
    for plan, draws in zip(plans, experiment.draws, strict=True):
        assert [draw.shape for draw in draws] == DRAWS * [
            (plan.recipe.height, plan.recipe.width, 3)
        ]


class NoisyEngine(RecordingEngine):
    """Makes gray images with noise, much stronger in every fourth draw after the first `DRAWS`."""

    def _images(self, recipes):
        number = len(self.batches)
        self.batches.append(len(recipes))
        strong = number >= DRAWS and number % 4 == 0
        noise = np.random.default_rng(number).normal(0, 8 if strong else 2, (64, 64, 3))
        gray = (128 + noise.round()).clip(0, 255).astype(np.uint8)
        return [SimpleNamespace(all_pixels=gray, recipe=recipes[0])]


@pytest.mark.parametrize(
    ("level", "verdict", "draws"), [(6, Verdict.ROUNDING, 24), (40, Verdict.MISMATCH, 8)]
)
def test_more_draws_are_made_before_a_mismatch_that_is_not_clear(level, verdict, draws):
    """The first draws are all alike, but some of the others are as far away as the sample."""
    run = read_run(GOLDEN_JOBS / "lora_linear_f32")
    run = replace(run, samples=run.samples[:1])
    plans = plan_samples(run, 6, base_model=str(TINY_BASE))
    plans = [replace(plan, recipe=replace(plan.recipe, width=64, height=64)) for plan in plans]
    center = np.full((64, 64, 3), 128, np.uint8)
    engine: Any = NoisyEngine()
    experiment = Experiment(run, engine, plans, [center], ["PNG"])
    noise = np.random.default_rng(1000).normal(0, level, center.shape)
    trainer = (128 + noise.round()).clip(0, 255).astype(np.uint8)
    evidence = experiment.conclude(experiment.differences([trainer]), ("digits",))
    assert len(experiment.draws[0]) == draws
    assert evidence.verdict is verdict


class GuidedEngine(RecordingEngine):
    """Makes gray images with noise of their own, and a pattern that depends on the guidance."""

    def _images(self, recipes):
        return [self._image(recipe) for recipe in recipes]

    def _image(self, recipe):
        self.batches.append(1)
        return SimpleNamespace(
            all_pixels=noisy(len(self.batches), recipe.guidance_scale), recipe=recipe
        )


def noisy(number: int, guidance: float) -> NDArray[np.uint8]:
    levels = np.random.default_rng(number).normal(128, 3, (64, 64, 3))
    levels[::2] += 4 * guidance
    return levels.round().clip(0, 255).astype(np.uint8)


def test_an_identical_sample_does_not_hide_a_change_of_another():
    """The estimate of the change is not averaged with the sample that does not have it."""
    run = read_run(GOLDEN_JOBS / "lora_linear_f32")
    run = replace(run, samples=(run.samples[0],) * 2)
    plans = [
        replace(plan, recipe=replace(plan.recipe, width=64, height=64))
        for plan in plan_samples(run, 6, base_model=str(TINY_BASE))
    ]
    right = plans[0].recipe.guidance_scale
    replayed = [noisy(1000 + index, right) for index in range(2)]
    engine: Any = GuidedEngine()
    experiment = Experiment(run, engine, plans, replayed, ["PNG"] * 2)
    trainer = [replayed[0], noisy(2000, right + 0.5)]
    evidence = experiment.conclude(experiment.differences(trainer), ("digits",))
    assert evidence.verdict is Verdict.MISMATCH
    assert evidence.found is not None
    assert evidence.found.change.cause == "guidance"
    assert evidence.found.test.amount == pytest.approx(1, abs=0.2)
