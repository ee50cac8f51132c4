"""FLUX.2-klein: behavior that no other family has. Its golden runs are in tests/training."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file
from tests.support import (
    KLEIN_LORA,
    LORA,
    TINY_KLEIN,
    change_weights,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)

from fidelora import AdapterRef, Engine, Recipe
from fidelora.adapters.live import live_adapters
from fidelora.adapters.read import read_adapter
from fidelora.adapters.tensor_names import noise_of_file
from fidelora.cli.image_plan import resolve_noise
from fidelora.engine.adapter_family import fit_of_base
from fidelora.engine.convert import convert_adapter
from fidelora.engine.examine import examine_adapter
from fidelora.errors import (
    AdapterConversionError,
    AdapterMismatchError,
    BaseModelFilesError,
    BaseModelWeightsError,
    DeviceError,
    RecipeError,
)
from fidelora.families import get_family
from fidelora.families.flux2_klein.transformer import Config, rotary_tables
from fidelora.families.protocols import Guidance, Prompts, Size
from fidelora.training.suspects import precisions
from fidelora.weights.configs import read_config
from fidelora.weights.files import BaseFiles
from fidelora.weights.strict import empty_part

CPU = torch.device("cpu")
FAMILY = get_family("flux2_klein_4b")
TRANSFORMER_FILE = "flux-2-klein-base-4b.safetensors"
SMALL = Recipe(
    model="flux2_klein_4b", prompt="a red ball", negative_prompt="blurry",
    base_model=str(TINY_KLEIN), width=64, height=80, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip
LORA_WEIGHTS = load_file(KLEIN_LORA)
SIZES = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "joint_attention_dim": 144, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
}  # fmt: skip
VAE_SIZES = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)


@pytest.fixture(scope="module")
def diffusers_parts() -> tuple[Any, Any]:
    """Return the tiny base model in the classes of diffusers, by diffusers' own conversion."""
    transformer = Flux2Transformer2DModel(**SIZES)
    weights = load_file(TINY_KLEIN / TRANSFORMER_FILE)
    transformer.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(weights))
    vae = AutoencoderKLFlux2(**VAE_SIZES)
    stored = load_file(TINY_KLEIN / "ae.safetensors")
    statistics = {key: stored.pop(key) for key in list(stored) if key.startswith("bn.")}
    bare = {
        key.removeprefix("encoder.").removeprefix("decoder.") if "quant_conv" in key else key: one
        for key, one in stored.items()
    }
    vae.load_state_dict(convert_ldm_vae_checkpoint(bare, vae.config) | statistics)
    return transformer.eval(), vae.eval()


@pytest.fixture(scope="module")
def diffusers_base(diffusers_parts, tmp_path_factory) -> Path:
    """Return the tiny base model as a diffusers folder."""
    folder: Path = tmp_path_factory.mktemp("diffusers")
    transformer, vae = diffusers_parts
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY_KLEIN / "qwen3", folder / name)
    index = {
        "_class_name": "Flux2KleinPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def copied_base(folder: Path) -> Path:
    return Path(shutil.copytree(TINY_KLEIN, folder / "base"))


def remove_weights(path: Path, pattern: str) -> None:
    """Remove the weights whose names contain a match of `pattern` from a file."""
    change_weights(
        path,
        lambda tensors: {key: one for key, one in tensors.items() if not re.search(pattern, key)},
    )


# --- the base model -----------------------------------------------------------------------------


def test_a_diffusers_folder_gives_the_same_pixels(engine, diffusers_base):
    own = engine.generate(SMALL).pixels
    assert np.array_equal(
        engine.generate(replace(SMALL, base_model=str(diffusers_base))).pixels, own
    )


def test_the_weights_of_a_diffusers_folder_are_the_original_ones(diffusers_base):
    _, converted = BaseFiles.find(FAMILY, str(diffusers_base)).read()
    _, original = BaseFiles.find(FAMILY, str(TINY_KLEIN)).read()
    for part in ("transformer", "vae"):
        assert converted[part].keys() == original[part].keys()
        for name, tensor in original[part].items():
            assert torch.equal(tensor.float(), converted[part][name].float()), name


def test_derived_configurations_are_those_of_diffusers(diffusers_parts):
    configs, _ = BaseFiles.find(FAMILY, str(TINY_KLEIN)).read()
    for part, theirs in zip(("transformer", "vae"), diffusers_parts, strict=True):
        spec = next(one for one in FAMILY.parts if one.name == part)
        module: Any = empty_part(spec, configs[part])
        assert module.config == type(module.config).of_diffusers(theirs.config)


def test_the_transformer_computes_what_that_of_diffusers_computes(diffusers_parts):
    """Up to rounding: diffusers' rotary tables are float64 before they are rounded."""
    own: Any = load_model_of(SMALL).parts["transformer"]
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(1, *one, generator=generator) for one in ((20, 128), (9, 144)))
    time = torch.tensor([0.7])
    text_ids, image_ids = torch.zeros(9, 4), torch.zeros(4, 5, 4)
    text_ids[:, 3] = torch.arange(9)
    image_ids[..., 1] = torch.arange(4)[:, None]
    image_ids[..., 2] = torch.arange(5)
    with torch.no_grad():
        found = own(image, text, time, rotary_tables(9, 4, 5, own.config, CPU))
        expected = diffusers_parts[0](
            hidden_states=image, encoder_hidden_states=text, timestep=time,
            img_ids=image_ids.flatten(0, 1), txt_ids=text_ids, return_dict=False,
        )[0]  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_the_decoder_computes_what_that_of_diffusers_computes(diffusers_parts):
    own: Any = load_model_of(SMALL).parts["vae"]
    vae = diffusers_parts[1]
    latents = torch.randn(1, 128, 3, 2, generator=torch.Generator().manual_seed(3))
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    scaled = latents * deviation.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
    with torch.no_grad():
        expected = vae.decode(Flux2KleinPipeline._unpatchify_latents(scaled), return_dict=False)[0]
        assert torch.allclose(own(latents), expected, atol=1e-5)


