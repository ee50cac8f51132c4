"""Lumina-Image 2.0: behavior that no other family has.

Its golden training runs are in tests/training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from safetensors.torch import load_file
from tests.support import (
    LORA,
    LUMINA2_LORA,
    TINY_LUMINA2,
    ZIMAGE_LORA,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)
from transformers import AutoTokenizer

from fidelora import AdapterRef, Engine, Recipe
from fidelora.cli.image_plan import resolve_noise
from fidelora.engine.examine import examine_adapter
from fidelora.errors import (
    AdapterMismatchError,
    DeviceError,
    RecipeError,
    TrainingRunError,
)
from fidelora.families.lumina2.text import _SYSTEM_PROMPT
from fidelora.families.protocols import Guidance, Prompts, Size
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

SMALL = Recipe(
    model="lumina2", prompt="a red ball", negative_prompt="blurry", base_model=str(TINY_LUMINA2),
    width=64, height=80, steps=6, guidance_scale=3.5, seed=11,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def pipeline_pixels(recipe: Recipe) -> Any:
    """Return the image of diffusers' pipeline, with the trainer's schedule and system prompt."""
    parts: Any = load_model_of(recipe).parts
    pipeline = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=AutoTokenizer.from_pretrained(TINY_LUMINA2 / "tokenizer"),
        transformer=parts["transformer"],
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        image = pipeline(
            prompt=recipe.prompt,
            negative_prompt=_SYSTEM_PROMPT + recipe.negative_prompt,
            width=recipe.width,
            height=recipe.height,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
        ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_an_image_has_the_pixels_of_the_diffusers_pipeline(engine, guidance, dtype):
    recipe = replace(
        SMALL, guidance_scale=guidance, dtype=dtype, vae_dtype=dtype, text_encoder_dtype=dtype
    )
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


def test_the_text_encoder_is_as_in_the_trainers_release_of_transformers():
    """Attention without the soft cap, and rotary tables in the dtype of the encoder."""
    model = load_model_of(replace(SMALL, text_encoder_dtype="bfloat16"))
    encoder: Any = model.parts["text_encoder"]
    assert encoder.config._attn_implementation == "sdpa"
    assert {layer.self_attn.attn_logit_softcapping for layer in encoder.layers} == {None}
    assert encoder.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_the_negative_prompt_has_an_effect_only_with_guidance(engine):
    other = replace(SMALL, negative_prompt="ugly")
    assert not np.array_equal(engine.generate(SMALL).pixels, engine.generate(other).pixels)
    plain = [replace(one, guidance_scale=1.0) for one in (SMALL, other)]
    assert np.array_equal(*(engine.generate(one).pixels for one in plain))


def test_both_prompts_follow_the_system_prompt(engine):
    """The mask covers the tokens of the system prompt, so an empty prompt has them, too."""
    text = load_model_of(SMALL).text
    encoded = text.encode(Prompts("", ""), Size(64, 64), lambda part: ())
    tokenizer = AutoTokenizer.from_pretrained(TINY_LUMINA2 / "tokenizer")
    tokens = len(tokenizer(_SYSTEM_PROMPT).input_ids)
    assert [int(row.mask.sum()) for row in (encoded.positive, encoded.negative)] == [tokens] * 2
    assert bool(encoded.positive.mask[0, :tokens].all())  # padding is at the end


def test_sizes_are_multiples_of_16(engine):
    assert engine.generate(replace(SMALL, width=109, height=91)).pixels.shape == (80, 96, 3)


def test_the_truncated_end_of_a_prompt_is_quoted(engine):
    image = engine.generate(replace(SMALL, prompt="ball " * 300 + "at night", steps=1))
    (warning,) = image.warnings
    assert warning.startswith("The end of the prompt exceeds 256 tokens (with the system prompt)")
    assert warning.endswith('ball at night".')
    kept = 300 - warning.count("ball ")
    shorter = replace(SMALL, prompt=" ".join(["ball"] * kept), steps=1)
    assert not engine.generate(shorter).warnings
    assert np.array_equal(engine.generate(shorter).pixels, image.pixels)


def test_a_lora_leaves_no_trace_and_is_equal_merged_and_live(engine):
    pristine = engine.generate(SMALL).pixels
    merged = replace(SMALL, adapters=(AdapterRef.from_file(LUMINA2_LORA),))
    first = engine.generate(merged).pixels.astype(int)
    live = engine.generate(replace(merged, adapter_mode="live")).pixels.astype(int)
    assert abs(first - live).max() <= 1
    assert abs(first - pristine).max() > 5
    assert np.array_equal(engine.generate(SMALL).pixels, pristine)


def test_images_with_jitter_can_share_a_batch_of_different_prompts(engine):
    """The texts differ in length, so the transformer masks padding within the batch."""
    low = replace(SMALL, dtype="bfloat16", vae_dtype="bfloat16", text_encoder_dtype="bfloat16")
    recipes = [low, replace(low, prompt="a photo of a man and a ball", seed=12)]
    together = engine.generate_jittered(recipes, 1)
    for recipe, image in zip(recipes, together, strict=True):
        alone = engine.generate(recipe).pixels.astype(int)
        assert abs(image.pixels.astype(int) - alone).mean() < 2


def test_latents_and_previews_have_the_size_of_the_image():
    latents, size = load_model_of(SMALL).latents, Size(96, 64)
    assert latents.shape(size) == (1, 16, 8, 12)
    assert latents.tokens(size) == 24
    assert latents.noise_dtype(torch.bfloat16) == torch.bfloat16
    assert latents.preview(torch.randn(16, 8, 12), size).shape == (8, 12, 3)


def test_the_denoiser_accepts_blank_conditioning():
    model = load_model_of(SMALL)
    size, guidance = Size(64, 64), Guidance(3.0)
    blank = model.text.blank(size, negative=True)
    with torch.no_grad():
        real = model.text.encode(Prompts("a", ""), size, lambda part: ())
        denoise = model.denoiser.prepare([blank], guidance, size, torch.float32)
        assert denoise(torch.zeros(1, 16, 8, 8), torch.tensor(500.0)).shape == (1, 16, 8, 8)
    assert blank.positive.states.shape == real.positive.states.shape


def test_the_adapter_is_recognised(engine):
    found = examine_adapter(LUMINA2_LORA)
    assert (found.model, found.usable) == ("lumina2", True)
    for other in (LORA, ZIMAGE_LORA):
        with pytest.raises(AdapterMismatchError):
            engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(other),)))


def test_names_of_diffusers_and_peft_give_the_same_image(engine, tmp_path):
    tensors = load_file(LUMINA2_LORA)
    images: list[Any] = []
    for prefix in ("transformer.", "diffusion_model.", "transformer.base_model.model."):
        renamed = {
            prefix + key.removeprefix("transformer."): tensor for key, tensor in tensors.items()
        }
        file = save_adapter(tmp_path / f"{len(images)}.safetensors", renamed)
        adapters = (AdapterRef.from_file(file),)
        images.append(engine.generate(replace(SMALL, adapters=adapters)).pixels)
    assert all(np.array_equal(images[0], other) for other in images[1:])


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_a_lokr_changes_the_image_in_both_modes(engine, tmp_path, mode):
    torch.manual_seed(0)
    path = "transformer.layers.0.feed_forward.linear_1"  # [256, 64]
    tensors = {
        f"{path}.lokr_w1": torch.randn(8, 8) / 4,
        f"{path}.lokr_w2": torch.randn(32, 8) / 4,
        f"{path}.alpha": torch.tensor(1.0),
    }
    adapter = AdapterRef.from_file(save_adapter(tmp_path / "lokr.safetensors", tensors))
    recipe = replace(SMALL, adapters=(adapter,), adapter_mode=mode)
    assert not np.array_equal(engine.generate(SMALL).pixels, engine.generate(recipe).pixels)


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance_rescale", 0.7), ("prediction", "v_prediction"), ("negative_prompt_2", "x"),
     ("emphasis", "original")],
)  # fmt: skip
def test_fields_that_the_family_does_not_use_are_refused(field, value):
    with pytest.raises(RecipeError, match=f"Lumina-Image 2.0 does not use {field}"):
        replace(SMALL, **{field: value})


def test_fast_is_not_implemented(engine):
    with pytest.raises(DeviceError, match=r"not implemented for Lumina-Image 2\.0"):
        engine.generate(replace(SMALL, fidelity="fast"))


def test_the_estimated_memory_covers_the_loaded_model():
    size = load_model_of(SMALL).size_bytes
    assert size <= expected_bytes_of(SMALL) < 1.3 * size


def test_an_old_trainers_adapter_selects_legacy_noise(tmp_path):
    """The trainer draws the noise in the dtype of the transformer."""
    old = {"software": '{"name": "ai-toolkit", "version": "0.10.25"}'}
    file = save_adapter(tmp_path / "a.safetensors", load_file(LUMINA2_LORA), **old)
    assert resolve_noise("auto", (AdapterRef.from_file(file),), "lumina2") == "legacy"
    assert resolve_noise("auto", (AdapterRef.from_file(LUMINA2_LORA),), "lumina2") == "modern"


def test_a_size_with_which_the_trainer_fails_is_refused():
    run = read_run(LUMINA2_LORA.parent)
    first, *others = run.samples
    run = replace(run, samples=(replace(first, height=90), *others))
    with pytest.raises(TrainingRunError, match=r"Sample 0 .* size 64x88.*must be multiples of 16"):
        plan_samples(run, 6)
