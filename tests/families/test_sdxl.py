"""SDXL: two text encoders, adapters of more kinds and names, checkpoints of another layout."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.families.ldm import as_ldm_checkpoint, as_sdxl_checkpoint, ldm_unet_name
from tests.support import (
    LORA,
    MINIATURE_LORA,
    SDXL_DORA,
    SDXL_LORA,
    TINY_BASE,
    TINY_SDXL,
    change_weights,
    expected_bytes_of,
    load_model_of,
    read_json,
    save_adapter,
    weights_of,
)
from torch import Tensor, nn

from fidelora import AdapterRef, Engine, Recipe
from fidelora.adapters.deltas import DoraDelta
from fidelora.adapters.read import read_adapter
from fidelora.adapters.targets import Targets
from fidelora.engine.examine import examine_adapter
from fidelora.engine.model import LoadedModel
from fidelora.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    BaseModelFilesError,
    BaseModelWeightsError,
)
from fidelora.families import get_family
from fidelora.families.clip import load_tokenizer
from fidelora.families.protocols import Prompts, Size
from fidelora.families.sd.names import original_names
from fidelora.weights.configs import read_config
from fidelora.weights.strict import empty_part

CPU = torch.device("cpu")
SPEC = get_family("sdxl")
SMALL: dict[str, Any] = {
    "model": "sdxl",
    "base_model": str(TINY_SDXL),
    "width": 64,
    "height": 64,
    "steps": 3,
}
SD15: dict[str, Any] = SMALL | {"model": "sd15", "base_model": str(TINY_BASE)}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)  # the tests alternate between bases


def sdxl_recipe(base: Path, **fields: Any) -> Recipe:
    return Recipe(prompt="", model="sdxl", base_model=str(base), **fields)


def load(base: Path, **fields: Any) -> LoadedModel:
    return load_model_of(sdxl_recipe(base, **fields))


def same(left: LoadedModel, right: LoadedModel) -> bool:
    one, other = (
        {
            f"{part}.{name}": tensor
            for part, module in base.parts.items()
            for name, tensor in weights_of(module).items()
        }
        for base in (left, right)
    )
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the model's own data -----------------------------------------------------------------------


def full_size(name: str) -> nn.Module:
    part = next(part for part in SPEC.parts if part.name == name)
    return empty_part(part, read_config(SPEC.layout / name / "config.json"))


def test_bundled_configurations_are_those_of_sdxl():
    """Compare with the published parameter counts of the model."""
    counts = {
        one.name: sum(weight.numel() for weight in full_size(one.name).parameters())
        for one in SPEC.parts
    }
    expected = {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    }
    assert counts == expected


def test_the_second_tokenizer_pads_with_another_token():
    specs = [part.tokenizer for part in SPEC.text_encoders]
    first, second = (load_tokenizer(None, spec, 49408) for spec in specs if spec)
    assert (first.pad_token_id, second.pad_token_id) == (49407, 0)
    padded = second("a", padding="max_length", max_length=5).input_ids
    assert padded == [49406, 320, 49407, 0, 0]


# --- base models --------------------------------------------------------------------------------


def test_a_single_file_checkpoint_equals_its_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_sdxl_checkpoint(TINY_SDXL), path)
    assert same(load(path, config=str(TINY_SDXL)), load(TINY_SDXL))
    projection = (
        load(path, config=str(TINY_SDXL))
        .parts["text_encoder_2"]
        .get_parameter("text_projection.weight")
    )
    assert projection.is_contiguous()  # a product with another layout may differ in its last bits


def test_diffusers_reads_the_same_weights_from_the_checkpoint(tmp_path):
    """Confirms that the checkpoint writer of the tests uses the real layout."""
    from diffusers import StableDiffusionXLPipeline

    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_sdxl_checkpoint(TINY_SDXL), path)
    theirs = StableDiffusionXLPipeline.from_single_file(
        str(path),
        config=str(TINY_SDXL),
        local_files_only=True,
        torch_dtype=torch.float32,
        add_watermarker=False,
    )
    ours = load(path, config=str(TINY_SDXL))
    for part in ("unet", "vae", "text_encoder_2"):
        left, right = weights_of(ours.parts[part]), getattr(theirs, part).state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name].float()) for name in left), part


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "conditioner.embedders.1.model.transformer.resblocks.0.extra.weight",
            "the model does not use",
        ),
        ("conditioner.embedders.1.model.extra", "the model does not use"),
        ("conditioner.embedders.0.transformer.extra", "are unknown"),
        ("conditioner.embedders.2.x", "the model does not use"),
    ],
)
def test_an_unused_weight_of_a_checkpoint_is_named(tmp_path, key, words):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_sdxl_checkpoint(TINY_SDXL) | {key: torch.zeros(2)}, path)
    with pytest.raises(BaseModelWeightsError, match=words):
        load(path, config=str(TINY_SDXL))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_a_fused_qkv_matrix_of_another_shape_is_a_typed_error(tmp_path, shape):
    path = tmp_path / "model.safetensors"
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    safetensors.torch.save_file(as_sdxl_checkpoint(TINY_SDXL) | {key: torch.zeros(shape)}, path)
    with pytest.raises(BaseModelWeightsError):
        load(path, config=str(TINY_SDXL))


def test_a_base_model_of_the_other_family_is_recognised(tmp_path):
    with pytest.raises(
        BaseModelFilesError,
        match=r"a base model of Stable Diffusion 1\.5, not of .*; use it with model sd15",
    ):
        load(TINY_BASE)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_ldm_checkpoint(TINY_BASE), path)
    with pytest.raises(
        BaseModelFilesError,
        match=r"a checkpoint of Stable Diffusion 1\.5, not .*: use it as model sd15",
    ):
        load(path)


def test_text_encoder_names_with_and_without_text_model_are_equal(tmp_path):
    """The projection is outside `text_model`, so its name is the same in both."""
    base = tmp_path / "base"
    shutil.copytree(TINY_SDXL, base)
    for part in ("text_encoder", "text_encoder_2"):
        change_weights(
            base / part / "model.safetensors",
            lambda tensors: {name.removeprefix("text_model."): t for name, t in tensors.items()},
        )
    assert same(load(base), load(TINY_SDXL))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_estimated_memory_covers_the_loaded_model(tmp_path, dtype):
    """The estimate includes a VAE that is converted to a wider dtype than the other parts."""
    base = tmp_path / "base"
    shutil.copytree(TINY_SDXL, base)
    config = read_json(base / "vae" / "config.json") | {"force_upcast": True}
    (base / "vae" / "config.json").write_text(json.dumps(config))
    loaded = load(base, dtype=dtype)
    assert (
        loaded.size_bytes
        <= expected_bytes_of(sdxl_recipe(base, dtype=dtype))
        < 1.3 * loaded.size_bytes
    )
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_sdxl_checkpoint(TINY_SDXL), file)
    in_one_file = load(file, dtype=dtype, config=str(base))
    assert (
        in_one_file.size_bytes
        <= expected_bytes_of(sdxl_recipe(file, dtype=dtype, config=str(base)))
        < 1.3 * in_one_file.size_bytes
    )


# --- adapters: names ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def targets() -> Targets:
    return Targets(
        SPEC, {part.name: full_size(part.name) for part in SPEC.parts if part.adapter_prefixes}
    )


@pytest.mark.parametrize(
    ("name", "target"),
    [
        # As kohya's trainer writes them.
        ("lora_unet_input_blocks_1_0_in_layers_2", "unet.down_blocks.0.resnets.0.conv1"),
        ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_4_1_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        (
            "lora_unet_input_blocks_4_0_skip_connection",
            "unet.down_blocks.1.resnets.0.conv_shortcut",
        ),
        (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_v",
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v",
        ),
        (
            "lora_unet_middle_block_1_transformer_blocks_3_ff_net_0_proj",
            "unet.mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj",
        ),
        ("lora_unet_middle_block_2_emb_layers_1", "unet.mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_output_blocks_2_1_proj_out", "unet.up_blocks.0.attentions.2.proj_out"),
        ("lora_unet_output_blocks_2_2_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_8_0_out_layers_3", "unet.up_blocks.2.resnets.2.conv2"),
        ("lora_unet_time_embed_0", "unet.time_embedding.linear_1"),
        ("lora_unet_label_emb_0_2", "unet.add_embedding.linear_2"),
        ("lora_unet_out_2", "unet.conv_out"),
        # As AI Toolkit does, and PEFT.
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("unet.up_blocks.1.attentions.2.proj_in", "unet.up_blocks.1.attentions.2.proj_in"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.encoder.layers.0.mlp.fc1"),
        ("lora_te1_encoder_layers_0_mlp_fc1", "text_encoder.encoder.layers.0.mlp.fc1"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.encoder.layers.0.mlp.fc1"),
        (
            "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
        ),
        (
            "lora_te2_encoder_layers_31_self_attn_q_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
        ),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        (
            "text_encoder_2.text_model.encoder.layers.3.mlp.fc2",
            "text_encoder_2.text_model.encoder.layers.3.mlp.fc2",
        ),
    ],
)
def test_module_names_are_mapped_to_parts_of_the_model(targets, name, target):
    assert targets.find_name(name) == target


@pytest.mark.parametrize(
    "name",
    ["lora_te_text_model_encoder_layers_40_mlp_fc1", "lora_unet_input_blocks_9_0_op", "lora_te3_x"],
)
def test_unknown_module_names_are_not_mapped(targets, name):
    assert targets.find_name(name) is None


def test_original_module_names_match_the_original_layout():
    """Compare with the checkpoint writer of the tests, which has its own table of names."""
    unet = load(TINY_SDXL).parts["unet"]
    paths = [
        path for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    expected = {
        path: ldm_unet_name(f"{path}.weight", plain_block=2).removesuffix(".weight")
        for path in paths
    }
    names = original_names(dict(unet.named_modules()))
    assert {path: names[path] for path in paths} == expected


def test_an_adapter_with_original_names_makes_the_same_image(engine, tmp_path):
    paths = original_names(dict(load(TINY_SDXL).parts["unet"].named_modules()))
    flat = {path.replace(".", "_"): name.replace(".", "_") for path, name in paths.items()}

    def renamed(key: str) -> str:
        module, dot, part = key.removeprefix("lora_unet_").partition(".")
        return f"lora_unet_{flat[module]}{dot}{part}"

    tensors = safetensors.torch.load_file(SDXL_LORA)
    other = save_adapter(
        tmp_path / "kohya.safetensors", {renamed(key): tensor for key, tensor in tensors.items()}
    )
    ours, theirs = (engine.generate(recipe_with(path)).pixels for path in (SDXL_LORA, other))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, engine.generate(Recipe(prompt="a ball", **SMALL)).pixels)


# --- adapters: what they do ---------------------------------------------------------------------


def recipe_with(path: Path, **fields: Any) -> Recipe:
    return Recipe(prompt="a ball", adapters=(AdapterRef.from_file(path),), **(SMALL | fields))


def random_lora(*modules: tuple[str, int, int]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    tensors = {}
    for name, out, into in modules:
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, into)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2)
    return tensors


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 32),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 48),
    ],
)
def test_adapters_of_either_text_encoder_leave_no_trace(engine, tmp_path, name, width):
    path = save_adapter(tmp_path / "text.safetensors", random_lora((name, 64, width)))
    plain = Recipe(prompt="a ball", **SMALL)
    before, after = engine.generate(plain).pixels, engine.generate(recipe_with(path)).pixels
    assert not np.array_equal(before, after)
    assert np.array_equal(before, engine.generate(plain).pixels)
    assert np.array_equal(after, Engine(device="cpu").generate(recipe_with(path)).pixels)


def test_a_lokr_works_merged_and_live(engine, tmp_path):
    torch.manual_seed(3)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = save_adapter(
        tmp_path / "lokr.safetensors",
        {f"{name}.lokr_w1": torch.randn(4, 4), f"{name}.lokr_w2": torch.randn(8, 8)},
    )
    images = [
        engine.generate(recipe_with(path, adapter_mode=mode)).pixels.astype(int)
        for mode in ("merged", "live")
    ]
    assert abs(images[0] - images[1]).max() <= 1
    assert abs(images[0] - engine.generate(Recipe(prompt="a ball", **SMALL)).pixels).max() > 1


@pytest.mark.parametrize(
    ("path", "made_for", "used_with"),
    [(LORA, "sd15", SMALL), (SDXL_LORA, "sdxl", SD15), (SDXL_DORA, "sdxl", SD15)],
)
def test_an_adapter_of_the_other_model_names_the_right_model(engine, path, made_for, used_with):
    with pytest.raises(AdapterMismatchError) as raised:
        engine.generate(recipe_with(path, **used_with))
    title, other = get_family(made_for).title, get_family(used_with["model"]).title
    expected = (
        f"{path.stem} is an adapter for {title}, but the base model is of family {other}. "
        f"Use the adapter with model {made_for}."
    )
    assert str(raised.value).startswith(expected)
    assert f"`--model {made_for}`" in str(raised.value)
    assert f"`--base-model {made_for}=BASE`" in str(raised.value)


def test_an_adapter_that_fits_both_models_is_checked_by_metadata(engine, tmp_path):
    """Both models have this module, here with the same shape."""
    unet: Any = load(TINY_SDXL).parts["unet"]
    module = ("lora_unet_conv_in", *unet.conv_in.weight.shape[:2])
    out, inside = module[1:]
    tensors = {
        f"{module[0]}.lora_down.weight": torch.ones(2, inside, 3, 3),
        f"{module[0]}.lora_up.weight": torch.ones(out, 2, 1, 1),
    }
    silent = save_adapter(tmp_path / "a.safetensors", tensors)
    engine.generate(recipe_with(silent, **SMALL))
    for_other = save_adapter(tmp_path / "b.safetensors", tensors, ss_base_model_version="sd_1.5")
    with pytest.raises(AdapterMismatchError, match="Use the adapter with model sd15"):
        engine.generate(recipe_with(for_other, **SMALL))


def test_a_vae_with_latents_mean_is_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_SDXL, base)
    config = read_json(base / "vae" / "config.json") | {"latents_mean": [0.0, 0.1, 0.2, 0.3]}
    (base / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelFilesError, match="latents_mean"):
        load(base)


def test_a_replacement_vae_counts_towards_the_budget(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_SDXL, base)
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    loaded = load(base, vae=str(TINY_SDXL / "vae"))
    expected = expected_bytes_of(sdxl_recipe(base, vae=str(TINY_SDXL / "vae")))
    assert loaded.size_bytes <= expected < 1.3 * loaded.size_bytes


def test_the_right_model_is_named_without_metadata(engine, tmp_path):
    text = save_adapter(
        tmp_path / "a.safetensors",
        random_lora(("lora_te2_text_model_encoder_layers_0_mlp_fc1", 64, 48)),
    )
    with pytest.raises(AdapterMismatchError, match="Use the adapter with model sdxl"):
        engine.generate(recipe_with(text, **SD15))
    # Both models have this module, so its shape decides; it is that of the full-size SDXL.
    both = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = save_adapter(tmp_path / "b.safetensors", random_lora((both, 640, 2048)))
    with pytest.raises(AdapterMismatchError, match="Use the adapter with model sdxl"):
        engine.generate(recipe_with(wide, **SD15))


def test_metadata_takes_precedence_over_module_names(engine):
    """The miniature's modules do not match any full-size base model."""
    with pytest.raises(
        AdapterMismatchError,
        match=r"sks is an adapter for Stable Diffusion 1\.5, .* Use the adapter with model sd15",
    ):
        engine.generate(recipe_with(MINIATURE_LORA))


