"""Formats of adapters, from the file to the image: `inspect` and `generate` always agree."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from tests.support import (
    TINY_BASE,
    TINY_SDXL,
    load_model_of,
    save_adapter,
    weights_of,
)
from torch import Tensor

from fidelora import AdapterRef, Engine, Recipe
from fidelora.accel.packed import PackedLinear
from fidelora.adapters.module_names import canonical_name
from fidelora.adapters.read import read_adapter
from fidelora.engine.examine import examine_adapter
from fidelora.engine.model import LoadedModel
from fidelora.errors import AdapterError, AdapterMismatchError, WeightsFileError

SMALL: dict[str, Any] = {"base_model": str(TINY_BASE), "width": 64, "height": 64, "steps": 1}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PATH = f"{BLOCK}.attn1.to_out.0"  # [16, 16], with a bias
FLAT = "lora_unet_" + PATH.replace(".", "_")
NORM = "lora_unet_down_blocks_0_attentions_0_norm"
TEXT = "lora_te_text_model_encoder_layers_0_layer_norm1"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2


def lora(module: str, down: str, up: str, width: int = 16) -> dict[str, Tensor]:
    return {
        f"{module}{down}": numbers(4, width, seed=1),
        f"{module}{up}": numbers(width, 4, seed=2),
    }


KOHYA = lora(FLAT, ".lora_down.weight", ".lora_up.weight")
PEFT = lora(f"unet.{PATH}", ".lora_A.weight", ".lora_B.weight")

ACCEPTED: dict[str, dict[str, Tensor]] = {
    "kohya": KOHYA,
    "PEFT": PEFT,
    "PEFT with its prefix": lora(f"base_model.model.{PATH}", ".lora_A.weight", ".lora_B.weight"),
    "PEFT in a part": lora(f"unet.base_model.model.{PATH}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers 2023": lora(f"unet.{PATH}", ".lora.down.weight", ".lora.up.weight"),
    "attention processors": lora(
        f"unet.{BLOCK}.attn1.processor.to_out_lora", ".down.weight", ".up.weight"
    ),
    "processors without a part": lora(
        f"{BLOCK}.attn1.processor.to_out_lora", ".down.weight", ".up.weight"
    ),
    "original code": lora(
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "ComfyUI": lora(
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        ".lora_A.weight",
        ".lora_B.weight",
    ),
    "original code without a part": lora(
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0", ".lora_A.weight", ".lora_B.weight"
    ),
    "DoRA of LyCORIS": {**KOHYA, f"{FLAT}.dora_scale": numbers(1, 16).abs() + 1},
    "DoRA of PEFT": {**PEFT, f"unet.{PATH}.lora_magnitude_vector.weight": numbers(16).abs() + 1},
    "DoRA of AI Toolkit": {**KOHYA, f"{FLAT}.magnitude": numbers(16).abs() + 1},
    "full": {f"{FLAT}.diff": numbers(16, 16), f"{FLAT}.diff_b": numbers(16)},
    "bias": {f"{FLAT}.diff_b": numbers(16)},
    "norm": {f"{NORM}.w_norm": numbers(16), f"{NORM}.b_norm": numbers(16)},
    "norm of the text encoder": {f"{TEXT}.diff": numbers(32), f"{TEXT}.diff_b": numbers(32)},
    "GLoRA": {
        f"{FLAT}.a1.weight": numbers(16, 2),
        f"{FLAT}.a2.weight": numbers(2, 16),
        f"{FLAT}.b1.weight": numbers(16, 2),
        f"{FLAT}.b2.weight": numbers(2, 16),
    },
    "(IA)^3": {f"{FLAT}.weight": numbers(16), f"{FLAT}.on_input": torch.tensor([False])},
    "OFT": {f"{FLAT.replace('lora_unet', 'oft_unet')}.oft_blocks": numbers(4, 4, 4)},
    "BOFT": {f"{FLAT}.oft_blocks": numbers(3, 4, 4, 4)},
    "float8": {key: one.to(torch.float8_e4m3fn) for key, one in KOHYA.items()},
    "float8 with two exponents": {key: one.to(torch.float8_e5m2) for key, one in KOHYA.items()},
    "float64": {key: one.double() for key, one in KOHYA.items()},
    "alpha in a list": {**KOHYA, f"{FLAT}.alpha": torch.tensor([2])},
    "PEFT with the name of an adapter": lora(
        f"base_model.model.{PATH}", ".lora_A.my_lora.weight", ".lora_B.my_lora.weight"
    ),
    "PEFT with names of kohya": lora(FLAT, ".lora_A.weight", ".lora_B.weight"),
    "kohya with names of PEFT": lora(f"unet.{PATH}", ".lora_down.weight", ".lora_up.weight"),
    "DoRA of PEFT with the name of an adapter": {
        **lora(f"base_model.model.{PATH}", ".lora_A.default.weight", ".lora_B.default.weight"),
        f"base_model.model.{PATH}.lora_magnitude_vector.default.weight": numbers(16).abs() + 1,
    },
    "LoKr with one pair of factors": {
        f"{FLAT}.lokr_w1": numbers(4, 4),
        f"{FLAT}.lokr_w2_a": numbers(4, 2),
        f"{FLAT}.lokr_w2_b": numbers(2, 4),
        f"{FLAT}.alpha": torch.tensor(2.0),
        f"{FLAT}.dora_scale": numbers(16, 1).abs() + 1,
    },
    "(IA)^3 of inputs": {f"{FLAT}.weight": numbers(1, 16), f"{FLAT}.on_input": torch.tensor(1)},
    "full of the original code": {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.diff": numbers(16, 16)
    },
    "alpha 0": {**KOHYA, f"{FLAT}.alpha": torch.tensor(0.0)},
}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "two formats": ({**KOHYA, **PEFT}, "names 1 of its 2 modules twice"),
    "no such module": ({**KOHYA, "lora_unet_x.diff": numbers(2, 2)}, "1 of 2 modules"),
    "bias that is missing": (
        {**KOHYA, f"{FLAT.replace('to_out_0', 'to_k')}.diff_b": numbers(16)},
        "1 of 2 modules",
    ),
    "cloneofsimo": ({"unet:0:up": numbers(16, 4), "unet:0:down": numbers(4, 16)}, "cloneofsimo"),
    "OFT of PEFT": ({f"{FLAT}.oft_R.weight": numbers(4, 6)}, "is an OFT in the format of PEFT"),
    **{
        f"{what} of PEFT": ({f"base_model.model.{PATH}.{key}": numbers(4, 4)}, f"{what} in the f")
        for what, key in (
            ("an AdaLoRA", "lora_E"),
            ("an HRA", "hra_u"),
            ("a FourierFT", "fourierft_spectrum"),
            ("an LN tuning", "ln_tuning_layers.weight"),
            ("a RandLora", "randlora_lambda"),
            ("a VB-LoRA", "vblora_logits_A"),
            ("a C3A", "c3a_kernel"),
            ("a SHiRA", "shira_weight"),
            ("a RoAd", "road_theta"),
            ("a Bone", "bone_block"),
            ("a MiSS", "miss_block"),
        )
    },
    **{
        what: ({key: numbers(4, 4)}, f"{what}, which is not supported")
        for what, key in (
            (
                "is a motion module of AnimateDiff, or its LoRA",
                "down_blocks.0.motion_modules.0.x.weight",
            ),
            ("is an IP-Adapter", "image_proj.proj.weight"),
            ("is a ControlNet", "control_model.input_blocks.0.0.weight"),
            ("is a VAE", "first_stage_model.decoder.conv_in.weight"),
            ("is a hypernetwork", "320.0.linear.0.weight"),
            (r"\(modules_to_save\)", "base_model.model.conv_out.modules_to_save.default.weight"),
            (r"\(base_layer\)", f"base_model.model.{PATH}.base_layer.weight"),
        )
    },
    "Control-LoRA": ({**KOHYA, "lora_controlnet": torch.ones(0)}, "is a Control-LoRA"),
    "several embeddings": ({"<a>": numbers(32), "<b>": numbers(32)}, "each in a file of its own"),
    "bundled embedding": ({**KOHYA, "bundle_emb.x.clip_l": numbers(1, 8)}, "an embedding in the"),
    "NaN": ({**KOHYA, f"{FLAT}.alpha": torch.tensor(torch.nan)}, "finite|NaN"),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Any:
    return engine.generate(Recipe(prompt="a cat", **SMALL)).pixels


def recipe_with(path: Path, **changes: Any) -> Recipe:
    refs = (AdapterRef.from_file(path),)
    return Recipe(prompt="a cat", adapters=refs, **{**SMALL, **changes})


@pytest.mark.parametrize("kind", ACCEPTED)
def test_inspect_and_generate_accept(engine, plain, tmp_path, kind):
    path = save_adapter(tmp_path / "x.safetensors", ACCEPTED[kind])
    found = examine_adapter(path)
    assert found.usable, found.problems
    assert (found.model, found.matched) == ("sd15", 1)
    made = engine.generate(recipe_with(path))
    assert np.array_equal(made.pixels, plain) == (kind == "alpha 0")
    assert bool(made.warnings) == (kind == "alpha 0")
    assert ("zero_alpha" in {one.code for one in found.problems}) == (kind == "alpha 0")
    assert np.array_equal(engine.generate(Recipe(prompt="a cat", **SMALL)).pixels, plain)


@pytest.mark.parametrize("kind", REFUSED)
def test_inspect_and_generate_refuse(engine, tmp_path, kind):
    tensors, reason = REFUSED[kind]
    path = save_adapter(tmp_path / "x.safetensors", tensors)
    found = examine_adapter(path)
    assert not found.usable
    with pytest.raises((AdapterError, WeightsFileError), match=reason):
        engine.generate(recipe_with(path))


@pytest.mark.parametrize("kind", ["full", "norm", "norm of the text encoder", "OFT", "bias"])
def test_the_live_path_applies_the_same_change(engine, tmp_path, kind):
    """It differs from the merged one only by rounding."""
    recipe = recipe_with(
        save_adapter(tmp_path / "x.safetensors", ACCEPTED[kind]), adapter_mode="live"
    )
    live, plain = (
        engine.generate(one).pixels.astype(int) for one in (recipe, recipe_with_plain(recipe))
    )
    merged = engine.generate(replace(recipe, adapter_mode="merged")).pixels.astype(int)
    assert np.abs(live - merged).mean() < np.abs(live - plain).mean() / 4


@pytest.mark.parametrize("kind", ["full", "norm", "norm of the text encoder", "OFT", "bias"])
def test_the_fast_path_has_the_same_weights(tmp_path, kind):
    """Compare weights, because rounding to bfloat16 changes pixels more than a small adapter."""
    adapter = read_adapter(save_adapter(tmp_path / "x.safetensors", ACCEPTED[kind]))
    fast = load_model_of(Recipe(prompt="", fidelity="fast", **SMALL))
    # Weights that are not packed are rounded as they are loaded, and merged in their dtype.
    dtypes: dict[str, Any] = {
        name: str(next(fast.parts[part].parameters()).dtype).removeprefix("torch.")
        for name, part in (("dtype", "unet"), ("text_encoder_dtype", "text_encoder"))
    }
    exact, rounded = (load_model_of(Recipe(prompt="", **SMALL, **more)) for more in ({}, dtypes))
    before = plain_tensors(fast) | outputs(packed_linears(fast))
    for model in (exact, rounded, fast):
        model.merged.apply([(model.targets.bind(adapter), 0.5)])
    expected, plain = plain_tensors(exact), plain_tensors(rounded)
    found = plain_tensors(fast)
    for key, one in found.items():
        assert torch.equal(one, plain[key].to(one.dtype)), key
    repacked = {}
    for path, linear in packed_linears(fast).items():
        repacked[path] = copy.copy(linear)  # gets its own packed weight; the bias is shared
        repacked[path].set_weight(expected[f"{path}.weight"].to)
    found |= outputs(packed_linears(fast))
    for path, one in outputs(repacked).items():
        assert torch.equal(found[path], one), path
    assert any(not torch.equal(one, before[key]) for key, one in found.items())


def plain_tensors(model: LoadedModel) -> dict[str, Tensor]:
    """Return copies of the weights of the denoiser and the text encoder that are not packed."""
    return {
        f"{part}.{key}": one.clone()
        for part in ("unet", "text_encoder")
        for key, one in weights_of(model.parts[part]).items()
        if not one.is_meta
    }


def packed_linears(model: LoadedModel) -> dict[str, PackedLinear]:
    return {
        f"unet.{path}": one
        for path, one in model.parts["unet"].named_modules()
        if type(one) is PackedLinear
    }


def outputs(linears: dict[str, PackedLinear]) -> dict[str, Tensor]:
    """Return the outputs for the unit vectors, `[in, out]`: the transposed weight plus the bias."""
    return {
        path: one(torch.eye(one.in_features, dtype=one.weight.dtype))
        for path, one in linears.items()
    }


def recipe_with_plain(recipe: Recipe) -> Recipe:
    return replace(recipe, adapters=())


@pytest.mark.parametrize("kind", ["norm", "full", "bias"])
def test_vectors_are_changed_and_restored_exactly(tmp_path, kind):
    model = load_model_of(Recipe(prompt="", **SMALL))
    before = {key: one.clone() for key, one in weights_of(model.parts["unet"]).items()}
    adapter = read_adapter(save_adapter(tmp_path / "x.safetensors", ACCEPTED[kind]))
    bound = model.targets.bind(adapter)
    count = len(ACCEPTED[kind])
    assert model.merged.apply([(bound, 0.5)]) == count
    after = weights_of(model.parts["unet"])
    changed = {key for key, one in after.items() if not torch.equal(one, before[key])}
    assert len(changed) == count
    for key in changed:
        part = "weight" if key.endswith("weight") else "bias"
        stored = next(
            one
            for name, one in ACCEPTED[kind].items()
            if name.endswith(("w_norm", "diff") if part == "weight" else ("b_norm", "diff_b"))
        )
        assert torch.equal(after[key], before[key] + 0.5 * stored)
    assert model.merged.apply([]) == count
    restored = weights_of(model.parts["unet"])
    assert all(torch.equal(one, before[key]) for key, one in restored.items())


@pytest.mark.parametrize(
    "key",
    [
        "attn1.processor.to_q_lora.down.weight",
        "attn1.processor.to_out_lora.up.weight",
        "attn1.to_k.lora.down.weight",
        "attn1.to_out.0.lora.up.weight",
        "attn2.to_v.lora_linear_layer.down.weight",
    ],
)
def test_names_of_2023_are_those_that_diffusers_converts(tmp_path, key):
    converted = next(iter(convert_unet_state_dict_to_peft({f"{BLOCK}.{key}": torch.ones(1)})))
    tensors = {f"unet.{BLOCK}.{key}": torch.ones(4, 4)}
    other = key.replace("up.w", "down.w") if "up.w" in key else key.replace("down.w", "up.w")
    tensors[f"unet.{BLOCK}.{other}"] = torch.ones(4, 4)
    module = next(iter(read_adapter(save_adapter(tmp_path / "x.safetensors", tensors)).deltas))
    expected = converted.partition(".lora_")[0]
    assert canonical_name(module) in (f"unet.{expected}", f"unet.{expected}.0")


SDXL_LORA = lora(
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    ".lora_down.weight",
    ".lora_up.weight",
    32,
) | lora(
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    ".lora_down.weight",
    ".lora_up.weight",
    48,
)


def test_wrong_metadata_is_ignored_if_only_the_base_model_fits(engine, tmp_path):
    path = save_adapter(tmp_path / "x.safetensors", SDXL_LORA, ss_base_model_version="sd_v1")
    xl = {"model": "sdxl", "base_model": str(TINY_SDXL)}
    (warning,) = engine.generate(recipe_with(path, **xl)).warnings
    assert "trained on sd_v1, which is not Stable Diffusion XL" in warning
    found = examine_adapter(path)
    assert (found.usable, found.model) == (True, "sdxl")
    assert warning.endswith(found.problems[-1].message)
    with pytest.raises(AdapterMismatchError, match="1 of 2 modules do not exist"):
        engine.generate(recipe_with(path))


def test_metadata_decides_if_both_families_fit(engine, tmp_path):
    tensors = lora(
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ".lora_down.weight",
        ".lora_up.weight",
        32,
    )
    for version, model in (("sdxl_1.0", "sdxl"), ("sd_1.5", "sd15")):
        path = save_adapter(
            tmp_path / f"{model}.safetensors", tensors, ss_base_model_version=version
        )
        assert examine_adapter(path).model == model
        if model == "sd15":
            engine.generate(recipe_with(path))
            continue
        with pytest.raises(AdapterMismatchError, match="is an adapter for Stable Diffusion XL"):
            engine.generate(recipe_with(path))


def test_names_of_the_original_code_identify_no_family(engine, tmp_path):
    tensors = lora(
        "lora_unet_input_blocks_10_0_in_layers_2", ".lora_down.weight", ".lora_up.weight", 32
    )
    path = save_adapter(tmp_path / "x.safetensors", tensors)
    xl = {"model": "sdxl", "base_model": str(TINY_SDXL)}
    with pytest.raises(AdapterMismatchError, match="1 of 1 modules do not exist in it"):
        engine.generate(recipe_with(path, **xl))
    assert "the SDXL refiner" in examine_adapter(path).problems[-1].message


def test_several_alphas_that_are_nan_are_listed_once(tmp_path):
    tensors = {
        **KOHYA,
        f"{FLAT}.alpha": torch.tensor(torch.nan),
        f"{FLAT}2.lora_down.weight": numbers(4, 16),
        f"{FLAT}2.lora_up.weight": numbers(16, 4),
        f"{FLAT}2.alpha": torch.tensor(torch.nan),
    }
    alphas = examine_adapter(save_adapter(tmp_path / "x.safetensors", tensors)).alphas
    assert json.dumps(alphas) == "[NaN]"
