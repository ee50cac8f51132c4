"""`fidelora recipe`: the settings of samples as recipes and requests."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from tests.cli.training_support import RUN
from tests.support import GOLDEN_JOBS, LORA, SDXL_DORA, TINY_SDXL

from fidelora.api import InferenceRequest, check_request, recipes_of
from fidelora.recipe import AdapterRef
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("golden_threads")


def test_recipe_names_a_base_that_is_on_another_machine(fidelora, copy_run):
    folder = copy_run(lambda process: process["model"].update(name_or_path="/gone/base"))
    code, _, err = fidelora("recipe", str(folder))
    assert code == 0
    assert "serve --base-model sd15=BASE`, where BASE is the base model of the run" in err
    assert "the trainer's name of it, /gone/base, was not found on this machine" in err


def test_recipe_names_the_base_of_the_family(fidelora, copy_run):
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    folder = copy_run(lambda process: process["model"].update(name_or_path=name))
    code, _, err = fidelora("recipe", str(folder))
    assert code == 0
    assert f"serve --base-model sd15={name}` and" in err


def test_recipe_names_the_bundled_base_of_the_demo(fidelora):
    folder = Path(str(files("fidelora"))) / "demo_data" / "zrk_fp32"
    code, _, err = fidelora("recipe", str(folder))
    assert code == 0
    assert "--base-model sd15=fidelora:miniature` and" in err


def test_recipe_prints_the_settings_of_a_quantised_run(fidelora):
    code, out, err = fidelora("recipe", str(GOLDEN_JOBS / "zimage_turbo_quantized_save_f32"))
    assert code == 0
    assert "where ADAPTER is your copy of golden/tiny-zimage-adapter.safetensors, and" in err
    for variable in (
        "FIDELORA_DTYPE=bfloat16",
        "FIDELORA_QUANTIZATION=float8",
        "FIDELORA_TEXT_ENCODER_QUANTIZATION=qfloat8",
        "FIDELORA_TRAINING_ADAPTER=zimage_turbo=ADAPTER",
    ):
        assert variable in err
    assert "its images will differ" not in err
    assert "several multipliers" not in err
    assert json.loads(out)["model"] == "zimage_turbo"


def test_recipe_prints_a_request(fidelora):
    code, out, err = fidelora("recipe", str(RUN), "--index", "1")
    assert code == 0
    # It looks like a hub id, but is the path of the machine where the run was trained.
    assert "serve --base-model sd15=BASE`, where BASE is the base model of the run" in err
    assert "the trainer's name of it, golden/tiny-sd15, was not found" in err
    assert "FIDELORA_DTYPE=float32" in err
    body = json.loads(out)
    assert body["loras"] == [{"path": LORA.name, "sha256": AdapterRef.from_file(LORA).sha256}]
    (item,) = body["prompts"]
    assert item == {
        "prompt": "a red ball on grass",
        "neg": "ugly",
        "width": 80,
        "height": 64,
        "guidance_scale": 4.5,
        "sample_steps": 9,
        "sampler": "ddpm",
        "seed": 7,
        "network_multiplier": 1.0,
    }
    check_request(InferenceRequest.model_validate(body))


def test_a_request_for_all_samples_keeps_the_lora_unmerged(fidelora):
    folder = str(GOLDEN_JOBS / "multipliers")
    code, out, err = fidelora("recipe", folder, "--lora", "mine/sks.safetensors")
    assert (code, "warning" in err) == (0, False)
    body = InferenceRequest.model_validate_json(out)
    assert body.loras[0].path == "mine/sks.safetensors"
    made = recipes_of(body, [AdapterRef("a" * 64)], {}, draw_seed=lambda: 0)
    assert {recipe.adapter_mode for recipe in made} == {"live"}
    assert "Leave out --index" in fidelora("recipe", folder, "--index", "0")[2]


def test_the_base_model_is_requested_with_multiplier_0(fidelora):
    code, out, _ = fidelora(
        "recipe", str(GOLDEN_JOBS / "checkpoints_jpg"), "--step", "0", "--index", "0"
    )
    assert code == 0
    assert json.loads(out)["prompts"][0]["network_multiplier"] == 0.0


def test_invalid_requests_exit_with_2(fidelora, copy_run):
    assert fidelora("recipe", str(RUN), "--index", "3")[0] == 2
    assert fidelora("recipe", str(RUN), "--step", "5")[0] == 2
    assert fidelora("recipe", str(RUN), "--step", "none")[0] == 2
    folder = copy_run(lambda process: process["sample"].update(guidance_scale=33))
    code, out, err = fidelora("recipe", str(folder))
    assert (code, out) == (2, "")
    assert "guidance_scale 33" in err
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "has no checkpoints" in fidelora("recipe", str(folder))[2]


def test_the_request_for_an_sdxl_run_gives_its_recipes(fidelora, copy_run):
    folder = copy_run(lambda process: process["network"].update(linear_alpha=4), SDXL_DORA.parent)
    code, out, err = fidelora("recipe", str(folder))
    body = InferenceRequest.model_validate_json(out)
    check_request(body)
    adapter = AdapterRef.from_file(SDXL_DORA)
    recipes = recipes_of(body, (adapter,), {"base_model": str(TINY_SDXL)}, draw_seed=lambda: 0)
    planned = [plan.recipe for plan in plan_samples(read_run(folder), 6, base_model=str(TINY_SDXL))]
    assert (code, list(recipes)) == (0, planned)
    assert {recipe.adapters[0].alpha for recipe in recipes} == {4.0}
    assert "fidelora serve --base-model sdxl=BASE" in err
