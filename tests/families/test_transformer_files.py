"""Single-file checkpoints with only a transformer, under the names of ComfyUI."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import (
    TINY_CHROMA,
    TINY_FLUX,
    TINY_LUMINA2,
    TINY_QWEN_IMAGE,
    TINY_ZIMAGE,
)
from torch import Tensor

from fidelora import Engine, Recipe
from fidelora.errors import BaseModelFilesError, BaseModelWeightsError
from fidelora.families import get_family
from fidelora.families.lumina2.names import fused_names, original_names

BASES = {
    "zimage": TINY_ZIMAGE,
    "zimage_turbo": TINY_ZIMAGE,
    "lumina2": TINY_LUMINA2,
    "qwen_image": TINY_QWEN_IMAGE,
}
SETTINGS: dict[str, Any] = {
    "prompt": "a red ball", "width": 64, "height": 96, "steps": 3, "seed": 11,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)


def weights_of(base: Path) -> dict[str, Tensor]:
    return load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")


def of_zimage(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under ComfyUI's names."""
    found: dict[str, Tensor] = {"norm_final.weight": torch.ones(64)}
    for key, value in weights.items():
        if ".attention.to_q." in key:
            parts = [weights[key.replace("to_q", f"to_{one}")] for one in "qkv"]
            found[key.replace("to_q", "qkv")] = torch.cat(parts)
        elif not re.search(r"\.attention\.to_[kv]\.", key):
            name = key.replace("attention.to_out.0", "attention.out")
            name = name.replace("norm_q", "q_norm").replace("norm_k", "k_norm")
            found[re.sub(r"all_(x_embedder|final_layer)\.2-1", r"\1", name)] = value
    return found


def of_lumina2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of the original code."""
    modules = {key.rpartition(".")[0] for key in weights}
    named, fused = original_names(modules), fused_names(modules)
    inside = {path: name for name, paths in fused.items() for path in paths}
    found: dict[str, Tensor] = {"norm_final.weight": torch.ones(64)}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        if module in named:
            found[f"{named[module]}.{kind}"] = value
        elif module in inside:
            paths = fused[inside[module]]
            found[f"{inside[module]}.{kind}"] = torch.cat([weights[f"{p}.{kind}"] for p in paths])
        else:
            name = key.replace("time_caption_embed.caption_embedder.", "cap_embedder.")
            name = name.replace("attn.norm_q", "attention.q_norm")
            name = name.replace("attn.norm_k", "attention.k_norm")
            name = re.sub(r"(\d)\.norm1\.(norm\.)?weight", r"\1.attention_norm1.weight", name)
            found[re.sub(r"(\d)\.norm2\.weight", r"\1.attention_norm2.weight", name)] = value
    return found


def original_of(model: str) -> dict[str, Tensor]:
    convert = {"zimage": of_zimage, "zimage_turbo": of_zimage, "lumina2": of_lumina2}
    weights = weights_of(BASES[model])
    found = convert.get(model, dict)(weights)
    assert model == "qwen_image" or found.keys() != weights.keys()
    return {key: value.contiguous() for key, value in found.items()}


def write(path: Path, weights: dict[str, Tensor], prefix: str = "") -> Path:
    save_file({prefix + key: value for key, value in weights.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("model", BASES)
def test_a_file_gives_the_image_of_the_folder(engine, tmp_path, model, prefix):
    file = write(tmp_path / "x.safetensors", original_of(model), prefix)
    recipe = Recipe(model=model, base_model=str(BASES[model]), **SETTINGS)
    one = replace(recipe, base_model=str(file), config=str(BASES[model]))
    assert np.array_equal(engine.generate(one).pixels, engine.generate(recipe).pixels)


@pytest.mark.parametrize("model", ["zimage", "lumina2"])
def test_a_file_with_diffusers_names_gives_it_too(engine, tmp_path, model):
    file = write(tmp_path / "x.safetensors", weights_of(BASES[model]))
    recipe = Recipe(model=model, base_model=str(BASES[model]), **SETTINGS)
    one = replace(recipe, base_model=str(file), config=str(BASES[model]))
    assert np.array_equal(engine.generate(one).pixels, engine.generate(recipe).pixels)


@pytest.mark.parametrize("model", [*BASES, "flux"])
@pytest.mark.parametrize("other", [*BASES.values(), TINY_FLUX, TINY_CHROMA])
def test_a_file_of_another_family_is_refused(engine, model, other):
    own = {**BASES, "flux": TINY_FLUX}[model]
    if own == other:
        pytest.skip("the family's own")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    recipe = Recipe(model=model, base_model=str(file), config=str(own), **SETTINGS)
    with pytest.raises(BaseModelFilesError, match="is not a checkpoint of"):
        engine.generate(recipe)


@pytest.mark.parametrize("model", BASES)
def test_a_file_with_scaled_float8_is_refused_as_quantised(engine, tmp_path, model):
    """As ComfyUI writes it: float8 weights, a scale beside each, and a mark."""
    weights = original_of(model)
    key = next(key for key, value in weights.items() if value.dim() == 2)
    weights[key] = weights[key].to(torch.float8_e4m3fn)
    weights[f"{key.removesuffix('weight')}scale_weight"] = torch.ones(1)
    weights["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    file = write(tmp_path / "x.safetensors", weights)
    recipe = Recipe(model=model, base_model=str(file), config=str(BASES[model]), **SETTINGS)
    with pytest.raises(BaseModelWeightsError, match="are quantised, which is not supported"):
        engine.generate(recipe)


def test_the_other_parts_come_from_the_familys_own_base():
    for model in (*BASES, "flux", "flex1", "flux_cfg", "qwen_image_2512"):
        family = get_family(model)
        companions = {part.companion for part in family.parts if part.role != "denoiser"}
        assert companions == {family.base_model}
        assert family.part("denoiser").companion == ""