def test_the_rotary_tables_are_computed_in_float32():
    config = Config(128, 144, 4, 16, 3.0, 2, 2, (4, 4, 4, 4), 2000)
    tables = rotary_tables(3, 2, 2, config, CPU)
    assert (tables.dtype, tables.shape) == (torch.float32, (7, 8, 2, 2))
    slow = torch.tensor(1.0) / torch.tensor(2000.0) ** 0.5
    assert torch.equal(tables[2, 7, 0, 0], torch.cos(2 * slow))  # third word, last axis
    assert torch.equal(tables[6, 3, 1, 0], torch.sin(slow))  # second row
    assert torch.equal(tables[6, 5, 1, 0], torch.sin(slow))  # second column
    assert torch.equal(tables[6, 7], torch.eye(2))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer", {"rope_theta": 10000, "axes_dims_rope": [2, 2, 2, 2]}),
        ("transformer", {"guidance_embeds": True}),
        ("transformer", {"patch_size": 2}),
        ("transformer", {"out_channels": 64}),
        ("vae", {"batch_norm_eps": 1e-5}),
        ("vae", {"patch_size": [1, 1]}),
    ],
)
def test_other_variants_of_the_classes_are_refused(diffusers_base, tmp_path, part, change):
    folder = Path(shutil.copytree(diffusers_base, tmp_path / "base"))
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BaseModelFilesError, match=f"{part}/config.json does not describe"):
        load_model_of(replace(SMALL, base_model=str(folder)))


def test_missing_files_of_the_original_layout_are_named(tmp_path):
    for name, says in (("ae.safetensors", "no ae.safetensors"), ("qwen3", "no folder qwen3")):
        base = copied_base(tmp_path / name)
        path = base / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(BaseModelFilesError, match=says):
            BaseFiles.find(FAMILY, str(base))


@pytest.mark.parametrize(
    ("name", "key", "says"),
    [
        (TRANSFORMER_FILE, "img_in.weight", "its sizes cannot be derived"),
        (TRANSFORMER_FILE, "double_blocks.1.img_attn.qkv.weight", "1 weights are missing"),
        ("ae.safetensors", "decoder.conv_in.weight", "its sizes cannot be derived"),
        ("ae.safetensors", "bn.running_var", "1 weights are missing"),
    ],
)
def test_missing_weights_of_the_original_layout_are_named(tmp_path, name, key, says):
    base = copied_base(tmp_path)
    remove_weights(base / name, re.escape(key))
    with pytest.raises(BaseModelWeightsError, match=says):
        load_model_of(replace(SMALL, base_model=str(base)))


