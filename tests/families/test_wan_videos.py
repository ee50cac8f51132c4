"""Videos of Wan: frames, files, schedules of older trainers, and the report."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from PIL import Image, ImageSequence
from tests.support import GOLDEN_JOBS, TINY_WAN21, load_model_of
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fidelora import Engine, Recipe
from fidelora.cli import app
from fidelora.errors import ImageFormatError, NothingToCheckError, RecipeError
from fidelora.explain.align import align
from fidelora.explain.reading import Reading
from fidelora.images.read import read_origin
from fidelora.training.compare import compare, decoded_frames, reencode
from fidelora.training.doctor import diagnose
from fidelora.training.evidence import Verdict
from fidelora.training.grid import frame_strip
from fidelora.training.plan import plan_samples
from fidelora.training.report import html_report
from fidelora.training.run_folder import read_run
from fidelora.training.verify import check_sample, verify

VIDEO = Recipe(
    model="wan21_1b", prompt="a red ball", negative_prompt="blurry", base_model=str(TINY_WAN21),
    width=64, height=80, steps=3, guidance_scale=3.5, seed=11, frames=9, fps=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture(scope="module")
def video(engine):
    return engine.generate(VIDEO)


def pipeline_frames(recipe: Recipe, scheduler: Any) -> Any:
    """Return the frames of diffusers' pipeline, uint8 RGB [frames, height, width, 3]."""
    parts: Any = load_model_of(recipe).parts
    parts["vae"].use_tiling = recipe.vae_tiling
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TINY_WAN21 / "tokenizer"),
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=scheduler,
        transformer=parts["transformer"],
    )
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        width=recipe.width,
        height=recipe.height,
        num_frames=recipe.frames,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        generator=torch.Generator().manual_seed(recipe.seed),
        output_type="np",
    ).frames[0]
    return (frames * 255).round().astype(np.uint8)


def test_all_frames_are_those_of_the_diffusers_pipeline(video):
    expected = pipeline_frames(VIDEO, FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert np.array_equal(video.all_pixels, expected)
    assert np.array_equal(video.pixels, expected[0])
    assert video.video.shape == (9, 80, 64, 3)


def test_tiles_are_those_of_the_diffusers_pipeline(engine):
    recipe = replace(VIDEO, width=320, height=64, steps=1, frames=5, vae_tiling=True)
    expected = pipeline_frames(recipe, FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert np.array_equal(engine.generate(recipe).video, expected)
    whole = engine.generate(replace(recipe, vae_tiling=False)).video
    assert not np.array_equal(whole, expected)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unipc_is_that_of_the_base_model(engine, steps):
    recipe = replace(VIDEO, sampler="unipc", frames=5, steps=steps)
    config = json.loads((TINY_WAN21 / "scheduler" / "scheduler_config.json").read_text())
    expected = pipeline_frames(recipe, UniPCMultistepScheduler.from_config(config))
    assert np.array_equal(engine.generate(recipe).video, expected)


@pytest.mark.parametrize(
    ("version", "sampler"), [((0, 9, 2), "unipc"), ((0, 9, 3), "flowmatch"), (None, "flowmatch")]
)
def test_trainers_before_0_9_3_sampled_with_unipc(version, sampler):
    run = read_run(GOLDEN_JOBS / "wan21_video_f32").with_settings(trainer_version=version)
    plan = plan_samples(run, 6, base_model=str(TINY_WAN21))[0]
    assert plan.recipe.sampler == sampler


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (3, 1), (4, 5), (5, 5), (41, 41), (43, 41)])
def test_frames_are_rounded_as_in_the_trainer(asked, made):
    assert replace(VIDEO, frames=asked).frames == made


def test_still_images_have_no_frame_rate():
    still = replace(VIDEO, frames=1)
    assert still.fps == 16
    assert not {"frames", "fps"} & still.to_dict().keys()
    assert {"frames": 9, "fps": 8}.items() <= VIDEO.to_dict().items()
    assert replace(VIDEO, fps=9).digest != VIDEO.digest


@pytest.mark.parametrize("field", ["frames", "fps"])
def test_frames_are_within_their_limits(field):
    for value in (0, 1002, 2.5):
        wrong: Any = {field: value}
        with pytest.raises(RecipeError, match=field):
            replace(VIDEO, **wrong)
    with pytest.raises(RecipeError, match="does not use frames"):
        Recipe(prompt="a", frames=5)


