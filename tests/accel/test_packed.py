"""The fast path: images close to those of `exact`, and adapters that leave no trace."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from tests.support import (
    LOKR,
    LORA,
    LORA_CONV,
    MINIATURE_LORA,
    NEEDS_BFLOAT16,
    TINY_BASE,
    change_weights,
    copy_base,
    load_model_of,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

from fidelora import AdapterRef, Engine, Recipe
from fidelora.accel import compiled as fast_on_cuda
from fidelora.accel import packed
from fidelora.accel.fast_path import FastPath, fast_path
from fidelora.engine import model as model_module
from fidelora.errors import DeviceError, RecipeError
from fidelora.families import get_family

DRAWING: dict[str, Any] = {
    "base_model": "fidelora:miniature",
    "width": 128,
    "height": 96,
    "steps": 8,
}
TINY: dict[str, Any] = {"base_model": str(TINY_BASE), "width": 64, "height": 64, "steps": 3}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", base_budget_bytes=2**30)


def psnr(one, other) -> float:
    error = np.mean((one.pixels.astype(float) - other.pixels.astype(float)) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sorted(get_family("sd15").samplers))
@pytest.mark.parametrize("strength", [None, 1.0])
def test_fast_is_nearly_exact_with_every_sampler(engine, sampler, strength):
    adapters = () if strength is None else (AdapterRef.from_file(MINIATURE_LORA, strength),)
    exact = Recipe(
        prompt="a red sks on a blue background", sampler=sampler, adapters=adapters, **DRAWING
    )
    slow, quick = engine.generate(exact), engine.generate(replace(exact, fidelity="fast"))
    # dpm_2_a takes large steps where the model is least certain, which amplify small differences;
    # the other samplers damp them.
    assert psnr(slow, quick) > (15 if sampler == "dpm_2_a" else 30)
    assert "fast" not in slow.environment
    assert (
        quick.environment["fast"] == f"packed, {str(packed.packed_dtype()).removeprefix('torch.')}"
    )


def test_fast_is_nearly_exact_without_guidance(engine):
    exact = Recipe(prompt="a red star", guidance_scale=1.0, **DRAWING)
    assert psnr(engine.generate(exact), engine.generate(replace(exact, fidelity="fast"))) > 35


@pytest.mark.parametrize("path", [LORA, LORA_CONV, LOKR], ids=lambda path: path.stem)
def test_an_adapter_changes_fast_and_exact_images_alike(engine, path):
    plain = Recipe(prompt="a ball", **TINY)
    change = replace(plain, adapters=(AdapterRef.from_file(path, 0.8),))
    before, after = (engine.generate(one).pixels.astype(float) for one in (plain, change))
    quick_before, quick_after = (
        engine.generate(replace(one, fidelity="fast")).pixels.astype(float)
        for one in (plain, change)
    )
    assert np.abs(after - before).mean() > 5
    assert np.corrcoef((after - before).ravel(), (quick_after - quick_before).ravel())[0, 1] > 0.98


def test_adapters_leave_no_trace(engine):
    lora, lokr = AdapterRef.from_file(LORA), AdapterRef.from_file(LOKR)
    plain = Recipe(prompt="a ball", fidelity="fast", **TINY)
    recipes = [
        plain,
        *(
            replace(plain, adapters=refs)
            for refs in ((lora,), (replace(lora, multiplier=0.5),), (lokr, lora))
        ),
    ]
    first = [engine.generate(recipe).pixels for recipe in recipes]
    for index in (1, 3, 0, 2, 1, 0, 3):
        assert np.array_equal(engine.generate(recipes[index]).pixels, first[index])
    assert not np.array_equal(first[0], first[1])


def test_fast_survives_an_overwritten_base_model_file(tmp_path, monkeypatch):
    """Packed weights are not mapped from the file, even without a cast; the new file is loaded."""
    base = copy_base(tmp_path)
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    change_weights(path, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    original = path.read_bytes()
    monkeypatch.setattr(packed, "packed_dtype", lambda: torch.float32)
    engine = Engine(device="cpu")
    recipe = Recipe(prompt="a ball", fidelity="fast", **{**TINY, "base_model": str(base)})
    first = engine.generate(recipe).pixels
    old = next(iter(engine._models.models.values())).parts["unet"]
    before = {
        name: tensor.clone() for name, tensor in old.state_dict().items() if not tensor.is_meta
    }
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.seek(header)
        file.write(bytes(path.stat().st_size - header))
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in before.items())
    path.write_bytes(original)
    change_weights(path, lambda tensors: {name: tensor * 0.9 for name, tensor in tensors.items()})
    second = engine.generate(recipe).pixels
    assert not np.array_equal(second, first)
    assert np.array_equal(second, Engine(device="cpu").generate(recipe).pixels)


def test_fast_needs_only_the_memory_of_its_precision(engine):
    exact = Recipe(prompt="a ball", **TINY)
    engine.generate(exact)
    engine.generate(replace(exact, fidelity="fast"))
    sizes = {
        key.fidelity: base.parts["unet"]
        for key, base in engine._models.models.items()
        if key.base_model == str(TINY_BASE)
    }
    count = {
        name: sum(weight.nbytes for weight in unet.parameters()) for name, unet in sizes.items()
    }
    assert count["fast"] == count["exact"] * packed.packed_dtype().itemsize // 4


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("sampler", ["euler_a", "dpmsolver++", "heun"])
def test_images_of_a_batch_equal_images_made_alone(engine, sampler, guidance):
    base = Recipe(prompt="", fidelity="fast", sampler=sampler, guidance_scale=guidance, **DRAWING)
    recipes = [
        replace(base, prompt="a red star", seed=3),
        replace(
            base, prompt="a green square on a white background", negative_prompt="blue", seed=1
        ),
        replace(base, prompt="a red star", seed=4),
    ]
    steps = []
    together = engine.generate_batch(
        recipes, lambda progress: steps.append((progress.step, progress.preview(1).shape))
    )
    assert steps[-1] == (8, (12, 16, 3))
    for recipe, image in zip(recipes, together, strict=True):
        assert image.recipe == replace(recipe, base_sha256=image.recipe.base_sha256)
        assert psnr(image, engine.generate(recipe)) > 35
    assert psnr(together[0], together[2]) < 30


def test_only_images_with_equal_settings_share_a_batch(engine):
    quick = Recipe(prompt="a ball", fidelity="fast", **TINY)
    for recipes in (
        [],
        [quick, replace(quick, width=72)],
        [quick, replace(quick, adapters=(AdapterRef.from_file(LORA),))],
        [replace(quick, fidelity="exact")] * 2,
    ):
        with pytest.raises(RecipeError, match="share a batch"):
            engine.generate_batch(recipes)
    assert np.array_equal(engine.generate_batch([quick])[0].pixels, engine.generate(quick).pixels)


def test_max_batch_is_1_for_exact_and_depends_on_size_for_fast(engine):
    small = Recipe(prompt="", fidelity="fast", width=256, height=256)
    assert engine.max_batch(replace(small, fidelity="exact")) == 1
    assert engine.max_batch(small) > 1
    assert engine.max_batch(replace(small, width=2048, height=2048)) == 1


# --- modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(48, 40),
        nn.Linear(48, 40, bias=False),
        nn.Conv2d(48, 64, 3, padding=1),
        nn.Conv2d(48, 64, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(48, 40, 1),
    ],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)]
)
def test_a_packed_module_computes_what_its_original_does(module, dtype):
    torch.manual_seed(1)
    inputs = torch.randn(2, 6, 48) if isinstance(module, nn.Linear) else torch.randn(2, 48, 10, 6)
    error = 1e-4 if dtype == torch.float32 else 0.05
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.copy_(other.weight.flip(0))
        ours = packed._packed(module, dtype)
        assert isinstance(ours, packed.PackedLinear | packed.PackedConv2d | packed.PackedPointwise)
        assert ours.weight.is_meta
        ours.set_weight(module.weight.to)
        torch.testing.assert_close(
            ours(inputs.to(dtype)).float(), module(inputs), atol=error, rtol=error
        )
        ours.set_weight(other.weight.to)
        torch.testing.assert_close(
            ours(inputs.to(dtype)).float(), other(inputs), atol=error, rtol=error
        )


@pytest.mark.parametrize("scores", [7, 50, 3 * 20 * 20, 10**6])
def test_attention_by_matrix_products_equals_attention(scores, monkeypatch):
    """The limit on scores selects some rows of one head, one head, three of eight heads, or all."""
    monkeypatch.setattr(packed, "_SCORES_AT_ONCE", scores)
    torch.manual_seed(1)
    attention = Attention(32, cross_attention_dim=24, heads=4, dim_head=8).eval()
    self_attention = Attention(32, heads=4, dim_head=8).eval()
    hidden, text = torch.randn(2, 20, 32), torch.randn(2, 9, 24)
    with torch.no_grad():
        expected = attention(hidden, encoder_hidden_states=text), self_attention(hidden)
        for module in (attention, self_attention):
            module.set_processor(packed.BatchedAttention())
        torch.testing.assert_close(attention(hidden, encoder_hidden_states=text), expected[0])
        torch.testing.assert_close(self_attention(hidden), expected[1])


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 1e-4), pytest.param(torch.bfloat16, 0.05, marks=NEEDS_BFLOAT16)],
)
def test_a_packed_gate_computes_what_its_original_does(dtype, error):
    torch.manual_seed(1)
    gate, inputs = GEGLU(48, 80), torch.randn(2, 6, 48)
    ours = packed.PackedGate(gate, dtype)
    with torch.no_grad():
        for _ in range(2):
            ours.proj.set_weight(gate.proj.weight.to)
            torch.testing.assert_close(
                ours(inputs.to(dtype)).float(), gate(inputs), atol=error, rtol=error
            )
            gate.proj.weight.copy_(gate.proj.weight.flip(0))


def test_a_packed_unet_has_packed_gates_and_cached_text_layers():
    recipe = Recipe(prompt="", base_model=str(TINY_BASE), fidelity="fast")
    unet: Any = load_model_of(recipe).parts["unet"]
    gates = [module for module in unet.modules() if isinstance(module, packed.PackedGate)]
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert len(gates) == len(blocks) > 0
    assert all(isinstance(block.attn2.to_k, packed.PackedCachedTextLinear) for block in blocks)
    assert not any(isinstance(block.attn1.to_k, packed.PackedCachedTextLinear) for block in blocks)


def test_a_text_is_projected_once_for_each_weight():
    torch.manual_seed(1)
    linear, text = nn.Linear(24, 32, bias=False), torch.randn(1, 7, 24)
    ours = packed.PackedCachedTextLinear(linear, torch.float32)
    with torch.no_grad():
        ours.set_weight(linear.weight.to)
        first = ours(text)
        assert ours(text) is first
        assert ours(text.clone()) is not first
        linear.weight.neg_()
        ours.set_weight(linear.weight.to)
        torch.testing.assert_close(ours(text), linear(text))


def test_attention_with_other_options_is_not_replaced():
    assert packed._is_plain(Attention(32, heads=4, dim_head=8))
    assert not packed._is_plain(Attention(32, heads=4, dim_head=8, norm_num_groups=4))
    assert not packed._is_plain(Attention(32, heads=4, dim_head=8, residual_connection=True))
    assert not packed._is_plain(Attention(32, heads=4, dim_head=8, rescale_output_factor=2.0))


# --- devices ------------------------------------------------------------------------------------


def test_the_fast_path_depends_on_the_device():
    family = get_family("sd15")
    assert fast_path(family, torch.device("cpu"), "none") is FastPath.PACKED
    assert fast_path(family, torch.device("cuda", 0), "none") is FastPath.COMPILED
    with pytest.raises(DeviceError, match="not supported on mps"):
        fast_path(family, torch.device("mps"), "none")
    with pytest.raises(DeviceError, match="use offload none"):
        fast_path(family, torch.device("cuda", 0), "sequential")
    without = replace(family, accelerations=frozenset({"packed"}))
    assert fast_path(without, torch.device("cpu"), "none") is FastPath.PACKED
    with pytest.raises(DeviceError, match=r"not implemented for Stable Diffusion 1\.5; use"):
        fast_path(without, torch.device("cuda", 0), "none")


def test_a_torch_without_onednn_has_no_fast_path(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no oneDNN"):
        Engine(device="cpu").generate(Recipe(prompt="a ball", fidelity="fast", **TINY))


def test_switching_adapters_does_not_recompile(monkeypatch):
    """Run the CUDA path on the CPU, with a compiler that counts compilations."""
    counter = CompileCounter()
    monkeypatch.setattr(fast_on_cuda, "_COMPILER", counter)
    monkeypatch.setattr(model_module, "fast_path", lambda *_: FastPath.COMPILED)
    torch._dynamo.reset()
    engine = Engine(device="cpu")
    exact = Recipe(prompt="a ball", **TINY)
    quick = replace(exact, fidelity="fast")
    engine.load(quick)
    compiled = counter.frame_count
    assert compiled > 0
    adapters = [
        (),
        (AdapterRef.from_file(LORA),),
        (AdapterRef.from_file(LOKR, 0.5), AdapterRef.from_file(LORA)),
    ]
    for refs in (*adapters, ()):
        image = engine.generate(replace(quick, adapters=refs))
        assert psnr(image, Engine(device="cpu").generate(replace(exact, adapters=refs))) > 40
        assert image.environment["fast"] == "compiled, float32"
    engine.generate_batch([replace(quick, seed=seed) for seed in range(engine.max_batch(quick))])
    assert counter.frame_count == compiled
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_cuda_images_are_close_to_cpu_images(engine):
    recipe = Recipe(prompt="a red sks", adapters=(AdapterRef.from_file(MINIATURE_LORA),), **DRAWING)
    assert (
        psnr(
            Engine(device="cuda").generate(replace(recipe, fidelity="fast")),
            engine.generate(recipe),
        )
        > 30
    )