def test_modules_that_fit_neither_model_are_listed(engine, tmp_path):
    path = save_adapter(tmp_path / "a.safetensors", random_lora(("lora_unet_nowhere", 8, 8)))
    with pytest.raises(
        AdapterMismatchError, match=r"1 of 1 modules do not exist in it: lora_unet_nowhere"
    ):
        engine.generate(recipe_with(path))


@pytest.mark.parametrize(
    ("path", "kind", "notes"), [(SDXL_LORA, "lora", []), (SDXL_DORA, "dora", ["missing_alpha"])]
)
def test_adapters_of_the_trainer_are_examined(path, kind, notes):
    found = examine_adapter(path, str(TINY_SDXL))
    assert (found.model, found.summary.kind, found.matched, found.usable) == (
        "sdxl",
        kind,
        124,
        True,
    )
    assert [problem.code for problem in found.problems] == notes
    assert all(
        "the alpha is in the configuration of the training run" in problem.message
        for problem in found.problems
    )


# --- DoRA ---------------------------------------------------------------------------------------


def test_a_dora_is_always_live(engine):
    merged, live = (
        engine.generate(recipe_with(SDXL_DORA, adapter_mode=mode)).pixels
        for mode in ("merged", "live")
    )
    assert np.array_equal(merged, live)
    assert not np.array_equal(merged, engine.generate(Recipe(prompt="a ball", **SMALL)).pixels)


