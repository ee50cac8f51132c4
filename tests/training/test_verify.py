"""Verdicts on real jobs, and the doctor's on jobs that were made wrong on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tests.support import (
    DEMO_DATA,
    GOLDEN_JOBS,
    SAME_PROCESSOR,
    TINY_BASE,
    TINY_SDXL,
    change_weights,
)

from fidelora import Engine
from fidelora.errors import JobFolderError, NothingToCheckError
from fidelora.training.doctor import CAUSES, diagnose
from fidelora.training.plan import plan_samples
from fidelora.training.report import html_report
from fidelora.training.run_folder import read_run
from fidelora.training.verify import (
    MACHINE,
    CheckedSample,
    Verdict,
    overall,
    steps_to_check,
    unchecked,
    verify,
)

pytestmark = [
    pytest.mark.usefixtures("golden_threads"),
    pytest.mark.timeout(600),  # the longest takes 90 seconds
]
LORA_JOB = DEMO_DATA / "lora_linear_f32"
IDENTICAL = [
    "lokr_full", "multipliers", "sampler_ddim", "sampler_euler_a", "sampler_k_dpmsolverpp", "prompts", "bf16_save_f32",
]  # fmt: skip
BASE = str(TINY_BASE)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a job, its configuration changed."""

    def make(
        source: Path = LORA_JOB, change: Callable[[dict[str, Any]], None] = lambda process: None
    ) -> Path:
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        document = yaml.safe_load((folder / "config.yaml").read_text())
        change(document["config"]["process"][0])
        (folder / "config.yaml").write_text(yaml.safe_dump(document))
        return folder

    return make


def checked(
    folder: Path, engine: Engine, step: str = "last", base: str = BASE
) -> list[CheckedSample]:
    job = read_run(folder)
    return verify(job, engine, steps_to_check(job, step), base_model=base)


# --- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder",
    [LORA_JOB, *(GOLDEN_JOBS / name for name in IDENTICAL)],
    ids=lambda folder: folder.name,
)
def test_previews_that_can_be_met_are_met(engine, folder):
    """To the bit where the processor is of the kind that painted them; elsewhere but for rounding, if they are in float32."""
    samples = checked(folder, engine)
    if SAME_PROCESSOR:
        assert [sample.verdict for sample in samples] == [Verdict.IDENTICAL] * len(samples)
        assert all(
            sample.psnr is None and sample.ssim == 1 and sample.bound is None for sample in samples
        )
    elif folder.name == "bf16_save_f32":  # the bound of test_goldens.py
        assert all(
            sample.comparison is not None and sample.comparison.max_difference <= 12
            for sample in samples
        )
    else:
        assert {sample.verdict for sample in samples} <= {Verdict.IDENTICAL, Verdict.ROUNDING}
        assert all(
            sample.bound == MACHINE for sample in samples if sample.verdict is Verdict.ROUNDING
        )


@pytest.mark.skipif(
    not SAME_PROCESSOR,
    reason="the goldens were made on AMD's with AVX-512; other processors round differently",
)
def test_what_rounding_explains_is_called_rounding_with_its_bound(engine):
    samples = checked(GOLDEN_JOBS / "lora_conv_f16", engine) + checked(
        GOLDEN_JOBS / "checkpoints_jpg", engine, "all"
    )
    assert overall(samples) is Verdict.ROUNDING
    assert [sample.verdict for sample in samples if sample.plan.step == 0] == [
        Verdict.IDENTICAL
    ] * 3
    for sample in samples:
        if sample.verdict is Verdict.ROUNDING:
            assert sample.bound is not None
            assert sample.comparison is not None
            assert sample.bound.allows(sample.comparison)
            assert "saved as F16" in sample.bound.reason
            assert sample.psnr is not None
            assert sample.psnr > 50
            assert 0.999 < sample.ssim < 1


def test_a_wrong_setting_is_no_rounding_even_where_much_is_forgiven(engine, copy):
    """The adapter of this job was saved in fp16 and its previews as jpg: the widest bounds there are."""
    folder = copy(
        GOLDEN_JOBS / "checkpoints_jpg",
        lambda process: process["sample"].update(guidance_scale=6.5),
    )
    assert checked(folder, engine)[0].verdict is Verdict.MISMATCH


# --- what there is to check --------------------------------------------------------------------------------------------


def test_the_steps_that_can_be_checked():
    job = read_run(GOLDEN_JOBS / "checkpoints_jpg")
    assert steps_to_check(job, "all") == [0, 2, 4, 6, 8]
    assert steps_to_check(job, "last") == [8]
    assert steps_to_check(job, "4") == [4]
    assert unchecked(job) == []
    with pytest.raises(
        NothingToCheckError, match="those with previews and weights are: 0, 2, 4, 6, 8"
    ):
        steps_to_check(job, "5")
    with pytest.raises(JobFolderError, match="give a number, last or all"):
        steps_to_check(job, "first")


def test_partial_folders(copy):
    folder = copy(GOLDEN_JOBS / "checkpoints_jpg")
    (folder / "checkpoints_jpg_000000004.safetensors").unlink()
    for path in (folder / "samples").glob("*_000000006_*"):
        path.unlink()
    shutil.copyfile(
        next((folder / "samples").glob("*_000000008_0.jpg")),
        folder / "samples" / "1__000000008_3.jpg",
    )
    job = read_run(folder)
    assert steps_to_check(job, "all") == [0, 2, 8]
    assert unchecked(job) == [
        "Previews of step 4 are there, and its weights are not.",
        "The weights of step 6 are there, and no previews.",
        "Previews of sample 3 are there, and the configuration has 3 samples.",
    ]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert steps_to_check(read_run(folder), "all") == [0]  # the base model alone
    for path in (folder / "samples").glob("*_000000000_*"):
        path.unlink()
    with pytest.raises(NothingToCheckError, match="weights of none of them"):
        steps_to_check(read_run(folder), "last")
    shutil.rmtree(folder / "samples")
    with pytest.raises(NothingToCheckError, match="no previews"):
        steps_to_check(read_run(folder), "last")


