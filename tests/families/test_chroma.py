"""Chroma: behavior that no other family has. Golden training runs are in tests/training."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ChromaTransformer2DModel
from safetensors.torch import load_file
from tests.support import (
    CHROMA_LORA,
    FLUX_LORA,
    TINY_CHROMA,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)
from torch import nn

from fidelora import AdapterRef, Engine, Recipe
from fidelora.adapters.read import read_adapter
from fidelora.engine.convert import convert_adapter
from fidelora.engine.examine import examine_adapter
from fidelora.errors import (
    AdapterConversionError,
    AdapterMismatchError,
    BaseModelFilesError,
    DeviceError,
    RecipeError,
)
from fidelora.families import get_family
from fidelora.families.chroma.names import diffusers_names
from fidelora.families.chroma.transformer import _attention_mask
from fidelora.families.flux.names import fused_names, original_names
from fidelora.families.patches import positions
from fidelora.families.protocols import Guidance, Prompts, Size
from fidelora.server.base_models import BaseModels
from fidelora.weights.content import ContentHashes
from fidelora.weights.files import BaseFiles
from fidelora.weights.locate import is_downloaded

CPU = torch.device("cpu")
CHECKPOINT = TINY_CHROMA / "transformer" / "diffusion_pytorch_model.safetensors"
SMALL = Recipe(
    model="chroma", prompt="a red ball", negative_prompt="blurry", base_model=str(TINY_CHROMA),
    width=64, height=80, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the cache of a hub with the default base model and its companion."""
    root = tmp_path / "hub"
    (root / "lodestones" / "Chroma1-Base").mkdir(parents=True)
    shutil.copy(CHECKPOINT, root / "lodestones" / "Chroma1-Base" / "Chroma1-Base.safetensors")
    companion = root / "ostris" / "Flex.1-alpha"
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.copytree(TINY_CHROMA / name, companion / name)

    def snapshot(repo: str, **options: Any) -> str:
        return str(root / repo)

    monkeypatch.setattr("fidelora.weights.locate.snapshot_download", snapshot)
    return root


def in_diffusers_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the float32 weights of the tiny checkpoint for diffusers' transformer."""
    weights = {name: weight.float() for name, weight in load_file(CHECKPOINT).items()}
    paths = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
    found = {
        f"{path}.{kind}": weights[f"{name}.{kind}"]
        for path, name in original_names(paths).items()
        for kind in ("weight", "bias")
    }
    for fused, parts in fused_names(paths).items():
        for kind in ("weight", "bias"):
            sizes = [64] * 3 + [256] * (len(parts) - 3)
            rows = weights[f"{fused}.{kind}"].split(sizes)
            found |= {f"{part}.{kind}": one for part, one in zip(parts, rows, strict=True)}
    others = {
        ".in_layer.": ".linear_1.", ".out_layer.": ".linear_2.", ".scale": ".weight",
        "double_blocks.": "transformer_blocks.", "single_blocks.": "single_transformer_blocks.",
        "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        ".norm.query_norm": ".attn.norm_q", ".norm.key_norm": ".attn.norm_k",
    }  # fmt: skip
    for name, weight in weights.items():
        if name.startswith("distilled_guidance_layer") or name.endswith(".scale"):
            for old, new in others.items():
                name = name.replace(old, new)
            found[name] = weight
    return found


def diffusers_prediction(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the prediction of diffusers' transformer, which is another implementation."""
    other: Any = ChromaTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=64,
        approximator_hidden_dim=64, approximator_layers=2,
    )  # fmt: skip
    other.load_state_dict(in_diffusers_names(other))
    mask = inputs["txt_mask"].clone()
    mask[:, 5] = 1  # one token of padding
    prediction: torch.Tensor = other.eval()(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"],
        txt_ids=inputs["txt_ids"],
        attention_mask=torch.cat([mask, torch.ones(1, inputs["img"].shape[1])], dim=1).bool(),
        return_dict=False,
    )[0]
    return prediction


@torch.no_grad()
def test_the_transformer_predicts_what_that_of_diffusers_does():
    transformer: Any = load_model_of(SMALL).parts["transformer"]
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(1, 12)
    mask[:, :5] = 1
    inputs = {
        "img": torch.randn(1, 20, 64, generator=generator),
        "img_ids": positions(Size(64, 80), CPU, torch.float32),
        "txt": torch.randn(1, 12, 32, generator=generator),
        "txt_ids": torch.zeros(12, 3),
        "txt_mask": mask,
        "timesteps": torch.tensor([0.7]),
    }
    assert torch.allclose(transformer(**inputs), diffusers_prediction(inputs), atol=1e-4)
    changed = inputs | {"txt": inputs["txt"].clone()}
    changed["txt"][:, 6:] = 9.0  # padding that takes no part
    assert torch.equal(transformer(**changed), transformer(**inputs))


