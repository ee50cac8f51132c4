"""Facts about the first image that are found before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from tests.support import TINY_BASE, TINY_SDXL, TINY_ZIMAGE

from fidelora import Recipe
from fidelora.engine import first_image
from fidelora.engine.first_image import is_cpu, weight_bytes
from fidelora.engine.model import ModelKey, load_model

MODELS = {"sd15": TINY_BASE, "sdxl": TINY_SDXL, "zimage": TINY_ZIMAGE}


@pytest.mark.parametrize("model", MODELS)
def test_size_of_the_weights_is_that_of_the_loaded_model(model):
    import torch

    recipe = Recipe(prompt="", model=model, base_model=str(MODELS[model]))
    key = ModelKey.of(recipe)
    loaded = load_model(key, key.find_files(), torch.device("cpu"))

    assert weight_bytes(recipe, "cpu") == pytest.approx(loaded.size_bytes, rel=0.02)


def test_half_of_the_size_is_expected_in_half_precision():
    recipe = Recipe(prompt="", base_model=str(TINY_BASE))
    half = replace(recipe, dtype="bfloat16", vae_dtype="bfloat16", text_encoder_dtype="bfloat16")
    assert weight_bytes(half, "cpu") * 2 == weight_bytes(recipe, "cpu")
    fast = replace(recipe, fidelity="fast")
    assert weight_bytes(half, "cpu") < weight_bytes(fast, "cpu") < weight_bytes(recipe, "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": "./missing"},
        {"base_model": "nobody/has-this"},
        {"vae": "nobody/has-this-vae"},
        {"base_model": str(TINY_BASE / "model_index.json")},
    ],
)
def test_unknown_sizes_are_zero(changes):
    recipe = replace(Recipe(prompt="", base_model=str(TINY_BASE)), **changes)
    assert weight_bytes(recipe, "cpu") == 0


def test_nothing_is_reserved_unless_the_device_is_the_cpu(monkeypatch, tmp_path):
    recipe = Recipe(prompt="", base_model=str(TINY_BASE))
    assert weight_bytes(recipe, "cuda") == 0
    (tmp_path / "driver").touch()
    monkeypatch.setattr(first_image, "_GPU_FILES", [str(tmp_path / "driver")])
    assert not is_cpu("auto")
    assert weight_bytes(recipe, "auto") == 0
    assert is_cpu("cpu")


def test_size_is_found_without_torch():
    script = (
        "import sys; from fidelora import Recipe;"
        "from fidelora.engine.first_image import weight_bytes;"
        f"assert weight_bytes(Recipe(prompt='', base_model={str(TINY_BASE)!r}), 'cpu') > 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