def test_a_part_of_a_fused_weight_is_not_enough(diffusers_base, tmp_path):
    folder = Path(shutil.copytree(diffusers_base, tmp_path / "base"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    remove_weights(weights, r"transformer_blocks\.0\.attn\.to_k\.weight")
    with pytest.raises(BaseModelWeightsError, match=r"double_blocks\.0\.img_attn\.qkv\.weight"):
        load_model_of(replace(SMALL, base_model=str(folder)))


def test_another_vae_can_be_a_file_of_the_original_layout(engine):
    own = engine.generate(SMALL).pixels
    vae = replace(SMALL, vae=str(TINY_KLEIN / "ae.safetensors"))
    assert np.array_equal(engine.generate(vae).pixels, own)


def test_a_changed_file_of_the_original_layout_is_loaded_again(tmp_path):
    base = copied_base(tmp_path)
    files = BaseFiles.find(FAMILY, str(base))
    assert files.is_unchanged()
    remove_weights(base / "ae.safetensors", "^encoder")
    assert not files.is_unchanged()


def test_bundled_configurations_are_those_of_the_published_model():
    """The name says 4 billion parameters."""
    part = FAMILY.part("denoiser")
    module = empty_part(part, read_config(FAMILY.layout / part.name / "config.json"))
    assert sum(one.numel() for one in module.parameters()) == 3_875_544_576


# --- images -------------------------------------------------------------------------------------


def test_the_negative_prompt_has_an_effect_only_with_guidance(engine):
    other = replace(SMALL, negative_prompt="ugly")
    assert not np.array_equal(engine.generate(SMALL).pixels, engine.generate(other).pixels)
    plain = [replace(one, guidance_scale=1.0) for one in (SMALL, other)]
    assert np.array_equal(*(engine.generate(one).pixels for one in plain))


def test_sizes_are_multiples_of_16(engine):
    assert engine.generate(replace(SMALL, width=101, height=75)).pixels.shape == (64, 96, 3)


def test_the_truncated_end_of_a_prompt_is_quoted(engine):
    image = engine.generate(replace(SMALL, prompt="ball " * 600 + "at night", steps=1))
    (warning,) = image.warnings
    assert warning.startswith("The end of the prompt exceeds 512 tokens")
    assert warning.endswith('at night".')


def test_latents_and_previews_have_the_size_of_the_image():
    latents, size = load_model_of(SMALL).latents, Size(96, 64)
    assert latents.shape(size) == (1, 128, 4, 6)
    assert latents.tokens(size) == 24
    assert latents.noise_dtype(torch.bfloat16) == torch.bfloat16
    assert latents.preview(torch.randn(128, 4, 6), size).shape == (8, 12, 3)


def test_the_denoiser_accepts_blank_conditioning():
    model = load_model_of(SMALL)
    size, guidance = Size(64, 64), Guidance(3.0)
    blank = model.text.blank(size, negative=True)
    with torch.no_grad():
        real = model.text.encode(Prompts("a", ""), size, lambda part: ())
        denoise = model.denoiser.prepare([blank], guidance, size, torch.float32)
        assert denoise(torch.zeros(1, 128, 4, 4), torch.tensor(0.5)).shape == (1, 128, 4, 4)
    assert blank.positive.shape == real.positive.shape == (1, 512, 144)


def test_images_in_one_batch_have_their_own_noise_and_prompt(engine):
    recipes = [replace(SMALL, dtype="bfloat16", seed=seed) for seed in (1, 2)]
    single = [engine.generate(one, jitter=5).pixels.astype(int) for one in recipes]
    first, second = (one.pixels.astype(int) for one in engine.generate_jittered(recipes, 5))
    assert abs(first - single[0]).mean() < 3 < abs(first - second).mean()
    assert abs(second - single[1]).mean() < 3


# --- adapters -----------------------------------------------------------------------------------


def renamed(path: Path, names: dict[str, str]) -> Path:
    """Save the golden LoRA with other names of its modules; `names` has suffixes, too."""
    tensors = {}
    for key, tensor in LORA_WEIGHTS.items():
        for old, new in names.items():
            key = key.replace(old, new)
        tensors[key] = tensor.contiguous()
    return save_adapter(path, tensors)


def as_kohya(path: Path) -> Path:
    tensors = {}
    for key, tensor in LORA_WEIGHTS.items():
        module, factor = key.removeprefix("diffusion_model.").rsplit(".lora_", 1)
        name = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[factor]
        tensors[f"lora_unet_{module.replace('.', '_')}.{name}"] = tensor
    return save_adapter(path, tensors)


def as_diffusers(path: Path) -> Path:
    """Save the golden LoRA as diffusers does, with separate queries, keys and values."""
    names = {
        "double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks",
        "img_attn.proj": "attn.to_out.0", "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
        "txt_attn.proj": "attn.to_add_out", "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out", "linear1": "attn.to_qkv_mlp_proj",
        "linear2": "attn.to_out", "diffusion_model.": "transformer.",
    }  # fmt: skip
    thirds = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in LORA_WEIGHTS.items():
        for old, new in names.items():
            key = key.replace(old, new)
        found = next((old for old in thirds if old in key), None)
        if found is None:
            tensors[key] = tensor
            continue
        rows = tensor.chunk(3) if "lora_B" in key else [tensor] * 3
        for name, one in zip(thirds[found], rows, strict=True):
            tensors[key.replace(found, name)] = one.clone()
    return save_adapter(path, tensors)


def with_adapter(path: Path, **changes: Any) -> Recipe:
    return replace(SMALL, adapters=(AdapterRef.from_file(path),), **changes)


def test_a_lora_leaves_no_trace_and_is_equal_merged_and_live(engine):
    pristine = engine.generate(SMALL).pixels
    first = engine.generate(with_adapter(KLEIN_LORA)).pixels.astype(int)
    live = engine.generate(with_adapter(KLEIN_LORA, adapter_mode="live")).pixels.astype(int)
    assert abs(first - live).max() <= 1
    assert abs(first - pristine).max() > 5
    assert np.array_equal(engine.generate(SMALL).pixels, pristine)


@pytest.mark.parametrize(
    "write",
    [
        as_kohya,
        as_diffusers,
        lambda path: renamed(path, {"diffusion_model.": "base_model.model.diffusion_model."}),
        lambda path: renamed(path, {"diffusion_model.": "transformer."}),
    ],
    ids=["kohya", "diffusers", "peft", "transformer"],
)
@pytest.mark.parametrize("mode", ["merged", "live"])
def test_other_spellings_of_a_lora_have_the_same_effect(engine, tmp_path, write, mode):
    own = engine.generate(with_adapter(KLEIN_LORA, adapter_mode=mode)).pixels.astype(int)
    path = write(tmp_path / "other.safetensors")
    other = engine.generate(with_adapter(path, adapter_mode=mode)).pixels.astype(int)
    assert abs(own - other).max() <= 1


def test_one_third_of_a_fused_projection_changes_only_its_rows(tmp_path):
    key = "transformer.transformer_blocks.1.attn.to_k"
    path = save_adapter(
        tmp_path / "a.safetensors",
        {f"{key}.lora_A.weight": torch.ones(2, 64), f"{key}.lora_B.weight": torch.ones(64, 2)},
    )
    model = load_model_of(SMALL)
    weight = model.targets.by_name["transformer.double_blocks.1.img_attn.qkv"].weight
    before = weight.clone()
    model.merged.apply([(model.targets.bind(read_adapter(path)), 0.5)])
    difference = weight - before
    assert torch.allclose(difference[64:128], torch.ones(64, 64), atol=1e-6)
    assert not difference[:64].any()
    assert not difference[128:].any()


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_different_kinds_in_one_projection_are_equal_merged_and_live(tmp_path, multiplier):
    start = "transformer.transformer_blocks.0.attn"
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "to_q.lora_A.weight": (2, 64), "to_q.lora_B.weight": (64, 2),
        "to_v.hada_w1_a": (64, 2), "to_v.hada_w1_b": (2, 64), "to_v.hada_w2_a": (64, 2),
        "to_v.hada_w2_b": (2, 64),
    }  # fmt: skip
    tensors = {
        f"{start}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    model = load_model_of(SMALL)
    bound = model.targets.bind(read_adapter(save_adapter(tmp_path / "a.safetensors", tensors)))
    module = model.targets.by_name["transformer.double_blocks.0.img_attn.qkv"].module
    x = torch.randn(1, 3, 64, generator=generator)
    with torch.no_grad():
        plain = module(x)
        with live_adapters(model.targets, [(bound, multiplier)]):
            live = module(x)
        model.merged.apply([(bound, multiplier)])
        merged = module(x)
    assert torch.allclose(live, merged, atol=1e-4)
    changed = [abs(one).max() > 1 for one in (live - plain).chunk(3, dim=-1)]
    assert changed == [True, False, True]


def test_both_spellings_of_one_projection_in_a_file_are_refused(engine, tmp_path):
    names = {
        "diffusion_model.double_blocks.0.img_attn.qkv": 192,
        "transformer.transformer_blocks.0.attn.to_v": 64,
    }
    for order in (1, -1):
        tensors = {}
        for name, rows in list(names.items())[::order]:
            tensors[f"{name}.lora_A.weight"] = torch.ones(2, 64)
            tensors[f"{name}.lora_B.weight"] = torch.ones(rows, 2)
        path = save_adapter(tmp_path / f"{order}.safetensors", tensors)
        with pytest.raises(AdapterMismatchError, match="names 1 of its 2 modules twice"):
            engine.generate(with_adapter(path))


def test_a_third_of_the_wrong_shape_is_refused(engine, tmp_path):
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 64), f"{key}.lora_B.weight": torch.ones(192, 2)}  # noqa: E501  # fmt: skip
    path = save_adapter(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterMismatchError, match=r"to_q has the shape \[192, 64\] instead of"):
        engine.generate(with_adapter(path))


