"""Wan 2.2: two transformers, and adapters for one of them.

Its golden training runs are in tests/training.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import UserCpuOffloadHook
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file
from tests.support import (
    GOLDEN_JOBS,
    TINY_WAN21,
    TINY_WAN22,
    WAN22_HIGH,
    WAN22_LOW,
    load_model_of,
    save_adapter,
)
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fidelora import AdapterRef, Engine, Recipe
from fidelora.accel.offload import place_parts
from fidelora.api import InferenceRequest, recipes_of
from fidelora.api.recipes import request_for
from fidelora.cli import app
from fidelora.errors import AdapterMismatchError, BaseModelFilesError, RecipeError
from fidelora.families import get_family
from fidelora.jobs.codec import document_of
from fidelora.training.notes import notes_on
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

SMALL = Recipe(
    model="wan22_14b_t2v", prompt="a red ball", negative_prompt="blurry",
    base_model=str(TINY_WAN22), width=64, height=80, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip
HIGH, LOW = AdapterRef.from_file(WAN22_HIGH), AdapterRef.from_file(WAN22_LOW)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.mark.parametrize("steps", [1, 4])
def test_a_frame_has_the_pixels_of_the_diffusers_pipeline(engine, steps):
    recipe = replace(SMALL, steps=steps)
    parts = load_model_of(recipe).parts
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TINY_WAN22 / "tokenizer"),
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=parts["transformer"],
        transformer_2=parts["transformer_2"],
        boundary_ratio=0.875,
    )
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        prompt=recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        width=recipe.width,
        height=recipe.height,
        num_frames=1,
        num_inference_steps=steps,
        guidance_scale=recipe.guidance_scale,
        generator=torch.Generator().manual_seed(recipe.seed),
        output_type="np",
    ).frames[0]
    expected = (video[0] * 255).round().astype(np.uint8)
    assert np.array_equal(engine.generate(recipe).pixels, expected)


def test_the_name_of_a_file_names_the_stage():
    recipe = replace(SMALL, adapters=(HIGH, LOW))
    assert [ref.stage for ref in recipe.adapters] == ["high", "low"]
    assert Recipe.from_json(recipe.to_json()).adapters == recipe.adapters
    swapped = replace(recipe, adapters=(replace(HIGH, stage="low"), LOW))
    assert swapped != recipe
    for name in ("lora", "high_noise_low_noise"):
        with pytest.raises(RecipeError, match="does not name one of them"):
            replace(SMALL, adapters=(replace(HIGH, name=name),))
    assert replace(HIGH, name="a-Low noise").named_stage == "low"


def test_other_families_have_no_stages():
    recipe = Recipe(model="wan21_1b", prompt="a", base_model=str(TINY_WAN21))
    assert replace(recipe, adapters=(HIGH,)).adapters[0].stage is None
    with pytest.raises(RecipeError, match="has one denoiser; leave stage out"):
        replace(recipe, adapters=(replace(HIGH, stage="high"),))


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_an_adapter_changes_the_transformer_of_its_stage(engine, mode):
    recipe = replace(SMALL, adapter_mode=mode)

    def pixels(*refs):
        return engine.generate(replace(recipe, adapters=refs)).pixels.tobytes()

    images = [pixels(), pixels(HIGH), pixels(LOW), pixels(HIGH, LOW), pixels(LOW, HIGH)]
    assert images[3] == images[4]
    assert len({*images}) == 4
    # In a single step, at timestep 1000, only the transformer for high noise computes.
    one_step = replace(recipe, steps=1)
    plain, low = one_step, replace(one_step, adapters=(LOW,))
    assert np.array_equal(engine.generate(plain).pixels, engine.generate(low).pixels)


def test_swapped_files_get_a_warning(engine):
    recipe = replace(SMALL, steps=1, adapters=(HIGH, LOW))
    assert engine.generate(recipe).warnings == ()
    swapped = (replace(HIGH, stage="low"), replace(LOW, stage="high"))
    warnings = engine.generate(replace(recipe, adapters=swapped)).warnings
    assert len([one for one in warnings if "may be swapped" in one]) == 2


def test_an_adapter_of_wan_21_is_refused_by_name(engine):
    path = GOLDEN_JOBS / "wan21_lora_f32" / "wan21_lora_f32.safetensors"
    ref = replace(AdapterRef.from_file(path), stage="high")
    with pytest.raises(AdapterMismatchError, match=r"adapter for Wan 2\.1"):
        engine.generate(replace(SMALL, adapters=(ref,)))


@pytest.mark.parametrize(
    ("model", "base", "named"),
    [
        ("wan21_1b", TINY_WAN22, "base model of Wan 2.2 14B, not of Wan 2.1 1.3B"),
        ("wan22_14b_t2v", TINY_WAN21, "base model of Wan 2.1 1.3B, not of Wan 2.2 14B"),
    ],
)
def test_the_base_of_the_other_version_is_refused(engine, model, base, named):
    with pytest.raises(BaseModelFilesError, match=named):
        engine.load(replace(SMALL, model=model, base_model=str(base)))


def test_an_absent_second_transformer_is_none(engine, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_WAN21, base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "transformer_2": [None, None]}))
    engine.load(replace(SMALL, model="wan21_1b", base_model=str(base)))


def test_one_transformer_at_a_time_is_on_the_device(monkeypatch):
    names = [part.name for part in get_family(SMALL.model).parts]
    modules = {name: torch.nn.Linear(2, 2) for name in names}
    place_parts(modules.values(), torch.device("cpu"), "model")
    moved_away = []
    monkeypatch.setattr(
        UserCpuOffloadHook, "offload", lambda hook: moved_away.append(id(hook.model))
    )
    modules["transformer"].to("meta")  # stands for the accelerator
    modules["transformer_2"](torch.zeros(1, 2))
    assert moved_away == [id(modules["transformer"])]


def test_a_request_names_the_transformer_of_each_lora():
    body = {
        "model": "wan22_14b_t2v",
        "loras": [
            {"path": "a.safetensors", "transformer": "low"},
            {"path": "b.safetensors", "transformer": "high", "network_multiplier": 0.5},
        ],
        "prompts": [{"prompt": "a ball", "width": 112, "height": 100, "num_frames": 1}],
    }
    refs = (replace(LOW, name="a"), replace(HIGH, name="b"))
    (recipe,) = recipes_of(InferenceRequest.model_validate(body), refs, {}, lambda: 0)
    assert [(ref.stage, ref.multiplier) for ref in recipe.adapters] == [("low", 1), ("high", 0.5)]
    assert (recipe.width, recipe.height) == (96, 96)  # multiples of 32, as documented
    again = request_for([recipe], ["a.safetensors", "b.safetensors"])
    assert [lora["transformer"] for lora in again["loras"]] == ["low", "high"]


def test_a_run_may_have_trained_one_stage_only(tmp_path):
    folder = tmp_path / "wan22_lora_f32"
    shutil.copytree(GOLDEN_JOBS / "wan22_lora_f32", folder)
    earlier = folder / "wan22_lora_f32_000000003_high_noise.safetensors"
    shutil.copy(folder / WAN22_HIGH.name, earlier)
    (folder / WAN22_LOW.name).unlink()
    run = read_run(folder)
    assert sorted(run.checkpoints) == [3, 6]
    plan = plan_samples(run, 6, base_model=str(TINY_WAN22))[1]
    assert [(ref.name, ref.stage) for ref in plan.recipe.adapters] == [(WAN22_HIGH.stem, "high")]
    assert (plan.recipe.width, plan.recipe.height) == (96, 64)  # multiples of 16, as the trainer's


@pytest.mark.parametrize(("release", "is_older"), [("0.10.21", True), ("0.10.22", False)])
def test_older_trainers_quantised_all_layers(tmp_path, release, is_older):
    run = Path(shutil.copytree(GOLDEN_JOBS / "wan22_low_quant", tmp_path / "wan22_low_quant"))
    assert notes_on(read_run(run)) == []
    file = run / "wan22_low_quant_low_noise.safetensors"
    software = f'{{"name": "ai-toolkit", "version": "{release}"}}'
    metadata = {"software": software, "training_info": '{"step": 6}'}
    save_adapter(file, load_file(GOLDEN_JOBS / run.name / file.name), **metadata)
    notes = notes_on(read_run(run))
    if is_older:
        (note,) = notes
        assert "before 0.10.22 also quantised the layers condition_embedder*, proj_out*" in note
    else:
        assert notes == []


def test_both_adapters_of_a_run_are_in_its_history(tmp_path):
    folder = tmp_path / "wan22_lora_f32"
    shutil.copytree(GOLDEN_JOBS / "wan22_lora_f32", folder)
    for file in (WAN22_HIGH, WAN22_LOW):
        name = file.name.replace("f32_", "f32_000000003_", 1)
        shutil.copy(file, folder / name)
    for image in list((folder / "samples").iterdir()):
        shutil.copy(image, image.with_name(image.name.replace("000000006", "000000003")))
    recipe = plan_samples(read_run(folder), 6, base_model=str(TINY_WAN22))[0].recipe
    assert [ref.stage for ref in recipe.history] == ["high", "low"]


def test_the_stage_is_part_of_a_stored_job():
    from tests.jobs.store_support import job

    stored = replace(job(), recipes=(replace(SMALL, adapters=(HIGH,)),))
    assert document_of(stored)["recipes"][0]["adapters"][0]["stage"] == "high"


@pytest.mark.parametrize(
    ("name", "stage", "row"),
    [
        ("a_low_noise", "low", "low noise, by the file name"),
        ("a", None, "unknown: the file name contains neither"),
    ],
)
def test_inspect_shows_the_stage(tmp_path, name, stage, row):
    file = shutil.copy(WAN22_LOW, tmp_path / f"{name}.safetensors")
    options = ["inspect", str(file), "--base-model", str(TINY_WAN22)]
    assert row in CliRunner().invoke(app, options).output
    document = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert (document["model"], document["stage"]) == ("wan22_14b_t2v", stage)