def test_a_dora_works_with_a_merged_lora(engine):
    both = tuple(AdapterRef.from_file(path) for path in (SDXL_LORA, SDXL_DORA))
    one = Recipe(prompt="a ball", adapters=both, **SMALL)
    with_both = engine.generate(one).pixels
    assert np.array_equal(with_both, Engine(device="cpu").generate(one).pixels)
    assert not np.array_equal(with_both, engine.generate(replace(one, adapters=both[:1])).pixels)


@pytest.mark.parametrize("multiplier", [1.0, -0.5, 0.0])
def test_a_dora_matches_its_formula(multiplier):
    torch.manual_seed(5)
    down, up, magnitude, weight, bias, x = (
        torch.randn(size) for size in ((3, 8), (5, 3), (5,), (5, 8), (5,), (4, 8))
    )
    module = nn.Linear(8, 5)
    module.weight.data, module.bias.data = weight, bias
    delta = DoraDelta(0.5, down, up, magnitude)
    changed = weight + multiplier * up @ down
    length = (changed**2).sum(dim=1).sqrt()
    expected = (
        x @ weight.T
        + bias
        + x @ down.T @ up.T * 0.5 * multiplier
        + (magnitude / length - 1) * (x @ changed.T)
    )
    live = delta.live_output(module, x, module(x), multiplier, lambda: weight)
    torch.testing.assert_close(live, expected)
    merged = nn.functional.linear(x, weight + delta.change(weight, multiplier), bias)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_the_alpha_of_a_dora_comes_from_the_recipe(engine):
    adapter = read_adapter(SDXL_DORA)
    assert {delta.scale for delta in adapter.deltas.values()} == {1.0}
    assert {delta.scale for delta in adapter.with_alpha(4).deltas.values()} == {0.5}
    plain = recipe_with(SDXL_DORA)
    given = {
        alpha: replace(plain, adapters=(replace(plain.adapters[0], alpha=alpha),))
        for alpha in (8.0, 4.0)
    }
    assert np.array_equal(engine.generate(given[8.0]).pixels, engine.generate(plain).pixels)
    assert not np.array_equal(engine.generate(given[4.0]).pixels, engine.generate(plain).pixels)