def test_the_number_of_tokens_is_rounded_in_bfloat16():
    mask = torch.zeros(1, 512)
    mask[:, :257] = 1
    used = [
        _attention_mask(mask.to(dtype), 4)[0, 0, 0].sum()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert used == [257 + 1 + 4, 257 + 4]


def test_the_negative_prompt_has_an_effect_only_with_guidance(engine):
    other = replace(SMALL, negative_prompt="ugly")
    assert not np.array_equal(engine.generate(SMALL).pixels, engine.generate(other).pixels)
    plain = [replace(one, guidance_scale=1.0) for one in (SMALL, other)]
    assert np.array_equal(*(engine.generate(one).pixels for one in plain))


def test_sizes_are_multiples_of_16(engine):
    assert engine.generate(replace(SMALL, width=101, height=75)).pixels.shape == (64, 96, 3)


def test_a_lora_leaves_no_trace_and_is_equal_merged_and_live(engine):
    pristine = engine.generate(SMALL).pixels
    merged = replace(SMALL, adapters=(AdapterRef.from_file(CHROMA_LORA),))
    first = engine.generate(merged).pixels.astype(int)
    live = engine.generate(replace(merged, adapter_mode="live")).pixels.astype(int)
    assert abs(first - live).max() <= 1
    assert abs(first - pristine).max() > 5
    assert np.array_equal(engine.generate(SMALL).pixels, pristine)


def test_a_lora_with_the_names_of_kohya_is_equal(engine, tmp_path):
    tensors = {
        "lora_unet_"
        + key.removeprefix("diffusion_model.").partition(".lora_")[0].replace(".", "_")
        + (".lora_down.weight" if ".lora_A." in key else ".lora_up.weight"): value
        for key, value in load_file(CHROMA_LORA).items()
    }
    file = save_adapter(tmp_path / "a.safetensors", tensors)
    images = [
        engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(path),))).pixels
        for path in (CHROMA_LORA, file)
    ]
    assert np.array_equal(*images)


