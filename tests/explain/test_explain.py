"""Pictures that independent implementations of other programs made are explained."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.explain.other_programs import (
    OtherProgram,
    comfyui_noise,
    cpu_noise,
    gpu_noise,
    graph,
    infotext,
    png,
)
from tests.support import GOLDEN_JOBS, TINY_BASE, TINY_ZIMAGE
from typer.testing import CliRunner

from fidelora import Engine
from fidelora.cli import app
from fidelora.errors import RecipeError
from fidelora.explain.explain import Explanation, explain
from fidelora.explain.picture import Picture
from fidelora.explain.read_picture import read_picture, with_options
from fidelora.explain.simulation import Simulation, Simulator
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("golden_threads")
RUN = read_run(GOLDEN_JOBS / "lora_linear_f32")
BASE = str(TINY_BASE)
NAME = "lora_linear_f32"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def plan_of(index: int) -> PlannedSample:
    return plan_samples(RUN, 6, base_model=BASE)[index]


def explained(engine: Engine, content: bytes, **options: object) -> Explanation:
    reading = with_options(read_picture(content), options)
    return explain(RUN, Picture.read(content, "x.png"), reading, engine, base_model=BASE)


def causes(explanation: Explanation) -> set[str]:
    return {one.cause for one in explanation.differences}


def test_the_trainers_sample_is_simulated_exactly(engine):
    plan = plan_of(1)
    assert plan.trainer_image is not None
    simulated = Simulator(engine, plan.recipe).image(Simulation.of_recipe(plan.recipe))
    assert (simulated == engine.generate(plan.recipe).pixels).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_trainers_sample_has_no_difference(engine, index):
    path = plan_of(index).trainer_image
    assert path is not None
    found = explained(engine, path.read_bytes())
    assert (found.is_same, found.differences) == (True, ())
    assert found.alignment.plan.index == index


def test_a_picture_of_comfyui_is_explained_by_its_graph(engine):
    recipe = plan_of(1).recipe
    program = OtherProgram(engine, recipe, whole=True, noise=comfyui_noise)
    pixels = program.picture(sampler="euler", schedule="normal", strength=0.8, guidance_scale=7.0)
    text = graph(
        prompt=recipe.prompt, negative=recipe.negative_prompt, seed=recipe.seed,
        steps=recipe.steps, cfg=7.0, sampler="euler", scheduler="normal", width=recipe.width,
        height=recipe.height, lora=(f"{NAME}.safetensors", 0.8, 0.8),
    )  # fmt: skip
    found = explained(engine, png(pixels, prompt=text))
    assert [one.cause for one in found.differences] == ["sampler", "guidance", "lora"]
    assert found.after < 0.1 < found.before
    assert "KSampler (cfg): 4.5." in [one.advice for one in found.differences]
    # ComfyUI draws other numbers in the steps of DDPM, so a sampler without them is nearest.
    assert found.nearest_there is not None
    assert found.nearest_there.sampling == "euler, normal"


def test_a_picture_of_a1111_with_gpu_noise_is_explained(engine):
    recipe = plan_of(1).recipe
    program = OtherProgram(engine, recipe, whole=False, noise=gpu_noise)
    pixels = program.picture(sampler="euler_ancestral", schedule="normal", skip=2)
    text = infotext(
        prompt=recipe.prompt, negative=recipe.negative_prompt, seed=recipe.seed,
        steps=recipe.steps, cfg=recipe.guidance_scale, sampler="Euler a", scheduler="Uniform",
        width=recipe.width, height=recipe.height, lora=f" <lora:{NAME}:1>", Clip_skip="2",
    )  # fmt: skip
    found = explained(engine, png(pixels, parameters=text))
    # Its size, 80x48, is not a multiple of 64.
    assert causes(found) == {"noise", "sampler", "clip_skip", "upsampling"}
    assert found.after < 0.1
    # With the trainer's timesteps, DDPM is the ancestral version of Euler's method.
    assert found.nearest_there is not None
    assert found.nearest_there.sampling == "Euler a, DDIM"
    assert found.nearest_there.distance < 0.9
    noise = next(one for one in found.differences if one.cause == "noise")
    assert noise.advice.endswith("Random number generator source: CPU.")


def test_a_missing_lora_is_found_although_the_file_names_it(engine):
    recipe = plan_of(1).recipe
    program = OtherProgram(engine, recipe, whole=False, noise=cpu_noise)
    pixels = program.picture(sampler="dpmpp_2m", schedule="karras", strength=0.0)
    text = infotext(
        prompt=recipe.prompt, negative=recipe.negative_prompt, seed=recipe.seed,
        steps=recipe.steps, cfg=recipe.guidance_scale, sampler="DPM++ 2M", scheduler="Karras",
        width=recipe.width, height=recipe.height, lora=f" <lora:{NAME}:1>", RNG="CPU",
    )  # fmt: skip
    found = explained(engine, png(pixels, parameters=text))
    assert causes(found) == {"sampler", "lora", "upsampling"}
    lora = next(one for one in found.differences if one.cause == "lora")
    assert lora.theirs == "not applied"


def test_a_picture_without_settings_is_explained(engine):
    recipe = plan_of(1).recipe
    program = OtherProgram(engine, recipe, whole=False, noise=gpu_noise)
    content = png(program.picture(sampler="euler", schedule="normal"))
    found = explained(engine, content, program="A1111")
    assert causes(found) == {"noise", "sampler", "upsampling"}
    assert found.alignment.plan.index == 1
    assert found.after < 0.5


def test_settings_given_by_hand_are_used(engine):
    recipe = plan_of(1).recipe
    program = OtherProgram(engine, recipe, whole=True, noise=comfyui_noise)
    content = png(program.picture(sampler="euler", schedule="karras", steps=7))
    found = explained(
        engine, content, program="ComfyUI", sampler="euler", scheduler="karras", steps=7
    )
    assert causes(found) == {"sampler", "steps"}
    assert found.after < 0.1


def test_another_lora_is_noted(engine):
    recipe = plan_of(1).recipe
    program = OtherProgram(engine, recipe, whole=True, noise=comfyui_noise)
    text = graph(
        prompt=recipe.prompt, negative=recipe.negative_prompt, seed=recipe.seed,
        steps=recipe.steps, cfg=recipe.guidance_scale, sampler="euler", scheduler="normal",
        width=recipe.width, height=recipe.height, lora=("other.safetensors", 1.0, 1.0),
    )  # fmt: skip
    pixels = program.picture(sampler="euler", schedule="normal", strength=0.0)
    found = explained(engine, png(pixels, prompt=text))
    assert causes(found) == {"sampler", "lora"}
    assert any("the LoRA other" in note for note in found.notes)


def test_a_model_that_cannot_be_simulated_is_refused(engine):
    run = read_run(GOLDEN_JOBS / "zimage_lora_f32")
    content = png(engine.generate(plan_of(1).recipe).pixels)
    picture = Picture.read(content, "x.png")
    with pytest.raises(RecipeError, match="cannot be explained"):
        explain(run, picture, read_picture(content), engine, base_model=str(TINY_ZIMAGE))


def test_the_command_prints_json_and_writes_a_report(engine, tmp_path):
    sample = plan_of(1).trainer_image
    assert sample is not None
    arguments = ["explain", str(RUN.folder), str(sample), "--base-model", BASE, "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--json", "--report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (picture,) = json.loads(result.stdout)["pictures"]
    assert (picture["same"], picture["differences"]) == (True, [])
    assert picture["sample"]["index"] == 1
    page = (tmp_path / "explain.html").read_text()
    assert "data:image/png" in page
    assert sample.name in page


def test_json_lines_are_printed_before_later_pictures_fail(engine, monkeypatch):
    sample = plan_of(1).trainer_image
    assert sample is not None
    finished: list[Explanation] = []

    def first_only(*arguments: Any, **options: Any) -> Explanation:
        if finished:
            raise RecipeError("Later pictures fail.")
        finished.append(explain(*arguments, **options))
        return finished[0]

    monkeypatch.setattr("fidelora.explain.explain.explain", first_only)
    arguments = ["explain", str(RUN.folder), str(sample), str(sample), "--base-model", BASE]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--json-lines"])
    assert isinstance(result.exception, RecipeError)
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert (found["job"], found["picture"], found["same"]) == (RUN.name, sample.name, True)


def test_json_and_json_lines_exclude_each_other():
    result = CliRunner().invoke(
        app, ["explain", str(RUN.folder), "x.png", "--json", "--json-lines"]
    )
    assert result.exit_code == 2
    assert "--json-lines" in result.output
