"""Every sampler, compared with the diffusers pipelines that the trainer samples with.

The golden training runs cover four samplers. These tests rebuild the trainer's procedure from the
library that it uses: its scheduler configuration with `steps_offset` 0, passed to the pipeline's
constructor (which rewrites it for Stable Diffusion 1.5 and keeps it for SDXL), prompts encoded one
by one, and one CPU generator. The engine has to return the same pixels for every sampler, in half
precision too.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, schedulers
from tests.support import TINY_BASE, TINY_SDXL, load_model_of, read_json

from fidelora import Engine, Recipe
from fidelora.engine.model import LoadedModel, ModelKey, load_model
from fidelora.families import all_families, get_family
from fidelora.families.clip import ClipEncoder
from fidelora.families.sd.spec import _TRAINER_CONFIG
from fidelora.families.sd.text import SDText
from fidelora.families.spec import NoiseSampler
from fidelora.sampling.schedules import sgm_uniform_sigmas

CPU = torch.device("cpu")
SAMPLERS = get_family("sd15").samplers
SMALL = {
    "sd15": Recipe(
        prompt="a photo of a ball", negative_prompt="blurry", base_model=str(TINY_BASE),
        width=72, height=72, steps=6, seed=11, guidance_scale=5.5,
    ),
    "sdxl": Recipe(
        model="sdxl", prompt="a photo of a ball", negative_prompt="blurry",
        negative_prompt_2="ugly", base_model=str(TINY_SDXL),
        width=72, height=64, steps=6, seed=11, guidance_scale=5.5,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)  # the tests alternate between four bases


def test_every_family_is_compared():
    """The other families are compared in tests/families."""
    assert SMALL.keys() == {"sd15", "sdxl"}
    families = Path(__file__).parents[1] / "families"
    packages = {one.text.split(".")[2] for one in all_families().values()} - {"sd"}
    assert all((families / f"test_{package}.py").is_file() for package in packages)


@lru_cache(maxsize=4)
def base_of(key: ModelKey) -> LoadedModel:
    """Load a base model with diffusers' own modules.

    The models are shared by tests. Only float16 VAEs are changed later, and only one test uses
    each of these.
    """
    with patch("fidelora.engine.model.prepack"):
        base = load_model(key, key.find_files(), CPU)
    base.merged.apply([])
    return base


def pipeline_pixels(recipe: Recipe) -> Any:
    """Return the image that the trainer's pipeline makes, without adapters."""
    base = base_of(ModelKey.of(recipe))
    sampler = SAMPLERS[recipe.sampler]
    assert isinstance(sampler, NoiseSampler)
    # The trainer's own configuration; the pipeline of SD 1.5 corrects `steps_offset` by itself.
    offset: dict[str, Any] = {"steps_offset": _TRAINER_CONFIG["steps_offset"]}
    schedule: dict[str, Any] = {"num_inference_steps": recipe.steps}
    if recipe.timestep_spacing != "default":
        offset["timestep_spacing"] = "trailing"
    if recipe.timestep_spacing == "trailing" and recipe.sampler in ("lcm", "tcd"):
        # These schedulers ignore `timestep_spacing`; model cards pass the timesteps instead.
        trailing = np.arange(1000, 0, -1000 / recipe.steps).round() - 1
        schedule = {"timesteps": [int(t) for t in trailing]}
    scheduler = getattr(schedulers, sampler.scheduler).from_config({**sampler.config, **offset})
    if recipe.timestep_spacing == "sgm_uniform":
        schedule = {"sigmas": sgm_uniform_sigmas(scheduler.alphas_cumprod, recipe.steps)}
    pipeline, texts = {"sd15": sd15, "sdxl": sdxl}[recipe.model](base, scheduler, recipe)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        image = pipeline(
            **texts,
            width=recipe.width,
            height=recipe.height,
            **schedule,
            eta=(sampler.eta or 0.0) if recipe.eta is None else recipe.eta,
            guidance_scale=recipe.guidance_scale,
            guidance_rescale=recipe.guidance_rescale,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
        ).images[0]
    return np.asarray(image)


def encoders_of(base: LoadedModel) -> dict[str, ClipEncoder]:
    assert isinstance(base.text, SDText)
    return base.text.encoders


