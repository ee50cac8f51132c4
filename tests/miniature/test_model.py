"""The packaged miniature model: its files and images. `benchmarks/miniature.py` measures more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from safetensors import safe_open
from tests.support import MINIATURE_LORA
from tools.miniature import train_vae, world
from tools.miniature.exam import new_shape_scenes, scores
from tools.miniature.train_unet import held_out_scenes

import fidelora
from fidelora import AdapterRef, Engine, Recipe
from fidelora.errors import BaseModelNotFoundError
from fidelora.families import get_family
from fidelora.safetensors_header import read_file_header
from fidelora.weights.locate import is_portable, locate

pytestmark = pytest.mark.timeout(600)  # draws dozens of images

FOLDER = Path(fidelora.__file__).parent / "miniature"
BASE = Recipe(prompt="", base_model="fidelora:miniature", width=world.SIZE, height=world.SIZE)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def test_the_name_of_the_miniature_is_found_from_every_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = get_family("sd15")
    assert locate("fidelora:miniature", spec.parts) == FOLDER
    assert is_portable("fidelora:miniature")
    assert is_portable("owner/name")
    assert not is_portable(str(FOLDER))
    assert not is_portable("fidelora:maxiature")
    with pytest.raises(BaseModelNotFoundError, match="fidelora:miniature"):
        locate("fidelora:maxiature", spec.parts)


def test_the_files_have_the_layout_of_stable_diffusion_in_20_mb():
    index = json.loads((FOLDER / "model_index.json").read_text())
    for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        assert index[part][1]
        assert (FOLDER / part).is_dir()
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 20e6
    for part in ("text_encoder", "unet", "vae"):
        (weights,) = (FOLDER / part).glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            keys = file.keys()
            assert {str(file.get_slice(key).get_dtype()) for key in keys} == {"F16"}


def test_the_vae_preserves_images():
    rng = np.random.default_rng(6)
    images = np.stack([world.draw(world.random_scene(rng), rng) for _ in range(16)])
    assert train_vae.psnr(AutoencoderKL.from_pretrained(FOLDER / "vae").float(), images) >= 28


def test_the_pictures_show_the_prompts(engine):
    """24 prompts give the scores within ten percentage points; the benchmark uses 200."""
    guided = scores(engine, held_out_scenes(24, 11), BASE, 11)
    assert guided["colour"] >= 0.8, guided
    assert guided["shape"] >= 0.7, guided
    assert guided["background"] >= 0.9, guided


def test_the_adapter_teaches_the_trigger_word_a_new_shape(engine):
    adapter = AdapterRef.from_file(MINIATURE_LORA)
    scenes = new_shape_scenes(12, 12)
    assert scores(engine, scenes, replace(BASE, adapters=(adapter,)), 12)["shape"] >= 0.8
    without = replace(BASE, adapters=(replace(adapter, multiplier=0.0),))
    assert scores(engine, scenes[:4], without, 12)["shape"] == 0


def test_all_releases_of_transformers_read_the_text_encoder():
    """Releases whose module names contain `text_model.` do not load names without this prefix."""
    header = read_file_header(FOLDER / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in header.tensors)