def test_an_alpha_for_another_kind_of_adapter_is_refused(engine):
    recipe = recipe_with(SDXL_LORA)
    with pytest.raises(AdapterFormatError, match="is not a DoRA"):
        engine.generate(replace(recipe, adapters=(replace(recipe.adapters[0], alpha=4.0),)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"m.magnitude": torch.ones(3)},
        {"m.magnitude": torch.ones(4, 1)},
        {"m.lora_down.weight": torch.ones(2, 4, 3, 3), "m.lora_up.weight": torch.ones(4, 2, 1, 1)},
    ],
)
def test_invalid_dora_shapes_are_refused(tmp_path, wrong):
    tensors = {
        "m.lora_down.weight": torch.ones(2, 4),
        "m.lora_up.weight": torch.ones(4, 2),
        "m.magnitude": torch.ones(4),
    }
    with pytest.raises(AdapterFormatError, match="are not valid for a DoRA"):
        read_adapter(save_adapter(tmp_path / "x.safetensors", tensors | wrong))


# --- texts --------------------------------------------------------------------------------------


def test_each_text_encoder_encodes_its_own_negative_prompt(engine):
    plain = Recipe(prompt="a ball", negative_prompt="ugly", **SMALL)
    images = [
        engine.generate(replace(plain, negative_prompt_2=text)).pixels
        for text in (None, "", "ugly")
    ]
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    without_guidance = [
        replace(plain, guidance_scale=1.0, negative_prompt_2=text) for text in (None, "")
    ]
    assert len({engine.generate(one).pixels.tobytes() for one in without_guidance}) == 1


