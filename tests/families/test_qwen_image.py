"""Qwen-Image: behavior that no other family has. Its golden training runs are in tests/training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file
from tests.support import (
    GOLDEN_JOBS,
    LORA,
    QWEN_LORA,
    TINY_QWEN_IMAGE,
    change_weights,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)

from fidelora import AdapterRef, Engine, Recipe
from fidelora.engine.convert import convert_adapter
from fidelora.engine.examine import examine_adapter
from fidelora.errors import AdapterMismatchError, DeviceError, RecipeError
from fidelora.families.protocols import Guidance, Prompts, Size
from fidelora.training.notes import notes_on
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run
from fidelora.training.suspects import precisions

SMALL = Recipe(
    model="qwen_image", prompt="a red ball", negative_prompt="blurry",
    base_model=str(TINY_QWEN_IMAGE), width=64, height=96, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip
WIDE = replace(SMALL, width=320, height=64, steps=2)  # wider than a tile
LOW_VRAM = GOLDEN_JOBS / "qwen_low_vram_prompts"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@cache
def pipeline() -> Any:
    """Return diffusers' pipeline, with the whole text encoder and the base's own scheduler."""
    loaded = QwenImagePipeline.from_pretrained(TINY_QWEN_IMAGE, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def pipeline_pixels(recipe: Recipe) -> Any:
    vae = pipeline().vae
    vae.use_tiling = recipe.vae_tiling
    image = pipeline()(
        prompt=recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        width=recipe.width,
        height=recipe.height,
        num_inference_steps=recipe.steps,
        true_cfg_scale=recipe.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(recipe.seed),
    ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_scale": 1.0}, {"prompt": "{} " + "ball " * 600}, {"width": 320, "steps": 2}],
    ids=["guided", "unguided", "long", "wide"],
)
def test_an_image_has_the_pixels_of_the_diffusers_pipeline(engine, changes):
    recipe = replace(SMALL, **changes)
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


def test_tiles_have_the_pixels_of_diffusers_and_change_only_large_images(engine):
    tiled = replace(WIDE, vae_tiling=True)
    pixels = engine.generate(tiled).pixels
    assert np.array_equal(pixels, pipeline_pixels(tiled))
    assert not np.array_equal(pixels, engine.generate(WIDE).pixels)
    small = engine.generate(replace(SMALL, vae_tiling=True)).pixels
    assert np.array_equal(small, engine.generate(SMALL).pixels)


def test_the_negative_prompt_has_an_effect_only_with_guidance(engine):
    other = replace(SMALL, negative_prompt="ugly")
    assert not np.array_equal(engine.generate(SMALL).pixels, engine.generate(other).pixels)
    plain = [replace(one, guidance_scale=1.0) for one in (SMALL, other)]
    assert np.array_equal(*(engine.generate(one).pixels for one in plain))


def test_sizes_are_multiples_of_32(engine):
    assert engine.generate(replace(SMALL, width=101, height=80)).pixels.shape == (64, 96, 3)


def test_the_truncated_end_of_a_prompt_is_quoted(engine):
    image = engine.generate(replace(SMALL, prompt="ball " * 600 + "at night", steps=2))
    (warning,) = image.warnings
    assert warning.startswith("The end of the prompt exceeds 512 tokens")
    assert warning.endswith('at night".')


def test_a_lora_leaves_no_trace_and_is_equal_merged_and_live(engine):
    pristine = engine.generate(SMALL).pixels
    merged = replace(SMALL, adapters=(AdapterRef.from_file(QWEN_LORA),))
    first = engine.generate(merged).pixels.astype(int)
    live = engine.generate(replace(merged, adapter_mode="live")).pixels.astype(int)
    assert abs(first - live).max() <= 1
    assert abs(first - pristine).max() > 5
    assert np.array_equal(engine.generate(SMALL).pixels, pristine)


def of_diffusers_name(key: str) -> str:
    return key.replace("diffusion_model.", "transformer.")


def of_lightning_name(key: str) -> str:
    return with_kohya_suffix(key.removeprefix("diffusion_model."))


def of_kohya_name(key: str) -> str:
    module, factor = key.removeprefix("diffusion_model.").rsplit(".lora_", 1)
    return with_kohya_suffix(f"lora_unet_{module.replace('.', '_')}.lora_{factor}")


def with_kohya_suffix(key: str) -> str:
    return key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


@pytest.mark.parametrize("rename", [of_diffusers_name, of_lightning_name, of_kohya_name])
def test_names_of_other_programs_select_the_same_modules(engine, tmp_path, rename):
    tensors = {rename(key): tensor for key, tensor in load_file(QWEN_LORA).items()}
    assert not tensors.keys() & load_file(QWEN_LORA).keys()
    file = save_adapter(tmp_path / "a.safetensors", tensors)
    one, other = (
        engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(path),))).pixels
        for path in (file, QWEN_LORA)
    )
    assert np.array_equal(one, other)


def test_a_lokr_is_applied(engine, tmp_path):
    module = "diffusion_model.transformer_blocks.1.img_mlp.net.0.proj"
    torch.manual_seed(1)
    tensors = {
        f"{module}.lokr_w1": torch.randn(4, 4), f"{module}.lokr_w2": torch.randn(64, 16),
        f"{module}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    file = save_adapter(tmp_path / "a.safetensors", tensors, ss_base_model_version="qwen_image")
    assert examine_adapter(file).model == "qwen_image"
    changed = engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(file),))).pixels
    assert not np.array_equal(changed, engine.generate(SMALL).pixels)


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_a_lora_is_converted(tmp_path, to):
    """Qwen-Image and Qwen-Image-2512 both fit; the names of their modules are the same."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(convert_adapter(QWEN_LORA, to).content)
    start = {"kohya": "lora_unet_transformer_blocks_", "peft": "transformer.transformer_blocks."}
    assert all(key.startswith(start[to]) for key in load_file(path))
    assert examine_adapter(path).model == "qwen_image"