def test_the_adapter_is_recognised(engine, tmp_path):
    found = examine_adapter(KLEIN_LORA)
    assert (found.model, found.usable) == ("flux2_klein_4b", True)
    assert examine_adapter(as_diffusers(tmp_path / "a.safetensors")).model == "flux2_klein_4b"
    with pytest.raises(AdapterMismatchError):
        engine.generate(with_adapter(LORA))


@pytest.mark.parametrize("base", [TINY_KLEIN, TINY_KLEIN / TRANSFORMER_FILE])
def test_an_adapter_is_compared_with_a_base_model_without_configuration(base):
    config = "" if base.is_dir() else str(TINY_KLEIN)
    fit = fit_of_base(read_adapter(KLEIN_LORA), BaseFiles.find(FAMILY, str(base), config=config))
    assert fit.matched == fit.same_shapes == len(LORA_WEIGHTS) // 2
    assert examine_adapter(KLEIN_LORA, str(TINY_KLEIN)).usable


def test_conversion_keeps_or_refuses_an_adapter(tmp_path):
    to = tmp_path / "kohya.safetensors"
    to.write_bytes(convert_adapter(KLEIN_LORA, "kohya", "flux2_klein_4b").content)
    expected = load_file(as_kohya(tmp_path / "expected.safetensors"))
    written = load_file(to)
    assert {key for key in written if not key.endswith(".alpha")} == expected.keys()
    with pytest.raises(AdapterConversionError, match="diffusers splits modules"):
        convert_adapter(KLEIN_LORA, "peft")
    with pytest.raises(AdapterConversionError, match="so their names cannot be converted"):
        convert_adapter(as_diffusers(tmp_path / "a.safetensors"), "kohya")