def lora_with_diffusers_names(prefix: str, separator: str) -> dict[str, torch.Tensor]:
    """Return the golden LoRA with separate modules for query, key, value and MLP."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in load_file(CHROMA_LORA).items():
        path, factor = key.removeprefix("diffusion_model.").split(".lora_")
        (names,) = diffusers_names([path]).values()
        units = Counter(names)
        size = len(value) // len(names)
        rows = (
            value.split([size * count for count in units.values()])
            if factor == "B.weight"
            else [value] * len(units)
        )
        for name, one in zip(units, rows, strict=True):
            tensors[f"{prefix}{name.replace('.', separator)}.lora_{factor}"] = one.clone()
    return tensors


@pytest.mark.parametrize("mode", ["merged", "live"])
@pytest.mark.parametrize(
    ("prefix", "separator"), [("transformer.", "."), ("lora_transformer_", "_")]
)
def test_a_lora_with_the_names_of_diffusers_is_equal(engine, tmp_path, prefix, separator, mode):
    tensors = lora_with_diffusers_names(prefix, separator)
    assert any("to_q" in key for key in tensors)
    assert any("proj_mlp" in key for key in tensors)
    file = save_adapter(tmp_path / "a.safetensors", tensors)
    images = [
        engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(path),), adapter_mode=mode))
        for path in (CHROMA_LORA, file)
    ]
    first, second = (image.pixels.astype(int) for image in images)
    assert abs(first - second).max() <= 1  # the products have other sizes
    assert abs(first - engine.generate(SMALL).pixels.astype(int)).max() > 5


def test_the_mlp_of_a_single_block_is_the_last_four_sevenths_of_the_rows(tmp_path):
    name = "transformer.single_transformer_blocks.1"
    model = load_model_of(SMALL)
    weight = model.targets.by_name["transformer.single_blocks.1.linear1"].weight
    model.merged.apply([])
    before = weight.clone()
    for module, rows in (("attn.to_k", slice(64, 128)), ("proj_mlp", slice(192, 448))):
        size = rows.stop - rows.start
        path = save_adapter(
            tmp_path / f"{size}.safetensors",
            {
                f"{name}.{module}.lora_A.weight": torch.ones(2, 64),
                f"{name}.{module}.lora_B.weight": torch.ones(size, 2),
            },
        )
        model.merged.apply([(model.targets.bind(read_adapter(path)), 0.5)])
        changed = (weight - before).any(dim=1)
        assert changed[rows].all()
        assert changed.sum() == size


def test_a_fused_row_of_the_wrong_size_is_refused(engine, tmp_path):
    key = "transformer.single_transformer_blocks.0.proj_mlp"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(2, 64),
        f"{key}.lora_B.weight": torch.ones(64, 2),
    }
    path = save_adapter(tmp_path / "a.safetensors", tensors)
    recipe = replace(SMALL, adapters=(AdapterRef.from_file(path),))
    with pytest.raises(AdapterMismatchError, match=r"has the shape \[64, 64\] instead of \[256,"):
        engine.generate(recipe)


def test_adapters_of_chroma_and_flux_are_distinguished(engine):
    assert examine_adapter(CHROMA_LORA).model == "chroma"
    assert examine_adapter(FLUX_LORA).model == "flux"
    recipe = replace(SMALL, adapters=(AdapterRef.from_file(FLUX_LORA),))
    with pytest.raises(AdapterMismatchError, match=r"an adapter for FLUX\.1"):
        engine.generate(recipe)


def test_an_adapter_is_converted_to_kohya_but_not_to_peft(tmp_path):
    result = convert_adapter(CHROMA_LORA, "kohya")
    (tmp_path / "a.safetensors").write_bytes(result.content)
    key = "lora_unet_single_blocks_1_linear1.lora_up.weight"
    assert load_file(tmp_path / "a.safetensors")[key].shape == (448, 8)
    with pytest.raises(AdapterConversionError, match="diffusers splits modules of Chroma"):
        convert_adapter(CHROMA_LORA, "peft")


def test_the_denoiser_accepts_blank_conditioning():
    model = load_model_of(SMALL)
    size, guidance = Size(64, 64), Guidance(3.0)
    blank = model.text.blank(size, negative=True)
    with torch.no_grad():
        real = model.text.encode(Prompts("a", ""), size, lambda part: ())
        denoise = model.denoiser.prepare([blank] * 2, guidance, size, torch.float32)
        assert denoise(torch.zeros(2, 16, 8, 8), torch.tensor(500.0)).shape == (2, 16, 8, 8)
    for name in ("states", "mask"):
        assert getattr(blank.positive, name).shape == getattr(real.positive, name).shape


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance_rescale", 0.7), ("prediction", "v_prediction"), ("negative_prompt_2", "x"),
     ("emphasis", "original")],
)  # fmt: skip
def test_fields_that_the_family_does_not_use_are_refused(field, value):
    with pytest.raises(RecipeError, match=f"Chroma does not use {field}"):
        replace(SMALL, **{field: value})


def test_fast_is_not_implemented(engine):
    with pytest.raises(DeviceError, match="not implemented for Chroma"):
        engine.generate(replace(SMALL, fidelity="fast"))


# --- files ----------------------------------------------------------------------------------------


def test_a_checkpoint_needs_the_other_parts_in_the_config_folder(engine):
    recipe = replace(SMALL, base_model=str(CHECKPOINT), config=str(TINY_CHROMA))
    image = engine.generate(recipe)
    assert np.array_equal(image.pixels, engine.generate(SMALL).pixels)
    assert image.recipe.base_sha256 != engine.generate(SMALL).recipe.base_sha256


def test_parts_outside_a_checkpoint_come_from_the_companion(engine, hub, tmp_path):
    """The configuration of the transformer is that of the default base unless it is given."""
    config = tmp_path / "config"
    shutil.copytree(TINY_CHROMA / "transformer", config / "transformer")
    family = get_family("chroma")
    for base_model in (str(CHECKPOINT), family.base_model):
        recipe = replace(SMALL, base_model=base_model, config=str(config))
        assert np.array_equal(engine.generate(recipe).pixels, engine.generate(SMALL).pixels)
    files = BaseFiles.find(family, family.base_model)
    assert files.source == hub / "lodestones" / "Chroma1-Base" / "Chroma1-Base.safetensors"
    assert files.configs["transformer"].is_relative_to(family.layout)
    assert files.tokenizers["text_encoder_2"] == hub / "ostris" / "Flex.1-alpha" / "tokenizer_2"


def test_a_base_model_is_downloaded_only_with_its_companion(hub):
    family = get_family("chroma")
    assert is_downloaded(family.base_model, family.parts)
    shutil.rmtree(hub / "ostris")
    assert not is_downloaded(family.base_model, family.parts)
    (hub / "lodestones" / "Chroma1-Base" / "Chroma1-Base.safetensors").unlink()
    with pytest.raises(BaseModelFilesError, match=r"has no Chroma1-Base\.safetensors"):
        BaseFiles.find(family, family.base_model)


def test_the_server_does_not_access_the_hub_for_the_companion(monkeypatch, tmp_path):
    monkeypatch.setattr("fidelora.weights.locate.snapshot_download", lambda *_, **__: 1 / 0)
    for base_model, is_known in ((CHECKPOINT, False), (TINY_CHROMA, True)):
        defaults = {"chroma": {"base_model": str(base_model)}}
        found = BaseModels(defaults, ContentHashes(tmp_path / "hashes.json"))
        assert bool(found.sha256("chroma")) == is_known


def test_another_file_is_not_a_checkpoint(engine):
    recipe = replace(SMALL, base_model=str(CHROMA_LORA), config=str(TINY_CHROMA))
    with pytest.raises(BaseModelFilesError, match="is not a checkpoint of Chroma"):
        engine.generate(recipe)


@pytest.mark.parametrize(
    "changes", [{}, {"base_model": str(CHECKPOINT), "config": str(TINY_CHROMA)}]
)
def test_the_estimated_memory_covers_the_loaded_model(changes):
    recipe = replace(SMALL, **changes)
    size = load_model_of(recipe).size_bytes
    assert size <= expected_bytes_of(recipe) < 1.3 * size
