"""Transformers with offloading and with sharded weights: the same bits as without."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from safetensors.torch import load_file, save_file
from tests.support import (
    CHROMA_LORA,
    FLUX_LORA,
    KLEIN_LORA,
    LUMINA2_LORA,
    QWEN_LORA,
    TINY_CHROMA,
    TINY_FLUX,
    TINY_KLEIN,
    TINY_LUMINA2,
    TINY_QWEN_IMAGE,
    TINY_WAN21,
    TINY_ZIMAGE,
    WAN21_LORA,
    ZIMAGE_LORA,
)

from fidelora import AdapterRef, Engine, Recipe
from fidelora.errors import BaseModelFilesError
from fidelora.families import get_family

RUNS = {
    "zimage": (TINY_ZIMAGE, ZIMAGE_LORA),
    "flux": (TINY_FLUX, FLUX_LORA),
    "chroma": (TINY_CHROMA, CHROMA_LORA),
    "flux2_klein_4b": (TINY_KLEIN, KLEIN_LORA),
    "qwen_image": (TINY_QWEN_IMAGE, QWEN_LORA),
    "lumina2": (TINY_LUMINA2, LUMINA2_LORA),
    "wan21_1b": (TINY_WAN21, WAN21_LORA),
}
SHARDED = {model: base for model, (base, _) in RUNS.items() if base != TINY_KLEIN}
"""Base models in diffusers' layout, whose weights can be sharded."""


def recipe_of(model: str, **changes: Any) -> Recipe:
    return Recipe(
        model=model, prompt="a red ball", base_model=str(RUNS[model][0]), width=64, height=80,
        steps=2, seed=11, guidance_scale=3.5, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)


def offloading(offload: Any) -> Engine:
    """Return an engine that offloads from the CPU to the CPU, which `Engine` refuses."""
    engine = Engine(device="cpu")
    engine._models._offload = offload
    return engine


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("model", RUNS)
def test_offloading_preserves_every_bit(engine, monkeypatch, model, offload):
    """With `sequential`, weights have no data outside the call of their own layer."""
    moved: list[torch.nn.Module] = []
    original = CpuOffload.pre_forward

    def pre_forward(hook: CpuOffload, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append(module)
        return original(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    other = offloading(offload)
    adapters = (AdapterRef.from_file(RUNS[model][1], 0.7),)
    plain = recipe_of(model)
    pixels = []
    for recipe in (
        plain,
        replace(plain, adapters=adapters),
        replace(plain, adapters=adapters, adapter_mode="live"),
        plain,
    ):
        pixels.append(engine.generate(recipe).pixels)
        assert np.array_equal(other.generate(recipe).pixels, pixels[-1])
    assert not np.array_equal(pixels[0], pixels[1])
    if offload == "model":  # a part without such a call would stay on the CPU
        assert len(set(moved)) == len(get_family(model).parts)


def shard(folder: Path, name: str, count: int) -> list[Path]:
    """Replace a weight file by shards and their index, as diffusers and transformers write them."""
    file = folder / f"{name}.safetensors"
    tensors = load_file(file)
    file.unlink()
    paths = [folder / f"{name}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    places: dict[str, str] = {}
    for number, path in enumerate(paths):
        chosen = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save_file(chosen, path, {"format": "pt"})
        places |= dict.fromkeys(chosen, path.name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return paths


@pytest.mark.parametrize("model", SHARDED)
def test_sharded_weights_give_the_same_bits(engine, tmp_path, model):
    base = Path(shutil.copytree(SHARDED[model], tmp_path / "base"))
    family = get_family(model)
    for part in family.parts:
        if part.role != "decoder":
            shard(base / part.name, part.weights, 3)
    recipe = recipe_of(model, adapters=(AdapterRef.from_file(RUNS[model][1]),))
    sharded = replace(recipe, base_model=str(base))
    assert np.array_equal(engine.generate(sharded).pixels, engine.generate(recipe).pixels)


@pytest.mark.parametrize("model", SHARDED)
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_named(engine, tmp_path, model, lost):
    base = Path(shutil.copytree(SHARDED[model], tmp_path / "base"))
    part = get_family(model).part("denoiser")
    path = shard(base / part.name, part.weights, 3)[lost]
    path.unlink()
    with pytest.raises(BaseModelFilesError) as caught:
        engine.generate(replace(recipe_of(model), base_model=str(base)))
    assert f"The base model has no {part.name}/{path.name}" in str(caught.value)