def sd15(base: LoadedModel, scheduler: Any, recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    reader = encoders_of(base)["text_encoder"]
    pipeline = StableDiffusionPipeline(
        base.parts["vae"],
        reader.encoder,
        reader.tokenizer,
        base.parts["unet"],
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        positive, negative = (
            reader.encode(text).states for text in (recipe.prompt, recipe.negative_prompt)
        )
    return pipeline, {"prompt_embeds": positive, "negative_prompt_embeds": negative}


def sdxl(base: LoadedModel, scheduler: Any, recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    first, second = (encoders_of(base)[name] for name in ("text_encoder", "text_encoder_2"))
    vae = base.parts["vae"]
    if recipe.vae_dtype == "float16":
        vae = vae.to(torch.float16)  # the pipeline converts it to float32 for decoding
    pipeline = StableDiffusionXLPipeline(
        vae,
        first.encoder,
        second.encoder,
        first.tokenizer,
        second.tokenizer,
        base.parts["unet"],
        scheduler,
        add_watermarker=False,
    )

    def encode(*texts: str) -> tuple[torch.Tensor, torch.Tensor]:
        def one(reader: ClipEncoder, text: str) -> Any:
            return reader.encode(text)

        with torch.no_grad():
            read = [one(reader, text) for reader, text in zip((first, second), texts, strict=True)]
        return torch.cat([text.states for text in read], dim=-1), read[1].pooled

    second_negative = (
        recipe.negative_prompt if recipe.negative_prompt_2 is None else recipe.negative_prompt_2
    )
    (text, pooled), (negative, negative_pooled) = (
        encode(recipe.prompt, recipe.prompt),
        encode(recipe.negative_prompt, second_negative),
    )
    return pipeline, {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", SMALL)
def test_the_engine_gives_the_pixels_of_the_trainers_pipeline(engine, model, sampler, dtype):
    recipe = replace(
        SMALL[model], sampler=sampler, dtype=dtype, vae_dtype=dtype, text_encoder_dtype=dtype
    )
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


@pytest.mark.parametrize("sampler", [name for name, one in SAMPLERS.items() if one.spacings])
@pytest.mark.parametrize("model", SMALL)
def test_trailing_timesteps_give_the_pixels_of_the_pipeline(engine, model, sampler):
    recipe = replace(SMALL[model], sampler=sampler, steps=8, timestep_spacing="trailing")
    made = engine.generate(recipe).pixels
    assert np.array_equal(made, pipeline_pixels(recipe))
    default = engine.generate(replace(recipe, timestep_spacing="default")).pixels
    assert not np.array_equal(made, default)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SMALL)
def test_sgm_uniform_gives_the_pixels_of_the_pipeline(engine, model, dtype):
    recipe = replace(
        SMALL[model], sampler="euler", timestep_spacing="sgm_uniform", guidance_scale=1.0,
        dtype=dtype, vae_dtype=dtype, text_encoder_dtype=dtype,
    )  # fmt: skip
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", ["default", "trailing"])
@pytest.mark.parametrize("sampler", ["tcd", "ddim"])
@pytest.mark.parametrize("model", SMALL)
def test_eta_gives_the_pixels_of_the_pipeline(engine, model, sampler, spacing, eta):
    recipe = replace(SMALL[model], sampler=sampler, timestep_spacing=spacing, eta=eta, steps=4)
    made = engine.generate(recipe).pixels
    assert np.array_equal(made, pipeline_pixels(recipe))
    other = engine.generate(replace(recipe, eta=0.5)).pixels
    assert not np.array_equal(made, other)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("model", SMALL)
def test_guidance_begins_above_one_as_in_the_pipeline(engine, model, guidance_scale):
    recipe = replace(SMALL[model], steps=4, guidance_scale=guidance_scale)
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SMALL)
def test_guidance_is_rescaled_as_in_the_pipeline(engine, model, dtype):
    recipe = replace(
        SMALL[model], guidance_rescale=0.7, dtype=dtype, vae_dtype=dtype, text_encoder_dtype=dtype
    )
    rescaled = engine.generate(recipe).pixels
    assert np.array_equal(rescaled, pipeline_pixels(recipe))
    assert not np.array_equal(
        rescaled, engine.generate(replace(recipe, guidance_rescale=0.0)).pixels
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("force_upcast", [True, False])
def test_force_upcast_decodes_a_float16_vae_in_float32(
    engine, tmp_path: Path, force_upcast: bool, dtype: str
):
    """SDXL's VAE overflows in float16; the pipeline decodes in float32 with the rounded weights."""
    import json

    base = tmp_path / "base"
    shutil.copytree(TINY_SDXL, base)
    config = read_json(base / "vae" / "config.json") | {"force_upcast": force_upcast}
    (base / "vae" / "config.json").write_text(json.dumps(config))
    dtypes: Any = {"dtype": dtype, "text_encoder_dtype": dtype, "vae_dtype": "float16"}
    recipe = replace(SMALL["sdxl"], base_model=str(base), **dtypes)
    if force_upcast:
        assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))
    loaded: Any = load_model_of(recipe).parts["vae"]
    assert loaded.dtype == (torch.float32 if force_upcast else torch.float16)
    assert all(
        torch.equal(weight, weight.half().to(weight.dtype)) for weight in loaded.parameters()
    )


def test_the_size_conditioning_has_the_dtype_of_the_text(engine):
    """The pipeline rounds the size to the text's dtype; in bfloat16, 520 becomes another number."""
    recipe = replace(
        SMALL["sdxl"],
        width=64,
        height=520,
        steps=2,
        dtype="bfloat16",
        vae_dtype="bfloat16",
        text_encoder_dtype="bfloat16",
    )
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))