def test_the_truncated_end_of_each_text_is_quoted_once(engine):
    long = " ".join(["ball"] * 100)
    image = engine.generate(
        Recipe(prompt=long, negative_prompt="", negative_prompt_2=long, **SMALL)
    )
    assert [warning.split(" exceeds")[0] for warning in image.warnings] == [
        "The end of the second negative prompt",
        "The end of the prompt",
    ]


def no_adapters(part: str) -> tuple[()]:
    return ()


@pytest.mark.parametrize(
    "recipe", [Recipe(prompt="", **SMALL), Recipe(prompt="", **SD15)], ids=["sdxl", "sd15"]
)
def test_blank_conditioning_has_the_shapes_of_real_conditioning(recipe):
    text, size = load_model_of(recipe).text, Size(64, 64)
    with torch.no_grad():
        real = text.encode(Prompts("", ""), size, no_adapters)
    blank = text.blank(size, negative=True)
    for one, other in ((real.positive, blank.positive), (real.negative, blank.negative)):
        assert one.text.shape == other.text.shape
        shapes = [{name: row.shape for name, row in each.added.items()} for each in (one, other)]
        assert shapes[0] == shapes[1]
    assert text.blank(size, negative=False).negative is None


def test_size_conditioning_has_the_order_height_width():
    with torch.no_grad():
        encoded = load(TINY_SDXL).text.encode(Prompts("", ""), Size(96, 64), no_adapters)
    for row in (encoded.negative, encoded.positive):
        assert row.added["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]]


# --- fast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, SDXL_LORA, SDXL_DORA])
def test_fast_is_nearly_exact_and_leaves_no_trace(engine, path):
    exact = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(path),) if path else (), **SMALL)
    fast = replace(exact, fidelity="fast")
    plain = replace(fast, adapters=())
    wanted = engine.generate(exact).pixels.astype(int)
    difference = abs(engine.generate(fast).pixels - wanted).mean()
    assert difference < 2
    if path:  # the adapter changes more than `fast` does
        assert abs(engine.generate(plain).pixels - wanted).mean() > 3 * difference
    assert np.array_equal(
        engine.generate(plain).pixels, Engine(device="cpu").generate(plain).pixels
    )


