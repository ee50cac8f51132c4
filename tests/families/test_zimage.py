"""Z-Image: behavior that no other family has. Its golden training runs are in tests/training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from safetensors.torch import load_file
from tests.support import (
    GOLDEN_JOBS,
    LORA,
    TINY_ZIMAGE,
    ZIMAGE_LORA,
    ZIMAGE_TRAINING_ADAPTER,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)
from transformers import AutoTokenizer

from fidelora import AdapterRef, Engine, Recipe
from fidelora.accel.quantized import QuantizedLinear
from fidelora.adapters.tensor_names import noise_of_file
from fidelora.cli.image_plan import resolve_noise
from fidelora.engine.examine import examine_adapter
from fidelora.errors import (
    AdapterMismatchError,
    BaseModelFilesError,
    DeviceError,
    RecipeError,
    TrainingRunError,
)
from fidelora.families import get_family
from fidelora.families.protocols import Guidance, Prompts, Size
from fidelora.families.sd.spec import SD15
from fidelora.families.zimage.spec import ZIMAGE, ZIMAGE_DETURBO
from fidelora.sampling.schedules import FlowSchedule
from fidelora.training.model_block import quantization_of
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run
from fidelora.training.suspects import precisions
from fidelora.weights.files import BaseFiles

CPU = torch.device("cpu")
SMALL = Recipe(
    model="zimage", prompt="a red ball", negative_prompt="blurry", base_model=str(TINY_ZIMAGE),
    width=64, height=80, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def pipeline_pixels(recipe: Recipe) -> Any:
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
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


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


def test_latents_and_previews_have_the_size_of_the_image():
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


def test_fast_is_not_implemented(engine):
    with pytest.raises(DeviceError, match="not implemented for Z-Image"):
        engine.generate(replace(SMALL, fidelity="fast"))


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


# --- training runs: older releases, training adapter, quantisation --------------------------------

TURBO_RUN = GOLDEN_JOBS / "zimage_turbo_f32"


def recipe_of(folder: Path, **settings: Any) -> Recipe:
    run = read_run(folder).with_settings(**settings)
    return plan_samples(run, 6, base_model=str(TINY_ZIMAGE))[1].recipe


def test_older_releases_had_another_schedule_guidance_and_size():
    run = GOLDEN_JOBS / "zimage_lora_f32"  # sample 1: --cfg 3 --w 96 --h 48
    now = recipe_of(run)
    assert (now.sampler, now.width, now.height) == ("flowmatch", 96, 64)
    g, size = now.guidance_scale, (now.width, now.height)
    for version, sampler, guidance, wanted in (
        ((0, 10, 25), "flowmatch", g, size),
        ((0, 10, 24), "flowmatch_to_zero", g, size),
        ((0, 10, 20), "flowmatch_to_zero", g + 1, size),
        ((0, 9, 13), "flowmatch_to_zero", g + 1, tuple(side - side % 32 for side in size)),
    ):
        old = recipe_of(run, trainer_version=version)
        found = (old.sampler, old.guidance_scale, (old.width, old.height))
        assert found == (sampler, guidance, wanted), version


def test_the_last_step_of_the_old_schedule_has_no_length():
    config = ZIMAGE.samplers["flowmatch_to_zero"].config
    schedule = FlowSchedule(config, 4, 20, CPU)
    sigmas = schedule.timesteps / 1000
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    even = torch.tensor([1, 2 / 3, 1 / 3, 0])
    assert torch.allclose(sigmas, 3 * even / (1 + 2 * even))


def test_the_training_adapter_of_a_run_is_used_or_left_out():
    run = read_run(TURBO_RUN)
    assert run.training_adapter == "golden/tiny-zimage-adapter.safetensors"
    found = recipe_of(TURBO_RUN, training_adapter=str(ZIMAGE_TRAINING_ADAPTER))
    assert [one.name for one in found.training_adapters] == ["tiny-zimage-adapter"]
    assert recipe_of(TURBO_RUN, training_adapter="").training_adapters == ()


def test_a_missing_training_adapter_is_an_error_with_the_option(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TrainingRunError, match="--training-adapter, or none"):
        recipe_of(TURBO_RUN, training_adapter="/gone/adapter.safetensors")


def test_a_training_adapter_leaves_only_its_rounding(engine):
    ref = AdapterRef.from_file(ZIMAGE_TRAINING_ADAPTER)
    half = replace(SMALL, dtype="bfloat16", vae_dtype="bfloat16", text_encoder_dtype="bfloat16")
    plain, applied = (
        engine.generate(replace(SMALL, adapters=adapters)).pixels.astype(int)
        for adapters in ((), (ref,))
    )
    assert abs(applied - plain).max() > 4
    trained = engine.generate(replace(SMALL, training_adapters=(ref,))).pixels.astype(int)
    assert abs(trained - plain).max() <= 1
    rough = engine.generate(replace(half, training_adapters=(ref,))).pixels
    assert not np.array_equal(rough, engine.generate(half).pixels)
    assert np.array_equal(engine.generate(SMALL).pixels, plain)


def test_the_same_file_as_adapter_and_training_adapter_is_not_confused(engine):
    ref = AdapterRef.from_file(ZIMAGE_TRAINING_ADAPTER)
    half: dict[str, Any] = dict.fromkeys(("dtype", "vae_dtype", "text_encoder_dtype"), "bfloat16")
    applied = replace(SMALL, adapters=(ref,), **half)
    first = engine.generate(applied).pixels
    engine.generate(replace(SMALL, training_adapters=(ref,), **half))
    assert np.array_equal(engine.generate(applied).pixels, first)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ({"quantize": True}, ("qfloat8", "qfloat8")),
        ({"quantize": True, "quantize_te": False}, ("qfloat8", "none")),
        ({"quantize": True, "qtype": "float8", "qtype_te": "qfloat8"}, ("float8", "qfloat8")),
        ({"quantize_te": True}, ("none", "qfloat8")),
        ({"quantize": True, "assistant_lora_path": "a/b/c.safetensors"}, ("float8", "qfloat8")),
        ({}, ("none", "none")),
    ],
)
def test_the_quantisation_of_a_run_is_read(model, fields):
    found = quantization_of(model, ZIMAGE)
    assert (found["quantization"], found["text_encoder_quantization"]) == fields
    assert quantization_of(model, SD15) == {}


def test_other_kinds_of_quantisation_are_refused_by_name():
    with pytest.raises(TrainingRunError, match=r"model\.qtype uint3\|x"):
        quantization_of({"quantize": True, "qtype": "uint3|x"}, ZIMAGE)


def test_layers_that_the_trainer_excludes_are_not_quantised():
    recipe = replace(SMALL, quantization="qfloat8", text_encoder_quantization="qfloat8")
    model = load_model_of(recipe)
    kinds = {
        path: type(layer)
        for path, layer in model.parts["transformer"].named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    whole = {path for path, kind in kinds.items() if kind is torch.nn.Linear}
    assert whole
    assert all(path.startswith(("t_embedder", "cap_embedder", "all_")) for path in whole)
    assert any(kind is QuantizedLinear for kind in kinds.values())
    encoder = model.parts["text_encoder"].modules()
    assert any(isinstance(layer, QuantizedLinear) for layer in encoder)
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.parts["vae"].modules())


def test_the_transformer_of_de_turbo_gets_its_other_parts_from_turbo(tmp_path):
    shutil.copytree(TINY_ZIMAGE / "transformer", tmp_path / "deturbo" / "transformer")
    family = replace(ZIMAGE_DETURBO, extras=str(TINY_ZIMAGE))
    files = BaseFiles.find(family, str(tmp_path / "deturbo"))
    assert files.configs["transformer"].is_relative_to(tmp_path)
    assert files.configs["vae"].is_relative_to(TINY_ZIMAGE)
    assert files.tokenizers["text_encoder"] == TINY_ZIMAGE / "tokenizer"
    assert files.is_unchanged()
    with pytest.raises(BaseModelFilesError, match="not a diffusers folder"):
        BaseFiles.find(replace(family, extras=""), str(tmp_path / "deturbo"))


def test_all_z_image_models_load_the_same_folders():
    for model in ("zimage", "zimage_turbo", "zimage_deturbo"):
        assert BaseFiles.find(get_family(model), str(TINY_ZIMAGE)).family.id == model
