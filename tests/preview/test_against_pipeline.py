"""Every sampler, against the pipeline that the trainer itself paints its previews with.

The golden jobs show four samplers. Here the trainer's way is built from the same library that it uses: its configuration with
`steps_offset` 0, handed to the pipeline's constructor (which rewrites it), prompts encoded one by one, one CPU generator. Our own
loop has to give the same pixels, for every sampler and in half precision too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, schedulers
from tests.support import TINY_BASE

from fidelora import Engine, Recipe
from fidelora.engine.base import BaseKey, BaseModel, load_base
from fidelora.engine.text import encode_text
from fidelora.models import model_spec

SPEC = model_spec("sd15")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def the_trainer_s_way(base: BaseModel, recipe: Recipe) -> Any:
    sampler = SPEC.samplers[recipe.sampler]
    config = {**SPEC.scheduler_config, "steps_offset": 0, **sampler.options}
    scheduler = getattr(schedulers, sampler.scheduler).from_config(config)
    pipeline = StableDiffusionPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    embeddings = [
        encode_text(base.tokenizer, base.text_encoder, text, torch.device("cpu")).embedding
        for text in (recipe.prompt, recipe.negative_prompt)
    ]
    with torch.no_grad():
        image = pipeline(
            prompt_embeds=embeddings[0],
            negative_prompt_embeds=embeddings[1],
            width=recipe.width,
            height=recipe.height,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
        ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", SPEC.samplers)
def test_our_loop_gives_the_pixels_of_the_trainer_s_pipeline(engine, sampler, dtype):
    recipe = Recipe(
        prompt="a photo of a ball", negative_prompt="blurry", base_model=str(TINY_BASE), width=72, height=72, steps=6, seed=11,
        guidance_scale=5.5, sampler=sampler, dtype=dtype,
    )  # fmt: skip
    base = load_base(BaseKey.of(recipe), torch.device("cpu"))
    base.merged.apply([])
    assert np.array_equal(engine.generate(recipe).pixels, the_trainer_s_way(base, recipe))


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_guidance_begins_above_one_as_in_the_pipeline(engine, guidance_scale):
    recipe = Recipe(
        prompt="a ball", negative_prompt="blurry", base_model=str(TINY_BASE), width=64, height=64, steps=4,
        guidance_scale=guidance_scale,
    )  # fmt: skip
    base = load_base(BaseKey.of(recipe), torch.device("cpu"))
    base.merged.apply([])
    assert np.array_equal(engine.generate(recipe).pixels, the_trainer_s_way(base, recipe))
