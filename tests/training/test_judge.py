"""Settings that a judgement changes on trial."""

from __future__ import annotations

from dataclasses import replace

from tests.support import GOLDEN_JOBS, TINY_BASE

from fidelora.training.judge import changed_settings, grouped_by_cause
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
    grouped = grouped_by_cause([list(changed_settings(run, plan)) for plan in plans])
    assert list(grouped["guidance"]) == [1]
    assert list(grouped["trigger"]) == [0]
    assert list(grouped["steps"]) == list(grouped["multiplier"]) == [0, 1]
    for cause, changes in grouped.items():
        assert {change.cause for change in changes.values()} == {cause}
    assert grouped["guidance"][1].recipe.guidance_scale == 6.5
    assert "[trigger]" in grouped["trigger"][0].recipe.prompt