def test_the_adapter_is_recognised(engine):
    found = examine_adapter(QWEN_LORA)
    assert (found.model, found.usable) == ("qwen_image", True)
    with pytest.raises(AdapterMismatchError):
        engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(LORA),)))


def test_both_families_use_the_same_bases_and_adapters(engine):
    recipe = replace(SMALL, adapters=(AdapterRef.from_file(QWEN_LORA),))
    other = engine.generate(replace(recipe, model="qwen_image_2512"))
    assert np.array_equal(other.pixels, engine.generate(recipe).pixels)
    assert other.warnings == ()
    assert Recipe(prompt="", model="qwen_image_2512").base_model == "Qwen/Qwen-Image-2512"


def test_an_adapter_of_wrong_shape_is_not_said_to_be_of_another_family(engine, tmp_path):
    tensors = {key: torch.zeros(8, 8) for key in load_file(QWEN_LORA)}
    file = save_adapter(tmp_path / "a.safetensors", tensors, ss_base_model_version="qwen_image")
    recipe = replace(SMALL, model="qwen_image_2512", adapters=(AdapterRef.from_file(file),))
    with pytest.raises(AdapterMismatchError, match="does not fit this Qwen-Image-2512 base model"):
        engine.generate(recipe)


def test_only_the_language_model_is_loaded():
    """The file also contains the vision encoder and the language model's head."""
    encoder = load_model_of(SMALL).parts["text_encoder"]
    assert type(encoder).__name__ == "Qwen2_5_VLTextModel"
    stored = load_file(TINY_QWEN_IMAGE / "text_encoder" / "model.safetensors")
    assert {"lm_head.weight", "model.visual.patch_embed.proj.weight"} <= stored.keys()
    assert len(encoder.state_dict()) < len(stored)


