"""Wan 2.1: behavior that no other family has.

Its golden training runs are in tests/training.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file
from tests.support import GOLDEN_JOBS, TINY_WAN21, WAN21_LORA, load_model_of, save_adapter
from transformers import AutoTokenizer

from fidelora import AdapterRef, Engine, Recipe
from fidelora.api import InferenceRequest, notes_on, recipes_of
from fidelora.errors import RecipeError
from fidelora.families.wan.names import original_names
from fidelora.families.wan.text import cleaned
from fidelora.sampling.schedules import FlowSchedule
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

SMALL = Recipe(
    model="wan21_1b", prompt="a red ball", negative_prompt="blurry", base_model=str(TINY_WAN21),
    width=64, height=80, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def pipeline_pixels(recipe: Recipe) -> Any:
    """Return the frame of diffusers' pipeline, with the trainer's scheduler."""
    parts: Any = load_model_of(recipe).parts
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TINY_WAN21 / "tokenizer"),
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=parts["transformer"],
    )
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        prompt=recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        width=recipe.width,
        height=recipe.height,
        num_frames=1,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        generator=torch.Generator().manual_seed(recipe.seed),
        output_type="np",
    ).frames[0]
    return (video[0] * 255).round().astype(np.uint8)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_frame_has_the_pixels_of_the_diffusers_pipeline(engine, guidance):
    recipe = replace(SMALL, guidance_scale=guidance)
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_the_schedule_is_shifted_twice(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    config = {"shift": 3.0, "ends_at_shifted_table": True}
    own = FlowSchedule(config, steps, 0, torch.device("cpu"))
    assert torch.equal(own.timesteps, scheduler.timesteps)
    assert torch.equal(own._sigmas, scheduler.sigmas)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a &amp;amp; b", "a & b"),
        ("  two\n lines ", "two lines"),
        ("&lt;b&gt; &quot;x&quot;", '<b> "x"'),
    ],
)
def test_prompts_are_cleaned_like_those_of_the_pipeline(text, clean):
    assert cleaned(text) == clean


def test_other_characters_need_ftfy(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(RecipeError, match="pip install ftfy"):
        engine.generate(replace(SMALL, prompt="un café"))


def test_quotes_and_broken_text_are_mended_by_ftfy():
    pytest.importorskip("ftfy")
    assert cleaned("\u201ca\u201d caf\u00c3\u00a9") == '"a" caf\u00e9'


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize("mode", ["merged", "live"])
def test_a_lora_in_the_names_of_other_programs_is_equal(engine, tmp_path, style, mode):
    tensors = load_file(WAN21_LORA)
    model = load_model_of(SMALL).parts["transformer"]
    paths = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = original_names(paths)
    assert {path for path in paths if path not in names} == set()
    renamed = {}
    for path, name in names.items():
        for own, other in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            key = f"diffusion_model.{name}.{own}.weight"
            if key in tensors:
                kohya = f"lora_unet_{name.replace('.', '_')}.{other}.weight"
                new = kohya if style == "kohya" else f"transformer.{path}.{own}.weight"
                renamed[new] = tensors[key]
    assert len(renamed) == len(tensors)
    file = save_adapter(tmp_path / "a.safetensors", renamed)
    images = []
    for lora in (WAN21_LORA, file):
        recipe = replace(SMALL, adapters=(AdapterRef.from_file(lora),), adapter_mode=mode)
        images.append(engine.generate(recipe).pixels)
    assert np.array_equal(*images)
    assert not np.array_equal(images[0], engine.generate(SMALL).pixels)


@pytest.mark.parametrize("where", ["block", "item", "flag", "item of one frame"])
def test_samples_have_the_frames_of_the_trainer(tmp_path, where):
    folder = tmp_path / "run"
    shutil.copytree(GOLDEN_JOBS / "wan21_lora_f32", folder)
    document = yaml.safe_load((folder / "config.yaml").read_text())
    sample = document["config"]["process"][0]["sample"]
    if where == "block":
        sample |= {"num_frames": 41, "fps": 24}
    elif where == "item":
        sample["samples"][0]["num_frames"] = 4
    elif where == "item of one frame":
        sample["samples"][0]["num_frames"] = 3
    else:
        sample["samples"][0]["prompt"] += " --frames 9"
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    run = read_run(folder)
    recipe = plan_samples(run, run.steps, base_model=str(TINY_WAN21))[0].recipe
    expected = {"block": (41, 24), "item": (5, 16), "flag": (9, 16)}.get(where, (1, 16))
    assert (recipe.frames, recipe.fps) == expected
    assert "frames" not in recipe.prompt


def test_a_request_has_a_note_on_a_rounded_number_of_frames():
    body = {"model": "wan21_1b", "loras": [], "prompts": [{"prompt": "a"}]}
    for frames, expected in ((None, 0), (1, 0), (41, 0), (42, 1), (3, 1)):
        body["prompts"] = [{"prompt": "a", "num_frames": frames}]
        request = InferenceRequest.model_validate(json.loads(json.dumps(body)))
        notes = notes_on(request, (), recipes_of(request, (), {}, lambda: 0))
        assert len([note for note in notes if "was rounded to" in note]) == expected