# --- recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance_rescale", 0.7), ("prediction", "v_prediction"), ("negative_prompt_2", "x"),
     ("emphasis", "original")],
)  # fmt: skip
def test_fields_that_the_family_does_not_use_are_refused(field, value):
    with pytest.raises(RecipeError, match=rf"FLUX\.2-klein 4B does not use {field}"):
        replace(SMALL, **{field: value})


def test_fast_is_not_implemented(engine):
    with pytest.raises(DeviceError, match=r"not implemented for FLUX\.2-klein 4B"):
        engine.generate(replace(SMALL, fidelity="fast"))


def test_the_other_parts_of_a_single_file_can_be_in_either_layout(engine, diffusers_base, tmp_path):
    """The configuration of the transformer is derived if the folder has none."""
    config = copied_base(tmp_path)
    (config / TRANSFORMER_FILE).unlink()
    expected = engine.generate(SMALL).pixels
    for folder in (diffusers_base, config):
        recipe = replace(SMALL, base_model=str(TINY_KLEIN / TRANSFORMER_FILE), config=str(folder))
        assert np.array_equal(engine.generate(recipe).pixels, expected)


def test_the_estimated_memory_covers_the_loaded_model():
    size = load_model_of(SMALL).size_bytes
    assert size <= expected_bytes_of(SMALL) < 1.5 * size  # the file of the VAE has an encoder, too


def test_an_old_trainers_adapter_selects_legacy_noise(tmp_path):
    old = {"software": '{"name": "ai-toolkit", "version": "0.10.25"}'}
    file = save_adapter(tmp_path / "a.safetensors", LORA_WEIGHTS, **old)
    assert noise_of_file(file) == "legacy"
    adapters = (AdapterRef.from_file(file),)
    assert resolve_noise("auto", adapters, "flux2_klein_4b") == "legacy"


def test_the_doctors_suspects_are_recipes_of_the_family():
    for recipe in (SMALL, replace(SMALL, dtype="bfloat16")):
        assert {one.recipe.model for one in precisions(recipe)} == {"flux2_klein_4b"}


def test_a_text_encoder_with_too_few_layers_is_refused(tmp_path):
    base = copied_base(tmp_path)
    path = base / "qwen3" / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 27
    config["layer_types"] = config["layer_types"][:27]
    path.write_text(json.dumps(config))
    remove_weights(base / "qwen3" / "model.safetensors", r"\.layers\.(27|28)\.")
    with pytest.raises(BaseModelFilesError, match="has 27 layers"):
        load_model_of(replace(SMALL, base_model=str(base)))
