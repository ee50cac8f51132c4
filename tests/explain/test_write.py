"""Settings written for other programs make pictures at the measured distance from the sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tests.explain.other_programs import OtherProgram, comfyui_noise, cpu_noise, png
from tests.support import GOLDEN_JOBS, SAME_PROCESSOR, TINY_BASE, TINY_ZIMAGE, copy_base

from fidelora import Engine
from fidelora.errors import RecipeError
from fidelora.explain.nearest import NearestPicture, Target, nearest_picture, written_prompt
from fidelora.explain.prompts import comfyui_spans
from fidelora.explain.read_picture import read_picture
from fidelora.explain.simulation import Simulator
from fidelora.explain.write import comfyui_workflow, diffusers_script, infotext, txt2img_body
from fidelora.families.emphasis import spans_of
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import read_run
from fidelora.training.verify import read_trainer_image

pytestmark = pytest.mark.usefixtures("golden_threads")
NAME = "lora_linear_f32"


def plan_of(index: int, base: str = str(TINY_BASE), job: str = NAME) -> PlannedSample:
    return plan_samples(read_run(GOLDEN_JOBS / job), 6, base_model=base)[index]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def nearest(engine: Engine, program: Target, plan: PlannedSample) -> NearestPicture:
    return nearest_picture(plan, program, Simulator(engine, plan.recipe))


def distance(plan: PlannedSample, pixels: np.ndarray) -> float:
    assert plan.trainer_image is not None
    trainer = read_trainer_image(plan.trainer_image)[0]
    return float(np.abs(pixels.astype(int) - trainer).mean())


def test_comfyuis_workflow_has_the_measured_distance(engine):
    plan = plan_of(1)
    found = nearest(engine, "ComfyUI", plan)
    reading = read_picture(png(found.pixels, prompt=json.dumps(comfyui_workflow(found))))
    assert (reading.program, reading.sampler, reading.scheduler) == ("ComfyUI", "euler", "normal")
    assert (reading.seed, reading.steps, reading.guidance_scale) == (7, 9, 4.5)
    assert (reading.width, reading.height) == (plan.recipe.width, plan.recipe.height)
    assert reading.loras is not None
    assert [(one.name, one.strength, one.text_strength) for one in reading.loras] == [(NAME, 1, 1)]
    program = OtherProgram(engine, plan.recipe, whole=True, noise=comfyui_noise)
    pixels = program.picture(sampler="euler", schedule="normal")
    assert distance(plan, pixels) == pytest.approx(found.there.distance, abs=0.05)


def test_the_text_for_a1111_is_as_near_as_rounding_allows(engine, tmp_path):
    plan = plan_of(1)
    recipe = replace(plan.recipe, width=64, height=64, history=())
    sample = tmp_path / "sample.png"
    Image.fromarray(engine.generate(recipe).pixels).save(sample)
    found = nearest(engine, "A1111", replace(plan, recipe=recipe, trainer_image=sample))
    assert found.there.sampling == "Euler a, DDIM"
    assert found.there.distance < 0.6


def test_the_text_for_a1111_is_as_near_as_its_upsampling_allows(engine):
    plan = plan_of(1)  # 80x48 pixels, which are not multiples of 64
    found = nearest(engine, "A1111", plan)
    assert 0.6 < found.there.distance < 0.9
    reading = read_picture(png(found.pixels, parameters=infotext(found)))
    assert (reading.program, reading.sampler, reading.scheduler) == ("A1111", "Euler a", "DDIM")
    assert (reading.noise_source, reading.negative_prompt) == ("cpu", "ugly")
    body = txt2img_body(found)
    assert body["prompt"] == f"a red ball on grass <lora:{NAME}:1>"
    assert (body["sampler_name"], body["scheduler"], body["seed"]) == ("Euler a", "DDIM", 7)
    assert body["override_settings"]["randn_source"] == "CPU"


def test_a1111_comes_nearest_to_karras_steps_with_its_own(engine):
    plan = plan_of(0, job="sampler_k_dpmsolverpp")
    found = nearest(engine, "A1111", plan)
    assert found.there.sampling == "DPM++ 2M, Karras"
    program = OtherProgram(engine, plan.recipe, whole=False, noise=cpu_noise)
    pixels = program.picture(sampler="dpmpp_2m", schedule="karras")
    assert distance(plan, pixels) == pytest.approx(found.there.distance, abs=0.05)


@pytest.mark.parametrize("has_lora", [False, True])
def test_the_diffusers_script_makes_the_sample(engine, tmp_path, has_lora):
    plan = plan_of(1, base=str(copy_base(tmp_path)))
    if has_lora:
        pytest.importorskip("peft", reason="diffusers loads LoRAs with PEFT")
    else:
        recipe = replace(plan.recipe, adapters=(), history=())
        sample = tmp_path / "base.png"
        Image.fromarray(engine.generate(recipe).pixels).save(sample)
        plan = replace(plan, recipe=recipe, trainer_image=sample)
    found = nearest(engine, "diffusers", plan)
    assert found.there.distance < 0.01
    script, picture = tmp_path / "sample.py", tmp_path / "sample.png"
    script.write_text(text := diffusers_script(found))
    assert "clip_skip=None," in text
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, script, picture], check=True, timeout=150, env=environment)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    # With PEFT, the adapter is not merged, so the sums are rounded in another order.
    assert distance(plan, pixels) < (0.02 if SAME_PROCESSOR else 0.1)


@pytest.mark.parametrize("prompt", ["(a) [b] c\\d", "one AND two BREAK three", "((x:1.5))"])
def test_brackets_are_written_as_text(prompt):
    (span,) = spans_of(written_prompt("A1111", prompt))
    assert (span.text.lower(), span.weight) == (prompt.lower(), 1.0)
    spans = comfyui_spans(written_prompt("ComfyUI", prompt))
    assert ("".join(one.text for one in spans), {one.weight for one in spans}) == (prompt, {1.0})


def test_prompts_over_75_tokens_are_shortened(engine):
    recipe = plan_of(1).recipe
    simulator = Simulator(engine, recipe)
    assert simulator.fitting_prompt("a ball") == "a ball"
    assert simulator.fitting_prompt("ball " * 90) == " ".join(["ball"] * 75)


def test_another_family_is_refused(engine):
    job = "zimage_lora_f32"
    run = read_run(GOLDEN_JOBS / job)
    plan = plan_samples(run, max(run.checkpoints), base_model=str(TINY_ZIMAGE))[0]
    with pytest.raises(RecipeError, match="only those of Stable Diffusion"):
        nearest(engine, "ComfyUI", plan)


def test_the_command_writes_one_file_per_sample(fidelora, tmp_path):
    code, out, _ = fidelora(
        "explain", str(GOLDEN_JOBS / NAME), "--base-model", str(TINY_BASE), "--write", "comfyui",
        "--index", "1", "-o", str(tmp_path), "--json", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    (entry,) = json.loads(out)["written"]
    assert entry["file"] == str(tmp_path / "comfyui_6_1.json")
    assert entry["sampling"] == "euler, normal"
    nodes = json.loads((tmp_path / "comfyui_6_1.json").read_text())
    assert nodes["3"]["inputs"]["seed"] == 7


def test_the_command_needs_a_picture_or_a_program(fidelora):
    code, _, error = fidelora("explain", str(GOLDEN_JOBS / NAME))
    assert code == 2
    assert "Give JOB_DIR and PICTURE, or JOB_DIR and --write PROGRAM." in error


def test_the_command_refuses_a_sample_that_does_not_exist(fidelora):
    code, _, error = fidelora(
        "explain", str(GOLDEN_JOBS / NAME), "--base-model", str(TINY_BASE), "--write", "a1111",
        "--index", "9", "--device", "cpu",
    )  # fmt: skip
    assert code == 3
    assert "no such sample" in error
