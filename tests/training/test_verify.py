"""Verdicts on real training runs, and diagnoses of runs with deliberate mistakes."""

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
    GOLDEN_JOBS,
    SAME_PROCESSOR,
    TINY_BASE,
    TINY_SDXL,
    change_weights,
)

from fidelora import Engine
from fidelora.errors import NothingToCheckError, TrainingRunError
from fidelora.training.doctor import CAUSES, diagnose
from fidelora.training.evidence import Verdict
from fidelora.training.plan import plan_samples
from fidelora.training.report import html_report
from fidelora.training.run_folder import read_run
from fidelora.training.selection import incomplete_parts, steps_to_check
from fidelora.training.verify import CheckedSample, verify, worst_verdict

pytestmark = [
    pytest.mark.usefixtures("golden_threads"),
    pytest.mark.timeout(600),
]
LORA_RUN = GOLDEN_JOBS / "lora_linear_f32"
IDENTICAL = [
    "lokr_full",
    "multipliers",
]
BASE = str(TINY_BASE)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a run folder and changes its configuration."""

    def make(
        source: Path = LORA_RUN, change: Callable[[dict[str, Any]], None] = lambda process: None
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
    run = read_run(folder)
    return verify(run, engine, steps_to_check(run, step), base_model=base)


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder",
    [LORA_RUN, *(GOLDEN_JOBS / name for name in IDENTICAL)],
    ids=lambda folder: folder.name,
)
def test_exact_samples_are_replayed_exactly(engine, folder):
    """The pixels are equal on a processor like the trainer's; others may round differently.

    The pixels of all golden runs are compared in test_goldens.py.
    """
    samples = checked(folder, engine)
    if SAME_PROCESSOR:
        assert [sample.verdict for sample in samples] == [Verdict.IDENTICAL] * len(samples)
        assert all(
            sample.psnr is None and sample.ssim == 1 and sample.evidence is None
            for sample in samples
        )
    else:
        assert {sample.verdict for sample in samples} <= {Verdict.IDENTICAL, Verdict.ROUNDING}
        assert all(sample.evidence is None for sample in samples)


@pytest.mark.skipif(
    not SAME_PROCESSOR,
    reason="the goldens were made on AMD's with AVX-512; other processors round differently",
)
def test_differences_of_half_precision_files_are_rounding(engine):
    samples = checked(GOLDEN_JOBS / "lora_conv_f16", engine)
    for step in ("0", "4"):  # each image after step 0 needs eight others for its verdict
        samples += checked(GOLDEN_JOBS / "checkpoints_jpg", engine, step)
    assert worst_verdict(samples) is Verdict.ROUNDING
    assert [sample.verdict for sample in samples if sample.plan.step == 0] == [
        Verdict.IDENTICAL
    ] * 3
    for sample in samples:
        if sample.verdict is Verdict.ROUNDING:
            assert sample.psnr is not None
            assert sample.psnr > 50
            assert 0.999 < sample.ssim < 1


def test_a_wrong_setting_is_a_mismatch_despite_lost_digits(engine, copy):
    """The adapter was saved in fp16 and the samples as jpg, after five rounds of samples."""
    folder = copy(
        GOLDEN_JOBS / "checkpoints_jpg",
        lambda process: process["sample"].update(guidance_scale=6.5),
    )
    assert checked(folder, engine)[0].verdict is Verdict.MISMATCH


# --- steps to check -------------------------------------------------------------------------------


def test_steps_with_samples_and_weights_can_be_checked():
    run = read_run(GOLDEN_JOBS / "checkpoints_jpg")
    assert steps_to_check(run, "all") == [0, 2, 4, 6, 8]
    assert steps_to_check(run, "last") == [8]
    assert steps_to_check(run, "4") == [4]
    assert incomplete_parts(run) == []
    with pytest.raises(NothingToCheckError, match="steps with samples and weights: 0, 2, 4, 6, 8"):
        steps_to_check(run, "5")
    with pytest.raises(TrainingRunError, match="set a number, last or all"):
        steps_to_check(run, "first")


def test_steps_without_samples_or_weights_are_named_and_left_out(copy):
    folder = copy(GOLDEN_JOBS / "checkpoints_jpg")
    (folder / "checkpoints_jpg_000000004.safetensors").unlink()
    for path in (folder / "samples").glob("*_000000006_*"):
        path.unlink()
    shutil.copyfile(
        next((folder / "samples").glob("*_000000008_0.jpg")),
        folder / "samples" / "1__000000008_3.jpg",
    )
    run = read_run(folder)
    assert steps_to_check(run, "all") == [0, 2, 8]
    assert incomplete_parts(run) == [
        "Step 4 has samples but no checkpoint.",
        "Step 6 has a checkpoint but no samples.",
        "The folder has images of sample 3, but the configuration has only 3 samples, counted from "
        "0.",
    ]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert steps_to_check(read_run(folder), "all") == [0]  # the base model alone
    for path in (folder / "samples").glob("*_000000000_*"):
        path.unlink()
    with pytest.raises(NothingToCheckError, match="but no checkpoint of these steps"):
        steps_to_check(read_run(folder), "last")
    shutil.rmtree(folder / "samples")
    with pytest.raises(NothingToCheckError, match="nothing to compare with"):
        steps_to_check(read_run(folder), "last")


# --- the doctor -----------------------------------------------------------------------------------


def one_short_sample(process: dict[str, Any]) -> None:
    """Keep one sample, with few steps, because the doctor makes up to a hundred images of it."""
    process["sample"].update(samples=[{"prompt": "[trigger] a photo of a ball"}], sample_steps=3)


def diagnosis_of(folder: Path, engine: Engine, base: str = BASE) -> tuple[str, float, str]:
    samples = checked(folder, engine, base=base)
    assert worst_verdict(samples) is Verdict.MISMATCH
    found = diagnose(read_run(folder), samples, engine)
    assert found.cause in CAUSES
    assert found.fix.endswith(".")
    return found.cause, found.explains, found.fix


@pytest.mark.parametrize(
    ("cause", "change", "words"),
    [
        ("sampler", lambda p: p["sample"].update(sampler="ddim"), "sample.sampler to ddpm"),
        ("steps", lambda p: p["sample"].update(sample_steps=3), "sample_steps to 25"),
        ("seed", lambda p: p["sample"].update(seed=44), "seed was 42"),
        ("trigger", lambda p: p.update(trigger_word=None), "'sks'"),
        ("trigger", lambda p: p.update(trigger_word="wrong"), "'sks'"),
        (
            "multiplier",
            lambda p: p["sample"].update(network_multiplier=0.6),
            "network_multiplier to 1",
        ),
        ("size", lambda p: p["sample"].update(width=128), "--w 64"),
    ],
    ids=["sampler", "steps", "seed", "no trigger", "another trigger", "multiplier", "size"],
)
def test_a_wrong_setting_of_a_run_is_diagnosed(engine, copy, cause, change, words):
    found, explains, fix = diagnosis_of(copy(change=change), engine)
    assert (found, explains) == (cause, 1.0)
    assert words in fix


def test_a_wrong_dtype_of_a_run_is_diagnosed(engine, copy):
    """Use one small sample of 9 steps, because its verdict needs eight images in bfloat16."""

    def change(process: dict[str, Any]) -> None:
        process["train"].update(dtype="bf16")
        process["sample"]["samples"] = process["sample"]["samples"][1:2]

    folder = copy(change=change)
    for path in (folder / "samples").iterdir():
        if path.stem.endswith("_1"):
            path.rename(path.with_stem(f"{path.stem[:-2]}_0"))
    found, explains, fix = diagnosis_of(folder, engine)
    assert (found, explains) == ("dtype", 1.0)
    assert "float32" in fix


def replace_samples(
    folder: Path,
    engine: Engine,
    change: Callable[[Any], Any] = lambda recipe: recipe,
    **options: Any,
) -> None:
    """Replace the last samples with images of other settings."""
    run = read_run(folder)
    for plan in plan_samples(run, run.steps, base_model=BASE):
        assert plan.trainer_image is not None
        Image.fromarray(
            engine.generate(change(plan.recipe), scheduler_options=options).pixels
        ).save(plan.trainer_image)


def test_a_wrong_guidance_scale_is_diagnosed(engine, copy):
    folder = copy(change=one_short_sample)
    replace_samples(folder, engine, lambda recipe: replace(recipe, guidance_scale=9))
    found, explains, fix = diagnosis_of(folder, engine)
    assert (found, explains) == ("guidance", 1.0)
    assert "guidance_scale to 9" in fix


def test_samples_of_other_programs_are_diagnosed(engine, copy):
    folder = copy(change=one_short_sample)
    replace_samples(folder, engine, steps_offset=0)
    assert diagnosis_of(folder, engine)[:2] == ("steps_offset", 1.0)
    replace_samples(folder, engine, lambda recipe: replace(recipe, adapters=()))
    assert diagnosis_of(folder, engine)[:2] == ("adapter_not_applied", 1.0)
    replace_samples(
        folder,
        engine,
        lambda recipe: replace(recipe, prompt="something else entirely", seed=99_999),
    )
    assert diagnosis_of(folder, engine)[0] == "unknown"


def test_a_wrong_steps_offset_of_sdxl_is_diagnosed(engine, copy):
    """SDXL samples use 0, but the base model's own configuration has 1."""
    folder = copy(GOLDEN_JOBS / "xl_lora_linear_f32")
    run = read_run(folder)
    for plan in plan_samples(run, run.steps, base_model=str(TINY_SDXL)):
        assert plan.trainer_image is not None
        Image.fromarray(
            engine.generate(plan.recipe, scheduler_options={"steps_offset": 1}).pixels
        ).save(plan.trainer_image)
    found, explains, fix = diagnosis_of(folder, engine, str(TINY_SDXL))
    assert (found, explains) == ("steps_offset", 1.0)
    assert "Set steps_offset to 0" in fix