# --- the doctor --------------------------------------------------------------------------------------------------------


def diagnosis_of(folder: Path, engine: Engine, base: str = BASE) -> tuple[str, float, str]:
    samples = checked(folder, engine, base=base)
    assert overall(samples) is Verdict.MISMATCH
    found = diagnose(read_run(folder), samples, engine)
    assert found.cause in CAUSES
    assert found.fix.endswith(".")
    return found.cause, found.explains, found.fix


@pytest.mark.parametrize(
    ("cause", "change", "words"),
    [
        ("sampler", lambda p: p["sample"].update(sampler="ddim"), "sample.sampler to ddpm"),
        ("guidance", lambda p: p["sample"].update(guidance_scale=9), "guidance_scale to 6"),
        ("steps", lambda p: p["sample"].update(sample_steps=19), "sample_steps to 25"),
        ("seed", lambda p: p["sample"].update(seed=44), "seed was 42"),
        ("trigger", lambda p: p.update(trigger_word=None), "'sks'"),
        ("trigger", lambda p: p.update(trigger_word="wrong"), "'sks'"),
        (
            "multiplier",
            lambda p: p["sample"].update(network_multiplier=0.6),
            "network_multiplier to 1",
        ),
        ("dtype", lambda p: p["train"].update(dtype="bf16"), "float32"),
        ("size", lambda p: p["sample"].update(width=128), "--w 64"),
    ],
)
def test_a_job_with_a_wrong_setting_is_seen_through(engine, copy, cause, change, words):
    found, explains, fix = diagnosis_of(copy(change=change), engine)
    assert (found, explains) == (cause, 1.0)
    assert words in fix


def repaint(
    folder: Path,
    engine: Engine,
    change: Callable[[Any], Any] = lambda recipe: recipe,
    **options: Any,
) -> None:
    """Put other images in the place of the last previews."""
    job = read_run(folder)
    for plan in plan_samples(job, job.steps, base_model=BASE):
        assert plan.preview is not None
        Image.fromarray(
            engine.generate(change(plan.recipe), scheduler_options=options).pixels
        ).save(plan.preview)


def test_previews_of_other_programs_are_seen_through(engine, copy):
    folder = copy()
    repaint(folder, engine, steps_offset=0)
    assert diagnosis_of(folder, engine)[:2] == ("steps_offset", 1.0)
    repaint(folder, engine, lambda recipe: replace(recipe, adapters=()))
    assert diagnosis_of(folder, engine)[:2] == ("adapter_not_applied", 1.0)
    repaint(
        folder,
        engine,
        lambda recipe: replace(recipe, prompt="something else entirely", seed=99_999),
    )
    assert diagnosis_of(folder, engine)[0] == "unknown"


def test_a_sampler_of_sdxl_with_the_other_offset_is_seen_through(engine, copy):
    """The base's own configuration has 1, which is what one gets by building on that; SDXL previews have 0."""
    folder = copy(GOLDEN_JOBS / "xl_lora_linear_f32")
    job = read_run(folder)
    for plan in plan_samples(job, job.steps, base_model=str(TINY_SDXL)):
        assert plan.preview is not None
        Image.fromarray(
            engine.generate(plan.recipe, scheduler_options={"steps_offset": 1}).pixels
        ).save(plan.preview)
    found, explains, fix = diagnosis_of(folder, engine, str(TINY_SDXL))
    assert (found, explains) == ("steps_offset", 1.0)
    assert "Set steps_offset to 0" in fix


def test_the_smallest_wrong_setting_is_seen_through_where_most_is_forgiven(engine, copy):
    folder = copy(GOLDEN_JOBS / "checkpoints_jpg")
    repaint(folder, engine, steps_offset=0)
    assert diagnosis_of(folder, engine)[:2] == ("steps_offset", 1.0)


def test_noise_of_an_older_torch_is_seen_through(engine, copy):
    folder = copy(GOLDEN_JOBS / "bf16_save_f32")
    repaint(folder, engine, lambda recipe: replace(recipe, noise="legacy"))
    assert diagnosis_of(folder, engine)[:2] == ("noise", 1.0)


def test_another_variant_of_the_base_is_seen_through(engine, copy, tmp_path):
    base = Path(shutil.copytree(TINY_BASE, tmp_path / "base"))
    for name in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        shutil.copyfile(base / f"{name}.safetensors", base / f"{name}.fp16.safetensors")
    change_weights(
        base / "unet" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"] * 1.1},
    )
    found, explains, fix = diagnosis_of(copy(), engine, str(base))
    assert (found, explains) == ("base_variant", 1.0)
    assert "--variant fp16" in fix


# --- the report --------------------------------------------------------------------------------------------------------


def test_the_report_has_everything_in_it_and_nothing_from_elsewhere(engine, copy):
    folder = copy(
        change=lambda process: process["sample"]["samples"].__setitem__(
            0, {"prompt": "<script>alert(1)</script>"}
        )
    )
    samples = checked(folder, engine)
    document = {"job": "<b>job</b>", "verdict": "mismatch", "base_model": "x", "versions": {}, "settings": {},
                "doctor": {"cause": "trigger", "explains": 1.0, "fix": "<i>"}}  # fmt: skip
    page = html_report(document, samples)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>job" not in page
    assert "<i>" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png") == 5 * len(samples)
    assert page.count("type=range") == len(samples)
    assert json.dumps({}) in page
