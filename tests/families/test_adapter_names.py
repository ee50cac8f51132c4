"""LoRAs in the names of ComfyUI and kohya, which fuse query, key and value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support import (
    LUMINA2_LORA,
    TINY_LUMINA2,
    TINY_ZIMAGE,
    ZIMAGE_LORA,
    load_model_of,
    save_adapter,
)
from torch import Tensor, nn

from fidelora import AdapterRef, Engine, Recipe
from fidelora.errors import AdapterMismatchError
from fidelora.families import get_family

SETTINGS: dict[str, Any] = {
    "prompt": "a red ball", "width": 64, "height": 80, "steps": 4, "seed": 11,
}  # fmt: skip
RUNS = {
    "lumina2": (TINY_LUMINA2, LUMINA2_LORA),
    "zimage": (TINY_ZIMAGE, ZIMAGE_LORA),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)


def recipe_of(family: str) -> Recipe:
    return Recipe(model=family, base_model=str(RUNS[family][0]), **SETTINGS)


def in_other_names(family: str, tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """Return a LoRA in diffusers' names under those of other programs, with fused modules.

    The factors of fused modules are stacked: `down` [rank * n, in], and `up` is block-diagonal.
    """
    part = next(one for one in get_family(family).parts if one.role == "denoiser")
    assert part.other_names is not None
    assert part.fused_names is not None
    factors: dict[str, list[Tensor]] = {}
    for key, value in tensors.items():
        path, suffix = key.split(".lora_")
        path = path.removeprefix("transformer.").removeprefix("diffusion_model.")
        factors.setdefault(path, [value, value])["AB".index(suffix[0])] = value
    fused = part.fused_names(factors)
    inside = {path for paths in fused.values() for path in paths}
    names = part.other_names(factors)
    named = {names.get(path, path): pair for path, pair in factors.items() if path not in inside}
    for name, paths in fused.items():
        downs, ups = zip(*(factors[path] for path in paths), strict=True)
        named[name] = [torch.cat(downs), torch.block_diag(*ups)]
    if style == "comfyui":
        return {
            f"diffusion_model.{name}.lora_{one}.weight": factor
            for name, pair in named.items()
            for one, factor in zip("AB", pair, strict=True)
        }
    return {
        f"lora_unet_{name.replace('.', '_')}.lora_{one}.weight": factor
        for name, pair in named.items()
        for one, factor in zip(("down", "up"), pair, strict=True)
    }


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
@pytest.mark.parametrize("mode", ["merged", "live"])
@pytest.mark.parametrize("family", RUNS)
def test_a_lora_in_the_names_of_other_programs_is_equal(engine, tmp_path, family, mode, style):
    lora = RUNS[family][1]
    tensors = in_other_names(family, load_file(lora), style)
    assert any("qkv" in key for key in tensors)
    file = save_adapter(tmp_path / "a.safetensors", tensors)
    images = []
    for path in (lora, file):
        adapters = (AdapterRef.from_file(path),)
        recipe = replace(recipe_of(family), adapters=adapters, adapter_mode=mode)
        images.append(engine.generate(recipe).pixels.astype(int))
    # The sums over the rank also have the zeros of the other blocks, and are in another order.
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - engine.generate(recipe_of(family)).pixels.astype(int)).max() > 20


@pytest.mark.parametrize("family", RUNS)
def test_every_linear_layer_has_a_name_of_other_programs(family):
    part = next(one for one in get_family(family).parts if one.role == "denoiser")
    assert part.other_names is not None
    assert part.fused_names is not None
    model = load_model_of(recipe_of(family)).parts["transformer"]
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    fused = {path for one in part.fused_names(paths).values() for path in one}
    renamed = part.other_names(paths)
    blocks = [path for path in paths if path.startswith(("layers.", "noise_", "context_"))]
    assert {path for path in blocks if ".to_q" in path} <= fused
    if family == "lumina2":  # ComfyUI's names of Z-Image are diffusers' in all other modules
        left = set(blocks) - fused - renamed.keys()
        assert not left


def test_rows_of_another_size_are_refused(engine, tmp_path):
    tensors = in_other_names("lumina2", load_file(LUMINA2_LORA), "comfyui")
    key = next(key for key in tensors if "qkv.lora_B" in key)
    tensors[key] = tensors[key][:-1]
    file = save_adapter(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterMismatchError):
        engine.generate(replace(recipe_of("lumina2"), adapters=(AdapterRef.from_file(file),)))