def test_the_smallest_mistake_is_diagnosed_despite_lost_digits(engine, copy):
    folder = copy(GOLDEN_JOBS / "checkpoints_jpg")
    replace_samples(folder, engine, steps_offset=0)
    assert diagnosis_of(folder, engine)[:2] == ("steps_offset", 1.0)


def test_noise_of_an_older_torch_is_diagnosed(engine, copy):
    folder = copy(GOLDEN_JOBS / "bf16_save_f32", one_short_sample)
    replace_samples(folder, engine, lambda recipe: replace(recipe, noise="legacy"))
    assert diagnosis_of(folder, engine)[:2] == ("noise", 1.0)


def test_another_variant_of_the_base_model_is_diagnosed(engine, copy, tmp_path):
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


# --- the report -----------------------------------------------------------------------------------


def test_the_report_is_self_contained_and_escapes_html(engine, copy):
    folder = copy(
        change=lambda process: process["sample"]["samples"].__setitem__(
            0, {"prompt": "<script>alert(1)</script>"}
        )
    )
    samples = checked(folder, engine)
    document = {
        "job": "<b>job</b>",
        "verdict": "mismatch",
        "base_model": "x",
        "base_sha256": "",
        "versions": {},
        "settings": {},
        "doctor": {"cause": "trigger", "explains": 1.0, "fix": "<i>"},
    }
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
    assert all(f"section.{verdict.value} " in page for verdict in Verdict)