def test_the_rotary_tables_are_rounded_with_the_weights():
    """The trainer's `.to(dtype)` rounds them. The tolerances of the golden runs could hide this."""
    exact, rounded = (
        load_model_of(replace(SMALL, dtype=dtype, text_encoder_dtype=dtype))
        .parts["text_encoder"]
        .get_buffer("rotary_emb.inv_freq")
        for dtype in ("float32", "bfloat16")
    )
    assert torch.equal(rounded, exact.bfloat16())
    assert not torch.equal(rounded.float(), exact)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("model.visual.", "visual."),
        lambda name: (
            name.replace("model.", "model.language_model.", 1) if "visual" not in name else name
        ),
    ],
    ids=["older", "newer"],
)
def test_names_of_other_transformers_versions_are_loaded(
    engine: Engine, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    base = Path(shutil.copytree(TINY_QWEN_IMAGE, tmp_path / "base"))
    file = base / "text_encoder" / "model.safetensors"
    change_weights(file, lambda weights: {rename(name): one for name, one in weights.items()})
    assert load_file(file).keys() != load_file(TINY_QWEN_IMAGE / file.relative_to(base)).keys()
    again = engine.generate(replace(SMALL, base_model=str(base))).pixels
    assert np.array_equal(again, engine.generate(SMALL).pixels)


def test_latents_and_previews_have_the_size_of_the_image():
    latents, size = load_model_of(SMALL).latents, Size(96, 64)
    assert latents.shape(size) == (1, 1, 16, 8, 12)
    assert latents.tokens(size) == 24
    assert latents.noise_dtype(torch.bfloat16) == torch.bfloat16
    assert latents.preview(torch.randn(1, 16, 8, 12), size).shape == (8, 12, 3)


def test_a_batch_has_the_predictions_of_its_images():
    model = load_model_of(SMALL)
    size, guidance = Size(64, 96), Guidance(3.0)
    with torch.no_grad():
        encoded = [
            model.text.encode(Prompts(text, ""), size, lambda part: ())
            for text in ("a", "a longer text")
        ]
        latents, time = torch.randn(2, 1, 16, 12, 8), torch.tensor(500.0)
        both = model.denoiser.prepare(encoded, guidance, size, torch.float32)(latents, time)
        for index, one in enumerate(encoded):
            alone = model.denoiser.prepare([one], guidance, size, torch.float32)
            assert torch.equal(alone(latents[index : index + 1], time)[0], both[index])


def test_the_denoiser_accepts_blank_conditioning():
    model = load_model_of(SMALL)
    size, guidance = Size(64, 64), Guidance(3.0)
    blank = model.text.blank(size, negative=True)
    with torch.no_grad():
        real = model.text.encode(Prompts("a", ""), size, lambda part: ())
        denoise = model.denoiser.prepare([blank], guidance, size, torch.float32)
        assert denoise(torch.zeros(1, 1, 16, 8, 8), torch.tensor(500.0)).shape == (1, 1, 16, 8, 8)
    assert blank.positive.shape[2:] == real.positive.shape[2:]


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance_rescale", 0.7), ("prediction", "v_prediction"), ("emphasis", "original"),
     ("negative_prompt_2", "x")],
)  # fmt: skip
def test_fields_that_the_family_does_not_use_are_refused(field, value):
    with pytest.raises(RecipeError, match=f"Qwen-Image does not use {field}"):
        replace(SMALL, **{field: value})


def test_fast_is_not_implemented(engine):
    with pytest.raises(DeviceError, match="not implemented for Qwen-Image"):
        engine.generate(replace(SMALL, fidelity="fast"))


def test_the_estimated_memory_covers_the_loaded_model():
    size = load_model_of(SMALL).size_bytes
    assert size <= expected_bytes_of(SMALL) < 1.05 * size


def test_the_doctors_suspects_are_recipes_of_the_family():
    half = replace(SMALL, dtype="bfloat16")
    assert {one.recipe.noise for one in precisions(half)} == {"modern", "legacy"}


# --- training runs --------------------------------------------------------------------------------


def tiling_of(folder: Path) -> set[bool]:
    return {plan.recipe.vae_tiling for plan in plan_samples(read_run(folder), 6)}


def test_low_vram_is_replayed_in_tiles_since_release_0_10_22(tmp_path):
    assert tiling_of(LOW_VRAM) == {True}
    assert tiling_of(QWEN_LORA.parent) == {False}
    run = Path(shutil.copytree(LOW_VRAM, tmp_path / "run"))
    file = run / "qwen_low_vram_prompts.safetensors"
    for version, tiled in (("0.10.22", True), ("0.10.21", False)):
        software = f'{{"name": "ai-toolkit", "version": "{version}"}}'
        metadata = {"software": software, "training_info": '{"step": 6}'}
        save_adapter(file, load_file(LOW_VRAM / file.name), **metadata)
        assert tiling_of(run) == {tiled}


def test_a_sample_of_one_step_is_black_and_left_out():
    run = read_run(LOW_VRAM)
    plan = plan_samples(run, 6)[3]
    assert (plan.is_undefined, plan.trainer_image, plan.recipe.steps) == (True, None, 2)
    (note,) = notes_on(run)
    assert note.startswith("Sample 3 of the sample block has 1 step")


def test_the_name_of_the_trainers_interface_selects_the_family():
    assert read_run(LOW_VRAM).model == "qwen_image_2512"
    assert read_run(QWEN_LORA.parent).model == "qwen_image"
