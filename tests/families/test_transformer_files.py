"""Single-file checkpoints with only a transformer, under the names of ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tests.families.test_flux import as_checkpoint as of_flux
from tests.support import (
    TINY_BASE,
    TINY_CHROMA,
    TINY_FLUX,
    TINY_KLEIN,
    TINY_LUMINA2,
    TINY_QWEN_IMAGE,
    TINY_SDXL,
    TINY_WAN21,
    TINY_ZIMAGE,
)
from torch import Tensor

from fidelora import Engine, Recipe
from fidelora.errors import (
    BaseModelFilesError,
    BaseModelNotFoundError,
    BaseModelWeightsError,
)
from fidelora.families import all_families, get_family
from fidelora.families.lumina2.names import fused_names, original_names
from fidelora.families.wan.names import original_names as wan_names
from fidelora.weights.files import BaseFiles

BASES = {
    "zimage": TINY_ZIMAGE,
    "zimage_turbo": TINY_ZIMAGE,
    "zimage_deturbo": TINY_ZIMAGE,
    "flux": TINY_FLUX,
    "flex1": TINY_FLUX,
    "flux_cfg": TINY_FLUX,
    "chroma": TINY_CHROMA,
    "flux2_klein_4b": TINY_KLEIN,
    "qwen_image": TINY_QWEN_IMAGE,
    "qwen_image_2512": TINY_QWEN_IMAGE,
    "lumina2": TINY_LUMINA2,
    "wan21_1b": TINY_WAN21,
    "wan21_14b": TINY_WAN21,
}
WHOLE = {"sd15": TINY_BASE, "sdxl": TINY_SDXL}
"""Families whose single files contain all parts."""

SETTINGS: dict[str, Any] = {
    "prompt": "a red ball", "width": 64, "height": 96, "steps": 3, "seed": 11,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)


def file_of(base: Path) -> Path:
    original = base / "flux-2-klein-base-4b.safetensors"
    folder = "unet" if base in WHOLE.values() else "transformer"
    return original if original.is_file() else base / folder / "diffusion_pytorch_model.safetensors"


def weights_of(base: Path) -> dict[str, Tensor]:
    return load_file(file_of(base))


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


def of_wan(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of the original code."""
    named = wan_names({key.rpartition(".")[0] for key in weights})
    others = {
        "norm2.": "norm3.", "attn1.norm": "self_attn.norm", "attn2.norm": "cross_attn.norm",
        "scale_shift_table": "modulation",
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        name = f"{named[module]}.{kind}" if module in named else key
        if module not in named:
            for theirs, own in others.items():
                name = name.replace(theirs, own)
        found[f"head.{name}" if name == "modulation" else name] = value
    return found


CONVERT: dict[Path, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    TINY_ZIMAGE: of_zimage,
    TINY_LUMINA2: of_lumina2,
    TINY_WAN21: of_wan,
    TINY_FLUX: lambda weights: of_flux(),
}
"""Conversions of the tiny base models; the others have the names of ComfyUI already."""


def original_of(model: str) -> dict[str, Tensor]:
    weights = weights_of(BASES[model])
    found = CONVERT.get(BASES[model], dict)(weights)
    assert (found.keys() != weights.keys()) == (BASES[model] in CONVERT)
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


@pytest.mark.parametrize("model", ["zimage", "lumina2", "wan21_1b"])
def test_a_file_with_diffusers_names_gives_the_same_image(engine, tmp_path, model):
    file = write(tmp_path / "x.safetensors", weights_of(BASES[model]))
    recipe = Recipe(model=model, base_model=str(BASES[model]), **SETTINGS)
    one = replace(recipe, base_model=str(file), config=str(BASES[model]))
    assert np.array_equal(engine.generate(one).pixels, engine.generate(recipe).pixels)


def test_a_file_of_klein_with_diffusers_names_gives_the_image(engine, tmp_path):
    weights = convert_flux2_transformer_checkpoint_to_diffusers(weights_of(TINY_KLEIN))
    weights = {key: value.contiguous() for key, value in weights.items()}
    file = write(tmp_path / "x.safetensors", weights)
    recipe = Recipe(model="flux2_klein_4b", base_model=str(TINY_KLEIN), **SETTINGS)
    one = replace(recipe, base_model=str(file), config=str(TINY_KLEIN))
    assert np.array_equal(engine.generate(one).pixels, engine.generate(recipe).pixels)


@pytest.mark.parametrize("model", {base: model for model, base in BASES.items()}.values())
@pytest.mark.parametrize(
    "other", dict.fromkeys((*BASES.values(), *WHOLE.values())), ids=lambda base: base.name
)
def test_a_file_of_another_family_is_refused(engine, model, other):
    own = BASES[model]
    if own == other:
        pytest.skip("the family's own")
    recipe = Recipe(model=model, base_model=str(file_of(other)), config=str(own), **SETTINGS)
    with pytest.raises(BaseModelFilesError, match="is not a checkpoint of"):
        engine.generate(recipe)


def test_files_of_related_models_are_refused(engine, tmp_path):
    """Wan 2.1 from images, and other models of FLUX.2, which embed the guidance scale."""
    related = {
        "wan21_1b": "img_emb.proj.0.weight",
        "flux2_klein_4b": "guidance_in.in_layer.weight",
    }
    for model, key in related.items():
        file = write(tmp_path / "x.safetensors", original_of(model) | {key: torch.zeros(4)})
        recipe = Recipe(model=model, base_model=str(file), config=str(BASES[model]), **SETTINGS)
        with pytest.raises(BaseModelFilesError, match="is not a checkpoint of"):
            engine.generate(recipe)


@pytest.mark.parametrize("model", [*BASES, *WHOLE])
@pytest.mark.parametrize("style", ["scaled_fp8", "comfy_quant", "metadata", "bitsandbytes"])
def test_a_file_with_scaled_weights_is_refused_by_name(tmp_path, model, style):
    """It is refused before anything is computed, whatever the other weights of the file are."""
    base = {**BASES, **WHOLE}[model]
    weights = weights_of(base)
    key = next(key for key, value in weights.items() if value.dim() == 2)
    module = key.removesuffix("weight")
    weights[key] = weights[key].to(torch.float8_e4m3fn)
    extra = {
        "scaled_fp8": ("scale_weight", "scale_input"),
        "comfy_quant": ("weight_scale", "input_scale", "comfy_quant"),
        "metadata": (),
        "bitsandbytes": ("weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
    }[style]
    weights |= {module + name: torch.ones(1) for name in extra}
    if style == "scaled_fp8":
        weights["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    file = tmp_path / "x.safetensors"
    save_file(weights, file, {"_quantization_metadata": "{}"} if style == "metadata" else None)
    program = "bitsandbytes" if style == "bitsandbytes" else "ComfyUI"
    files = BaseFiles.find(get_family(model), str(file), config=str(base))
    with pytest.raises(BaseModelWeightsError) as caught:
        files.read()
    assert f"x.safetensors is quantised in a format of {program}" in str(caught.value)
    assert "Use the same model in bfloat16 or float16." in str(caught.value)
    assert all(module + name in str(caught.value) for name in extra[:1])


@pytest.mark.parametrize("model", BASES)
def test_a_file_in_plain_float8_is_refused(engine, tmp_path, model):
    weights = original_of(model)
    linear = {key for key, value in weights.items() if value.dim() == 2}
    weights |= {key: weights[key].to(torch.float8_e4m3fn) for key in linear}
    file = write(tmp_path / "x.safetensors", weights)
    recipe = Recipe(model=model, base_model=str(file), config=str(BASES[model]), **SETTINGS)
    with pytest.raises(BaseModelWeightsError, match="are quantised, which is not supported"):
        engine.generate(recipe)


def test_the_page_lists_every_model_with_the_place_of_its_other_parts():
    page = (Path(__file__).parents[2] / "docs" / "models" / "single-files.md").read_text()
    rows = re.findall(r"^\| (`.+`) \| .+ \| (.+) \|$", page, re.MULTILINE)
    places = {model: place for ids, place in rows for model in re.findall(r"`(\w+)`", ids)}
    for model, family in all_families().items():
        companions = {part.companion for part in family.parts if part.companion}
        if family.checkpoint:
            assert places.pop(model) == (f"`{companions.pop()}`" if companions else "in the file")
    assert not places


@pytest.mark.parametrize(
    ("base", "options", "says"),
    [
        (
            file_of(TINY_CHROMA),
            {},
            r"safetensors lacks these parts of Chroma: text encoder 2, vae\. "
            r"ostris/Flex\.1-alpha is neither .* cannot be reached\. "
            r"Set --config .config in Python. to a local folder",
        ),
        (TINY_FLUX, {"decoder": "me/vae"}, r"me/vae is .*Set --vae .* to a local folder or file"),
        ("me/base", {}, r"^me/base is .*Set --base-model .* to a local folder or file"),
    ],
)
def test_missing_parts_are_named_if_the_hub_is_out_of_reach(monkeypatch, base, options, says):
    def unreachable(*_args: object, **_options: object) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("fidelora.weights.locate.snapshot_download", unreachable)
    family = get_family("chroma" if base == file_of(TINY_CHROMA) else "flux")
    with pytest.raises(BaseModelNotFoundError, match=says):
        BaseFiles.find(family, str(base), **options)


def test_the_other_parts_come_from_the_familys_own_base():
    for model in BASES:
        family = get_family(model)
        expected = {
            "chroma": "ostris/Flex.1-alpha",
            "zimage_deturbo": "Tongyi-MAI/Z-Image-Turbo",
            "wan21_14b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",  # the same text encoder and VAE
        }.get(model, family.base_model)
        companions = {part.companion for part in family.parts if part.role != "denoiser"}
        assert companions == {expected}
        assert family.part("denoiser").companion == ""
