"""The previews of real training jobs, made again.

Every job in `goldens/` (see its README) is sampled again from its folder alone. Where the job's README says 100 %, every pixel has
to be the same; where rounding is inherent (adapters saved in fp16), the README's bound is held. The bounds count channel values,
as the README does.

Exactness needs the same kernels: processors without AVX-512, and other numbers of threads, sum in another order. The threads are
set to the two that the goldens were made with. On other processors the jobs are held to what was measured there (the same machine
told to use its older instructions), and the test says that it did.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import DEMO_DATA, GOLDEN_JOBS, SAME_PROCESSOR, TINY_BASE, TINY_SDXL

from fidelora import Engine
from fidelora.training.compare import Comparison, compare_with_sample
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

pytestmark = [
    pytest.mark.usefixtures("golden_threads"),
    pytest.mark.timeout(600),  # samples whole training runs
]
BF16_JOB = "bf16_save_f32"
BF16_OTHER_PROCESSOR_LEVELS = 12
"""Measured: up to 8, with 11-24 % of the pixels the same; bfloat16 has 8 bits, so another order of sums shows at once."""

EXACT = {
    "lora_linear_f32": 3,
    "lokr_full": 3,
    "multipliers": 4,
    "sampler_ddim": 2,
    "sampler_euler_a": 2,
    "sampler_k_dpmsolverpp": 2,
    "prompts": 5,
    "bf16_save_f32": 3,
    "xl_lora_linear_f32": 3,
    "xl_sampler_euler_a": 3,
}
"""Jobs of which all last samples are the same to the bit, with their number."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def folder_of(job: str) -> Path:
    return DEMO_DATA / job if job == "lora_linear_f32" else GOLDEN_JOBS / job


def base_of(job: str) -> str:
    return str(TINY_SDXL if job.startswith("xl_") else TINY_BASE)


def remake(engine: Engine, name: str, step: int, **changes: Any) -> list[Comparison]:
    comparisons = []
    for sample in plan_samples(read_run(folder_of(name)), step, base_model=base_of(name)):
        assert sample.preview is not None
        comparisons.append(
            compare_with_sample(engine.generate(sample.recipe, **changes).pixels, sample.preview)
        )
    return comparisons


@pytest.mark.parametrize("name", EXACT)
def test_last_samples_are_identical(engine, name):
    comparisons = remake(engine, name, read_run(folder_of(name)).steps)
    assert len(comparisons) == EXACT[name]
    if SAME_PROCESSOR:
        assert [comparison.identical_percent for comparison in comparisons] == [100.0] * EXACT[name]
    else:
        warnings.warn(
            f"{name}: held to the bound for other processors, not compared exactly", stacklevel=1
        )
        for comparison in comparisons:
            if name == BF16_JOB:
                assert comparison.max_difference <= BF16_OTHER_PROCESSOR_LEVELS
            else:
                assert comparison.within_rounding


def test_an_adapter_saved_in_fp16_differs_by_its_rounding_only(engine):
    for comparison in remake(engine, "lora_conv_f16", 8):
        assert comparison.identical_values_percent >= (99.86 if SAME_PROCESSOR else 99.5)
        assert comparison.max_difference <= (1 if SAME_PROCESSOR else 2)


SDXL_BOUNDS = {"xl_lora_conv_f16": 99.93, "xl_multipliers": 99.99, "xl_dora": 99.98}
"""In percent of channel values: in each sample at least. The README's "99.99 %" of the DoRA is 99.986 rounded."""


@pytest.mark.parametrize("name", SDXL_BOUNDS)
def test_sdxl_jobs_that_round_differ_by_that_only(engine, name):
    comparisons = remake(engine, name, 6)
    assert len(comparisons) == 3
    for comparison in comparisons:
        assert comparison.identical_values_percent >= (
            SDXL_BOUNDS[name] if SAME_PROCESSOR else 99.5
        )
        assert comparison.max_difference <= (1 if SAME_PROCESSOR else 2)


@pytest.mark.parametrize(
    "change",
    [
        {"negative_prompt_2": "ugly"},
        {"negative_prompt": ""},
        {"guidance_rescale": 0.7},
        {"adapters": ()},
    ],
    ids=str,
)
def test_a_wrong_setting_of_sdxl_is_seen(engine, change):
    """The sample has `--n ugly`, which the second text encoder does not get."""
    sample = plan_samples(read_run(folder_of("xl_lora_linear_f32")), 6, base_model=str(TINY_SDXL))[
        1
    ]
    assert sample.preview is not None
    assert (sample.recipe.negative_prompt, sample.recipe.negative_prompt_2) == ("ugly", "")
    assert not compare_with_sample(
        engine.generate(replace(sample.recipe, **change)).pixels, sample.preview
    ).identical


def test_steps_offset_1_is_not_what_sdxl_previews_show(engine):
    offset_1 = {"scheduler_options": {"steps_offset": 1}}
    assert all(
        comparison.identical_percent < 90
        for comparison in remake(engine, "xl_lora_linear_f32", 6, **offset_1)
    )


def test_a_job_that_sampled_often_and_saved_jpg_is_within_its_bounds(engine):
    comparisons = remake(engine, "checkpoints_jpg", 8)
    assert len(comparisons) == 3
    for comparison in comparisons:
        assert comparison.identical_values_percent >= 94.5  # "95 %" in the README is 94.8 rounded
        assert comparison.max_difference <= 5


def test_step_0_is_the_base_model(engine):
    comparisons = remake(engine, "checkpoints_jpg", 0)
    assert len(comparisons) == 3
    assert all(
        comparison.identical if SAME_PROCESSOR else comparison.max_difference <= 5
        for comparison in comparisons
    )


@pytest.mark.parametrize("step", [2, 4, 6])
def test_every_kept_checkpoint_belongs_to_its_own_samples(engine, step):
    """Each step's file is nearer to its own previews than to those of any other step."""
    job = read_run(folder_of("checkpoints_jpg"))
    for sample in plan_samples(job, step, base_model=str(TINY_BASE)):
        pixels = engine.generate(sample.recipe).pixels
        differences = {
            other: compare_with_sample(pixels, job.images[other, sample.index]).mean_difference
            for other in job.sampled_steps
        }
        assert min(differences, key=lambda other: differences[other]) == step


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 43},
        {"steps": 24},
        {"guidance_scale": 6.5},
        {"sampler": "ddim"},
        {"prompt": "a photo of a ball"},
        {"negative_prompt": "blurry"},
        {"adapters": ()},
    ],
    ids=str,
)
def test_a_wrong_setting_is_seen(engine, change):
    """The comparison can fail: each setting of a recipe changes the picture."""
    sample = plan_samples(read_run(folder_of("lora_linear_f32")), 6, base_model=str(TINY_BASE))[0]
    assert sample.preview is not None
    comparison = compare_with_sample(
        engine.generate(replace(sample.recipe, **change)).pixels, sample.preview
    )
    assert not comparison.within_rounding
    assert "DIFFERENT" in comparison.in_words


def test_steps_offset_0_is_not_what_previews_show(engine):
    """The trainer's configuration says 0 and its pipeline runs with 1; taking its word gives another picture."""
    offset_0 = {"scheduler_options": {"steps_offset": 0}}
    assert all(
        comparison.identical_percent < 90
        for comparison in remake(engine, "lora_linear_f32", 6, **offset_0)
    )
