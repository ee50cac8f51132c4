"""Z-Image: behavior that no other family has. Its golden training runs are in tests/training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from safetensors.torch import load_file
from tests.support import (
    LORA,
    TINY_ZIMAGE,
    ZIMAGE_LORA,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)
from transformers import AutoTokenizer

from fidelora import AdapterRef, Engine, Recipe
from fidelora.adapters.tensor_names import noise_of_file
from fidelora.cli.image_plan import resolve_noise
from fidelora.engine.examine import examine_adapter
from fidelora.errors import AdapterMismatchError, BaseModelFilesError, DeviceError, RecipeError
from fidelora.families.protocols import Guidance, Prompts, Size
from fidelora.training.suspects import precisions

CPU = torch.device("cpu")
SMALL = Recipe(
    model="zimage", prompt="a red ball", negative_prompt="blurry", base_model=str(TINY_ZIMAGE),
    width=64, height=80, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def of_diffusers(recipe: Recipe) -> Any:
    """Return the image of diffusers' pipeline, with the trainer's schedule and guidance."""
    model = load_model_of(recipe)
    parts: Any = model.parts
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=AutoTokenizer.from_pretrained(TINY_ZIMAGE / "tokenizer"),
        transformer=parts["transformer"],
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        image = pipeline(
            prompt=recipe.prompt,
            negative_prompt=recipe.negative_prompt,
            width=recipe.width,
            height=recipe.height,
            num_inference_steps=recipe.steps,
            sigmas=torch.linspace(1.0, 1 / recipe.steps, recipe.steps).tolist(),
            guidance_scale=recipe.guidance_scale - 1,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            max_sequence_length=512,
        ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_an_image_has_the_pixels_of_the_diffusers_pipeline(engine, guidance):
    recipe = replace(SMALL, guidance_scale=guidance)
    assert np.array_equal(engine.generate(recipe).pixels, of_diffusers(recipe))


def test_the_negative_prompt_has_an_effect_only_with_guidance(engine):
    other = replace(SMALL, negative_prompt="ugly")
    assert not np.array_equal(engine.generate(SMALL).pixels, engine.generate(other).pixels)
    plain = [replace(one, guidance_scale=1.0) for one in (SMALL, other)]
    assert np.array_equal(*(engine.generate(one).pixels for one in plain))


def test_sizes_are_multiples_of_16(engine):
    assert engine.generate(replace(SMALL, width=101, height=75)).pixels.shape == (64, 96, 3)


def test_the_truncated_end_of_a_prompt_is_quoted(engine):
    image = engine.generate(replace(SMALL, prompt="ball " * 600 + "at night", steps=1))
    (warning,) = image.warnings
    assert warning.startswith("The end of the prompt exceeds 512 tokens")
    assert warning.endswith('at night".')


def test_a_lora_leaves_no_trace_and_is_equal_merged_and_live(engine):
    pristine = engine.generate(SMALL).pixels
    merged = replace(SMALL, adapters=(AdapterRef.from_file(ZIMAGE_LORA),))
    first = engine.generate(merged).pixels.astype(int)
    live = engine.generate(replace(merged, adapter_mode="live")).pixels.astype(int)
    assert abs(first - live).max() <= 1
    assert abs(first - pristine).max() > 5
    assert np.array_equal(engine.generate(SMALL).pixels, pristine)


def test_previews_and_sizes_of_latents():
    latents, size = load_model_of(SMALL).latents, Size(96, 64)
    assert latents.shape(size) == (1, 16, 8, 12)
    assert latents.tokens(size) == 24
    assert latents.noise_dtype(torch.bfloat16) == torch.float32
    assert latents.preview(torch.randn(16, 8, 12), size).shape == (8, 12, 3)


def test_the_denoiser_accepts_blank_conditioning():
    model = load_model_of(SMALL)
    size, guidance = Size(64, 64), Guidance(3.0)
    blank = model.text.blank(size, negative=True)
    with torch.no_grad():
        real = model.text.encode(Prompts("a", ""), size, lambda part: ())
        denoise = model.denoiser.prepare([blank], guidance, size, torch.float32)
        assert denoise(torch.zeros(1, 16, 8, 8), torch.tensor(500.0)).shape == (1, 16, 8, 8)
    assert blank.positive.shape[1:] == real.positive.shape[1:]


def test_the_adapter_is_recognised(engine):
    found = examine_adapter(ZIMAGE_LORA)
    assert (found.model, found.usable) == ("zimage", True)
    with pytest.raises(AdapterMismatchError):
        engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(LORA),)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance_rescale", 0.7), ("prediction", "v_prediction"), ("noise", "legacy"),
     ("negative_prompt_2", "x")],
)  # fmt: skip
def test_fields_that_the_family_does_not_use_are_refused(field, value):
    with pytest.raises(RecipeError, match=f"Z-Image does not use {field}"):
        replace(SMALL, **{field: value})


def test_fast_and_single_files_are_not_implemented(engine, tmp_path):
    with pytest.raises(DeviceError, match="not implemented for Z-Image"):
        engine.generate(replace(SMALL, fidelity="fast"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(ZIMAGE_LORA.read_bytes())
    with pytest.raises(BaseModelFilesError, match="a single file"):
        engine.generate(replace(SMALL, base_model=str(file)))


def test_the_estimated_memory_covers_the_loaded_model():
    size = load_model_of(SMALL).size_bytes
    assert size <= expected_bytes_of(SMALL) < 1.3 * size


def test_an_old_trainers_adapter_does_not_select_legacy_noise(tmp_path):
    """Its noise is always float32, so `auto` must not choose `legacy`, which is refused."""
    old = {"software": '{"name": "ai-toolkit", "version": "0.10.25"}'}
    file = save_adapter(tmp_path / "a.safetensors", load_file(ZIMAGE_LORA), **old)
    assert noise_of_file(file) == "legacy"
    adapters = (AdapterRef.from_file(file),)
    assert resolve_noise("auto", adapters, "zimage") == "modern"
    assert resolve_noise("auto", adapters, "sd15") == "legacy"


def test_the_doctors_suspects_are_recipes_of_the_family():
    for recipe in (SMALL, replace(SMALL, dtype="bfloat16")):
        assert {one.recipe.noise for one in precisions(recipe)} == {"modern"}
        assert len(list(precisions(recipe))) == 3