def test_images_of_a_batch_have_their_own_texts_and_noise(engine):
    one = Recipe(prompt="a ball", negative_prompt="ugly", fidelity="fast", **SMALL)
    recipes = [one, replace(one, prompt="a box", seed=7), replace(one, negative_prompt_2="")]
    together = engine.generate_batch(recipes)
    for recipe, image in zip(recipes, together, strict=True):
        assert abs(image.pixels.astype(int) - engine.generate(recipe).pixels).mean() < 2
    assert len({image.pixels.tobytes() for image in together}) == 3


# --- two families in one engine -----------------------------------------------------------------


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_models_alternate_within_a_budget_for_one(fidelity):
    """Alternate 6 times: one base at a time, evicted bases are freed, and the images are equal."""
    recipes = [
        recipe_with(LORA, **SD15, fidelity=fidelity),
        recipe_with(SDXL_LORA, fidelity=fidelity),
    ]
    alone = [Engine(device="cpu").generate(recipe).pixels for recipe in recipes]
    largest = max(expected_bytes_of(recipe) for recipe in recipes)
    engine = Engine(device="cpu", base_budget_bytes=largest)
    seen: list[weakref.ref[LoadedModel]] = []
    for turn in range(6):
        assert np.array_equal(engine.generate(recipes[turn % 2]).pixels, alone[turn % 2])
        (base,) = engine._models.models.values()
        assert base.size_bytes <= largest
        seen.append(weakref.ref(base))
        del base
        assert [ref() is not None for ref in seen] == [False] * turn + [True]


def test_a_budget_for_both_models_keeps_both_loaded():
    recipes = [Recipe(prompt="", **SD15), Recipe(prompt="", **SMALL)]
    engine = Engine(device="cpu", base_budget_bytes=2**30)
    engine.generate(recipes[0])
    first = next(iter(engine._models.models.values()))
    for recipe in recipes:
        engine.generate(recipe)
    assert len(engine._models.models) == 2
    assert first in engine._models.models.values()
