"""Training of a flow model (`tools/miniature/train_flow.py`): its files and its conventions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from tools.miniature import common, train_flow, world
from tools.miniature.train_unet import held_out_scenes, training_scenes
from torch import nn
from transformers import Qwen3Config, Qwen3Model

import fidelora
from fidelora import Engine, Recipe

VAE = Path(fidelora.__file__).parent / "miniature" / "vae"
SEED, STEPS = 7, 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_flow.make_tokenizer(training_scenes(300, train_flow.SEED))


def test_captions_fit_into_the_tokens_to_which_texts_are_padded(tokenizer):
    rng = np.random.default_rng(0)
    for scene in held_out_scenes(100, 0):
        text = f"<|im_start|>{world.caption(scene, rng)}<|im_end|>"
        assert len(tokenizer(text).input_ids) <= 32


def test_the_engine_draws_the_pictures_of_the_training_script(tokenizer, tmp_path):
    """Sign, time, text states, schedule and guidance of the training are those of the family."""
    torch.manual_seed(SEED)
    text_encoder = Qwen3Model(Qwen3Config(**train_flow.TEXT_CONFIG)).eval()
    transformer = ZImageTransformer2DModel(**train_flow.TRANSFORMER_CONFIG).eval()
    train_flow.initialise(transformer)
    nn.init.normal_(transformer.all_final_layer["2-1"].linear.weight, std=0.1)
    train_flow.save(tmp_path / "flow", VAE, tokenizer, text_encoder, transformer)
    prompt = "a red circle on a blue background"
    with torch.no_grad():
        texts = train_flow.embed(tokenizer, text_encoder, [prompt, ""])
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
        latents = train_flow.sample(transformer, texts, noise, STEPS)
        vae = AutoencoderKL.from_pretrained(VAE).float()
        (wanted,) = common.to_pixels(vae.decode(latents / vae.config.scaling_factor).sample)

    recipe = Recipe(
        prompt=prompt, model="zimage", base_model=str(tmp_path / "flow"), steps=STEPS, seed=SEED,
        width=world.SIZE, height=world.SIZE, guidance_scale=train_flow.GUIDANCE,
    )  # fmt: skip
    found = Engine(device="cpu").generate(recipe).pixels
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