def test_the_file_is_the_trainers_and_contains_the_recipe(video):
    content = video.encode("webp")
    with Image.open(io.BytesIO(content)) as image:
        assert len(list(ImageSequence.Iterator(image))) == 9
        assert image.info["loop"] == 0
        image.seek(1)
        image.load()
        assert image.info["duration"] == 125
    origin = read_origin(content)
    assert origin.recipe is not None
    assert (origin.recipe.frames, origin.recipe.fps, origin.quality) == (9, 8, None)
    assert read_origin(video.encode("webp", 50)).quality == 50
    for kind in ("png", "jpeg"):
        with pytest.raises(ImageFormatError, match="A video of 9 frames"):
            video.encode(kind)


def test_a_preview_has_the_size_of_the_latents(engine):
    shapes = []
    engine.generate(VIDEO, lambda progress: shapes.append(progress.preview().shape))
    assert shapes == [(10, 8, 3)] * 3


def test_videos_are_compared_frame_by_frame(video):
    encoded = reencode(video.video, "WEBP", 8)
    assert encoded.shape == video.video.shape
    changed = encoded.copy()
    changed[8, 3, 4, 0] ^= 1
    comparison = compare(encoded, changed)
    assert not comparison.identical
    assert comparison.percent_text == "99.99"


def test_the_doctor_names_a_wrong_number_of_frames(engine, tmp_path):
    folder = tmp_path / "wan21_video_f32"
    shutil.copytree(GOLDEN_JOBS / "wan21_video_f32", folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("num_frames: 9", "num_frames: 5"))
    run = read_run(folder)
    plan = plan_samples(run, 6, base_model=str(TINY_WAN21))[0]
    sample = check_sample(plan, engine)
    assert sample.verdict is Verdict.MISMATCH
    assert "64x64 with 9 frames" in sample.summary
    diagnosis = diagnose(run, [sample], engine)
    assert (diagnosis.cause, "num_frames to 9" in diagnosis.fix) == ("size", True)


def test_the_doctor_names_an_older_trainer(engine, tmp_path):
    folder = tmp_path / "wan21_video_f32"
    shutil.copytree(GOLDEN_JOBS / "wan21_video_f32", folder)
    run = read_run(folder)
    plan = plan_samples(run, 6, base_model=str(TINY_WAN21))[1]
    assert plan.trainer_image is not None
    older = engine.generate(replace(plan.recipe, sampler="unipc"))
    plan.trainer_image.write_bytes(older.encode("webp"))
    diagnosis = diagnose(run, [check_sample(plan, engine)], engine)
    assert (diagnosis.cause, diagnosis.explains) == ("trainer_version", 1.0)
    assert "before 0.9.3" in diagnosis.fix


def test_the_report_shows_each_frame(engine):
    run = read_run(GOLDEN_JOBS / "wan21_video_f32")
    (sample,) = verify(run, engine, [6], base_model=str(TINY_WAN21))[1:]
    document = dict.fromkeys(
        ("job", "verdict", "doctor", "base_model", "base_sha256", "versions", "settings"), ""
    )
    page = html_report(document, [sample])
    assert page.count("<img") == 3 * 5
    assert page.count(" hidden>") == 3 * 4
    assert re.search(r"type=range min=0 max=4 ", page)


def test_a_strip_has_the_first_and_the_last_frame(video):
    strip = frame_strip(video.video)
    assert strip.shape == (80, 4 * 64, 3)
    assert np.array_equal(strip[:, :64], video.video[0])
    assert np.array_equal(strip[:, -64:], video.video[-1])
    assert frame_strip(video.pixels) is video.pixels


def test_the_command_line_makes_and_replays_videos(tmp_path, engine, video):
    options = [
        "generate", "a red ball", "--negative", "blurry", "--model", "wan21_1b", "--base-model",
        str(TINY_WAN21), "--size", "64x80", "--steps", "3", "--guidance", "3.5", "--seed", "11",
        "--frames", "9", "--fps", "8", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    made = CliRunner().invoke(app, [*options, "-o", f"{tmp_path}/"])
    assert made.exit_code == 0, made.output
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".webp"
    with Image.open(path) as image, Image.open(io.BytesIO(video.encode("webp"))) as expected:
        assert np.array_equal(decoded_frames(image), decoded_frames(expected))
    again = CliRunner().invoke(
        app, ["replay", str(path), "--compare", "--base-model", str(TINY_WAN21), "--device", "cpu"]
    )
    assert again.exit_code == 0, again.output
    assert "identical: every pixel is the same" in again.output
    for wrong in (["--format", "png"], ["-o", f"{tmp_path}/a.jpg"]):
        result = CliRunner().invoke(app, [*options, *wrong])
        assert "A video of 9 frames cannot be a" in str(result.exception)


def test_pictures_are_not_explained_by_videos():
    run = read_run(GOLDEN_JOBS / "wan21_video_f32")
    with pytest.raises(NothingToCheckError, match="with still images only"):
        align(run, Reading("unknown"), np.zeros((64, 64, 3), np.uint8), base_model=str(TINY_WAN21))
