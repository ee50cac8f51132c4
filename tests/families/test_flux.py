"""FLUX.1 and Flex.1: behavior that no other family has. Golden runs are in tests/training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file
from tests.support import (
    FLUX_LORA,
    GOLDEN_JOBS,
    GOLDENS,
    LORA,
    SAME_PROCESSOR,
    TINY_CHROMA,
    TINY_FLUX,
    change_weights,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer

from fidelora import AdapterRef, Engine, Recipe
from fidelora.cli.image_plan import resolve_noise
from fidelora.engine.convert import convert_adapter
from fidelora.engine.examine import examine_adapter
from fidelora.errors import (
    AdapterConversionError,
    AdapterError,
    AdapterMismatchError,
    BaseModelFilesError,
    DeviceError,
    RecipeError,
    TrainingRunError,
)
from fidelora.families import get_family
from fidelora.families.flux.names import fused_names, original_names
from fidelora.families.patches import pack, positions, unpack
from fidelora.families.protocols import Guidance, Prompts, Size
from fidelora.loras.hub import HubFile
from fidelora.training.compare import compare_with_sample
from fidelora.training.model_block import find_training_adapter
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run
from fidelora.training.suspects import precisions

SMALL = Recipe(
    model="flux", prompt="a red ball", base_model=str(TINY_FLUX),
    width=64, height=80, steps=4, guidance_scale=3.5, seed=11,
)  # fmt: skip
CFG = replace(SMALL, model="flux_cfg", negative_prompt="blurry")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)


def pipeline_pixels(recipe: Recipe) -> Any:
    """Return the image of diffusers' pipeline, with the trainer's schedule."""
    parts: Any = load_model_of(recipe).parts
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=CLIPTokenizer.from_pretrained(TINY_FLUX / "tokenizer"),
        text_encoder_2=parts["text_encoder_2"],
        tokenizer_2=AutoTokenizer.from_pretrained(TINY_FLUX / "tokenizer_2"),
        transformer=parts["transformer"],
    )
    pipeline.set_progress_bar_config(disable=True)
    is_cfg = recipe.model == "flux_cfg"
    with torch.no_grad():
        image = pipeline(
            prompt=recipe.prompt,
            negative_prompt=recipe.negative_prompt if is_cfg else None,
            true_cfg_scale=recipe.guidance_scale if is_cfg else 1.0,
            width=recipe.width,
            height=recipe.height,
            num_inference_steps=recipe.steps,
            sigmas=torch.linspace(1.0, 1 / recipe.steps, recipe.steps).tolist(),
            guidance_scale=recipe.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            max_sequence_length=512,
        ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("recipe", [SMALL, CFG], ids=lambda one: one.model)
def test_an_image_has_the_pixels_of_the_diffusers_pipeline(engine, recipe):
    assert np.array_equal(engine.generate(recipe).pixels, pipeline_pixels(recipe))


def test_guidance_changes_the_image_and_may_be_zero(engine):
    images = [engine.generate(replace(SMALL, guidance_scale=one)).pixels for one in (0, 1, 3.5)]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])


def test_cfg_uses_the_negative_prompt_only_with_guidance(engine):
    other = replace(CFG, negative_prompt="ugly")
    assert not np.array_equal(engine.generate(CFG).pixels, engine.generate(other).pixels)
    plain = [replace(one, guidance_scale=1.0) for one in (CFG, other)]
    assert np.array_equal(*(engine.generate(one).pixels for one in plain))


def test_flex1_differs_from_flux_only_in_its_defaults(engine):
    flex1 = replace(SMALL, model="flex1")
    assert np.array_equal(engine.generate(flex1).pixels, engine.generate(SMALL).pixels)
    assert Recipe(prompt="a", model="flex1").base_model == "ostris/Flex.1-alpha"


@pytest.fixture
def tiny_schnell(tmp_path) -> Path:
    """Return a base model like FLUX.1-schnell, without embedded guidance."""
    base = Path(shutil.copytree(TINY_FLUX, tmp_path / "base"))
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    change_weights(
        base / "transformer" / "diffusion_pytorch_model.safetensors",
        lambda tensors: {k: v for k, v in tensors.items() if "guidance_embedder" not in k},
    )
    return base


def test_the_assistant_of_schnell_is_merged_and_subtracted(engine, tiny_schnell):
    assistant = GOLDENS / "base" / "tiny-schnell-adapter.safetensors"
    run = read_run(GOLDEN_JOBS / "schnell_assistant")
    assert run.training_adapter == "golden/tiny-schnell-adapter.safetensors"
    run = run.with_settings(training_adapter=str(assistant))
    plans = plan_samples(run, 4, base_model=str(tiny_schnell))
    assert len(plans) == 2
    for plan in plans:
        assert plan.trainer_image is not None
        for recipe in (plan.recipe, replace(plan.recipe, training_adapters=())):
            pixels = engine.generate(recipe).all_pixels
            comparison = compare_with_sample(pixels, plan.trainer_image)
            if recipe is not plan.recipe:  # the rounding of the merge is missing
                assert comparison.identical_percent < 90
            elif SAME_PROCESSOR:
                assert comparison.identical_percent == 100
            else:
                assert comparison.max_difference <= 12


def test_a_repository_of_an_assistant_means_its_peft_file(monkeypatch):
    parsed: list[str] = []

    def no_download(file: HubFile, *arguments: object) -> Path:
        parsed.append(str(file))
        raise AdapterError("not here")

    monkeypatch.setattr(HubFile, "fetch", no_download)
    for location in ("a/b", "a/b/c.safetensors"):
        with pytest.raises(TrainingRunError, match="--training-adapter, or none"):
            find_training_adapter(location)
    assert parsed == ["hf:a/b/pytorch_lora_weights.safetensors", "hf:a/b/c.safetensors"]


def test_a_transformer_without_embedded_guidance_ignores_it(engine, tiny_schnell):
    schnell = replace(SMALL, base_model=str(tiny_schnell))
    image = engine.generate(schnell).pixels
    assert np.array_equal(image, engine.generate(replace(schnell, guidance_scale=0.0)).pixels)
    assert np.array_equal(image, engine.generate(replace(CFG, guidance_scale=1.0)).pixels)


def test_sizes_are_multiples_of_16(engine):
    assert engine.generate(replace(SMALL, width=101, height=75)).pixels.shape == (64, 96, 3)


def test_only_the_end_that_t5_does_not_read_is_quoted(engine):
    long = replace(SMALL, prompt="ball " * 100, steps=1)
    assert engine.generate(long).warnings == ()
    image = engine.generate(replace(SMALL, prompt="ball " * 600 + "at night", steps=1))
    (warning,) = image.warnings
    assert warning.startswith("The end of the prompt exceeds 512 tokens")
    assert warning.endswith('at night".')


def test_t5_has_tied_embeddings_and_plain_attention():
    t5: Any = load_model_of(SMALL).parts["text_encoder_2"]
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    assert t5.encoder.config._attn_implementation == "eager"


def test_a_tokenizer_of_another_encoder_is_refused(engine, tmp_path):
    base = Path(shutil.copytree(TINY_FLUX, tmp_path / "base"))
    shutil.rmtree(base / "tokenizer_2")
    shutil.copytree(base / "tokenizer", base / "tokenizer_2")
    with pytest.raises(BaseModelFilesError, match="tokenizer_2 does not belong to"):
        engine.generate(replace(SMALL, base_model=str(base)))


def test_a_lora_leaves_no_trace_and_is_equal_merged_and_live(engine):
    pristine = engine.generate(SMALL).pixels
    merged = replace(SMALL, adapters=(AdapterRef.from_file(FLUX_LORA),))
    first = engine.generate(merged).pixels.astype(int)
    live = engine.generate(replace(merged, adapter_mode="live")).pixels.astype(int)
    assert abs(first - live).max() <= 1
    assert abs(first - pristine).max() > 5
    assert np.array_equal(engine.generate(SMALL).pixels, pristine)


def test_tokens_are_squares_of_latents():
    latents, size = load_model_of(SMALL).latents, Size(96, 64)
    assert latents.shape(size) == (1, 16, 8, 12)
    assert latents.tokens(size) == 24
    assert latents.noise_dtype(torch.bfloat16) == torch.bfloat16
    assert latents.preview(torch.randn(16, 8, 12), size).shape == (8, 12, 3)
    values = torch.randn(2, 16, 8, 12)
    assert pack(values).shape == (2, 24, 64)
    assert pack(values)[0, 7, :4].tolist() == values[0, 0, 2:4, 2:4].flatten().tolist()
    assert torch.equal(unpack(pack(values), size), values)
    assert positions(size, torch.device("cpu"), torch.float32)[7].tolist() == [0, 1, 1]


@pytest.mark.parametrize("recipe", [SMALL, CFG], ids=lambda one: one.model)
def test_the_denoiser_accepts_blank_conditioning(recipe):
    model = load_model_of(recipe)
    size, guidance = Size(64, 64), Guidance(3.0)
    negative = model.denoiser.uses_negative(guidance)
    blank = model.text.blank(size, negative=negative)
    with torch.no_grad():
        real = model.text.encode(Prompts("a", ""), size, lambda part: ())
        denoise = model.denoiser.prepare([blank] * 2, guidance, size, torch.float32)
        assert denoise(torch.zeros(2, 16, 8, 8), torch.tensor(500.0)).shape == (2, 16, 8, 8)
    for name in ("pooled", "states"):
        assert getattr(blank.positive, name).shape == getattr(real.positive, name).shape


# --- adapters -------------------------------------------------------------------------------------


def test_the_adapter_is_recognised(engine):
    found = examine_adapter(FLUX_LORA)
    assert (found.model, found.usable) == ("flux", True)
    for model in ("flux", "flex1"):
        recipe = replace(SMALL, model=model, adapters=(AdapterRef.from_file(LORA),))
        with pytest.raises(AdapterMismatchError):
            engine.generate(recipe)


def in_original_names(tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """Return a LoRA in diffusers' names under those of the original code, with fused modules.

    The factors of fused modules are stacked: `down` [rank * n, in], and `up` is block-diagonal.
    """
    paths = [
        key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight")
    ]
    factors = {
        path: [tensors[f"transformer.{path}.lora_{one}.weight"] for one in "AB"] for path in paths
    }
    named = {name: factors[path] for path, name in original_names(paths).items()}
    for name, parts in fused_names(paths).items():
        downs, ups = zip(*(factors[part] for part in parts), strict=True)
        named[name] = [torch.cat(downs), torch.block_diag(*ups)]
    if style == "kohya":
        return {
            f"lora_unet_{name.replace('.', '_')}.{part}.weight": factor
            for name, pair in named.items()
            for part, factor in zip(("lora_down", "lora_up"), pair, strict=True)
        }
    return {
        f"diffusion_model.{name}.lora_{part}.weight": factor
        for name, pair in named.items()
        for part, factor in zip("AB", pair, strict=True)
    }


def renamed(tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    if style in ("kohya", "comfyui"):
        return in_original_names(tensors, style)
    return {
        "lora_transformer_"
        + key.removeprefix("transformer.")
        .replace(".lora_A.", "|lora_down.")
        .replace(".lora_B.", "|lora_up.")
        .replace(".weight", "")
        .partition("|")[0]
        .replace(".", "_")
        + (".lora_down.weight" if ".lora_A." in key else ".lora_up.weight"): value
        for key, value in tensors.items()
    }


@pytest.mark.parametrize("style", ["kohya", "comfyui", "onetrainer"])
@pytest.mark.parametrize("mode", ["merged", "live"])
def test_a_lora_in_the_names_of_other_programs_is_equal(engine, tmp_path, style, mode):
    tensors = load_file(FLUX_LORA)
    file = save_adapter(tmp_path / "a.safetensors", renamed(tensors, style))
    images = []
    for path in (FLUX_LORA, file):
        adapters = (AdapterRef.from_file(path),)
        recipe = replace(SMALL, adapters=adapters, adapter_mode=mode)
        images.append(engine.generate(recipe).pixels.astype(int))
    assert abs(images[0] - images[1]).max() <= 1
    assert examine_adapter(file).model == "flux"


def test_a_lora_of_xlabs_is_a_lora_of_attention_modules(engine, tmp_path):
    """Its `qkv_lora` of a single block changes only the first rows of `linear1`."""
    rows = {"qkv_lora1": 192, "qkv_lora2": 192, "proj_lora1": 64, "proj_lora2": 64}
    block = "transformer.transformer_blocks.0.attn"
    xlabs: dict[str, Tensor] = {}
    diffusers: dict[str, Tensor] = {}
    modules = {
        "qkv_lora1": ["to_q", "to_k", "to_v"], "proj_lora1": ["to_out.0"],
        "qkv_lora2": ["add_q_proj", "add_k_proj", "add_v_proj"], "proj_lora2": ["to_add_out"],
    }  # fmt: skip
    for name, count in rows.items():
        down, up = torch.randn(2, 64) / 4, torch.randn(count, 2) / 4
        xlabs |= {
            f"double_blocks.0.processor.{name}.{part}.weight": one
            for part, one in (("down", down), ("up", up))
        }
        for module, own in zip(modules[name], up.split(64), strict=True):
            diffusers |= {f"{block}.{module}.lora_A.weight": down.clone()}
            diffusers |= {f"{block}.{module}.lora_B.weight": own.clone()}
    down, up = torch.randn(2, 64) / 4, torch.randn(192, 2) / 4
    xlabs |= {
        "single_blocks.0.processor.qkv_lora.down.weight": down,
        "single_blocks.0.processor.qkv_lora.up.weight": up,
    }
    for one, own in zip("qkv", up.split(64), strict=True):
        module = f"transformer.single_transformer_blocks.0.attn.to_{one}"
        diffusers |= {f"{module}.lora_A.weight": down.clone(), f"{module}.lora_B.weight": own.clone()}  # noqa: E501  # fmt: skip
    files = [
        save_adapter(tmp_path / f"{name}.safetensors", tensors)
        for name, tensors in (("xlabs", xlabs), ("diffusers", diffusers))
    ]
    images = [
        engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(file),))).pixels.astype(int)
        for file in files
    ]
    assert abs(images[0] - images[1]).max() <= 1
    assert abs(images[0] - engine.generate(SMALL).pixels).max() > 5


def test_the_text_encoder_of_a_kohya_lora_is_named(engine, tmp_path):
    tensors = {
        f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{part}.weight": torch.ones(
            8, 8
        )
        for part in ("down", "up")
    }
    file = save_adapter(tmp_path / "a.safetensors", {**load_file(FLUX_LORA), **tensors})
    with pytest.raises(AdapterMismatchError, match="change a text encoder, which is not supported"):
        engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(file),)))
    problems = [one.message for one in examine_adapter(file).problems]
    assert any("change a text encoder, which is not supported" in one for one in problems)


def test_a_fused_lokr_is_divided_among_its_modules(engine, tmp_path):
    w1, w2 = torch.randn(4, 4) / 4, torch.randn(48, 16) / 4
    fused = {"lokr_w1": w1, "lokr_w2": w2}
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    file = save_adapter(
        tmp_path / "a.safetensors", {f"{name}.{key}": value for key, value in fused.items()}
    )
    attention = "transformer.transformer_blocks.0.attn"
    whole = torch.kron(w1, w2)
    parts = save_adapter(
        tmp_path / "b.safetensors",
        {
            f"{attention}.to_{one}.diff": rows
            for one, rows in zip("qkv", whole.split(64), strict=True)
        },
    )
    for mode in ("merged", "live"):
        images = [
            engine.generate(
                replace(SMALL, adapters=(AdapterRef.from_file(path),), adapter_mode=mode)
            ).pixels.astype(int)
            for path in (file, parts)
        ]
        assert abs(images[0] - images[1]).max() <= 1
        assert abs(images[0] - engine.generate(SMALL).pixels).max() > 5


def test_a_fused_module_that_cannot_be_divided_is_refused(engine, tmp_path):
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    shapes = {
        "shape": {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(191, 2)},
        "without parts": {
            "lora_A.weight": torch.ones(2, 64),
            "lora_B.weight": torch.ones(192, 2),
            "magnitude": torch.ones(192),
        },
    }
    for words, tensors in shapes.items():
        file = save_adapter(
            tmp_path / f"{words}.safetensors", {f"{name}.{k}": v for k, v in tensors.items()}
        )
        with pytest.raises(AdapterMismatchError, match=words):
            engine.generate(replace(SMALL, adapters=(AdapterRef.from_file(file),)))


def test_conversion_divides_fused_modules_and_does_not_join_them(tmp_path):
    """The layout of the default base is needed, so the LoRA has its shapes."""
    name = "lora_unet_single_blocks_3_linear1"
    up = torch.randn(3 * 3072 + 12288, 2)
    file = save_adapter(
        tmp_path / "a.safetensors",
        {f"{name}.lora_down.weight": torch.randn(2, 3072), f"{name}.lora_up.weight": up},
    )
    with pytest.raises(AdapterConversionError, match="chroma, whose peft names differ"):
        convert_adapter(file, "peft")
    result = convert_adapter(file, "peft", "flux")
    (tmp_path / "b.safetensors").write_bytes(result.content)
    found = load_file(tmp_path / "b.safetensors")
    block = "transformer.single_transformer_blocks.3"
    assert torch.equal(found[f"{block}.attn.to_v.lora_B.weight"], up[6144:9216])
    assert torch.equal(found[f"{block}.proj_mlp.lora_B.weight"], up[9216:])
    assert len(found) == 8
    with pytest.raises(AdapterConversionError, match="one name for several modules of FLUX"):
        convert_adapter(tmp_path / "b.safetensors", "kohya")


# --- recipes and files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("negative_prompt", "x"), ("guidance_rescale", 0.7), ("prediction", "v_prediction"),
     ("negative_prompt_2", "x"), ("emphasis", "original")],
)  # fmt: skip
def test_fields_that_the_family_does_not_use_are_refused(field, value):
    with pytest.raises(RecipeError, match=rf"FLUX\.1 does not use {field}"):
        replace(SMALL, **{field: value})


def test_fast_is_not_implemented(engine):
    with pytest.raises(DeviceError, match=r"not implemented for FLUX\.1"):
        engine.generate(replace(SMALL, fidelity="fast"))


def test_a_base_model_of_another_family_is_named(engine):
    with pytest.raises(BaseModelFilesError, match=r"base model of FLUX\.1, not of Z-Image"):
        engine.generate(Recipe(prompt="a", model="zimage", base_model=str(TINY_FLUX), steps=1))


@pytest.mark.parametrize("recipe", [SMALL, CFG], ids=lambda one: one.model)
def test_the_estimated_memory_covers_the_loaded_model(recipe):
    size = load_model_of(recipe).size_bytes
    assert size <= expected_bytes_of(recipe) < 1.3 * size


def test_an_old_trainers_adapter_selects_legacy_noise(tmp_path):
    old = {"software": '{"name": "ai-toolkit", "version": "0.10.25"}'}
    file = tmp_path / "a.safetensors"
    save_file(load_file(FLUX_LORA), file, old)
    assert resolve_noise("auto", (AdapterRef.from_file(file),), "flux") == "legacy"


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ({"arch": "flux"}, "flux"),
        ({"is_flux": True}, "flux"),
        ({"arch": "flex1"}, "flex1"),
        ({"arch": "flux", "use_flux_cfg": True}, "flux_cfg"),
        ({"is_flux": True, "use_flux_cfg": True}, "flux_cfg"),
        ({"arch": "flux", "use_flux_cfg": False}, "flux"),
    ],
    ids=str,
)
def test_a_training_run_names_its_family(tmp_path, model, family):
    run = Path(shutil.copytree(GOLDEN_JOBS / "flux_lora_f32", tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    lines = "".join(f"      {key}: {value}\n" for key, value in model.items())
    assert "      arch: flux\n" in text
    (run / "config.yaml").write_text(text.replace("      arch: flux\n", lines))
    assert read_run(run).model == family


def test_settings_that_are_not_replayed_are_named(tmp_path):
    run = Path(shutil.copytree(GOLDEN_JOBS / "flux_lora_f32", tmp_path / "run"))
    assert read_run(run).notes == ()
    text = (run / "config.yaml").read_text()
    changed = text.replace("arch: flux\n", "arch: flux\n      attn_masking: true\n")
    (run / "config.yaml").write_text(changed)
    (note,) = read_run(run).notes
    assert note.startswith("model.attn_masking is set: ")


def test_the_doctors_suspects_are_recipes_of_the_family():
    assert {one.recipe.model for one in precisions(replace(SMALL, dtype="bfloat16"))} == {"flux"}
    assert get_family("flux").samplers.keys() == {"flowmatch"}


def as_checkpoint(prefix: str = "") -> dict[str, Tensor]:
    """Return the tiny transformer's weights under the names of the original code."""
    weights = load_file(TINY_FLUX / "transformer" / "diffusion_pytorch_model.safetensors")
    modules = {key.rpartition(".")[0] for key in weights}
    named = original_names(modules)
    inside = {path: name for name, paths in fused_names(modules).items() for path in paths}
    norms = {"norm_q": "query_norm", "norm_k": "key_norm"}
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, kind = key.rpartition(".")[::2]
        block = module.replace("single_transformer_blocks", "single_blocks")
        block = block.replace("transformer_blocks", "double_blocks")
        if module == "norm_out.linear":
            scale, shift = value.chunk(2)
            found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        elif module in named:
            found[f"{named[module]}.{kind}"] = value
        elif module in inside:
            paths = fused_names(modules)[inside[module]]
            found[f"{inside[module]}.{kind}"] = torch.cat([weights[f"{p}.{kind}"] for p in paths])
        else:
            head, last = block.split(".attn.")
            side = "txt_attn." if "added" in last else "img_attn."
            side = "" if head.startswith("single") else side
            found[f"{head}.{side}norm.{norms[last.replace('added_', '')]}.scale"] = value
    return {prefix + key: value.contiguous() for key, value in found.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("model", ["flux", "flux_cfg"])
def test_a_checkpoint_with_the_original_names_gives_the_same_image(engine, tmp_path, model, prefix):
    file = tmp_path / "flux1-tiny.safetensors"
    save_file(as_checkpoint(prefix), file)
    recipe = replace(SMALL, model=model)
    one = engine.generate(replace(recipe, base_model=str(file), config=str(TINY_FLUX)))
    assert np.array_equal(one.pixels, engine.generate(recipe).pixels)


def test_checkpoints_that_are_something_else_are_refused(engine, tmp_path):
    chroma = TINY_CHROMA / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = tmp_path / "whole.safetensors"
    save_file(as_checkpoint("model.diffusion_model.") | {"vae.x": torch.zeros(1)}, whole)
    wide = tmp_path / "wide.safetensors"
    weights = as_checkpoint()
    key = next(key for key in weights if key.endswith("img_attn.qkv.weight"))
    weights[key] = weights[key][:-1].contiguous()
    save_file(weights, wide)
    for file, says in (
        (chroma, "is not a checkpoint of FLUX.1"),
        (whole, "also contains other parts, such as 'vae.x'"),
        (wide, "do not fit the configuration"),
    ):
        recipe = replace(SMALL, base_model=str(file), config=str(TINY_FLUX))
        with pytest.raises(BaseModelFilesError, match=says):
            engine.generate(recipe)
